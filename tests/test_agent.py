"""The agent's thread: no job and no reply can end it, and what it says of a job comes in order."""

import logging
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

import pytest
from msgspec.structs import replace
from test_intake import CONFIG, FakeCoordinator, pulled

from aitbc_miner.agent import MAX_KNOWN, Agent
from aitbc_miner.channel import Channel
from aitbc_miner.config import Config, Workspace
from aitbc_miner.coordinator import CoordinatorError, PulledJob, PullFilters, Unauthorized
from aitbc_miner.credentials import digest
from aitbc_miner.delivery import Delivered
from aitbc_miner.errors import ErrorCode
from aitbc_miner.intake import Taken
from aitbc_miner.jobs import Outcome, State
from aitbc_miner.messages import (
    CancelJob,
    FromAgent,
    JobReady,
    JobSettled,
    JobUpdate,
    NodeToken,
    Offer,
    PrivateLine,
    Slots,
    SlotView,
    Ticket,
    ToAgent,
    TokenWanted,
)
from aitbc_miner.slot import SlotState
from aitbc_miner.util import clock

T = TypeVar("T")
TOKEN = "node-t0ken"
ODD: list[Exception] = [
    ValueError("odd"),
    RecursionError("deep"),
    UnicodeEncodeError("utf-8", "\ud800", 0, 1, "surrogates not allowed"),
    OSError(5, "Input/output error"),
    CoordinatorError("cannot talk: 500"),
]
OFFER = Offer("cpu0", "cpu", 4, 4096, 0, ("cli",))
FREE = Slots([SlotView(OFFER, SlotState.IDLE, free=True)], [], accepting=True)


class Coordinator(FakeCoordinator):
    """Hands out what is in `jobs`; says of `cancel` that they are not wanted any more."""

    def __init__(self) -> None:
        super().__init__()
        self.jobs: list[PulledJob | None] = []
        self.asked: list[PullFilters] = []
        self.told = threading.Event()
        self.token = ""

    def use_token(self, token: str) -> None:
        self.token = token

    def pull(self, filters: PullFilters) -> PulledJob | None:
        self.asked.append(filters)
        return self.jobs.pop() if self.jobs else None

    def progress(self, job_id: str, pct: float, note: str) -> bool:
        return True


class Rig:
    """An agent whose loop the test turns itself, and the other ends of its channels."""

    def __init__(self, config: Config) -> None:
        ends = [*socket.socketpair(), *socket.socketpair()]
        self.ends = ends
        channel: Channel[ToAgent] = Channel(ends[0], ToAgent)
        line: Channel[PrivateLine] = Channel(ends[2], PrivateLine)
        self.supervisor: Channel[FromAgent] = Channel(ends[1], FromAgent)
        self.heartbeat: Channel[PrivateLine] = Channel(ends[3], PrivateLine)
        self.coordinator = Coordinator()
        self.agent = Agent(channel, line, config, self.coordinator, lambda token: None)

    def said(self) -> list[FromAgent]:
        try:
            return self.supervisor.receive()
        except BlockingIOError:
            return []

    def turn_until(self, done: Callable[[], object]) -> None:
        deadline = clock.now() + 20
        while not done():
            assert clock.now() < deadline
            self.agent._background.finish()
            threading.Event().wait(0.005)

    def register(self) -> None:
        self.heartbeat.send(NodeToken(TOKEN))
        assert self.agent._token.receive()

    def close(self) -> None:
        self.agent._stopping.set()
        for pool in self.agent._pools.values():
            pool.shutdown()
        for end in self.ends:
            end.close()


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    made = Rig(replace(CONFIG, workspace=Workspace(tmp_path)))
    yield made
    made.close()


def failed(error: Exception) -> "Future[Any]":
    future: Future[Any] = Future()
    future.set_exception(error)
    return future


def done(value: T) -> "Future[T]":
    future: Future[T] = Future()
    future.set_result(value)
    return future


def record(rig: Rig, job_id: str = "j1") -> None:
    rig.agent._records.create(job_id, pulled(job_id=job_id).raw)


def tracebacks(caplog: pytest.LogCaptureFixture) -> int:
    return sum(bool(each.exc_info) for each in caplog.records if each.levelno >= logging.WARNING)


@pytest.mark.parametrize("error", ODD, ids=repr)
def test_no_reply_ends_the_agent(rig: Rig, error: Exception, caplog: pytest.LogCaptureFixture) -> None:
    agent, before = rig.agent, clock.now()
    agent._pulled(failed(error))
    # Tried again, but not at once.
    assert agent._pull_at > before
    record(rig)
    agent._report_on("j1")
    assert agent._schedule.start_due(clock.now(), 1) == ["j1"]
    agent._delivered("j1", failed(error))
    due = agent._schedule.next_due()
    assert due is not None
    assert due > before
    agent._progress.began("j1", clock.now())
    agent._progressed("j1", failed(error))
    assert "j1" in agent._progress
    foreseen = isinstance(error, CoordinatorError | OSError)
    assert tracebacks(caplog) == (0 if foreseen else 3)


