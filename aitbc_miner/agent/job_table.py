"""The agent's table of jobs: which jobs it has, how far each has come, and which stage may follow which.

Every part of the agent looks jobs up here instead of asking another part, and moves a job on by `move`. The
truth about a job is its record on disk: the table is made anew from the records at each start.
"""

import threading
from enum import StrEnum

from msgspec import Struct, field

from aitbc_miner.errors import IllegalMove
from aitbc_miner.ipc.messages import Slots
from aitbc_miner.jobs import Outcome
from aitbc_miner.slots.placement import Offer, Ticket, room
from aitbc_miner.util import clock


class Stage(StrEnum):
    """How far the agent has come with a job."""

    UNREAD = "UNREAD"  # its record could not be read yet
    RESUMING = "RESUMING"  # it is recorded, and waits for a thread that takes it in
    ADMITTING = "ADMITTING"  # a thread checks it, acknowledges it, fetches its inputs
    READY = "READY"  # the supervisor may give it to a slot
    RUNNING = "RUNNING"  # a slot has it
    SETTLING = "SETTLING"  # nobody works on it any more, and its outcome is being looked for
    ENDED = "ENDED"  # its attempt has an outcome, and what follows is being decided
    RETRY_WAIT = "RETRY_WAIT"  # it waits for its next attempt here
    HANDING_ON = "HANDING_ON"  # it is being given to another node of the fleet
    REPORTING = "REPORTING"  # its report is to be accepted
    GONE = "GONE"  # the agent has nothing to do with it any more


S = Stage
_BEGIN = frozenset(set(Stage) - {S.READY, S.HANDING_ON, S.GONE})
MOVES: dict[Stage, frozenset[Stage]] = {
    S.UNREAD: _BEGIN - {S.UNREAD, S.ADMITTING} | {S.GONE},
    S.RESUMING: frozenset({S.ADMITTING, S.RUNNING, S.SETTLING}),
    S.ADMITTING: frozenset({S.READY, S.RESUMING, S.RUNNING, S.SETTLING, S.ENDED, S.GONE}),
    S.READY: frozenset({S.RUNNING, S.SETTLING}),
    # The last three: the supervisor showed the job in a slot before the agent had read its record.
    S.RUNNING: frozenset({S.SETTLING, S.ENDED, S.RETRY_WAIT, S.REPORTING, S.GONE}),
    S.SETTLING: frozenset({S.ENDED, S.GONE}),
    S.ENDED: frozenset({S.RETRY_WAIT, S.HANDING_ON, S.REPORTING}),
    S.RETRY_WAIT: frozenset({S.RESUMING, S.SETTLING}),
    S.HANDING_ON: frozenset({S.REPORTING, S.GONE}),
    S.REPORTING: frozenset({S.GONE}),
    # The same job may come again: its coordinator has forgotten the report, or the fleet offers the job.
    S.GONE: _BEGIN,
}

TAKEN_IN = frozenset({S.ADMITTING, S.READY})
"""The job will take a free slot."""
WAITING = frozenset({S.RESUMING, S.ADMITTING, S.READY, S.RETRY_WAIT})
"""The job waits for a slot, or for what must come before."""
CONCLUDED = frozenset({S.ENDED, S.HANDING_ON, S.REPORTING})
"""The agent knows that nobody works on the job any more, and has its outcome."""
_TOLD = frozenset({S.HANDING_ON, S.REPORTING})


class ProgressNote(Struct):
    """What a job says of itself, and when the agent passes it on, in seconds of the boot-time clock."""

    due: float
    pct: float = 0.0
    note: str = ""
    sending: bool = False


class JobEntry(Struct):
    """One job: its stage, and what the parts of the agent know of it.

    `progress` is None until the job is acknowledged: from then on the coordinator counts it as ours. `ticket`
    is what the job needs of a slot, None while that is not known. `due` is when the next attempt may begin.
    `cancelled` ends the job while its inputs are fetched. `outcome` is outcome.json as it was read, until the
    report is tried for the first time.
    """

    job_id: str
    stage: Stage = Stage.GONE
    progress: ProgressNote | None = None
    ticket: Ticket | None = None
    due: float = 0.0
    cancelled: threading.Event = field(default_factory=threading.Event)
    ended_here: bool = False
    outcome: Outcome | None = None


class JobTable:
    """The jobs of this node that are not settled, for the agent's main thread.

    `every_s` is the time between two reports of progress of the same job.
    """

    def __init__(self, every_s: float) -> None:
        self._every_s = every_s
        self._entries: dict[str, JobEntry] = {}
        self._of: dict[Stage, dict[str, JobEntry]] = {stage: {} for stage in Stage}
        self.slots: Slots | None = None
        """The slots as the supervisor last showed them."""
        self.came: set[str] | None = None
        """The jobs that have been here since the coordinator was asked for its list, until it answers."""
        self.ends = 0
        """How often a job has ended, or its report was accepted: then there may be another job for us."""

    def __contains__(self, job_id: str) -> bool:
        return job_id in self._entries

    def get(self, job_id: str) -> JobEntry | None:
        """Look a job up."""
        return self._entries.get(job_id)

    def stage(self, job_id: str) -> Stage:
        """Say how far a job has come; GONE for a job that is not in the table."""
        entry = self._entries.get(job_id)
        return entry.stage if entry else Stage.GONE

    def among(self, *stages: Stage) -> list[JobEntry]:
        """Give the jobs in these stages, in each stage the one that came first before the others."""
        return [entry for stage in stages for entry in self._of[stage].values()]

    def move(self, job_id: str, to: Stage) -> JobEntry:
        """Move a job on; one that is not in the table enters it, and one that is GONE leaves it.

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

    # --- who has which jobs ----------------------------------------------------------------------------

    def ours(self) -> set[str]:
        """Name the jobs that are acknowledged and have no report yet."""
        unread = self._of[Stage.UNREAD]
        return {job_id for job_id, entry in self._entries.items() if entry.progress or job_id in unread}

    def undone(self) -> int:
        """Count the jobs that are not only to be reported."""
        return len(self._entries) - sum(len(self._of[stage]) for stage in _TOLD)

    def names(self) -> list[str]:
        """Name all jobs: those that are only to be reported last, the latest of them first."""
        told = [entry.job_id for entry in reversed(self.among(*_TOLD))]
        return [job_id for job_id, entry in self._entries.items() if entry.stage not in _TOLD] + told

    # --- slots ---------------------------------------------------------------------------------------------

    def see(self, slots: Slots) -> None:
        """Take note of what the slots are and which jobs they have."""
        self.slots = slots
        for job_id in self.in_slots():
            if self.stage(job_id) in {Stage.GONE, Stage.RESUMING, *TAKEN_IN}:
                self.move(job_id, Stage.RUNNING)
            self.acknowledge(job_id)

    def in_slots(self) -> set[str]:
        """Name the jobs that are in slots, as the supervisor last said."""
        return {slot.job_id for slot in self.slots.slots if slot.job_id is not None} if self.slots else set()

    def room(self) -> list[Offer]:
        """Give the free slots that no job on its way will take."""
        if self.slots is None or not self.slots.accepting:
            return []
        coming = [entry.ticket for entry in self.among(*TAKEN_IN)]
        return room([slot.offer for slot in self.slots.slots if slot.free], coming)
