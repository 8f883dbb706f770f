"""What answers the operator, and the memory of jobs behind it: what they say, and that nothing stays open."""

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from aitbc_miner.config.settings import Config, CoordinatorSection, WorkspaceSection
from aitbc_miner.control.protocol import (
    READ_VERBS,
    SLOW_VERBS,
    WRITE_VERBS,
    Files,
    FullAnswer,
    Later,
    Problem,
    Refusal,
    Request,
    Status,
)
from aitbc_miner.errors import ErrorCode
from aitbc_miner.ipc.messages import CoordinatorView, Deliveries, JobUpdate, Retried, RetryJob, SlotView
from aitbc_miner.jobs import State
from aitbc_miner.slots.placement import Offer
from aitbc_miner.slots.state import Slot, SlotState
from aitbc_miner.supervisor.children import OneShots
from aitbc_miner.supervisor.control_api import DEATH_SHOWN_S, MAX_ASKED, ControlApi
from aitbc_miner.supervisor.job_index import JobIndex
from aitbc_miner.supervisor.running_slot import Outcomes
from aitbc_miner.supervisor.slot_pool import SlotPool
from aitbc_miner.util import clock


class Site:
    """What answers for a workspace of its own, with one job."""

    def __init__(self, root: Path) -> None:
        self.job = root / "j1"
        self.job.mkdir()
        self.index = JobIndex()
        self.index.update(JobUpdate("j1", State.PREP))
        config = Config(
            node_id="node-1",
            coordinator=CoordinatorSection(base_url="", auth_token=""),
            workspace=WorkspaceSection(root),
        )
        self.slow: list[tuple[Request, Later]] = []
        self.told: list[object] = []
        agent: Any = SimpleNamespace(child=True, send=self.told.append)
        node: Any = SimpleNamespace(config=config, notices=[], agent=agent)
        disk: Any = SimpleNamespace(problem=None, short=False)
        slow: Any = SimpleNamespace(ask=lambda *asked: self.slow.append(asked))
        shutdown: Any = SimpleNamespace(mode=None)
        self.slots = SlotPool(node, Outcomes(self.index, agent, agent, OneShots()))
        self.agent, self.disk = agent, disk
        self.api = ControlApi(node, self.index, self.slots, disk, slow, shutdown)

    def ask(self, request: Request) -> FullAnswer:
        reply = self.api.answer(request, lambda _: None)
        assert reply is not None
        return reply

    def problems(self) -> list[str]:
        answer, _ = self.ask(Request("status"))
        assert isinstance(answer, Status)
        return [problem.what for problem in answer.problems]


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


def open_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_the_records_that_are_there_come_along(site: Site) -> None:
    (site.job / "manifest.json").write_text("{}")
    (site.job / "receipt.json").write_text("[]")
    answer, fds = site.ask(Request("job", "j1"))
    assert isinstance(answer, Files)
    assert answer.names == ["manifest.json", "receipt.json"]
    assert [os.read(fd, 10) for fd in fds] == [b"{}", b"[]"]
    for fd in fds:
        os.close(fd)


def test_a_link_in_place_of_a_record_is_refused_and_leaves_nothing_open(site: Site) -> None:
    (site.job / "manifest.json").write_text("{}")
    (site.job / "state.json").symlink_to("/etc/shadow")
    before = open_descriptors()
    answer, fds = site.ask(Request("job", "j1"))
    assert isinstance(answer, Refusal)
    assert answer.message.startswith("cannot open the record of job j1: Too many levels of symbolic links; ")
    assert str(site.job) in answer.message
    assert fds == []
    assert open_descriptors() == before


def test_refusals_say_what_could_not_be_done_and_what_to_do(site: Site) -> None:
    for request, what in (
        (Request("job", "j2"), "cannot show job 'j2': this node has no job with this id"),
        (Request("cancel", "j1"), "cannot cancel job j1: the job neither runs nor waits, its state is "),
    ):
        answer, _ = site.ask(request)
        assert isinstance(answer, Refusal)
        assert answer.message.startswith(what)
        assert "; see `aitbc-minerctl job" in answer.message


