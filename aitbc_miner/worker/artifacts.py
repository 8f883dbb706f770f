"""Collects a job's artifacts after the end of all its processes, so no file can change meanwhile.

The job may have left traps: links to the operator's files, FIFOs that block a reader, devices. So the
collector opens each component of a path by descriptor, follows no link, and takes only regular files with a
single name. (openat2(2) would do so in one call, but Python lacks the call, and on unchanging files the
effect is the same.) A taken file gets a second name in `artifacts/`, owned by the agent's user. A sparse file
counts by its length, because its whole length is hashed and sent.
"""

import errno
import hashlib
import os
import signal
import stat
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from math import inf
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
# From this total of bytes on, the job is charged for hashing.
CHARGED_FROM = 8 << 20
MAX_DEPTH = 32
# Letters of a SHA-256 sum.
SUM = 64
# Bytes of a path, and of each of its names.
MAX_PATH, MAX_NAME = 1024, 255
STAGE, LOG = "artifacts", "logs/exec.log"
MAX_LEFT_OUT = 100
# Entries of output/ to look at, for each file that may be taken.
ENTRIES_A_FILE = 10
SHUT = frozenset({errno.EACCES, errno.ELOOP, errno.ENOENT, errno.ENOTDIR})


class Caps(Struct, frozen=True):
    """Limits of a collection: files, bytes in all, and bytes by the job's allowlist entry."""

    files: int
    bytes: int
    job_bytes: int | None = None


