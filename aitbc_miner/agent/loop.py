"""The process that talks to the coordinator about jobs: pulls, takes in, reports progress, delivers.

One thread decides, here and in the parts that it calls; calls to the coordinator and to a shared queue run in
a few others and come back as a callback in this one. The process is not root and reads everything that comes
from outside.
"""

import itertools
import select
import threading
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial

from aitbc_miner.agent.admission import RESUMABLE
from aitbc_miner.agent.admission_queue import AdmissionQueue, by_coordinator, id_of
from aitbc_miner.agent.anchor import Anchor
from aitbc_miner.agent.context import Part, AgentContext
from aitbc_miner.agent.delivery import settle
from aitbc_miner.agent.delivery_queue import DeliveryQueue
from aitbc_miner.agent.fleet import Fleet, FleetWatch, Seen
from aitbc_miner.agent.idle_monitor import IdleMonitor
from aitbc_miner.agent.node_token import TokenLine
from aitbc_miner.agent.progress import ProgressBook
from aitbc_miner.agent.pull import Puller
from aitbc_miner.agent.reconcile import Reconciler
from aitbc_miner.agent.recovery import Found, read_outcome, recover, recover_rest
from aitbc_miner.agent.retention import Retention
from aitbc_miner.agent.retries import RetryOnDemand, Retries
from aitbc_miner.config.settings import Config
from aitbc_miner.coordinator.interface import (
    Coordinator,
    CoordinatorError,
    Gone,
    PulledJob,
    Refused,
    Unauthorized,
)
from aitbc_miner.errors import ErrorCode, MinerError
from aitbc_miner.ipc.channel import Channel
from aitbc_miner.ipc.messages import (
    CancelJob,
    JobProgress,
    JobSettled,
    PrivateLine,
    Recovered,
    RetryJob,
    Slots,
    SpaceWanted,
    Stop,
    Swept,
    ToAgent,
)
from aitbc_miner.jobs import Outcome, State
from aitbc_miner.queue.interface import RetryQueue
from aitbc_miner.queue.sqlite import SqliteQueue
from aitbc_miner.store import reserve
from aitbc_miner.store.database import Database
from aitbc_miner.store.ledger import Ledger, account_of
from aitbc_miner.util import clock
from aitbc_miner.util.web import Proxy

