"""Real jobs that end in every way, what a real worker says of it, and what they leave behind."""

import itertools
import os
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from msgspec.structs import replace

from aitbc_miner.cgroup.group import CgroupError, Group, find_mount, own_group
from aitbc_miner.ipc.messages import CancelJob, JobStep, StartJob
from aitbc_miner.jobs import ExitStatus, Outcome
from aitbc_miner.sandbox.spawn import Job
from aitbc_miner.sandbox.users import Identity
from aitbc_miner.slots.spec import SlotSpec
from aitbc_miner.util import clock
from aitbc_miner.util.fs import Room
from aitbc_miner.worker import cleanup, workspace
from aitbc_miner.worker.context import Delays
from aitbc_miner.worker.monitor import JobMonitor
from tests.node.bench import JOB_UID, WAIT_S, Bench

ROOT = os.geteuid() == 0
STRANGER = Identity(JOB_UID, JOB_UID, "aitbc-job-cpu0")
PYTHON = f"{sys.executable} -I -S -c"


def outcome_of(bench: Bench, job_id: str = "j1") -> Outcome:
    outcome = bench.outcome(job_id)
    assert outcome is not None
    return outcome


def begun(bench: Bench) -> int:
    """Have the worker start job j1 and give the pid of its program."""
    bench.send(StartJob("j1"))
    heard = bench.until(lambda message: isinstance(message, JobStep) and message.pid is not None)
    return next(each.pid for each in heard if isinstance(each, JobStep) and each.pid)


# --- by itself, or by an outsider --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "code", "said"),
    [
        ("exit 137", "E_EXIT", "exit status 137"),
        ("exit 143", "E_EXIT", "exit status 143"),
        ("kill -KILL $$", "E_SIGNAL", "SIGKILL, which this node did not send"),
        ("kill -TERM $$", "E_SIGNAL", "SIGTERM, which this node did not send"),
        ("sh -c 'kill -TERM $$'; exit $?", "E_EXIT", "exit status 143"),
        ("kill -SEGV $$", "E_SIGNAL", "SIGSEGV"),
        ("exit 0", None, ""),
    ],
)
def test_an_end_that_is_not_our_doing(bench: Bench, command: str, code: str | None, said: str) -> None:
    bench.start()
    bench.submit("j1", command)
    ended = bench.run("j1")
    assert ended.code == code
    assert said in ended.message


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_an_outsiders_signal(bench: Bench, number: int) -> None:
    bench.start()
    bench.submit("j1", "exec sleep 600")
    os.kill(begun(bench), number)
    assert bench.ended().code == "E_SIGNAL"
    assert outcome_of(bench).exit == ExitStatus(signal=number)


# --- by us, though we were not the first -------------------------------------------------------------------


def stop_worker(bench: Bench) -> None:
    assert bench.child is not None
    os.kill(bench.child.pid, signal.SIGTERM)


@pytest.mark.parametrize(
    ("end", "code"),
    [
        (stop_worker, "E_LOST"),
        (lambda bench: bench.send(CancelJob("j1", "shutdown")), "E_LOST"),
        (lambda bench: bench.send(CancelJob("j1", "cancel", "by hand")), "E_CANCELLED"),
    ],
    ids=["a signal", "a message", "a cancellation"],
)
@pytest.mark.parametrize("command", ["kill -TERM $$", "exit 143"])
def test_a_program_that_heard_of_the_stop_before_the_worker(
    bench: Bench, end: Callable[[Bench], None], code: str, command: str
) -> None:
    bench.delays = Delays(notice=WAIT_S)
    bench.start()
    bench.submit("j1", command)
    pid = begun(bench)
    deadline = clock.now() + WAIT_S
    while psutil.pid_exists(pid):
        assert clock.now() < deadline
    end(bench)
    assert bench.ended().code == code
    assert outcome_of(bench).exit.killed_for == ("cancel" if code == "E_CANCELLED" else "shutdown")


