"""Files that must survive a power cut, and files that a stranger may have prepared as a trap.

A worker is root and works in directories that less privileged processes own, so it goes by directory
descriptors and never follows a link there.
"""

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


@contextmanager
def directory(path: Path | str, *, at: int | None = None) -> Iterator[int]:
    """Open a directory, not through a link, and give its descriptor.

    Raises:
        OSError: it is not there, is a link, or is no directory.
    """
    fd = os.open(path, DIRECTORY, dir_fd=at)
    try:
        yield fd
    finally:
        os.close(fd)


def write_durably(dir_fd: int, name: str, data: bytes, *, mode: int = 0o640) -> None:
    """Replace a file so that after a crash either the old or the new content is there, never a part.

    Raises:
        OSError: the disk is full or broken; the old file is untouched then.
    """
    temporary = f".{name}.new"
    # Made anew: what is there was left by a crash, or is a trap with another name or a reader somewhere else.
    with contextlib.suppress(FileNotFoundError):
        os.unlink(temporary, dir_fd=dir_fd)
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode, dir_fd=dir_fd)
    try:
        with os.fdopen(fd, "wb", closefd=False) as file:
            file.write(data)
        if os.geteuid() == 0:
            # Whoever owns the directory reads on when it is his turn; root needs no permission for its own.
            owner = os.fstat(dir_fd)
            os.fchown(fd, owner.st_uid, owner.st_gid)
        os.fsync(fd)
    finally:
        os.close(fd)
    os.rename(temporary, name, src_dir_fd=dir_fd, dst_dir_fd=dir_fd)
    # Without this the rename itself may be lost, and the old file come back.
    os.fsync(dir_fd)


def read_bounded(dir_fd: int, name: str, limit: int) -> bytes:
    """Read a small regular file, not through a link.

    Raises:
        FileNotFoundError: it is not there.
        OSError: it is a link, or larger than `limit` bytes.
    """
    fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=dir_fd)
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise OSError(errno.EINVAL, "not a regular file", name)
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
