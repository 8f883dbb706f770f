"""Reports: which go when, past which others, and what is left of them for after a restart."""

import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from aitbc_miner.agent import delivery_queue
from aitbc_miner.agent.context import POOLS, Pool
from aitbc_miner.agent.delivery_queue import LARGE_BYTES, DeliveryQueue
from aitbc_miner.agent.fleet import Fleet
from aitbc_miner.agent.job_table import Stage
from aitbc_miner.config.settings import GiveUp
from aitbc_miner.coordinator.interface import Busy, CoordinatorError, Gone, Refused, Unauthorized, Unreachable
from aitbc_miner.errors import ErrorCode
from aitbc_miner.ipc.messages import Counted, Deliveries
from aitbc_miner.jobs import Artifact, State
from aitbc_miner.queue.interface import Kind, QueueError, Task
from aitbc_miner.queue.sqlite import SqliteQueue
from aitbc_miner.store.database import Database
from aitbc_miner.store.records import JobDir
from tests.bench.agent_bench import LARGE, NODE, Desk, FlakyQueue
from tests.support.mute_coordinator import Stranger
from tests.support.stopped_clock import Time


class Reporting(Desk):
    """A reporter, and jobs with outcomes."""

    @property
    def reporting(self) -> list[str]:
        return self.among(Stage.REPORTING)

    def ended(self, job_id: str, code: ErrorCode | None = None, *artifacts: Artifact) -> None:
        """Record a job that has come to its end."""
        self.record(job_id, State.ACKED, State.PREP, State.RUNNING)
        self.conclude(job_id, code, artifacts)

    def add(self, job_id: str, code: ErrorCode | None = None, *artifacts: Artifact) -> None:
        """Record a job that has ended, and have it reported."""
        self.ended(job_id, code, *artifacts)
        self.delivery.add(job_id)

    def send(self) -> None:
        """Send what is due, and wait for what comes of it."""
        self.delivery.start_due()
        self.turn_until(lambda: not any(lane.running for lane in self.delivery._lanes.values()))
        self.note_all()

    def waiting(self) -> list[tuple[str, int]]:
        """Give the reports that are noted for after a restart, with their attempts."""
        return [(task.job_id, task.attempts) for task, _ in self.context.queue.waiting(Kind.REPORT, NODE)]


@pytest.fixture
def start(tmp_path: Path, time: Time) -> Iterator[Callable[[], Reporting]]:
    desks: list[Reporting] = []

    def make() -> Reporting:
        desks.append(Reporting(tmp_path))
        desks[-1].register()
        return desks[-1]

    yield make
    for each in desks:
        each.close()


@pytest.fixture
def desk(start: Callable[[], Reporting]) -> Reporting:
    return start()


AWAY = Unreachable("cannot report: connection refused")


def test_an_accepted_report_is_in_the_books_and_out_of_the_way(desk: Reporting) -> None:
    desk.add("good", None, Artifact("a", "artifacts/0000", 70, "0" * 64))
    desk.add("bad", ErrorCode.E_EXIT)
    assert ("good" in desk.reporting, len(desk.reporting)) == (True, 2)
    assert Deliveries(2, None) in desk.said()
    desk.send()
    assert sorted(desk.coordinator.told) == [("fail", "bad"), ("result", "good")]
    assert (len(desk.reporting), desk.delivery.next_due()) == (0, None)
    rows = {row.job_id: row for row in desk.context.ledger.latest(9)}
    assert {job_id: (row.code, row.delivery) for job_id, row in rows.items()} == {
        "good": (None, "accepted"),
        "bad": ("E_EXIT", "accepted"),
    }
    assert rows["good"].artifact_bytes == 70
    said = desk.said()
    assert said.count(Counted("deliveries", "accepted")) == 2
    assert Deliveries(0, None) in said
    # What never failed was never noted.
    assert desk.waiting() == []


