"""The rule for another attempt: nothing is started twice that did not ask for it."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aitbc_miner.agent.retry_policy import NEVER, Where, next_attempt, pause_before
from aitbc_miner.errors import CODES, ErrorCode, Retry
from aitbc_miner.jobs import RetryPolicy

E = ErrorCode
ONCE = RetryPolicy()
HERE, ELSEWHERE = Where.HERE, Where.ELSEWHERE
CODE = st.none() | st.sampled_from(ErrorCode)
POLICIES = st.builds(RetryPolicy, st.integers(1, 100), st.lists(st.sampled_from(ErrorCode), max_size=5))


def after(
    code: ErrorCode | None,
    *,
    started: bool = True,
    attempt: int = 1,
    policy: RetryPolicy = ONCE,
    most: int = 5,
    shared: bool = False,
) -> Where | None:
    return next_attempt(code, started=started, attempt=attempt, policy=policy, most=most, shared=shared)


@given(CODE, st.integers(1, 100), st.integers(1, 100), st.booleans())
def test_a_program_that_was_started_is_not_started_again_without_a_policy(
    code: ErrorCode | None, attempt: int, most: int, shared: bool
) -> None:
    assert after(code, attempt=attempt, most=most, shared=shared) is None


@given(st.booleans(), st.integers(1, 100), POLICIES, st.integers(1, 100), st.booleans())
def test_what_came_to_a_good_end_or_was_not_wanted_is_never_tried_again(
    started: bool, attempt: int, policy: RetryPolicy, most: int, shared: bool
) -> None:
    named = RetryPolicy(policy.max_attempts, list(NEVER))
    for code in (None, *NEVER):
        for each in (policy, named):
            where = after(code, started=started, attempt=attempt, policy=each, most=most, shared=shared)
            assert where is None


@given(CODE, st.booleans(), POLICIES, st.integers(1, 100), st.booleans())
def test_there_is_an_end(
    code: ErrorCode | None, started: bool, policy: RetryPolicy, most: int, shared: bool
) -> None:
    last = policy.max_attempts if started else most
    for attempt in (last, last + 1):
        where = after(code, started=started, attempt=attempt, policy=policy, most=most, shared=shared)
        assert where is None


@given(CODE, st.booleans(), st.integers(1, 100), POLICIES, st.integers(1, 100))
def test_a_node_on_its_own_leaves_nothing_to_others(
    code: ErrorCode | None, started: bool, attempt: int, policy: RetryPolicy, most: int
) -> None:
    assert after(code, started=started, attempt=attempt, policy=policy, most=most) in {None, HERE}


@pytest.mark.parametrize("code", ErrorCode)
def test_without_a_list_the_code_says_where(code: ErrorCode) -> None:
    policy = RetryPolicy(max_attempts=2)
    retry = CODES[code].retry
    expected = {Retry.FINAL: None, Retry.HERE: HERE, Retry.ELSEWHERE: ELSEWHERE}[retry]
    if code is E.E_UPLOAD:
        expected = None  # it is about the report: the program has done its work
    for started in (True, False):
        assert after(code, started=started, policy=policy, shared=True) is expected
        alone = after(code, started=started, policy=policy)
        assert alone is (None if expected is ELSEWHERE else expected)


@pytest.mark.parametrize(
    ("code", "where"), [(E.E_EXIT, HERE), (E.E_TIMEOUT, HERE), (E.E_OOM, HERE), (E.E_LOST, None)]
)
def test_a_list_is_all_that_counts_for_a_program_that_was_started(
    code: ErrorCode, where: Where | None
) -> None:
    policy = RetryPolicy(max_attempts=2, on=[E.E_EXIT, E.E_TIMEOUT, E.E_OOM])
    assert after(code, policy=policy) is where
    in_fleet = ELSEWHERE if code is E.E_OOM else where
    assert after(code, policy=policy, shared=True) is in_fleet


@pytest.mark.parametrize(("attempt", "where"), [(1, HERE), (4, HERE), (5, None)])
def test_what_never_ran_needs_no_policy(attempt: int, where: Where | None) -> None:
    assert after(E.E_LOST, started=False, attempt=attempt) is where
    # Nor does a list of the job's own keep it from that.
    listed = RetryPolicy(1, [E.E_EXIT])
    assert after(E.E_LOST, started=False, attempt=attempt, policy=listed) is where


@given(st.integers(1, 100), st.floats(0.01, 10), st.floats(1, 100), st.integers(0, 2**32))
def test_the_pause_is_within_bounds_that_double(attempt: int, min_s: float, factor: float, seed: int) -> None:
    pause = pause_before(attempt, min_s, min_s * factor, random.Random(seed))
    assert min_s <= pause <= min_s * min(factor, 2.0 ** (attempt - 1)) * (1 + 1e-9)
