"""The reports that the coordinator has not accepted yet: which are sent when, and what becomes of them."""

from collections.abc import Callable
from concurrent.futures import Future
from functools import partial

from aitbc_miner.accounts import account_of
from aitbc_miner.coordinator import Paced
from aitbc_miner.delivery import Delivered, Schedule, deliver
from aitbc_miner.fleet import Fleet
from aitbc_miner.jobs import Outcome, State, StateRecord
from aitbc_miner.queue import Kind, QueueError, Task
from aitbc_miner.recovery import read_outcome
from aitbc_miner.util import clock
from aitbc_miner.workbench import POOLS, Pool, Workbench

# Reports larger than this have a pool of their own: none that is small waits for one that takes minutes. So
# have those of failures: where the coordinator takes only so many results a minute, they are no results.
LARGE_BYTES = 8_000_000
RETRY_MIN_S = 0.5


class Reporter:
    """Sends what `add` names until it is settled, and says so to `settled`.

    When to try next is kept in memory; what has failed is also noted in the queue, for after a restart.
    """

    def __init__(self, bench: Workbench, fleet: Fleet | None, settled: Callable[[str], None]) -> None:
        self._bench = bench
        self._fleet = fleet
        self._tell_settled = settled
        bounds = (RETRY_MIN_S, bench.config.heartbeat.backoff.max_s)
        pools: tuple[Pool, ...] = ("report", "upload", "fail")
        self._lanes: dict[Pool, Schedule] = {pool: Schedule(*bounds) for pool in pools}
        self._before: dict[str, tuple[Task, float]] = {}

    def __len__(self) -> int:
        return sum(map(len, self._lanes.values()))

    def __contains__(self, job_id: str) -> bool:
        return any(job_id in lane for lane in self._lanes.values())

    def newest(self) -> list[str]:
        """Name all jobs with a report to send, the latest first."""
        return [job_id for lane in self._lanes.values() for job_id in lane.newest()]

    def recovered(self) -> None:
        """Read when reports that an earlier run of the node could not deliver are due."""
        try:
            waiting = self._bench.queue.waiting(Kind.REPORT, self._bench.config.node_id)
        except QueueError as error:
            self._bench.warn("times of reports not read", error)
            return
        self._bench.refused = self._count_dead()
        self._before = {task.job_id: (task, max(0.0, due_s)) for task, due_s in waiting}

    def _count_dead(self) -> int:
        try:
            return len(self._bench.queue.dead())
        except QueueError as error:
            self._bench.warn("refused reports not counted", error)
            return 0

    def add(self, job_id: str) -> None:
        """Have the job's outcome, which is on disk, delivered."""
        outcome = read_outcome(self._bench.records, job_id)
        size = sum(artifact.bytes for artifact in outcome.artifacts) if outcome else 0
        task, due_s = self._before.pop(job_id, (None, 0.0))
        failed = outcome is not None and not outcome.ok
        lane = self._lanes["fail" if failed else "upload" if size > LARGE_BYTES else "report"]
        lane.add(job_id, clock.now() + due_s, task.attempts if task else 0)
        self._bench.show(job_id, State.UPLOADING, outcome=outcome)
        self._tell()

    def hurry(self) -> None:
        """Let no report wait any longer than the coordinator asked for."""
        for lane in self._lanes.values():
            lane.hurry(clock.now())

    def next_due(self) -> float | None:
        """When there is something to send, and room to send it."""
        if not self._bench.token:
            return None
        waiting = [lane for pool, lane in self._lanes.items() if lane.running < POOLS[pool]]
        return min((due for lane in waiting if (due := lane.next_due()) is not None), default=None)

    def start_due(self) -> None:
        """Send what is due."""
        if not self._bench.token:
            return
        for pool, lane in self._lanes.items():
            for job_id in lane.start_due(clock.now(), POOLS[pool] - lane.running):
                self._bench.start(pool, partial(self._deliver, job_id), partial(self._ended, lane, job_id))

    def _deliver(self, job_id: str) -> Delivered:
        """Deliver and enter it in the books; runs in a thread."""
        bench = self._bench
        is_ours: Callable[[StateRecord], bool] = self._fleet.is_ours if self._fleet else lambda _: True
        delivered = deliver(bench.records, bench.coordinator, bench.config.node_id, job_id, is_ours)
        state = delivered.state
        bench.book(account_of(delivered.outcome, state, state.runner, delivered.how, delivered.receipt))
        if self._fleet:
            self._fleet.done(state)
        return delivered

    def _ended(self, lane: Schedule, job_id: str, future: Future[Delivered]) -> None:
        bench = self._bench
        try:
            delivered = future.result()
        except Paced as error:
            lane.paced(job_id, clock.now() + error.wait_s)
            return
        except Exception as error:  # noqa: BLE001  # one odd job must not end the agent, again and again
            pause = lane.failed(job_id, clock.now(), bench.failed(error))
            task = Task(Kind.REPORT, job_id, bench.config.node_id, lane.failures(job_id), 0, str(error))
            self._note(partial(bench.queue.put, task, pause))
            bench.warn("report not accepted", error, job_id=job_id, again_in_s=round(pause, 1))
            return
        failures = lane.failures(job_id)
        lane.succeeded(job_id, clock.now())
        self.hurry()
        bench.error = None
        if delivered.beat:
            bench.token.want_beat()
        self._settled(delivered.outcome, delivered.how, had_failed=failures > 0)
        self._tell_settled(job_id)

    def _settled(self, outcome: Outcome, how: str, *, had_failed: bool) -> None:
        bench, job_id = self._bench, outcome.job_id
        bench.log.info("report accepted", job_id=job_id, code=outcome.code or "OK", how=how)
        bench.count("deliveries", how)
        if how == "refused":
            reason = f"the coordinator refuses it: {outcome.message}"
            task = Task(Kind.REPORT, job_id, bench.config.node_id, 1, 0, reason)
            self._note(partial(bench.queue.bury, task))
            bench.refused += 1
        elif had_failed:
            self._note(partial(bench.queue.remove, Kind.REPORT, job_id))
        bench.show(job_id, State.DONE if outcome.ok else State.FAILED, outcome=outcome)
        self._tell()

    def _note(self, call: Callable[[], object]) -> None:
        self._bench.start("queue", call, self._noted)

    def _noted(self, future: Future[object]) -> None:
        if isinstance(error := future.exception(), Exception):
            # After a restart the report is sent at once then, which loses nothing.
            self._bench.warn("time of a report not noted", error)

    def _tell(self) -> None:
        self._bench.pending = len(self)
        self._bench.tell()