def test_a_report_is_in_the_books_before_it_is_forgotten(
    desk: Reporting, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk.add("j1")

    def full(*_: object) -> None:
        raise QueueError("cannot write: full")

    with monkeypatch.context() as patch:
        patch.setattr(desk.context.ledger, "enter", full)
        desk.send()
    assert "j1" in desk.reporting
    desk.delivery.hurry()
    desk.send()
    assert desk.context.ledger.knows("j1")
    assert desk.state("j1") == (State.DONE, "accepted")


# --- lanes -------------------------------------------------------------------------------------------------


def test_no_small_report_waits_for_large_ones(desk: Reporting) -> None:
    large = [f"large{number}" for number in range(POOLS["upload"] + 2)]
    for job_id in large:
        desk.coordinator.gates[job_id] = threading.Event()
        desk.add(job_id, None, LARGE)
    desk.delivery.start_due()
    desk.turn_until(lambda: len(desk.coordinator.told) == POOLS["upload"])
    for number in range(9):
        desk.add(f"small{number}", ErrorCode.E_EXIT)

    def small_are_through() -> bool:
        desk.delivery.start_due()
        return len(desk.reporting) == len(large)

    desk.turn_until(small_are_through)
    # All that time no more than so many large ones were under way, and none of them came through.
    begun = {job_id for _, job_id in desk.coordinator.told if job_id in large}
    assert begun == set(large[: POOLS["upload"]])
    assert desk.delivery.next_due() is None
    for gate in desk.coordinator.gates.values():
        gate.set()

    def all_are_through() -> bool:
        desk.delivery.start_due()
        return len(desk.reporting) == 0

    desk.turn_until(all_are_through)


@pytest.mark.parametrize(("size", "lane"), [(LARGE_BYTES, "report"), (LARGE_BYTES + 1, "upload")])
def test_it_is_the_size_of_all_artifacts_that_counts(desk: Reporting, size: int, lane: str) -> None:
    half = Artifact("a", "artifacts/0000", size // 2, "0" * 64)
    rest = Artifact("b", "artifacts/0001", size - size // 2, "0" * 64)
    desk.add("j1", None, half, rest)
    assert {name: len(each) for name, each in desk.delivery._lanes.items() if len(each)} == {lane: 1}


@pytest.mark.parametrize(("pool", "code"), [("report", None), ("fail", ErrorCode.E_EXIT)])
def test_no_more_small_ones_are_under_way_than_there_are_threads(
    pool: Pool, code: ErrorCode | None, desk: Reporting
) -> None:
    for number in range(POOLS[pool] + 2):
        desk.coordinator.gates[f"j{number}"] = threading.Event()
        desk.add(f"j{number}", code)
    desk.delivery.start_due()
    desk.delivery.start_due()
    desk.turn_until(lambda: len(desk.coordinator.told) == POOLS[pool])
    assert desk.delivery.next_due() is None
    for gate in desk.coordinator.gates.values():
        gate.set()
    desk.send()
    desk.send()
    assert len(desk.reporting) == 0


# --- failures ----------------------------------------------------------------------------------------------


def test_a_report_is_sent_until_it_is_accepted_and_then_nothing_is_left_of_it(
    desk: Reporting, time: Time
) -> None:
    desk.coordinator.answers["result"] = [AWAY] * 7
    desk.add("j1")
    for tries in range(1, 8):
        desk.send()
        assert desk.waiting() == [("j1", tries)]
        due = desk.delivery.next_due()
        assert due is not None
        assert time.now < due <= time.now + desk.context.config.heartbeat.backoff.max_s
        # Not before its time.
        desk.delivery.start_due()
        assert len(desk.coordinator.told) == tries
        time.now = due
    assert desk.context.error == str(AWAY)
    desk.send()
    assert (desk.waiting(), len(desk.reporting)) == ([], 0)
    assert not desk.context.error
    assert len(set(desk.coordinator.keys)) == 1


def test_the_times_of_failed_reports_survive_a_restart(start: Callable[[], Reporting], time: Time) -> None:
    before = start()
    before.coordinator.answers["result"] = [Busy("cannot report: 503", 500.0)] * 3
    before.add("j1")
    before.add("j2", ErrorCode.E_EXIT)
    for _ in range(3):
        before.delivery._lanes["report"]._due["j1"] = time.now
        before.send()
    left_s = (before.delivery.next_due() or 0.0) - time.now
    assert left_s == 500.0
    time.now += 100.0
    after = start()
    after.delivery.recovered()
    after.delivery.add("j1")
    assert after.delivery.next_due() == pytest.approx(time.now + 400.0)
    after.send()
    assert after.coordinator.told == []
    # Its tries count on: the pause is that of a fourth failure.
    assert after.delivery._lanes["report"].failures("j1") == 3
    time.now += 401.0
    after.coordinator.answers["result"] = [AWAY]
    after.send()
    assert after.waiting() == [("j1", 4)]
    time.now += 1000.0
    after.send()
    assert (after.waiting(), after.state("j1")) == ([], (State.DONE, "accepted"))


def test_a_report_that_was_noted_is_forgotten_even_if_it_is_accepted_at_once_after_a_restart(
    start: Callable[[], Reporting], time: Time
) -> None:
    before = start()
    before.ended("j1")
    before.context.queue.put(Task(Kind.REPORT, "j1", NODE, attempts=2), 5.0)
    after = start()
    after.delivery.recovered()
    after.delivery.add("j1")
    time.now += 5.0
    after.send()
    assert after.waiting() == []


def test_without_the_queue_reports_are_sent_all_the_same(
    desk: Reporting, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def down(*_: object) -> None:
        raise QueueError("cannot read the queue: disk I/O error")

    for name in ("waiting", "put", "remove", "dead", "bury"):
        monkeypatch.setattr(SqliteQueue, name, down)
    desk.delivery.recovered()
    desk.coordinator.answers = {"result": [AWAY]}
    desk.add("j1")
    desk.send()
    desk.delivery.hurry()
    desk.send()
    assert desk.state("j1") == (State.DONE, "accepted")
    said = {record.getMessage() for record in caplog.records}
    assert {"report times not read", "report not accepted", "report time not noted"} <= said


def test_one_that_is_accepted_lets_the_others_of_both_lanes_not_wait(desk: Reporting, time: Time) -> None:
    desk.coordinator.answers["result"] = [AWAY, AWAY, Busy("cannot report: 503", 900.0)]
    desk.add("small")
    desk.send()
    desk.add("large", None, LARGE)
    desk.send()
    desk.add("asked")
    desk.send()
    desk.add("now", ErrorCode.E_EXIT)
    desk.send()
    assert sorted(desk.reporting) == ["asked", "large", "small"]
    desk.send()
    # But for those that were to wait.
    assert desk.reporting == ["asked"]
    assert desk.delivery.next_due() == time.now + 900.0


def test_nothing_is_sent_without_a_token(tmp_path: Path) -> None:
    desk = Reporting(tmp_path)
    desk.add("j1")
    assert desk.delivery.next_due() is None
    desk.delivery.start_due()
    assert desk.delivery._lanes["report"].running == 0
    desk.register()
    desk.send()
    assert desk.coordinator.told == [("result", "j1")]
    desk.coordinator.answers["result"] = [Unauthorized("cannot report: 401")]
    desk.add("j2")
    desk.send()
    assert desk.heartbeat.receive()
    desk.close()


# --- the end of a report -----------------------------------------------------------------------------------


@pytest.mark.parametrize("outcome", [None, ErrorCode.E_EXIT])
def test_what_is_not_ours_any_more_is_superseded(desk: Reporting, outcome: ErrorCode | None) -> None:
    desk.coordinator.answers = {"result": [Gone("409", 409)], "fail": [Gone("410", 410)]}
    desk.add("j1", outcome)
    desk.send()
    row = desk.context.ledger.of("j1")
    assert row is not None
    assert (row.delivery, len(desk.reporting), desk.context.queue.dead()) == ("superseded", 0, [])
    assert Counted("deliveries", "superseded") in desk.said()


def test_what_is_refused_is_among_the_dead_and_counted_over_restarts(start: Callable[[], Reporting]) -> None:
    before = start()
    before.coordinator.answers = {"result": [Refused("413 too large", 413)], "fail": [Refused("400", 400)]}
    before.add("j1")
    before.send()
    (dead,) = before.context.queue.dead()
    assert (dead.kind, dead.job_id, dead.node) == (Kind.REPORT, "j1", NODE)
    assert "413 too large" in dead.reason
    assert (len(before.reporting), before.context.refused) == (0, 1)
    after = start()
    after.delivery.recovered()
    assert after.context.refused == 1
    assert (after.waiting(), len(after.reporting)) == ([], 0)


def test_a_refused_report_is_sent_anew_each_day_and_after_a_reboot(
    start: Callable[[], Reporting], time: Time, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk = start()
    desk.coordinator.answers = {"result": [Refused("413", 413)] * 2, "fail": [Refused("400", 400)] * 2}
    desk.add("j1")
    desk.send()
    time.now += 86_000.0
    desk.send()
    assert desk.coordinator.told == [("result", "j1"), ("fail", "j1")]
    time.now += 500.0
    assert (desk.delivery.next_due() or time.now) <= time.now
    desk.send()
    assert (len(desk.coordinator.told), desk.context.refused) == (4, 1)
    after = start()
    after.delivery.recovered()
    after.send()
    assert after.coordinator.told == []
    monkeypatch.setattr(delivery_queue, "boot_id", lambda: "another")
    after.delivery.recovered()
    after.send()
    assert after.coordinator.told == [("result", "j1")]
    assert (after.state("j1"), after.context.refused) == ((State.DONE, "accepted"), 0)
    row = after.context.ledger.of("j1")
    assert row is not None
    assert (row.code, row.delivery) == (None, "accepted")


@pytest.mark.parametrize("by_operator", [False, True])
def test_a_report_that_is_under_way_again_is_not_taken_back(
    start: Callable[[], Reporting], time: Time, *, by_operator: bool
) -> None:
    """The coordinator has forgotten the failure that it was told of, and wants it again."""
    desk = start()
    desk.coordinator.answers = {"result": [Refused("413", 413)], "fail": []}
    desk.add("j1")
    desk.send()
    desk.coordinator.answers = {"fail": [Busy("503", 100_000.0)]}
    desk.delivery.repeat("j1")
    desk.send()
    if by_operator:
        assert not desk.delivery.take_back("j1")
    time.now += 90_000.0
    desk.send()
    assert desk.reporting == ["j1"]
    time.now += 90_000.0
    desk.send()
    told = [("result", "j1"), ("fail", "j1"), ("fail", "j1"), ("fail", "j1")]
    assert (desk.reporting, desk.coordinator.told) == ([], told)


def test_what_is_gone_from_the_disk_is_not_sent_anew(start: Callable[[], Reporting], time: Time) -> None:
    desk = start()
    desk.coordinator.answers = {"result": [Refused("413", 413)]}
    desk.add("j1")
    desk.send()
    shutil.rmtree(desk.context.records.root / "j1")
    time.now += 90_000.0
    desk.send()
    assert desk.coordinator.told == [("result", "j1"), ("fail", "j1")]
    assert desk.delivery.next_due() is None


def test_the_success_of_others_does_not_hurry_what_is_refused(desk: Reporting, time: Time) -> None:
    give_up = GiveUp()
    desk.delivery._give_up = give_up
    desk.coordinator.answers = {"result": [Refused("413", 413)]}
    desk.add("j1")
    desk.send()
    desk.add("j2")
    desk.send()
    desk.send()
    assert desk.coordinator.told == [("result", "j1"), ("result", "j2")]
    time.now += 10.0
    desk.send()
    assert desk.coordinator.told[2:] == [("result", "j1")]


def test_a_failed_report_that_is_refused_at_last_does_not_wait_any_more(desk: Reporting, time: Time) -> None:
    desk.coordinator.answers["fail"] = [CoordinatorError("500"), Refused("400", 400)]
    desk.add("j1", ErrorCode.E_EXIT)
    desk.send()
    time.now += 1000.0
    desk.send()
    assert (desk.waiting(), [task.job_id for task in desk.context.queue.dead()]) == ([], ["j1"])


def test_a_job_without_a_readable_outcome_keeps_its_place(desk: Reporting) -> None:
    desk.ended("j1")
    outcome = desk.context.records.root / "j1/outcome.json"
    good = outcome.read_bytes()
    outcome.write_bytes(b"{")
    desk.delivery.add("j1")
    desk.send()
    assert "j1" in desk.reporting
    assert desk.coordinator.told == []
    outcome.write_bytes(good)
    desk.delivery.hurry()
    desk.send()
    assert desk.coordinator.told == [("result", "j1")]


# --- in a fleet --------------------------------------------------------------------------------------------


def test_a_report_goes_only_for_a_job_that_is_ours(desk: Reporting, tmp_path: Path, time: Time) -> None:
    queue = FlakyQueue(Database(tmp_path / "shared.db"))
    fleet = Fleet(queue, NODE, 60.0, Stranger())
    desk.delivery = DeliveryQueue(desk.context, fleet)
    for job_id in ("ours", "theirs"):
        desk.record(job_id, State.ACKED, retry={"max_attempts": 2})
        with desk.context.records.open(job_id) as job:
            assert hold(fleet, job)
        desk.conclude(job_id)
    time.now += 61.0
    assert queue.claim(Kind.RUN, "theirs", "node-b", 60.0)
    for job_id in ("ours", "theirs"):
        desk.delivery.add(job_id)
    desk.send()
    assert desk.coordinator.told == [("result", "ours")]
    assert desk.state("theirs") == (State.FAILED, "lost")
    # Ours is done for the fleet, theirs is theirs.
    assert queue.due("node-c", 9) == []
    time.now += 61.0
    assert [task.job_id for task in queue.due("node-c", 9)] == []
    assert [task.job_id for task in queue.dead()] == ["theirs"]
    row = desk.context.ledger.of("theirs")
    assert row is not None
    assert row.delivery == "lost"


def hold(fleet: Fleet, job: JobDir) -> bool:
    return fleet.hold(job, job.manifest())


def test_a_report_waits_for_the_queue_when_the_lease_is_over(
    desk: Reporting, tmp_path: Path, time: Time
) -> None:
    queue = FlakyQueue(Database(tmp_path / "shared.db"))
    fleet = Fleet(queue, NODE, 60.0, Stranger())
    desk.delivery = DeliveryQueue(desk.context, fleet)
    for job_id in ("early", "late"):
        desk.record(job_id, State.ACKED, retry={"max_attempts": 2})
        with desk.context.records.open(job_id) as job:
            assert hold(fleet, job)
        desk.conclude(job_id)
    queue.down = True
    desk.delivery.add("early")
    desk.send()
    assert desk.coordinator.told == [("result", "early")]
    time.now += 61.0
    desk.delivery.add("late")
    desk.send()
    assert desk.coordinator.told == [("result", "early")]
    assert desk.reporting == ["late"]
    queue.down = False
    desk.delivery.hurry()
    desk.send()
    assert desk.coordinator.told[1:] == [("result", "late")]
