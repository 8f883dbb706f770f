"""A real worker and what must not end it: full disks, defects, jobs that were started before."""

import builtins
import errno
import io
import itertools
import multiprocessing
import os
import signal
import stat
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest

from aitbc_miner.errors import ErrorCode
from aitbc_miner.ipc.messages import CancelJob, JobEnded, JobStep, JobTrouble, StartJob
from aitbc_miner.jobs import ExitStatus, Outcome, State
from aitbc_miner.runners.interface import Runner
from aitbc_miner.sandbox import spawn
from aitbc_miner.sandbox.spawn import Job
from aitbc_miner.sandbox.users import Identity
from aitbc_miner.store.records import JobDir
from aitbc_miner.util import clock
from aitbc_miner.worker import link
from aitbc_miner.worker.monitor import JobMonitor
from tests.node.bench import WAIT_S, Bench, Prepare, Shell
from tools.lib.local_node import wait_until

FULL = OSError(errno.ENOSPC, "No space left on device")


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
    assert bench.log.read_text().count("step retried") == 1
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


@pytest.mark.parametrize(("where", "what"), [(JobDir, "write_state"), (os, "mkdir"), (os, "rename")])
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


# --- trouble of this machine that passes -------------------------------------------------------------------


class Trouble:
    """Has the n-th call of a name fail in the worker, once; `n` is what is still to come, 0: none fails."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.left = multiprocessing.Value("i", 0)
        self.name = ""

    def __call__(self, patch: pytest.MonkeyPatch) -> None:
        patch.setattr(link, "RETRY_MIN_S", 0.001)
        for module, name in [
            (os, self.name),
            *([(builtins, "open"), (io, "open")] if self.name == "open" else []),
        ]:
            patch.setattr(module, name, partial(self._call, getattr(module, name)))

    def _call(self, real: Callable[..., Any], *arguments: Any, **more: Any) -> Any:
        if self.left.value > 0:
            self.left.value -= 1
            if self.left.value == 0:
                raise OSError(self.number, os.strerror(self.number))
        return real(*arguments, **more)


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("open", errno.EMFILE),
        *((name, errno.EIO) for name in ("mkdir", "rename", "fsync", "link", "fchmod", "fstat")),
        pytest.param(
            "fchown",
            errno.EIO,
            marks=pytest.mark.xfail(os.geteuid() != 0, reason="only root gives files away", strict=True),
        ),
        *((name, errno.ENOSPC) for name in ("mkdir", "rename", "link", "write")),
        *((name, errno.ENOMEM) for name in ("fork", "pipe2", "scandir", "listdir", "statvfs", "pidfd_open")),
    ],
)
def test_a_call_that_fails_once_costs_no_job(bench: Bench, name: str, number: int) -> None:
    trouble = Trouble(number)
    trouble.name = name
    bench.start(trouble)
    for n in itertools.count(1):
        bench.submit(f"j{n}", "echo hello; echo x > ../output/x", artifacts=[{"path": "x"}])
        (bench.root / f"j{n}" / "input" / "in").touch()
        trouble.left.value = n
        ended = bench.run(f"j{n}")
        hit, trouble.left.value = trouble.left.value == 0, 0
        outcome = bench.outcome(f"j{n}")
        assert outcome is not None, n
        assert (ended.code, outcome.code, ended.clean) == (None, None, True), (n, ended)
        assert [artifact.path for artifact in outcome.artifacts] == ["logs/exec.log", "x"], n
        assert (bench.root / f"j{n}" / "work" / "in").exists(), n
        if not hit:
            break
    assert n > 1, "nothing was hit"


def test_trouble_that_lasts_takes_no_descriptor_with_each_try(bench: Bench) -> None:
    lasts = bench.root / "+lasts"
    lasts.touch()
    real = JobDir.outcome

    def outcome(job: JobDir) -> Outcome | None:
        if not lasts.exists():
            return real(job)
        with lasts.open("a") as tries:
            tries.write(f"{len(list(Path('/proc/self/fd').iterdir()))}\n")
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    def prepare(patch: pytest.MonkeyPatch) -> None:
        patch.setattr(link, "RETRY_MIN_S", 0.001)
        patch.setattr(link, "RETRY_MAX_S", 0.001)
        patch.setattr(JobDir, "outcome", outcome)

    bench.start(prepare)
    bench.submit("j1", "true")
    bench.send(StartJob("j1"))
    wait_until(lambda: lasts.read_text().count("\n") > 10, WAIT_S)
    open_then = lasts.read_text().split()
    lasts.unlink()
    assert bench.ended().code is None
    assert open_then[10] == open_then[0]


def test_a_job_that_is_cancelled_while_it_waits_to_be_started_was_cancelled(bench: Bench) -> None:
    def prepare(patch: pytest.MonkeyPatch) -> None:
        def fail(*_: object) -> None:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

        patch.setattr(spawn, "_fork", fail)

    bench.start(prepare)
    bench.submit("j1", "true")
    bench.send(StartJob("j1"))
    bench.until(lambda message: isinstance(message, JobTrouble))
    bench.send(CancelJob("j1", "cancel"))
    assert bench.ended().code is ErrorCode.E_CANCELLED


def test_a_program_that_cannot_be_told_to_end_is_killed(bench: Bench) -> None:
    def prepare(patch: pytest.MonkeyPatch) -> None:
        def fail(_: object) -> None:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

        patch.setattr(Job, "terminate", fail)

    bench.start(prepare)
    bench.submit("j1", "exec sleep 600", timeout_s=0.5)
    ended = bench.run("j1")
    assert (ended.code, ended.clean) == (ErrorCode.E_TIMEOUT, True)


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
@pytest.mark.parametrize("error", [ValueError("bad \udcff"), RecursionError("deep"), OSError(22, "broken")])
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

    def turn(monitor: JobMonitor, timeout_s: float) -> bool:
        if pids.exists():
            raise ValueError("a defect")
        return False

    bench.start(lambda patch: patch.setattr(JobMonitor, "_turn", turn))
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
    # Its time begins when it has started.
    told = {step.deadline for step in steps if step.state is State.RUNNING and step.pid is not None}
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


# Pours into its output for two seconds what another pipe holds, again and again: no byte of it is copied.
POUR = """
import ctypes, os, time
tee = ctypes.CDLL(None).tee
source, filled = os.pipe()
os.write(filled, bytes(65536))
end = time.monotonic() + 2
while time.monotonic() < end:
    tee(source, 1, 65536, 0)
