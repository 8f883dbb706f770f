"""Files that must survive a power cut, and files that a stranger may have prepared as a trap.

A worker is root and works in directories that less privileged processes own, so it goes by directory
descriptors and never follows a link there.
"""

import contextlib
import errno
import os
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import inf
from pathlib import Path
from typing import NamedTuple, TypeVar

from aitbc_miner.util import clock

T = TypeVar("T")

DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_PASS = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
MAX_LINKS = 40
FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
"""What a write is refused with by a disk, or an owner's share of it, that has no room."""
OF_THE_FILE = frozenset(
    {
        *(errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EISDIR, errno.EEXIST, errno.EINVAL, errno.EPERM),
        *(errno.ENAMETOOLONG, errno.ENXIO, errno.ENODEV, errno.EXDEV, errno.EMLINK, errno.EFBIG),
        *(errno.ENOTEMPTY, errno.ESRCH, errno.EBADF, errno.EPIPE, errno.ECONNRESET, errno.ENOEXEC),
        *(errno.ENOSYS, errno.EOPNOTSUPP),
    }
)
"""What tells of the file that is asked for, or of this kernel, and stays so. All else is this machine's own
trouble, whoever meets it."""
# How many subdirectories of one are kept in mind: how many there are was a stranger's to decide.
NAMES_AT_ONCE = 1000


class Room(NamedTuple):
    """Bytes and files that a disk still takes; infinitely many files where they are not counted."""

    size: float = 0.0
    files: float = 0.0

    def covers(self, other: "Room") -> bool:
        """Whether there is as much of both."""
        return self.size >= other.size and self.files >= other.files


def free_space(of: Path | int) -> Room:
    """Say what whoever is not root can still write there. Raises OSError: that cannot be told."""
    disk = os.statvfs(of)
    # Without a number of files, as on btrfs, none are "free" either.
    return Room(disk.f_bavail * disk.f_frsize, disk.f_favail if disk.f_files else inf)


NO_ROOM = Room(64 << 10, 8)
"""With less a disk refuses even small files: file systems hand out whole blocks, some of them large."""


def may_pass(error: BaseException | None) -> bool:
    """Whether this is trouble of this machine, such as a want of descriptors or a disk that fails.

    It says nothing about the file, and may be over in a moment: whatever was to be done is tried again.
    """
    return isinstance(error, OSError) and error.errno is not None and error.errno not in OF_THE_FILE


def tried_again(call: Callable[[], T]) -> T:
    """Call, and after trouble that may pass again; the pauses leave the supervisor its 50 ms a turn."""
    for pause in (0.01, 0.03):
        try:
            return call()
        except OSError as error:
            if not may_pass(error):
                raise
        time.sleep(pause)
    return call()


@contextmanager
def directory(path: Path | str, *, at: int | None = None) -> Iterator[int]:
    """Open a directory, not through a link, and give its descriptor; without `at` as `open_directory` does.

    Raises:
        OSError: it is not there, is a link, or is no directory.
    """
    fd = open_directory(Path(path)) if at is None else os.open(path, DIRECTORY, dir_fd=at)
    try:
        yield fd
    finally:
        os.close(fd)


def open_directory(path: Path, make: int | None = None) -> int:
    """Open a directory by its path, not through a link at its end, nor through a stranger's on the way.

    Where a less trusted user owns a directory on the way, he decides what is found in it, and so whether root
    ends up in his directory or in another's. What is missing is made with the mode `make`, if one is given.

    Raises:
        OSError: it is not there, is no directory, or such a link is on the way.
    """
    path = path.absolute()
    here, ahead, links = os.open("/", _PASS), list(reversed(path.parts[1:])), MAX_LINKS
    try:
        while ahead:
            part = ahead.pop()
            try:
                here = _instead_of(here, _step(here, part, DIRECTORY if not ahead else _PASS, make))
            except NotADirectoryError:
                links -= 1
                target = _trusted_link(here, part, path) if ahead else None
                if target is None or not links:
                    raise
                if target.is_absolute():
                    here = _instead_of(here, os.open("/", _PASS))
                ahead += reversed(target.parts[target.is_absolute() :])
        return _instead_of(here, os.open(".", DIRECTORY, dir_fd=here))
    except BaseException:
        os.close(here)
        raise


