"""Starts a job's program within its limits, and tracks the job's processes until all have ended.

The slot's worker uses this module. The worker has a single thread, so Python may run between fork and exec,
and no children but the job's. `subprocess` does not serve: it loses the reason of a failure before the exec,
fixes the order of the steps, and reaps without the resource usage.
"""

import contextlib
import ctypes
import errno
import fcntl
import os
import signal
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NoReturn, Self

import psutil

from aitbc_miner.cgroup.group import RETRY_S, Group
from aitbc_miner.errors import ErrorCode, JobError
from aitbc_miner.jobs import ExitStatus, Usage
from aitbc_miner.sandbox.bubblewrap import Enclosed, how_it_ended
from aitbc_miner.util.clock import now
from aitbc_miner.util.limits import ProcessLimits, apply
from aitbc_miner.util.system import PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS, PR_SET_PDEATHSIG, prctl

REPORT_FD = 3
"""The child's descriptor of its report pipe: right after the standard three, so every language can use it."""

JOB_OOM_SCORE = 500
"""The kernel's order of killing if the machine is out of memory (proc(5)): jobs first, the node last. The
node's own score is negative, and a job must not inherit it."""

_PYTHON = ctypes.PyDLL(None, use_errno=True)
# linux/sched.h; the call has the same number on all of Debian's architectures.
_CLONE_INTO_CGROUP = 0x200000000
_SYS_CLONE3 = 435

# Above all numbers of a program's descriptors.
_HIGH = 20

# Errors before the exec for which neither the program nor its limits are to blame.
_SCARCE = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO, errno.EAGAIN})

Steps = list[tuple[str, Callable[[], object]]]


def become_subreaper() -> None:
    """Have the kernel make every orphaned descendant of our process its child, until our process exits."""
    prctl(PR_SET_CHILD_SUBREAPER, 1)


