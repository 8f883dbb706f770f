"""Removes the directories of delivered jobs: a child of the supervisor's, root, for a bounded time.

Which ones, the agent says, which reads the network; so each record is read again here, and what is not
delivered by that is not touched. Files in there are jobs' own: nothing is reached through a link.
"""

import os
from pathlib import Path

from msgspec import Struct

from aitbc_miner.jobs import FINAL, directory_of, valid_job_id
from aitbc_miner.store.records import RecordError, Records
from aitbc_miner.util import clock, fs
from aitbc_miner.util.log import events

# `+` is in no job id: what a crash leaves half removed is not taken for a job.
LEAVING = "+old-"


class Sweep(Struct, frozen=True):
    """What one sweep came to: `gone` are jobs without a directory now, `kept` may not go.

    `unfinished`: time was over before all was removed, and there is more to do whether named again or not.
    """

    gone: list[str] = []
    kept: list[str] = []
    freed_bytes: int = 0
    unfinished: bool = False


def sweep(root: Path, job_ids: list[str], enough: fs.Room, time_s: float) -> Sweep:
    """Remove what is half removed and these jobs, in this order, and say what came of it; for a child.

    No further job is removed once the disk has `enough` room.
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
                    # What was removed counts even where the file system hands it out later.
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
            # Before anything in it: what a power cut brings back is whole, or not under its name.
            os.fsync(root)
        except (RecordError, OSError) as error:
            self._kept.append(job_id)
            self._log.warning("job not swept", job_id=job_id, error=str(error))
            return
        self._gone.append(job_id)
        self._remove(root, leaving)

    def _is_gone(self, root: int, job_id: str) -> bool:
        """Whether it is not there any more, as when nobody heard of an earlier sweep.

        Raises:
            RecordError: by its record it is not delivered, or it has none that can be read.
        """
        if valid_job_id(job_id) and not fs.exists(root, directory_of(job_id)):
            return True
        with self._records.open(job_id) as job:
            state = job.state().state
        if state not in FINAL:
            raise RecordError(f"cannot sweep job {job_id}: it is {state}, which is not delivered")
        return False

    def _remove(self, root: int, name: str) -> None:
        try:
            self._freed += fs.remove_tree(root, name, self._deadline)
        except TimeoutError:
            raise
        except OSError as error:
            what = f"cannot remove {self._records.root / name}: {error}; remove it by hand"
            self._log.warning("remains of a job", error=what)
