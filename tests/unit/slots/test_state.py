"""The slot's rules: the table, histories under a fake clock, and random ones."""

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from aitbc_miner.errors import IllegalMove
from aitbc_miner.jobs import State
from aitbc_miner.slots.state import (
    MOVES,
    Action,
    Adopt,
    Assign,
    Begin,
    BeginJob,
    Cancel,
    Died,
    Ended,
    EndJob,
    Event,
    JobStepped,
    KillAdopted,
    KillJob,
    KillWorker,
    Ready,
    Retire,
    RetryNow,
    Settle,
    Slot,
    SlotState,
    SlotTiming,
    SpawnWorker,
    TerminateAdopted,
    Tick,
    Unretire,
    Unusable,
    step,
    transition,
)

S = SlotState
HOLDS_JOB = {S.BUSY, S.CANCELLING, S.ADOPTED}


def play(slot: Slot, *events: Event, at: float = 0.0) -> tuple[Slot, list[Action]]:
    """Feed events at one moment; the actions of all of them."""
    done: list[Action] = []
    for event in events:
        slot, actions = step(slot, event, at)
        done += actions
    return slot, done


def started(**changes: object) -> Slot:
    return replace(play(Slot("cpu0"), Begin(), Ready())[0], **changes)


def busy(job_id: str = "j1") -> Slot:
    return play(started(), Assign(job_id))[0]


# --- the table ---------------------------------------------------------------------------------------------

LEGAL = [(source, to) for source, targets in MOVES.items() for to in targets]
ILLEGAL = [(source, to) for source in S for to in S if to not in MOVES[source]]


def test_the_table_names_every_state_and_each_can_be_reached_and_left() -> None:
    assert set(MOVES) == set(S)
    reached = {S.STOPPED}
    while further := {to for source in reached for to in MOVES[source]} - reached:
        reached |= further
    assert reached == set(S)
    assert all(S.STOPPED in targets for source, targets in MOVES.items() if source is not S.STOPPED)


@pytest.mark.parametrize(("source", "to"), LEGAL)
def test_a_legal_move_is_dated_and_forgets_the_job_where_there_is_none(
    source: SlotState, to: SlotState
) -> None:
    slot = Slot("cpu0", state=source, since=1.0, job_id="j1", job_state=State.RUNNING, job_pid=5)
    moved = transition(slot, to, 7.0, "because")
    assert (moved.state, moved.since, moved.reason) == (to, 7.0, "because")
    assert (moved.job_id is not None) == (to in HOLDS_JOB)
    if to not in HOLDS_JOB:
        assert (moved.job_id, moved.job_state, moved.job_pid) == (None, None, None)


@pytest.mark.parametrize(("source", "to"), ILLEGAL)
def test_an_illegal_move_names_slot_and_states(source: SlotState, to: SlotState) -> None:
    with pytest.raises(IllegalMove, match=f"^slot cpu0: {source} -> {to}$"):
        transition(Slot("cpu0", state=source), to, 0.0)


# --- histories ---------------------------------------------------------------------------------------------


def test_a_job_runs_and_the_next_one_can_follow() -> None:
    slot, actions = play(Slot("cpu0"), Begin(), Ready(), Assign("j1"), at=1.0)
    assert actions == [SpawnWorker(), BeginJob("j1")]
    assert (slot.state, slot.job_id, slot.job_state) == (S.BUSY, "j1", State.PREP)
    slot, actions = play(slot, JobStepped("j1", State.RUNNING, 77), JobStepped("j1", State.COLLECTING))
    assert (slot.job_state, slot.job_pid, actions) == (State.COLLECTING, 77, [])
    slot, actions = play(slot, Ended("j1"), Assign("j2"), at=9.0)
    assert actions == [Settle("j1"), BeginJob("j2")]
    assert (slot.job_id, slot.job_state, slot.job_pid, slot.since) == ("j2", State.PREP, None, 9.0)


