"""Reports: sent until accepted, by the same name each time, and what is recorded of it."""

import contextlib
import threading
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from aitbc_miner.agent import delivery
from aitbc_miner.agent.delivery import Delivered
from aitbc_miner.agent.delivery_queue import Lane
from aitbc_miner.agent.outcomes import CALLED_FAILED, REFUSED, declare, settle, take_back_refused
from aitbc_miner.config.settings import GiveUp
from aitbc_miner.coordinator.interface import (
    ArtifactChanged,
    Busy,
    Coordinator,
    CoordinatorError,
    Gone,
    Refused,
    Told,
    Unauthorized,
    Unreachable,
)
from aitbc_miner.errors import ErrorCode, LocalError
from aitbc_miner.ipc.messages import CancelJob, JobSettled
from aitbc_miner.jobs import Artifact, Outcome, State, StateRecord
from aitbc_miner.queue.interface import QueueError
from aitbc_miner.store.records import JobDir, RecordError, Records, pretty
from aitbc_miner.util import clock, fs
from tests.support.mute_coordinator import MuteCoordinator

NODE = "node-1"
GOOD = Outcome(job_id="j1", artifacts=[Artifact("a", "artifacts/0000", 1, "0" * 64)])
AT_ONCE = GiveUp(refusals=1, over_s=0.0)
BAD = Outcome(job_id="j1", code=ErrorCode.E_EXIT, message="exit status 3")


def deliver(
    records: Records,
    coordinator: Coordinator,
    node_id: str,
    job_id: str,
    is_ours: Callable[[StateRecord], bool] = lambda _: True,
    give_up: GiveUp = AT_ONCE,
) -> Delivered:
    """Deliver, by default with a belief in the first refusal."""
    return delivery.deliver(records, coordinator, node_id, job_id, is_ours, give_up)


class FakeCoordinator(MuteCoordinator):
    """Notes down each report; raises what is in `answers`, one for each call, then accepts."""

    def __init__(self, *answers: Exception | None) -> None:
        self.answers = list(answers)
        self.calls: list[tuple[str, str]] = []
        self.outcomes: list[Outcome] = []
        self.seen: Callable[[], object] = lambda: None

    def _answer(self, call: str, key: str, outcome: Outcome) -> None:
        self.calls.append((call, key))
        self.outcomes.append(outcome)
        self.seen()
        answer = self.answers.pop(0) if self.answers else None
        if answer is not None:
            raise answer

    def result(self, job_id: str, outcome: Outcome, root: Path, key: str, *, again: bool = False) -> Told:
        assert (root / "state.json").exists()
        self._answer(f"result {job_id}", key, outcome)
        return Told()

    def fail(self, job_id: str, outcome: Outcome, key: str, *, again: bool = False) -> Told:
        self._answer(f"fail {job_id}", key, outcome)
        return Told()


RESULT = ("result j1", f"result:{NODE}:j1")
FAIL = ("fail j1", f"fail:{NODE}:j1")


@pytest.fixture
def records(tmp_path: Path) -> Records:
    found = Records(tmp_path)
    found.create("j1", b"{}")
    return found


def finished(records: Records, outcome: Outcome) -> None:
    with records.open("j1") as job:
        job.write_outcome(outcome)


def kept(records: Records) -> tuple[State, str | None, Outcome | None]:
    with records.open("j1") as job:
        state = job.state()
        return state.state, state.delivery, job.outcome()


def state_of(records: Records) -> StateRecord:
    with records.open("j1") as job:
        return job.state()


@pytest.mark.parametrize(("outcome", "call", "end"), [(GOOD, RESULT, State.DONE), (BAD, FAIL, State.FAILED)])
def test_an_accepted_report_ends_the_job(
    records: Records, outcome: Outcome, call: tuple[str, str], end: State
) -> None:
    finished(records, outcome)
    coordinator = FakeCoordinator()
    delivered = deliver(records, coordinator, NODE, "j1")
    assert delivered == Delivered("j1", outcome, "accepted", state_of(records))
    assert coordinator.calls == [call]
    assert coordinator.outcomes == [outcome]
    assert kept(records) == (end, "accepted", outcome)


def test_nothing_is_recorded_as_delivered_before_it_is_accepted(records: Records) -> None:
    finished(records, GOOD)
    coordinator, during = FakeCoordinator(), list[object]()
    coordinator.seen = lambda: during.append(kept(records))
    deliver(records, coordinator, NODE, "j1")
    assert during == [(State.UPLOADING, None, GOOD)]


