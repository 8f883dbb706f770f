"""The directories of a job and their owners.

```
input/      the agent's; empty once the job has started
work/       the job's; the program starts here, with the inputs
output/     the job's; all files here are delivered
tmp/        the job's TMPDIR
logs/       the worker's; the agent may read, but not write
artifacts/  the agent's; second names of the delivered files
```
"""

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from msgspec.structs import replace

from aitbc_miner.jobs import NEXT
from aitbc_miner.sandbox.bubblewrap import OF_JOB
from aitbc_miner.sandbox.users import Identity
from aitbc_miner.store.records import PASSABLE, JobDir
from aitbc_miner.util import fs
from aitbc_miner.worker.context import SlotContext
from aitbc_miner.worker.hold import JobHold

# Limits of a search for a file, because the job decides on the number and depth of its files.
MAX_LOOKED_AT = 20_000
MAX_DEPTH = 32


@contextmanager
def make_directories(hold: JobHold) -> Iterator[None]:
    """Make the job's directories, unless the job takes over those of a prewarmed process. They stay."""
    if not hold.prewarmed:
        prepare(hold.job, hold.slot)
    yield


@contextmanager
def take_inputs(hold: JobHold) -> Iterator[None]:
    """Move the inputs into work/. Raises OSError if a file in input/ is no fetched input."""
    at = hold.job.fd
    with fs.directory("input", at=at) as source, fs.directory("work", at=at) as target:
        for name in sorted(os.listdir(source)):  # noqa: PTH208  # a descriptor
            _hand_over(source, name, target, hold.slot)
    yield


def prepare(job: JobDir, slot: SlotContext, *, ahead: bool = False) -> None:
    """Make the directories anew, or (`ahead`) take the directories of `make_ahead`. May be tried again.

    Raises:
        OSError: the disk is full, or a directory of the job is no directory.
    """
    for name in (*OF_JOB, "artifacts"):
        # An earlier attempt may have stopped here.
        if fs.exists(job.fd, name):
            fs.remove_tree(job.fd, name)
    if ahead:
        _take(job, slot.spec.name)
    else:
        for name in OF_JOB:
            _make(job.fd, name, 0o700, slot.runs_as)
    _make(job.fd, "artifacts", 0o750, slot.service)
    # The agent may read the log, and only the worker may change it.
    reader = None if slot.service is None else replace(slot.service, uid=os.geteuid())
    _make(job.fd, "logs", 0o750, reader, kept=True)


def make_ahead(root: Path, slot: str, runs_as: Identity | None) -> Path:
    """Make the directories of the slot's next job, before the job is known; give their place.

    Raises:
        OSError: the disk is full, or a path is no directory.
    """
    with fs.directory(root) as at:
        if not fs.exists(at, NEXT):
            with suppress(FileExistsError):  # another slot's worker made it at the same moment
                _make(at, NEXT, PASSABLE, None)
        with fs.directory(NEXT, at=at) as below:
            if fs.exists(below, slot):
                fs.remove_tree(below, slot)
            _make(below, slot, PASSABLE, None)
            with fs.directory(slot, at=below) as place:
                for name in OF_JOB:
                    _make(place, name, 0o700, runs_as)
    return root / NEXT / slot


def make_room(job_fd: int, names: tuple[str, ...] = OF_JOB) -> None:
    """Remove a job's undelivered files, to make room for its outcome on a full disk."""
    for name in names:
        with suppress(OSError):
            fs.remove_tree(job_fd, name)


def remove_ahead(root: Path, slot: str) -> None:
    """Remove the directories of `make_ahead`; after a failure, the next `make_ahead` removes them."""
    with suppress(OSError), fs.directory(root) as at, fs.directory(NEXT, at=at) as below:
        fs.remove_tree(below, slot)


def _take(job: JobDir, slot: str) -> None:
    # The prewarmed process keeps the directories open and mounted.
    with (
        fs.directory(job.path.parent) as at,
        fs.directory(NEXT, at=at) as below,
        fs.directory(slot, at=below) as place,
    ):
        for name in OF_JOB:
            os.rename(name, name, src_dir_fd=place, dst_dir_fd=job.fd)


def _make(at: int, name: str, mode: int, owner: Identity | None, *, kept: bool = False) -> None:
    with suppress(*([FileExistsError] if kept else [])):
        os.mkdir(name, mode, dir_fd=at)
    with fs.directory(name, at=at) as fd:
        os.fchmod(fd, mode)
        if owner:
            os.fchown(fd, owner.uid, owner.gid)


def _hand_over(source: int, name: str, target: int, slot: SlotContext) -> None:
    """Move an input to the job and make the job's user its owner.

    A copy would cost time and disk, and programs such as gzip refuse files with a second name.
    """
    fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=source)
    try:
        info = os.fstat(fd)
        fetched = stat.S_ISREG(info.st_mode) and info.st_nlink == 1
        # After an interrupted try the job's user owns the file already; only root can have given it away.
        owners = {each.uid for each in (slot.service, slot.runs_as) if each is not None}
        if not fetched or (slot.service is not None and info.st_uid not in owners):
            raise OSError(errno.EPERM, "not a fetched input of the job", name)
        if slot.runs_as is not None:
            os.fchown(fd, slot.runs_as.uid, slot.runs_as.gid)
    finally:
        os.close(fd)
    os.rename(name, name, src_dir_fd=source, dst_dir_fd=target)


def room_left(job_fd: int, spent: fs.Room) -> fs.Room:
    """Give the room on the job's disk without `spent`, the part of the reserve freed for records."""
    room = fs.free_space(job_fd)
    return fs.Room(max(0, room.size - spent.size), max(0, room.files - spent.files))


def file_of_size(job_fd: int, size: int) -> str | None:
    """Find a file of the job with at least `size` bytes, among a bounded number of files."""
    room = iter(range(MAX_LOOKED_AT))
    for name in OF_JOB:
        if found := _file_of_size(job_fd, name, name, size, room):
            return found
    return None


def _file_of_size(at: int, name: str, path: str, size: int, room: Iterator[int]) -> str | None:
    # A job that runs as our user can close its directories to us, or replace them.
    with suppress(OSError), fs.directory(name, at=at) as fd, os.scandir(fd) as entries:
        for entry, _ in zip(entries, room, strict=False):
            below = f"{path}/{entry.name}"
            if entry.is_dir(follow_symlinks=False) and path.count("/") < MAX_DEPTH:
                if found := _file_of_size(fd, entry.name, below, size, room):
                    return found
            elif entry.is_file(follow_symlinks=False) and entry.stat(follow_symlinks=False).st_size >= size:
                return below
    return None
