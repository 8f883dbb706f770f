"""Space set aside on the jobs' disk, so that the node can write records after a job has filled the disk.

The reserve is a directory of allocated files, each as large as a usual record. On a full disk one of these
files becomes the record. If the node freed space instead, a job that goes on writing could take the space.

```
<workspace.root>/+reserve/000000 …    owned by the service, like the records; made by root (`fill`)
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

# No job id has a `+`.
NAME = "+reserve"
MIB = 1 << 20
PIECE = 64 << 10
MAX_PIECES = 4096
# Another process may take the piece at the same moment, or the record may need several pieces.
ATTEMPTS = 8


def write_with_reserve(root: Path, dir_fd: int, name: str, data: bytes) -> None:
    """Replace a file like `fs.write_durably`, on a full disk with pieces of the reserve below `root`.

    Raises:
        OSError: the disk is broken, or the disk is full and the reserve too small.
    """
    try:
        return fs.write_durably(dir_fd, name, data)
    except OSError as error:
        if error.errno not in fs.FULL:
            raise
        full = error
    for _ in range(ATTEMPTS):
        # The record takes over one piece; the rest of a larger record needs free space.
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
    """Give one piece of the reserve back to the disk; False if the reserve is empty."""
    with contextlib.suppress(OSError), fs.directory(root / NAME) as pieces:
        for name in sorted(os.listdir(pieces)):  # noqa: PTH208  # a descriptor
            with contextlib.suppress(FileNotFoundError):  # another was quicker
                os.unlink(name, dir_fd=pieces)
                # Some file systems hand out freed space only when the removal is on the disk.
                os.fsync(pieces)
                return True
    return False


def ensure(root: Path, wanted: int = MIB) -> None:
    """Release pieces until the disk has `wanted` bytes free or the reserve is empty.

    For writes that are no records and that the node cannot try again.
    """
    while not fs.free_space(root).covers(fs.Room(wanted, fs.NO_ROOM.files)) and release(root):
        pass


def disk_error(error: OSError, where: Path | int, doing: str) -> MinerError:
    """Make the job's error of an OSError: the disk `where` is full, try again, or a defect of the miner.

    ENOSPC counts as full only if the disk still looks full: another process may be freeing space.
    """
    said = f"cannot {doing}: {error.strerror or error}"
    if error.errno == errno.EDQUOT or (
        error.errno == errno.ENOSPC and not fs.free_space(where).covers(fs.NO_ROOM)
    ):
        return JobError(ErrorCode.E_DISK, said)
    return LocalError(said) if fs.may_pass(error) else JobError(ErrorCode.E_INTERNAL, said)


def spent(root: Path, mib: int) -> fs.Room:
    """Give the used part of the reserve; no room if the reserve was never made.

    So much of the free space on the disk belongs to the reserve, and is not free for jobs.
    """
    return fs.Room() if _left(root) is None else lacking(root, mib)


def lacking(root: Path, mib: int) -> fs.Room:
    """Give the missing part of the reserve."""
    number, size = _plan(mib)
    lacks = max(0, number - (_left(root) or 0))
    return fs.Room(lacks * size, lacks)


def fill(root: Path, mib: int) -> None:
    """Make the missing pieces; may take long on a slow disk.

    Raises:
        OSError: the disk is full or broken, or another file is in the way; the pieces made so far stay.
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
            # Before the allocation, so that the space counts for the owner's quota, as the record will.
            os.fchown(fd, owner.st_uid, owner.st_gid)
        os.posix_fallocate(fd, 0, size)
    except OSError:
        os.unlink(name, dir_fd=pieces)
        raise
    finally:
        os.close(fd)


def _take(root: Path, dir_fd: int, name: str, _mode: int) -> int:
    """Move a piece to the place of a new record and open it. Raises FileNotFoundError: no piece is left."""
    with fs.directory(root / NAME) as pieces:
        for piece in sorted(os.listdir(pieces)):  # noqa: PTH208  # a descriptor
            with contextlib.suppress(FileNotFoundError):  # another was quicker
                os.rename(piece, name, src_dir_fd=pieces, dst_dir_fd=dir_fd)
                return _opened(pieces, dir_fd, name)
    raise FileNotFoundError


def _opened(pieces: int, dir_fd: int, name: str) -> int:
    fd = os.open(name, os.O_WRONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=dir_fd)
    info = os.fstat(fd)
    # Root finds the file in a directory of the service, and the service could have put any file there.
    if stat.S_ISREG(info.st_mode) and info.st_nlink == 1 and info.st_uid == os.fstat(pieces).st_uid:
        return fd
    os.close(fd)
    raise PermissionError(f"cannot write {name}: a file in {NAME} is not a piece of the reserve")


def _plan(mib: int) -> tuple[int, int]:
    """Give the number of pieces, and the bytes of each piece."""
    whole = mib * MIB
    size = max(PIECE, whole // MAX_PIECES)
    return whole // size, size


def _left(root: Path) -> int | None:
    try:
        with fs.directory(root / NAME) as pieces:
            return len(os.listdir(pieces))  # noqa: PTH208  # only how many
    except OSError:
        return None