NOT_NOW: list[CoordinatorError] = [
    Unreachable("cannot report: connection refused"),
    Busy("cannot report: 503", 5.0),
    Unauthorized("cannot report: 401"),
]


@pytest.mark.parametrize("outcome", [GOOD, BAD])
def test_each_try_of_a_report_has_the_same_key_and_loses_nothing(records: Records, outcome: Outcome) -> None:
    finished(records, outcome)
    coordinator = FakeCoordinator(*NOT_NOW)
    for error in NOT_NOW:
        with pytest.raises(type(error)):
            deliver(records, coordinator, NODE, "j1")
        assert kept(records) == (State.UPLOADING, None, outcome)
    assert deliver(records, coordinator, NODE, "j1").how == "accepted"
    assert len(coordinator.calls) == 4
    assert len(set(coordinator.calls)) == 1


@pytest.mark.parametrize(("outcome", "end"), [(GOOD, State.DONE), (BAD, State.FAILED)])
def test_what_is_final_there_already_counts_as_delivered(
    records: Records, outcome: Outcome, end: State
) -> None:
    finished(records, outcome)
    coordinator = FakeCoordinator(Gone("cannot report: 409", 409))
    assert deliver(records, coordinator, NODE, "j1").how == "superseded"
    assert len(coordinator.calls) == 1
    assert kept(records) == (end, "superseded", outcome)


@pytest.mark.parametrize(
    "error", [Refused("cannot report: 413 too large", 413), ArtifactChanged("a has changed")]
)
def test_a_result_that_will_never_be_taken_is_reported_as_a_failure(
    records: Records, error: Exception
) -> None:
    finished(records, GOOD)
    coordinator = FakeCoordinator(error)
    delivered = deliver(records, coordinator, NODE, "j1")
    assert coordinator.calls == [RESULT, FAIL]
    assert delivered.how == "accepted"
    assert (delivered.outcome.code, delivered.outcome.message) == (ErrorCode.E_UPLOAD, str(error))
    assert kept(records) == (State.FAILED, "accepted", delivered.outcome)
    # What the job made is still known.
    assert delivered.outcome.artifacts == GOOD.artifacts


@pytest.mark.parametrize("end", [None, Unreachable("gone")])
def test_what_a_refused_result_was_is_kept(records: Records, end: Exception | None) -> None:
    finished(records, GOOD)
    coordinator = FakeCoordinator(Refused("cannot report: 413 too large", 413), end)
    with contextlib.suppress(Unreachable):
        deliver(records, coordinator, NODE, "j1")
    kept_file = (records.root / "j1" / REFUSED).read_bytes()
    assert msgspec.json.decode(kept_file, type=Outcome) == GOOD
    deliver(records, coordinator, NODE, "j1")
    assert (records.root / "j1" / REFUSED).read_bytes() == kept_file


def test_a_refused_result_is_on_disk_as_a_failure_before_the_failure_is_told(records: Records) -> None:
    finished(records, GOOD)
    coordinator = FakeCoordinator(Refused("no", 400), Unreachable("gone"))
    with pytest.raises(Unreachable):
        deliver(records, coordinator, NODE, "j1")
    state, _, outcome = kept(records)
    assert outcome
    assert (state, outcome.code) == (State.UPLOADING, ErrorCode.E_UPLOAD)
    # From then on it is a failure, even for a coordinator that would take the result by now.
    assert deliver(records, coordinator, NODE, "j1").how == "accepted"
    assert coordinator.calls == [RESULT, FAIL, FAIL]
    assert kept(records)[0] is State.FAILED


@pytest.mark.parametrize(
    ("second", "how"), [(Gone("409", 409), "superseded"), (Refused("400", 400), "refused")]
)
def test_a_coordinator_that_takes_neither_has_been_told(
    records: Records, second: Exception, how: str
) -> None:
    finished(records, GOOD)
    coordinator = FakeCoordinator(Refused("no", 400), second)
    assert deliver(records, coordinator, NODE, "j1").how == how
    assert kept(records)[:2] == (State.FAILED, how)


def test_a_refused_failure_is_not_told_twice(records: Records) -> None:
    finished(records, BAD)
    coordinator = FakeCoordinator(Refused("no", 400))
    assert deliver(records, coordinator, NODE, "j1").how == "refused"
    assert coordinator.calls == [FAIL]
    assert kept(records) == (State.FAILED, "refused", BAD)