def _descendants(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


class Job:
    """A started program and all its descendants.

    `pidfd` becomes readable when the program itself ends. Use the job as a context manager, or `close()` it.
    """

    def __init__(self, pid: int, group: Group | None, enclosed: int | None = None) -> None:
        self.pid = pid
        self.group = group
        self._enclosed = enclosed
        self.pidfd = os.pidfd_open(pid)
        self._started = now()
        self._ended: float | None = None
        self._exit: ExitStatus | None = None
        self._user_s = self._system_s = 0.0
        self._maxrss = 0
        self._io: tuple[int, int] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the pidfd; ends no process."""
        if self.pidfd >= 0:
            os.close(self.pidfd)
            self.pidfd = -1

    def begin(self) -> None:
        """Count the program's time from now on: until now the program has waited for a task."""
        self._started = now()

    def poll(self) -> ExitStatus | None:
        """Return the program's exit, or None while the program runs. Its descendants may still be alive.

        Also reaps ended orphans: otherwise the zombies of a long job would use up its process limit.
        """
        if self._exit is None:
            self._reap()
        return self._exit

    def _collect(self, pid: int) -> None:
        """Reap an ended child, with its status and usage."""
        if pid == self.pid:
            # A zombie still has its counters, including the counters of the children that it reaped.
            self._io = _io_of(pid)
        _, status, used = os.wait4(pid, 0)
        self._user_s += used.ru_utime
        self._system_s += used.ru_stime
        self._maxrss = max(self._maxrss, used.ru_maxrss * 1024)
        if pid == self.pid:
            code = os.waitstatus_to_exitcode(status)
            ended = ExitStatus(status=code) if code >= 0 else ExitStatus(signal=-code)
            self._exit = ended if self._enclosed is None else how_it_ended(self._enclosed, ended)
            self._ended = now()

    def _reap(self) -> bool:
        """Collect all ended children; True if our process has no child left."""
        while True:
            try:
                # Only look (WNOWAIT): `_collect` reaps, and reads the counters first.
                ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                return True
            if ended is None:
                return False
            self._collect(ended.si_pid)

    def usage(self) -> Usage:
        """Return the job's usage: by the counters of its cgroup if present, else by the reaped children.

        The counters of the cgroup begin with its creation. A peak from getrusage(2) is the peak of the
        largest single process, and at least the size of the worker, because the program was forked from the
        worker.
        """
        group = self.group
        cpu = group.cpu_usage() if group else None
        peak = group.memory_peak() if group else None
        read, written = (group.io_bytes() if group else None) or self._io or (None, None)
        return Usage(
            wall_s=(self._ended or now()) - self._started,
            user_s=cpu.user_s if cpu else self._user_s,
            system_s=cpu.system_s if cpu else self._system_s,
            peak_memory_bytes=self._maxrss or None if peak is None else peak,
            read_bytes=read,
            written_bytes=written,
        )

    def terminate(self) -> None:
        """Ask the processes of the job's cgroup, else of its sandbox or process group, to end (SIGTERM).

        bubblewrap gets no signal: with bubblewrap, the sandbox and all its processes would end at once.
        """
        if self.group:
            self.group.signal(signal.SIGTERM, but=None if self._enclosed is None else self.pid)
        elif self._enclosed is not None:
            _signal_each(set(_descendants(self.pid)), signal.SIGTERM)
        elif self._exit is None:
            # After the program is reaped, its number may belong to another process.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGTERM)

    def kill_all(self, timeout_s: float) -> bool:
        """Kill and reap all processes of the job's cgroup, and all descendants of our process.

        Our process must be a subreaper.

        Returns:
            False if a process survives `timeout_s`: it hangs in the kernel, and the slot must not be used
            until its end.
        """
        deadline = now() + timeout_s
        if self.group is not None:
            self.group.kill()
            if not self.group.wait_empty(timeout_s):
                return False
        # A job that runs as the miner's user may have moved itself out of its group.
        return self._kill_descendants(deadline)

    def survivors(self) -> list[int]:
        """List the processes that `kill_all` could not end."""
        return self.group.pids() if self.group else [each.pid for each in _descendants(os.getpid())]

    def _kill_descendants(self, deadline: float) -> bool:
        # Without a child, no descendant is left: the kernel gives every orphan to its subreaper at once.
        while not self._reap():
            stopped: set[psutil.Process] = set()
            # Stop first, so that no process forks between listing and kill.
            while (fresh := set(_descendants(os.getpid())) - stopped) and now() < deadline:
                _signal_each(fresh, signal.SIGSTOP)
                stopped |= fresh
            _signal_each(stopped, signal.SIGKILL)
            if now() >= deadline:
                return False
            time.sleep(RETRY_S)
        return True


def _signal_each(processes: set[psutil.Process], number: int) -> None:
    for process in processes:
        # A process that we may not signal remains our descendant: the caller goes on until its deadline.
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            process.send_signal(number)


def _io_of(pid: int) -> tuple[int, int] | None:
    try:
        text = Path(f"/proc/{pid}/io").read_text("ascii")
    except OSError:
        return None  # some kernels do not count, and some show the counters to root only
    counts = dict(line.split(": ") for line in text.splitlines())
    return int(counts["read_bytes"]), int(counts["write_bytes"])


def spawn(  # noqa: PLR0913  # a process needs them all, by name
    argv: Sequence[str],
    *,
    cwd: Path,
    env: Mapping[str, str],
    fds: Mapping[int, int],
    limits: ProcessLimits,
    group: Group | None,
    uid: int | None,
    gid: int | None,
    enclosed: Enclosed | None = None,
) -> Job:
    """Start the program `argv[0]` (without a search in PATH), and return after its exec.

    `fds` maps the program's descriptors to ours; all others are closed. `env` is the whole environment. The
    process is born in the cgroup `group`. `uid` and `gid`, the only group, go together; None: the worker's.
    The user must reach `cwd`. `enclosed` is the source of `argv` if there is a sandbox.

    Raises:
        JobError: E_MANIFEST, too long arguments or environment; E_SANDBOX, the named step failed.
    """
    steps: Steps = [
        ("session", os.setsid),
        ("file descriptors", partial(_arrange_fds, fds)),
        ("limits", partial(apply, limits)),
        ("oom score", _go_first),  # while we are root, or the job could lower it again
        ("no new privileges", partial(prctl, PR_SET_NO_NEW_PRIVS, 1)),
        *_become_user(uid, gid),
        *([("file systems", enclosed.make_mounts)] if enclosed else []),
        ("death signal", partial(_die_with, os.getpid())),  # a change of user clears it
        ("umask", partial(os.umask, 0o077)),
        (f"directory {cwd}", partial(os.chdir, cwd)),  # with the rights of the job's user
        ("signals", _reset_signals),
        ("exec", partial(os.execve, argv[0], list(argv), dict(env))),
    ]
    try:
        return _fork(steps, group, enclosed.status if enclosed else None, fds.values())
    except (OSError, _StepError) as error:
        raise JobError(ErrorCode.E_SANDBOX, f"cannot start {argv[0]}: {error}") from error


def _become_user(uid: int | None, gid: int | None) -> Steps:
    if uid is None and gid is None:
        return []
    if uid is None or gid is None:
        raise ValueError(f"cannot change to uid {uid} and gid {gid}: give both or neither")
    return [
        ("groups", partial(os.setgroups, [])),
        (f"gid {gid}", partial(os.setresgid, gid, gid, gid)),
        (f"uid {uid}", partial(os.setresuid, uid, uid, uid)),
    ]


class _StepError(Exception):
    """The child's report on the step that failed."""


class _CloneArgs(ctypes.Structure):
    """struct clone_args of <linux/sched.h>."""

    _fields_ = tuple(
        (name, ctypes.c_uint64)
        for name in (
            *("flags", "pidfd", "child_tid", "parent_tid", "exit_signal", "stack", "stack_size", "tls"),
            *("set_tid", "set_tid_size", "cgroup"),
        )
    )


def _fork_into(group: Group) -> int:
    """Fork a child that is born in the group. Otherwise like os.fork, for a process with a single thread.

    If the child moved itself into the group, it would wait some 10 ms for the kernel's lock on all moves.

    Raises:
        OSError: the group is gone, or the kernel lacks clone3 with CLONE_INTO_CGROUP (before 5.7).
    """
    fd = os.open(group.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        args = _CloneArgs(flags=_CLONE_INTO_CGROUP, exit_signal=signal.SIGCHLD, cgroup=fd)
        # PyDLL keeps the interpreter's lock, so the child holds the lock, as after os.fork.
        pid: int = _PYTHON.syscall(_SYS_CLONE3, ctypes.byref(args), ctypes.sizeof(args))
        if pid < 0:
            number = ctypes.get_errno()
            remedy = "; if a container forbids clone3, set cgroup.mode: off" if number == errno.ENOSYS else ""
            raise OSError(number, f"in cgroup {group.path}: {os.strerror(number)}{remedy}")
        return pid
    finally:
        os.close(fd)


def _fork(steps: Steps, group: Group | None, enclosed: int | None, kept: Iterable[int]) -> Job:
    """Run the steps in a child, with only the descriptors in `kept`; return after the last step, the exec."""
    with contextlib.ExitStack() as stack:
        # The exec closes the child's end of the pipe, so end of file without a report means success.
        read_end, write_end = os.pipe()
        stack.callback(os.close, read_end)
        with contextlib.ExitStack() as child_side:
            child_side.callback(os.close, write_end)
            # A signal meant for the worker must not run the worker's handler in the child.
            mask = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
            child_side.callback(signal.pthread_sigmask, signal.SIG_SETMASK, mask)
            pid = os.fork() if group is None else _fork_into(group)
            if pid == 0:
                _run_child(steps, write_end, kept)
        try:
            job = Job(pid, group, enclosed)
        except OSError:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            raise
        failure = b"".join(iter(partial(os.read, read_end, 4096), b""))
        if failure:
            os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
            job.poll()
            job.close()
            number, _, why = failure.decode("utf-8", "replace").partition(" ")
            if int(number) == errno.E2BIG:  # the arguments and the environment are the job's
                raise JobError(ErrorCode.E_MANIFEST, f"cannot start the job: {why}")
            raise OSError(int(number), why) if int(number) in _SCARCE else _StepError(why)
        return job


def _run_child(steps: Steps, failure_fd: int, kept: Iterable[int]) -> NoReturn:
    name = "fork"
    try:
        # Move the pipe out of the way of the program's descriptors.
        failure_fd = fcntl.fcntl(failure_fd, fcntl.F_DUPFD_CLOEXEC, _HIGH)
        _close_all_but({failure_fd, *kept})
        for name, step in steps:  # noqa: B007  # the report below needs the name
            step()
    except Exception as error:  # noqa: BLE001  # the parent gets the report, and raises
        number = (error.errno or 0) if isinstance(error, OSError) else 0
        if name == "exec" and number == errno.ENOMEM:
            number = 0  # the slot's own limits may leave no room for the program
        cause = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        said = f"{number} {name}: {cause or type(error).__name__}"
        os.write(failure_fd, said.encode("utf-8", "replace"))
    finally:
        # In any case, this copy of the worker must not go on as a second worker.
        os._exit(127)


def _close_all_but(kept: Collection[int]) -> None:
    # Close before the exec: after the change of user, a process of the slot's user could look into ours.
    for entry in list(Path("/proc/self/fd").iterdir()):
        if int(entry.name) not in kept:
            with contextlib.suppress(OSError):  # the descriptor of the listing is closed already
                os.close(int(entry.name))


def _arrange_fds(fds: Mapping[int, int]) -> None:
    # Copy to high numbers first, because a source may have the number of another's target.
    high = {target: fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, _HIGH) for target, fd in fds.items()}
    for target, fd in high.items():
        os.dup2(fd, target)
    for fd in set(fds.values()) - set(fds):
        os.set_inheritable(fd, False)  # noqa: FBT003  # takes no keyword


def _go_first() -> None:
    # Raising the score needs no privilege.
    score = Path("/proc/self/oom_score_adj")
    if int(score.read_bytes()) < JOB_OOM_SCORE:
        score.write_bytes(b"%d" % JOB_OOM_SCORE)


def _die_with(parent: int) -> None:
    # The worker's death ends the program even without a cgroup.
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        raise OSError("the worker has died meanwhile")


def _reset_signals() -> None:
    # Ignored signals and the mask survive an exec, and Python ignores SIGPIPE.
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