def _step(here: int, part: str, flags: int, make: int | None) -> int:
    try:
        return os.open(part, flags, dir_fd=here)
    except FileNotFoundError:
        if make is None:
            raise
    os.mkdir(part, make, dir_fd=here)
    fd = os.open(part, DIRECTORY, dir_fd=here)
    os.fchmod(fd, make)  # whatever the umask is
    return fd


def _trusted_link(at: int, name: str, path: Path) -> Path | None:
    """Read a link on the way to a path; None for what is none.

    Raises:
        OSError: somebody else could have made it.
    """
    info, trusted = os.stat(name, dir_fd=at, follow_symlinks=False), {0, os.geteuid()}
    if not stat.S_ISLNK(info.st_mode):
        return None
    place = os.fstat(at)
    shut = not place.st_mode & 0o022 or place.st_mode & stat.S_ISVTX
    if info.st_uid not in trusted or place.st_uid not in trusted or not shut:
        message = f"{name!r} on the way is a link that user id {info.st_uid} could have made"
        raise OSError(errno.ELOOP, message, str(path))
    return Path(os.readlink(name, dir_fd=at))


def make_file(dir_fd: int, name: str, mode: int) -> int:
    """Make a file, which must not be there, and give it open for writing; no umask changes its mode."""
    fd = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode, dir_fd=dir_fd)
    os.fchmod(fd, mode)
    return fd


def write_durably(
    dir_fd: int,
    name: str,
    data: bytes,
    *,
    mode: int = 0o640,
    make: Callable[[int, str, int], int] = make_file,
) -> None:
    """Replace a file so that after a crash either the old or the new content is there, never a part.

    `make` makes the new file, under another name at first, and may make it longer than its content.

    Raises:
        OSError: the disk is full or broken; the old file is untouched then.
    """
    temporary = unfinished(name)
    # Made anew: what is there was left by a crash, or is a trap with another name or a reader somewhere else.
    with contextlib.suppress(FileNotFoundError):
        os.unlink(temporary, dir_fd=dir_fd)
    fd = make(dir_fd, temporary, mode)
    try:
        if os.geteuid() == 0:
            # Whoever owns the directory reads on when it is his turn; root needs no permission for its own.
            # First: what is whole can be read by him, also if we come no further than that.
            owner = os.fstat(dir_fd)
            os.fchown(fd, owner.st_uid, owner.st_gid)
        with os.fdopen(fd, "wb", closefd=False) as file:
            file.write(data)
        os.ftruncate(fd, len(data))
        os.fsync(fd)
    finally:
        os.close(fd)
    os.rename(temporary, name, src_dir_fd=dir_fd, dst_dir_fd=dir_fd)
    # Without this the rename itself may be lost, and the old file come back.
    os.fsync(dir_fd)


def unfinished(name: str) -> str:
    """Say what `write_durably` calls a file before it gets its name."""
    return f".{name}.new"


def read_bounded(dir_fd: int, name: str, limit: int, *, own: bool = False) -> bytes:
    """Read a small regular file, not through a link.

    Raises:
        FileNotFoundError: it is not there.
        OSError: it is a link, larger than `limit` bytes, or, with `own`, another user could have written it.
    """
    fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=dir_fd)
    try:
        info = os.fstat(fd)
        if not stat.S_ISREG(info.st_mode):
            raise OSError(errno.EINVAL, "not a regular file", name)
        if own and (info.st_uid != os.geteuid() or info.st_mode & 0o022 or info.st_nlink != 1):
            raise OSError(errno.EPERM, f"user id {info.st_uid} or others could have written it", name)
        with os.fdopen(fd, "rb", closefd=False) as file:
            data = file.read(limit + 1)
    finally:
        os.close(fd)
    if len(data) > limit:
        raise OSError(f"cannot read {name}: larger than {limit} bytes")
    return data


