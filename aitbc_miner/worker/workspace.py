"""The directories a job finds, and who owns them.

```
input/      the agent's; empty once the job has started
work/       the job's; where it starts, with the inputs in it
output/     the job's; all that is left here is delivered
tmp/        the job's TMPDIR
logs/       the worker's; readable by the agent, which cannot put anything there
artifacts/  the agent's; second names of what is delivered, readable by the agent
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
from aitbc_miner.sandbox.users import Identity
from aitbc_miner.store.records import PASSABLE, JobDir
from aitbc_miner.util import fs
from aitbc_miner.worker.context import SlotContext
from aitbc_miner.worker.hold import JobHold

OF_JOB = ("work", "output", "tmp")
# How much is looked at in search of a file: how much there is, and how deep, is the job's to decide.
MAX_LOOKED_AT = 20_000
MAX_DEPTH = 32


@contextmanager
def make_directories(hold: JobHold) -> Iterator[None]:
    """Make the job's directories, unless the job has those of a process that waits. They stay."""
    if not hold.prewarmed:
        prepare(hold.job, hold.slot)
    yield


@contextmanager
def take_inputs(hold: JobHold) -> Iterator[None]:
    """Move the inputs into work/. Raises OSError: one of them is not what it should be."""
    at = hold.job.fd
    with fs.directory("input", at=at) as source, fs.directory("work", at=at) as target:
        for name in sorted(os.listdir(source)):  # noqa: PTH208  # a descriptor
            _hand_over(source, name, target, hold.slot)
    yield


def prepare(job: JobDir, slot: SlotContext, *, ahead: bool = False) -> None:
    """Make the directories anew, or take those that `make_ahead` has made. May be tried again.

    Raises:
        OSError: the disk is full, or something in the job's directory is not what it should be.
    """
    for name in (*OF_JOB, "artifacts"):
        # Of an earlier attempt that came no further than this.
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
    """Make the directories of the slot's next job, whichever that is; gives where they are.

    Raises:
        OSError: the disk is full, or something there is not what it should be.
    """
    with fs.directory(root) as at:
        if not fs.exists(at, NEXT):
            with suppress(FileExistsError):  # of another slot's worker, at the same moment
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
    """Remove what a job has left and nobody is to get: on a disk without room its outcome comes first."""
    for name in names:
        with suppress(OSError):
            fs.remove_tree(job_fd, name)


def remove_ahead(root: Path, slot: str) -> None:
    """Remove what `make_ahead` has made, if it can be; the next one will try again."""
    with suppress(OSError), fs.directory(root) as at, fs.directory(NEXT, at=at) as below:
        fs.remove_tree(below, slot)


def _take(job: JobDir, slot: str) -> None:
    # What has them open or mounted goes on having them.
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
    """Move an input to the job, which may do with it as it likes.

    Neither a copy, which costs time and disk, nor a second name, which programs such as gzip refuse.
    """
    fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=source)
    try:
        info = os.fstat(fd)
        fetched = stat.S_ISREG(info.st_mode) and info.st_nlink == 1
        # Ours already where an earlier try came no further: nobody but root can make it so.
        owners = {each.uid for each in (slot.service, slot.runs_as) if each is not None}
        if not fetched or (slot.service is not None and info.st_uid not in owners):
            raise OSError(errno.EPERM, "not a file that was fetched for this job", name)
        if slot.runs_as is not None:
            os.fchown(fd, slot.runs_as.uid, slot.runs_as.gid)
    finally:
        os.close(fd)
    os.rename(name, name, src_dir_fd=source, dst_dir_fd=target)


def room_left(job_fd: int, spent: fs.Room) -> fs.Room:
    """Say what the job's disk still takes.

    `spent` of that came free by writing records on a disk that was full already (`reserve.spent`).
    """
    room = fs.free_space(job_fd)
    return fs.Room(max(0, room.size - spent.size), max(0, room.files - spent.files))


def file_of_size(job_fd: int, size: int) -> str | None:
    """Find a file of the job that has at least this many bytes, among a bounded number of them."""
    room = iter(range(MAX_LOOKED_AT))
    for name in OF_JOB:
        if found := _file_of_size(job_fd, name, name, size, room):
            return found
    return None


def _file_of_size(at: int, name: str, path: str, size: int, room: Iterator[int]) -> str | None:
    # A job that runs as our own user can close its directories to us, or replace them.
    with suppress(OSError), fs.directory(name, at=at) as fd, os.scandir(fd) as entries:
        for entry, _ in zip(entries, room, strict=False):
            below = f"{path}/{entry.name}"
            if entry.is_dir(follow_symlinks=False) and path.count("/") < MAX_DEPTH:
                if found := _file_of_size(fd, entry.name, below, size, room):
                    return found
            elif entry.is_file(follow_symlinks=False) and entry.stat(follow_symlinks=False).st_size >= size:
                return below
    return None
