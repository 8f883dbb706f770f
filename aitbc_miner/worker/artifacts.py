"""Collecting what a job left behind, when nothing of it is alive any more and so nothing can change.

The job may have left traps: links to the operator's files, FIFOs that block a reader, devices. So every
component of a path is opened by descriptor and never through a link, and only a regular file with a single
name is taken. (openat2(2) does that in one call; where nothing moves any more, one component after another is
as good, and Python has it.) What is taken gets a second name in `artifacts/`, owned by the process that
uploads it. A sparse file counts by its length, for that is what is hashed and sent.
"""

import errno
import hashlib
import os
import signal
import stat
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

from msgspec import Struct
from msgspec.structs import replace

from aitbc_miner.cgroup.group import CgroupError, Group
from aitbc_miner.errors import ErrorCode, JobError
from aitbc_miner.jobs import Artifact, ArtifactSpec, LeftOut
from aitbc_miner.store import reserve
from aitbc_miner.util import fs
from aitbc_miner.util.system import PR_SET_PDEATHSIG, prctl

MB = 1_000_000
CHUNK = 1 << 20
# Bytes in all from which on hashing them is work that counts.
CHARGED_FROM = 8 << 20
MAX_DEPTH = 32
# Letters of a sum.
SUM = 64
# Bytes of a path, and of each of its names.
MAX_PATH, MAX_NAME = 1024, 255
STAGE, LOG = "artifacts", "logs/exec.log"
MAX_LEFT_OUT = 100
# How many files and directories are looked at for each file that may be taken.
ENTRIES_A_FILE = 10
SHUT = frozenset({errno.EACCES, errno.ELOOP, errno.ENOENT, errno.ENOTDIR})


class Caps(Struct, frozen=True):
    """How much may be taken: files, bytes in all, and bytes that this job's allowlist entry permits."""

    files: int
    bytes: int
    job_bytes: int | None = None