def test_cancelling_tells_the_worker_once_and_ends_it_when_it_takes_too_long() -> None:
    slot, actions = play(busy(), Cancel("cancel", "an operator"), Cancel("cancel", "again"), at=10.0)
    assert actions == [EndJob("j1", "cancel", "an operator")]
    assert (slot.state, slot.reason) == (S.CANCELLING, "an operator")
    limit = slot.timing.cancel_timeout
    assert play(slot, Tick(), at=10.0 + limit)[1] == []
    slot, actions = play(slot, Tick(), at=10.1 + limit)
    assert actions == [KillWorker()]
    slot, actions = play(slot, Died("was killed by SIGKILL"), at=80.0)
    assert actions == [KillJob(), Settle("j1", "the worker of slot cpu0 was killed by SIGKILL")]
    assert slot.state is S.BACKOFF


def test_a_worker_that_does_not_get_ready_is_ended() -> None:
    slot = play(Slot("cpu0"), Begin(), at=5.0)[0]
    assert play(slot, Tick(), at=5.0 + slot.timing.start_timeout)[1] == []
    assert play(slot, Tick(), at=5.1 + slot.timing.start_timeout)[1] == [KillWorker()]


def test_an_unusable_slot_is_quarantined_with_its_reason_and_tried_again_ever_more_rarely() -> None:
    slot, now = Slot("cpu0"), 0.0
    slot = play(slot, Begin())[0]
    pauses = []
    for _ in range(10):
        slot, actions = play(slot, Unusable("no cgroup"), Died("ended with exit status 1"), at=now)
        assert (slot.state, slot.reason, actions) == (S.QUARANTINED, "no cgroup", [KillWorker()])
        pauses.append(slot.retry_at - now)
        assert play(slot, Tick(), at=slot.retry_at - 0.01)[1] == []
        now = slot.retry_at
        slot, actions = play(slot, Tick(), at=now)
        assert (slot.state, actions) == (S.STARTING, [SpawnWorker()])
    assert pauses[0] == slot.timing.quarantine_min
    assert pauses == sorted(pauses)
    assert pauses[-1] == slot.timing.quarantine_max


def test_what_survives_its_job_costs_the_slot_its_worker() -> None:
    slot, actions = play(busy(), Ended("j1", clean=False), Died("was killed by SIGKILL"))
    assert actions == [Settle("j1"), KillWorker()]
    assert (slot.state, slot.job_id) == (S.QUARANTINED, None)
    assert "j1" in str(slot.reason)


def test_pauses_between_deaths_grow_and_the_slot_is_quarantined_after_enough_of_them() -> None:
    slot, now, pauses = play(Slot("cpu0"), Begin())[0], 0.0, []
    timing = slot.timing
    for _ in range(timing.deaths_allowed - 1):
        slot, actions = play(slot, Died("was killed by SIGSEGV"), at=now)
        assert (slot.state, actions) == (S.BACKOFF, [KillJob()])
        assert slot.reason == "its worker was killed by SIGSEGV"
        pauses.append(slot.retry_at - now)
        now = slot.retry_at
        slot = play(slot, Tick(), at=now)[0]
    assert pauses == [timing.restart_min * 2**i for i in range(timing.deaths_allowed - 1)]
    slot = play(slot, Died("was killed by SIGSEGV"), at=now)[0]
    assert slot.state is S.QUARANTINED
    assert slot.reason == "the worker died 5 times within 600 s; last: was killed by SIGSEGV"
    assert slot.retry_at - now == timing.quarantine_min
    # What it was quarantined for is paid for: the next death is a first one.
    slot = play(slot, Tick(), at=slot.retry_at)[0]
    assert play(slot, Died("x"), at=slot.since)[0].state is S.BACKOFF


