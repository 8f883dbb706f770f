"""What the parts of the agent share: where things are, whom to tell, how to do something beside the loop."""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Literal, Protocol, TypeVar

from aitbc_miner.agent.job_table import JobTable
from aitbc_miner.agent.node_token import TokenLine
from aitbc_miner.config.settings import Config
from aitbc_miner.coordinator.interface import (
    Busy,
    Coordinator,
    CoordinatorError,
    Refused,
    Unauthorized,
    UnknownNode,
    Unreachable,
)
from aitbc_miner.errors import ErrorCode, MinerError
from aitbc_miner.ipc.channel import Channel
from aitbc_miner.ipc.messages import Counted, CounterName, Deliveries, JobUpdate, ToAgent
from aitbc_miner.jobs import Outcome, State
from aitbc_miner.queue.interface import RetryQueue
from aitbc_miner.store.database import DatabaseError
from aitbc_miner.store.ledger import Ledger, LedgerRow, account_of
from aitbc_miner.store.records import Records
from aitbc_miner.util import clock
from aitbc_miner.util.background import Background
from aitbc_miner.util.log import events
from aitbc_miner.util.persisting import Persisting
from aitbc_miner.util.web import Proxy

T = TypeVar("T")

Pool = Literal["pull", "intake", "report", "upload", "fail", "progress", "queue", "fleet", "assigned"]
# How many calls of each kind may be under way. A slow upload must not keep a pull, an ack or another report
# waiting. What is said to the queues is said in order.
POOLS: dict[Pool, int] = {
    "pull": 1,
    "intake": 16,
    "report": 4,
    "upload": 2,
    "fail": 2,
    "progress": 2,
    "queue": 1,
    "fleet": 1,
    "assigned": 1,
}


class Part(Protocol):
    """A part of the agent: it says when it is due, and does what is."""

    def next_due(self) -> float | None:
        """When there is something to do; None while there is nothing."""
        ...

    def start_due(self) -> None:
        """Do what is due."""
        ...