class Collector:
    """Takes a job's artifacts from its directory `job_fd`, and gives them to the user and group `owner`.

    Large output is hashed in the job's cgroup `group`, if any. If the disk is full, the collector releases
    the reserve below `reserve_root`, a little at a time.
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
        # A report has each name once, and the job's log has its name.
        self._names = {LOG}
        self.left_out: list[LeftOut] = []
        self._bytes = 0

    def collect(self, specs: list[ArtifactSpec]) -> list[Artifact]:
        """Take the declared artifacts, then all other deliverable files in `output/`.

        Raises:
            JobError: E_ARTIFACT, a declared artifact is missing or forbidden; E_OUTPUT, a cap is exceeded.
        """
        try:
            with fs.directory(STAGE, at=self._job_fd) as stage:
                fs.empty(stage)  # an earlier try may have left files
                for spec in specs:
                    self._take_declared(spec, stage)
                self._take_output(stage)
                self._hash(stage)
        except OSError as error:
            if not _is_shut(error):
                raise
            # A job that runs as our user can close its directories to us, or replace them.
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
                        self._leave_out(path, error.message.removeprefix(_refusing(path)))

    def _leave_out(self, path: str, why: str) -> None:
        shown = path if _can_be_sent(path) else ascii(path)[:200]
        if len(self.left_out) < MAX_LEFT_OUT:
            self.left_out.append(LeftOut(shown, why))
        elif len(self.left_out) == MAX_LEFT_OUT:
            self.left_out.append(LeftOut("…", f"and others; the list ends after {MAX_LEFT_OUT}"))

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
        raise _refusal(spec.path, "the job wrote no file of this name to work/ or output/")

    def _take(self, fd: int, path: str, spec: ArtifactSpec, stage: int) -> None:
        info = os.fstat(fd)
        inode = (info.st_dev, info.st_ino)
        if inode in self._inodes:
            return  # a declared artifact, found again in output/
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
            raise _refusal(path, error.strerror) from error
        if self._owner:
            os.fchown(fd, *self._owner)
        os.fchmod(fd, 0o640)
        self._inodes.add(inode)
        self._names.add(shown)
        self._bytes += info.st_size
        self._taken.append(Artifact(shown, f"{STAGE}/{name}", info.st_size, "", spec.type))

    def _hash(self, stage: int) -> None:
        """Hash all files together: the job decided on their number and sizes, so only the total counts."""
        names = [_staged(number) for number in range(len(self._taken))]
        group = self._group if self._bytes >= CHARGED_FROM else None
        sums = [*sums_in(group, stage, names)] if group else []
        # The worker hashes the rest: the job's limits must not cost the job its result.
        sums += [_sum_of(stage, name) for name in names[len(sums) :]]
        self._taken = [replace(one, sha256=digest) for one, digest in zip(self._taken, sums, strict=True)]

    def _link(self, fd: int, stage: int, name: str) -> None:
        root = self._reserve_root
        while True:
            try:
                # Link through the descriptor: exactly the open file gets the name.
                return os.link(f"/proc/self/fd/{fd}", name, dst_dir_fd=stage, follow_symlinks=True)
            except OSError as error:
                # A second name may need room, too: on tmpfs an inode.
                if error.errno not in fs.FULL or root is None or not reserve.release(root):
                    raise

    def _check(self, info: os.stat_result, path: str, spec: ArtifactSpec) -> None:
        if info.st_nlink != 1:
            raise _refusal(path, f"the file has {info.st_nlink} hard links")
        if spec.max_mb is not None and info.st_size > spec.max_mb * MB:
            raise _refusal(path, f"{info.st_size} bytes are over its max_mb of {spec.max_mb:g} MB")
        over = ErrorCode.E_OUTPUT
        if len(self._taken) >= self._caps.files:
            raise _refusal(path, f"more than {self._caps.files} files (workspace.max_artifacts)", over)
        own = inf if self._caps.job_bytes is None else self._caps.job_bytes
        cap, key = min((self._caps.bytes, "workspace.max_artifacts_mb"), (own, "max_output_mb"))
        if self._bytes + info.st_size > cap:
            raise _refusal(path, f"all files have more than {cap / 2**20:.12g} MiB ({key})", over)


def _refusal(path: str, cause: str | None, code: ErrorCode = ErrorCode.E_ARTIFACT) -> JobError:
    return JobError(code, f"{_refusing(path)}{cause}")


def _refusing(path: str) -> str:
    return f"cannot collect {path!r}: "


def _is_shut(error: OSError) -> bool:
    """Whether a job has closed or replaced a directory; to root, no directory is closed."""
    return error.errno in SHUT and not (error.errno == errno.EACCES and os.geteuid() == 0)


def log_artifact(job_fd: int, path: str) -> list[Artifact]:
    """Describe the job's log, for delivery with every result; [] if the job removed or replaced its log.

    Only a job that runs as the miner's user can.
    """
    with ExitStack() as stack:
        try:
            fd = open_beneath(job_fd, path, stack)
        except (FileNotFoundError, JobError):
            return []
        return [Artifact(path, path, os.fstat(fd).st_size, sha256(fd), "text/plain")]


def check_path(path: str) -> None:
    """Refuse a path that could lead out of the job's directory, or that cannot be sent.

    Raises:
        JobError: E_ARTIFACT, with the path.
    """
    parts = path.split("/")
    if not _can_be_sent(path) or any(part in {"", ".", ".."} for part in parts):
        raise _refusal(path[:200], "not a plain relative path, or a name that cannot be sent")


def _can_be_sent(path: str) -> bool:
    # Undecodable bytes are surrogates, which are not printable. Servers agree on the escaped quote in the
    # header of a part, but not on a backslash: for some it escapes, for others it separates directories.
    return (
        path.isprintable()
        and "\\" not in path
        and len(path.encode()) <= MAX_PATH
        and all(len(part.encode()) <= MAX_NAME for part in path.split("/"))
    )


def open_beneath(base: int, path: str, stack: ExitStack) -> int:
    """Open a regular file below a directory without following links; `stack` closes the descriptors.

    Raises:
        FileNotFoundError: the file does not exist.
        JobError: E_ARTIFACT, the path is no regular file, or has a link as a component.
    """
    *parents, name = path.split("/")
    try:
        for part in parents:
            base = os.open(part, fs.DIRECTORY, dir_fd=base)
            stack.callback(os.close, base)
        # Check the kind before opening, because opening a device can have effects.
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
        raise _refusal(path, cause) from error
    _refuse_special(os.fstat(fd).st_mode, path)
    return fd


def _refuse_special(mode: int, path: str) -> None:
    if not stat.S_ISREG(mode):
        kinds = {stat.S_IFLNK: "a symbolic link", stat.S_IFIFO: "a FIFO", stat.S_IFDIR: "a directory"}
        kind = kinds.get(stat.S_IFMT(mode), "a device or socket")
        raise _refusal(path, f"{kind}, not a regular file")


def walk(
    base: int, room: Iterator[object], leave_out: Callable[[str, str], None], prefix: str = ""
) -> Iterator[str]:
    """Yield the paths of all entries below a directory except directories, in order.

    Each entry, also a directory, takes one from `room`, so that the job cannot use up memory and time.
    `leave_out` gets path and reason of an entry that is too deep, is shut to us, or has a name that cannot be
    sent.

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
                leave_out(path, f"cannot read the directory: {error.strerror}")


def _within(scan: "Iterator[os.DirEntry[str]]", room: Iterator[object]) -> "Iterator[os.DirEntry[str]]":
    for entry in scan:
        if next(room, None) is None:
            raise JobError(ErrorCode.E_OUTPUT, "cannot collect output/: too many files and directories")
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
    """Hash files in a process under the job's limits, because large sparse files cost a job nothing.

    Gives the sums of the first files, up to the end of the process.
    """
    read_end, write_end = os.pipe2(os.O_CLOEXEC)
    try:
        pid = os.fork()
        if pid == 0:
            try:
                prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
                # SIGTERM ends the process, and the worker takes the work over.
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                group.write("cgroup.procs", os.getpid())
                for name in names:
                    os.write(write_end, _sum_of(stage, name).encode())
            except (OSError, CgroupError, JobError):
                pass  # the worker meets the same error in its own try
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