def test_a_long_row_of_deaths_never_waits_longer_than_the_maximum() -> None:
    slot = Slot("cpu0", state=S.STARTING, timing=SlotTiming(deaths_allowed=100))
    now = 0.0
    for _ in range(60):
        slot = play(slot, Died("x"), at=now)[0]
        assert slot.state is S.BACKOFF
        assert slot.timing.restart_min <= slot.retry_at - now <= slot.timing.restart_max
        now = slot.retry_at
        slot = play(slot, Tick(), at=now)[0]


def test_deaths_long_ago_and_deaths_before_a_good_job_do_not_count() -> None:
    old = tuple(float(i) for i in range(4))
    slot = Slot("cpu0", state=S.IDLE, deaths=old)
    assert play(slot, Died("x"), at=slot.timing.deaths_within + 3.0)[0].deaths == (603.0,)
    assert play(slot, Died("x"), at=500.0)[0].state is S.QUARANTINED
    slot = replace(slot, quarantines=7)
    slot = play(slot, Assign("j1"), Ended("j1"), at=500.0)[0]
    assert (slot.deaths, slot.quarantines) == ((), 0)
    assert play(slot, Died("x"), at=501.0)[0].state is S.BACKOFF


def test_an_adopted_job_is_asked_to_end_and_its_worker_replaced() -> None:
    slot, actions = play(Slot("cpu0"), Adopt("j9", State.RUNNING), Begin(), Assign("j1"), Ready())
    assert (slot.state, slot.job_id, slot.job_state, actions) == (S.ADOPTED, "j9", State.RUNNING, [])
    assert play(slot, Cancel("cancel"))[1] == [TerminateAdopted()]
    slot, actions = play(slot, Died("ended"))
    assert actions == [KillJob(), Settle("j9", "the worker of slot cpu0 ended"), SpawnWorker()]
    # Its worker did nothing wrong: it had no other node to answer to.
    assert (slot.state, slot.deaths) == (S.STARTING, ())


def test_a_retired_slot_starts_nothing_any_more() -> None:
    slot, actions = play(started(), Retire(), Died("ended with exit status 0"), Tick(), Ready(), at=1e6)
    assert (slot.state, actions) == (S.STOPPED, [])


def test_a_slot_that_is_retired_with_a_job_ends_after_it() -> None:
    for held in (busy(), play(busy(), Cancel("cancel"))[0]):
        slot = play(held, Retire())[0]
        assert slot.job_id == "j1"
        last, actions = play(slot, Ended("j1"), Died("ended with exit status 0"), Tick(), Begin(), at=1e6)
        assert (last.state, actions) == (S.STOPPED, [Settle("j1")])
        last, actions = play(slot, Ended("j1", clean=False), Died("x"), Tick(), at=1e6)
        assert (last.state, actions) == (S.STOPPED, [Settle("j1"), KillWorker()])
        last, actions = play(slot, Died("was killed"), Tick(), Begin(), at=1e6)
        assert (last.state, SpawnWorker() in actions, KillJob() in actions) == (S.STOPPED, False, True)
    slot = play(Slot("cpu0"), Adopt("j9", State.RUNNING), Retire())[0]
    last, actions = play(slot, Died("ended"), Tick(), at=1e6)
    assert (last.state, actions) == (S.STOPPED, [KillJob(), Settle("j9", "the worker of slot cpu0 ended")])


def test_a_slot_that_is_wanted_again_goes_on_or_begins_anew() -> None:
    slot = play(busy(), Retire(), Unretire(), Ended("j1"))[0]
    assert (slot.state, slot.retiring) == (S.IDLE, False)
    slot, actions = play(started(), Retire(), Unretire(), Begin())
    assert slot.state is S.STARTING
    assert actions == [SpawnWorker()]


def test_what_may_have_been_mended_is_tried_at_once() -> None:
    slot = play(Slot("cpu0"), Begin(), Unusable("no GPU"))[0]
    assert play(slot, Tick(), at=1.0)[1] == []
    assert play(slot, RetryNow(), Tick(), at=1.0)[1] == [SpawnWorker()]
    # One that works is not disturbed by it.
    assert play(busy(), RetryNow(), Tick(), at=1.0)[1] == []


