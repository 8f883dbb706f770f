"""The objects that all parts of the agent share; helpers for logs, threads and messages to the supervisor."""

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
# The number of threads for each kind of call. No pull, ack or report must wait for a slow upload. Each queue
# has one thread, so that its calls keep their order.
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
    """A part of the agent, with work that becomes due at times."""

    def next_due(self) -> float | None:
        """When the part has work; None while it has none."""

    def start_due(self) -> None:
        """Do the work that is due."""


class AgentContext:
    """For the agent's main thread. Calls in threads come back to the main thread."""

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
        # Apart from `error`, because an answer of the coordinator clears `error` only.
        self.queue_error: str | None = None
        self.persisting = Persisting(self.tell)
        self.jobs = JobTable(config.heartbeat.interval_s)
        # Why the node pulls no jobs, although it has free slots.
        self.paused = ""
        # Why `workspace.root` is not this node's workspace; None if it is.
        self.homeless: str | None = None
        self.pending = 0
        self.refused = 0
        self._failing: dict[str, tuple[bool, int]] = {}
        self._outage_since = 0.0
        self._failed_calls = 0
        self._unbooked: deque[LedgerRow] = deque()
        self._pools = {name: ThreadPoolExecutor(n, name) for name, n in POOLS.items()}

    def book(self, row: LedgerRow) -> None:
        """Enter a settled job in the ledger, or later if the database fails now. From any thread.

        After a crash in between, the next start finds the settled record without a row, and enters the row.
        """
        self._unbooked.append(row)
        self.book_rest()

    def book_rest(self) -> None:
        """Enter the rows that wait for the database. From any thread."""
        while self._unbooked:
            row = self._unbooked.popleft()
            try:
                self.ledger.enter(row)
            except DatabaseError as error:
                self._unbooked.appendleft(row)
                self.warn("job not entered in ledger", error, job_id=row.job_id)
                return

    def enter(self, job_id: str) -> None:
        """Enter a settled job without a row in the ledger: the node gave the job up, or died."""
        try:
            with self.records.open(job_id) as job:
                state = job.state()
                # A job that the node gave up before it ran has no outcome.
                nothing = Outcome(job_id=job_id, code=ErrorCode.E_CANCELLED, message=state.note or "")
                outcome = job.outcome() or nothing
                receipt = job.receipt()
            how = state.delivery or ""
            self.book(account_of(outcome, state, state.runner, how, receipt, log_too=self.log_too))
        except (MinerError, OSError) as error:
            # The disk may be full. The next start enters the job.
            self.warn("cannot enter job in ledger", error, job_id=job_id)
            return
        self.show(job_id, state.state, outcome=outcome)

    def start(self, pool: Pool, call: Callable[[], T], done: Callable[[Future[T]], None]) -> None:
        """Run a call in one of the pools, then `done` with its future in the main thread."""
        self.background.start(self._pools[pool], call, done)

    def note(self, call: Callable[[], object], failure: str) -> None:
        """Change the retry queue in its thread; log `failure` if the queue fails.

        The queue matters after a restart only, and without its note the agent then acts at once.
        """

        def done(future: Future[object]) -> None:
            if isinstance(error := future.exception(), Exception):
                self.warn(failure, error)

        self.start("queue", call, done)

    def close(self) -> None:
        """Cancel all calls that have not begun, and do not wait for the others."""
        for pool in self._pools.values():
            pool.shutdown(wait=False, cancel_futures=True)

    def failed(self, error: Exception) -> float | None:
        """Keep the last error for `status`; gives the seconds for which the coordinator wants no call."""
        if isinstance(error, Unauthorized):
            self.token.refused()
        if isinstance(error, UnknownNode):
            # The reply to a heartbeat confirms or denies the error. If confirmed, the node registers again.
            self.token.want_beat()
        self.error = str(error)
        self.tell()
        return error.retry_after if isinstance(error, Busy) else None

    def call_failed(self, call: str, event: str, error: Exception, **attrs: Any) -> None:
        """Log a failed call; but log repeated failures once, and an outage once for all kinds of calls."""
        if isinstance(error, Busy) and error.status == 429:
            self.count("rate_limited", call)
        if isinstance(error, CoordinatorError) and not isinstance(error, Refused):
            # An unreachable coordinator is unreachable for all kinds of calls.
            away = isinstance(error, Unreachable)
            said = call in self._failing or (away and any(gone for gone, _ in self._failing.values()))
            self._outage_since = self._outage_since if self._failing else clock.now()
            self._failing[call] = away, self._failing.get(call, (away, 0))[1] + 1
            if said:
                return
        self.warn(event, error, **attrs)

    def answered(self, call: str) -> None:
        """Note that the coordinator answered a call of this kind, and log the end of an outage."""
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
        """Log an error; an unexpected error comes with its traceback."""
        foreseen = isinstance(error, MinerError | OSError)
        self.log.warning(event, error=str(error), exc_info=None if foreseen else error, **attrs)

    def tell(self) -> None:
        """Tell the supervisor the counts and problems that `status` shows."""
        error = self.homeless or self.error or self.queue_error or self.persisting.trouble
        paused = "this node's workspace is missing" if self.homeless else self.paused
        self.channel.send(Deliveries(self.pending, error, self.refused, paused))

    def count(self, name: CounterName, label: str = "", n: int = 1) -> None:
        """Add to a metric."""
        self.channel.send(Counted(name, label, n))

    def show(self, job_id: str, state: State, *, runner: str = "", outcome: Outcome | None = None) -> None:
        """Have `jobs` show the state of a job."""
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
        """Have `jobs` show a job of an earlier run of the node."""
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
