"""Taking jobs in: what is acknowledged, refused or forgotten, and what a crash leaves behind."""

import os
import socket
import stat
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import msgspec
import pytest

from aitbc_miner.agent import admission as module
from aitbc_miner.agent.admission import LOOK_S, Admission, Stopping, Taken
from aitbc_miner.agent.fleet import Fleet
from aitbc_miner.agent.job_table import JobEntry
from aitbc_miner.coordinator.interface import CoordinatorError, Gone, PulledJob, Refused, Told, Unreachable
from aitbc_miner.errors import ErrorCode
from aitbc_miner.ipc.messages import CancelJob
from aitbc_miner.jobs import EndReason, ManifestError, Outcome, State
from aitbc_miner.queue.interface import Kind, Task
from aitbc_miner.queue.sqlite import SqliteQueue
from aitbc_miner.slots.placement import Offer
from aitbc_miner.store.database import Database
from aitbc_miner.store.records import Records
from aitbc_miner.util import clock
from tests.support.mute_coordinator import MuteCoordinator, Stranger
from tests.support.pulled_jobs import CONFIG, PLAIN, pulled

OFFERS = [Offer("cpu0", "cpu", 4, 4096, 0, ("cli", "python"))]


class FakeCoordinator(MuteCoordinator):
    """Answers an ack with what is in `answers`, the last of it for ever; notes refusals down."""

    def __init__(self, *answers: Exception | None) -> None:
        self.answers = list(answers) or [None]
        self.acks: list[str] = []
        self.holders: list[str | None] = []
        self.refusal: Exception | None = None

    def ack(self, job_id: str, holder: str | None = None) -> None:
        self.acks.append(job_id)
        self.holders.append(holder)
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if answer is not None:
            raise answer

    def fail(self, job_id: str, outcome: Outcome, key: str, *, again: bool = False) -> Told:
        if self.refusal is not None:
            raise self.refusal
        return Told()


class Rig(NamedTuple):
    records: Records
    coordinator: FakeCoordinator
    intake: Admission
    stopping: threading.Event
    acked: list[tuple[str, str]]

    def kept(self) -> tuple[State, Outcome | None]:
        with self.records.open("j1") as job:
            return job.state().state, job.outcome()


class Passing(threading.Event):
    """The stop of a node in whose world time passes only by waiting."""

    def __init__(self) -> None:
        super().__init__()
        self.at = 1000.0

    def wait(self, timeout: float | None = None) -> bool:
        self.at += timeout or 0.0
        return self.is_set()


def rig(tmp_path: Path, *answers: Exception | None, stopping: threading.Event | None = None) -> Rig:
    records, coordinator = Records(tmp_path), FakeCoordinator(*answers)
    stopping, acked = stopping or Passing(), list[tuple[str, str]]()
    taking = Admission(context_of(records, coordinator, acked), None, stopping)
    return Rig(records, coordinator, taking, stopping, acked)


def context_of(records: Records, coordinator: FakeCoordinator, acked: list[tuple[str, str]]) -> Any:
    """Give what an admission uses of the agent's context; the main thread is the caller's."""
    return SimpleNamespace(
        config=CONFIG,
        records=records,
        coordinator=coordinator,
        input_proxy=None,
        background=SimpleNamespace(post=lambda call: call()),
        token=SimpleNamespace(refused=lambda: None),
        jobs=SimpleNamespace(acknowledge=lambda _: None),
        show=lambda job_id, state, runner: acked.append((job_id, runner)),
    )


def never() -> JobEntry:
    """Give the entry of a job that nobody cancels."""
    return JobEntry("j1")


def test_a_job_is_acknowledged_and_its_inputs_are_for_nobody_else(tmp_path: Path) -> None:
    it = rig(tmp_path)
    old = os.umask(0o000)
    try:
        taken = it.intake.take(pulled(input={"inline": {"a": "secret"}}), "j1", OFFERS, never())
    finally:
        os.umask(old)
    assert taken.ticket is not None
    assert (it.coordinator.acks, it.acked, it.kept()) == (["j1"], [("j1", "cli")], (State.ACKED, None))
    inputs = tmp_path / "j1/input"
    assert (inputs / "a").read_text() == "secret"
    assert [stat.S_IMODE(path.stat().st_mode) for path in (inputs, inputs / "a")] == [0o700, 0o600]


