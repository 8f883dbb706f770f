"""Random histories of the retry queue: two nodes on one store, held against a model of lists and dates."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test
from msgspec import Struct
from msgspec.structs import replace

from aitbc_miner.queue.interface import Kind, RetryQueue, Task
from tests.support.queue_stores import BACKENDS, first_due, open_store
from tests.support.redis_server import RedisServer, redis_server

# No sum of steps is near one of the times: how long it takes to run makes no difference.
TIMES = st.sampled_from([0.0, 10_000.0, 30_000.0])
STEPS = st.sampled_from([7_000.0, 19_000.0])
KINDS = st.sampled_from(list(Kind))
JOBS = st.sampled_from(["j1", "j2"])
NODES = st.sampled_from(["a", "b"])
# Few enough that old tokens of one job are tried on another, and of one node by another.
TOKENS = st.integers(0, 5)
TASKS = st.builds(
    Task,
    kind=KINDS,
    job_id=JOBS,
    node=NODES,
    attempts=st.integers(0, 3),
    max_attempts=st.integers(0, 3),
    reason=st.text("ä\n\0x", max_size=2),
    payload=st.binary(max_size=3),
)


class Waiting(Struct):
    task: Task
    at: float


class Held(Struct):
    task: Task
    token: str
    until: float


class Dead(Struct):
    """`token` is that of the last holder, if his lease has run out."""

    task: Task
    since: float
    token: str | None = None


class Model:
    """What the queue should hold; `now` is brought forward by hand."""

    def __init__(self) -> None:
        self.now = 0.0
        self.entries: dict[tuple[Kind, str], Waiting | Held | Dead] = {}

    def settle(self) -> None:
        """Have those die whose last lease has run out."""
        for key, entry in self.entries.items():
            if isinstance(entry, Held) and entry.until <= self.now and entry.task.exhausted:
                self.entries[key] = Dead(entry.task, entry.until, entry.token)

    def held(self, kind: Kind, job_id: str) -> bool:
        entry = self.entries.get((kind, job_id))
        return isinstance(entry, Held) and entry.until > self.now

    def has_token(self, kind: Kind, job_id: str, token: str) -> bool:
        entry = self.entries.get((kind, job_id))
        return isinstance(entry, Held | Dead) and entry.token == token

    def may_change(self, kind: Kind, job_id: str, token: str | None) -> bool:
        return not self.held(kind, job_id) if token is None else self.has_token(kind, job_id, token)

    def put(self, task: Task, delay_s: float) -> None:
        dead = Dead(task, self.now)
        self.entries[task.kind, task.job_id] = dead if task.exhausted else Waiting(task, self.now + delay_s)

    def due_times(self, node: str) -> dict[tuple[Kind, str], float]:
        """Tell when which task is or becomes due for a node."""
        times = {}
        for key, entry in self.entries.items():
            if key[0] is Kind.REPORT and entry.task.node != node:
                continue
            if isinstance(entry, Waiting):
                times[key] = entry.at
            elif isinstance(entry, Held) and not entry.task.exhausted:
                times[key] = entry.until
        return times


class Histories(RuleBasedStateMachine):
    """One history; `open_queues` gives two queues on an empty store, and what makes its time pass."""

    def __init__(
        self, open_queues: Callable[[ExitStack], tuple[list[RetryQueue], Callable[[float], None]]]
    ) -> None:
        super().__init__()
        self.stack = ExitStack()
        self.queues, self.advance = open_queues(self.stack)
        self.model = Model()
        self.tokens = [f"t{number}" for number in range(6)]

    def teardown(self) -> None:
        self.stack.close()

    @rule(queue=st.integers(0, 1), task=TASKS, number=TOKENS, lease_s=TIMES)
    def hold(self, queue: int, task: Task, number: int, lease_s: float) -> None:
        key, token = (task.kind, task.job_id), self.tokens[number]
        allowed = key not in self.model.entries or self.model.has_token(*key, token)
        assert self.queues[queue].hold(task, token, lease_s) is allowed
        if allowed:
            self.model.entries[key] = Held(task, token, self.model.now + lease_s)

    @rule(queue=st.integers(0, 1), task=TASKS, number=TOKENS | st.none(), delay_s=TIMES)
    def put(self, queue: int, task: Task, number: int | None, delay_s: float) -> None:
        token = None if number is None else self.tokens[number]
        allowed = self.model.may_change(task.kind, task.job_id, token)
        assert self.queues[queue].put(task, delay_s, token) is allowed
        if allowed:
            self.model.put(task, delay_s)

    @rule(queue=st.integers(0, 1), task=TASKS)
    def bury(self, queue: int, task: Task) -> None:
        self.queues[queue].bury(task)
        self.model.entries[task.kind, task.job_id] = Dead(task, self.model.now)

    @rule(queue=st.integers(0, 1), kind=KINDS, job_id=JOBS, node=NODES, lease_s=TIMES, number=TOKENS)
    def claim(self, queue: int, kind: Kind, job_id: str, node: str, lease_s: float, number: int) -> None:
        at = self.model.due_times(node).get((kind, job_id))
        claim = self.queues[queue].claim(kind, job_id, node, lease_s)
        assert (claim is not None) is (at is not None and at <= self.model.now)
        if claim is not None:
            task = self.model.entries[kind, job_id].task
            assert claim.task == replace(task, attempts=task.attempts + 1)
            assert claim.token not in self.tokens
            self.tokens[number] = claim.token
            self.model.entries[kind, job_id] = Held(claim.task, claim.token, self.model.now + lease_s)

    @rule(queue=st.integers(0, 1), kind=KINDS, job_id=JOBS, number=TOKENS, lease_s=TIMES)
    def renew(self, queue: int, kind: Kind, job_id: str, number: int, lease_s: float) -> None:
        token = self.tokens[number]
        allowed = self.model.has_token(kind, job_id, token)
        assert self.queues[queue].renew(kind, job_id, token, lease_s) is allowed
        if allowed:
            task = self.model.entries[kind, job_id].task
            self.model.entries[kind, job_id] = Held(task, token, self.model.now + lease_s)

    @rule(queue=st.integers(0, 1), kind=KINDS, job_id=JOBS, number=TOKENS | st.none())
    def remove(self, queue: int, kind: Kind, job_id: str, number: int | None) -> None:
        token = None if number is None else self.tokens[number]
        absent = (kind, job_id) not in self.model.entries
        allowed = absent or self.model.may_change(kind, job_id, token)
        assert self.queues[queue].remove(kind, job_id, token) is allowed
        if allowed:
            self.model.entries.pop((kind, job_id), None)

    @rule(queue=st.integers(0, 1), kind=KINDS, job_id=JOBS)
    def requeue(self, queue: int, kind: Kind, job_id: str) -> None:
        entry = self.model.entries.get((kind, job_id))
        expected = replace(entry.task, attempts=0) if isinstance(entry, Waiting | Dead) else None
        assert self.queues[queue].requeue(kind, job_id) == expected
        if expected is not None:
            self.model.entries[kind, job_id] = Waiting(expected, self.model.now)

    @rule(seconds=STEPS)
    def pass_time(self, seconds: float) -> None:
        self.advance(seconds)
        self.model.now += seconds
        self.model.settle()

    @invariant()
    def both_nodes_see_what_is_due(self) -> None:
        self.model.settle()
        for queue, node in zip(self.queues, "ab", strict=True):
            times = self.model.due_times(node)
            due = queue.due(node, 100)
            ready = {key for key, at in times.items() if at <= self.model.now}
            assert len(due) == len(ready)
            assert {(task.kind, task.job_id): task for task in due} == {
                key: self.model.entries[key].task for key in ready
            }
            order = [times[task.kind, task.job_id] for task in due]
            assert order == sorted(order)
            first = min(times.values(), default=None)
            left = None if first is None else close(max(0.0, first - self.model.now))
            assert first_due(queue, node) == left

    @invariant()
    def it_lists_what_waits_and_what_is_dead(self) -> None:
        self.model.settle()
        waits = [entry for entry in self.model.entries.values() if isinstance(entry, Waiting)]
        for kind in Kind:
            expected = {
                entry.task.job_id: (entry.task, close(max(0.0, entry.at - self.model.now)))
                for entry in waits
                if entry.task.kind is kind and entry.task.node == "a"
            }
            assert {found[0].job_id: found for found in self.queues[0].waiting(kind, "a")} == expected
        since = {
            (entry.task.kind, entry.task.job_id): entry.since
            for entry in self.model.entries.values()
            if isinstance(entry, Dead)
        }
        dead = self.queues[1].dead()
        assert dead == [self.model.entries[task.kind, task.job_id].task for task in dead]
        assert sorted((task.kind, task.job_id) for task in dead) == sorted(since)
        order = [since[task.kind, task.job_id] for task in dead]
        assert order == sorted(order)


def close(seconds: float) -> float:
    return pytest.approx(seconds, abs=1000)  # type: ignore[return-value]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with redis_server(tmp_path_factory.mktemp("redis")) as running:
        yield running


@pytest.mark.parametrize("kind", BACKENDS)
def test_any_history(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    server = request.getfixturevalue("server") if kind == "redis" else None

    def open_queues(stack: ExitStack) -> tuple[list[RetryQueue], Callable[[float], None]]:
        store = stack.enter_context(open_store(kind, tmp_path, server))
        return [store.queue(), store.queue()], store.advance

    class Ours(Histories):
        def __init__(self) -> None:
            super().__init__(open_queues)

    run_state_machine_as_test(
        Ours, settings=settings(max_examples=150, stateful_step_count=30, deadline=None, database=None)
    )
