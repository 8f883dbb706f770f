import random

from hypothesis import given
from hypothesis import strategies as st

from aitbc_miner.util.backoff import Backoff, BeatSchedule, jittered

SEEDS = st.integers(0, 2**32)


def schedule(seed: int, interval_s: float = 15, jitter_pct: float = 10, now: float = 0.0) -> BeatSchedule:
    rng = random.Random(seed)
    return BeatSchedule(interval_s, jitter_pct, Backoff(5, 120, rng), rng, now)


@given(SEEDS, st.floats(0.01, 10), st.floats(1, 100))
def test_delays_stay_within_their_bounds_and_the_ceiling_doubles(
    seed: int, min_s: float, factor: float
) -> None:
    backoff = Backoff(min_s, min_s * factor, random.Random(seed))
    for attempt in range(1, 2000):
        ceiling = min_s * min(factor, 2.0 ** min(attempt, 60))
        assert min_s <= backoff.next() <= ceiling * (1 + 1e-9)


def test_the_jitter_is_full() -> None:
    backoff = Backoff(5, 120, random.Random(1))
    delays = [backoff.next() for _ in range(1000)]
    assert min(delays) < 10
    assert max(delays) > 115


def test_a_reset_begins_again_with_short_delays() -> None:
    backoff = Backoff(1, 1000, random.Random(1))
    for _ in range(20):
        backoff.next()
    backoff.reset()
    assert backoff.next() <= 2


@given(SEEDS, st.integers(0, 200))
def test_failures_of_an_earlier_run_count(seed: int, failures: int) -> None:
    earlier = Backoff(1, 1000, random.Random(0))
    for _ in range(failures):
        earlier.next()
    backoff = Backoff(1, 1000, random.Random(seed), failures=earlier.failures)
    assert backoff.failures == failures
    assert backoff.next() == random.Random(seed).uniform(1, min(1000, 2.0 ** (failures + 1)))
    assert backoff.failures == failures + 1
    backoff.reset()
    assert backoff.next() <= 2


@given(SEEDS, st.floats(0.1, 1000), st.floats(0, 50))
def test_jitter_keeps_within_its_percentage(seed: int, interval: float, pct: float) -> None:
    value = jittered(interval, pct, random.Random(seed))
    assert interval * (1 - pct / 100) - 1e-9 <= value <= interval * (1 + pct / 100) + 1e-9


def test_the_first_heartbeat_is_due_at_once() -> None:
    assert schedule(1, now=7.0).due == 7.0


@given(SEEDS, st.floats(0, 50), st.lists(st.floats(0, 7.4), max_size=50))
def test_lateness_does_not_add_up(seed: int, jitter_pct: float, late: list[float]) -> None:
    plan = schedule(seed, jitter_pct=jitter_pct)
    plan.succeeded(0.0)
    for number, late_s in enumerate(late, 1):
        ideal = 15.0 * number
        assert abs(plan.due - ideal) <= 15 * jitter_pct / 100 + 1e-6
        plan.succeeded(plan.due + late_s)


@given(SEEDS, st.floats(0, 1e6))
def test_what_a_suspend_made_us_miss_is_left_out(seed: int, asleep_s: float) -> None:
    plan = schedule(seed)
    plan.succeeded(0.0)
    woken = plan.due + asleep_s
    plan.succeeded(woken)
    # The heartbeat before may have been early and this one late, each by its jitter.
    assert woken - 1.5 - 1e-6 <= plan.due <= woken + 15 + 2 * 1.5 + 1e-6


@given(SEEDS, st.floats(0, 3600))
def test_a_wish_to_wait_is_obeyed(seed: int, asked_s: float) -> None:
    plan = schedule(seed)
    plan.failed(100.0, asked_s)
    assert 100 + max(5.0, asked_s) <= plan.due <= 100 + max(10.0, asked_s * 1.1)


def test_failures_wait_longer_and_longer_and_a_success_ends_that() -> None:
    plan = schedule(3)
    now, waits = 0.0, []
    for _ in range(50):
        plan.failed(now)
        waits.append(plan.due - now)
        now = plan.due
    assert max(waits[:1]) <= 10
    assert 60 < max(waits) <= 120
    plan.succeeded(now)
    assert abs(plan.due - (now + 15)) <= 1.5
    plan.failed(now)
    assert plan.due - now <= 10


def test_hurrying_brings_the_next_one_forward_and_moves_the_grid() -> None:
    plan = schedule(4)
    plan.succeeded(0.0)
    plan.hurry(3.0)
    assert plan.due == 3.0
    plan.hurry(9.0)
    assert plan.due == 3.0
    plan.succeeded(3.0)
    assert abs(plan.due - 18) <= 1.5


def test_no_hurry_while_waiting_after_a_failure() -> None:
    plan = schedule(5)
    plan.failed(0.0, 60)
    due = plan.due
    plan.hurry(1.0)
    assert plan.due == due
