"""Compares the jobs of this node with the coordinator's list, if the dialect has such a list.

The node admits a listed job that it does not have: the reply to a pull was lost, or the disk was. The node
ends a job that is not listed any more: its client cancelled the job. The list also has each job's deadline.
"""

from concurrent.futures import Future

from aitbc_miner.agent.admission_queue import AdmissionQueue
from aitbc_miner.agent.context import AgentContext
from aitbc_miner.agent.delivery_queue import DeliveryQueue
from aitbc_miner.agent.job_table import WAITING
from aitbc_miner.coordinator.interface import Assignments, Paced, PulledJob
from aitbc_miner.errors import ErrorCode
from aitbc_miner.ipc.channel import ChannelError
from aitbc_miner.ipc.messages import CancelJob
from aitbc_miner.jobs import FINAL, EndReason, ManifestError, StateRecord, valid_job_id
from aitbc_miner.util import clock

AGAIN_S = 5.0
"""The pause after a failed call."""
MAX_BUSY = 1000
"""With so many jobs, the node looks at no further listed job; a later list names the job again."""


class Reconciler:
    """Asks for the list at the start, at intervals, and after a pull whose reply may be lost."""

    def __init__(self, context: AgentContext, admission: AdmissionQueue, delivery: DeliveryQueue) -> None:
        self._context = context
        self._jobs = context.jobs
        self._admission = admission
        self._delivery = delivery
        self._every_s = context.config.heartbeat.interval_s
        self._at = 0.0
        self._asking = False
        self._told = True
        self._before: set[str] = set()
        self._missing: set[str] = set()
        self._forgotten: set[str] = set()
        self._ends: dict[str, float] = {}
        self.asked = False
        """Whether the first call has ended. Before, the node pulls no jobs: its listed jobs come first."""

    def hurry(self) -> None:
        """Ask for the list now."""
        self._at = clock.now()

    def heard(self) -> None:
        """Act on a heartbeat, or on the news that the coordinator had forgotten this node.

        A coordinator that forgets a node also forgets its jobs. The node does not end them: nobody has
        cancelled them.
        """
        if self._context.token.forgotten:
            self._context.token.forgotten = False
            self._forgotten = self._jobs.ours()
        if self._missing:
            self.hurry()

    def next_due(self) -> float | None:
        """When to ask for the list, or to end a job at its deadline."""
        due = [*self._ends.values()]
        if self._may_ask():
            due.append(self._at)
        return min(due, default=None)

    def start_due(self) -> None:
        """Ask for the list, if due, and end the jobs whose deadline is over."""
        now = clock.now()
        for job_id in [job_id for job_id, end in self._ends.items() if end <= now]:
            del self._ends[job_id]
            self._end(job_id, "expired", "the coordinator no longer waits for the job")
        if now < self._at or not self._may_ask():
            return
        self._asking = True
        self._before = self._jobs.ours()
        # The coordinator's list may lack a job that comes from now on.
        self._jobs.came = set(self._jobs.names())
        self._context.start("assigned", self._context.coordinator.assignments, self._answered)

    def _may_ask(self) -> bool:
        # Before the node has slots, it takes up no job of the list.
        slots = self._jobs.slots
        return bool(self._context.token and self._told and not self._asking and slots and slots.slots)

    def _answered(self, future: "Future[Assignments | None]") -> None:
        self._asking, self.asked = False, True
        came, self._jobs.came = self._jobs.came or set(), None
        try:
            told = future.result()
            if told is not None:
                self._compare(told, came)
        except ChannelError:
            raise
        except Exception as error:  # noqa: BLE001  # one odd reply must not end the agent, again and again
            wait_s = error.wait_s if isinstance(error, Paced) else self._context.failed(error) or 0.0
            self._at = clock.now() + max(wait_s, AGAIN_S)
            if not isinstance(error, Paced):
                self._context.call_failed("jobs", "cannot fetch assigned jobs", error)
            return
        self._context.answered("jobs")
        self._told = told is not None
        self._at = clock.now() + self._every_s

    def _compare(self, told: Assignments, came: set[str]) -> None:
        listed = {each.job_id for each in told.jobs}
        self._forgotten -= listed
        self._ends = {}
        ours, busy, room = self._jobs.ours(), set(self._jobs.names()), self._room()
        for each in told.jobs:
            if each.job_id in ours and each.left_s is not None:
                self._ends[each.job_id] = clock.now() + each.left_s
            elif each.job_id not in came and each.job_id not in busy and len(busy) < MAX_BUSY:
                busy.add(each.job_id)
                is_late = each.left_s is not None and each.left_s <= 0
                job = _too_late(each.job_id, each.job) if is_late else each.job
                room -= self._take_up(each.job_id, job, has_room=room > 0)
        if told.complete:
            self._miss(self._before & self._jobs.ours() - listed)

    def _room(self) -> int:
        """Count the listed jobs to take up now: as many as slots may wait for one, none while draining."""
        slots = self._jobs.slots
        return len(slots.slots) - len(self._jobs.among(*WAITING)) if slots and slots.accepting else 0

    def _take_up(self, job_id: str, job: PulledJob, *, has_room: bool) -> bool:
        """Repeat the report of a job that is settled here, or take up a new job; True for a new job."""
        log, records = self._context.log, self._context.records
        if records.known(job_id) or self._context.ledger.knows(job_id):
            if isinstance(record := records.state_of(job_id), StateRecord) and record.state in FINAL:
                cause = "the coordinator lists the job as unfinished"
                log.warning("report repeated", job_id=job_id, cause=cause)
                self._delivery.repeat(job_id)
            return False
        if not has_room or not valid_job_id(job_id):
            return False
        log.warning("job taken up", job_id=job_id, cause="the coordinator lists the job as ours")
        return self._admission.accept(job)

    def _miss(self, missing: set[str]) -> None:
        """End jobs that two lists lack, with a heartbeat in between to register a forgotten node again."""
        ended = missing & self._missing - self._forgotten if self._context.token.beaten else set()
        for job_id in ended:
            self._end(job_id, "cancel", "by the coordinator")
        self._forgotten &= self._jobs.ours()
        self._missing = missing - ended - self._forgotten
        if self._missing:
            self._context.token.beaten = False
            self._context.token.want_beat()

    def _end(self, job_id: str, why: EndReason, detail: str) -> None:
        if job_id not in self._jobs.ours() or self._is_anothers(job_id):
            return
        self._context.log.info("job not wanted any more", job_id=job_id, why=why)
        self._admission.cancel(CancelJob(job_id, why, detail))

    def _is_anothers(self, job_id: str) -> bool:
        """Whether the coordinator knows the job under the id of another node of our fleet; True if unread."""
        record = self._context.records.state_of(job_id)
        return not isinstance(record, StateRecord) or record.origin is not None


def _too_late(job_id: str, job: PulledJob) -> PulledJob:
    """Replace a job after its deadline by an E_TIMEOUT, so that its client gets a report."""
    why = "cannot run the job: its deadline had passed when this node received the job"
    return PulledJob(job.raw, error=ManifestError(why, job_id, ErrorCode.E_TIMEOUT))
