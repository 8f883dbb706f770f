"""The agent's table of jobs: all jobs, the stage of each, and the legal moves between stages.

Every part of the agent looks jobs up here instead of asking other parts, and moves a job on by `move`. The
truth about a job is its record on disk: the agent makes the table anew from the records at each start.
"""

from enum import StrEnum

from msgspec import Struct

from aitbc_miner.errors import IllegalMove
from aitbc_miner.ipc.messages import CancelJob, Slots
from aitbc_miner.jobs import Outcome
from aitbc_miner.slots.placement import Offer, Ticket, room
from aitbc_miner.util import clock


class Stage(StrEnum):
    """The agent's progress with a job."""

    UNREAD = "UNREAD"  # a temporary fault prevents the reading of the record
    RESUMING = "RESUMING"  # the job is recorded, and waits for its admission
    ADMITTING = "ADMITTING"  # a thread checks and acknowledges the job, and fetches its inputs
    READY = "READY"  # the supervisor may give the job to a slot
    RUNNING = "RUNNING"  # a slot has the job
    SETTLING = "SETTLING"  # no worker has the job any more, and the agent looks for the outcome
    ENDED = "ENDED"  # the attempt has an outcome, and the agent decides: report or retry
    RETRY_WAIT = "RETRY_WAIT"  # the job waits for its next attempt here
    HANDING_ON = "HANDING_ON"  # the agent offers the job to the other nodes of the fleet
    REPORTING = "REPORTING"  # the agent sends the report until the coordinator accepts it
    GONE = "GONE"  # the agent has finished with the job


S = Stage
_BEGIN = frozenset(set(Stage) - {S.READY, S.HANDING_ON, S.GONE})
MOVES: dict[Stage, frozenset[Stage]] = {
    S.UNREAD: _BEGIN - {S.UNREAD, S.ADMITTING} | {S.GONE},
    S.RESUMING: frozenset({S.ADMITTING, S.RUNNING, S.SETTLING}),
    S.ADMITTING: frozenset({S.READY, S.RESUMING, S.RUNNING, S.SETTLING, S.ENDED, S.GONE}),
    S.READY: frozenset({S.RUNNING, S.SETTLING}),
    # The last three follow if the supervisor showed the job in a slot before the agent read the job's record.
    S.RUNNING: frozenset({S.SETTLING, S.ENDED, S.RETRY_WAIT, S.REPORTING, S.GONE}),
    S.SETTLING: frozenset({S.ENDED, S.GONE}),
    S.ENDED: frozenset({S.RETRY_WAIT, S.HANDING_ON, S.REPORTING}),
    S.RETRY_WAIT: frozenset({S.RESUMING, S.SETTLING}),
    S.HANDING_ON: frozenset({S.REPORTING, S.GONE}),
    S.REPORTING: frozenset({S.GONE}),
    # The same job may come again: the coordinator has forgotten the report, or the fleet offers the job.
    S.GONE: _BEGIN,
}

TAKEN_IN = frozenset({S.ADMITTING, S.READY})
"""The job will take a free slot."""
WAITING = frozenset({S.RESUMING, S.ADMITTING, S.READY, S.RETRY_WAIT})
"""The job waits for a slot, or for the steps before."""
CONCLUDED = frozenset({S.ENDED, S.HANDING_ON, S.REPORTING})
"""The job has an outcome, and no worker has the job any more."""
_TOLD = frozenset({S.HANDING_ON, S.REPORTING})


class ProgressNote(Struct):
    """The last progress of a job, and when the agent sends it on, in seconds of the boot-time clock."""

    due: float
    pct: float = 0.0
    note: str = ""
    sending: bool = False


class JobEntry(Struct):
    """One job: its stage, and the data of the agent's parts.

    `progress` is None until the job is acknowledged; from then on the coordinator counts the job as ours.
    `ticket` says what the job needs of a slot, None if unknown. `due` is the time of the next attempt.
    `cancel` ends the job during its admission. `ended_here`: an attempt on this node has ended. `outcome`:
    the content of outcome.json, until the agent tries to send the report for the first time.
    """

    job_id: str
    stage: Stage = Stage.GONE
    progress: ProgressNote | None = None
    ticket: Ticket | None = None
    due: float = 0.0
    cancel: CancelJob | None = None
    ended_here: bool = False
    outcome: Outcome | None = None


