"""Jobs on their way into a slot: pulled, resumed after a restart, taken over, or due for a retry."""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial

from aitbc_miner.agent.admission import Admission, Stopping, Taken
from aitbc_miner.agent.anchor import Anchor
from aitbc_miner.agent.context import AgentContext
from aitbc_miner.agent.delivery_queue import DeliveryQueue
from aitbc_miner.agent.fleet import Fleet
from aitbc_miner.agent.job_table import JobEntry, Stage
from aitbc_miner.agent.retries import Retries
from aitbc_miner.coordinator.interface import PulledJob
from aitbc_miner.ipc.messages import CancelJob, JobReady
from aitbc_miner.jobs import State, valid_job_id
from aitbc_miner.queue.interface import QueueError
from aitbc_miner.slots.placement import Offer, Ticket, ticket_for
from aitbc_miner.util import clock
from aitbc_miner.util.backoff import Backoff


class AdmissionQueue:
    """Admits jobs, each in a thread (`Admission`), and offers them to the supervisor for a slot."""

    def __init__(
        self,
        context: AgentContext,
        fleet: Fleet | None,
        anchor: Anchor,
        retries: Retries,
        delivery: DeliveryQueue,
        stopping: threading.Event,
    ) -> None:
        self._context = context
        self._jobs = context.jobs
        self._anchor = anchor
        self._retries = retries
        self._delivery = delivery
        self._admission = Admission(context, fleet, stopping)
        self._resume_at = 0.0
        self.troubled_until = 0.0
        """The time before which the node pulls no job, because it could not admit the last job."""
        beat, coordinator = context.config.heartbeat, context.config.coordinator
        self._backoff = Backoff(coordinator.poll_interval_s, beat.backoff.max_s)

    # --- new and resumed jobs ------------------------------------------------------------------------------

    def accept(self, job: PulledJob) -> bool:
        """Begin the admission of a pulled job; False if the job is no new work."""
        job_id, usable = id_of(job)
        if not usable:
            call = partial(self._admission.refuse_nameless, job_id, str(job.error))
            self._context.start("intake", call, Future.result)
            return False
        if self._anchor.lost():
            return False  # the job comes again: the coordinator has no acknowledgement
        known = self._context.records.known(job_id)
        if known or job_id in self._jobs or self._context.ledger.knows(job_id):
            self._context.log.info("known job pulled again", job_id=job_id, directory=known)
            if known:
                self._delivery.repeat(job_id)
            return False
        if job.error:
            self._context.log.warning("manifest refused", job_id=job_id, error=str(job.error))
        ticket = ticket_for(job.manifest, clock.now()) if job.manifest else None
        self._start(job_id, partial(self._admission.take, job, job_id), ticket)
        self._context.show(job_id, State.PULLED)
        return True

    def resume(self, job_ids: list[str]) -> None:
        """Resume the admission of recorded jobs, as soon as the supervisor has shown its slots."""
        for job_id in job_ids:
            # A job may be in a slot already: it was ready before an earlier agent died.
            if self._jobs.stage(job_id) in {Stage.GONE, Stage.UNREAD}:
                in_slot = job_id in self._jobs.in_slots()
                self._jobs.move(job_id, Stage.RUNNING if in_slot else Stage.RESUMING)

    def next_due(self) -> float | None:
        """When to resume the next job, None while the agent has none to resume."""
        slots = self._jobs.slots
        return self._resume_at if slots and slots.slots and self._jobs.among(Stage.RESUMING) else None

    def start_due(self) -> None:
        """Resume the jobs whose admission a restart or an error of the disk interrupted."""
        due = self.next_due()
        if due is None or clock.now() < due:
            return
        for entry in self._jobs.among(Stage.RESUMING):
            self._start(entry.job_id, partial(self._admission.resume, entry.job_id), None)

    def _start(
        self, job_id: str, call: Callable[[list[Offer], JobEntry], Taken], ticket: Ticket | None
    ) -> None:
        slots = self._jobs.slots.slots if self._jobs.slots else []
        offers = [slot.offer for slot in slots if slot.offers]
        entry = self._jobs.move(job_id, Stage.ADMITTING)
        entry.ticket = ticket
        self._context.start("intake", partial(call, offers, entry), partial(self._taken, job_id))

    def _taken(self, job_id: str, future: Future[Taken]) -> None:
        entry = self._jobs.get(job_id)
        try:
            taken = future.result()
        except Stopping:
            return
        except Exception as error:  # noqa: BLE001  # one odd job must not end the agent, again and again
            self._failed(job_id, error)
            return
        self._backoff.reset()
        if entry is None or entry.stage is not Stage.ADMITTING:
            # The job is in a slot, or has ended.
            if entry and entry.cancel and entry.stage is Stage.RUNNING:
                self._context.channel.send(entry.cancel)
            return
        if taken.ticket is not None:
            self._jobs.move(job_id, Stage.READY).ticket = taken.ticket
            self._context.channel.send(JobReady(taken.ticket))
            if entry.cancel:
                # The cancellation came after the inputs. Now the supervisor knows the job, and must end it.
                self._context.channel.send(entry.cancel)
        elif taken.report:
            self._retries.conclude(job_id)
        elif taken.gone:
            self._jobs.move(job_id, Stage.GONE)
            self._context.log.info("job dropped", job_id=job_id)
            self._context.show(job_id, State.FAILED)
            if self._context.records.known(job_id):
                self._context.enter(job_id)
        else:
            self._jobs.move(job_id, Stage.RUNNING)

    def _failed(self, job_id: str, error: Exception) -> None:
        # Without a record the node has not acknowledged the job, and the coordinator hands it out again.
        self._resume_at = clock.now() + self._backoff.next()
        if not isinstance(error, QueueError):
            self.troubled_until = self._resume_at
        if self._jobs.stage(job_id) is Stage.ADMITTING:
            known = self._context.records.known(job_id)
            self._jobs.move(job_id, Stage.RESUMING if known else Stage.GONE)
        self._context.failed(error)
        self._context.warn("cannot admit job", error, job_id=job_id)

    # --- cancelled jobs ------------------------------------------------------------------------------------

    def cancel(self, word: CancelJob) -> None:
        """End a job in any stage, because the coordinator does not want the job any more."""
        if not self.stop_fetching(word):
            # The supervisor knows each job with complete inputs.
            self._context.channel.send(word)

    def stop_fetching(self, word: CancelJob) -> bool:
        """End a job during its admission; False if the job is in no admission."""
        entry = self._jobs.get(word.job_id)
        if entry is None or entry.stage is not Stage.ADMITTING:
            return False
        entry.cancel = entry.cancel or word
        return True


def by_coordinator(job_id: str) -> CancelJob:
    """Make the message that the coordinator cancelled a job."""
    return CancelJob(job_id, "cancel", "by the coordinator")


def id_of(job: PulledJob) -> tuple[str, bool]:
    """Give the id of a pulled job, and whether the id is a valid job id."""
    job_id = job.manifest.job_id if job.manifest else str(job.error and job.error.job_id)
    return job_id, valid_job_id(job_id)
