"""What a job holds: in which order it gets it and loses it, and what comes of a step that fails."""

import errno
import os
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest

from aitbc_miner.config.settings import Config, CoordinatorSection, WorkspaceSection
from aitbc_miner.config.settings import RunnersSection as Enabled
from aitbc_miner.errors import ErrorCode, JobError, MinerError
from aitbc_miner.ipc.channel import Channel
from aitbc_miner.ipc.messages import CancelJob, ToWorker
from aitbc_miner.jobs import ExitStatus, Outcome, State, StateRecord, Usage
from aitbc_miner.runners.interface import JobPaths, Launch, Runner, Verdict
from aitbc_miner.runners.registry import RunnerSet
from aitbc_miner.sandbox.spawn import Job
from aitbc_miner.slots.spec import SlotSpec
from aitbc_miner.store.records import JobDir, Records
from aitbc_miner.task import Report
from aitbc_miner.worker import job_run, link, prewarm, program, workspace
from aitbc_miner.worker.context import SlotContext
from aitbc_miner.worker.hold import Ending, JobHold
from aitbc_miner.worker.job_run import JobRun
from aitbc_miner.worker.launch import Started
from aitbc_miner.worker.prewarm import Warm, Warmer
from aitbc_miner.worker.steps import STEPS, Step

Enter = Callable[[JobHold], AbstractContextManager[object]]
PERM = OSError(errno.EPERM, "no")


class Good:
    """A runner whose jobs do what they are asked to."""

    name = "cli"

    def plan(self, manifest: Any, paths: JobPaths, slot: SlotSpec, gpu_env: Mapping[str, str]) -> Launch:
        return Launch(["/bin/true"], {}, None, None)

    def verdict(self, exit: ExitStatus, reports: list[Report], log_tail: str) -> Verdict:  # noqa: A002
        return Verdict(None)


class Runners(RunnerSet):
    """That one."""

    def current(self) -> dict[str, Runner]:
        return {"cli": Good()}


class NoProgram:
    """A started program that is none."""

    pid = 1

    def usage(self) -> Usage:
        return Usage()


class Place:
    """A job whose steps write into `seen` what becomes of them."""

    def __init__(self, job: JobDir, slot: SlotContext, link: link.SupervisorLink) -> None:
        self.job, self.slot, self.link = job, slot, link
        self.seen: list[str] = []
        self.warmer = Warmer(Runners(Enabled()), "cpu0")

    def run(self) -> Outcome:
        return JobRun(self.job, self.slot, self.link, Runners(Enabled()), self.warmer).run()

    def hold(self) -> JobHold:
        hold = JobHold(self.job, self.slot, self.link)
        hold.launch = Launch(["/bin/true"], {}, None, None)
        hold.give(self.warmer)
        return hold

    def step(self, name: str, *failures: Exception, gives: object = None) -> Enter:
        left = iter(failures)

        @contextmanager
        def enter(hold: JobHold) -> Iterator[object]:
            if (failure := next(left, None)) is not None:
                self.seen.append(f"{name} fails")
                raise failure
            self.seen.append(f"+{name}")
            try:
                yield gives
            finally:
                self.seen.append(f"-{name}")

        return enter


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    config = Config(
        CoordinatorSection("https://c.example", "env:X"), workspace=WorkspaceSection(root=tmp_path)
    )
    slot = SlotContext(config, SlotSpec("cpu0", "cpu"), None, (), None, None, {})
    monkeypatch.setattr(link, "RETRY_MIN_S", 0.001)
    monkeypatch.setattr(link, "RETRY_MAX_S", 0.001)
    records = Records(tmp_path)
    records.create("j1", msgspec.json.encode({"job_id": "j1", "runner": "cli", "command": "true"}))
    ours, theirs = socket.socketpair()
    with ours, theirs, records.open("j1") as job:
        job.write_state(StateRecord(job_id="j1", state=State.ACKED))
        channel: Channel[ToWorker] = Channel(ours, ToWorker)
        tie = link.SupervisorLink(channel)
        yield Place(job, slot, tie)
        os.close(tie.woken)
        os.close(tie._wake)


def use(monkeypatch: pytest.MonkeyPatch, *steps: tuple[State, str, Enter]) -> None:
    monkeypatch.setattr(job_run, "STEPS", [Step(*step) for step in steps])


# --- the order ---------------------------------------------------------------------------------------------


