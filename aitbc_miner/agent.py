"""The process that talks to the coordinator about jobs: pulls, takes in, reports progress, delivers.

One thread decides, here; calls to the coordinator run in a few others and come back as a callback in this
one. The process is not root and reads everything that comes from outside.
"""

import select
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

import msgspec

from aitbc_miner.channel import Channel, ChannelError
from aitbc_miner.config import Config
from aitbc_miner.coordinator import (
    Busy,
    Coordinator,
    CoordinatorError,
    PulledJob,
    PullFilters,
    Unauthorized,
)
from aitbc_miner.delivery import Delivered, Schedule, deliver, describe, settle
from aitbc_miner.errors import MinerError
from aitbc_miner.intake import Intake, Stopping, Taken
from aitbc_miner.jobs import Outcome, State, valid_job_id
from aitbc_miner.messages import (
    CancelJob,
    Deliveries,
    JobProgress,
    JobReady,
    JobSettled,
    Offer,
    PrivateLine,
    Recovered,
    Slots,
    Stop,
    Ticket,
    ToAgent,
)
from aitbc_miner.nodetoken import TokenLine
from aitbc_miner.placing import room
from aitbc_miner.progress import ProgressBook
from aitbc_miner.records import Records
from aitbc_miner.recovery import has_outcome, read_outcome, recover
from aitbc_miner.util import clock
from aitbc_miner.util.background import Background
from aitbc_miner.util.backoff import Backoff
from aitbc_miner.util.log import events

MAX_KNOWN = 1000
# How many calls of each kind may be under way. A slow upload must not keep a pull or an ack waiting.
POOLS = {"pull": 1, "intake": 16, "delivery": 4, "progress": 2}
# A task may report as often as it likes; the coordinator hears of it once in this time.
PROGRESS_PAUSE_S = 1.0


