"""The agent's thread: no job and no reply can end it, and what it says of a job comes in order."""

import logging
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from msgspec.structs import replace

from aitbc_miner.agent.admission import Admission
from aitbc_miner.agent.job_table import Stage
from aitbc_miner.agent.loop import Agent
from aitbc_miner.agent.pull import MAX_KNOWN
from aitbc_miner.config.settings import Config, HeartbeatSection
from aitbc_miner.coordinator.interface import Busy, CoordinatorError, Refused, Told, Unauthorized, Unreachable
from aitbc_miner.errors import ErrorCode
from aitbc_miner.identity.credentials import digest
from aitbc_miner.identity.receipts import Receipt
from aitbc_miner.ipc.messages import (
    CancelJob,
    Counted,
    JobProgress,
    JobReady,
    JobSettled,
    JobUpdate,
    Recovered,
    Retried,
    RetryJob,
    TokenWanted,
)
from aitbc_miner.jobs import Outcome, State
from aitbc_miner.queue.interface import Kind
from aitbc_miner.store.database import DatabaseError
from aitbc_miner.store.records import JobDir, Records
from aitbc_miner.util import clock
from tests.bench.agent_bench import FREE, NODE, TOKEN, Around, Desk, config_in, in_slot
from tests.support.pulled_jobs import pulled

ODD: list[Exception] = [
    ValueError("odd"),
    RecursionError("deep"),
    UnicodeEncodeError("utf-8", "\ud800", 0, 1, "surrogates not allowed"),
    OSError(5, "Input/output error"),
    CoordinatorError("cannot talk: 500"),
]