@pytest.mark.parametrize("answer", [None, Gone("409", 409), Refused("400", 400)])
def test_a_stored_report_can_be_sent_again_and_stays_what_it_was(
    records: Records, answer: Exception | None
) -> None:
    finished(records, GOOD)
    deliver(records, FakeCoordinator(), NODE, "j1")
    before = kept(records)
    again = FakeCoordinator(answer)
    deliver(records, again, NODE, "j1")
    assert again.calls[0] == RESULT
    # It was accepted once; what is said to a repetition takes nothing of that back.
    assert kept(records) == before


def test_a_job_without_an_outcome_is_reported_lost(records: Records) -> None:
    coordinator = FakeCoordinator()
    delivered = deliver(records, coordinator, NODE, "j1")
    assert coordinator.calls == [FAIL]
    assert delivered.outcome.code is ErrorCode.E_LOST
    assert kept(records) == (State.FAILED, "accepted", delivered.outcome)


def test_why_there_is_no_outcome_is_kept_with_the_slot(records: Records) -> None:
    with records.open("j1") as job:
        job.move(State.ACKED)
        job.move(State.PREP, slot="cpu0")
        said = declared(job, JobSettled("j1", "its worker was killed"))
        assert (said.code, said.slot) == (ErrorCode.E_LOST, "cpu0")
        assert "its worker was killed" in said.message
        said = declared(job, CancelJob("j1", "cancel", "an operator"))
        assert said.code is ErrorCode.E_CANCELLED
        assert "an operator" in said.message


def test_what_never_ran_and_cannot_here_has_its_own_code(records: Records) -> None:
    with records.open("j1") as job:
        said = declared(job, JobSettled("j1", "no slot has a GPU", ErrorCode.E_NOGPU))
    assert (said.code, said.message) == (ErrorCode.E_NOGPU, "no slot has a GPU")


def test_an_outcome_names_the_attempt_that_it_is_of(records: Records) -> None:
    with records.open("j1") as job:
        job.move(State.ACKED)
        job.try_again()
        assert declared(job, JobSettled("j1", "its worker ended")).attempt == 2


def declared(job: JobDir, why: JobSettled | CancelJob) -> Outcome:
    outcome = declare(job, why)
    assert job.outcome() == outcome
    return outcome


# --- whose it is -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("outcome", [GOOD, BAD])
def test_the_report_of_a_job_that_another_node_has_is_not_sent(records: Records, outcome: Outcome) -> None:
    finished(records, outcome)
    coordinator, asked = FakeCoordinator(), list[StateRecord]()

    def is_ours(state: StateRecord) -> bool:
        asked.append(state)
        return False

    before = state_of(records)
    with records.open("j1") as job:
        job.move(State.UPLOADING)
    delivered = deliver(records, coordinator, NODE, "j1", is_ours)
    assert coordinator.calls == []
    assert [state.job_id for state in asked] == [before.job_id]
    assert (delivered.how, delivered.state) == ("lost", state_of(records))
    assert kept(records) == (State.FAILED, "lost", outcome)


def test_nothing_is_sent_as_long_as_nobody_says_whose_it_is(records: Records) -> None:
    finished(records, GOOD)
    coordinator = FakeCoordinator()

    def is_ours(state: StateRecord) -> bool:
        raise QueueError("cannot reach the queue")

    before = kept(records)
    with pytest.raises(QueueError):
        deliver(records, coordinator, NODE, "j1", is_ours)
    assert (coordinator.calls, kept(records)) == ([], before)
    assert deliver(records, coordinator, NODE, "j1", lambda _: True).how == "accepted"


def test_whose_it_is_does_not_matter_for_what_was_delivered(records: Records) -> None:
    finished(records, GOOD)
    deliver(records, FakeCoordinator(), NODE, "j1")
    before = kept(records)
    again = FakeCoordinator()
    deliver(records, again, NODE, "j1", lambda _: False)
    assert again.calls == [RESULT]
    assert kept(records) == before


# --- a report that was refused -----------------------------------------------------------------------------


