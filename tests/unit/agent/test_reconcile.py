"""What we are at work on, compared with what the coordinator believes: taken up, ended, left alone."""

import errno
from collections.abc import Iterator
from pathlib import Path

import pytest
from msgspec.structs import replace

from aitbc_miner.agent.job_table import Stage
from aitbc_miner.agent.reconcile import AGAIN_S, MAX_BUSY, Reconciler
from aitbc_miner.coordinator.interface import Assignment, Busy, Paced, PulledJob, Unreachable
from aitbc_miner.coordinator.interface import Assignments as Told
from aitbc_miner.errors import ErrorCode
from aitbc_miner.ipc.messages import Beaten, BeatWanted, CancelJob, NodeToken, PrivateLine
from aitbc_miner.jobs import ManifestError, State
from tests.bench.agent_bench import FREE, Desk
from tests.support.pulled_jobs import pulled
from tests.support.stopped_clock import Time


class Compared(Desk):
    """The list, and what the agent would know; `told` is what the coordinator answers."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.told: Told | Exception | None = Told([])
        self.asks = 0
        self.ours: set[str] = set()
        self.reporting: set[str] = set()
        self.accepted: list[str] = []
        self.refused: list[ManifestError] = []
        self.repeated: list[str] = []
        self.cancelled: list[CancelJob] = []
        self.meanwhile: list[str] = []
        self.coordinator.assignments = self.answer  # type: ignore[method-assign]
        self.admission.accept = self.accept  # type: ignore[method-assign]
        self.admission.cancel = self.cancelled.append  # type: ignore[method-assign,assignment]
        self.delivery.repeat = self.repeated.append  # type: ignore[method-assign,assignment]
        self.jobs.ours = lambda: set(self.ours)  # type: ignore[method-assign]
        self.jobs.names = lambda: [*self.ours, *self.reporting]  # type: ignore[method-assign]
        self.list = Reconciler(self.context, self.admission, self.delivery)
        self.jobs.see(FREE)

    def answer(self) -> Told | None:
        self.asks += 1
        assert self.jobs.came is not None
        self.jobs.came.update(self.meanwhile)
        if isinstance(self.told, Exception):
            raise self.told
        return self.told

    def accept(self, job: PulledJob) -> bool:
        if job.error:
            self.refused.append(job.error)
        else:
            assert job.manifest
            self.accepted.append(job.manifest.job_id)
        return True

    def lists(self, *job_ids: str, complete: bool = True, left_s: float | None = None) -> None:
        """Have the coordinator list these jobs from now on."""
        self.told = Told([Assignment(each, pulled(job_id=each), left_s) for each in job_ids], complete)

    def hear(self, *words: PrivateLine) -> None:
        """Have the heartbeat say something."""
        for word in words:
            self.heartbeat.send(word)
        assert self.context.token.receive()
        self.list.heard()

    def ask(self) -> None:
        before = self.asks
        self.list.hurry()
        self.list.start_due()
        self.turn_until(lambda: self.asks > before and not self.list._asking)


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Compared]:
    made = Compared(tmp_path)
    made.register()
    yield made
    made.close()


def test_a_job_that_we_never_heard_of_is_taken_up(desk: Compared) -> None:
    desk.ours = {"here"}
    desk.lists("here", "lost")
    desk.ask()
    assert desk.accepted == ["lost"]
    assert desk.list.asked


def test_a_job_whose_time_is_over_is_not_begun(desk: Compared) -> None:
    desk.lists("late", left_s=-5.0)
    desk.ask()
    assert desk.accepted == []
    (error,) = desk.refused
    assert (error.job_id, error.code) == ("late", ErrorCode.E_TIMEOUT)


@pytest.mark.parametrize("reporting", [False, True])
def test_what_is_under_way_is_left_alone(desk: Compared, reporting: bool) -> None:
    (desk.reporting if reporting else desk.ours).add("here")
    desk.lists("here")
    desk.ask()
    assert (desk.accepted, desk.repeated, desk.cancelled) == ([], [], [])


def test_a_report_that_the_coordinator_has_not_heard_is_repeated(desk: Compared) -> None:
    desk.record("j1", State.UPLOADING, State.DONE)
    desk.lists("j1")
    desk.ask()
    assert (desk.accepted, desk.repeated) == ([], ["j1"])


def test_a_job_that_came_and_was_done_while_the_list_was_made_is_left_alone(desk: Compared) -> None:
    desk.record("j1", State.UPLOADING, State.DONE)
    desk.meanwhile = ["j1"]
    desk.lists("j1")
    desk.ask()
    assert desk.repeated == []


def test_one_that_was_reported_while_the_list_was_made_is_left_alone(desk: Compared) -> None:
    """Its report would count a second time."""
    desk.record("j1", State.UPLOADING, State.DONE)
    desk.reporting = {"j1"}
    desk.list.hurry()
    desk.lists("j1")
    desk.list.start_due()
    desk.reporting = set()
    desk.turn_until(lambda: not desk.list._asking)
    assert desk.repeated == []


def test_what_vanishes_is_ended_when_it_is_missing_twice(desk: Compared, time: Time) -> None:
    desk.record("j1")
    desk.ours = {"j1"}
    desk.ask()
    assert desk.cancelled == []
    desk.ask()
    assert desk.cancelled == [], "first it has to be said whether the coordinator knows us"
    assert BeatWanted() in desk.heartbeat.receive()
    desk.hear(Beaten())
    due = desk.list.next_due()
    assert due is not None
    assert due <= time.now, "the second list is asked for at once"
    desk.ask()
    assert desk.cancelled == [CancelJob("j1", "cancel", "by the coordinator")]


def test_what_vanishes_from_a_coordinator_that_has_forgotten_us_goes_on(desk: Compared) -> None:
    desk.record("j1")
    desk.ours = {"j1"}
    desk.ask()
    desk.hear(NodeToken("another", forgotten=True), Beaten())
    for _ in range(4):
        desk.ask()
        desk.hear(Beaten())
    assert desk.cancelled == []
    # Those that have come since can be cancelled like any other.
    desk.record("j2")
    desk.ours = {"j1", "j2"}
    desk.ask()
    desk.hear(Beaten())
    desk.ask()
    assert [word.job_id for word in desk.cancelled] == ["j2"]


def test_what_is_back_on_the_list_goes_on(desk: Compared) -> None:
    desk.record("j1")
    desk.ours = {"j1"}
    desk.ask()
    desk.lists("j1")
    desk.ask()
    desk.lists()
    desk.ask()
    assert desk.cancelled == []


def test_a_job_that_came_after_the_list_was_asked_for_has_not_vanished(desk: Compared) -> None:
    for _ in range(2):
        desk.list.hurry()
        desk.list.start_due()
        desk.ours = {"j1"}
        desk.turn_until(lambda: not desk.list._asking)
        desk.ours = set()
    assert desk.cancelled == []


def test_a_list_that_is_cut_off_ends_nothing(desk: Compared) -> None:
    desk.record("j1")
    desk.ours = {"j1"}
    desk.lists(complete=False)
    for _ in range(3):
        desk.ask()
    assert desk.cancelled == []


def test_a_job_of_another_node_of_the_fleet_is_on_its_list(desk: Compared) -> None:
    desk.record("j1")
    with desk.context.records.open("j1") as job:
        job.move(State.ACKED, origin="node-b")
    desk.ours = {"j1"}
    for _ in range(2):
        desk.ask()
    assert desk.cancelled == []


def test_what_is_waited_for_no_longer_is_ended(desk: Compared, time: Time) -> None:
    desk.record("j1")
    desk.record("j2")
    desk.ours = {"j1", "j2"}
    desk.lists("j1", "j2", left_s=30.0)
    desk.ask()
    desk.ours = {"j1"}
    time.now += 29
    desk.list.start_due()
    assert desk.cancelled == []
    time.now += 2
    desk.list.start_due()
    assert desk.cancelled == [CancelJob("j1", "expired", "the coordinator no longer waits for the job")]


@pytest.mark.parametrize(
    "error", [Unreachable("away"), Busy("busy", 9.0), Paced("slowly", 7.0), ValueError()]
)
def test_a_list_that_cannot_be_had_ends_nothing_and_is_asked_for_again(
    error: Exception, desk: Compared, time: Time
) -> None:
    desk.record("j1")
    desk.ours = {"j1"}
    desk.told = error
    for _ in range(3):
        desk.ask()
    assert desk.cancelled == []
    assert desk.list.asked, "new work does not wait for it"
    due = desk.list.next_due()
    assert due is not None
    assert due >= time.now + AGAIN_S


def test_a_coordinator_without_a_list_is_asked_once(desk: Compared) -> None:
    desk.told = None
    desk.ask()
    assert desk.list.next_due() is None
    desk.list.hurry()
    desk.list.start_due()
    assert (desk.asks, desk.list.asked) == (1, True)


def test_without_a_token_nobody_is_asked(tmp_path: Path) -> None:
    desk = Compared(tmp_path)
    desk.list.start_due()
    assert (desk.asks, desk.list.next_due()) == (0, None)
    desk.close()


def test_what_is_listed_again_is_not_forgotten_there_and_can_be_cancelled(desk: Compared) -> None:
    """One odd 404 to a heartbeat says that all is forgotten."""
    desk.record("j1")
    desk.ours = {"j1"}
    desk.hear(NodeToken("another", forgotten=True), Beaten())
    desk.lists("j1")
    desk.ask()
    desk.lists()
    desk.ask()
    desk.hear(Beaten())
    desk.ask()
    assert [word.job_id for word in desk.cancelled] == ["j1"]


def test_books_that_cannot_be_read_now_end_no_agent(
    desk: Compared, time: Time, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreadable(_job_id: str) -> bool:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as broken:
        broken.setattr(desk.context.records, "known", unreadable)
        desk.lists("lost")
        desk.ask()
        due = desk.list.next_due()
        assert due is not None
        assert due >= time.now + AGAIN_S
    desk.ask()
    assert desk.accepted == ["lost"]


def test_of_an_endless_list_so_many_are_taken_up_as_one_can_have(desk: Compared) -> None:
    desk.reporting = {"here"}
    desk.lists(*(f"j{n}" for n in range(2 * MAX_BUSY)))
    desk.ask()
    assert len(desk.accepted) == 1, "there is one slot"


@pytest.mark.parametrize("accepting", [True, False])
def test_no_more_is_taken_up_than_the_slots_can_have_waiting(desk: Compared, *, accepting: bool) -> None:
    desk.jobs.see(replace(FREE, slots=FREE.slots * 3, accepting=accepting))
    desk.jobs.move("here", Stage.RESUMING)
    desk.lists(*(f"j{n}" for n in range(20)))
    desk.ask()
    assert len(desk.accepted) == (2 if accepting else 0)


def test_a_listed_id_that_is_no_job_id_is_passed_over(desk: Compared) -> None:
    desk.told = Told([Assignment(name, PulledJob(b""), None) for name in ("..", "../x", "")])
    desk.told.jobs.append(Assignment("j1", pulled(job_id="j1"), None))
    desk.ask()
    assert desk.accepted == ["j1"]


def test_no_list_is_asked_for_before_there_are_slots(desk: Compared) -> None:
    desk.jobs.slots = replace(FREE, slots=[])
    assert desk.list.next_due() is None
    desk.jobs.see(FREE)
    desk.ask()
    assert desk.asks == 1
