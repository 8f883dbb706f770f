"""Compares what we are at work on with what the coordinator believes, where it says so.

What it lists and we do not have is taken up: the reply to a poll was lost, or our disk was. What it does not
list any more is not wanted: its client cancelled it. And the list says until when each job is wanted.
"""

from concurrent.futures import Future

from aitbc_miner.agent.admission_queue import AdmissionQueue
from aitbc_miner.agent.context import AgentContext
from aitbc_miner.agent.delivery_queue import DeliveryQueue
from aitbc_miner.coordinator.interface import Assignments, Paced, PulledJob
from aitbc_miner.errors import ErrorCode, MinerError
from aitbc_miner.ipc.channel import ChannelError
from aitbc_miner.ipc.messages import CancelJob
from aitbc_miner.jobs import FINAL, EndReason, ManifestError
from aitbc_miner.util import clock

AGAIN_S = 5.0
"""After a call that failed."""
MAX_BUSY = 1000
"""With so many jobs no more are taken up, whatever is listed; a later list names them again."""


class Reconciler:
    """Asks at the start, at each interval, and when the reply to a poll may have been lost."""

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
        """Whether there was an answer, or none is to be had: what we have already comes before new work."""

    def hurry(self) -> None:
        """Ask now."""
        self._at = clock.now()

    def heard(self) -> None:
        """Note that the coordinator has had a heartbeat, or has told us that it did not know us any more.

        With this node it has forgotten its jobs, which are wanted all the same: nobody has cancelled them.
        """
        if self._context.token.forgotten:
            self._context.token.forgotten = False
            self._forgotten = self._jobs.ours()
        if self._missing:
            self.hurry()

    def next_due(self) -> float | None:
        """When to ask, or to end a job whose time is over."""
        due = [*self._ends.values()]
        if self._context.token and self._told and not self._asking:
            due.append(self._at)
        return min(due, default=None)

    def start_due(self) -> None:
        """Ask, if it is time, and end what is wanted no longer."""
        now = clock.now()
        for job_id in [job_id for job_id, end in self._ends.items() if end <= now]:
            del self._ends[job_id]
            self._end(job_id, "expired", "the coordinator waits for it no longer")
        if not self._context.token or not self._told or self._asking or now < self._at:
            return
        self._asking = True
        self._before = self._jobs.ours()
        # A job that comes from now on is not missing in the list that is being made.
        self._jobs.came = set(self._jobs.names())
        self._context.start("assigned", self._context.coordinator.assignments, self._answered)

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
        ours, busy = self._jobs.ours(), set(self._jobs.names())
        for each in told.jobs:
            if each.job_id in ours and each.left_s is not None:
                self._ends[each.job_id] = clock.now() + each.left_s
            elif each.job_id not in came | busy and len(busy) < MAX_BUSY:
                busy.add(each.job_id)
                is_late = each.left_s is not None and each.left_s <= 0
                self._take_up(each.job_id, _too_late(each.job_id, each.job) if is_late else each.job)
        if told.complete:
            self._miss(self._before & self._jobs.ours() - listed)

    def _take_up(self, job_id: str, job: PulledJob) -> None:
        """Begin with a job that is new to us; of one that is done, the coordinator has not heard it."""
        if not self._context.records.known(job_id) and not self._context.ledger.knows(job_id):
            self._context.log.warning("job taken up", job_id=job_id, cause="the coordinator lists it as ours")
            self._admission.accept(job)
        elif self._is_final(job_id):
            self._context.log.warning(
                "report repeated", job_id=job_id, cause="the coordinator has not heard it"
            )
            self._delivery.repeat(job_id)

    def _is_final(self, job_id: str) -> bool:
        try:
            with self._context.records.open(job_id) as job:
                return job.state().state in FINAL
        except (MinerError, OSError):
            return False

    def _miss(self, missing: set[str]) -> None:
        """End what is missing again after a heartbeat, which tells whether we are known there at all."""
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
        """Whether the coordinator knows the job under the name of another node of our fleet."""
        try:
            with self._context.records.open(job_id) as job:
                return job.state().origin is not None
        except (MinerError, OSError):
            return True


def _too_late(job_id: str, job: PulledJob) -> PulledJob:
    """Give a job that nobody waits for any more as one that cannot be run: only its client must be told."""
    why = "cannot run the job: its time was over when this node heard of it"
    return PulledJob(job.raw, error=ManifestError(why, job_id, ErrorCode.E_TIMEOUT))