class JobTable:
    """The jobs of this node without an accepted report, for the agent's main thread.

    `every_s` is the time between two progress reports of the same job.
    """

    def __init__(self, every_s: float) -> None:
        self._every_s = every_s
        self._entries: dict[str, JobEntry] = {}
        self._of: dict[Stage, dict[str, JobEntry]] = {stage: {} for stage in Stage}
        self.slots: Slots | None = None
        """The slots as the supervisor last showed them."""
        self.came: set[str] | None = None
        """While the coordinator makes its list: the jobs present since the request. Otherwise None."""
        self.ends = 0
        """Counts the ends of jobs and the accepted reports: after each, a new job may come."""

    def __contains__(self, job_id: str) -> bool:
        return job_id in self._entries

    def get(self, job_id: str) -> JobEntry | None:
        """Give the entry of a job, or None."""
        return self._entries.get(job_id)

    def stage(self, job_id: str) -> Stage:
        """Give the stage of a job; GONE for a job outside the table."""
        entry = self._entries.get(job_id)
        return entry.stage if entry else Stage.GONE

    def among(self, *stages: Stage) -> list[JobEntry]:
        """Give the jobs in the given stages, stage by stage, in the order of their entry into the stage."""
        return [entry for stage in stages for entry in self._of[stage].values()]

    def move(self, job_id: str, to: Stage) -> JobEntry:
        """Move a job to a stage; a new job enters the table, and a move to GONE removes the job.

        Raises:
            IllegalMove: `to` may not follow the job's stage.
        """
        entry = self._entries.get(job_id) or JobEntry(job_id)
        if to not in MOVES[entry.stage]:
            raise IllegalMove(f"job {job_id}: {entry.stage} -> {to}")
        if entry.stage is Stage.GONE:
            if self.came is not None:
                self.came.add(job_id)
            self._entries[job_id] = entry
        self._of[entry.stage].pop(job_id, None)
        entry.stage = to
        if to is Stage.GONE:
            del self._entries[job_id]
            return entry
        self._of[to][job_id] = entry
        if to in _TOLD:
            entry.progress = None
        entry.ended_here |= to is Stage.ENDED
        return entry

    def acknowledge(self, job_id: str) -> None:
        """Note that the coordinator counts a job as ours; it may cancel the job from now on."""
        entry = self._entries.get(job_id)
        if entry is not None and entry.progress is None and entry.stage not in _TOLD:
            entry.progress = ProgressNote(clock.now() + self._every_s)

    # --- sets of jobs ----------------------------------------------------------------------------------

    def ours(self) -> set[str]:
        """Name the acknowledged jobs without a report."""
        unread = self._of[Stage.UNREAD]
        return {job_id for job_id, entry in self._entries.items() if entry.progress or job_id in unread}

    def undone(self) -> int:
        """Count the jobs that need more than a report."""
        return len(self._entries) - sum(len(self._of[stage]) for stage in _TOLD)

    def names(self) -> list[str]:
        """Name all jobs: first the undone jobs, then the jobs that need only a report, the latest first."""
        told = [entry.job_id for entry in reversed(self.among(*_TOLD))]
        return [job_id for job_id, entry in self._entries.items() if entry.stage not in _TOLD] + told

    # --- slots ---------------------------------------------------------------------------------------------

    def see(self, slots: Slots) -> None:
        """Note the slots and their jobs."""
        self.slots = slots
        for job_id in self.in_slots():
            if self.stage(job_id) in {Stage.GONE, Stage.RESUMING, *TAKEN_IN}:
                self.move(job_id, Stage.RUNNING)
            self.acknowledge(job_id)

    def in_slots(self) -> set[str]:
        """Name the jobs in slots, as the supervisor last showed them."""
        return {slot.job_id for slot in self.slots.slots if slot.job_id is not None} if self.slots else set()

    def room(self) -> list[Offer]:
        """Give the free slots, without the slots for jobs in admission."""
        if self.slots is None or not self.slots.accepting:
            return []
        coming = [entry.ticket for entry in self.among(*TAKEN_IN)]
        return room([slot.offer for slot in self.slots.slots if slot.free], coming)