"""


def test_reading_what_a_job_pours_out_costs_a_share_of_the_time(bench: Bench) -> None:
    bench.start()
    assert bench.child is not None
    worker = psutil.Process(bench.child.pid)

    def cost() -> float:
        times = worker.cpu_times()
        return times.user + times.system

    # What a job costs that pours out nothing, the tracing of this test with it.
    bench.submit("quiet", f"exec {sys.executable} -c pass")
    began = cost()
    assert bench.run("quiet").code is None
    quiet = cost() - began
    directory = bench.submit("j1", f"exec {sys.executable} -c '{POUR}'")
    began, at = cost(), clock.now()
    assert bench.run("j1").code is None
    # The share is 0.05; coverage and a busy machine add to it. Without the share it is 0.35 and more.
    assert cost() - began - quiet < 0.25 * (clock.now() - at)
    assert (directory / "logs" / "exec.log").stat().st_size > 1 << 20


def test_a_job_that_reads_its_own_output_stops_nobody(bench: Bench) -> None:
    bench.start()
    bench.submit(
        "j1", "echo first; timeout 1 cat /dev/stdout >/dev/null & sleep 0.2; echo second; wait; echo last"
    )
    bench.send(StartJob("j1"))
    assert bench.ended().code is None
    assert "last" in (bench.root / "j1" / "logs" / "exec.log").read_text()