class Agent:
    """The agent's main thread."""

    def __init__(
        self,
        channel: Channel[ToAgent],
        line: Channel[PrivateLine],
        config: Config,
        coordinator: Coordinator,
        mask: Callable[[str], None],
    ) -> None:
        self._channel = channel
        self._config = config
        self._coordinator = coordinator
        self._log = events("agent")
        self._records = Records(config.workspace.root)
        self._background = Background()
        self._stopping = threading.Event()
        self._token = TokenLine(line, coordinator, mask)
        self._intake = Intake(
            config,
            self._records,
            coordinator,
            self._stopping,
            unauthorized=lambda: self._background.post(self._token.refused),
            acked=lambda job_id, runner: self._background.post(partial(self._acked, job_id, runner)),
        )
        self._pools = {name: ThreadPoolExecutor(n, name) for name, n in POOLS.items()}
        self._view: Slots | None = None
        self._unplaced: dict[str, Ticket | None] = {}
        self._cancels: dict[str, threading.Event] = {}
        self._progress = ProgressBook(config.heartbeat.interval_s, PROGRESS_PAUSE_S)
        self._pulling = False
        self._pull_at = 0.0
        self._pull_backoff = Backoff(config.coordinator.poll_interval_s, config.heartbeat.backoff.max_s)
        self._schedule = Schedule(0.5, config.heartbeat.backoff.max_s)
        self._to_resume: list[str] = []
        self._resume_at = 0.0
        self._error: str | None = None

    # --- the loop ------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Recover, then serve until told to stop or the supervisor is gone (ChannelError)."""
        self._recover()
        self._token.ask()
        while not self._stopping.is_set():
            self._wait()
            self._background.finish()
            self._resume()
            self._start_pull()
            self._start_deliveries()
            self._start_progress()
        for pool in self._pools.values():
            pool.shutdown(wait=False, cancel_futures=True)

    def _wait(self) -> None:
        poller = select.poll()
        poller.register(
            self._channel.fileno(), select.POLLIN | (select.POLLOUT if self._channel.has_unsent else 0)
        )
        poller.register(self._token.fileno(), select.POLLIN)
        poller.register(self._background.woken, select.POLLIN)
        ready = dict(poller.poll(self._pause() * 1000))
        if ready.get(self._channel.fileno(), 0) & select.POLLOUT:
            self._channel.flush()
        if ready.get(self._channel.fileno(), 0) & ~select.POLLOUT:
            for message in self._channel.receive():
                self._obey(message)
        if self._token.fileno() in ready and self._token.receive():
            self._pull_at = clock.now()
            self._schedule.hurry(clock.now())
        if self._background.woken in ready:
            self._background.clear()

    def _pause(self) -> float:
        times = [clock.now() + 60.0]
        if self._may_pull():
            times.append(self._pull_at)
        if self._to_resume and self._view and self._view.slots:
            times.append(self._resume_at)
        # Without a token nothing can be sent: what is due then would keep this from waiting at all.
        if self._token and (due := self._progress.next_due()) is not None:
            times.append(due)
        may_deliver = self._token and self._schedule.running < POOLS["delivery"]
        if may_deliver and (due := self._schedule.next_due()) is not None:
            times.append(due)
        return max(0.0, min(times) - clock.now())

    def _obey(self, message: ToAgent) -> None:
        match message:
            case Slots():
                self._see(message)
            case CancelJob() if message.job_id in self._cancels:
                self._cancels[message.job_id].set()
            case JobSettled() | CancelJob():
                self._settle(message)
            case JobProgress():
                self._progress.note(message.job_id, message.pct or 0.0, message.note, clock.now())
            case Stop():
                self._stopping.set()

    def _note_error(self, error: Exception) -> float | None:
        """Remember the last error for `status`; gives how long the coordinator asks to be left alone."""
        if isinstance(error, Unauthorized):
            self._token.refused()
        self._error = str(error)
        self._report()
        return error.retry_after if isinstance(error, Busy) else None

    def _warn(self, event: str, error: Exception, **attrs: Any) -> None:
        # What nobody has thought of comes with its traceback.
        foreseen = isinstance(error, MinerError | OSError)
        self._log.warning(event, error=str(error), exc_info=None if foreseen else error, **attrs)

    def _report(self) -> None:
        self._channel.send(Deliveries(len(self._schedule), self._error))

    def _recover(self) -> None:
        found = recover(self._records)
        for job_id, state, outcome in found.finished:
            self._update(job_id, state, outcome=outcome)
        for job_id in found.to_deliver:
            self._report_on(job_id)
        self._to_resume = found.to_resume
        self._channel.send(Recovered(found.started))
        self._report()

    # --- slots ---------------------------------------------------------------------------------------------

    def _see(self, view: Slots) -> None:
        self._view = view
        for slot in view.slots:
            if slot.job_id is not None:
                self._unplaced.pop(slot.job_id, None)
                self._progress.began(slot.job_id, clock.now())

    def _resume(self) -> None:
        """Go on with the jobs that a restart, or an error of the disk, left half taken in."""
        if not (self._view and self._view.slots) or clock.now() < self._resume_at:
            return
        in_slots = {slot.job_id for slot in self._view.slots}
        while self._to_resume:
            # One that is in a slot already was ready before an earlier agent died.
            if (job_id := self._to_resume.pop()) not in in_slots:
                self._start_intake(job_id, None)

    def _offers(self) -> list[Offer]:
        return [slot.offer for slot in self._view.slots if slot.offers] if self._view else []

    def _settle(self, said: JobSettled | CancelJob) -> None:
        """Nobody works on the job any more: what it left is its outcome, or it is lost or cancelled."""
        job_id = said.job_id
        self._progress.ended(job_id)
        self._unplaced.pop(job_id, None)
        if settle(self._records, said):
            self._report_on(job_id)

    # --- pulling -------------------------------------------------------------------------------------------

    def _room(self) -> list[Offer]:
        """Say which free slots no job on its way will take."""
        if self._view is None or not self._view.accepting:
            return []
        return room([slot.offer for slot in self._view.slots if slot.free], list(self._unplaced.values()))

    def _may_pull(self) -> bool:
        return not self._pulling and bool(self._token) and bool(self._room())

    def _start_pull(self) -> None:
        if not self._may_pull() or clock.now() < self._pull_at:
            return
        self._pulling = True
        known = dict.fromkeys([*self._unplaced, *self._progress.ids(), *self._schedule.newest()])
        filters = PullFilters([msgspec.to_builtins(offer) for offer in self._room()], list(known)[:MAX_KNOWN])
        self._background.start(self._pools["pull"], partial(self._coordinator.pull, filters), self._pulled)

    def _pulled(self, future: Future[PulledJob | None]) -> None:
        self._pulling = False
        try:
            job = future.result()
            is_new = job is not None and self._accept(job)
        except ChannelError:
            raise
        except Exception as error:  # noqa: BLE001  # one odd reply must not end the agent, again and again
            wanted = self._note_error(error)
            self._warn("pull failed", error)
            self._pull_at = clock.now() + max(self._pull_backoff.next(), wanted or 0.0)
            return
        self._pull_backoff.reset()
        if self._error is not None:
            self._error = None
            self._report()
        self._pull_at = clock.now() + (0.0 if is_new else self._config.coordinator.poll_interval_s)

    def _accept(self, job: PulledJob) -> bool:
        """Begin to take a pulled job in; False when it brought no new work."""
        job_id = job.manifest.job_id if job.manifest else str(job.error and job.error.job_id)
        if not valid_job_id(job_id):
            call = partial(self._intake.refuse_nameless, job_id, str(job.error))
            self._background.start(self._pools["intake"], call, Future.result)
            return False
        if self._records.known(job_id) or job_id in self._unplaced:
            self._repeat(job_id)
            return False
        if job.error:
            self._log.warning("manifest refused", job_id=job_id, error=str(job.error))
        self._start_intake(job_id, job)
        return True

    def _repeat(self, job_id: str) -> None:
        """Run a job that is here already never again; if it has a report, send that again."""
        self._log.info("job known already", job_id=job_id)
        if job_id in self._unplaced or job_id in self._progress or job_id in self._schedule:
            return
        if has_outcome(self._records, job_id):
            self._schedule.add(job_id, clock.now())

    def _start_intake(self, job_id: str, job: PulledJob | None) -> None:
        self._unplaced[job_id] = None
        self._update(job_id, State.PULLED)
        offers = self._offers()
        cancelled = self._cancels.setdefault(job_id, threading.Event())
        call = (
            partial(self._intake.take, job, job_id, offers, cancelled)
            if job
            else partial(self._intake.resume, job_id, offers, cancelled)
        )
        if job and job.manifest:
            manifest = job.manifest
            ticket = Ticket(job_id, manifest.runner, manifest.requirements, manifest.priority, clock.now())
            self._unplaced[job_id] = ticket
        self._background.start(self._pools["intake"], call, partial(self._taken, job_id))

    def _acked(self, job_id: str, runner: str) -> None:
        """Note that a job is ours: from now on the coordinator may cancel it."""
        self._progress.began(job_id, clock.now())
        self._update(job_id, State.ACKED, runner=runner)

    def _taken(self, job_id: str, future: Future[Taken]) -> None:
        try:
            taken = future.result()
        except Stopping:
            return
        except Exception as error:  # noqa: BLE001  # one odd job must not end the agent, again and again
            # What is not recorded is not acknowledged either, and will be handed out again.
            self._unplaced.pop(job_id, None)
            self._pull_at = self._resume_at = clock.now() + self._pull_backoff.next()
            if self._records.known(job_id):
                self._to_resume.append(job_id)
            else:
                del self._cancels[job_id]
            self._note_error(error)
            self._warn("cannot take job in", error, job_id=job_id)
            return
        cancelled = self._cancels.pop(job_id).is_set()
        self._unplaced[job_id] = taken.ticket
        if taken.ticket is not None:
            self._channel.send(JobReady(taken.ticket))
            if cancelled:
                # It came too late for the inputs, so it is for the supervisor, which knows the job by now.
                self._channel.send(_by_coordinator(job_id))
            return
        del self._unplaced[job_id]
        if taken.report:
            self._progress.ended(job_id)
            self._report_on(job_id)
        elif taken.gone:
            self._log.info("job is not ours any more", job_id=job_id)
            self._update(job_id, State.FAILED)

    def _report_on(self, job_id: str) -> None:
        """Have the job's outcome, which is on disk, delivered."""
        self._update(job_id, State.UPLOADING, outcome=read_outcome(self._records, job_id))
        self._schedule.add(job_id, clock.now())
        self._report()

    # --- delivering ----------------------------------------------------------------------------------------

    def _start_deliveries(self) -> None:
        if not self._token:
            return
        for job_id in self._schedule.start_due(clock.now(), POOLS["delivery"] - self._schedule.running):
            call = partial(deliver, self._records, self._coordinator, self._config.node_id, job_id)
            self._background.start(self._pools["delivery"], call, partial(self._delivered, job_id))

    def _delivered(self, job_id: str, future: Future[Delivered]) -> None:
        try:
            delivered = future.result()
        except Exception as error:  # noqa: BLE001  # one odd job must not end the agent, again and again
            pause = self._schedule.failed(job_id, clock.now(), self._note_error(error))
            self._warn("report not accepted", error, job_id=job_id, again_in_s=round(pause, 1))
            return
        self._schedule.succeeded(job_id, clock.now())
        self._error = None
        outcome = delivered.outcome
        self._log.info("report accepted", job_id=job_id, code=outcome.code or "OK", how=delivered.how)
        self._update(job_id, State.DONE if outcome.ok else State.FAILED, outcome=outcome)
        self._report()

    # --- progress ------------------------------------------------------------------------------------------

    def _start_progress(self) -> None:
        if not self._token:
            return
        for job_id, pct, note in self._progress.start_due(clock.now()):
            call = partial(self._coordinator.progress, job_id, pct, note)
            self._background.start(self._pools["progress"], call, partial(self._progressed, job_id))

    def _progressed(self, job_id: str, future: Future[bool]) -> None:
        self._progress.sent(job_id, clock.now())
        try:
            wants_end = future.result()
        except Exception as error:  # noqa: BLE001  # one odd reply must not end the agent, again and again
            # The next report says the same and more; only a refused token must be dealt with.
            if isinstance(error, Unauthorized):
                self._token.refused()
            if not isinstance(error, CoordinatorError):
                self._warn("progress not accepted", error, job_id=job_id)
            return
        if not wants_end:
            return
        if job_id in self._cancels:
            # The supervisor learns of the job when its inputs are there.
            self._cancels[job_id].set()
        else:
            self._channel.send(_by_coordinator(job_id))

    def _update(self, job_id: str, state: State, *, runner: str = "", outcome: Outcome | None = None) -> None:
        self._channel.send(describe(job_id, state, runner=runner, outcome=outcome))


def _by_coordinator(job_id: str) -> CancelJob:
    return CancelJob(job_id, "cancel", "by the coordinator")