def test_a_slot_says_what_survives_in_it() -> None:
    slot = play(busy(), Ended("j1", clean=False, remains="the process 12 (disk-sleep) could not be killed"))[
        0
    ]
    assert (slot.state, slot.reason) == (S.QUARANTINED, "the process 12 (disk-sleep) could not be killed")


def test_what_an_adopted_worker_leaves_running_past_its_deadline_is_ended() -> None:
    slot = play(Slot("cpu0"), Adopt("j1", State.RUNNING, deadline=100.0))[0]
    late = 100.0 + slot.timing.cancel_timeout
    assert play(slot, Tick(), at=late)[1] == []
    # The worker itself is left: it may be reading what a job made that has long ended.
    assert play(slot, Tick(), at=late + 1)[1] == [KillJob()]


def test_an_adopted_worker_that_does_not_obey_is_killed() -> None:
    slot = play(Slot("cpu0"), Adopt("j9", State.RUNNING))[0]
    assert play(slot, Tick(), at=1e6)[1] == []
    slot = play(slot, Cancel("cancel"), at=10.0)[0]
    limit = slot.timing.cancel_timeout
    # Asked once more, it does not get more time.
    slot, actions = play(slot, Cancel("shutdown"), at=9.0 + limit)
    assert actions == [TerminateAdopted("shutdown")]
    assert play(slot, Tick(), at=10.0 + limit)[1] == []
    assert play(slot, Tick(), at=10.1 + limit)[1] == [KillAdopted(), KillJob()]
    slot = play(slot, Died("ended"), Ready(), Assign("j1"))[0]
    assert slot.cancelled_at is None


def test_a_worker_that_does_not_end_its_job_in_time_is_told_to_and_then_killed() -> None:
    slot = play(
        busy(), JobStepped("j1", State.RUNNING, None, 100.0), JobStepped("j1", State.RUNNING, 77, 100.0)
    )[0]
    limit = slot.timing.cancel_timeout
    assert play(slot, Tick(), at=100.0 + limit) == (slot, [])
    slot, actions = play(slot, Tick(), at=100.1 + limit)
    assert slot.state is S.CANCELLING
    (sent,) = actions
    assert isinstance(sent, EndJob)
    assert (sent.job_id, sent.why) == ("j1", "timeout")
    assert play(slot, Tick(), at=100.2 + 2 * limit)[1] == [KillWorker()]
    slot = play(slot, Ended("j1"), Assign("j2"))[0]
    assert slot.deadline is None
    assert play(slot, Tick(), at=1e6) == (slot, [])


def test_a_worker_that_collects_finished_work_is_left_alone() -> None:
    collecting = play(busy(), JobStepped("j1", State.RUNNING, 7, 100.0), JobStepped("j1", State.COLLECTING))[
        0
    ]
    assert play(collecting, Tick(), at=1e6) == (collecting, [])
    for held in (collecting, play(Slot("cpu0"), Adopt("j1", State.COLLECTING))[0]):
        slot = play(held, Cancel("cancel"))[0]
        assert play(slot, Tick(), at=1e6) == (slot, [])


def test_a_worker_that_is_ending_its_job_is_told_that_the_miner_stops() -> None:
    slot = play(busy(), Cancel("cancel"), at=1.0)[0]
    assert play(slot, Cancel("shutdown"), at=2.0) == (slot, [EndJob("j1", "shutdown")])


def test_words_about_another_job_change_nothing() -> None:
    slot = busy("j1")
    assert play(slot, JobStepped("j2", State.RUNNING, 5), Ended("j2"), Ended("j2", clean=False)) == (slot, [])


# --- random histories --------------------------------------------------------------------------------------