def test_a_job_that_ends_in_its_last_moment_has_ended_in_time(bench: Bench) -> None:
    def turn(monitor: JobMonitor, timeout_s: float) -> bool:
        # Looks again only when the program has ended and its time is over as well.
        select.select([monitor._job.pidfd], [], [], WAIT_S)
        while monitor._deadline is not None and clock.now() < monitor._deadline:
            pass
        return False

    bench.start(lambda patch: patch.setattr(JobMonitor, "_turn", turn))
    bench.submit("j1", timeout_s=0.3)
    assert bench.run("j1").code is None


def test_the_time_that_a_job_had_is_told(bench: Bench) -> None:
    bench.start()
    bench.submit("j1", "exec sleep 600", timeout_s=0.2)
    ended = bench.run("j1")
    assert ended.code == "E_TIMEOUT"
    assert ended.message.endswith("its time limit of 0.2 s was reached")


# --- by its limits -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "code"),
    [
        (f'exec {PYTHON} \'open("../output/big", "wb", 0).write(bytes(9000)) == 9000 or 1/0\'', "E_OUTPUT"),
        ("exec dd if=/dev/zero of=big bs=1000 count=9 2>/dev/null", "E_OUTPUT"),
        ("exit 1", "E_EXIT"),
        ("dd if=/dev/zero of=big bs=1000 count=9 2>/dev/null; exit 0", None),
    ],
)
def test_a_file_that_grows_too_large(bench: Bench, command: str, code: str | None) -> None:
    bench.spec = SlotSpec("cpu0", "cpu", rlimits={"fsize": 4096})
    bench.start()
    bench.submit("j1", command)
    ended = bench.run("j1")
    assert ended.code == code
    assert (
        code != "E_OUTPUT"
        or "reached the size limit of 4096 bytes (0.0 MiB), set by rlimits.fsize" in ended.message
    )


@pytest.mark.parametrize("left", [Room(0, 1000), Room(1 << 30, 0)])
@pytest.mark.parametrize(("command", "code"), [("exit 1", "E_DISK"), ("exit 0", None)])
def test_a_disk_that_is_full_at_the_end(bench: Bench, command: str, code: str | None, left: Room) -> None:
    bench.start(lambda patch: patch.setattr(workspace, "room_left", lambda *_: left))
    bench.submit("j1", command)
    assert bench.run("j1").code == code


_numbers = itertools.count()


@contextmanager
def grouped(bench: Bench) -> Iterator[None]:
    """Give the worker a cgroup of its own, where groups can be made."""
    mount = find_mount()
    if mount is None or not mount.writable:
        with pytest.raises(CgroupError, match="cannot make cgroup"):
            Group(Path(mount.path if mount else "/sys/fs/cgroup") / f"aitbc-end-{os.getpid()}").create()
        yield
        return
    parent = Group(own_group(mount) / f"aitbc-end-{os.getpid()}-{next(_numbers)}")
    parent.create()
    bench.group_parent = parent.path
    try:
        yield
    finally:
        bench.stop()
        bench.child = None
        parent.kill()
        parent.remove()


@pytest.mark.parametrize(
    ("file", "counts", "command", "code"),
    [
        ("memory.events", {"oom": 1, "oom_kill": 1}, "kill -KILL $$", "E_OOM"),
        ("memory.events", {"oom": 1, "oom_kill": 0}, "kill -KILL $$", "E_SIGNAL"),
        ("pids.events", {"max": 7}, "exit 2", "E_PIDS"),
        ("pids.events", {"max": 7}, "exit 0", None),
    ],
)
def test_what_the_kernel_has_counted(
    bench: Bench, file: str, counts: dict[str, int], command: str, code: str | None
) -> None:
    real = Group.events
    with grouped(bench):
        bench.start(
            lambda patch: patch.setattr(
                Group, "events", lambda group, name: counts if name == file else real(group, name)
            )
        )
        bench.submit("j1", command)
        ended = bench.run("j1")
        if bench.group_parent is not None:
            assert ended.code == code
        assert ended.clean


