"""Writes files that survive a power cut, and opens files in directories of less privileged users.

A worker is root and works in directories of less privileged processes. So it opens files by directory
descriptor and never follows a link in these directories.
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
"""The errors of a write to a full disk, or over its owner's quota."""
OF_THE_FILE = frozenset(
    {
        *(errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EISDIR, errno.EEXIST, errno.EINVAL, errno.EPERM),
        *(errno.ENAMETOOLONG, errno.ENXIO, errno.ENODEV, errno.EXDEV, errno.EMLINK, errno.EFBIG),
        *(errno.ENOTEMPTY, errno.ESRCH, errno.EBADF, errno.EPIPE, errno.ECONNRESET, errno.ENOEXEC),
        *(errno.ENOSYS, errno.EOPNOTSUPP),
    }
)
"""Errors that come from the requested file or the kernel and so recur. All other errors come from the present
state of the machine."""
NAMES_AT_ONCE = 1000
"""`empty` remembers at most so many subdirectories of a directory, because a job may have made millions."""


class Room(NamedTuple):
    """The free bytes and files (inodes) of a disk; `files` is infinite on a disk without a count of files."""

    size: float = 0.0
    files: float = 0.0

    def covers(self, other: "Room") -> bool:
        """Whether this room has at least the bytes and the files of `other`."""
        return self.size >= other.size and self.files >= other.files


def free_space(of: Path | int) -> Room:
    """Give the free room of a disk for users other than root. Raises OSError: statvfs(3) failed."""
    disk = os.statvfs(of)
    # A disk without a number of files, such as btrfs, reports 0 files free.
    return Room(disk.f_bavail * disk.f_frsize, disk.f_favail if disk.f_files else inf)


NO_ROOM = Room(64 << 10, 8)
"""With less room, a disk may refuse even small files, because file systems allocate large blocks."""


def may_pass(error: BaseException | None) -> bool:
    """Whether the machine's present state caused an error, such as a lack of descriptors or a failing disk.

    Such an error does not concern the file and may soon be over, so the caller retries.
    """
    return isinstance(error, OSError) and error.errno is not None and error.errno not in OF_THE_FILE


def tried_again(call: Callable[[], T]) -> T:
    """Call up to three times while the error may pass; the pauses fit into the supervisor's 50 ms a turn."""
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
    """Open a directory, without following a link, and give its descriptor; `at`: the directory above.

    Raises:
        OSError: the directory is missing, is a link, or is no directory.
    """
    fd = open_directory(Path(path)) if at is None else os.open(path, DIRECTORY, dir_fd=at)
    try:
        yield fd
    finally:
        os.close(fd)