def test_what_is_got_first_is_let_go_last(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    started = Started(cast("Job", NoProgram()), -1, None)

    class Monitor:
        def __init__(self, hold: JobHold, deadline: float | None) -> None:
            assert hold[Started] is started

        def run(self) -> Ending:
            place.seen.append(f"runs, {place.job.state().state}")
            return Ending(ExitStatus(status=0), clean=True, reports=[])

    monkeypatch.setattr(job_run, "JobMonitor", Monitor)
    use(
        monkeypatch,
        (State.PREP, "make the directories", workspace.make_directories),
        (State.PREP, "do a", place.step("a")),
        (State.PREP, "do b", place.step("b")),
        (State.RUNNING, "do c", place.step("c", gives=started)),
    )
    outcome = place.run()
    assert (outcome.code, outcome.message) == (None, "")
    assert place.seen == ["+a", "+b", "+c", "runs, RUNNING", "-c", "-b", "-a"]
    assert outcome.timings.keys() == {"prepare", "run", "collect", "total"}


def test_the_list_itself() -> None:
    states = [step.state for step in STEPS]
    assert states == sorted(states, key=[State.PREP, State.RUNNING].index)
    assert STEPS[-1].enter is program.run_program
    order = [step.enter for step in STEPS]
    # A process that waits brings its directories along, and inputs are put into them.
    assert order.index(prewarm.take_waiting) < order.index(workspace.make_directories)
    assert order.index(workspace.make_directories) < order.index(workspace.take_inputs)
    assert len({step.doing for step in STEPS}) == len(STEPS)


# --- a step that fails -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("failure", "code", "message"),
    [
        (PERM, "E_INTERNAL", "cannot run the job: cannot do b: [Errno 1] no"),
        (ValueError("a defect"), "E_INTERNAL", "cannot run the job: cannot do b: ValueError('a defect')"),
        (MinerError("cannot have b"), "E_INTERNAL", "cannot have b"),
        (JobError(ErrorCode.E_SANDBOX, "cannot have b"), "E_SANDBOX", "cannot have b"),
    ],
)
@pytest.mark.parametrize("state", [State.PREP, State.RUNNING])
def test_a_step_that_fails_lets_go_of_those_before_it_and_is_named(
    place: Place, monkeypatch: pytest.MonkeyPatch, state: State, failure: Exception, code: str, message: str
) -> None:
    use(
        monkeypatch,
        (State.PREP, "do a", place.step("a")),
        (state, "do b", place.step("b", failure)),
        (State.RUNNING, "do c", place.step("c")),
    )
    outcome = place.run()
    assert place.seen == ["+a", "b fails", "-a"]
    assert (outcome.code, outcome.message) == (code, message)
    assert place.job.outcome() == outcome
    assert place.job.state().state is state
    assert outcome.timings.keys() == {"prepare", "total", *(["run"] if state is State.RUNNING else [])}


def test_a_step_is_tried_again_after_trouble_that_passes(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    trouble = OSError(errno.EIO, "broken")
    use(
        monkeypatch,
        (State.PREP, "do a", place.step("a", trouble, trouble)),
        (State.PREP, "do b", place.step("b", PERM)),
    )
    place.run()
    assert place.seen == ["a fails", "a fails", "+a", "b fails", "-a"]


def test_a_disk_that_stays_full_is_told_with_the_step(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    full = OSError(errno.ENOSPC, "full")
    use(monkeypatch, (State.PREP, "do a", place.step("a", *[full] * 100)))
    outcome = place.run()
    assert place.seen == ["a fails"] * link.FULL_TRIES
    assert (outcome.code, outcome.message) == (
        "E_DISK",
        "cannot run the job: cannot do a: [Errno 28] full",
    )


def test_a_job_that_is_cancelled_while_a_step_fails_was_cancelled(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    place.link.cancelled["j1"] = CancelJob("j1", "cancel")
    use(
        monkeypatch,
        (State.PREP, "do a", place.step("a")),
        (State.PREP, "do b", place.step("b", OSError(errno.EIO, "broken"))),
    )
    assert place.run().code == "E_CANCELLED"
    assert place.seen == ["+a", "b fails", "-a"]


# --- a process that waits ----------------------------------------------------------------------------------


class Waiting:
    """Stands for a Warm that fits."""

    def __init__(self) -> None:
        self.ended = 0

    def fits(self, launch: Launch, slot: SlotContext) -> bool:
        return True

    def give(self, launch: Launch, stack: object) -> Started:
        raise OSError(errno.ESRCH, "it has ended")

    def end(self) -> None:
        self.ended += 1


def test_a_job_that_is_not_started_ends_the_process_that_waits(place: Place) -> None:
    waiting = Waiting()
    place.warmer._warm = cast("Warm", waiting)
    workspace.make_ahead(place.job.path.parent, "cpu0", None)
    hold = place.hold()
    with hold.stack:
        hold.enter(prewarm.take_waiting)
        assert hold.prewarmed
        assert (place.job.path / "work").is_dir()
        assert waiting.ended == 0
    assert (waiting.ended, hold.prewarmed) == (1, False)


def test_one_that_has_no_directories_is_ended_and_the_job_goes_without(place: Place) -> None:
    waiting = Waiting()
    place.warmer._warm = cast("Warm", waiting)
    hold = place.hold()
    with hold.stack:
        with pytest.raises(FileNotFoundError):
            hold.enter(prewarm.take_waiting)
        assert (waiting.ended, hold.prewarmed) == (1, False)
        hold.enter(prewarm.take_waiting)
        assert not hold.prewarmed
        hold.enter(workspace.make_directories)
        assert (place.job.path / "work").is_dir()
    assert waiting.ended == 1


def test_one_that_ends_at_the_last_moment_costs_no_job(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    waiting, started = Waiting(), Started(cast("Job", NoProgram()), -1, None)
    monkeypatch.setattr(program, "start_program", lambda *_: started)
    hold = place.hold()
    hold._given[Warm] = waiting
    hold.prewarmed = True
    with pytest.raises(ProcessLookupError):
        hold.enter(program.run_program)
    assert (waiting.ended, hold.prewarmed) == (1, False)
    with hold.stack:
        hold.enter(program.run_program)
        assert hold[Started] is started
    assert (hold.remains, waiting.ended) == ("", 1)
