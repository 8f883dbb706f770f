"""Starting and ending real programs, from a helper process as they are started from a worker.

Without a cgroup, ending a job means ending every descendant of the caller, which must not be pytest.
"""

import itertools
import multiprocessing
import os
import resource
import select
import signal
import sys
import traceback
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest

from aitbc_miner.cgroup.group import CgroupError, Group, find_mount, own_group
from aitbc_miner.errors import ErrorCode, JobError
from aitbc_miner.jobs import ExitStatus, Usage
from aitbc_miner.sandbox.spawn import JOB_OOM_SCORE, Job, become_subreaper, spawn
from aitbc_miner.util.clock import now
from aitbc_miner.util.limits import ProcessLimits

DEADLINE_S = 120.0
ROOT = os.geteuid() == 0
# Belongs to nobody, by systemd's table of ids.
UID, GID = 60600, 60601
SH = "/bin/sh"
MARK = "AITBC_TEST_MARK"
MANY = 50

# --- the helper process ------------------------------------------------------------------------------------


def in_worker(task: Callable[..., Any], *args: object) -> Any:
    """Call `task(*args)` in a process of its own, which then has the children, and give what it returns."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_worker, args=(theirs, task, args))
    process.start()
    theirs.close()
    try:
        assert ours.poll(2 * DEADLINE_S), "the helper did not answer in time"
        result, error = ours.recv()
    finally:
        ours.close()
        process.join(5)
        process.kill()
        process.join()
        process.close()
    assert error is None, error
    return result


def _worker(end: "Connection[Any, Any]", task: Callable[..., Any], args: Sequence[object]) -> None:
    become_subreaper()
    try:
        end.send((task(*args), None))
    except BaseException:  # noqa: BLE001  # told to the test, which fails with it
        end.send((None, traceback.format_exc()))


@pytest.fixture
def mark() -> Iterator[str]:
    """Yield a word that all of a job's processes carry; afterwards none of them may be alive."""
    word = uuid.uuid4().hex
    yield word
    left = marked(word)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert left == []


def marked(word: str) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and word.encode() in (entry / "environ").read_bytes():
                found.append(int(entry.name))
        except OSError:
            continue  # gone, or somebody else's
    return found


_numbers = itertools.count()


@pytest.fixture(params=["cgroup", "no cgroup"])
def group(request: pytest.FixtureRequest) -> Iterator[Path | None]:
    """Yield a group of our own, or None; where this user may make none, that is tested and it is None."""
    if request.param == "no cgroup":
        yield None
        return
    mount = find_mount()
    if mount is None or not mount.writable:
        with pytest.raises(CgroupError, match="cannot make cgroup"):
            Group(Path(mount.path if mount else "/sys/fs/cgroup") / f"aitbc-spawn-{os.getpid()}").create()
        yield None
        return
    made = Group(own_group(mount) / f"aitbc-spawn-{os.getpid()}-{next(_numbers)}")
    made.create()
    try:
        yield made.path
    finally:
        made.kill()
        made.remove()


class Ran(NamedTuple):
    """What came of a program that ended by itself."""

    exit: ExitStatus
    out: str
    report: str
    usage: Usage


@contextmanager
def started(
    argv: Sequence[str],
    group: Path | None = None,
    *,
    env: Mapping[str, str] | None = None,
    cwd: Path = Path("/"),
    stdin: int | None = None,
    limits: ProcessLimits | None = None,
    reports: bool = False,
    user: tuple[int, int] | None = None,
) -> Iterator[tuple[Job, int, int | None]]:
    """Start a program; yields it, and the reading ends of its output and of its reports."""
    with ExitStack() as stack:
        log_read, log_write = os.pipe()
        stack.callback(os.close, log_read)
        report_read = report_write = None
        if reports:
            report_read, report_write = os.pipe()
            stack.callback(os.close, report_read)
        null = os.open(os.devnull, os.O_RDONLY)
        stack.callback(os.close, null)
        try:
            job = spawn(
                argv,
                cwd=cwd,
                env=dict(env or {}),
                fds={0: null if stdin is None else stdin, 1: log_write, 2: log_write}
                | ({} if report_write is None else {3: report_write}),
                limits=limits or ProcessLimits(),
                group=Group(group) if group else None,
                uid=user[0] if user else None,
                gid=user[1] if user else None,
            )
        finally:
            os.close(log_write)
            if report_write is not None:
                os.close(report_write)
        with job:
            yield job, log_read, report_read


