"""Counts a running job's bytes and files on disk, a little at a time: the worker has deadlines to keep.

The count takes allocated bytes: a sparse file has few, and several names of a file count once. The count goes
by directory descriptors and follows no link. The count is no quota: it sees new files only at its next round,
and never sees open files without a name.
"""

import os
import stat
from collections.abc import Generator, Sequence
from contextlib import suppress
from typing import Self

from aitbc_miner.sandbox.bubblewrap import OF_JOB
from aitbc_miner.slots.spec import MIB
from aitbc_miner.util import clock, fs
from aitbc_miner.worker.hold import JobHold

MAX_DEPTH = 100
"""Nested directories; each open directory takes two descriptors."""

# Seconds: the length of a look, the pause between two looks, and the least rest between two counts. The rest
# is also at least REST_TIMES the time of the last count.
LOOK_S, PAUSE_S = 0.02, 0.06
REST_S = 2.0
REST_TIMES = 10
BLOCK = 512

SeenTree = Generator[tuple[int, os.stat_result], None, None]


class DiskUse:
    """Watches the directories `names` of the job open as `job_fd`. Limits in bytes and files; None: no limit.

    Call `look` at the time `due` of `clock.now()`; `counted` has the bytes of the last whole count.
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
        """Close the directories of an unfinished count."""
        self._entries.close()

    def look(self) -> str:
        """Go on with the count for a moment; give a text about an exceeded limit, else ''.

        Two counts in a row must exceed the limit, because a single count counts a moved file twice.
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
        # Start the second count at once, because the job may go on writing.
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
        # The count meets each name of a file, so each name counts for its share.
        self._bytes += info.st_blocks * BLOCK // max(1, info.st_nlink if stat.S_ISREG(info.st_mode) else 1)
        if self._most_bytes is not None and self._bytes > self._most_bytes:
            return f"it had more than {self._most_bytes // MIB} MiB on disk (workspace.max_job_mb)"
        if self._most_files is not None and self._files > self._most_files:
            return f"it had more than {self._most_files} files and directories (workspace.max_job_files)"
        if depth > MAX_DEPTH:
            return f"it had directories more than {MAX_DEPTH} deep"
        return ""


def count_use(hold: JobHold) -> DiskUse:
    """Count the job's files, with the limits of the configuration."""
    kept = hold.slot.config.workspace
    most_bytes = None if kept.max_job_mb is None else kept.max_job_mb * MIB
    return DiskUse(hold.job.fd, OF_JOB, most_bytes, kept.max_job_files)


def _everything(job_fd: int, names: Sequence[str]) -> SeenTree:
    """Yield depth and stat of each entry below these directories; memory grows only with the depth.

    Entries that disappear meanwhile, or that the job has closed to us, are passed over.
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
    """An open directory on the way down, and the iterator over its entries."""

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