class Collector:
    """Takes one job's artifacts; `job_fd` is its directory, `owner` who shall be able to read them.

    What is more than a little is hashed in the job's own `group`, if it has one. A full disk is given back
    what is set aside below `reserve_root`, a little at a time.
    """

    def __init__(
        self,
        job_fd: int,
        caps: Caps,
        owner: tuple[int, int] | None,
        group: Group | None = None,
        reserve_root: Path | None = None,
    ) -> None:
        self._reserve_root = reserve_root
        self._job_fd = job_fd
        self._group = group
        self._caps = caps
        self._owner = owner
        self._taken: list[Artifact] = []
        self._inodes: set[tuple[int, int]] = set()
        # Each name is told once in a report, and this is that of the job's own log.
        self._names = {LOG}
        self.left_out: list[LeftOut] = []
        self._bytes = 0

    def collect(self, specs: list[ArtifactSpec]) -> list[Artifact]:
        """Take the declared artifacts, then everything else in `output/` that can be delivered.

        Raises:
            JobError: E_ARTIFACT for a declared one that is missing or forbidden, E_OUTPUT over a cap.
        """
        try:
            with fs.directory(STAGE, at=self._job_fd) as stage:
                fs.empty(stage)  # of a try that came no further
                for spec in specs:
                    self._take_declared(spec, stage)
                self._take_output(stage)
                self._hash(stage)
        except OSError as error:
            if not _is_shut(error):
                raise
            # A job that runs as our own user can close its directories to us, or replace them.
            raise JobError(
                ErrorCode.E_ARTIFACT, f"cannot collect the output: {error.filename!r}: {error.strerror}"
            ) from error
        return self._taken

    def _take_output(self, stage: int) -> None:
        with fs.directory("output", at=self._job_fd) as output:
            room = iter(range(ENTRIES_A_FILE * self._caps.files))
            for path in walk(output, room, self._leave_out):
                with ExitStack() as stack:
                    try:
                        fd = open_beneath(output, path, stack)
                        self._take(fd, path, ArtifactSpec(path=path), stage)
                    except JobError as error:
                        if error.code is not ErrorCode.E_ARTIFACT:
                            raise
                        self._leave_out(path, error.message.partition(": ")[2])

    def _leave_out(self, path: str, why: str) -> None:
        shown = path if _can_be_sent(path) else ascii(path)[:200]
        if len(self.left_out) < MAX_LEFT_OUT:
            self.left_out.append(LeftOut(shown, why))
        elif len(self.left_out) == MAX_LEFT_OUT:
            self.left_out.append(LeftOut("…", f"and others; no more than {MAX_LEFT_OUT} are listed"))

    def _take_declared(self, spec: ArtifactSpec, stage: int) -> None:
        check_path(spec.path)
        places = [("work", spec.path), ("output", spec.path)]
        if spec.path.startswith("output/"):
            places.append(("output", spec.path.removeprefix("output/")))
        for place, path in places:
            with ExitStack() as stack:
                base = stack.enter_context(fs.directory(place, at=self._job_fd))
                try:
                    fd = open_beneath(base, path, stack)
                except FileNotFoundError:
                    continue
                self._take(fd, spec.path, spec, stage)
                return
        raise JobError(
            ErrorCode.E_ARTIFACT,
            f"cannot collect {spec.path!r}: the job did not write it to work/ or output/",
        )

    def _take(self, fd: int, path: str, spec: ArtifactSpec, stage: int) -> None:
        info = os.fstat(fd)
        inode = (info.st_dev, info.st_ino)
        if inode in self._inodes:
            return  # declared, and found again in output/
        self._check(info, path, spec)
        name = _staged(len(self._taken))
        shown = path
        while shown in self._names:
            shown = f"output/{shown}"
        check_path(shown)
        try:
            self._link(fd, stage, name)
        except OSError as error:
            if fs.may_pass(error):
                raise
            raise JobError(ErrorCode.E_ARTIFACT, f"cannot keep {path!r}: {error.strerror}") from error
        if self._owner:
            os.fchown(fd, *self._owner)
        os.fchmod(fd, 0o640)
        self._inodes.add(inode)
        self._names.add(shown)
        self._bytes += info.st_size
        self._taken.append(Artifact(shown, f"{STAGE}/{name}", info.st_size, "", spec.type))

    def _hash(self, stage: int) -> None:
        """Hash all at once: how many files there are, and how large each is, was the job's to decide."""
        names = [_staged(number) for number in range(len(self._taken))]
        group = self._group if self._bytes >= CHARGED_FROM else None
        sums = [*sums_in(group, stage, names)] if group else []
        # What that process was kept from is done here after all: its limits lose nothing of the job's result.
        sums += [_sum_of(stage, name) for name in names[len(sums) :]]
        self._taken = [replace(one, sha256=digest) for one, digest in zip(self._taken, sums, strict=True)]

    def _link(self, fd: int, stage: int, name: str) -> None:
        root = self._reserve_root
        while True:
            try:
                # Through the descriptor: it is this very file that gets the name, whatever the path says now.
                return os.link(f"/proc/self/fd/{fd}", name, dst_dir_fd=stage, follow_symlinks=True)
            except OSError as error:
                # A second name takes little, but takes something; an inode of tmpfs, for one.
                if error.errno not in fs.FULL or root is None or not reserve.release(root):
                    raise

    def _check(self, info: os.stat_result, path: str, spec: ArtifactSpec) -> None:
        if info.st_nlink != 1:
            raise JobError(
                ErrorCode.E_ARTIFACT, f"cannot collect {path!r}: it has {info.st_nlink} hard links"
            )
        if spec.max_mb is not None and info.st_size > spec.max_mb * MB:
            raise JobError(
                ErrorCode.E_ARTIFACT,
                f"cannot collect {path!r}: {info.st_size} bytes, over its {spec.max_mb:g} MB",
            )
        if len(self._taken) >= self._caps.files:
            raise JobError(ErrorCode.E_OUTPUT, f"cannot collect {path!r}: over {self._caps.files} files")
        own = self._caps.job_bytes
        cap = self._caps.bytes if own is None else min(self._caps.bytes, own)
        if self._bytes + info.st_size > cap:
            raise JobError(ErrorCode.E_OUTPUT, f"cannot collect {path!r}: over {cap} bytes of output in all")


def _is_shut(error: OSError) -> bool:
    """Whether a job has closed something to us, or replaced it; where we are root, nothing is closed."""
    return error.errno in SHUT and not (error.errno == errno.EACCES and os.geteuid() == 0)


def log_artifact(job_fd: int, path: str) -> list[Artifact]:
    """Describe the job's log, which goes along with every result.

    Without a user of its own a job can remove its log or put something else there; then there is none.
    """
    with ExitStack() as stack:
        try:
            fd = open_beneath(job_fd, path, stack)
        except (FileNotFoundError, JobError):
            return []
        return [Artifact(path, path, os.fstat(fd).st_size, sha256(fd), "text/plain")]


def check_path(path: str) -> None:
    """Refuse a path that could lead out of the job's directory, or that no file can have.

    Raises:
        JobError: E_ARTIFACT, with the path.
    """
    parts = path.split("/")
    if not _can_be_sent(path) or any(part in {"", ".", ".."} for part in parts):
        raise JobError(
            ErrorCode.E_ARTIFACT,
            f"cannot collect {path[:200]!r}: not a plain relative path, or a name that cannot be sent",
        )


