"""Jobs on their way into a slot: pulled, resumed after a restart, taken over, or to be tried again."""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial

from aitbc_miner.agent.admission import Admission, Stopping, Taken
from aitbc_miner.agent.context import AgentContext
from aitbc_miner.agent.fleet import Fleet
from aitbc_miner.agent.progress import ProgressBook
from aitbc_miner.coordinator.interface import PulledJob
from aitbc_miner.ipc.messages import CancelJob, JobReady, Slots
from aitbc_miner.jobs import State, valid_job_id
from aitbc_miner.queue.interface import QueueError
from aitbc_miner.slots.placement import Offer, Ticket, room, ticket_for
from aitbc_miner.util import clock
from aitbc_miner.util.backoff import Backoff


class AdmissionQueue:
    """Has jobs taken in, each in a thread (`agent/admission.py`), until the supervisor has a slot for them.

    `settle` is told of those that have an outcome already: they were refused or are cancelled. `given_up`,
    of those that are not ours and leave their record here.
    """

    def __init__(
        self,
        context: AgentContext,
        fleet: Fleet | None,
        progress: ProgressBook,
        stopping: threading.Event,
        settle: Callable[[str], None],
        given_up: Callable[[str], None],
    ) -> None:
        self._context = context
        self._progress = progress
        self._settle = settle
        self._given_up = given_up
        self._intake = Admission(
            context.config,
            context.records,
            context.coordinator,
            stopping,
            unauthorized=lambda: context.background.post(context.token.refused),
            acked=lambda job_id, runner: context.background.post(partial(self._acked, job_id, runner)),
            fleet=fleet,
            proxy=context.input_proxy,
        )
        self._view: Slots | None = None
        self._unplaced: dict[str, Ticket | None] = {}
        self._cancels: dict[str, threading.Event] = {}
        self._to_resume: list[str] = []
        self._resume_at = 0.0
        self._troubled_until = 0.0
        self._backoff = Backoff(
            context.config.coordinator.poll_interval_s, context.config.heartbeat.backoff.max_s
        )

    def __contains__(self, job_id: str) -> bool:
        return job_id in self._unplaced

    def ids(self) -> list[str]:
        """Name the jobs on their way."""
        return [*self._unplaced, *self._to_resume]

    # --- slots ---------------------------------------------------------------------------------------------

    def see(self, view: Slots) -> None:
        """Take note of what the slots are and have."""
        self._view = view
        for slot in view.slots:
            if slot.job_id is not None:
                self._unplaced.pop(slot.job_id, None)

    def room(self) -> list[Offer]:
        """Say which free slots no job on its way will take."""
        if self._view is None or not self._view.accepting:
            return []
        return room([slot.offer for slot in self._view.slots if slot.free], list(self._unplaced.values()))

    def in_slots(self) -> set[str]:
        """Name the jobs that are in slots, as the supervisor last said."""
        return {slot.job_id for slot in self._view.slots if slot.job_id is not None} if self._view else set()

    def forget(self, job_id: str) -> None:
        """Note that a job is on no way to a slot any more."""
        self._unplaced.pop(job_id, None)

    def cancel(self, job_id: str) -> bool:
        """End a job whose inputs are being fetched; False when it is none of these."""
        if job_id not in self._cancels:
            return False
        self._cancels[job_id].set()
        return True

    # --- what comes in -------------------------------------------------------------------------------------

    def take(self, job_id: str, job: PulledJob) -> None:
        """Begin to take in a job that was just pulled."""
        if job.error:
            self._context.log.warning("manifest refused", job_id=job_id, error=str(job.error))
        ticket = None
        if job.manifest:
            ticket = ticket_for(job.manifest, clock.now())
        self._start(job_id, partial(self._intake.take, job, job_id), ticket)
        self._context.show(job_id, State.PULLED)

    def refuse_nameless(self, job_id: str, why: str) -> None:
        """Refuse a job whose id may not touch the file system."""
        call = partial(self._intake.refuse_nameless, job_id, why)
        self._context.start("intake", call, Future.result)

    def resume(self, job_ids: list[str]) -> None:
        """Go on with jobs that are recorded, as soon as there are slots."""
        self._to_resume += job_ids

    def next_due(self) -> float | None:
        """When there is something to resume."""
        return self._resume_at if self._to_resume and self._view and self._view.slots else None

    def start_due(self) -> None:
        """Go on with the jobs that a restart, or an error of the disk, left half taken in."""
        due = self.next_due()
        if due is None or clock.now() < due or self._view is None:
            return
        in_slots = self.in_slots()
        while self._to_resume:
            job_id = self._to_resume.pop()
            # One that is in a slot already was ready before an earlier agent died.
            if job_id not in in_slots and job_id not in self._unplaced:
                self._start(job_id, partial(self._intake.resume, job_id), None)

    def _start(
        self, job_id: str, call: Callable[[list[Offer], threading.Event], Taken], ticket: Ticket | None
    ) -> None:
        offers = [slot.offer for slot in self._view.slots if slot.offers] if self._view else []
        self._unplaced[job_id] = ticket
        cancelled = self._cancels.setdefault(job_id, threading.Event())
        self._context.start("intake", partial(call, offers, cancelled), partial(self._taken, job_id))

    def _acked(self, job_id: str, runner: str) -> None:
        """Note that a job is ours: from now on the coordinator may cancel it."""
        self._progress.began(job_id, clock.now())
        self._context.show(job_id, State.ACKED, runner=runner)

    def _taken(self, job_id: str, future: Future[Taken]) -> None:
        try:
            taken = future.result()
        except Stopping:
            return
        except Exception as error:  # noqa: BLE001  # one odd job must not end the agent, again and again
            self._failed(job_id, error)
            return
        self._backoff.reset()
        cancelled = self._cancels.pop(job_id).is_set()
        self._unplaced[job_id] = taken.ticket
        if taken.ticket is not None:
            self._context.channel.send(JobReady(taken.ticket))
            if cancelled:
                # It came too late for the inputs, so it is for the supervisor, which knows the job by now.
                self._context.channel.send(by_coordinator(job_id))
            return
        del self._unplaced[job_id]
        if taken.report:
            self._settle(job_id)
        elif taken.gone:
            self._progress.ended(job_id)
            self._context.log.info("job is not ours any more", job_id=job_id)
            self._context.show(job_id, State.FAILED)
            if self._context.records.known(job_id):
                self._given_up(job_id)

    def _failed(self, job_id: str, error: Exception) -> None:
        # What is not recorded is not acknowledged either, and will be handed out again.
        self._unplaced.pop(job_id, None)
        self._resume_at = clock.now() + self._backoff.next()
        if not isinstance(error, QueueError):
            self._troubled_until = self._resume_at
        if self._context.records.known(job_id):
            self._to_resume.append(job_id)
        else:
            del self._cancels[job_id]
        self._context.failed(error)
        self._context.warn("cannot take job in", error, job_id=job_id)

    def troubled_until(self) -> float:
        """Until when it is no use to pull more, since what was pulled could not be taken in."""
        return self._troubled_until


def by_coordinator(job_id: str) -> CancelJob:
    """Give the word that the coordinator wants a job ended."""
    return CancelJob(job_id, "cancel", "by the coordinator")


def id_of(job: PulledJob) -> tuple[str, bool]:
    """Give the id of a pulled job, and whether it may name one here."""
    job_id = job.manifest.job_id if job.manifest else str(job.error and job.error.job_id)
    return job_id, valid_job_id(job_id)
