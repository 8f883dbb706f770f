"""The reports that the coordinator has not accepted yet: decides when to send each, and settles them."""

from collections.abc import Callable
from concurrent.futures import Future
from functools import partial

from aitbc_miner.agent.context import POOLS, AgentContext, Pool
from aitbc_miner.agent.delivery import Delivered, deliver
from aitbc_miner.agent.fleet import Fleet
from aitbc_miner.agent.job_table import Stage
from aitbc_miner.agent.outcomes import take_back_refused, was_refused
from aitbc_miner.agent.recovery import read_outcome
from aitbc_miner.coordinator.interface import Paced, Refused
from aitbc_miner.errors import ErrorCode, MinerError
from aitbc_miner.ipc.messages import CounterName
from aitbc_miner.jobs import Outcome, State, StateRecord
from aitbc_miner.queue.interface import Kind, QueueError, Task
from aitbc_miner.store.ledger import account_of
from aitbc_miner.util import clock
from aitbc_miner.util.backoff import Backoff
from aitbc_miner.util.system import boot_id

# Larger reports have their own pool, so that no small report waits minutes for a large report. Reports of
# failures have their own pool, too: a coordinator's rate limit for results does not apply to failures.
LARGE_BYTES = 8_000_000
RETRY_MIN_S = 0.5
NOT_NOTED = "report time not noted"
MOST_AT_ONCE = 2**53
"""The largest amount, in millionths, to add to a metric at once."""


class Lane:
    """The reports of one pool: waiting until a time, or being sent. Pure: the caller gives the times."""

    def __init__(self, min_s: float, max_s: float) -> None:
        self._bounds = (min_s, max_s)
        self._due: dict[str, float] = {}
        self._backoffs: dict[str, Backoff] = {}
        self._asked: dict[str, float] = {}
        self._running: set[str] = set()
        self._open_at = 0.0

    def __len__(self) -> int:
        return len(self._backoffs)

    def __contains__(self, job_id: str) -> bool:
        return job_id in self._backoffs

    def add(self, job_id: str, due: float, failures: int = 0) -> None:
        """Have a job's report sent at `due`; a second call for the same job changes nothing.

        `failures` counts the failed attempts of an earlier run of the node.
        """
        if job_id not in self._backoffs:
            self._backoffs[job_id] = Backoff(*self._bounds, failures=failures)
            self._due[job_id] = due

    def failures(self, job_id: str) -> int:
        """Count the failed attempts to send a job's report."""
        return self._backoffs[job_id].failures if job_id in self._backoffs else 0

    def start_due(self, now: float, room: int) -> list[str]:
        """Start and name the reports that are due, at most `room`."""
        if now < self._open_at:
            return []
        due = sorted((at, job_id) for job_id, at in self._due.items() if at <= now)[: max(0, room)]
        for _, job_id in due:
            del self._due[job_id]
            self._running.add(job_id)
        return [job_id for _, job_id in due]

    def succeeded(self, job_id: str, now: float) -> None:
        """Forget a report, and make the others due now, since the coordinator answers."""
        self._running.discard(job_id)
        self._backoffs.pop(job_id, None)
        self._asked.pop(job_id, None)
        self.hurry(now)

    def failed(
        self, job_id: str, now: float, retry_after: float | None = None, *, alone: bool = False
    ) -> float:
        """Have a report sent again later; gives the pause in seconds.

        `alone`: the coordinator refuses this report only, so the success of other reports does not hurry it.
        """
        self._running.discard(job_id)
        pause = max(self._backoffs[job_id].next(), retry_after or 0.0)
        self._due[job_id] = now + pause
        self._asked[job_id] = now + (pause if alone else retry_after or 0.0)
        return pause

    def paced(self, job_id: str, until: float) -> None:
        """Send no report before `until`. The report of `job_id` was not sent, so it has not failed."""
        self._running.discard(job_id)
        self._due[job_id] = until
        self._open_at = until

    def hurry(self, now: float) -> None:
        """Make all waiting reports due now, or at the time that the coordinator asked for."""
        self._due = {
            job_id: min(at, max(now, self._asked.get(job_id, now))) for job_id, at in self._due.items()
        }

    @property
    def running(self) -> int:
        """The number of reports that are being sent."""
        return len(self._running)

    def next_due(self) -> float | None:
        """When the next report is due."""
        return max(self._open_at, min(self._due.values())) if self._due else None