def _can_be_sent(path: str) -> bool:
    # Undecodable bytes are surrogates here and not printable either. How to escape a quote in the head of a
    # part is agreed; with a backslash some escape, and for others it separates directories.
    return (
        path.isprintable()
        and "\\" not in path
        and len(path.encode()) <= MAX_PATH
        and all(len(part.encode()) <= MAX_NAME for part in path.split("/"))
    )


def open_beneath(base: int, path: str, stack: ExitStack) -> int:
    """Open a regular file below a directory, no component through a link; `stack` closes what was opened.

    Raises:
        FileNotFoundError: it is not there.
        JobError: E_ARTIFACT, it is something else than a regular file, or the way there is a link.
    """
    *parents, name = path.split("/")
    try:
        for part in parents:
            base = os.open(part, fs.DIRECTORY, dir_fd=base)
            stack.callback(os.close, base)
        # Looked at before it is opened, because opening a device can do things.
        _refuse_special(os.stat(name, dir_fd=base, follow_symlinks=False).st_mode, path)
        fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=base)
        stack.callback(os.close, fd)
    except FileNotFoundError:
        raise
    except OSError as error:
        if fs.may_pass(error) and not _is_shut(error):
            raise
        cause = {errno.ELOOP: "a link", errno.ENOTDIR: "a link or no directory"}.get(
            error.errno or 0, error.strerror
        )
        raise JobError(ErrorCode.E_ARTIFACT, f"cannot collect {path!r}: {cause}") from error
    _refuse_special(os.fstat(fd).st_mode, path)
    return fd


def _refuse_special(mode: int, path: str) -> None:
    if not stat.S_ISREG(mode):
        kinds = {stat.S_IFLNK: "a symbolic link", stat.S_IFIFO: "a FIFO", stat.S_IFDIR: "a directory"}
        kind = kinds.get(stat.S_IFMT(mode), "a device or socket")
        raise JobError(ErrorCode.E_ARTIFACT, f"cannot collect {path!r}: it is {kind}, not a regular file")


def walk(
    base: int, room: Iterator[object], leave_out: Callable[[str, str], None], prefix: str = ""
) -> Iterator[str]:
    """Name everything below a directory that is no directory, in order.

    Each entry, directories too, takes one from `room`: neither memory nor time is the job's to decide on.
    `leave_out` is told of what is too deep, is shut to us, or has a name that cannot be sent, and why.

    Raises:
        JobError: E_OUTPUT, no room is left.
    """
    with os.scandir(base) as scan:
        entries = sorted(_within(scan, room), key=lambda entry: entry.name)
    for entry in entries:
        path = prefix + entry.name
        if not _can_be_sent(path):
            leave_out(path, "a name that cannot be sent")
        elif not entry.is_dir(follow_symlinks=False):
            yield path
        elif path.count("/") >= MAX_DEPTH:
            leave_out(path, f"deeper than {MAX_DEPTH} directories")
        else:
            try:
                with fs.directory(entry.name, at=base) as below:
                    yield from walk(below, room, leave_out, path + "/")
            except OSError as error:
                if not _is_shut(error):
                    raise
                leave_out(path, f"cannot be looked into: {error.strerror}")


def _within(scan: "Iterator[os.DirEntry[str]]", room: Iterator[object]) -> "Iterator[os.DirEntry[str]]":
    for entry in scan:
        if next(room, None) is None:
            raise JobError(ErrorCode.E_OUTPUT, "cannot collect output/: too many files and directories in it")
        yield entry


def sha256(fd: int) -> str:
    """Hash a file from its start, in constant memory."""
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(CHUNK))
    offset = 0
    while size := os.preadv(fd, [buffer], offset):
        digest.update(buffer[:size])
        offset += size
    return digest.hexdigest()


def _staged(number: int) -> str:
    return f"{number:04d}"


def _sum_of(stage: int, name: str) -> str:
    with ExitStack() as stack:
        return sha256(open_beneath(stage, name, stack))


def sums_in(group: Group, stage: int, names: list[str]) -> list[str]:
    """Hash files by a process in the job's group, whose limits hold: sparse files cost a job nothing.

    Gives those of the first, as far as that process has come.
    """
    read_end, write_end = os.pipe2(os.O_CLOEXEC)
    try:
        pid = os.fork()
        if pid == 0:
            try:
                prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
                # When all is to end the work is taken over by who has more time.
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                group.write("cgroup.procs", os.getpid())
                for name in names:
                    os.write(write_end, _sum_of(stage, name).encode())
            except (OSError, CgroupError, JobError):
                pass  # the parent finds the cause when it does the work itself
            finally:
                os._exit(0)
    except OSError:
        os.close(read_end)
        raise
    finally:
        os.close(write_end)
    with os.fdopen(read_end, "rb") as file:
        said = file.read().decode()
    os.waitpid(pid, 0)
    return [said[at : at + SUM] for at in range(0, len(said) - SUM + 1, SUM)]
