"""Jobs on their way into a slot: none is lost on it, and none takes another's place."""

import logging
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from msgspec.structs import replace

from aitbc_miner.agent.admission import Admission, Taken
from aitbc_miner.agent.admission_queue import id_of
from aitbc_miner.agent.job_table import TAKEN_IN, JobEntry, Stage
from aitbc_miner.coordinator.interface import CoordinatorError, Gone, PulledJob, Refused
from aitbc_miner.errors import ErrorCode
from aitbc_miner.ipc.messages import CancelJob, JobReady, Slots, SlotView
from aitbc_miner.jobs import ManifestError, State
from aitbc_miner.slots.state import SlotState
from tests.bench.agent_bench import FREE, OFFER, Desk, in_slot
from tests.support.pulled_jobs import pulled
from tests.support.stopped_clock import Time

BY_OPERATOR = CancelJob("j1", "cancel", "by the operator")
ON_THE_WAY = (Stage.RESUMING, *TAKEN_IN)
ODD: list[Exception] = [
    ValueError("odd"),
    RecursionError("deep"),
    OSError(28, "No space left on device"),
    CoordinatorError("cannot talk: 500"),
]


class Taking(Desk):
    """A workbench of which the admission queue is looked at."""

    def ready(self, n: int = 1) -> list[str]:
        """Wait for so many jobs that are ready for a slot."""
        named: list[str] = []

        def all_are() -> bool:
            named.extend(each.ticket.job_id for each in self.said() if isinstance(each, JobReady))
            return len(named) >= n

        self.turn_until(all_are)
        return named


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Taking]:
    made = Taking(tmp_path)
    yield made
    made.close()


def slots(*names: str, job_id: str | None = None) -> Slots:
    state = SlotState.BUSY if job_id else SlotState.IDLE
    views = [SlotView(replace(OFFER, name=name), state, free=job_id is None, job_id=job_id) for name in names]
    return Slots(views, [], accepting=True)


def test_a_pulled_job_takes_a_place_until_it_is_in_a_slot(desk: Taking) -> None:
    assert desk.jobs.room() == []
    desk.jobs.see(slots("a", "b"))
    assert len(desk.jobs.room()) == 2
    desk.admission.accept(pulled())
    assert (desk.jobs.stage("j1") in TAKEN_IN, desk.among(*ON_THE_WAY), len(desk.jobs.room())) == (
        True,
        ["j1"],
        1,
    )
    assert desk.ready() == ["j1"]
    assert len(desk.jobs.room()) == 1
    assert "j1" in desk.jobs.ours()
    desk.jobs.see(slots("a", job_id="j1"))
    assert (desk.among(*ON_THE_WAY), desk.jobs.room()) == ([], [])


def test_nothing_fits_into_a_node_that_takes_nothing(desk: Taking) -> None:
    desk.jobs.see(Slots(FREE.slots, [], accepting=False))
    assert desk.jobs.room() == []


def test_a_job_that_is_settled_leaves_its_place(desk: Taking) -> None:
    desk.jobs.see(FREE)
    desk.admission.accept(pulled())
    desk.ready()
    for _ in range(2):
        desk.retries.settle(CancelJob("j1", "cancel", "an operator"))
        assert (desk.jobs.stage("j1"), len(desk.jobs.room())) == (Stage.REPORTING, 1)


@pytest.mark.parametrize("manifest", [True, False])
def test_a_job_that_cannot_be_done_is_settled(desk: Taking, manifest: bool) -> None:
    desk.jobs.see(FREE)
    error = ManifestError("cannot read the manifest: odd", "j1")
    job = pulled(requirements={"gpu": True}) if manifest else PulledJob(b"{}", error=error)
    desk.admission.accept(job)
    desk.turn_until(lambda: desk.among(Stage.REPORTING))
    assert (desk.among(Stage.REPORTING), desk.jobs.names()) == (["j1"], ["j1"])
    with desk.context.records.open("j1") as opened:
        outcome = opened.outcome()
    assert outcome is not None
    assert outcome.code is (ErrorCode.E_NOGPU if manifest else ErrorCode.E_MANIFEST)


@pytest.mark.parametrize("answer", [Gone("cannot accept: 409", 409), Refused("400", 400)])
def test_a_job_that_is_not_ours_is_on_no_way_any_more(desk: Taking, answer: Exception) -> None:
    desk.coordinator.answers["ack"] = [answer]
    desk.jobs.see(FREE)
    desk.admission.accept(pulled())
    desk.turn_until(lambda: not desk.among(*ON_THE_WAY))
    assert desk.jobs.names() == []
    assert not desk.context.records.known("j1")
    assert len(desk.jobs.room()) == 1