def open_directory(path: Path, make: int | None = None) -> int:
    """Open a directory by its path; follow no link at the end, and only trusted links on the way.

    A less trusted user who owns a directory on the way could put a link there and so lead root to another
    directory. `make`: create each missing directory with this mode.

    Raises:
        OSError: the directory is missing, is no directory, or an untrusted link is on the way.
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
    os.fchmod(fd, make)  # the umask may have removed permissions
    return fd


def _trusted_link(at: int, name: str, path: Path) -> Path | None:
    """Read the link `name` on the way to a path; None if `name` is no link.

    Raises:
        OSError: another user could have made the link.
    """
    info, trusted = os.stat(name, dir_fd=at, follow_symlinks=False), {0, os.geteuid()}
    if not stat.S_ISLNK(info.st_mode):
        return None
    place = os.fstat(at)
    shut = not place.st_mode & 0o022 or place.st_mode & stat.S_ISVTX
    if info.st_uid not in trusted or place.st_uid not in trusted or not shut:
        message = f"user id {info.st_uid} or others could have made the link {name!r} on the way"
        raise OSError(errno.ELOOP, message, str(path))
    return Path(os.readlink(name, dir_fd=at))


def make_file(dir_fd: int, name: str, mode: int) -> int:
    """Make a new file, with this mode whatever the umask, and give its descriptor, open for writing."""
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
    """Replace a file so that after a crash the file has either its old or its new content, never a part.

    `make` makes the new file under a temporary name, and may make the file longer than its content.

    Raises:
        OSError: the disk is full or broken; the old file is unchanged.
    """
    temporary = unfinished(name)
    # A crash may have left a file of this name, or a stranger may hold it open or have linked it elsewhere.
    with contextlib.suppress(FileNotFoundError):
        os.unlink(temporary, dir_fd=dir_fd)
    fd = make(dir_fd, temporary, mode)
    try:
        if os.geteuid() == 0:
            # The directory's owner must be able to read the file, which root can read anyway. The file
            # changes its owner before its content, so that a crash never leaves a complete file unreadable.
            owner = os.fstat(dir_fd)
            os.fchown(fd, owner.st_uid, owner.st_gid)
        with os.fdopen(fd, "wb", closefd=False) as file:
            file.write(data)
        os.ftruncate(fd, len(data))
        os.fsync(fd)
    finally:
        os.close(fd)
    os.rename(temporary, name, src_dir_fd=dir_fd, dst_dir_fd=dir_fd)
    # Without this a power cut may undo the rename.
    os.fsync(dir_fd)


def unfinished(name: str) -> str:
    """Give the temporary name under which `write_durably` writes a file."""
    return f".{name}.new"


def read_bounded(dir_fd: int, name: str, limit: int, *, own: bool = False) -> bytes:
    """Read a small regular file, without following a link.

    Raises:
        FileNotFoundError: the file is missing.
        OSError: the file is a link, exceeds `limit` bytes, or (`own`) another user could have written it.
    """
    fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=dir_fd)
    try:
        info = os.fstat(fd)
        if not stat.S_ISREG(info.st_mode):
            raise OSError(errno.EINVAL, "not a regular file", name)
        if own and (info.st_uid != os.geteuid() or info.st_mode & 0o022 or info.st_nlink != 1):
            raise OSError(errno.EPERM, f"user id {info.st_uid} or others could have written this file", name)
        with os.fdopen(fd, "rb", closefd=False) as file:
            data = file.read(limit + 1)
    finally:
        os.close(fd)
    if len(data) > limit:
        raise OSError(f"cannot read {name}: larger than {limit} bytes")
    return data


def open_below(base: int, path: str) -> int:
    """Open a file below a directory for reading, without following a link in any part of the path.

    Raises:
        OSError: the file is missing, a part of the path is a link, or the path leaves the directory.
    """
    *parents, name = path.split("/")
    if any(part in {"", ".", ".."} for part in (*parents, name)):
        raise OSError(f"{path!r} is not below the job's directory")
    with contextlib.ExitStack() as stack:
        for part in parents:
            base = stack.enter_context(directory(part, at=base))
        # Without O_NONBLOCK, opening a FIFO would wait for a writer for ever.
        return os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=base)


def exists(dir_fd: int, name: str) -> bool:
    """Whether the directory has an entry of this name; a link counts even if its target is missing."""
    try:
        os.stat(name, dir_fd=dir_fd, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return True


class _Level(NamedTuple):
    """A directory on the way down: its name, its device and inode, and its unvisited subdirectories."""

    name: str
    identity: tuple[int, int]
    below: list[str]


def remove_tree(at: int, name: str, deadline: float = inf) -> int:
    """Remove a directory with its content, as `empty` does; give the freed bytes."""
    top = _enter(at, name)
    try:
        freed = empty(top, deadline)
    finally:
        os.close(top)
    os.rmdir(name, dir_fd=at)
    return freed


def empty(top: int, deadline: float = inf) -> int:
    """Remove the content of a directory; give the freed bytes.

    A job may have nested directories without limit, so the function neither recurses nor holds a descriptor
    for each level. It needs no room on a full disk, follows no link, and crosses no mount point.

    Raises:
        TimeoutError: the deadline came before the end.
        OSError: an entry cannot be removed, or somebody moved a directory meanwhile.
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
                    raise OSError(errno.ESTALE, "somebody moved the directory during its removal", name)
                os.rmdir(name, dir_fd=here)
            else:
                return freed
    finally:
        os.close(here)


def check_time(deadline: float) -> None:
    """Raise TimeoutError after the deadline, because a program may go on filling the directory for ever."""
    if clock.now() >= deadline:
        raise TimeoutError("too many files to remove in time")


def _enter(at: int, name: str) -> int:
    """Open a directory. Unless root, first restore the owner's rights, which a job may have removed."""
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
    # Not st_dev: a bind mount shares it with its source, and each subvolume of btrfs has its own.
    lines = Path(f"/proc/self/fdinfo/{fd}").read_bytes().splitlines()
    return next(line for line in lines if line.startswith(b"mnt_id:"))


def _unlink_files(fd: int, below: list[str], deadline: float) -> int:
    """Remove a directory's files and append its subdirectories to `below`; give the freed bytes.

    The function stops at NAMES_AT_ONCE subdirectories, so files may remain.
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
