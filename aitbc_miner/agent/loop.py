"""The process that talks to the coordinator about jobs: pulls and admits jobs, sends progress and reports.

The main thread decides, here and in the parts of the agent. Calls to the coordinator and to a shared queue
run in other threads, and end with a callback in the main thread. The process is not root, and reads all data
from outside.
"""

import select
import threading

from aitbc_miner.agent.admission_queue import AdmissionQueue
from aitbc_miner.agent.anchor import Anchor
from aitbc_miner.agent.context import AgentContext, Part
from aitbc_miner.agent.delivery_queue import DeliveryQueue
from aitbc_miner.agent.fleet import Fleet
from aitbc_miner.agent.fleet_watch import FleetWatch
from aitbc_miner.agent.idle_monitor import IdleMonitor
from aitbc_miner.agent.job_table import Stage
from aitbc_miner.agent.node_token import TokenLine
from aitbc_miner.agent.progress import ProgressReports
from aitbc_miner.agent.pull import Puller
from aitbc_miner.agent.reconcile import Reconciler
from aitbc_miner.agent.recovery import Found, recover, recover_rest
from aitbc_miner.agent.retention import Retention
from aitbc_miner.agent.retries import Retries, RetryOnDemand
from aitbc_miner.config.settings import Config
from aitbc_miner.coordinator.interface import Coordinator
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
from aitbc_miner.queue.interface import RetryQueue
from aitbc_miner.queue.sqlite import SqliteQueue
from aitbc_miner.store import reserve
from aitbc_miner.store.database import Database
from aitbc_miner.store.ledger import Ledger
from aitbc_miner.util import clock
from aitbc_miner.util.web import Proxy

# The number of finished jobs that `jobs` shows after a start.
SHOWN = 2000
IDLE_S = 60.0


class Agent:
    """The agent's main thread."""

    def __init__(
        self,
        channel: Channel[ToAgent],
        line: Channel[PrivateLine],
        config: Config,
        coordinator: Coordinator,
        shared: RetryQueue | None = None,
        input_proxy: Proxy | None = None,
    ) -> None:
        self._channel = channel
        self._stopping = threading.Event()
        self._token = TokenLine(line, coordinator)
        # The database needs space: without it, an agent could not start on a full disk and send its reports.
        reserve.ensure(config.workspace.root)
        database = Database(config.queue.path)
        queue = SqliteQueue(database)
        self._context = context = AgentContext(
            config, channel, coordinator, self._token, Ledger(database), queue, input_proxy
        )
        self._jobs = context.jobs
        lease_s = config.queue.lease_s
        self._fleet = fleet = Fleet(shared, config.node_id, lease_s, coordinator) if shared else None
        self._anchor = Anchor(context, database)
        # Each part knows the parts before it.
        self._delivery = delivery = DeliveryQueue(context, fleet)
        self._retries = Retries(context, fleet, delivery)
        self._on_demand = RetryOnDemand(context, fleet, delivery)
        self._admission = admission = AdmissionQueue(
            context, fleet, self._anchor, self._retries, delivery, self._stopping
        )
        self._progress = ProgressReports(context, admission)
        self._reconciler = Reconciler(context, admission, delivery)
        self._puller = Puller(context, admission, self._reconciler)
        self._idle = IdleMonitor(context, self._puller)
        self._retention = Retention(context)
        self._watch = [FleetWatch(context, fleet, admission, delivery)] if fleet else []
        self._recovered = False

    # --- the loop ------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Recover, then serve until the supervisor says stop or is gone (ChannelError)."""
        self._token.ask()
        self.turn()
        while not self._stopping.is_set():
            self._wait()
            self._context.background.finish()
            self.turn()
        self._context.close()

    def turn(self) -> None:
        """Have each part do its due work."""
        self._anchor.start_due()
        if self._anchor.found and not self._recovered:
            self._recover()
        for part in self._parts():
            part.start_due()
        self._token.tell_load(self._jobs.undone())

    def _parts(self) -> list[Part]:
        # Reports before pulls: a coordinator may count a job as running until it has the report.
        way: list[Part] = [self._retries, self._admission, self._delivery, self._reconciler]
        rest: list[Part] = [self._puller, self._idle, self._retention, *self._watch, self._progress]
        return [*way, *rest, self._context.persisting]

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
            self._delivery.hurry()
            self._reconciler.heard()
        if self._context.background.woken in ready:
            self._context.background.clear()

    def _pause(self) -> float:
        now = clock.now()
        dues = [due for part in (self._anchor, *self._parts()) if (due := part.next_due()) is not None]
        return max(0.0, min(dues, default=now + IDLE_S) - now)

    def _obey(self, message: ToAgent) -> None:
        match message:
            case Slots():
                self._jobs.see(message)
            case CancelJob() if self._admission.stop_fetching(message):
                pass
            case JobSettled() | CancelJob():
                # Before, the records are not there, and will tell of these jobs.
                if self._recovered:
                    self._retries.settle(message)
            case JobProgress():
                self._progress.note(message)
            case RetryJob():
                self._on_demand.retry(message.job_id)
            case Swept() | SpaceWanted():
                self._retention.obey(message)
            case Stop():
                self._stopping.set()

    # --- the start -----------------------------------------------------------------------------------------

    def _recover(self) -> None:
        """Read the records and resume each job. The node pulls no job before."""
        self._recovered = True
        context = self._context
        for row in context.ledger.latest(SHOWN):
            context.show_row(row)
        found = recover(context.records, context.ledger.settled())
        self._delivery.recovered()
        self._go_on(found)

    def _go_on(self, found: Found) -> None:
        """Resume each job that was found; try again later to read the unread records."""
        context, jobs = self._context, self._jobs
        for job_id in found.finished:
            context.enter(job_id)
            if job_id in jobs:
                jobs.move(job_id, Stage.GONE)
        if self._fleet:
            self._fleet.recovered(found.leases)
        for job_id in found.to_deliver:
            self._delivery.add(job_id)
        self._retries.recovered(found.to_retry)
        for job_id in found.ended:
            self._retries.conclude(job_id)
        self._admission.resume(found.to_resume)
        for job in found.started:
            if jobs.stage(job.job_id) is not Stage.RUNNING:
                jobs.move(job.job_id, Stage.RUNNING)
            jobs.acknowledge(job.job_id)
        for _ in range(found.broken):
            context.count("broken_records")
        self._channel.send(Recovered(found.started))
        context.tell()
        if found.unread:
            for job_id in found.unread.keys() - set(jobs.names()):
                jobs.move(job_id, Stage.UNREAD)
            what = f"read the records of {len(found.unread)} jobs, such as {next(iter(found.unread))}"
            context.persisting.do(what, self._read_rest)

    def _read_rest(self) -> None:
        # The supervisor may have settled some of them meanwhile.
        unread = [entry.job_id for entry in self._jobs.among(Stage.UNREAD)]
        found = recover_rest(self._context.records, unread)
        if unread and found.unread.keys() == set(unread):
            raise OSError(next(iter(found.unread.values())))
        self._go_on(found)