def ended(job: Job) -> ExitStatus:
    """Wait for the program's own end."""
    assert select.select([job.pidfd], [], [], DEADLINE_S)[0]
    status = job.poll()
    assert status
    return status


def everything(fd: int | None) -> str:
    if fd is None:
        return ""
    data = b""
    while select.select([fd], [], [], DEADLINE_S)[0] and (more := os.read(fd, 65536)):
        data += more
    return data.decode()


def lines(fd: int, count: int) -> list[str]:
    """Read this many lines, which are the processes' words that they are ready."""
    data, deadline = b"", now() + DEADLINE_S
    while data.count(b"\n") < count:
        assert select.select([fd], [], [], max(0.0, deadline - now()))[0], f"only {data!r}"
        data += os.read(fd, 65536)
    return data.decode().splitlines()


def run(argv: Sequence[str], group: Path | None = None, options: Mapping[str, Any] | None = None) -> Ran:
    with started(argv, group, **(options or {})) as (job, log, report):
        out, told = everything(log), everything(report)
        status = ended(job)
        assert job.kill_all(DEADLINE_S)
        return Ran(status, out, told, job.usage())


def status_of(out: str) -> dict[str, str]:
    """Read the text of /proc/self/status."""
    return dict(line.split(":\t", 1) for line in out.splitlines() if ":\t" in line)


# --- how it ends -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("exit 0", ExitStatus(status=0)),
        ("exit 7", ExitStatus(status=7)),
        ("exit 255", ExitStatus(status=255)),
        ("kill -SEGV $$", ExitStatus(signal=signal.SIGSEGV)),
        ("kill -KILL $$", ExitStatus(signal=signal.SIGKILL)),
        # What a shell says of a killed child is an exit status and not a signal.
        ("exit 137", ExitStatus(status=137)),
    ],
)
def test_the_end_is_told_as_it_was(script: str, expected: ExitStatus) -> None:
    assert in_worker(run, [SH, "-c", script]).exit == expected


def test_the_program_gets_its_input_and_its_environment_and_nothing_else() -> None:
    ran = in_worker(with_input, b"a line\n", ["/usr/bin/env"])
    assert ran.out == "A=1\nB=two words\n"
    assert in_worker(with_input, b"x" * 100_000, ["/bin/cat"]).out == "x" * 100_000


def with_input(data: bytes, argv: Sequence[str]) -> Ran:
    stdin = os.memfd_create("stdin")
    os.write(stdin, data)
    os.lseek(stdin, 0, os.SEEK_SET)
    return run(argv, None, {"stdin": stdin, "env": {"A": "1", "B": "two words"}})


def test_both_outputs_go_to_the_log_in_order_and_reports_have_their_own_way() -> None:
    script = "echo one; echo two >&2; echo three; echo told >&3"
    ran = in_worker(run, [SH, "-c", script], None, {"reports": True})
    assert (ran.out, ran.report) == ("one\ntwo\nthree\n", "told\n")


def test_a_running_program_has_no_end_yet() -> None:
    in_worker(poll_while_running)


def poll_while_running() -> None:
    read, write = os.pipe()
    with started([SH, "-c", "echo ready; read x; exit 3"], stdin=read) as (job, log, _):
        lines(log, 1)
        assert job.poll() is None
        assert not select.select([job.pidfd], [], [], 0)[0]
        os.write(write, b"\n")
        assert ended(job) == ExitStatus(status=3)
        assert job.poll() == ExitStatus(status=3)
        assert job.kill_all(DEADLINE_S)
        # Its number may be anybody's now.
        job.terminate()
        assert job.kill_all(DEADLINE_S)
        assert job.poll() == ExitStatus(status=3)


# --- what it is given --------------------------------------------------------------------------------------


def test_the_program_is_in_its_cgroup_from_its_first_instruction(group: Path | None) -> None:
    out = in_worker(run, ["/bin/cat", "/proc/self/cgroup"], group).out
    own = next(line for line in out.splitlines() if line.startswith("0::"))
    here = next(line for line in Path("/proc/self/cgroup").read_text().splitlines() if line.startswith("0::"))
    assert own == (here if group is None else f"{here.rstrip('/')}/{group.name}")