def open_below(base: int, path: str) -> int:
    """Open a file below a directory for reading, following no link in any part of the way.

    Raises:
        OSError: it is not there, a part of the way is a link, or the path leads elsewhere.
    """
    *parents, name = path.split("/")
    if any(part in {"", ".", ".."} for part in (*parents, name)):
        raise OSError(f"{path!r} is not below the job's directory")
    with contextlib.ExitStack() as stack:
        for part in parents:
            base = stack.enter_context(directory(part, at=base))
        # O_NONBLOCK: opening a FIFO would wait for a writer for ever.
        return os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=base)


def exists(dir_fd: int, name: str) -> bool:
    """Whether anything of that name is in the directory, links included."""
    try:
        os.stat(name, dir_fd=dir_fd, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return True


class _Level(NamedTuple):
    """A directory on the way down: its name in the one above, what it is, and what to go into next."""

    name: str
    identity: tuple[int, int]
    below: list[str]


def remove_tree(at: int, name: str, deadline: float = inf) -> int:
    """Remove a directory with all that is in it; gives the bytes that this frees. See `empty`."""
    top = _enter(at, name)
    try:
        freed = empty(top, deadline)
    finally:
        os.close(top)
    os.rmdir(name, dir_fd=at)
    return freed


def empty(top: int, deadline: float = inf) -> int:
    """Remove all that is in a directory; gives the bytes that this frees.

    How deep it goes was a stranger's to decide, so this takes neither recursion nor a descriptor for each
    level; nor any room on the disk, which may be full. No link is followed, and no mount point crossed.

    Raises:
        TimeoutError: not all is gone at the deadline.
        OSError: something cannot be removed, or is moved about meanwhile.
    """
    mount = _mount_of(top)
    way = [_Level("", _identity(top), [])]
    here = os.dup(top)
    freed = 0
    try:
        while True:
            below = way[-1].below
            if not below:
                freed += _unlink_files(here, below, deadline)
            if below:
                here = _instead_of(here, _enter(here, name := below.pop()))
                if _mount_of(here) != mount:
                    raise OSError(errno.EXDEV, "another file system is mounted there", name)
                way.append(_Level(name, _identity(here), []))
            elif len(way) > 1:
                name = way.pop().name
                here = _instead_of(here, os.open("..", DIRECTORY, dir_fd=here))
                if _identity(here) != way[-1].identity:
                    raise OSError(errno.ESTALE, "moved while it was removed", name)
                os.rmdir(name, dir_fd=here)
            else:
                return freed
    finally:
        os.close(here)


def check_time(deadline: float) -> None:
    """Raise TimeoutError once it is over: somebody with a way into a directory could fill it for ever."""
    if clock.now() >= deadline:
        raise TimeoutError("it is too much for the time there is")


def _enter(at: int, name: str) -> int:
    """Open a directory, which its owner may have shut to himself: only root is not stopped by that."""
    if os.geteuid() != 0:
        fd = os.open(name, DIRECTORY | os.O_PATH, dir_fd=at)
        try:
            if os.fstat(fd).st_mode & stat.S_IRWXU != stat.S_IRWXU:
                Path(f"/proc/self/fd/{fd}").chmod(stat.S_IRWXU)
        finally:
            os.close(fd)
    return os.open(name, DIRECTORY, dir_fd=at)


def _instead_of(old: int, new: int) -> int:
    os.close(old)
    return new


def _identity(fd: int) -> tuple[int, int]:
    info = os.fstat(fd)
    return info.st_dev, info.st_ino


def _mount_of(fd: int) -> bytes:
    # Not by the number of the device, which a bind mount shares, and a subvolume of btrfs does not.
    lines = Path(f"/proc/self/fdinfo/{fd}").read_bytes().splitlines()
    return next(line for line in lines if line.startswith(b"mnt_id:"))


def _unlink_files(fd: int, below: list[str], deadline: float) -> int:
    """Remove files of a directory, and name directories in it, up to so many; gives the bytes that are freed.

    All of its files, where it names fewer.
    """
    freed = 0
    with os.scandir(fd) as entries:
        for entry in entries:
            check_time(deadline)
            if entry.is_dir(follow_symlinks=False):
                below.append(entry.name)
                if len(below) == NAMES_AT_ONCE:
                    break
                continue
            info = entry.stat(follow_symlinks=False)
            os.unlink(entry.name, dir_fd=fd)
            freed += info.st_blocks * 512 if info.st_nlink == 1 else 0
    return freed
