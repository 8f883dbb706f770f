"""A real worker and what must not end it: full disks, defects, jobs that were started before."""

import errno
import logging
import os
import signal
import stat
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest

from aitbc_miner.channel import Channel
from aitbc_miner.children import Child
from aitbc_miner.config import Config, Coordinator, Workspace
from aitbc_miner.errors import ErrorCode
from aitbc_miner.execution import Delays, Execution
from aitbc_miner.jobs import ExitStatus, Manifest, Outcome, State, StateRecord
from aitbc_miner.messages import (
    CancelJob,
    FromWorker,
    JobEnded,
    JobStep,
    StartJob,
    ToWorker,
    WorkerReady,
)
from aitbc_miner.privileges import Identity
from aitbc_miner.records import JobDir, Records
from aitbc_miner.runners import JobPaths, Launch, Runner, Verdict, ended_badly
from aitbc_miner.slotspec import SlotSpec
from aitbc_miner.spawn import Job
from aitbc_miner.task import Report
from aitbc_miner.util import clock
from aitbc_miner.worker import Settings, Worker

WAIT_S = 30.0
FULL = OSError(errno.ENOSPC, "No space left on device")
Prepare = Callable[[pytest.MonkeyPatch], None]


class Shell:
    """A runner whose jobs are lines for sh; `upset` may raise in its steps, `result` is what a job gives."""

    name = "cli"

    def __init__(self, upset: Callable[[str], None] = lambda _: None, result: Any = None) -> None:
        self._upset = upset
        self._result = result

    def plan(self, manifest: Manifest, paths: JobPaths, slot: SlotSpec, gpu_env: Mapping[str, str]) -> Launch:
        self._upset("plan")
        return Launch(["/bin/sh", "-c", manifest.command or ""], {}, None, None)

    def verdict(self, exit: ExitStatus, reports: list[Report], log_tail: str) -> Verdict:  # noqa: A002
        self._upset("verdict")
        return ended_badly(exit, log_tail) or Verdict(None, result=self._result)


class Bench:
    """A worker without cgroup, and the jobs that it is given."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.records = Records(root)
        self.log = root / "+log"
        self.service: Identity | None = None
        self.child: Child[FromWorker] | None = None

    def start(
        self, prepare: Prepare = lambda _: None, runners: Callable[[], dict[str, Runner]] | None = None
    ) -> None:
        """Start the worker, `prepare` changing what it is made of."""
        settings = Settings(
            config=Config(Coordinator("https://c.example", "env:X"), workspace=Workspace(root=self.root)),
            spec=SlotSpec("cpu0", "cpu"),
            group_parent=None,
            controllers=(),
            runs_as=None,
            service=self.service,
            gpu_env={},
            delays=Delays(term_grace=0.2, kill=1.0, drain=0.5),
        )

        def main(pipe: "Connection[Any, Any]") -> None:
            logging.getLogger("aitbc_miner").addHandler(
                logging.FileHandler(self.log, errors="backslashreplace")
            )
            prepare(pytest.MonkeyPatch())
            channel: Channel[ToWorker] = Channel(pipe, ToWorker)
            Worker(settings, channel, runners or (lambda: {"cli": Shell()})).run()

        self.child = Child("worker", main, FromWorker)
        self.until(lambda message: isinstance(message, WorkerReady))

    def submit(self, job_id: str, command: str = "echo hello; echo x > ../output/x") -> Path:
        """Record a job that waits for its slot."""
        manifest = {"job_id": job_id, "runner": "cli", "command": command}
        self.records.create(job_id, msgspec.json.encode(manifest))
        self.put_into(job_id, State.ACKED)
        return self.root / job_id

    def put_into(self, job_id: str, state: State) -> None:
        """Set a job's state."""
        with self.records.open(job_id) as job:
            job.write_state(StateRecord(job_id=job_id, state=state))

    def send(self, message: ToWorker) -> None:
        """Tell the worker."""
        assert self.child is not None
        self.child.send(message)

    def until(self, wanted: Callable[[FromWorker], bool]) -> list[FromWorker]:
        """Give what the worker says, up to what is wanted."""
        assert self.child is not None
        heard: list[FromWorker] = []
        deadline = clock.now() + WAIT_S
        while clock.now() < deadline:
            heard += self.child.channel.wait(WAIT_S)
            if any(map(wanted, heard)):
                return heard
        raise AssertionError(f"never came: {heard}")

    def run(self, job_id: str) -> JobEnded:
        """Have the worker run a job and give what it says of the end."""
        self.send(StartJob(job_id))
        return self.ended()

    def ended(self) -> JobEnded:
        """Wait for the end of a job."""
        last = self.until(lambda message: isinstance(message, JobEnded))[-1]
        assert isinstance(last, JobEnded)
        return last

    def outcome(self, job_id: str) -> Outcome | None:
        """Give what is on disk."""
        with self.records.open(job_id) as job:
            return job.outcome()

    def assert_works(self) -> None:
        """Assert that the same worker takes a good job."""
        self.submit("after")
        assert self.run("after").code is None


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(tmp_path)
    yield bench
    if bench.child:
        bench.child.kill()
        bench.child.reap()