def test_only_the_descriptors_that_were_given_are_open() -> None:
    assert in_worker(with_leaks, False) == ["0", "1", "2"]
    assert in_worker(with_leaks, True) == ["0", "1", "2", "3"]


def with_leaks(reports: bool) -> list[str]:
    """Start a program with careless descriptors lying about; what it finds open."""
    for target in (3, 7, 10, 11, 40, 200):
        if not Path(f"/proc/self/fd/{target}").exists():
            os.dup2(os.open("/etc/passwd", os.O_RDONLY), target, inheritable=True)
    script = "for fd in /proc/$$/fd/*; do echo ${fd##*/}; done"
    out = run([SH, "-c", script], None, {"reports": reports}).out
    return sorted(name for name in out.split() if not is_shells_own(name, reports=reports))


def is_shells_own(name: str, *, reports: bool) -> bool:
    # Expanding the pattern, a shell reads the directory through a descriptor that is the next free one.
    return name == ("4" if reports else "3")


def test_the_descriptors_come_right_whatever_their_numbers_were() -> None:
    assert in_worker(with_low_numbers) == "in\ntold\n"


def with_low_numbers() -> str:
    """Start a program whose input has the number of its output, and the other way round."""
    data = os.memfd_create("in")
    os.write(data, b"in\n")
    os.lseek(data, 0, os.SEEK_SET)
    out = os.memfd_create("out")
    os.dup2(data, 1, inheritable=False)
    os.dup2(out, 0, inheritable=False)
    spawned = spawn(
        [SH, "-c", "cat; echo told >&3"],
        cwd=Path("/"), env={"PATH": "/bin:/usr/bin"}, fds={0: 1, 1: 0, 2: 0, 3: 0},
        limits=ProcessLimits(), group=None, uid=None, gid=None,
    )  # fmt: skip
    with spawned as job:
        assert ended(job) == ExitStatus(status=0)
        assert job.kill_all(DEADLINE_S)
    return os.pread(0, 100, 0).decode()


def test_limits_hold_in_the_program() -> None:
    cpu = min(os.sched_getaffinity(0))
    limits = ProcessLimits(
        rlimits={resource.RLIMIT_NOFILE: 64, resource.RLIMIT_CORE: 0, resource.RLIMIT_FSIZE: 4096},
        nice=7,
        ionice=(int(psutil.IOPRIO_CLASS_BE), 6),
        cpus=(cpu,),
    )
    argv = ["/bin/cat", "/proc/self/limits", "/proc/self/status", "/proc/self/stat"]
    out = in_worker(run, argv, None, {"limits": limits}).out
    table = {line[:26].strip(): line[26:].split()[:2] for line in out.splitlines()}
    assert table["Max open files"] == ["64", "64"]
    assert table["Max core file size"] == ["0", "0"]
    assert table["Max file size"] == ["4096", "4096"]
    assert status_of(out)["Cpus_allowed_list"] == str(cpu)
    assert out.splitlines()[-1].rpartition(") ")[2].split()[16] == "7"


def test_the_program_gains_no_privileges_and_inherits_no_signal_settings() -> None:
    out = in_worker(with_odd_signals)
    status = status_of(out)
    assert status["NoNewPrivs"] == "1"
    assert int(status["SigIgn"], 16) == 0
    assert int(status["SigBlk"], 16) == 0
    assert int(status["ShdPnd"], 16) == 0


def with_odd_signals() -> str:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2})
    out = run(["/bin/cat", "/proc/self/status"]).out
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == {signal.SIGUSR2} | before
    return out


def test_the_program_leads_its_session_in_its_directory_under_its_umask(tmp_path: Path) -> None:
    script = "umask; pwd -P; cat /proc/$$/stat"
    env = {"PATH": "/bin:/usr/bin"}
    out = in_worker(run, [SH, "-c", script], None, {"cwd": tmp_path, "env": env}).out.splitlines()
    assert out[:2] == ["0077", str(tmp_path.resolve())]
    pid, rest = out[2].split()[0], out[2].rpartition(") ")[2].split()
    # Process group and session are its own.
    assert rest[2:4] == [pid, pid]