JOBS = st.sampled_from(["j1", "j2", "j3"])
EVENTS = st.one_of(
    st.builds(Begin),
    st.builds(Ready),
    st.builds(Unusable, st.just("broken")),
    st.builds(Assign, JOBS),
    st.builds(
        JobStepped, JOBS, st.sampled_from(State), st.none() | st.integers(1, 9), st.none() | st.floats(0, 1e4)
    ),
    st.builds(Cancel, st.sampled_from(["cancel", "shutdown"]), st.sampled_from(["", "why"])),
    st.builds(Ended, JOBS, st.booleans()),
    st.builds(Died, st.just("died")),
    st.builds(Adopt, JOBS, st.sampled_from(State), st.none() | st.floats(0, 1e4)),
    st.builds(Retire),
    st.builds(Unretire),
    st.builds(RetryNow),
    st.builds(Tick),
)
HISTORIES = st.lists(st.tuples(EVENTS, st.floats(0, 1000)), max_size=60)


def taken(before: Slot, event: Event, after: Slot) -> list[str]:
    """Name the job that this event gave to the slot."""
    gave = isinstance(event, Assign | Adopt) and after.state is not before.state
    return [event.job_id] if gave and isinstance(event, Assign | Adopt) else []


def check(before: Slot, event: Event, after: Slot, actions: Sequence[Action], now: float) -> None:
    assert after.state is before.state or after.state in MOVES[before.state]
    assert (after.job_id is not None) == (after.state in HOLDS_JOB)
    sent = [action.job_id for action in actions if isinstance(action, BeginJob | EndJob)]
    assert all(job_id == after.job_id for job_id in sent)
    if SpawnWorker() in actions:
        assert after.state is S.STARTING
        assert not after.retiring
    if after.state in {S.BACKOFF, S.QUARANTINED}:
        assert after.reason
        if before.state is not after.state:
            assert now + after.timing.restart_min <= after.retry_at <= now + after.timing.quarantine_max
    if after.state is not before.state:
        assert after.since == now


@settings(max_examples=400, deadline=None)
@given(HISTORIES)
def test_no_history_breaks_the_rules_and_each_job_is_settled_exactly_once(
    history: list[tuple[Event, float]],
) -> None:
    slot, now, held = Slot("cpu0"), 0.0, list[str]()
    for event, passed in history:
        now += passed
        before = slot
        slot, actions = step(slot, event, now)  # an IllegalMove would fail here
        check(before, event, slot, actions, now)
        held += taken(before, event, slot)
        assert len(held) <= 1, "two jobs in one slot"
        for action in actions:
            if isinstance(action, Settle):
                assert held == [action.job_id], "settled without having it"
                held.clear()
        assert held == ([] if slot.job_id is None else [slot.job_id]), "a job was forgotten and never settled"


@settings(deadline=None)
@given(HISTORIES)
def test_whatever_has_happened_a_slot_that_is_not_retired_comes_back_to_work(
    history: list[tuple[Event, float]],
) -> None:
    slot, now = Slot("cpu0"), 0.0
    for event, passed in history:
        now += passed
        slot, _ = step(slot, event, now)
    # Its worker's death, long waiting, and a worker that gets ready are all it takes from anywhere.
    retired = slot.retiring
    said = [event for event, _ in history if isinstance(event, Retire | Unretire)]
    assert retired == (bool(said) and isinstance(said[-1], Retire))
    slot = play(slot, Died("died"), at=now)[0]
    slot = play(slot, Begin(), Tick(), Ready(), Assign("last"), at=now + slot.timing.quarantine_max)[0]
    assert (slot.state, slot.job_id) == ((S.STOPPED, None) if retired else (S.BUSY, "last"))


@given(HISTORIES)
def test_a_step_changes_nothing_but_its_result(history: list[tuple[Event, float]]) -> None:
    slot = Slot("cpu0")
    for event, now in history:
        assert step(slot, event, now) == step(slot, event, now)
        slot, _ = step(slot, event, now)