@pytest.mark.parametrize("error", ODD, ids=repr)
@pytest.mark.parametrize("known", [True, False])
def test_no_job_ends_the_agent_while_it_is_taken_in(rig: Rig, error: Exception, known: bool) -> None:
    agent = rig.agent
    if known:
        record(rig)
    agent._unplaced["j1"] = None
    agent._cancels["j1"] = threading.Event()
    before = clock.now()
    agent._taken("j1", failed(error))
    assert agent._unplaced == {}
    assert min(agent._resume_at, agent._pull_at) > before
    # What is not on disk comes from the coordinator once more.
    assert (agent._to_resume, list(agent._cancels)) == ((["j1"], ["j1"]) if known else ([], []))


def test_a_job_whose_record_is_in_the_way_ends_nothing(rig: Rig) -> None:
    (rig.agent._config.workspace.root / "j1").mkdir()
    (rig.agent._config.workspace.root / "j1/state.json").symlink_to("/dev/null")
    rig.agent._pulled(done(pulled()))
    rig.agent._settle(JobSettled("j1", "its worker ended"))
    assert any(isinstance(each, JobUpdate) for each in rig.said())


def test_an_unregistered_agent_waits(rig: Rig) -> None:
    record(rig)
    rig.agent._report_on("j1")
    rig.agent._progress.note("j1", 1.0, "", clock.now() - 10)
    assert rig.agent._pause() > 1
    rig.register()
    assert rig.agent._pause() == 0


def test_a_refused_token_is_named_and_not_told(rig: Rig) -> None:
    rig.agent._note_error(Unauthorized("cannot pull a job: 401"))
    rig.register()
    assert rig.coordinator.token == TOKEN
    rig.agent._note_error(Unauthorized("cannot pull a job: 401"))
    # Before there was one, there was nothing to refuse.
    assert rig.heartbeat.receive() == [TokenWanted(refused=digest(TOKEN))]


def test_the_coordinator_is_told_of_all_that_is_here(rig: Rig) -> None:
    agent = rig.agent
    rig.register()
    agent._see(FREE)
    for number in range(MAX_KNOWN + 10):
        agent._schedule.add(f"old-{number}", clock.now())
    agent._progress.began("runs", clock.now())
    agent._schedule.add("runs", clock.now())
    agent._pull_at = 0.0
    agent._start_pull()
    rig.turn_until(lambda: rig.coordinator.asked and not agent._pulling)
    known = rig.coordinator.asked[0].known
    assert known[:2] == ["runs", f"old-{MAX_KNOWN + 9}"]
    assert len(known) == len(set(known)) == MAX_KNOWN


def test_a_job_is_ours_before_it_is_ready(rig: Rig) -> None:
    rig.agent._see(FREE)
    rig.agent._pulled(done(pulled()))
    rig.turn_until(lambda: not rig.agent._cancels)
    said = [each for each in rig.said() if isinstance(each, JobUpdate | JobReady)]
    assert [each.state if isinstance(each, JobUpdate) else "ready" for each in said] == [
        State.PULLED,
        State.ACKED,
        "ready",
    ]


@pytest.mark.parametrize("by", ["the coordinator", "an operator"])
def test_a_job_is_cancelled_while_its_inputs_are_fetched(rig: Rig, by: str) -> None:
    agent = rig.agent
    agent._see(FREE)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/a"
        agent._pulled(done(pulled(input={"urls": [url]})))
        rig.turn_until(lambda: "j1" in agent._progress)
        if by == "an operator":
            agent._obey(CancelJob("j1", "cancel", by))
        else:
            agent._progressed("j1", done(value=True))
        rig.turn_until(lambda: not agent._cancels)
    assert "j1" in agent._schedule
    assert "j1" not in agent._progress
    with agent._records.open("j1") as job:
        outcome = job.outcome()
    assert outcome is not None
    assert outcome.code is ErrorCode.E_CANCELLED
    assert not [each for each in rig.said() if isinstance(each, CancelJob | JobReady)]


def test_a_cancel_that_comes_too_late_for_the_inputs_follows_the_job(rig: Rig) -> None:
    rig.agent._cancels["j1"] = threading.Event()
    rig.agent._progressed("j1", done(value=True))
    rig.agent._taken("j1", done(Taken("j1", Ticket("j1", "cli"))))
    rig.agent._progressed("j1", done(value=True))
    kinds = [type(each) for each in rig.said()]
    assert kinds == [JobReady, CancelJob, CancelJob]


def test_an_accepted_report_is_over(rig: Rig) -> None:
    record(rig)
    rig.agent._report_on("j1")
    rig.agent._schedule.start_due(clock.now(), 1)
    rig.agent._delivered("j1", done(Delivered("j1", Outcome("j1"), "accepted")))
    assert "j1" not in rig.agent._schedule
    assert [each.state for each in rig.said() if isinstance(each, JobUpdate)] == [State.UPLOADING, State.DONE]