class AgentContext:
    """For the agent's main thread; what is started here comes back to it."""

    def __init__(
        self,
        config: Config,
        channel: Channel[ToAgent],
        coordinator: Coordinator,
        token: TokenLine,
        ledger: Ledger,
        queue: RetryQueue,
        input_proxy: Proxy | None = None,
    ) -> None:
        self.config = config
        self.channel = channel
        self.coordinator = coordinator
        self.token = token
        self.ledger = ledger
        self.queue = queue
        self.log_too = config.coordinator.dialect == "bootstrap"
        self.input_proxy = input_proxy
        self.records = Records(config.workspace.root)
        self.background = Background()
        self.log = events("agent")
        self.error: str | None = None
        # Apart, for a coordinator that answers makes the fleet's queue no better.
        self.queue_error: str | None = None
        self.persisting = Persisting(self.tell)
        self.jobs = JobTable(config.heartbeat.interval_s)
        # Why nothing is pulled, although there are free slots.
        self.paused = ""
        # What is wrong with the workspace, if it is not the one with this node's jobs.
        self.homeless: str | None = None
        self.pending = 0
        self.refused = 0
        self._failing: dict[str, tuple[bool, int]] = {}
        self._outage_since = 0.0
        self._failed_calls = 0
        self._unbooked: deque[LedgerRow] = deque()
        self._pools = {name: ThreadPoolExecutor(n, name) for name, n in POOLS.items()}

    def book(self, row: LedgerRow) -> None:
        """Enter a settled job in the books, now or, when they cannot be written, later. From any thread.

        Its report is settled all the same, and after a restart its record is found without a row.
        """
        self._unbooked.append(row)
        self.book_rest()

    def book_rest(self) -> None:
        """Enter what could not be entered before. From any thread."""
        while self._unbooked:
            row = self._unbooked.popleft()
            try:
                self.ledger.enter(row)
            except DatabaseError as error:
                self._unbooked.appendleft(row)
                self.warn("job not entered in the books yet", error, job_id=row.job_id)
                return

    def enter(self, job_id: str) -> None:
        """Enter a job in the ledger that is settled and has no row: it was given up, or the node died."""
        try:
            with self.records.open(job_id) as job:
                state = job.state()
                # A job that was given up before it ran came to nothing that anybody waits for.
                nothing = Outcome(job_id=job_id, code=ErrorCode.E_CANCELLED, message=state.note or "")
                outcome = job.outcome() or nothing
                receipt = job.receipt()
            how = state.delivery or ""
            self.book(account_of(outcome, state, state.runner, how, receipt, log_too=self.log_too))
        except (MinerError, OSError) as error:
            # On a full disk, say; the next start does it.
            self.warn("cannot enter job", error, job_id=job_id)
            return
        self.show(job_id, state.state, outcome=outcome)

    def start(self, pool: Pool, call: Callable[[], T], done: Callable[[Future[T]], None]) -> None:
        """Run a call in one of the pools, then `done` with its future in the main thread."""
        self.background.start(self._pools[pool], call, done)

    def close(self) -> None:
        """Start nothing more, and wait for nothing."""
        for pool in self._pools.values():
            pool.shutdown(wait=False, cancel_futures=True)

    def failed(self, error: Exception) -> float | None:
        """Remember the last error for `status`; gives how long the coordinator asks to be left alone."""
        if isinstance(error, Unauthorized):
            self.token.refused()
        if isinstance(error, UnknownNode):
            # The answer to a heartbeat says whether that is so, and then the node registers again.
            self.token.want_beat()
        self.error = str(error)
        self.tell()
        return error.retry_after if isinstance(error, Busy) else None

    def call_failed(self, call: str, event: str, error: Exception, **attrs: Any) -> None:
        """Log that a call of this kind failed; but not if it does again, nor all that an outage hits."""
        if isinstance(error, Busy) and error.status == 429:
            self.count("rate_limited", call)
        if isinstance(error, CoordinatorError) and not isinstance(error, Refused):
            # A coordinator that is away is away for all.
            away = isinstance(error, Unreachable)
            said = call in self._failing or (away and any(gone for gone, _ in self._failing.values()))
            self._outage_since = self._outage_since if self._failing else clock.now()
            self._failing[call] = away, self._failing.get(call, (away, 0))[1] + 1
            if said:
                return
        self.warn(event, error, **attrs)

    def answered(self, call: str) -> None:
        """Note that such a call was answered, and log the end of an outage."""
        _, times = self._failing.pop(call, (False, 0))
        self._failed_calls += times
        if times and not self._failing:
            for_s = round(clock.now() - self._outage_since, 1)
            self.log.info("the coordinator answers again", after_s=for_s, failed_calls=self._failed_calls)
            self._failed_calls = 0

    def worked(self) -> None:
        """Forget the last error: the coordinator answers."""
        if self.error is not None:
            self.error = None
            self.tell()

    def warn(self, event: str, error: Exception, **attrs: Any) -> None:
        """Log what went wrong; what nobody has thought of comes with its traceback."""
        foreseen = isinstance(error, MinerError | OSError)
        self.log.warning(event, error=str(error), exc_info=None if foreseen else error, **attrs)

    def tell(self) -> None:
        """Tell the supervisor how it goes."""
        error = self.homeless or self.error or self.queue_error or self.persisting.trouble
        paused = "the disk with this node's jobs is not there" if self.homeless else self.paused
        self.channel.send(Deliveries(self.pending, error, self.refused, paused))

    def count(self, name: CounterName, label: str = "", n: int = 1) -> None:
        """Add to a metric."""
        self.channel.send(Counted(name, label, n))

    def show(self, job_id: str, state: State, *, runner: str = "", outcome: Outcome | None = None) -> None:
        """Have `jobs` show where a job is."""
        shown = outcome or Outcome(job_id=job_id)
        self.channel.send(
            JobUpdate(
                job_id,
                state,
                runner,
                code=shown.code,
                message=shown.message,
                slot=shown.slot,
                since_wall=clock.wall(),
                wall_s=shown.usage.wall_s if outcome else None,
                artifacts=shown.count_artifacts(log_too=self.log_too),
            )
        )

    def show_row(self, row: LedgerRow) -> None:
        """Have `jobs` show one that was done in an earlier run of the node."""
        state = State.DONE if row.code is None else State.FAILED
        self.channel.send(
            JobUpdate(
                row.job_id,
                state,
                row.runner,
                code=ErrorCode(row.code) if row.code else None,
                message=row.message,
                slot=row.slot,
                since_wall=row.finished_wall,
                wall_s=row.wall_s,
                artifacts=row.artifacts,
            )
        )
