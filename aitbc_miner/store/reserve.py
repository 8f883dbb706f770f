"""Space set aside on the jobs' disk, so that records can be written when a job has filled the rest.

It is a directory of files as large as a record usually gets, all of them allocated. On a full disk one of
them becomes the record: nothing has to be freed first, which a job that goes on writing could snatch away.

```
<workspace.root>/+reserve/000000 …    the service's, as the records are; made by root (`fill`)
```
"""

import contextlib
import errno
import os
import stat
from functools import partial
from pathlib import Path

from aitbc_miner.errors import ErrorCode, JobError, LocalError, MinerError
from aitbc_miner.util import fs

# `+` is in no job id.
NAME = "+reserve"
MIB = 1 << 20
PIECE = 64 << 10
MAX_PIECES = 4096
# A piece may be taken by others who write a record at the same moment, or the record need more than one.
ATTEMPTS = 8


def write_with_reserve(root: Path, dir_fd: int, name: str, data: bytes) -> None:
    """Replace a file like `fs.write_durably`, if need be with what is set aside below `root`.

    Raises:
        OSError: the disk is full and so much is not set aside any more, or it is broken.
    """
    try:
        return fs.write_durably(dir_fd, name, data)
    except OSError as error:
        if error.errno not in fs.FULL:
            raise
        full = error
    for _ in range(ATTEMPTS):
        # What does not fit into one piece needs room beside it.
        for _ in range(len(data) // PIECE):
            release(root)
        try:
            return fs.write_durably(dir_fd, name, data, make=partial(_take, root))
        except FileNotFoundError:
            raise full from None
        except OSError as error:
            if error.errno not in fs.FULL:
                raise
    raise full


def release(root: Path) -> bool:
    """Give a piece of what is set aside back to the disk; False when there is nothing left of it."""
    with contextlib.suppress(OSError), fs.directory(root / NAME) as pieces:
        for name in sorted(os.listdir(pieces)):  # noqa: PTH208  # a descriptor
            with contextlib.suppress(FileNotFoundError):  # another was quicker
                os.unlink(name, dir_fd=pieces)
                # Some file systems hand out what was freed only when that is on the disk.
                os.fsync(pieces)
                return True
    return False


def ensure(root: Path, wanted: int = MIB) -> None:
    """See to it that the disk has room for something that is no record, as far as what is set aside goes.

    `wanted` are bytes. For what cannot be tried again after it has failed.
    """
    while not fs.free_space(root).covers(fs.Room(wanted, fs.NO_ROOM.files)) and release(root):
        pass


def disk_error(error: OSError, where: Path | int, doing: str) -> MinerError:
    """Say what an error of the disk `where` means for a job: it is full, or is tried again, or is our defect.

    That it is full is believed if it looks so: another may be about to give back what it has taken.
    """
    said = f"cannot {doing}: {error.strerror or error}"
    if error.errno == errno.EDQUOT or (
        error.errno == errno.ENOSPC and not fs.free_space(where).covers(fs.NO_ROOM)
    ):
        return JobError(ErrorCode.E_DISK, said)
    return LocalError(said) if fs.may_pass(error) else JobError(ErrorCode.E_INTERNAL, said)


def spent(root: Path, mib: int) -> fs.Room:
    """Give how much of what was set aside has been used since; nothing if it never was.

    So much of what is free on the disk was taken from there when it was full, and is not free at all.
    """
    return fs.Room() if _left(root) is None else lacking(root, mib)


def lacking(root: Path, mib: int) -> fs.Room:
    """Give what is to be set aside and is not."""
    number, size = _plan(mib)
    lacks = max(0, number - (_left(root) or 0))
    return fs.Room(lacks * size, lacks)


def fill(root: Path, mib: int) -> None:
    """Set aside what is lacking; takes as long as the disk takes.

    Raises:
        OSError: the disk is full or broken, or something is in the way; what could be made stays.
    """
    number, size = _plan(mib)
    with fs.directory(root) as at:
        owner = os.fstat(at)
        with contextlib.suppress(FileExistsError):
            os.mkdir(NAME, 0o750, dir_fd=at)
        with fs.directory(NAME, at=at) as pieces:
            if os.geteuid() == 0:
                os.fchmod(pieces, 0o750)
                os.fchown(pieces, owner.st_uid, owner.st_gid)
            there = set(os.listdir(pieces))  # noqa: PTH208  # a descriptor
            wanted = [f"{n:06}" for n in range(number)]
            for name in there.difference(wanted):
                os.unlink(name, dir_fd=pieces)
            for name in wanted:
                if name not in there:
                    _make_piece(pieces, name, size, owner)
            os.fsync(pieces)


def _make_piece(pieces: int, name: str, size: int, owner: os.stat_result) -> None:
    fd = fs.make_file(pieces, name, 0o640)
    try:
        if os.geteuid() == 0:
            # Before it is large, so that it counts as his, as the record will.
            os.fchown(fd, owner.st_uid, owner.st_gid)
        os.posix_fallocate(fd, 0, size)
    except OSError:
        os.unlink(name, dir_fd=pieces)
        raise
    finally:
        os.close(fd)


def _take(root: Path, dir_fd: int, name: str, _mode: int) -> int:
    """Move a piece to where a record is to be written and open it. Raises FileNotFoundError: none is left."""
    with fs.directory(root / NAME) as pieces:
        for piece in sorted(os.listdir(pieces)):  # noqa: PTH208  # a descriptor
            with contextlib.suppress(FileNotFoundError):  # another was quicker
                os.rename(piece, name, src_dir_fd=pieces, dst_dir_fd=dir_fd)
                return _opened(pieces, dir_fd, name)
    raise FileNotFoundError


def _opened(pieces: int, dir_fd: int, name: str) -> int:
    fd = os.open(name, os.O_WRONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=dir_fd)
    info = os.fstat(fd)
    # Root writes here what it finds in a directory of the service's, which could have put anything there.
    if stat.S_ISREG(info.st_mode) and info.st_nlink == 1 and info.st_uid == os.fstat(pieces).st_uid:
        return fd
    os.close(fd)
    raise PermissionError("no piece of the reserve, but somebody else's file")


def _plan(mib: int) -> tuple[int, int]:
    """Say how many pieces of how many bytes to make."""
    whole = mib * MIB
    size = max(PIECE, whole // MAX_PIECES)
    return whole // size, size


def _left(root: Path) -> int | None:
    try:
        with fs.directory(root / NAME) as pieces:
            return len(os.listdir(pieces))  # noqa: PTH208  # only how many
    except OSError:
        return None
