"""How much a running job has on disk, counted a little at a time: whoever counts has deadlines to keep.

Bytes are those that the disk gave: a sparse file has few, one of several names has them once. The count goes
by directory descriptors and through no link. It is no quota: what a job writes in between is seen at the
next count, and what is no file any more but still open is not seen at all.
"""

import os
import stat
from collections.abc import Generator, Sequence
from contextlib import suppress
from typing import Self

from aitbc_miner.util import clock, fs
from aitbc_miner.worker.hold import JobHold
from aitbc_miner.worker.workspace import OF_JOB

MIB = 1 << 20
MAX_DEPTH = 100
"""Directories in each other; each that is open takes two descriptors."""

# Seconds: how long one look may take, and what it leaves to others before it goes on; from one count to the
# next, which is also so many times as long as the last one has taken.
LOOK_S, PAUSE_S = 0.02, 0.06
REST_S = 2.0
REST_TIMES = 10
BLOCK = 512

SeenTree = Generator[tuple[int, os.stat_result], None, None]


class DiskUse:
    """Watches the directories `names` of the job that is open as `job_fd`. Bytes and files; None: no limit.

    `look` is to be called when it is `due`, a time of `clock.now()`; `counted` are the bytes of the last
    whole count.
    """

    def __init__(
        self, job_fd: int, names: Sequence[str], most_bytes: int | None, most_files: int | None
    ) -> None:
        self._job_fd = job_fd
        self._names = names
        self._most_bytes = most_bytes
        self._most_files = most_files
        self._suspected = False
        self.counted: int | None = None
        self._begin()
        self.due = clock.now() + REST_S

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close what is open of a count that has not come to its end."""
        self._entries.close()

    def look(self) -> str:
        """Go on with the count for a moment; says of what there is too much, else ''.

        Two counts in a row must have found it: one alone counts twice what is moved while it goes on.
        """
        began = clock.now()
        said = ""
        for depth, info in self._entries:
            said = self._count(depth, info)
            if said or clock.now() >= began + LOOK_S:
                break
        else:
            self._rest(began)
            self._suspected = False
            return ""
        self._spent += clock.now() - began
        if not said:
            self.due = clock.now() + PAUSE_S
            return ""
        self.close()
        self._begin()
        # The second time at once: by then it may be much more.
        self.due = clock.now()
        sure, self._suspected = self._suspected, True
        return said if sure else ""

    def _begin(self) -> None:
        self._entries = _everything(self._job_fd, self._names)
        self._spent = 0.0
        self._bytes = self._files = 0

    def _rest(self, began: float) -> None:
        spent = self._spent + clock.now() - began
        self.counted = self._bytes
        self._begin()
        self.due = clock.now() + max(REST_S, REST_TIMES * spent)

    def _count(self, depth: int, info: os.stat_result) -> str:
        self._files += 1
        # Each of its names is met, so each is told its share.
        self._bytes += info.st_blocks * BLOCK // max(1, info.st_nlink if stat.S_ISREG(info.st_mode) else 1)
        if self._most_bytes is not None and self._bytes > self._most_bytes:
            return f"it had more than {self._most_bytes // MIB} MiB on disk (workspace.max_job_mb)"
        if self._most_files is not None and self._files > self._most_files:
            return f"it had more than {self._most_files} files and directories (workspace.max_job_files)"
        if depth > MAX_DEPTH:
            return f"it had directories more than {MAX_DEPTH} deep"
        return ""


def count_use(hold: JobHold) -> DiskUse:
    """Count what the job has on disk, by the limits of the configuration."""
    kept = hold.slot.config.workspace
    most_bytes = None if kept.max_job_mb is None else kept.max_job_mb * MIB
    return DiskUse(hold.job.fd, OF_JOB, most_bytes, kept.max_job_files)


def _everything(job_fd: int, names: Sequence[str]) -> SeenTree:
    """Give all that is in these directories, with how deep it is; in constant memory but for the depth.

    What is gone when its turn comes, or shut to us, is passed over.
    """
    for name in names:
        way: list[_Level] = []
        try:
            with suppress(OSError):
                way.append(_Level(name, job_fd))
            while way:
                entry = way[-1].next()
                if entry is None:
                    way.pop().close()
                    continue
                with suppress(OSError):
                    info = entry.stat(follow_symlinks=False)
                    yield len(way), info
                    if stat.S_ISDIR(info.st_mode) and len(way) <= MAX_DEPTH:
                        way.append(_Level(entry.name, way[-1].fd))
        finally:
            for level in way:
                level.close()


class _Level:
    """A directory on the way down, and how far its entries have been looked at."""

    def __init__(self, name: str, at: int) -> None:
        self.fd = os.open(name, fs.DIRECTORY, dir_fd=at)
        try:
            self._entries = os.scandir(self.fd)
        except OSError:
            os.close(self.fd)
            raise

    def next(self) -> "os.DirEntry[str] | None":
        with suppress(OSError):
            return next(self._entries, None)
        return None

    def close(self) -> None:
        self._entries.close()
        os.close(self.fd)
