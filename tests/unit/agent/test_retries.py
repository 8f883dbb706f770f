"""What becomes of a job that has failed: its report, another attempt here, or another node's."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from msgspec.structs import replace

from aitbc_miner.agent.fleet import Fleet
from aitbc_miner.agent.job_table import Stage
from aitbc_miner.agent.retries import RetryOnDemand
from aitbc_miner.errors import ErrorCode
from aitbc_miner.ipc.messages import CancelJob, Counted, JobSettled
from aitbc_miner.jobs import State
from aitbc_miner.queue.interface import Kind, QueueError
from aitbc_miner.queue.sqlite import SqliteQueue
from aitbc_miner.store.database import Database
from aitbc_miner.store.records import STATE, JobDir
from tests.bench.agent_bench import NODE, Desk, FlakyQueue, in_slot
from tests.support.mute_coordinator import Stranger
from tests.support.stopped_clock import Time

S = State
E = ErrorCode
RAN = (S.ACKED, S.PREP, S.RUNNING)
THRICE: dict[str, object] = {"retry": {"max_attempts": 3}}


class Judging(Desk):
    """Retries, and what they had reported."""

    def __init__(self, directory: Path, *, in_fleet: bool = False) -> None:
        self.in_fleet = in_fleet
        self.shared = FlakyQueue(Database(directory / "shared.db"))
        super().__init__(directory)

    def make_fleet(self) -> Fleet | None:
        return Fleet(self.shared, NODE, 60.0, Stranger()) if self.in_fleet else None

    @property
    def reported(self) -> list[str]:
        return self.among(Stage.REPORTING)

    @property
    def waits(self) -> list[str]:
        return self.among(Stage.RETRY_WAIT)

    def begun(self) -> list[str]:
        """Have the attempts begin that are due, name them, and have them run."""
        self.retries.start_due()
        begun = self.among(Stage.RESUMING)
        for job_id in begun:
            self.jobs.move(job_id, Stage.RUNNING)
        return begun

    def fail(self, code: ErrorCode | None, *steps: State, **more: object) -> None:
        """Have a job end with a code, and decide about it."""
        self.record("j1", *steps, **more)
        self.conclude("j1", code)
        self.retries.conclude("j1")

    def waiting(self) -> list[str]:
        """Give the retries that are noted for after a restart."""
        self.note_all()
        return [task.job_id for task, _ in self.context.queue.waiting(Kind.RUN, NODE)]


@pytest.fixture
def start(tmp_path: Path, time: Time) -> Iterator[Callable[..., Judging]]:
    desks: list[Judging] = []

    def make(*, in_fleet: bool = False) -> Judging:
        desks.append(Judging(tmp_path, in_fleet=in_fleet))
        return desks[-1]

    yield make
    for each in desks:
        each.close()


@pytest.fixture
def alone(start: Callable[..., Judging]) -> Judging:
    return start()


@pytest.fixture
def fleet(start: Callable[..., Judging]) -> Judging:
    return start(in_fleet=True)


# --- the report --------------------------------------------------------------------------------------------

REPORTED: dict[str, tuple[ErrorCode | None, tuple[State, ...], dict[str, object]]] = {
    "it went well": (None, RAN, THRICE),
    "it ran once and may no more": (E.E_LOST, RAN, {}),
    "its own fault": (E.E_EXIT, RAN, THRICE),
    "cancelled": (E.E_CANCELLED, RAN, THRICE),
    "no manifest": (E.E_MANIFEST, (), {}),
    "for another node": (E.E_NOGPU, (S.ACKED,), {}),
    "not on its list": (E.E_LOST, RAN, {"retry": {"max_attempts": 3, "on": ["E_SIGNAL"]}}),
    "never acknowledged": (E.E_INTERNAL, (), {}),
    "about its report": (E.E_LOST, (*RAN, S.UPLOADING), THRICE),
}


@pytest.mark.parametrize(("code", "steps", "more"), REPORTED.values(), ids=REPORTED)
def test_a_job_that_is_over_is_reported(
    alone: Judging, code: ErrorCode | None, steps: tuple[State, ...], more: dict[str, object]
) -> None:
    alone.fail(code, *steps, **more)
    assert (alone.reported, alone.waits, alone.waiting()) == (["j1"], [], [])
    with alone.context.records.open("j1") as job:
        assert job.state().attempt == 1
        assert job.has_outcome()


@pytest.mark.parametrize("name", ["state.json", "outcome.json", "manifest.json"])
def test_what_cannot_be_judged_is_reported(alone: Judging, name: str) -> None:
    alone.record("j1", *RAN, **THRICE)
    alone.conclude("j1", E.E_LOST)
    (alone.context.records.root / "j1" / name).write_bytes(b"{")
    alone.retries.conclude("j1")
    assert (alone.reported, alone.waits) == (["j1"], [])


def test_a_cancel_of_a_job_that_was_forgotten_meanwhile_enters_nothing(alone: Judging) -> None:
    alone.retries.settle(CancelJob("j1", "cancel", "by the operator"))
    assert (alone.reported, alone.jobs.names()) == ([], [])


def test_what_is_not_there_is_reported(alone: Judging) -> None:
    alone.retries.conclude("j1")
    alone.record("j2", *RAN, **THRICE)
    alone.retries.conclude("j2")
    assert alone.reported == ["j1", "j2"]


def test_a_full_disk_costs_a_job_no_attempt(
    alone: Judging, time: Time, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    alone.record("j1", *RAN, **THRICE)
    alone.conclude("j1", E.E_LOST)
    with monkeypatch.context() as patch:
        patch.setattr(JobDir, "write_state", full)
        alone.retries.conclude("j1")
        assert "No space left" in (alone.context.persisting.trouble or "")
    assert (alone.reported, alone.waits, alone.among(Stage.ENDED)) == ([], [], ["j1"])
    time.now += 1000.0
    alone.context.persisting.start_due()
    assert alone.context.persisting.trouble is None
    assert (alone.reported, alone.waits) == ([], ["j1"])


# --- another attempt here ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "steps", "more"),
    [(E.E_LOST, RAN, THRICE), (E.E_LOST, (S.ACKED, S.PREP), {}), (E.E_INTERNAL, (S.ACKED,), {})],
)
def test_a_job_that_may_be_tried_again_waits(
    alone: Judging, time: Time, code: ErrorCode, steps: tuple[State, ...], more: dict[str, object]
) -> None:
    alone.fail(code, *steps, **more)
    assert (alone.reported, alone.waits) == ([], ["j1"])
    assert alone.waiting() == ["j1"]
    with alone.context.records.open("j1") as job:
        state = job.state()
        assert (state.state, state.attempt, job.outcome()) == (S.RETRY_WAIT, 2, None)
        assert (alone.context.records.root / "j1/outcome.1.json").exists()
    said = alone.said()
    assert Counted("retries", str(code)) in said
    bounds = alone.context.config.heartbeat.backoff
    due = alone.retries.next_due()
    assert due is not None
    assert bounds.min_s <= due - time.now <= 2 * bounds.min_s
    assert alone.begun() == []
    time.now = due
    assert alone.begun() == ["j1"]
    assert (alone.waits, alone.retries.next_due()) == ([], None)
    assert alone.waiting() == []


def test_the_last_failure_is_the_report(alone: Judging, time: Time) -> None:
    alone.fail(E.E_LOST, *RAN, **THRICE)
    for attempt in (2, 3):
        assert alone.reported == []
        time.now += 1000.0
        assert alone.begun() == ["j1"]
        with alone.context.records.open("j1") as job:
            assert job.state().attempt == attempt
            for step in (S.PREP, S.RUNNING):
                job.move(step)
        alone.conclude("j1", E.E_LOST)
        alone.retries.conclude("j1")
    assert (alone.reported, alone.waits) == (["j1"], [])
    with alone.context.records.open("j1") as job:
        outcome = job.outcome()
    assert outcome is not None
    assert outcome.attempt == 3


def test_the_time_of_the_next_attempt_survives_a_restart(start: Callable[..., Judging], time: Time) -> None:
    before = start()
    before.fail(E.E_LOST, *RAN, **THRICE)
    before.note_all()
    due = before.retries.next_due()
    assert due is not None
    time.now += 2.0
    after = start()
    # What is not noted is tried at once, which loses nothing.
    after.retries.recovered(["j1", "j2"])
    assert after.begun() == ["j2"]
    assert after.retries.next_due() == pytest.approx(due)
    assert after.shown() == [S.RETRY_WAIT] * 2


def test_without_the_queue_a_job_is_tried_again_all_the_same(
    start: Callable[..., Judging], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def down(*_: object) -> None:
        raise QueueError("cannot write the queue: disk I/O error")

    for name in ("put", "waiting"):
        monkeypatch.setattr(SqliteQueue, name, down)
    alone = start()
    alone.fail(E.E_LOST, *RAN, **THRICE)
    alone.note_all()
    assert alone.waits == ["j1"]
    again = start()
    again.retries.recovered(["j1"])
    assert again.begun() == ["j1"]
    said = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert said == ["retry time not noted", "retry times not read"]


def test_an_operator_and_a_coordinator_may_end_the_wait(alone: Judging) -> None:
    alone.fail(E.E_LOST, *RAN, **THRICE)
    on_demand = RetryOnDemand(alone.context, None, alone.delivery)
    assert alone.begun() == []
    on_demand.retry("j1")
    assert alone.begun() == ["j1"]
    alone.conclude("j1", E.E_LOST)
    alone.retries.settle(JobSettled("j1"))
    assert alone.waits == ["j1"]
    for _ in range(2):
        alone.retries.settle(CancelJob("j1", "cancel", "by the coordinator"))
        assert (alone.waits, alone.reported) == ([], ["j1"])


def test_an_attempt_whose_slot_is_not_seen_free_yet_is_not_forgotten(alone: Judging, time: Time) -> None:
    # What the supervisor last said of its slots may be older than the end of the attempt.
    alone.fail(E.E_LOST, *RAN, **THRICE)
    time.now += 1000.0
    alone.jobs.see(in_slot("j1"))
    assert (alone.begun(), alone.waits) == ([], ["j1"])
    due = alone.retries.next_due()
    assert due is not None
    assert time.now < due < time.now + 1.0
    time.now = due
    alone.jobs.see(in_slot("j2"))
    assert (alone.begun(), alone.waits) == (["j1"], [])


# --- another node's ----------------------------------------------------------------------------------------


def test_what_another_node_may_do_better_is_left_to_it(fleet: Judging) -> None:
    fleet.fail(E.E_NOGPU, S.ACKED)
    fleet.turn_until(lambda: fleet.state("j1")[0] is S.FAILED)
    fleet.note_all()
    assert fleet.state("j1") == (S.FAILED, "handed_on")
    assert (fleet.reported, fleet.waits) == ([], [])
    (task,) = fleet.shared.due("node-b", 9)
    assert (task.job_id, task.node, task.attempts, task.max_attempts) == ("j1", NODE, 1, 5)
    row = fleet.context.ledger.of("j1")
    assert row is not None
    assert row.delivery == "handed_on"
    assert fleet.coordinator.told == []


def test_what_another_node_has_already_is_lost_here(fleet: Judging) -> None:
    fleet.record("j1", S.ACKED)
    with fleet.context.records.open("j1") as job:
        job.write_state(replace(job.state(), lease="an old token"))
    fleet.conclude("j1", E.E_NOGPU)
    fleet.retries.conclude("j1")
    fleet.note_all()
    assert (fleet.state("j1"), fleet.reported) == ((S.FAILED, "lost"), [])


def test_without_the_fleet_it_is_reported(fleet: Judging, caplog: pytest.LogCaptureFixture) -> None:
    fleet.shared.down = True
    fleet.fail(E.E_NOGPU, S.ACKED)
    fleet.note_all()
    assert (fleet.reported, fleet.state("j1")) == (["j1"], (S.ACKED, None))
    assert [record.getMessage() for record in caplog.records] == ["job not handed on"]


def test_what_a_broken_record_keeps_from_being_handed_on_is_reported(fleet: Judging) -> None:
    fleet.record("j1", S.ACKED)
    fleet.conclude("j1", E.E_NOGPU)
    (fleet.context.records.root / "j1/manifest.json").unlink()
    fleet.retries.conclude("j1")
    fleet.note_all()
    assert fleet.reported == ["j1"]
    assert (fleet.context.records.root / "j1" / STATE).exists()


def test_a_crash_after_handing_on_hands_the_same_on_once_more(fleet: Judging, time: Time) -> None:
    fleet.record("j1", S.ACKED)
    outcome = fleet.conclude("j1", E.E_NOGPU)
    with fleet.context.records.open("j1") as job:
        assert Fleet(fleet.shared, NODE, 60.0, Stranger()).hand_on(job, outcome, 5)
    # That much is in the queue; the record knows nothing of it.
    fleet.retries.conclude("j1")
    fleet.note_all()
    assert fleet.state("j1") == (S.FAILED, "handed_on")
    assert [task.job_id for task in fleet.shared.due("node-b", 9)] == ["j1"]
