"""What the retry queue promises, held against both backends; then what sqlite promises by itself."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from msgspec.structs import replace

from aitbc_miner.queue.interface import Claim, QueueError, RetryQueue, Task
from aitbc_miner.queue.sqlite import SqliteQueue
from aitbc_miner.store.database import Database
from tests.support.queue_stores import (
    BACKENDS,
    DEAD_MAX,
    LEASE_S,
    REPORT,
    RUN,
    Store,
    claimed,
    first_due,
    open_store,
    report,
    run,
    together,
)
from tests.support.redis_server import RedisServer, redis_server


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with redis_server(tmp_path_factory.mktemp("redis")) as running:
        yield running


@pytest.fixture(params=BACKENDS)
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    server = request.getfixturevalue("server") if request.param == "redis" else None
    with open_store(request.param, tmp_path, server) as opened:
        yield opened


@pytest.fixture
def ours(store: Store) -> RetryQueue:
    return store.queue()


@pytest.fixture
def theirs(store: Store) -> RetryQueue:
    return store.queue()


# --- waiting --------------------------------------------------------------------------------------------


def test_a_task_is_due_after_its_delay(store: Store, ours: RetryQueue, theirs: RetryQueue) -> None:
    task = run()
    assert ours.put(task, 30)
    assert theirs.due("b", 10) == []
    assert theirs.claim(RUN, "j", "b", LEASE_S) is None
    assert first_due(theirs, "b") == pytest.approx(30, abs=1)
    store.advance(31)
    assert first_due(theirs, "b") == 0
    assert theirs.due("b", 10) == [task]


def test_a_task_comes_back_as_it_went(ours: RetryQueue, theirs: RetryQueue) -> None:
    task = Task(
        RUN, "j-ä", "n", attempts=3, max_attempts=7, reason="„nein“\n", payload=bytes(range(256)) * 500
    )
    assert ours.put(task, 0)
    assert theirs.due("b", 1) == [task]
    assert claimed(theirs, "j-ä").task == replace(task, attempts=4)


def test_a_later_put_takes_the_place_of_what_waits(store: Store, ours: RetryQueue) -> None:
    assert ours.put(run(), 0)
    assert ours.put(run(attempts=2), 30)
    assert ours.due("a", 10) == []
    store.advance(31)
    assert ours.due("a", 10) == [run(attempts=2)]


def test_a_run_and_a_report_of_one_job_are_two_tasks(ours: RetryQueue) -> None:
    assert ours.put(run(), 0)
    assert ours.put(report(), 0)
    assert set(ours.due("a", 10)) == {run(), report()}
    assert ours.remove(RUN, "j")
    assert ours.due("a", 10) == [report()]


def test_the_longest_due_come_first_and_no_more_than_asked_for(store: Store, ours: RetryQueue) -> None:
    for number, delay in enumerate((30, 10, 20)):
        assert ours.put((run if number else report)(f"j{number}"), delay)
    store.advance(31)
    assert [task.job_id for task in ours.due("a", 10)] == ["j1", "j2", "j0"]
    assert [task.job_id for task in ours.due("a", 2)] == ["j1", "j2"]
    assert ours.due("a", 0) == []


def test_a_report_is_due_for_its_own_node_alone(ours: RetryQueue, theirs: RetryQueue) -> None:
    assert ours.put(report(node="a"), 0)
    assert theirs.due("b", 10) == []
    assert first_due(theirs, "b") is None
    assert theirs.claim(REPORT, "j", "b", LEASE_S) is None
    assert first_due(ours, "a") == 0
    assert claimed(ours, node="a", kind=REPORT).task.attempts == 2


def test_a_report_may_come_from_another_node_than_before(ours: RetryQueue) -> None:
    assert ours.put(report(node="a"), 0)
    assert ours.put(report(node="b"), 0)
    assert ours.due("a", 10) == []
    assert ours.due("b", 10) == [report(node="b")]


def test_what_waits_is_listed_by_kind_and_node(store: Store, ours: RetryQueue, theirs: RetryQueue) -> None:
    for task, delay in ((run("late"), 40), (run("early"), 10), (run("foreign", node="b"), 0), (report(), 5)):
        assert ours.put(task, delay)
    assert ours.put(run("held"), 0)
    claimed(theirs, "held")
    store.advance(20)
    assert ours.waiting(RUN, "a") == [(run("early"), 0), (run("late"), pytest.approx(20, abs=1))]
    assert ours.waiting(REPORT, "a") == [(report(), 0)]
    assert theirs.waiting(REPORT, "b") == []
    store.advance(LEASE_S)
    assert [task.job_id for task, _ in ours.waiting(RUN, "a")] == ["early", "late"]


def test_an_empty_queue_says_so(ours: RetryQueue) -> None:
    assert ours.due("a", 10) == ours.dead() == []
    assert ours.waiting(RUN, "a") == []
    assert first_due(ours, "a") is None
    assert ours.claim(RUN, "j", "a", LEASE_S) is None
    assert ours.requeue(RUN, "j") is None
    assert not ours.renew(RUN, "j", "t", LEASE_S)
    assert not ours.put(run(), 0, "t")
    assert ours.remove(RUN, "j")
    assert ours.remove(RUN, "j", "t")


# --- held -----------------------------------------------------------------------------------------------


def test_what_is_held_is_nobody_elses(ours: RetryQueue, theirs: RetryQueue) -> None:
    assert ours.hold(run(), "mine", LEASE_S)
    assert theirs.due("b", 10) == []
    assert first_due(theirs, "b") == pytest.approx(LEASE_S, abs=1)
    assert theirs.claim(RUN, "j", "b", LEASE_S) is None
    assert not theirs.put(run(node="b"), 0)
    assert not theirs.remove(RUN, "j")
    assert not theirs.hold(run(node="b"), "other", LEASE_S)
    assert theirs.requeue(RUN, "j") is None
    assert ours.renew(RUN, "j", "mine", LEASE_S)


def test_to_hold_again_brings_up_to_date_and_renews(
    store: Store, ours: RetryQueue, theirs: RetryQueue
) -> None:
    assert ours.hold(run(), "mine", LEASE_S)
    store.advance(LEASE_S - 10)
    assert ours.hold(run(attempts=2), "mine", LEASE_S)
    store.advance(LEASE_S - 10)
    assert theirs.due("b", 10) == []
    store.advance(20)
    assert theirs.due("b", 10) == [run(attempts=2)]
    assert ours.hold(run(attempts=2), "mine", LEASE_S)
    assert theirs.due("b", 10) == []


@pytest.mark.parametrize("dead", [False, True])
def test_what_waits_or_is_dead_is_not_held_over(ours: RetryQueue, *, dead: bool) -> None:
    if dead:
        ours.bury(run())
    else:
        assert ours.put(run(), 0)
    assert not ours.hold(run(attempts=5), "mine", LEASE_S)
    assert (ours.dead() if dead else ours.due("a", 10)) == [run()]


def test_a_renewed_lease_does_not_run_out(store: Store, ours: RetryQueue, theirs: RetryQueue) -> None:
    assert ours.hold(run(), "mine", LEASE_S)
    for _ in range(5):
        store.advance(LEASE_S - 10)
        assert ours.renew(RUN, "j", "mine", LEASE_S)
        assert theirs.due("b", 10) == []
        assert theirs.claim(RUN, "j", "b", LEASE_S) is None


def test_a_lapsed_lease_can_be_renewed_until_another_has_it(
    store: Store, ours: RetryQueue, theirs: RetryQueue
) -> None:
    assert ours.hold(run(), "mine", LEASE_S)
    store.advance(LEASE_S + 10)
    assert theirs.due("b", 10) == [run()]
    assert ours.renew(RUN, "j", "mine", LEASE_S)
    assert theirs.claim(RUN, "j", "b", LEASE_S) is None
    store.advance(LEASE_S + 10)
    claim = claimed(theirs)
    assert claim.task == run(attempts=2)
    assert not ours.renew(RUN, "j", "mine", LEASE_S)
    assert theirs.renew(RUN, "j", claim.token, LEASE_S)


def test_who_comes_back_from_the_dead_can_do_nothing(
    store: Store, ours: RetryQueue, theirs: RetryQueue
) -> None:
    assert ours.hold(run(), "mine", LEASE_S)
    store.advance(LEASE_S + 10)
    claim = claimed(theirs)
    assert not ours.hold(run(attempts=9), "mine", LEASE_S)
    assert not ours.renew(RUN, "j", "mine", 10 * LEASE_S)
    assert not ours.put(run(attempts=9), 0, "mine")
    assert not ours.remove(RUN, "j", "mine")
    # Nothing of it has changed what the other one holds, nor for how long.
    assert first_due(theirs, "b") == pytest.approx(LEASE_S, abs=1)
    assert theirs.put(claim.task, 0, claim.token)
    assert theirs.due("b", 10) == [run(attempts=2)]


def test_each_holding_has_a_token_of_its_own(store: Store, ours: RetryQueue) -> None:
    assert ours.put(run(), 0)
    first = claimed(ours)
    store.advance(LEASE_S + 10)
    second = claimed(ours)
    assert first.token != second.token
    assert len(second.token) == 32
    assert not ours.remove(RUN, "j", first.token)
    assert ours.remove(RUN, "j", second.token)
    assert first_due(ours, "a") is None


def test_with_its_token_a_task_is_given_back_or_done(
    store: Store, ours: RetryQueue, theirs: RetryQueue
) -> None:
    assert ours.hold(run(), "mine", LEASE_S)
    assert ours.put(run(), 20, "mine")
    assert not ours.renew(RUN, "j", "mine", LEASE_S)
    assert not ours.put(run(), 0, "mine")
    store.advance(21)
    claim = claimed(theirs)
    assert theirs.remove(RUN, "j", claim.token)
    assert first_due(theirs, "b") is None


def test_a_lapsed_task_may_be_replaced_or_removed_without_a_token(store: Store, ours: RetryQueue) -> None:
    for job_id in ("replaced", "removed"):
        assert ours.hold(run(job_id), "mine", LEASE_S)
    store.advance(LEASE_S + 10)
    assert ours.put(run("replaced", attempts=3), 0)
    assert ours.remove(RUN, "removed")
    assert ours.due("a", 10) == [run("replaced", attempts=3)]
    assert not ours.renew(RUN, "replaced", "mine", LEASE_S)


def test_an_empty_token_is_nobodys(ours: RetryQueue) -> None:
    assert ours.put(run(), 100)
    assert not ours.renew(RUN, "j", "", LEASE_S)
    assert not ours.hold(run(), "", LEASE_S)


# --- dead -----------------------------------------------------------------------------------------------


def test_what_is_exhausted_is_dead(store: Store, ours: RetryQueue) -> None:
    assert ours.put(run(attempts=2, most=3), 0)
    claim = claimed(ours)
    assert claim.task.exhausted
    assert ours.dead() == []
    assert ours.put(claim.task, 30, claim.token)
    assert ours.dead() == [claim.task]
    store.advance(31)
    assert ours.due("a", 10) == []
    assert ours.waiting(RUN, "a") == []
    assert first_due(ours, "a") is None
    assert ours.claim(RUN, "j", "a", LEASE_S) is None


def test_whose_last_attempt_is_not_renewed_is_dead(
    store: Store, ours: RetryQueue, theirs: RetryQueue
) -> None:
    assert ours.hold(run(attempts=3, most=3), "mine", LEASE_S)
    assert first_due(ours, "a") is None
    store.advance(LEASE_S + 10)
    assert theirs.dead() == [run(attempts=3, most=3)]
    assert theirs.due("b", 10) == []
    assert theirs.claim(RUN, "j", "b", LEASE_S) is None
    assert ours.renew(RUN, "j", "mine", LEASE_S)
    assert theirs.dead() == []
    store.advance(LEASE_S + 10)
    assert ours.remove(RUN, "j", "mine")
    assert theirs.dead() == []


def test_buried_is_dead_whoever_held_it(ours: RetryQueue, theirs: RetryQueue) -> None:
    assert ours.hold(run(), "mine", LEASE_S)
    theirs.bury(run(attempts=2))
    assert ours.dead() == [run(attempts=2)]
    assert not ours.renew(RUN, "j", "mine", LEASE_S)
    assert ours.put(run(), 0)
    assert ours.dead() == []
    assert ours.due("a", 10) == [run()]


def test_the_dead_are_the_oldest_first_and_not_without_end(store: Store, ours: RetryQueue) -> None:
    # It dies between the others, when its lease runs out.
    assert ours.hold(run("lapsed", most=1), "mine", 4.5)
    for number in range(DEAD_MAX + 5):
        store.advance(1)
        ours.bury(run(f"j{number}"))
    expected = [f"j{number}" for number in range(5, DEAD_MAX + 5)]
    assert [task.job_id for task in ours.dead()] == expected
    assert not ours.renew(RUN, "lapsed", "mine", LEASE_S)


def test_a_last_attempt_is_not_dropped_with_the_dead(store: Store, ours: RetryQueue) -> None:
    assert ours.hold(run("last", most=1), "mine", 1000)
    for number in range(DEAD_MAX + 5):
        ours.bury(run(f"j{number}"))
    assert ours.renew(RUN, "last", "mine", 5)
    assert len(ours.dead()) == DEAD_MAX


@pytest.mark.parametrize("kill", ["bury", "exhaust", "lapse", "wait"])
def test_requeued_is_due_now_with_all_its_attempts(store: Store, ours: RetryQueue, kill: str) -> None:
    task = run(attempts=2, most=2)
    if kill == "bury":
        ours.bury(task)
    elif kill == "exhaust":
        assert ours.put(task, 0)
    elif kill == "lapse":
        assert ours.hold(task, "mine", 1)
    else:
        task = run(attempts=1, most=2)
        assert ours.put(task, 1000)
    store.advance(2)
    assert ours.requeue(RUN, "j") == replace(task, attempts=0)
    assert ours.dead() == []
    assert ours.due("b", 10) == [replace(task, attempts=0)]
    assert not ours.renew(RUN, "j", "mine", LEASE_S)
    assert claimed(ours).task == replace(task, attempts=1)
    assert ours.requeue(RUN, "j") is None


# --- many at once, and for long -------------------------------------------------------------------------


def test_of_many_who_claim_one_gets_it(store: Store) -> None:
    queues = [store.queue() for _ in range(4)]
    for number in range(40):
        assert queues[0].put(run(f"j{number}"), 0)
        claims = together([partial(queue.claim, RUN, f"j{number}", "b", LEASE_S) for queue in queues])
        (claim,) = [claim for claim in claims if isinstance(claim, Claim)]
        assert claim.task.attempts == 2
        assert queues[0].remove(RUN, f"j{number}", claim.token)


def test_threads_may_share_a_queue(ours: RetryQueue) -> None:
    def work(index: int) -> bool:
        for number in range(10):
            job_id = f"j{index}-{number}"
            assert ours.put(run(job_id), 0)
            assert ours.remove(RUN, job_id, claimed(ours, job_id).token)
        return True

    assert together([partial(work, index) for index in range(8)]) == [True] * 8
    assert first_due(ours, "a") is None


def test_renew_and_claim_at_the_end_of_a_lease_never_both_succeed(store: Store) -> None:
    mine, others = store.queue(), store.queue()
    for number in range(40):
        job_id = f"j{number}"
        assert mine.hold(run(job_id), "mine", 10)
        store.advance(11)
        keep = partial(mine.renew, RUN, job_id, "mine", LEASE_S)
        renewed, claim = together([keep, partial(others.claim, RUN, job_id, "b", LEASE_S)])
        # The claim may come after the renewal, then it gets nothing; never the other way round.
        assert renewed is (claim is None)


# --- sqlite ---------------------------------------------------------------------------------------------


def test_sqlite_keeps_tasks_and_tokens_over_a_restart(tmp_path: Path) -> None:
    database = Database(tmp_path / "q.db")
    queue = SqliteQueue(database)
    assert queue.put(run("waits"), 0)
    assert queue.hold(run("held"), "mine", LEASE_S)
    queue.bury(run("dead"))
    database.close()
    queue = SqliteQueue(again := Database(tmp_path / "q.db"))
    assert not queue.shared
    assert queue.due("a", 10) == [run("waits")]
    assert queue.dead() == [run("dead")]
    assert queue.renew(RUN, "held", "mine", LEASE_S)
    queue.close()
    again.close()


def test_sqlite_says_what_is_wrong_as_a_queue_error(tmp_path: Path) -> None:
    database = Database(tmp_path / "q.db")
    queue = SqliteQueue(database)
    with database.writing() as connection:
        connection.execute("DROP TABLE queue")
    with pytest.raises(QueueError, match=r"cannot read .*q\.db: no such table"):
        queue.due("a", 1)
    with pytest.raises(QueueError, match=r"cannot write .*q\.db: no such table"):
        queue.put(run(), 0)
    database.close()