def test_a_job_that_was_acknowledged_before_a_restart_is_ours_at_once(tmp_path: Path) -> None:
    it = rig(tmp_path)
    it.intake.take(pulled(), "j1", OFFERS, never())
    assert it.intake.resume("j1", OFFERS, never()).ticket is not None
    assert (it.coordinator.acks, it.acked) == (["j1"], [("j1", "cli")] * 2)


def test_a_job_that_fits_no_slot_after_a_restart_is_reported(tmp_path: Path) -> None:
    it = rig(tmp_path)
    it.intake.take(pulled(), "j1", OFFERS, never())
    assert it.intake.resume("j1", [], never()) == Taken("j1", report=True)
    # Whether that is reported or tried elsewhere is decided by others: it has not moved.
    state, outcome = it.kept()
    assert outcome is not None
    assert (state, outcome.code, outcome.attempt) == (State.ACKED, ErrorCode.E_NOSLOT, 1)


@pytest.mark.parametrize(
    "manifest",
    [
        b"{}",
        b"{",
        b"",
        b"[" * 50_000,
        b"\xff",
        None,
        b'{"job_id": "j1", "runner": "cli"}',
        b'{"job_id": "j1", "runner": "cli", "command": "a\\u0000b"}',
        b'{"job_id": "j1", "runner": "shell", "command": "a"}',
        b'{"job_id": "../j1", "runner": "cli", "command": "a"}',
    ],
)
def test_a_job_that_a_crash_left_with_a_bad_manifest_ends_in_a_report(
    tmp_path: Path, manifest: bytes | None
) -> None:
    it = rig(tmp_path)
    it.records.create("j1", manifest or b"")
    if manifest is None:
        (tmp_path / "j1/manifest.json").unlink()
    assert it.intake.resume("j1", OFFERS, never()).report
    state, outcome = it.kept()
    assert outcome is not None
    assert (state, outcome.code, it.coordinator.acks) == (State.PULLED, ErrorCode.E_MANIFEST, [])


def test_a_job_that_nobody_lets_us_have_is_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    time = Passing()
    monkeypatch.setattr(clock, "now", lambda: time.at)
    it = rig(tmp_path, CoordinatorError("cannot accept: 500"), stopping=time)
    assert it.intake.take(pulled(), "j1", OFFERS, never()).gone
    assert module.ACK_GIVE_UP_S < time.at - 1000 < 2 * module.ACK_GIVE_UP_S
    assert not it.records.known("j1")
    assert it.acked == []
    # It was never ours, so it may come again.
    it.coordinator.answers = [None]
    assert it.intake.take(pulled(), "j1", OFFERS, never()).ticket is not None


def test_an_outage_makes_no_job_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    time = Passing()
    monkeypatch.setattr(clock, "now", lambda: time.at)
    away: list[Exception] = [Unreachable("cannot accept: connection refused")] * 1000
    it = rig(tmp_path, CoordinatorError("500"), *away, CoordinatorError("500"), None, stopping=time)
    assert it.intake.take(pulled(), "j1", OFFERS, never()).ticket is not None
    assert time.at - 1000 > 3 * module.ACK_GIVE_UP_S


@pytest.mark.parametrize("answer", [Gone("409", 409), Refused("404", 404)])
def test_a_job_that_is_not_ours_is_gone(tmp_path: Path, answer: Exception) -> None:
    it = rig(tmp_path, answer)
    assert it.intake.take(pulled(), "j1", OFFERS, never()).gone
    assert (it.records.known("j1"), it.acked) == (False, [])


def test_a_job_that_is_refused_again_and_again_is_forgotten_and_may_come_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    time = Passing()
    monkeypatch.setattr(clock, "now", lambda: time.at)
    it = rig(tmp_path, *[Refused("422", 422)] * 1000, stopping=time)
    assert it.intake.take(pulled(), "j1", OFFERS, never()).gone
    assert (it.records.known("j1"), it.acked) == (False, [])
    assert time.at - 1000 >= CONFIG.coordinator.give_up.over_s
    it.coordinator.answers = [Refused("422", 422), None]
    assert it.intake.take(pulled(), "j1", OFFERS, never()).ticket is not None