class DeliveryQueue:
    """Sends the reports of the jobs given to `add` until the coordinator accepts or refuses them.

    The time of each next attempt is in memory. The retry queue keeps failed attempts for the next start.
    A report that was refused for good is sent again after `again_s`, and after a reboot.
    """

    def __init__(self, context: AgentContext, fleet: Fleet | None) -> None:
        self._context = context
        self._jobs = context.jobs
        self._fleet = fleet
        bounds = (RETRY_MIN_S, context.config.heartbeat.backoff.max_s)
        pools: tuple[Pool, ...] = ("report", "upload", "fail")
        self._lanes: dict[Pool, Lane] = {pool: Lane(*bounds) for pool in pools}
        self._before: dict[str, tuple[Task, float]] = {}
        self._give_up = context.config.coordinator.give_up
        self._anew: dict[str, float] = {}

    def recovered(self) -> None:
        """Read from the retry queue when the reports of an earlier run of the node are due."""
        try:
            waiting = self._context.queue.waiting(Kind.REPORT, self._context.config.node_id)
            dead = self._context.queue.dead()
        except QueueError as error:
            self._context.warn("report times not read", error)
            return
        self._context.refused = len(dead)
        self._anew = {task.job_id: self._due_anew(task.job_id) for task in dead if task.kind is Kind.REPORT}
        self._before = {task.job_id: (task, max(0.0, due_s)) for task, due_s in waiting}

    def _due_anew(self, job_id: str) -> float:
        """Say when to send a refused report again: now, if the machine has rebooted since the refusal."""
        state = self._context.records.state_of(job_id)
        if isinstance(state, StateRecord) and state.boot_id == boot_id():
            return state.since + self._give_up.again_s
        return clock.now()

    def take_back(self, job_id: str) -> bool:
        """Have a refused report sent again; False if it was not refused, or is already on its way again.

        Raises:
            MinerError, OSError: a temporary fault, or the job's record is gone.
        """
        context = self._context
        with context.records.open(job_id) as job:
            if job_id in self._jobs or not was_refused(job):
                return False
            # The ledger first: the next start does not read the records of settled jobs.
            context.book_rest()
            context.ledger.reopen(job_id)
            take_back_refused(job)
        self._anew.pop(job_id, None)
        context.note(partial(context.queue.remove, Kind.REPORT, job_id), NOT_NOTED)
        context.refused = max(0, context.refused - 1)
        self.add(job_id)
        return True

    def add(self, job_id: str, outcome: Outcome | None = None) -> None:
        """Have the report of a job sent; its outcome is on disk. A second call changes nothing.

        `outcome` is the job's outcome if the caller has just read it.
        """
        if self._jobs.stage(job_id) is Stage.REPORTING:
            return
        entry = self._jobs.move(job_id, Stage.REPORTING)
        # An outcome that was read before may be the report of a refusal that was taken back since.
        entry.outcome = outcome
        outcome = outcome or read_outcome(self._context.records, job_id)
        size = sum(artifact.bytes for artifact in outcome.artifacts) if outcome else 0
        task, due_s = self._before.pop(job_id, (None, 0.0))
        failed = outcome is not None and not outcome.ok
        lane = self._lanes["fail" if failed else "upload" if size > LARGE_BYTES else "report"]
        lane.add(job_id, clock.now() + due_s, task.attempts if task else 0)
        self._context.show(job_id, State.UPLOADING, outcome=outcome)
        self._tell()

    def repeat(self, job_id: str) -> None:
        """Send the report of a settled job again, because the coordinator does not have it."""
        if job_id not in self._jobs and (outcome := read_outcome(self._context.records, job_id)):
            self.add(job_id, outcome)

    def hurry(self) -> None:
        """Make all waiting reports due now, or at the time that the coordinator asked for."""
        for lane in self._lanes.values():
            lane.hurry(clock.now())

    def next_due(self) -> float | None:
        """When a report is due and its pool has a free thread."""
        if not self._context.token:
            return None
        waiting = [lane for pool, lane in self._lanes.items() if lane.running < POOLS[pool]]
        dues = [due for lane in waiting if (due := lane.next_due()) is not None]
        return min([*dues, *self._anew.values()], default=None)

    def start_due(self) -> None:
        """Send the reports that are due."""
        if not self._context.token:
            return
        for job_id in [job_id for job_id, at in self._anew.items() if at <= clock.now()]:
            # After an error here, the directory is gone, or the next start sends the report.
            del self._anew[job_id]
            try:
                self.take_back(job_id)
            except (MinerError, OSError) as error:
                self._context.warn("refused report not sent again", error, job_id=job_id)
        for pool, lane in self._lanes.items():
            for job_id in lane.start_due(clock.now(), POOLS[pool] - lane.running):
                self._context.start(pool, self._call(job_id), partial(self._ended, lane, job_id))

    def _call(self, job_id: str) -> Callable[[], Delivered]:
        """Give the call that delivers a job; a second attempt reads the outcome anew."""
        entry = self._jobs.get(job_id)
        outcome = entry.outcome if entry else None
        if entry:
            entry.outcome = None
        return partial(self._deliver, job_id, outcome)

    def _deliver(self, job_id: str, outcome: Outcome | None) -> Delivered:
        """Send the report of a job, and enter the job in the ledger; runs in a thread."""
        context = self._context
        is_ours: Callable[[StateRecord], bool] = self._fleet.is_ours if self._fleet else lambda _: True
        node_id = context.config.node_id
        delivered = deliver(
            context.records, context.coordinator, node_id, job_id, is_ours, self._give_up, outcome
        )
        state, how, receipt = delivered.state, delivered.how, delivered.receipt
        context.book(
            account_of(delivered.outcome, state, state.runner, how, receipt, log_too=context.log_too)
        )
        if self._fleet:
            self._fleet.done(state)
        return delivered

    def _ended(self, lane: Lane, job_id: str, future: Future[Delivered]) -> None:
        context = self._context
        try:
            delivered = future.result()
        except Paced as error:
            lane.paced(job_id, clock.now() + error.wait_s)
            return
        except Exception as error:  # noqa: BLE001  # one odd job must not end the agent, again and again
            alone = isinstance(error, Refused)
            pause = lane.failed(job_id, clock.now(), context.failed(error), alone=alone)
            task = Task(Kind.REPORT, job_id, context.config.node_id, lane.failures(job_id), 0, str(error))
            context.note(partial(context.queue.put, task, pause), NOT_NOTED)
            again_s = round(pause, 1)
            context.call_failed("report", "report not accepted", error, job_id=job_id, again_in_s=again_s)
            return
        failures = lane.failures(job_id)
        lane.succeeded(job_id, clock.now())
        self.hurry()
        context.error = None
        context.answered("report")
        if (receipt := delivered.receipt) is not None:
            check = "verified" if receipt.verified else "unverified"
            context.count("receipts", check)
            amounts: dict[CounterName, float | None] = {"units": receipt.units, "price": receipt.price}
            for name, amount in amounts.items():
                if millionths := min(round((amount or 0.0) * 1e6), MOST_AT_ONCE):
                    context.count(name, check, millionths)
        if delivered.beat:
            context.token.want_beat()
        if self._jobs.move(job_id, Stage.GONE).ended_here:
            # With this report the coordinator may have room for a further job of this node, too.
            self._jobs.ends += 1
        self._settled(delivered.outcome, delivered.how, had_failed=failures > 0)

    def _settled(self, outcome: Outcome, how: str, *, had_failed: bool) -> None:
        context, job_id = self._context, outcome.job_id
        event = "report refused" if how == "refused" else "report accepted"
        context.log.info(event, job_id=job_id, code=outcome.code or "OK", how=how)
        context.count("deliveries", how)
        if how == "refused" or (outcome.code is ErrorCode.E_UPLOAD and how != "superseded"):
            self._anew[job_id] = clock.now() + self._give_up.again_s
            reason = f"the coordinator refuses the report: {outcome.message}"
            task = Task(Kind.REPORT, job_id, context.config.node_id, 1, 0, reason)
            context.note(partial(context.queue.bury, task), NOT_NOTED)
            context.refused += 1
        elif had_failed:
            context.note(partial(context.queue.remove, Kind.REPORT, job_id), NOT_NOTED)
        context.show(job_id, State.DONE if outcome.ok else State.FAILED, outcome=outcome)
        self._tell()

    def _tell(self) -> None:
        self._context.pending = len(self._jobs.among(Stage.REPORTING))
        self._context.tell()