def test_a_death_is_shown_for_a_while(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    times = [1000.0]
    monkeypatch.setattr(clock, "now", lambda: times[-1])
    site.api.note_death("agent", "was killed by SIGKILL; 1 deaths so far")
    site.api.note_death("agent", "was killed by SIGKILL; 2 deaths so far")
    shown = "the process agent was killed by SIGKILL; 2 deaths so far"
    assert shown in site.problems()
    times.append(1000.0 + DEATH_SHOWN_S - 1)
    assert shown in site.problems()
    times.append(1000.0 + DEATH_SHOWN_S)
    assert shown not in site.problems()


def test_only_what_ended_is_counted(site: Site) -> None:
    for state in (State.PULLED, State.PREP, State.RUNNING):
        assert not site.index.update(JobUpdate("j2", state))
    assert dict(site.index.finished) == {}
    assert site.index.update(JobUpdate("j2", State.UPLOADING, code=ErrorCode.E_INPUT))
    assert not site.index.update(JobUpdate("j2", State.FAILED, code=ErrorCode.E_INPUT))
    assert dict(site.index.finished) == {"E_INPUT": 1}


@pytest.mark.parametrize("verb", ["reload", "history", "allow"])
def test_what_a_child_answers_is_answered_when_it_is_done(site: Site, verb: str) -> None:
    def later(answer: object) -> None:
        raise AssertionError(answer)

    assert site.api.answer(Request(verb), later) is None
    assert site.slow == [(Request(verb), later)]


def test_all_who_want_a_job_tried_again_get_the_agents_answer(site: Site) -> None:
    answers: list[object] = []
    for _ in range(2):
        assert site.api.answer(Request("retry", "j1"), answers.append) is None
    assert site.told == [RetryJob("j1")] * 2
    site.api.retried(Retried("j2", "of another job"))
    assert answers == []
    site.api.retried(Retried("j1", "cannot retry: it is done", done=False))
    assert answers == [Refusal("cannot retry: it is done")] * 2
    for job_id in (None, "../j"):
        answer, _ = site.ask(Request("retry", job_id))
        assert isinstance(answer, Refusal)
        assert "is not a job id" in answer.message
    for n in range(MAX_ASKED):
        assert site.api.answer(Request("retry", f"k{n}"), answers.append) is None
    answer, _ = site.ask(Request("retry", "one-more"))
    assert answer == Refusal("cannot retry: 100 other retries wait for the agent; try again later")
    answers.clear()
    site.api.forget_retries()
    assert len(answers) == MAX_ASKED
    assert answers[0] == Refusal("cannot retry job k0: the agent died; try again")
    assert site.api.answer(Request("retry", "one-more"), answers.append) is None


# --- whether jobs are pulled -------------------------------------------------------------------------------


class Fake:
    """A slot, as far as the desk asks."""

    def __init__(self, state: SlotState) -> None:
        self.name, self.trouble = "cpu0", None
        self.rules = Slot("cpu0", state=state)

    def view(self) -> SlotView:
        return SlotView(Offer("cpu0", "cpu", 1, 1), self.rules.state, free=True)


def told(site: Site) -> Status:
    answer, _ = site.ask(Request("status"))
    assert isinstance(answer, Status)
    return answer


def test_before_anything_was_asked_nothing_is_wrong(site: Site) -> None:
    status = told(site)
    assert (status.accepting, status.paused, status.problems) == (False, "the node is starting", [])


def test_each_reason_why_nothing_is_pulled_is_said(tmp_path: Path) -> None:
    site = Site(tmp_path)
    slots: dict[str, Any] = site.slots.slots
    slots["cpu0"] = Fake(SlotState.IDLE)
    desk = site.api
    assert told(site).paused == "the node has not asked the coordinator yet"
    desk.coordinator = CoordinatorView(False, "", error="cannot reach it", remedy="look")
    assert told(site).paused == "the coordinator has not registered this node"
    desk.coordinator = CoordinatorView(True, "", registered=True)
    assert (told(site).accepting, told(site).paused) == (True, "")
    desk.deliveries = Deliveries(100, paused="100 or more reports wait for the coordinator to accept them")
    assert told(site).paused.startswith("100 or more reports wait")
    site.agent.child = None
    assert told(site).paused == "the agent does not run; the supervisor restarts it"
    site.disk.short = True
    assert told(site).paused == "the disk has too little free space"
    slots["cpu0"] = Fake(SlotState.QUARANTINED)
    assert told(site).paused == "no slot can be used"
    assert not told(site).accepting
    site.ask(Request("drain"))
    assert (told(site).accepting, told(site).paused) == (False, ""), "that is what somebody wanted"


@pytest.mark.parametrize(
    "error", ["cannot use workspace.root: no mark; mount it", "cannot pull a job: refused"]
)
def test_an_error_of_the_agent_has_a_remedy_that_holds_for_each_error(site: Site, error: str) -> None:
    site.api.deliveries = Deliveries(1, error)
    assert Problem(error, "no result is lost: the node tries again by itself") in told(site).problems


def test_troubles_of_the_other_processes_are_shown(site: Site) -> None:
    site.api.reported = ["cannot serve 127.0.0.1:9464: taken; free it"]
    assert "cannot serve 127.0.0.1:9464: taken; free it" in site.problems()


def test_each_verb_has_an_answer_of_its_own(site: Site) -> None:
    """A verb that fell through to another one could let a reader end jobs."""
    assert site.api._answers.keys() == READ_VERBS | WRITE_VERBS
    changing = {site.api._answers[verb] for verb in WRITE_VERBS - SLOW_VERBS}
    assert not changing & {site.api._answers[verb] for verb in READ_VERBS}