@pytest.mark.parametrize(
    ("why", "code"), [("cancel", ErrorCode.E_CANCELLED), ("expired", ErrorCode.E_TIMEOUT)]
)
def test_a_cancel_ends_the_fetching_of_inputs(tmp_path: Path, why: EndReason, code: ErrorCode) -> None:
    entry = never()
    with socket.create_server(("127.0.0.1", 0)) as silent:
        it = rig(tmp_path)
        job = pulled(input={"urls": [f"http://127.0.0.1:{silent.getsockname()[1]}/a"]})

        def cancel() -> None:
            with silent.accept()[0]:
                entry.cancel = CancelJob("j1", why, "by somebody")
                ended.wait(10)

        ended = threading.Event()
        thread = threading.Thread(target=cancel)
        thread.start()
        taken = it.intake.take(job, "j1", OFFERS, entry)
        ended.set()
        thread.join()
        assert taken.report
    state, outcome = it.kept()
    assert outcome is not None
    assert (state, outcome.code) == (State.ACKED, code)
    assert "by somebody" in outcome.message


def test_a_cancel_ends_the_wait_for_an_unreachable_coordinator(tmp_path: Path) -> None:
    class Cancelling(Passing):
        def wait(self, timeout: float | None = None) -> bool:
            entry.cancel = CancelJob("j1", "cancel", "by the operator")
            return super().wait(timeout)

    entry, waiting = never(), Cancelling()
    it = rig(tmp_path, *[Unreachable("away")] * 1000, stopping=waiting)
    assert it.intake.take(pulled(), "j1", OFFERS, entry).report
    assert waiting.at - 1000 <= LOOK_S
    state, outcome = it.kept()
    assert outcome is not None
    assert (state, outcome.code) == (State.PULLED, ErrorCode.E_CANCELLED)
    assert outcome.message.endswith("by the operator")


def test_the_end_of_the_node_does_not_cancel_a_job(tmp_path: Path) -> None:
    it = rig(tmp_path)
    it.stopping.set()
    job = pulled(input={"urls": ["http://127.0.0.1:1/a"]})
    with pytest.raises(Stopping):
        it.intake.take(job, "j1", OFFERS, never())
    assert it.kept() == (State.ACKED, None)


def test_a_refused_manifest_is_reported(tmp_path: Path) -> None:
    it = rig(tmp_path)
    bad = PulledJob(b"", error=ManifestError("cannot read the manifest: it is nested too deeply", "j1"))
    assert it.intake.take(bad, "j1", OFFERS, never()).report
    state, outcome = it.kept()
    assert outcome is not None
    assert (state, outcome.code, outcome.message) == (State.PULLED, ErrorCode.E_MANIFEST, str(bad.error))