class Rig(Around):
    """An agent whose loop the test turns itself."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.agent = Agent(self.channel, self.line, config, self.coordinator)
        self.context = self.agent._context

    def turn(self, done: Callable[[], object]) -> None:
        """Turn the loop, but for its waiting, until something is so."""

        def over() -> object:
            self.agent.turn()
            return done()

        self.turn_until(over)

    def stage(self, job_id: str) -> Stage:
        return self.context.jobs.stage(job_id)

    def says(self, job_id: str) -> None:
        """Have a job that is ours say something that is due to be passed on."""
        jobs = self.context.jobs
        if job_id not in jobs:
            jobs.move(job_id, Stage.RUNNING)
        self.agent._obey(JobProgress(job_id, 1.0, ""))
        entry = jobs.get(job_id)
        assert entry is not None
        assert entry.progress is not None
        entry.progress.due = clock.now() - 10

    def close(self) -> None:
        self.agent._stopping.set()
        super().close()


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    made = Rig(config_in(tmp_path))
    made.agent._recover()
    made.said()
    yield made
    made.close()


@pytest.fixture
def left(tmp_path: Path) -> Iterator[Desk]:
    """What an earlier run of the node has left on disk."""
    desk = Desk(tmp_path)
    yield desk
    desk.close()


@pytest.fixture
def started(left: Desk, tmp_path: Path) -> Iterator[Callable[[], Rig]]:
    """Start the agent on what was left."""
    rigs: list[Rig] = []

    def start() -> Rig:
        beating = HeartbeatSection(backoff=replace(HeartbeatSection().backoff, min_s=0.01, max_s=0.01))
        rigs.append(Rig(replace(config_in(tmp_path), heartbeat=beating)))
        rigs[-1].agent._recover()
        return rigs[-1]

    yield start
    for each in rigs:
        each.close()


def failed_so_far(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [each.getMessage() for each in caplog.records if each.levelno >= logging.WARNING]


def record(rig: Rig, job_id: str = "j1", code: ErrorCode | None = None) -> None:
    rig.context.records.create(job_id, pulled(job_id=job_id).raw)
    with rig.context.records.open(job_id) as job:
        job.write_outcome(Outcome(job_id, code=code))


# --- odd replies -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", ODD, ids=repr)
def test_no_reply_ends_the_agent(rig: Rig, error: Exception, caplog: pytest.LogCaptureFixture) -> None:
    agent, before = rig.agent, clock.now()
    for call in ("pull", "result", "progress"):
        rig.coordinator.answers[call] = [error]
    rig.register()
    agent._obey(FREE)
    record(rig)
    agent._delivery.add("j1")
    rig.says("j2")
    rig.turn(lambda: not any(rig.coordinator.answers.values()))
    foreseen = isinstance(error, CoordinatorError | OSError)
    said = {"pull failed", "report not accepted"} | (
        set() if isinstance(error, CoordinatorError) else {"progress not accepted"}
    )
    rig.turn_until(lambda: said <= set(failed_so_far(caplog)))
    # Tried again, but not at once.
    for part in (agent._puller, agent._delivery):
        due = part.next_due()
        assert due is not None
        assert due > before
    assert rig.stage("j1") is Stage.REPORTING
    assert "j2" in rig.context.jobs.ours()
    tracebacks = sum(bool(each.exc_info) for each in caplog.records if each.levelno >= logging.WARNING)
    assert tracebacks == (0 if foreseen else 3)


@pytest.mark.parametrize("error", ODD, ids=repr)
def test_nothing_is_pulled_while_what_was_pulled_cannot_be_taken_in(
    rig: Rig, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(Admission, "take", fail)
    rig.register()
    rig.agent._obey(FREE)
    rig.coordinator.jobs = [pulled()]
    rig.turn(lambda: rig.coordinator.asked and rig.agent._admission.troubled_until > clock.now())
    rig.turn_until(lambda: rig.agent._puller.next_due() is not None)
    assert rig.agent._puller.next_due() == rig.agent._admission.troubled_until
    # What is not on disk comes from the coordinator once more: it is not called known.
    assert rig.context.jobs.names() == []


def test_a_job_whose_record_is_in_the_way_ends_nothing(rig: Rig) -> None:
    root = rig.context.records.root
    (root / "j1").mkdir()
    (root / "j1/state.json").symlink_to("/dev/null")
    rig.register()
    rig.agent._obey(FREE)
    rig.coordinator.jobs = [pulled()]
    rig.turn(lambda: rig.coordinator.asked and rig.agent._puller.next_due())
    rig.agent._obey(JobSettled("j1", "its worker ended"))
    assert any(isinstance(each, JobUpdate) for each in rig.said())


# --- the token ---------------------------------------------------------------------------------------------


def test_an_unregistered_agent_waits(rig: Rig) -> None:
    rig.agent.turn()
    record(rig)
    rig.agent._delivery.add("j1")
    rig.says("j2")
    assert rig.agent._pause() > 1
    rig.register()
    assert rig.agent._pause() == 0


def test_a_refused_token_is_named_and_not_told(rig: Rig) -> None:
    rig.context.failed(Unauthorized("cannot pull a job: 401"))
    rig.register()
    assert rig.coordinator.token == TOKEN
    rig.context.failed(Unauthorized("cannot pull a job: 401"))
    # Before there was one, there was nothing to refuse.
    assert rig.heartbeat.receive() == [TokenWanted(refused=digest(TOKEN))]


# --- pulling -----------------------------------------------------------------------------------------------


def test_the_coordinator_is_told_of_all_that_is_here(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aitbc_miner.agent.pull.MAX_UNREPORTED", 2 * MAX_KNOWN)
    agent = rig.agent
    agent._reconciler.asked = True
    for number in range(MAX_KNOWN + 10):
        agent._delivery.add(f"old-{number}")
    agent._admission.resume(["resumed"])
    agent._retries.recovered(["waits"])
    rig.context.jobs.move("runs", Stage.RUNNING)
    rig.register()
    agent._obey(FREE)
    agent._puller.start_due()
    rig.turn_until(lambda: rig.coordinator.asked)
    known = rig.coordinator.asked[0].known
    assert known[:4] == ["resumed", "waits", "runs", f"old-{MAX_KNOWN + 9}"]
    assert len(known) == len(set(known)) == MAX_KNOWN


@pytest.mark.parametrize("swept", [False, True])
def test_a_job_that_is_done_is_not_run_again(rig: Rig, swept: bool) -> None:
    rig.register()
    rig.agent._obey(FREE)
    record(rig)
    rig.agent._delivery.add("j1")
    rig.turn(lambda: rig.stage("j1") is not Stage.REPORTING)
    if swept:
        rig.context.records.set_aside("j1")
    before = len(rig.coordinator.told)
    rig.coordinator.jobs = [pulled()]
    assert not rig.agent._admission.accept(pulled())
    # Its report is said once more, if there is one.
    rig.turn(lambda: rig.stage("j1") is not Stage.REPORTING)
    assert rig.coordinator.told[before:] == ([] if swept else [("result", "j1")])
    assert rig.stage("j1") is Stage.GONE


# --- one job -----------------------------------------------------------------------------------------------


def test_a_job_is_ours_before_it_is_ready(rig: Rig) -> None:
    rig.agent._obey(FREE)
    assert rig.agent._admission.accept(pulled())
    said: list[object] = []

    def ready() -> bool:
        said.extend(each for each in rig.said() if isinstance(each, JobUpdate | JobReady))
        return any(isinstance(each, JobReady) for each in said)

    rig.turn_until(ready)
    assert [each.state if isinstance(each, JobUpdate) else "ready" for each in said] == [
        State.PULLED,
        State.ACKED,
        "ready",
    ]


@pytest.mark.parametrize("by", ["the coordinator", "an operator"])
def test_a_job_is_cancelled_while_its_inputs_are_fetched(rig: Rig, by: str) -> None:
    agent = rig.agent
    agent._obey(FREE)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/a"
        agent._admission.accept(pulled(input={"urls": [url]}))
        rig.turn_until(lambda: "j1" in rig.context.jobs.ours())
        if by == "an operator":
            agent._obey(CancelJob("j1", "cancel", by))
        else:
            rig.register()
            rig.coordinator.wants_end = True
            rig.says("j1")
            agent._progress.start_due()
        rig.turn_until(lambda: rig.stage("j1") is Stage.REPORTING)
    assert "j1" not in rig.context.jobs.ours()
    with rig.context.records.open("j1") as job:
        outcome = job.outcome()
    assert outcome is not None
    assert outcome.code is ErrorCode.E_CANCELLED
    assert not [each for each in rig.said() if isinstance(each, CancelJob | JobReady)]


def test_an_accepted_report_is_over(rig: Rig) -> None:
    rig.register()
    record(rig)
    rig.agent._delivery.add("j1")
    rig.turn(lambda: rig.stage("j1") is not Stage.REPORTING)
    assert rig.shown() == [State.UPLOADING, State.DONE]
    assert rig.context.ledger.knows("j1")


# --- the start ---------------------------------------------------------------------------------------------


EXPECTED = {
    Stage.RESUMING: {"new"},
    Stage.RETRY_WAIT: {"waits"},
    Stage.RUNNING: {"runs"},
    Stage.REPORTING: {"sends", "ended"},
}


def test_each_job_goes_on_where_it_was(left: Desk, started: Callable[[], Rig]) -> None:
    left.record("new")
    left.record("sends", State.ACKED, State.UPLOADING)
    left.conclude("sends")
    left.record("ended", State.ACKED, State.PREP, State.RUNNING)
    left.conclude("ended", ErrorCode.E_EXIT)
    left.record("waits", State.ACKED, State.RETRY_WAIT)
    left.record("runs", State.ACKED, State.PREP, State.RUNNING)
    left.record("done", State.ACKED, State.UPLOADING)
    left.conclude("done")
    with left.context.records.open("done") as job:
        job.move(State.DONE, delivery="accepted")
    (left.context.records.root / "torn").mkdir()
    rig = started()
    jobs = rig.context.jobs
    for stage, job_ids in EXPECTED.items():
        assert {entry.job_id for entry in jobs.among(stage)} == job_ids
    assert jobs.ours() == {"waits", "runs"}
    # The node died between the coordinator's word and the books.
    assert rig.context.ledger.knows("done")
    said = rig.said()
    (recovered,) = [each for each in said if isinstance(each, Recovered)]
    assert [found.job_id for found in recovered.started] == ["runs"]
    assert Counted("broken_records") in said
    assert rig.coordinator.asked == []


def test_a_job_that_ended_before_the_records_were_there_is_recovered_once(left: Desk, tmp_path: Path) -> None:
    left.record("j1", State.ACKED, State.PREP, State.RUNNING)
    left.conclude("j1")
    root = left.context.records.root
    left.anchor.start_due()
    away = root.with_name("away")
    root.rename(away)
    root.mkdir()
    rig = Rig(config_in(tmp_path))
    rig.agent.turn()
    for message in (in_slot("j1"), JobSettled("j1"), CancelJob("j1", "cancel", "an operator")):
        rig.agent._obey(message)
    assert rig.stage("j1") is Stage.RUNNING
    root.rmdir()
    away.rename(root)
    rig.agent._anchor._due = 0.0
    rig.agent.turn()
    assert rig.stage("j1") is Stage.REPORTING
    rig.close()


def test_a_job_that_is_settled_before_its_record_could_be_read_is_not_settled_twice(
    left: Desk, started: Callable[[], Rig], monkeypatch: pytest.MonkeyPatch
) -> None:
    for job_id in ("j1", "j2"):
        left.record(job_id, State.ACKED, State.PREP, State.RUNNING)
        left.conclude(job_id)

    with monkeypatch.context() as patch:
        patch.setattr(Records, "state_of", lambda *_: OSError(5, "Input/output error"))
        rig = started()
    assert {rig.stage("j1"), rig.stage("j2")} == {Stage.UNREAD}
    rig.agent._obey(JobSettled("j1"))
    assert (rig.stage("j1"), rig.stage("j2")) == (Stage.REPORTING, Stage.UNREAD)
    rig.turn(lambda: rig.stage("j2") is Stage.REPORTING)
    assert rig.context.persisting.trouble is None


def test_what_cannot_be_entered_in_the_books_is_entered_at_the_next_start(
    left: Desk, started: Callable[[], Rig], monkeypatch: pytest.MonkeyPatch
) -> None:
    left.record("done", State.ACKED, State.UPLOADING)
    left.conclude("done")
    with left.context.records.open("done") as job:
        job.move(State.DONE, delivery="accepted")

    def full(*_: object) -> None:
        raise DatabaseError("cannot write: database or disk is full; free space")

    with monkeypatch.context() as patch:
        patch.setattr("aitbc_miner.store.ledger.Ledger.enter", full)
        assert not started().context.ledger.knows("done")
    assert started().context.ledger.knows("done")


# --- the operator's retry ----------------------------------------------------------------------------------


def retried(rig: Rig, job_id: str = "j1") -> Retried:
    rig.agent._obey(RetryJob(job_id))
    (said,) = [each for each in rig.said() if isinstance(each, Retried)]
    assert said.job_id == job_id
    return said


def refused(rig: Rig) -> None:
    rig.register()
    record(rig)
    rig.coordinator.answers = {"result": [Refused("413", 413)], "fail": [Refused("400", 400)]}
    rig.agent._delivery.add("j1")
    rig.turn(lambda: rig.stage("j1") is not Stage.REPORTING)
    rig.note_all()


def test_a_refused_report_is_among_the_dead_and_can_be_sent_once_more(rig: Rig) -> None:
    refused(rig)
    assert [(task.kind, task.job_id) for task in rig.context.queue.dead()] == [(Kind.REPORT, "j1")]
    assert rig.context.refused == 1
    assert retried(rig).done
    rig.turn(lambda: rig.stage("j1") is not Stage.REPORTING)
    rig.note_all()
    assert [call for call, _ in rig.coordinator.told] == ["result", "fail", "result"]
    with rig.context.records.open("j1") as job:
        assert (job.state().state, job.state().delivery) == (State.DONE, "accepted")
    row = rig.context.ledger.of("j1")
    assert row is not None
    assert (row.delivery, row.code) == ("accepted", None)
    assert (rig.context.queue.dead(), rig.context.queue.waiting(Kind.REPORT, NODE)) == ([], [])
    assert rig.context.refused == 0
    assert "j1" in rig.context.ledger.settled()


@pytest.mark.parametrize("step", ["reopen", "move"])
def test_a_crash_while_a_report_is_taken_back_loses_neither(
    rig: Rig, started: Callable[[], Rig], monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    refused(rig)
    where = "ledger.Ledger.reopen" if step == "reopen" else "records.JobDir.move"

    class Cut(BaseException):
        """The power is gone."""

    def cut(*_: object, **__: object) -> None:
        raise Cut

    with monkeypatch.context() as patch:
        patch.setattr(f"aitbc_miner.store.{where}", cut)
        with pytest.raises(Cut):
            rig.agent._obey(RetryJob("j1"))
    again = started()
    # As if nobody had asked; and it can be asked for again.
    assert retried(again).done
    again.register()
    again.turn(lambda: again.stage("j1") is not Stage.REPORTING)
    with again.context.records.open("j1") as job:
        assert job.state().delivery == "accepted"


def test_what_waits_is_tried_or_sent_now(rig: Rig) -> None:
    rig.register()
    record(rig)
    rig.coordinator.answers["result"] = [CoordinatorError("cannot report: 500")] * 2
    rig.agent._delivery.add("j1")
    rig.turn(lambda: not rig.agent._delivery._lanes["report"].running and rig.coordinator.told)
    assert retried(rig).done
    assert (rig.agent._delivery.next_due() or 0.0) <= clock.now()
    rig.context.jobs.move("j2", Stage.RETRY_WAIT).due = clock.now() + 1000
    assert retried(rig, "j2").done
    rig.agent._retries.start_due()
    assert rig.stage("j2") is Stage.RESUMING


def test_what_is_over_is_not_tried_again(rig: Rig) -> None:
    rig.register()
    record(rig)
    rig.agent._delivery.add("j1")
    rig.turn(lambda: rig.stage("j1") is not Stage.REPORTING)
    for job_id, why in {"j1": "its state is DONE", "j2": "cannot open job j2"}.items():
        said = retried(rig, job_id)
        assert not said.done
        assert why in said.message


# --- another attempt ---------------------------------------------------------------------------------------


def test_a_job_that_never_started_is_made_ready_again(left: Desk, started: Callable[[], Rig]) -> None:
    left.record("j1", State.ACKED, State.PREP)
    rig = started()
    rig.register()
    rig.agent._obey(FREE)
    rig.agent._obey(JobSettled("j1", "its worker was killed"))
    assert rig.stage("j1") is Stage.RETRY_WAIT
    said: list[object] = []

    def ready() -> bool:
        said.extend(each for each in rig.said() if isinstance(each, JobReady))
        return bool(said)

    rig.turn(ready)
    assert rig.coordinator.told == []
    with rig.context.records.open("j1") as job:
        assert (job.state().state, job.state().attempt) == (State.RETRY_WAIT, 2)


def test_an_outcome_is_read_from_the_disk_once(
    left: Desk, started: Callable[[], Rig], monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[str] = []
    real = JobDir.outcome

    def counted(job: JobDir) -> Outcome | None:
        reads.append(job.job_id)
        return real(job)

    rig = started()
    rig.register()
    left.record("j1", State.ACKED, State.PREP, State.RUNNING)
    rig.agent._obey(in_slot("j1"))
    left.conclude("j1")
    monkeypatch.setattr(JobDir, "outcome", counted)
    rig.agent._obey(JobSettled("j1"))
    rig.turn(lambda: rig.stage("j1") is Stage.GONE)
    assert (rig.coordinator.told, reads) == ([("result", "j1")], ["j1"])


def test_an_outcome_is_read_anew_for_each_further_try(left: Desk, started: Callable[[], Rig]) -> None:
    rig = started()
    rig.register()
    left.record("j1", State.ACKED, State.PREP, State.RUNNING)
    left.conclude("j1")
    rig.coordinator.answers["result"] = [CoordinatorError("cannot report: 500")]
    rig.agent._obey(JobSettled("j1"))
    rig.turn(lambda: len(rig.coordinator.told) == 1)
    entry = rig.context.jobs.get("j1")
    assert entry is not None
    assert entry.outcome is None
    rig.turn(lambda: rig.stage("j1") is Stage.GONE)
    assert rig.coordinator.told == [("result", "j1")] * 2


def test_a_job_that_was_started_is_reported_lost(left: Desk, started: Callable[[], Rig]) -> None:
    left.record("j1", State.ACKED, State.PREP, State.RUNNING)
    rig = started()
    rig.agent._obey(JobSettled("j1", "its worker was killed"))
    assert rig.stage("j1") is Stage.REPORTING
    rig.register()
    rig.turn(lambda: rig.stage("j1") is not Stage.REPORTING)
    assert rig.coordinator.told == [("fail", "j1")]


# --- an outage ---------------------------------------------------------------------------------------------


def test_an_outage_is_logged_once_and_at_its_end(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    for call in ("pull", "jobs", "report") * 5:
        rig.context.call_failed(call, f"{call} failed", Unreachable("cannot: connection refused"))
    for call in ("pull", "report", "jobs", "pull"):
        rig.context.answered(call)
    said = [each for each in caplog.records if each.name.startswith("aitbc_miner")]
    assert [each.msg for each in said] == ["pull failed", "the coordinator answers again"]
    assert said[1].attrs["failed_calls"] == 15  # type: ignore[attr-defined]


def test_one_call_that_goes_on_failing_is_logged_once(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(5):
        rig.context.call_failed("report", "report failed", CoordinatorError("cannot: 500"))
        rig.context.call_failed("pull", "pull failed", Busy("cannot: 429", None, 429))
        rig.context.answered("pull")
    failed = [each.msg for each in caplog.records if each.levelno >= logging.WARNING]
    assert failed.count("report failed") == 1
    assert rig.said().count(Counted("rate_limited", "pull")) == 5


def test_what_receipts_name_is_counted(rig: Rig) -> None:
    rig.register()
    record(rig)
    receipt = Receipt({"receipt_id": "r"}, verified=True, units=12.5, price=0.25)
    rig.coordinator.result = lambda *_, **__: Told(receipt)  # type: ignore[method-assign]
    rig.agent._delivery.add("j1")
    rig.turn(lambda: rig.stage("j1") is not Stage.REPORTING)
    said = rig.said()
    for name, n in (("receipts", 1), ("units", 12_500_000), ("price", 250_000)):
        assert Counted(name, "verified", n) in said  # type: ignore[arg-type]