# --- full disks --------------------------------------------------------------------------------------------


def outcomes_refused(bench: Bench) -> tuple[Path, Prepare]:
    """Let outcomes find a full disk for as long as a file is there."""
    full = bench.root / "+full"
    full.touch()
    real = JobDir.write_outcome

    def write(job: JobDir, outcome: Outcome) -> None:
        if full.exists() and job.job_id == "j1":
            raise FULL
        real(job, outcome)

    return full, lambda patch: patch.setattr(JobDir, "write_outcome", write)


def collecting_twice(bench: Bench) -> None:
    """Wait until the job has collected, and the worker has said that it waits for the disk."""
    steps = 0
    while steps < 2:
        heard = bench.until(lambda message: isinstance(message, JobStep | JobEnded))
        assert not any(isinstance(message, JobEnded) for message in heard)
        steps += sum(isinstance(each, JobStep) and each.state is State.COLLECTING for each in heard)


def test_finished_work_waits_for_a_full_disk(bench: Bench) -> None:
    full, prepare = outcomes_refused(bench)
    bench.start(prepare)
    bench.submit("j1")
    bench.send(StartJob("j1"))
    collecting_twice(bench)
    # A cancellation comes too late and changes nothing.
    bench.send(CancelJob("j1", "cancel"))
    assert bench.outcome("j1") is None
    full.unlink()
    ended = bench.ended()
    outcome = bench.outcome("j1")
    assert outcome is not None
    assert ended == JobEnded("j1", None, "", outcome.timings)
    assert [artifact.path for artifact in outcome.artifacts] == ["logs/exec.log", "x"]
    assert bench.log.read_text().count("cannot write outcome") == 1
    bench.assert_works()


def test_a_worker_that_waits_for_the_disk_gives_up_when_the_miner_stops_at_once(bench: Bench) -> None:
    _, prepare = outcomes_refused(bench)
    bench.start(prepare)
    bench.submit("j1")
    bench.send(StartJob("j1"))
    collecting_twice(bench)
    bench.send(CancelJob("j1", "shutdown"))
    ended = bench.ended()
    assert (ended.code, ended.clean) == (ErrorCode.E_INTERNAL, True)
    assert "No space left" in ended.message
    assert bench.outcome("j1") is None
    bench.assert_works()


@pytest.mark.parametrize(("where", "what"), [(JobDir, "move"), (os, "link"), (os, "rename")])
def test_a_disk_that_is_full_on_the_way_is_the_verdict(bench: Bench, where: object, what: str) -> None:
    real = getattr(where, what)

    def refuse(*arguments: Any, **more: Any) -> Any:
        # Renaming is how files are written; only that of the inputs is to fail.
        if what != "rename" or arguments[0] == "in":
            raise FULL
        return real(*arguments, **more)

    bench.start(lambda patch: patch.setattr(where, what, refuse))
    (bench.submit("j1") / "input" / "in").touch()
    assert bench.run("j1").code is ErrorCode.E_DISK
    outcome = bench.outcome("j1")
    assert outcome is not None
    assert (outcome.code, outcome.artifacts) == (ErrorCode.E_DISK, [])


# --- jobs that must not be started -------------------------------------------------------------------------


@pytest.mark.parametrize("code", [None, ErrorCode.E_EXIT])
def test_a_job_that_has_an_outcome_is_not_touched(bench: Bench, code: ErrorCode | None) -> None:
    bench.start()
    directory = bench.submit("j1", f"touch {bench.root}/+ran")
    with bench.records.open("j1") as job:
        job.write_outcome(Outcome("j1", code=code, message="as it was"))
    before = {path: path.read_bytes() for path in directory.glob("*.json")}
    assert bench.run("j1") == JobEnded("j1", code, "as it was")
    assert {path: path.read_bytes() for path in directory.glob("*.json")} == before
    assert not (bench.root / "+ran").exists()
    bench.assert_works()


@pytest.mark.parametrize("state", sorted(set(State) - {State.ACKED, State.RETRY_WAIT}))
def test_a_job_that_was_started_before_is_not_started(bench: Bench, state: State) -> None:
    bench.start()
    directory = bench.submit("j1", f"touch {bench.root}/+ran")
    bench.put_into("j1", state)
    before = (directory / "state.json").read_bytes()
    ended = bench.run("j1")
    assert ended.code is ErrorCode.E_INTERNAL
    assert state in ended.message
    assert (directory / "state.json").read_bytes() == before
    assert bench.outcome("j1") is None
    assert not (bench.root / "+ran").exists()


# --- defects -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("job_id", ["nowhere", "../etc"])
def test_a_job_that_is_not_there_costs_nothing(bench: Bench, job_id: str) -> None:
    bench.start()
    ended = bench.run(job_id)
    assert (ended.job_id, ended.code, ended.clean) == (job_id, ErrorCode.E_INTERNAL, True)
    bench.assert_works()