@pytest.mark.parametrize(
    "error",
    [Unreachable("away"), ValueError("odd"), RecursionError(), UnicodeEncodeError("a", "b", 0, 1, "c")],
)
def test_a_nameless_job_that_cannot_be_refused_harms_nothing(
    tmp_path: Path, error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    it = rig(tmp_path)
    it.coordinator.refusal = error
    it.intake.refuse_nameless("../\ud800", "no name")
    assert [record.getMessage() for record in caplog.records] == ["manifest refused", "refusal not delivered"]
    assert list(tmp_path.iterdir()) == []


# --- what a restart left -----------------------------------------------------------------------------------


def left_at(at: Rig, *steps: State) -> None:
    at.records.create("j1", msgspec.json.encode({**PLAIN, "input": {"inline": {"a.txt": "x"}}}))
    with at.records.open("j1") as job:
        for step in steps:
            job.move(step)


def test_a_job_whose_input_directory_was_just_removed_is_resumed(tmp_path: Path) -> None:
    at = rig(tmp_path)
    left_at(at, State.ACKED)
    # An agent that was killed between clearing the inputs and making their directory anew.
    (tmp_path / "j1" / "input").rmdir()
    assert at.intake.resume("j1", OFFERS, never()).ticket
    assert (tmp_path / "j1" / "input" / "a.txt").read_text() == "x"


@pytest.mark.parametrize("steps", [(State.ACKED, State.PREP), (State.ACKED, State.PREP, State.RUNNING)])
def test_a_job_that_is_in_a_slot_is_not_taken_in_again(tmp_path: Path, steps: tuple[State, ...]) -> None:
    at = rig(tmp_path)
    left_at(at, *steps)
    assert at.intake.resume("j1", OFFERS, never()) == Taken("j1")
    assert at.acked == []


def test_a_job_that_has_an_outcome_is_reported_and_not_taken_in_again(tmp_path: Path) -> None:
    at = rig(tmp_path)
    left_at(at, State.ACKED)
    with at.records.open("j1") as job:
        job.write_outcome(Outcome("j1"))
    assert at.intake.resume("j1", OFFERS, never()) == Taken("j1", report=True)


# --- another attempt ---------------------------------------------------------------------------------------


def test_another_attempt_gets_its_inputs_anew_and_is_not_acknowledged_again(tmp_path: Path) -> None:
    at = rig(tmp_path)
    left_at(at, State.ACKED, State.PREP, State.RUNNING)
    with at.records.open("j1") as job:
        job.write_outcome(Outcome("j1", code=ErrorCode.E_LOST))
        job.try_again()
    # The first attempt had them in its working directory, and has done with them what it liked.
    (tmp_path / "j1/input/a.txt").write_text("spoilt")
    assert at.intake.resume("j1", OFFERS, never()).ticket is not None
    assert (tmp_path / "j1/input/a.txt").read_text() == "x"
    assert (at.coordinator.acks, at.kept()) == ([], (State.RETRY_WAIT, None))


# --- in a fleet --------------------------------------------------------------------------------------------


def shared(at: Rig) -> tuple[Rig, SqliteQueue]:
    queue = SqliteQueue(Database(at.records.root.parent / "shared.db"))
    fleet = Fleet(queue, "node-a", 60.0, Stranger())
    taking = Admission(context_of(at.records, at.coordinator, at.acked), fleet, at.stopping)
    return at._replace(intake=taking), queue


@pytest.fixture
def fleet_rig(tmp_path: Path) -> tuple[Rig, SqliteQueue]:
    root = tmp_path / "jobs"
    root.mkdir()
    return shared(rig(root))


TWICE = {"retry": {"max_attempts": 2}}


def test_a_job_that_may_run_again_is_held_before_it_is_ready(fleet_rig: tuple[Rig, SqliteQueue]) -> None:
    at, queue = fleet_rig
    assert at.intake.take(pulled(**TWICE), "j1", OFFERS, never()).ticket is not None
    with at.records.open("j1") as job:
        token = job.state().lease
    assert token is not None
    assert queue.renew(Kind.RUN, "j1", token, 60.0)


def test_a_job_that_another_node_has_is_not_run_and_not_reported(
    fleet_rig: tuple[Rig, SqliteQueue],
) -> None:
    at, queue = fleet_rig
    queue.hold(Task(Kind.RUN, "j1", "node-b"), "theirs", 60.0)
    assert at.intake.take(pulled(**TWICE), "j1", OFFERS, never()) == Taken("j1", gone=True)
    with at.records.open("j1") as job:
        assert (job.state().state, job.state().delivery, job.outcome()) == (State.FAILED, "lost", None)


def test_what_only_another_node_can_do_is_acknowledged_first(fleet_rig: tuple[Rig, SqliteQueue]) -> None:
    at, _ = fleet_rig
    gpu = pulled(requirements={"gpu": True})
    assert at.intake.take(gpu, "j1", OFFERS, never()).report
    state, outcome = at.kept()
    assert outcome is not None
    assert (at.coordinator.acks, state, outcome.code) == (["j1"], State.ACKED, ErrorCode.E_NOGPU)


def test_a_job_that_is_not_ours_is_not_left_in_the_queue(fleet_rig: tuple[Rig, SqliteQueue]) -> None:
    at, queue = fleet_rig
    at.coordinator.answers = [Gone("409", 409)]
    at.records.create("j1", pulled(**TWICE).raw, lease="ours", origin="node-b")
    queue.hold(Task(Kind.RUN, "j1", "node-b"), "ours", 60.0)
    assert at.intake.resume("j1", OFFERS, never()).gone
    assert at.coordinator.holders == ["node-b"]
    assert not queue.renew(Kind.RUN, "j1", "ours", 60.0)