def test_the_limit_in_force_is_the_kernels(tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text("1048576\n")
    (tmp_path / "pids.max").write_text("max\n")
    group = Group(tmp_path)
    found = [group.limit(name) for name in ("memory.max", "pids.max", "io.max")]
    assert found == [1048576, None, None]


# --- what it leaves behind ---------------------------------------------------------------------------------


@pytest.mark.parametrize("in_group", [True, False])
def test_what_cannot_be_killed_is_named_with_its_state(bench: Bench, in_group: bool) -> None:
    def prepare(patch: pytest.MonkeyPatch) -> None:
        patch.setattr(Job, "kill_all", lambda _job, _timeout_s: False)

    def run() -> None:
        bench.start(prepare)
        directory = bench.submit("j1", "trap '' TERM; echo ready; while :; do sleep 600 & wait; done")
        pid = begun(bench)
        log, deadline = directory / "logs" / "exec.log", clock.now() + WAIT_S
        while not (log.exists() and log.read_text()):
            assert clock.now() < deadline
        bench.send(CancelJob("j1", "cancel"))
        ended = bench.ended()
        assert (ended.code, ended.clean) == ("E_CANCELLED", False)
        assert f"{pid} (sleeping)" in ended.remains
        assert ended.remains.endswith(" of job j1 could not be killed within 1 s")
        assert outcome_of(bench).code == "E_CANCELLED"
        shell = psutil.Process(pid)
        # Before it can start the next one.
        shell.suspend()
        for process in [*shell.children(), shell]:
            process.kill()

    if in_group:
        with grouped(bench):
            run()
    else:
        run()


@contextmanager
def stranger() -> Iterator["subprocess.Popen[bytes]"]:
    """Run something as the slot's user that is no child of the job's, as cron would."""
    process = subprocess.Popen(["/bin/sleep", "600"], user=STRANGER.uid, group=STRANGER.gid, extra_groups=[])
    try:
        yield process
    finally:
        process.kill()
        process.wait()


@contextmanager
def slot_with_user() -> Iterator[Bench]:
    """Give a worker whose jobs have a user of their own, in a directory that this user can reach."""
    with tempfile.TemporaryDirectory() as directory:
        Path(directory).chmod(0o755)
        bench = Bench(Path(directory))
        bench.runs_as = STRANGER
        bench.delays = replace(bench.delays, kill=WAIT_S)
        try:
            yield bench
        finally:
            bench.stop()


def test_processes_are_found_by_their_user() -> None:
    own = cleanup.processes_of(os.getuid()) if os.getuid() else [os.getpid()]
    assert os.getpid() in own
    assert cleanup.processes_of(STRANGER.uid) == []
    if ROOT:
        with stranger() as process:
            assert cleanup.processes_of(STRANGER.uid) == [process.pid]


def test_what_a_job_had_started_elsewhere_is_ended_with_it() -> None:
    if not ROOT:
        assert cleanup.kill_processes_of(STRANGER.uid, WAIT_S) == []
        return
    with slot_with_user() as bench:
        bench.start()
        with stranger() as process:
            bench.submit("j1", "id -u")
            bench.send(StartJob("j1"))
            # It is our child, and only gone when we have taken note.
            assert process.wait(WAIT_S) == -signal.SIGKILL
            ended = bench.ended()
        assert (ended.code, ended.clean, ended.remains) == (None, True, "")
        assert outcome_of(bench).log.tail == f"{STRANGER.uid}\n"


def test_a_user_that_keeps_processes_is_told_with_them() -> None:
    if not ROOT:
        assert cleanup.processes_of(STRANGER.uid) == []
        return
    with slot_with_user() as bench:
        bench.delays = replace(bench.delays, kill=0.1)
        bench.start(lambda patch: patch.setattr(signal, "pidfd_send_signal", lambda *_: None))
        with stranger() as process:
            bench.submit("j1", "exit 0")
            ended = bench.run("j1")
        assert (ended.code, ended.clean) == (None, False)
        assert ended.remains == f"user {STRANGER.name} still owns the process {process.pid} (sleeping)"