@pytest.mark.parametrize("step", ["runners", "plan", "verdict"])
@pytest.mark.parametrize("error", [ValueError("bad \udcff"), RecursionError("deep"), OSError(5, "broken")])
def test_what_nobody_expected_is_the_jobs_end_and_not_the_workers(
    bench: Bench, step: str, error: Exception
) -> None:
    upset = bench.root / "+upset"
    upset.touch()

    def trouble(at: str) -> None:
        if at == step and upset.exists():
            raise error

    def runners() -> dict[str, Runner]:
        trouble("runners")
        return {"cli": Shell(trouble)}

    bench.start(runners=runners)
    bench.submit("j1")
    ended = bench.run("j1")
    assert (ended.code, ended.clean) == (ErrorCode.E_INTERNAL, True)
    outcome = bench.outcome("j1")
    assert outcome is not None
    assert outcome.code is ErrorCode.E_INTERNAL
    assert isinstance(error, OSError) or "Traceback" in bench.log.read_text()
    upset.unlink()
    bench.assert_works()


def nested() -> Any:
    """Give a value too deep for JSON."""
    value: Any = 0
    for _ in range(100_000):
        value = [value]
    return value


@pytest.mark.parametrize("result", [nested(), {"a": "\udcff"}], ids=["deep", "no text"])
def test_a_result_that_is_no_json_is_the_jobs_own_trouble(bench: Bench, result: Any) -> None:
    bench.start(runners=lambda: {"cli": Shell(result=result)})
    bench.submit("j1")
    assert bench.run("j1").code is ErrorCode.E_INTERNAL
    outcome = bench.outcome("j1")
    assert outcome is not None
    assert (outcome.code, outcome.artifacts) == (ErrorCode.E_INTERNAL, [])


def test_a_defect_while_the_program_runs_leaves_nothing_of_it(bench: Bench) -> None:
    pids = bench.root / "+pids"

    def turn(execution: Execution, timeout_s: float) -> bool:
        if pids.exists():
            raise ValueError("a defect")
        return False

    bench.start(lambda patch: patch.setattr(Execution, "_turn", turn))
    bench.submit("j1", f"sleep 600 & echo $! > {pids}.new; echo $$ >> {pids}.new; mv {pids}.new {pids}; wait")
    ended = bench.run("j1")
    assert (ended.code, ended.clean) == (ErrorCode.E_INTERNAL, True)
    assert not any(psutil.pid_exists(int(pid)) for pid in pids.read_text().split())
    outcome = bench.outcome("j1")
    assert outcome is not None
    assert "a defect" in outcome.message
    assert outcome.exit.signal == signal.SIGKILL


def test_what_cannot_be_killed_is_not_waited_for(bench: Bench) -> None:
    def prepare(patch: pytest.MonkeyPatch) -> None:
        patch.setattr(Job, "terminate", lambda _job: None)
        patch.setattr(Job, "kill_all", lambda _job, _timeout_s: False)

    bench.start(prepare)
    bench.submit("j1", "exec sleep 600")
    bench.send(StartJob("j1"))
    bench.until(lambda message: isinstance(message, JobStep) and message.pid is not None)
    bench.send(CancelJob("j1", "timeout"))
    ended = bench.ended()
    assert (ended.code, ended.clean) == (ErrorCode.E_TIMEOUT, False)
    outcome = bench.outcome("j1")
    assert outcome is not None
    assert outcome.exit == ExitStatus(killed_for="timeout")


def test_a_signal_without_a_name_is_told_by_its_number(bench: Bench) -> None:
    bench.start()
    bench.submit("j1", "kill -40 $$")
    ended = bench.run("j1")
    assert ended.code is ErrorCode.E_SIGNAL
    assert "signal 40" in ended.message


def test_the_supervisor_is_told_when_the_job_will_be_ended(bench: Bench) -> None:
    bench.start()
    bench.submit("j1")
    bench.send(StartJob("j1"))
    heard = bench.until(lambda message: isinstance(message, JobEnded))
    steps = [each for each in heard if isinstance(each, JobStep)]
    told = {step.deadline for step in steps if step.state is State.RUNNING}
    assert len(told) == 1
    deadline = told.pop()
    assert deadline is not None
    assert 0 < deadline - clock.now() <= 86_400
    assert {step.deadline for step in steps if step.state is not State.RUNNING} == {None}


@pytest.mark.parametrize("own", [False, True], ids=["of the worker", "of the service"])
def test_the_agent_may_read_the_log_and_change_nothing_there(bench: Bench, own: bool) -> None:
    group = os.getgid()
    if own:
        group = 60600 if os.geteuid() == 0 else group
        bench.service = Identity(group if os.geteuid() == 0 else os.geteuid(), group, "service")
    bench.start()
    directory = bench.submit("j1")
    assert bench.run("j1").code is None
    logs = (directory / "logs").stat()
    assert (logs.st_uid, logs.st_gid, stat.S_IMODE(logs.st_mode)) == (os.geteuid(), group, 0o750)
    log = (directory / "logs" / "exec.log").stat()
    assert (log.st_uid, log.st_gid, stat.S_IMODE(log.st_mode) & 0o777) == (os.geteuid(), group, 0o640)