def test_another_user_with_that_group_alone() -> None:
    argv, options = ["/bin/cat", "/proc/self/status"], {"user": (UID, GID)}
    if not ROOT:
        with pytest.raises(AssertionError, match=r"cannot start /bin/cat: groups: "):
            in_worker(run, argv, None, options)
        return
    status = status_of(in_worker(run, argv, None, options).out)
    assert status["Uid"].split() == [str(UID)] * 4
    assert status["Gid"].split() == [str(GID)] * 4
    assert status["Groups"].split() == []
    assert {int(status[name], 16) for name in ("CapInh", "CapPrm", "CapEff", "CapAmb")} == {0}


@pytest.mark.parametrize(("of_worker", "of_job"), [(0, JOB_OOM_SCORE), (777, 777)])
def test_the_kernel_takes_jobs_first_when_memory_runs_out(of_worker: int, of_job: int) -> None:
    assert in_worker(scored, of_worker) == f"{of_job}\n"


def scored(own: int) -> str:
    """Start a program from a worker with this score, and give the program's own."""
    Path("/proc/self/oom_score_adj").write_text(str(own))
    user = (UID, GID) if ROOT else None
    return run(["/bin/cat", "/proc/self/oom_score_adj"], None, {"user": user}).out


def test_a_user_without_a_group_is_a_mistake_of_the_caller() -> None:
    with pytest.raises(ValueError, match="give both or neither"), started([SH], user=(UID, None)):  # type: ignore[arg-type]
        pass


# --- when it cannot start ----------------------------------------------------------------------------------


@pytest.fixture
def unusable(tmp_path: Path) -> Path:
    (tmp_path / "plain").write_text("just text")
    (tmp_path / "binary").write_bytes(b"\0\1\2\3")
    (tmp_path / "binary").chmod(0o755)
    (tmp_path / "orphan").write_text("#!/nowhere/interpreter\n")
    (tmp_path / "orphan").chmod(0o755)
    (tmp_path / "folder").mkdir()
    return tmp_path


@pytest.mark.parametrize(
    ("program", "said"),
    [
        ("missing", "exec: No such file or directory"),
        ("plain", "exec: Permission denied"),
        ("binary", "exec: Exec format error"),
        ("orphan", "exec: No such file or directory"),
        ("folder", "exec: Permission denied"),
        ("plain/below", "exec: Not a directory"),
    ],
)
def test_a_program_that_cannot_be_executed_is_named(
    unusable: Path, group: Path | None, program: str, said: str
) -> None:
    code, message = in_worker(refused, [str(unusable / program)], group)
    assert (code, message) == (ErrorCode.E_SANDBOX, f"cannot start {unusable / program}: {said}")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"cwd": Path("/nowhere")}, "directory /nowhere: No such file or directory"),
        ({"cwd": Path("/etc/passwd")}, "directory /etc/passwd: Not a directory"),
        ({"env": {"A": "x\0y"}}, "exec: embedded null byte"),
        ({"env": {"A=B": "x"}}, "exec: illegal environment variable name"),
        ({"limits": ProcessLimits(cpus=(4000,))}, "limits: cannot limit cpuset to (4000,): "),
        (
            {"limits": ProcessLimits(rlimits={resource.RLIMIT_NOFILE: -5})},
            "limits: cannot limit nofile to -5",
        ),
    ],
)
def test_a_step_that_fails_is_named(options: Mapping[str, Any], said: str) -> None:
    code, message = in_worker(refused, [SH, "-c", "exit 0"], None, options)
    assert code is ErrorCode.E_SANDBOX
    assert message.startswith(f"cannot start {SH}: {said}")


@pytest.mark.parametrize("options", [{"env": {"MORE": "a" * 200_000}}, {"argv": [SH, "-c", "a" * 200_000]}])
def test_arguments_that_are_too_long_are_the_fault_of_the_job(options: dict[str, Any]) -> None:
    argv = options.pop("argv", [SH, "-c", "exit 0"])
    code, message = in_worker(refused, argv, None, options)
    assert (code, message) == (ErrorCode.E_MANIFEST, "cannot start the job: exec: Argument list too long")