# How many of the jobs that are done `jobs` knows after a start.
SHOWN = 2000
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
        shared: RetryQueue | None = None,
        input_proxy: Proxy | None = None,
    ) -> None:
        self._channel = channel
        self._stopping = threading.Event()
        self._token = TokenLine(line, coordinator, mask)
        # An agent that cannot start on a full disk would leave all its reports unsent.
        reserve.ensure(config.workspace.root)
        database = Database(config.queue.path)
        self._ledger = Ledger(database)
        self._context = context = AgentContext(
            config, channel, coordinator, self._token, self._ledger, SqliteQueue(database), input_proxy
        )
        lease_s = config.queue.lease_s
        self._anchor = Anchor(context, database, self._recover)
        self._fleet = fleet = Fleet(shared, config.node_id, lease_s, self._belongs) if shared else None
        self._progress = ProgressBook(config.heartbeat.interval_s, PROGRESS_PAUSE_S)
        self._reporter = DeliveryQueue(context, fleet, self._settled)
        self._reruns = Retries(context, fleet, self._report)
        self._demand = RetryOnDemand(context, fleet, self._reruns, self._reporter)
        self._taker = AdmissionQueue(context, fleet, self._progress, self._stopping, self._conclude, self._enter)
        room = self._taker.room
        self._assignments = listed = Reconciler(
            context, self._busy, self._ours, self._accept, self._repeat, self._end_unwanted
        )
        self._puller = Puller(context, room, self._known, self._accept, self._pulls_from, listed.hurry)
        self._idle = IdleMonitor(context, lambda: self._puller.idle_since)
        self._watch = FleetWatch(context, fleet, room, self._lost, self._seen) if fleet else None
        self._pruning = Retention(context)
        self._just_ended: set[str] = set()
        # Jobs of which it is not known yet how far they have come.
        self._unread: set[str] = set()

    # --- the loop ------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Recover, then serve until told to stop or the supervisor is gone (ChannelError)."""
        self._anchor.start()
        self._token.ask()
        while not self._stopping.is_set():
            self._wait()
            self._context.background.finish()
            self._retry_due()
            for part in self._parts():
                part.start_due()
            self._start_progress()
            self._token.tell_load(len(self._ours() | set(self._taker.ids())))
        self._context.close()

    def _parts(self) -> list[Part]:
        watch = [self._watch] if self._watch else []
        # Reports before pulls: a coordinator may count a job as under way until it has its report.
        own: list[Part] = [self._taker, self._reporter, self._assignments, self._puller, self._idle]
        return [*own, self._pruning, *watch, self._context.persisting, self._anchor]

    def _wait(self) -> None:
        poller = select.poll()
        poller.register(
            self._channel.fileno(), select.POLLIN | (select.POLLOUT if self._channel.has_unsent else 0)
        )
        poller.register(self._token.fileno(), select.POLLIN)
        poller.register(self._context.background.woken, select.POLLIN)
        ready = dict(poller.poll(self._pause() * 1000))
        if ready.get(self._channel.fileno(), 0) & select.POLLOUT:
            self._channel.flush()
        if ready.get(self._channel.fileno(), 0) & ~select.POLLOUT:
            for message in self._channel.receive():
                self._obey(message)
        if self._token.fileno() in ready and self._token.receive():
            self._puller.hurry()
            self._reporter.hurry()
            self._assignments.heard()
        if self._context.background.woken in ready:
            self._context.background.clear()

    def _pause(self) -> float:
        dues = [part.next_due() for part in self._parts()]
        dues.append(self._reruns.next_due())
        # Without a token nothing can be sent: what is due then would keep this from waiting at all.
        dues.append(self._progress.next_due() if self._token else None)
        return max(
            0.0, min([due for due in dues if due is not None], default=clock.now() + 60.0) - clock.now()
        )

    def _obey(self, message: ToAgent) -> None:
        match message:
            case Slots():
                self._taker.see(message)
                for slot in message.slots:
                    if slot.job_id is not None:
                        self._progress.began(slot.job_id, clock.now())
            case CancelJob() if self._taker.cancel(message.job_id):
                pass
            case JobSettled() | CancelJob():
                self._settle(message)
            case JobProgress():
                self._progress.note(message.job_id, message.pct or 0.0, message.note, clock.now())
            case RetryJob():
                self._demand.retry(message.job_id)
            case Swept() | SpaceWanted():
                self._pruning.obey(message)
            case Stop():
                self._stopping.set()

    # --- the start -----------------------------------------------------------------------------------------

    def _recover(self) -> None:
        """Read the records and go on with each job where it was; nothing is pulled before."""
        context = self._context
        for row in self._ledger.latest(SHOWN):
            context.show_row(row)
        found = recover(context.records, self._ledger.settled())
        self._reporter.recovered()
        self._go_on(found)

    def _go_on(self, found: Found) -> None:
        """Go on with each job that was found where it was, and later with those that could not be read."""
        context = self._context
        for job_id in found.finished:
            self._enter(job_id)
        if self._fleet:
            self._fleet.recovered(found.leases)
        for job_id in found.to_deliver:
            self._reporter.add(job_id)
        self._reruns.recovered(found.to_retry)
        for job_id in found.to_retry:
            # They were acknowledged: the coordinator may cancel them while they wait.
            self._progress.began(job_id, clock.now())
        for job_id in found.ended:
            self._conclude(job_id)
        self._taker.resume(found.to_resume)
        for _ in range(found.broken):
            context.count("broken_records")
        self._channel.send(Recovered(found.started))
        context.tell()
        self._unread = set(found.unread)
        if found.unread:
            what = f"read the records of {len(found.unread)} jobs, such as {next(iter(found.unread))}"
            context.persisting.do(what, partial(self._read_rest, found))

    def _read_rest(self, before: Found) -> None:
        found = recover_rest(self._context.records, before)
        if found.unread.keys() == before.unread.keys():
            raise OSError(next(iter(found.unread.values())))
        self._go_on(found)

    def _enter(self, job_id: str) -> None:
        """Enter a job in the books that is settled and not there: it was just given up, or the node died."""
        context = self._context
        try:
            with context.records.open(job_id) as job:
                state = job.state()
                # One that was given up on its way here came to nothing that anybody waits for.
                nothing = Outcome(job_id=job_id, code=ErrorCode.E_CANCELLED, message=state.note or "")
                outcome = job.outcome() or nothing
                receipt = job.receipt()
            how = state.delivery or ""
            context.book(account_of(outcome, state, state.runner, how, receipt, log_too=context.log_too))
        except (MinerError, OSError) as error:
            # On a full disk, say; the next start does it.
            context.warn("cannot enter job", error, job_id=job_id)
            return
        context.show(job_id, state.state, outcome=outcome)

    # --- jobs ----------------------------------------------------------------------------------------------

    def _ours(self) -> set[str]:
        """Name the jobs that are acknowledged and have no report yet."""
        return {*self._progress.ids(), *self._reruns.ids(), *self._unread}

    def _busy(self) -> set[str]:
        return {*self._ours(), *self._taker.ids(), *self._reporter.newest()}

    def _pulls_from(self) -> float:
        """Say from when on to pull: what the coordinator takes for ours already comes first."""
        if self._assignments.asked and not self._context.homeless:
            return self._taker.troubled_until()
        return max(self._taker.troubled_until(), clock.now() + 60.0)

    def _settled(self, job_id: str) -> None:
        """Pull again, if the last time there was nothing: the report makes room on the other side, too."""
        if job_id in self._just_ended and self._puller.idle_since is not None:
            self._puller.hurry()
        self._just_ended.discard(job_id)

    def _known(self) -> list[str]:
        parts = (self._taker.ids(), self._progress.ids(), self._reruns.ids(), self._unread)
        return [*itertools.chain(*parts), *self._reporter.newest()]

    def _accept(self, job: PulledJob) -> bool:
        """Begin to take a pulled job in; False when it brought no new work."""
        job_id, usable = id_of(job)
        if not usable:
            self._taker.refuse_nameless(job_id, str(job.error))
            return False
        if self._anchor.lost():
            return False  # it comes again: nobody was told that we have it
        known = self._context.records.known(job_id)
        if known or job_id in self._taker or self._ledger.knows(job_id):
            self._context.log.info("job known already", job_id=job_id, directory=known)
            if known:
                self._repeat(job_id)
            return False
        self._assignments.saw(job_id)
        self._taker.take(job_id, job)
        return True

    def _repeat(self, job_id: str) -> None:
        """Run a job that is here already never again; if it has a report, send that again."""
        busy = (self._taker, self._progress, self._reruns, self._reporter, self._unread)
        if not any(job_id in part for part in busy) and read_outcome(self._context.records, job_id):
            self._reporter.add(job_id)

    def _settle(self, said: JobSettled | CancelJob) -> None:
        """Nobody works on the job any more: what it left is its outcome, or it is lost or cancelled."""
        if isinstance(said, JobSettled) and said.code is None and self._waits(said.job_id):
            # Of an attempt whose outcome was found on the disk before its worker's end was heard of.
            return
        self._taker.forget(said.job_id)
        self._reruns.drop(said.job_id)
        self._context.persisting.do(f"settle job {said.job_id}", partial(self._settle_now, said))

    def _settle_now(self, said: JobSettled | CancelJob) -> None:
        if settle(self._context.records, said):
            self._conclude(said.job_id)

    def _waits(self, job_id: str) -> bool:
        """Whether a job is on its way to a slot, by what we know and by its record, which a worker writes."""
        if job_id not in self._reruns and job_id not in self._taker.ids():
            return False
        try:
            with self._context.records.open(job_id) as job:
                return job.state().state in RESUMABLE
        except (MinerError, OSError):
            return False

    def _conclude(self, job_id: str) -> None:
        """Have a job that has an outcome reported or tried again."""
        self._context.persisting.do(f"decide about job {job_id}", partial(self._decide, job_id))

    def _decide(self, job_id: str) -> None:
        self._reruns.settle(job_id)
        if job_id not in self._reruns:
            self._progress.ended(job_id)
            self._just_ended.add(job_id)
        self._puller.hurry()

    def _report(self, job_id: str) -> None:
        self._progress.ended(job_id)
        self._reporter.add(job_id)

    def _retry_due(self) -> None:
        for job_id in self._reruns.take_due(self._taker.in_slots()):
            self._reruns.begun(job_id)
            self._taker.resume([job_id])

    # --- the fleet -----------------------------------------------------------------------------------------

    def _belongs(self, job_id: str) -> bool:
        """Ask the coordinator whether a job is ours, as it was when it was acknowledged; in a thread."""
        try:
            self._context.coordinator.ack(job_id)
        except Gone:
            return False
        except Refused:
            return True  # whatever it has against the question; a report is answered for itself
        return True

    def _lost(self, job_id: str) -> None:
        """Another node has this job: it ends here, and its report is never sent (`Fleet.is_ours`)."""
        self._context.log.warning("job lost to another node", job_id=job_id)
        self._channel.send(CancelJob(job_id, "cancel", "another node of the fleet has it"))

    def _seen(self, seen: Seen) -> None:
        self._taker.resume(seen.taken)
        for job_id in seen.returned:
            try:
                # First: what the books call settled is not even read at the next start.
                self._ledger.reopen(job_id)
                with self._context.records.open(job_id) as job:
                    job.move(State.UPLOADING, delivery=None)
            except (MinerError, OSError) as error:
                self._context.warn("cannot report job that nobody took", error, job_id=job_id)
            else:
                self._reporter.add(job_id)

    # --- progress ------------------------------------------------------------------------------------------

    def _start_progress(self) -> None:
        if not self._token:
            return
        for job_id, pct, note in self._progress.start_due(clock.now()):
            call = partial(self._context.coordinator.progress, job_id, pct, note)
            self._context.start("progress", call, partial(self._progressed, job_id))

    def _progressed(self, job_id: str, future: Future[bool]) -> None:
        self._progress.sent(job_id, clock.now())
        try:
            wants_end = future.result()
        except Exception as error:  # noqa: BLE001  # one odd reply must not end the agent, again and again
            # The next report says the same and more; only a refused token must be dealt with.
            if isinstance(error, Unauthorized):
                self._token.refused()
            if not isinstance(error, CoordinatorError):
                self._context.warn("progress not accepted", error, job_id=job_id)
            return
        if wants_end:
            self._end_unwanted(by_coordinator(job_id))

    def _end_unwanted(self, word: CancelJob) -> None:
        if not self._taker.cancel(word.job_id):
            # The supervisor learns of a job when its inputs are there.
            self._channel.send(word)