@pytest.mark.parametrize("error", ODD, ids=repr)
@pytest.mark.parametrize("recorded", [True, False])
def test_an_odd_job_ends_nothing_and_is_tried_again_if_it_is_recorded(
    desk: Taking, error: Exception, recorded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        if recorded:
            desk.context.records.create("j1", pulled().raw)
        raise error

    time = Time(monkeypatch)
    monkeypatch.setattr(Admission, "take", fail)
    desk.jobs.see(FREE)
    desk.admission.accept(pulled())
    desk.turn_until(lambda: desk.context.error == str(error))
    assert desk.admission.troubled_until > time.now
    # What is not on disk comes from the coordinator once more.
    assert desk.among(*ON_THE_WAY) == (["j1"] if recorded else [])
    assert desk.admission.next_due() == (desk.admission.troubled_until if recorded else None)
    desk.admission.start_due()
    assert desk.jobs.stage("j1") not in TAKEN_IN
    time.now = desk.admission.troubled_until
    desk.admission.start_due()
    if recorded:
        assert desk.ready() == ["j1"]


def test_failures_wait_ever_longer(desk: Taking, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    time, pauses = Time(monkeypatch), []
    desk.record("j1")
    desk.jobs.see(FREE)
    monkeypatch.setattr(Admission, "resume", fail)
    desk.admission.resume(["j1"])
    for _ in range(15):
        desk.admission.start_due()
        desk.turn_until(lambda: desk.jobs.stage("j1") not in TAKEN_IN and desk.among(*ON_THE_WAY))
        pauses.append(desk.admission.troubled_until - time.now)
        time.now = desk.admission.troubled_until
    assert max(pauses) > 4 * desk.context.config.coordinator.poll_interval_s
    assert max(pauses) <= desk.context.config.heartbeat.backoff.max_s


# --- resumed -----------------------------------------------------------------------------------------------


def test_what_a_restart_left_waits_for_slots(desk: Taking) -> None:
    desk.record("j1", State.ACKED)
    desk.admission.resume(["j1"])
    assert (desk.among(*ON_THE_WAY), desk.admission.next_due()) == (["j1"], None)
    desk.admission.start_due()
    assert desk.jobs.stage("j1") not in TAKEN_IN
    desk.jobs.see(FREE)
    assert desk.admission.next_due() is not None
    desk.admission.start_due()
    assert desk.ready() == ["j1"]
    assert desk.coordinator.told == []


def test_what_is_in_a_slot_or_under_way_already_is_not_taken_in_twice(
    desk: Taking, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[str] = []

    def resume(_: Admission, job_id: str, *__: object) -> Taken:
        begun.append(job_id)
        return Taken(job_id)

    monkeypatch.setattr(Admission, "resume", resume)
    for job_id in ("there", "once"):
        desk.record(job_id, State.ACKED)
    desk.jobs.see(slots("a", job_id="there"))
    desk.admission.resume(["there", "once", "once"])
    desk.admission.start_due()
    assert desk.among(*ON_THE_WAY) == ["once"]
    desk.turn_until(lambda: not desk.among(*ON_THE_WAY))
    assert begun == ["once"]


def test_a_stop_leaves_the_job_for_the_next_start(desk: Taking) -> None:
    desk.record("j1", State.ACKED)
    with desk.context.records.open("j1") as job:
        before = job.state()
    desk.stopping.set()
    desk.coordinator.answers["ack"] = [CoordinatorError("500")]
    desk.jobs.see(FREE)
    desk.admission.accept(pulled(job_id="j2"))
    desk.context._pools["intake"].shutdown()
    desk.context.background.finish()
    assert desk.jobs.names() == ["j2"]
    with desk.context.records.open("j1") as job:
        assert job.state() == before
    with desk.context.records.open("j2") as job:
        assert job.state().state is State.PULLED


# --- cancelled ---------------------------------------------------------------------------------------------


def test_only_a_job_on_its_way_can_be_cancelled_here(desk: Taking) -> None:
    assert not desk.admission.stop_fetching(BY_OPERATOR)
    desk.jobs.see(FREE)
    desk.admission.accept(pulled())
    assert desk.admission.stop_fetching(BY_OPERATOR)
    desk.turn_until(lambda: not desk.admission.stop_fetching(BY_OPERATOR))


@pytest.mark.parametrize("shown", [False, True])
def test_a_cancel_that_comes_too_late_for_the_inputs_follows_the_job(
    desk: Taking, monkeypatch: pytest.MonkeyPatch, *, shown: bool
) -> None:
    gate = threading.Event()
    real = Admission.resume

    def late(intake: Admission, job_id: str, offers: list[object], entry: JobEntry) -> Taken:
        taken = real(intake, job_id, [OFFER], JobEntry(job_id))
        assert gate.wait(20)
        return taken

    monkeypatch.setattr(Admission, "resume", late)
    desk.jobs.see(FREE)
    desk.admission.accept(pulled())
    assert desk.admission.stop_fetching(BY_OPERATOR)
    if shown:
        # An earlier agent had offered the job, and the supervisor gave it to a slot.
        desk.jobs.see(in_slot("j1"))
    gate.set()
    said: list[object] = []

    def told() -> bool:
        said.extend(each for each in desk.said() if isinstance(each, JobReady | CancelJob))
        return BY_OPERATOR in said

    desk.turn_until(told)
    assert [type(each) for each in said] == [*([] if shown else [JobReady]), CancelJob]


# --- names -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("job_id", "usable"), [("j1", True), ("../x", False), ("", False), (None, False)])
def test_whether_a_job_can_be_named_is_known_before_it_touches_the_disk(
    job_id: str | None, usable: bool
) -> None:
    bad = PulledJob(b"", error=ManifestError("cannot read it", job_id))
    assert id_of(bad)[1] == (usable or job_id is None)
    assert id_of(pulled()) == ("j1", True)


def test_a_nameless_job_is_refused_and_leaves_nothing(desk: Taking, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    assert not desk.admission.accept(PulledJob(b"", error=ManifestError("cannot accept the job", "../x")))
    desk.turn_until(lambda: desk.coordinator.told)
    assert desk.coordinator.told == [("fail", "../x")]
    assert list(desk.context.records.root.iterdir()) == []