@pytest.mark.parametrize("outcome", [GOOD, BAD])
def test_a_refusal_is_believed_when_it_was_repeated_often_and_for_long(
    records: Records, outcome: Outcome, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = clock.now()
    finished(records, outcome)
    for times, pause_s in enumerate((0.0, 1.0, 1.0, 1.0, 1.0, 500.0, 90.0), 1):
        now += pause_s
        monkeypatch.setattr(clock, "now", lambda at=now: at)
        if times == 4:
            # Of another boot; the time between the two is not known.
            monkeypatch.setattr(delivery, "boot_id", lambda: "another")
        with pytest.raises(Refused):
            delivery.deliver(Records(records.root), FakeCoordinator(Refused("no", 400)), NODE, "j1")
        with records.open("j1") as job:
            assert (job.state().state, job.state().refusals.times) == (State.UPLOADING, times)
            assert job.outcome() == outcome
    monkeypatch.setattr(clock, "now", lambda: now + 8.0)
    assert delivery.deliver(records, FakeCoordinator(Refused("no", 400)), NODE, "j1").how in {
        "accepted",
        "refused",
    }
    assert kept(records)[0] is State.FAILED


def test_a_result_that_was_called_a_failure_can_still_be_delivered(records: Records) -> None:
    finished(records, GOOD)
    deliver(records, FakeCoordinator(Refused("413", 413)), NODE, "j1")
    with records.open("j1") as job:
        assert take_back_refused(job)
    assert kept(records) == (State.UPLOADING, CALLED_FAILED, GOOD)
    assert deliver(records, FakeCoordinator(), NODE, "j1").how == "accepted"
    assert kept(records) == (State.DONE, "accepted", GOOD)


def test_a_coordinator_may_keep_to_the_failure_that_it_was_told(records: Records) -> None:
    finished(records, GOOD)
    deliver(records, FakeCoordinator(Refused("413", 413)), NODE, "j1")
    with records.open("j1") as job:
        assert take_back_refused(job)
    delivered = deliver(records, FakeCoordinator(Gone("409", 409)), NODE, "j1")
    assert (delivered.how, delivered.outcome.code) == ("superseded", ErrorCode.E_UPLOAD)
    assert kept(records)[:2] == (State.FAILED, "superseded")
    with records.open("j1") as job:
        assert take_back_refused(job), "as long as it is there, it can be tried"


def test_a_refused_result_is_sent_once_more_as_it_was(records: Records) -> None:
    finished(records, GOOD)
    deliver(records, FakeCoordinator(Refused("413", 413), Refused("400", 400)), NODE, "j1")
    with records.open("j1") as job:
        assert take_back_refused(job)
    assert kept(records) == (State.UPLOADING, None, GOOD)
    coordinator = FakeCoordinator()
    assert deliver(records, coordinator, NODE, "j1").how == "accepted"
    assert (coordinator.calls, coordinator.outcomes) == ([RESULT], [GOOD])
    assert kept(records) == (State.DONE, "accepted", GOOD)


def test_a_refused_failure_is_sent_once_more(records: Records) -> None:
    finished(records, BAD)
    deliver(records, FakeCoordinator(Refused("400", 400)), NODE, "j1")
    with records.open("j1") as job:
        assert take_back_refused(job)
    assert kept(records) == (State.UPLOADING, None, BAD)


@pytest.mark.parametrize("answer", [None, Gone("409", 409)])
@pytest.mark.parametrize("outcome", [GOOD, BAD])
def test_what_was_not_refused_is_not_taken_back(
    records: Records, outcome: Outcome, answer: Exception | None
) -> None:
    finished(records, outcome)
    for _ in range(2):
        before = kept(records)
        with records.open("j1") as job:
            assert not take_back_refused(job)
        assert kept(records) == before
        deliver(records, FakeCoordinator(answer), NODE, "j1")


def test_a_crash_while_taking_back_leaves_a_report_to_be_sent(
    records: Records, monkeypatch: pytest.MonkeyPatch
) -> None:
    finished(records, GOOD)
    deliver(records, FakeCoordinator(Refused("413", 413), Refused("400", 400)), NODE, "j1")
    move = JobDir.move

    def and_no_further(job: JobDir, to: State, **changes: object) -> StateRecord:
        move(job, to, **changes)
        raise KeyboardInterrupt

    monkeypatch.setattr(JobDir, "move", and_no_further)
    with records.open("j1") as job, pytest.raises(KeyboardInterrupt):
        take_back_refused(job)
    monkeypatch.undo()
    # The report of the refusal; the result itself is still beside it.
    state, delivery, outcome = kept(records)
    assert outcome
    assert (state, delivery, outcome.code) == (State.UPLOADING, None, ErrorCode.E_UPLOAD)
    assert (records.root / "j1" / REFUSED).exists()


# --- a job that nobody works on ----------------------------------------------------------------------------


def test_a_job_that_is_settled_gets_an_outcome_unless_it_has_one(records: Records) -> None:
    assert settle(records, JobSettled("j1", "its worker ended"))
    first = kept(records)[2]
    assert first
    assert first.code is ErrorCode.E_LOST
    assert settle(records, CancelJob("j1", "cancel", "an operator"))
    assert kept(records)[2] == first
    deliver(records, FakeCoordinator(), NODE, "j1")
    before = kept(records)
    assert not settle(records, JobSettled("j1", "its worker ended"))
    assert kept(records) == before


def unnamed(records: Records, outcome: Outcome, cut: int | None = None) -> Path:
    """Leave an outcome as a writer does that is killed right before it gives it its name, or before that."""
    path = records.root / "j1" / fs.unfinished("outcome.json")
    path.write_bytes(pretty(outcome)[:cut])
    return path


@pytest.mark.parametrize("by", ["its worker's end", "its report"])
def test_an_outcome_that_is_whole_and_has_no_name_yet_counts(records: Records, by: str) -> None:
    whole = replace(GOOD, result={"answer": 42})
    left = unnamed(records, whole)
    if by == "its report":
        deliver(records, FakeCoordinator(), NODE, "j1")
    else:
        assert settle(records, JobSettled("j1", "its worker was killed"))
    assert kept(records)[2] == whole
    assert not left.exists()


@pytest.mark.parametrize("fault", ["cut", "of another job", "of another attempt", "a link", "empty"])
def test_an_outcome_without_a_name_that_is_not_whole_or_not_this_ones_does_not_count(
    records: Records, fault: str
) -> None:
    match fault:
        case "cut" | "empty":
            unnamed(records, GOOD, -2 if fault == "cut" else 0)
        case "of another job":
            unnamed(records, replace(GOOD, job_id="j2"))
        case "of another attempt":
            unnamed(records, replace(GOOD, attempt=2))
        case _:
            unnamed(records, GOOD).rename(records.root / "elsewhere")
            (records.root / "j1" / fs.unfinished("outcome.json")).symlink_to(records.root / "elsewhere")
    settle(records, JobSettled("j1", "its worker was killed"))
    outcome = kept(records)[2]
    assert outcome is not None
    assert outcome.code is ErrorCode.E_LOST


def test_a_file_that_cannot_be_read_now_is_sent_later(records: Records) -> None:
    finished(records, GOOD)
    coordinator = FakeCoordinator(LocalError("cannot send out: Too many open files"))
    with pytest.raises(LocalError):
        deliver(records, coordinator, NODE, "j1")
    state, delivery, outcome = kept(records)
    assert outcome is not None
    assert (state, delivery, outcome.code) == (State.UPLOADING, None, None)
    assert deliver(records, coordinator, NODE, "j1").how == "accepted"


def test_a_job_that_cannot_be_settled_is_told_of_all_the_same(
    records: Records, caplog: pytest.LogCaptureFixture
) -> None:
    (records.root / "j1/state.json").write_bytes(b"{")
    assert settle(records, JobSettled("j1", "its worker ended"))
    assert settle(records, JobSettled("j2", "its worker ended"))
    assert [each.getMessage() for each in caplog.records] == ["cannot settle job"] * 2


def test_what_cannot_be_read_is_not_sent(records: Records) -> None:
    (records.root / "j1/outcome.json").write_bytes(b"{")
    coordinator = FakeCoordinator()
    with pytest.raises(RecordError, match="cannot read"):
        deliver(records, coordinator, NODE, "j1")
    with pytest.raises(RecordError, match="cannot open job j2"):
        deliver(records, coordinator, NODE, "j2")
    assert coordinator.calls == []


def test_reports_of_several_jobs_can_be_sent_at_once(records: Records) -> None:
    ids = [f"k{number}" for number in range(8)]
    for job_id in ids:
        records.create(job_id, b"{}")
        with records.open(job_id) as job:
            job.write_outcome(replace(GOOD, job_id=job_id))
    coordinator = FakeCoordinator()
    threads = [threading.Thread(target=deliver, args=(records, coordinator, NODE, job_id)) for job_id in ids]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    ended = [records.state_of(job_id) for job_id in records.ids() if job_id in ids]
    assert {record.state for record in ended if isinstance(record, StateRecord)} == {State.DONE}
    assert len(set(coordinator.calls)) == len(ids)


# --- when to send ------------------------------------------------------------------------------------------


def test_what_is_added_is_due_once() -> None:
    schedule = Lane(1, 10)
    for _ in range(3):
        schedule.add("a", 5.0)
    assert (len(schedule), "a" in schedule, schedule.next_due()) == (1, True, 5.0)
    assert schedule.start_due(4.9, 9) == []
    assert schedule.start_due(5.0, 9) == ["a"]
    # Being sent, it is neither due nor forgotten.
    schedule.add("a", 6.0)
    schedule.hurry(6.0)
    assert (schedule.start_due(99, 9), schedule.running, len(schedule), schedule.next_due()) == (
        [],
        1,
        1,
        None,
    )
    schedule.succeeded("a", 7.0)
    assert (schedule.running, len(schedule), "a" in schedule) == (0, 0, False)
    schedule.add("a", 8.0)
    assert schedule.start_due(8.0, 1) == ["a"]


def test_the_oldest_come_first_and_no_more_than_there_is_room_for() -> None:
    schedule = Lane(1, 10)
    for at, job_id in enumerate("cab"):
        schedule.add(job_id, at)
    assert schedule.start_due(9, 2) == ["c", "a"]
    assert schedule.start_due(9, 0) == []
    assert schedule.start_due(9, -1) == []
    assert schedule.start_due(9, 2) == ["b"]


def test_a_failed_one_waits_ever_longer_but_within_bounds_and_as_long_as_asked() -> None:
    schedule = Lane(1, 8)
    schedule.add("a", 0)
    now, pauses = 0.0, []
    for _ in range(50):
        assert schedule.start_due(now, 1) == ["a"]
        pauses.append(schedule.failed("a", now))
        assert schedule.next_due() == now + pauses[-1]
        now += pauses[-1]
    assert all(1 <= pause <= 8 for pause in pauses)
    assert pauses[0] <= 2
    assert max(pauses) > 4
    schedule.start_due(now, 1)
    assert schedule.failed("a", now, retry_after=600) == 600
    # The coordinator asked for it, and that others are accepted does not change its mind.
    schedule.hurry(now + 1)
    assert schedule.next_due() == now + 600


def test_the_tries_of_an_earlier_run_count() -> None:
    schedule = Lane(1, 1000)
    schedule.add("a", 0, failures=9)
    schedule.add("a", 0, failures=1)
    schedule.add("b", 0)
    assert [schedule.failures(job_id) for job_id in "abc"] == [9, 0, 0]
    schedule.start_due(0, 2)
    pauses = []
    for _ in range(40):
        pauses.append(schedule.failed("a", 0))
        schedule.start_due(10_000, 2)
    # From a ceiling of 2 s it would take nine more to get there.
    assert max(pauses[:5]) > 16
    assert schedule.failures("a") == 49


def test_one_success_makes_the_others_due() -> None:
    schedule = Lane(50, 100)
    for job_id in "ab":
        schedule.add(job_id, 0)
    schedule.start_due(0, 2)
    schedule.failed("a", 0)
    schedule.succeeded("b", 1)
    assert schedule.start_due(1, 2) == ["a"]


JOBS = st.sampled_from("abcd")
STEPS = st.lists(
    st.tuples(st.sampled_from(["add", "start", "ok", "fail", "hurry"]), JOBS, st.floats(0, 50)), max_size=60
)


@given(STEPS)
def test_no_report_is_ever_lost_or_sent_twice_at_once(steps: list[tuple[str, str, float]]) -> None:
    schedule, now = Lane(1, 10), 0.0
    waiting, sending = set[str](), set[str]()
    for step, job_id, passed in steps:
        now += passed
        match step:
            case "add":
                schedule.add(job_id, now)
                waiting |= {job_id} - sending
            case "start":
                taken = schedule.start_due(now, 2)
                assert len(taken) <= 2
                assert set(taken) <= waiting
                waiting, sending = waiting - set(taken), sending | set(taken)
            case "ok" if job_id in sending:
                schedule.succeeded(job_id, now)
                sending.remove(job_id)
            case "fail" if job_id in sending:
                assert 1 <= schedule.failed(job_id, now) <= 10
                sending.remove(job_id)
                waiting.add(job_id)
            case "hurry":
                schedule.hurry(now)
        assert (len(schedule), schedule.running) == (len(waiting | sending), len(sending))
        assert all(known in schedule for known in waiting | sending)
        assert (schedule.next_due() is None) == (not waiting)
    # All that waits comes to its turn.
    assert set(schedule.start_due(now + 10, 9)) == waiting