def test_a_directory_that_its_user_cannot_reach_fails_before_the_program(tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0o700)
    options: dict[str, Any] = {"cwd": tmp_path / "closed"}
    if ROOT:
        options["user"] = (UID, GID)
    else:
        (tmp_path / "closed").chmod(0)
    message = in_worker(refused, [SH, "-c", "exit 0"], None, options)[1]
    assert message == f"cannot start {SH}: directory {tmp_path / 'closed'}: Permission denied"


def test_a_missing_group_is_named(tmp_path: Path) -> None:
    code, message = in_worker(refused, [SH], tmp_path / "gone")
    assert code is ErrorCode.E_SANDBOX
    assert str(tmp_path / "gone") in message


def open_fds() -> list[str]:
    return sorted(entry.name for entry in Path("/proc/self/fd").iterdir())


def refused(
    argv: Sequence[str], group: Path | None, options: Mapping[str, Any] | None = None
) -> tuple[ErrorCode, str]:
    """Start what cannot be started; afterwards no process and no descriptor may be left of it."""
    before = open_fds()
    error = None
    try:
        with started(argv, group, **(options or {})):
            pass
    except JobError as caught:
        error = caught
    assert error, "it was started"
    assert open_fds() == before
    assert psutil.Process().children() == []
    assert group is None or not group.exists() or Group(group).pids() == []
    return error.code, error.message


# --- ending it ---------------------------------------------------------------------------------------------

# Each of them ignores SIGTERM, for an ignored signal stays ignored over the exec, has a session of its own,
# and its parent is gone at once: a daemon by double fork and setsid.
HERD = f"""
trap '' TERM
i=1
while [ $i -lt {MANY} ]; do
    ( setsid sh -c 'echo $$; exec sleep 600' & )
    i=$((i + 1))
done
echo $$
exec sleep 600
"""


@pytest.mark.parametrize("after", ["while it runs", "after its end"])
def test_of_fifty_daemons_that_ignore_sigterm_none_is_left(group: Path | None, mark: str, after: str) -> None:
    script = HERD if after == "while it runs" else HERD.removesuffix("exec sleep 600\n") + "exit 5\n"
    pids, status, left = in_worker(end_herd, script, group, mark, after == "while it runs")
    assert len(set(pids)) == MANY
    assert status == (ExitStatus(signal=signal.SIGKILL) if after == "while it runs" else ExitStatus(status=5))
    assert left == []


def end_herd(
    script: str, group: Path | None, mark: str, running: bool
) -> tuple[list[int], ExitStatus | None, list[int]]:
    env = {MARK: mark, "PATH": "/usr/bin:/bin"}
    with started([SH, "-c", script], group, env=env) as (job, log, _):
        pids = [int(line) for line in lines(log, MANY)]
        if running:
            job.terminate()
            assert job.poll() is None
        else:
            ended(job)
        assert all(Path(f"/proc/{pid}").exists() for pid in pids if pid != job.pid)
        assert job.kill_all(DEADLINE_S)
        # Not even as zombies.
        left = [pid for pid in pids if Path(f"/proc/{pid}").exists()]
        assert psutil.Process().children() == []
        return pids, job.poll(), left


# Its parent exits at each step, so whoever looks at it looks at somebody who is about to be gone.
RUNNER_AWAY = f"""
import os, signal
for step in range({MANY}):
    if os.fork():
        os._exit(0)
    os.setsid()
    if step == 5:
        print("ready", flush=True)
signal.pause()
"""


def test_what_forks_away_while_it_is_killed_is_caught(group: Path | None, mark: str) -> None:
    in_worker(end_runner_away, group, mark)


def end_runner_away(group: Path | None, mark: str) -> None:
    argv = [sys.executable, "-I", "-S", "-c", RUNNER_AWAY]
    with started(argv, group, env={MARK: mark}) as (job, log, _):
        lines(log, 1)
        assert job.kill_all(DEADLINE_S)
        assert everything(log) in {"", "ready\n"}
        assert marked(mark) == []
        assert psutil.Process().children() == []


def test_what_left_its_group_is_ended_all_the_same(group: Path | None, mark: str) -> None:
    in_worker(end_deserter, group, mark)


