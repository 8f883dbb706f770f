"""Watches the free space of the jobs' disk: stops pulling, starts sweeps, and refills the reserve.

The supervisor itself only looks (statvfs, a few names). One child at a time does the slow work: a sweep
(`supervisor/sweep.py`), or filling the reserve.
"""

from collections.abc import Callable
from functools import partial
from math import ceil, inf
from typing import Any

from aitbc_miner.config.settings import WorkspaceSection
from aitbc_miner.control.protocol import Problem
from aitbc_miner.ipc.channel import MAX_SWEEPABLE, ExcessError
from aitbc_miner.ipc.messages import FromAgent, Retuned, SpaceWanted, Sweepable, Swept
from aitbc_miner.store import reserve
from aitbc_miner.store.records import MARK
from aitbc_miner.store.reserve import MIB
from aitbc_miner.supervisor.children import Keeper, OneShots
from aitbc_miner.supervisor.sweep import Sweep, sweep
from aitbc_miner.util import clock, fs
from aitbc_miner.util.log import events

SWEEP_S = 2.0
# The pause before the next `SpaceWanted` to the agent, and before the next try of failed work.
AGAIN_S = 5.0
# Pulling resumes at the limit plus this share, so that small changes of space do not switch it on and off.
SLACK = 1 / 16


class DiskWatch:
    """Watches the disk of `workspace.root`. `short`: the disk has too little space for more jobs."""

    def __init__(self, kept: WorkspaceSection, one_shots: OneShots, agent: Keeper[FromAgent]) -> None:
        self._kept = kept
        self._one_shots = one_shots
        self._agent = agent
        self._log = events("supervisor")
        self._busy = False
        # True at the start: an earlier run may have left half removed directories.
        self._remains = True
        self._to_sweep: dict[str, None] = {}
        self._early: dict[str, None] = {}
        self._ask_at = self._fill_at = self._sweep_at = 0.0
        self.short = False
        self.problem: Problem | None = None

    def tick(self) -> None:
        """Look at the disk, and start a child for the work that is due."""
        try:
            free = fs.free_space(self._kept.root)
            lacking = reserve.lacking(self._kept.root, self._kept.reserve_mb)
            ours = (self._kept.root / MARK).exists()
        except OSError as error:
            what = f"cannot check workspace.root {self._kept.root}: {error.strerror}; the node pulls no jobs"
            self.problem = Problem(what, "check that the disk of workspace.root is mounted and works")
            self.short = True
            return
        self._judge(free, lacking)
        # Without the mark, the directory may be the empty mount point of an absent disk: leave it alone.
        if not self._busy and ours:
            self._act(free, lacking)

    def sweep(self, named: Sweepable) -> None:
        """Have the next sweep remove the directories of these jobs.

        Raises:
            ExcessError: more jobs wait than can exist; the list is cleared, the next agent names them again.
        """
        waiting = self._early if named.early else self._to_sweep
        waiting.update(dict.fromkeys(named.job_ids))
        if len(waiting) > MAX_SWEEPABLE:
            waiting.clear()
            raise ExcessError(f"the agent named more than {MAX_SWEEPABLE} directories to be removed")

    @property
    def _least(self) -> fs.Room:
        return fs.Room(self._kept.min_free_mb * MIB, self._kept.min_free_inodes)

    def _wanted(self, lacking: fs.Room) -> fs.Room:
        """Give the free space from which pulling resumes; includes the space for the reserve."""
        more = 1 + SLACK
        return fs.Room(self._least.size * more + lacking.size, self._least.files * more + lacking.files)

    def _judge(self, free: fs.Room, lacking: fs.Room) -> None:
        limit = self._wanted(lacking) if self.short else self._least
        was, self.short = self.short, not free.covers(limit)
        self.problem = None
        if self.short:
            mb = free.size < limit.size
            least = self._wanted(lacking)
            what = f"{free.size // MIB:.0f} MiB" if mb else f"{free.files:.0f} inodes (files)"
            wanted = f"{ceil(least.size / MIB)} MiB" if mb else f"{ceil(least.files)}"
            key = "min_free_mb" if mb else "min_free_inodes"
            self.problem = Problem(
                f"workspace.root has {what} free; the node pulls no jobs below {wanted}"
                f" (workspace.{key}, 1/16 more, and what the reserve lacks)",
                f"remove files on the disk of {self._kept.root}, or lower workspace.{key} or keep_*",
            )
        if self.short is not was:
            self._log.warning(
                "disk is nearly full" if self.short else "disk has space again",
                free=free.size,
                inodes=None if free.files == inf else free.files,
            )

    def _act(self, free: fs.Room, lacking: fs.Room) -> None:
        now = clock.now()
        may_sweep = now >= self._sweep_at
        if may_sweep and (self._remains or self._to_sweep):
            self._start_sweep(self._to_sweep, fs.Room(inf, inf))
        elif may_sweep and self.short and self._early:
            self._start_sweep(self._early, self._wanted(lacking))
        elif self.short and now >= self._ask_at:
            self._ask_at = now + AGAIN_S
            self._agent.send(SpaceWanted())
        # The reserve takes at most half of the free space: running jobs need space as well.
        half = fs.Room(2 * lacking.size, 2 * lacking.files)
        if not self._busy and lacking.files and free.covers(half) and now >= self._fill_at:
            self._fill_at = now + AGAIN_S
            self._busy = self._start("reserve", partial(_fill, self._kept), Retuned, self._filled)

    # --- children ------------------------------------------------------------------------------------------

    def _start(self, name: str, work: Callable[[], Any], says: Any, done: Callable[[Any], None]) -> bool:
        try:
            self._one_shots.start(name, work, says, done)
        except OSError as error:
            # The machine has no free process now; the next tick tries again.
            self._log.warning("cannot start child", child=name, error=str(error))
            return False
        return True

    def _start_sweep(self, job_ids: dict[str, None], enough: fs.Room) -> None:
        work = partial(sweep, self._kept.root, list(job_ids), enough, SWEEP_S)
        self._busy = self._start("sweep", work, Sweep, partial(self._swept, job_ids))

    def _swept(self, job_ids: dict[str, None], said: Sweep | str) -> None:
        self._busy = False
        if isinstance(said, str):
            # The next sweep finds the work that this sweep has done.
            self._log.error("sweep failed", how=said)
            self._remains = True
            self._sweep_at = clock.now() + AGAIN_S
            return
        self._remains = said.unfinished
        for job_id in (*said.gone, *said.kept):
            job_ids.pop(job_id, None)
        if not said.unfinished:
            # The disk has enough space; when it has not, the agent names the remaining jobs again.
            self._early.clear()
        if said.gone or said.freed_bytes:
            self._log.info("directories swept", jobs=len(said.gone), freed_bytes=said.freed_bytes)
            self._agent.send(Swept(said.gone, said.freed_bytes))

    def _filled(self, _: Retuned | str) -> None:
        self._busy = False


def _fill(kept: WorkspaceSection) -> None:
    try:
        reserve.fill(kept.root, kept.reserve_mb)
    except OSError as error:
        what = f"cannot reserve workspace.reserve_mb ({kept.reserve_mb}) for records: {error}"
        events("supervisor").warning("reserve not filled", error=what)
