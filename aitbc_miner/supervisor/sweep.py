"""Removes the directories of settled jobs, as root, in a child of the supervisor, for a bounded time.

The agent, which reads the network, names the jobs. So the sweep reads each record again and leaves a job
whose record is not settled. Jobs may have made links in their directories: the sweep follows no link.
"""

import os
from pathlib import Path

from msgspec import Struct

from aitbc_miner.jobs import FINAL, directory_of, valid_job_id
from aitbc_miner.store.records import RecordError, Records
from aitbc_miner.util import clock, fs
from aitbc_miner.util.log import events

# No job id has a `+`, so a directory that a crash left half removed is not taken for a job.
LEAVING = "+old-"


class Sweep(Struct, frozen=True):
    """The result of a sweep: `gone` are jobs without a directory now, `kept` are jobs that must stay.

    `unfinished`: the time was over before the sweep had removed everything; the next sweep goes on.
    """

    gone: list[str] = []
    kept: list[str] = []
    freed_bytes: int = 0
    unfinished: bool = False


def sweep(root: Path, job_ids: list[str], enough: fs.Room, time_s: float) -> Sweep:
    """Remove the half removed directories, then these jobs in their order; for a child.

    The sweep stops before the next job once the disk has `enough` room.
    """
    return _Sweeper(root, enough, clock.now() + time_s).run(job_ids)


class _Sweeper:
    def __init__(self, root: Path, enough: fs.Room, deadline: float) -> None:
        self._records = Records(root)
        self._enough = enough
        self._deadline = deadline
        self._log = events("supervisor")
        self._gone: list[str] = []
        self._kept: list[str] = []
        self._freed = 0

    def run(self, job_ids: list[str]) -> Sweep:
        unfinished = False
        with fs.directory(self._records.root) as root:
            before = fs.free_space(root)
            try:
                with os.scandir(root) as entries:
                    halves = [entry.name for entry in entries if entry.name.startswith(LEAVING)]
                for name in halves:
                    self._remove(root, name)
                for job_id in job_ids:
                    fs.check_time(self._deadline)
                    now = fs.free_space(root)
                    # Some file systems free removed space later: the removed bytes count at once.
                    if fs.Room(max(before.size + self._freed, now.size), now.files).covers(self._enough):
                        break
                    self._sweep(root, job_id)
            except TimeoutError:
                unfinished = True
        return Sweep(self._gone, self._kept, self._freed, unfinished)

    def _sweep(self, root: int, job_id: str) -> None:
        leaving = f"{LEAVING}{job_id}"
        try:
            if self._is_gone(root, job_id):
                self._gone.append(job_id)
                return
            os.rename(directory_of(job_id), leaving, src_dir_fd=root, dst_dir_fd=root)
            # The new name must be durable first: a power cut must not leave a job with half its files.
            os.fsync(root)
        except (RecordError, OSError) as error:
            self._kept.append(job_id)
            self._log.warning("job not swept", job_id=job_id, error=str(error))
            return
        self._gone.append(job_id)
        self._remove(root, leaving)

    def _is_gone(self, root: int, job_id: str) -> bool:
        """Whether the job has no directory, for example because an earlier sweep's message was lost.

        Raises:
            RecordError: the record says that the job is not settled, or cannot be read.
        """
        if valid_job_id(job_id) and not fs.exists(root, directory_of(job_id)):
            return True
        with self._records.open(job_id) as job:
            state = job.state().state
        if state not in FINAL:
            raise RecordError(
                f"cannot sweep job {job_id}: its state is {state}, so its report is not settled"
            )
        return False

    def _remove(self, root: int, name: str) -> None:
        try:
            self._freed += fs.remove_tree(root, name, self._deadline)
        except TimeoutError:
            raise
        except OSError as error:
            what = f"cannot remove {self._records.root / name}: {error}; remove it by hand"
            self._log.warning("directory not removed", error=what)