def end_deserter(group: Path | None, mark: str) -> None:
    # A job of the same user as the node may write itself into another group.
    leave = f"echo 0 > {group.parent}/cgroup.procs; " if group else ""
    script = f"( setsid sh -c '{leave}echo ready; exec sleep 600' & ); exec sleep 600"
    with started([SH, "-c", script], group, env={MARK: mark, "PATH": "/usr/bin:/bin"}) as (job, log, _):
        lines(log, 1)
        assert job.kill_all(DEADLINE_S)
        assert marked(mark) == []


def test_what_is_stopped_is_ended_too(group: Path | None, mark: str) -> None:
    in_worker(end_stopped, group, mark)


def end_stopped(group: Path | None, mark: str) -> None:
    with started([SH, "-c", "echo ready; kill -STOP $$"], group, env={MARK: mark}) as (job, log, _):
        lines(log, 1)
        assert job.kill_all(DEADLINE_S)
        assert job.poll() == ExitStatus(signal=signal.SIGKILL)


def test_sigterm_is_heard_by_all_that_have_not_left(group: Path | None, mark: str) -> None:
    status, said = in_worker(terminate, group, mark)
    assert status == ExitStatus(status=42)
    assert sorted(said) == ["child", "parent"]


def terminate(group: Path | None, mark: str) -> tuple[ExitStatus, list[str]]:
    script = """
    exec 4<&0
    sh -c 'trap "echo child; exit 1" TERM; echo ready; read x <&4' &
    trap 'echo parent; exit 42' TERM
    echo ready
    read x
    """
    # Nobody ever writes to it, so that reading waits until the signal comes.
    silent = os.pipe()
    env = {MARK: mark, "PATH": "/usr/bin:/bin"}
    with started([SH, "-c", script], group, env=env, stdin=silent[0]) as (job, log, _):
        lines(log, 2)
        job.terminate()
        said = lines(log, 2)
        status = ended(job)
        assert job.kill_all(DEADLINE_S)
        return status, said


def test_orphans_that_end_do_not_pile_up_while_the_job_runs(group: Path | None, mark: str) -> None:
    in_worker(reap_orphans, group, mark)


def reap_orphans(group: Path | None, mark: str) -> None:
    script = "for i in 1 2 3 4 5; do ( sh -c 'exit 0' & ); done; echo ready; read x"
    silent = os.pipe()
    env = {MARK: mark, "PATH": "/usr/bin:/bin"}
    with started([SH, "-c", script], group, env=env, stdin=silent[0]) as (job, log, _):
        lines(log, 1)
        deadline = now() + DEADLINE_S
        while [child.pid for child in psutil.Process().children()] != [job.pid]:
            assert job.poll() is None
            assert now() < deadline, psutil.Process().children()
        assert job.kill_all(DEADLINE_S)


def test_a_job_does_not_outlive_its_worker(mark: str) -> None:
    ours, theirs = multiprocessing.get_context("spawn").Pipe()
    worker = multiprocessing.get_context("spawn").Process(target=start_and_wait, args=(theirs, mark))
    worker.start()
    try:
        assert ours.poll(DEADLINE_S)
        pidfd = os.pidfd_open(ours.recv())
    finally:
        worker.kill()
        worker.join()
        worker.close()
    try:
        assert select.select([pidfd], [], [], DEADLINE_S)[0]
    finally:
        os.close(pidfd)
        ours.close()
        theirs.close()


def start_and_wait(end: "Connection[Any, Any]", mark: str) -> None:
    with started([SH, "-c", "exec sleep 600"], env={MARK: mark, "PATH": "/usr/bin:/bin"}) as (job, _, _):
        end.send(job.pid)
        signal.pause()


# --- what it used ------------------------------------------------------------------------------------------


def test_the_time_and_memory_that_it_used_are_told(group: Path | None) -> None:
    code = "x = bytearray(64 << 20)\nimport time\nwhile time.process_time() < 0.3: pass"
    usage = in_worker(run, [sys.executable, "-I", "-S", "-c", code], group).usage
    assert usage.user_s + usage.system_s >= 0.3
    assert usage.wall_s >= 0.3
    assert usage.peak_memory_bytes >= 64 << 20
    assert (usage.read_bytes is None) == (usage.written_bytes is None)
