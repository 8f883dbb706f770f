"""Starts a job's program within its limits, and knows its processes until the last of them is gone.

Used by the slot's worker, which has one thread and no children but the job's. Not `subprocess`: there, a
failure before the exec loses its reason, the order of the steps is fixed, and the status is reaped without
its resource usage. Having one thread also means that Python may run between fork and exec.
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
"""Where the child finds its report pipe: right after the standard three, so any language can reach it."""

JOB_OOM_SCORE = 500
"""How the kernel chooses when the whole machine is out of memory: jobs first, the node last (proc(5)). The
node's own score is negative, and a job must not have it."""

_PYTHON = ctypes.PyDLL(None, use_errno=True)
# linux/sched.h; the number of the call is the same on all machines that Debian has.
_CLONE_INTO_CGROUP = 0x200000000
_SYS_CLONE3 = 435

# Above all numbers that a program is given.
_HIGH = 20

# What a child that was to be the program can lack through no fault of the program or of its limits.
_SCARCE = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO, errno.EAGAIN})

Steps = list[tuple[str, Callable[[], object]]]


def become_subreaper() -> None:
    """Have every orphan below this process become its child, however often it forked. Lasts until exit."""
    prctl(PR_SET_CHILD_SUBREAPER, 1)


def _descendants(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


class Job:
    """A started program and all that comes of it.

    `pidfd` becomes readable when the program itself ends; use the job as a context manager, or `close()` it.
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
        """Count its time from now on: so far it has waited for what to do."""
        self._started = now()

    def poll(self) -> ExitStatus | None:
        """Return how the program ended, or None while it runs. Others of the job may still be alive.

        Orphans that have ended are reaped on the way, or those of a long job would use up its process limit.
        """
        if self._exit is None:
            self._reap()
        return self._exit

    def _collect(self, pid: int) -> None:
        """Take the status and the usage of a child that has ended."""
        if pid == self.pid:
            # A zombie still has its counters, with those of the children it waited for.
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
        """Collect all children that have ended; True when this process has no child left."""
        while True:
            try:
                # Peeks, so that the program's own status can never be taken by mistake.
                ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                return True
            if ended is None:
                return False
            self._collect(ended.si_pid)

    def usage(self) -> Usage:
        """Return what the job has used: by its cgroup where that counts, else by what was reaped so far.

        The group's counters run since the group was made. A peak that comes from getrusage(2) is that of the
        largest single process, and never below the worker's own size, from which the program was forked.
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
        """Ask the job's processes to end (SIGTERM): those of its cgroup, else of its process group.

        Not bubblewrap's own, with which its sandbox and so all of them would end at once.
        """
        if self.group:
            self.group.signal(signal.SIGTERM, but=None if self._enclosed is None else self.pid)
        elif self._enclosed is not None:
            _signal_each(set(_descendants(self.pid)), signal.SIGTERM)
        elif self._exit is None:
            # Until the program is reaped its number is its own; afterwards it may be anybody's.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGTERM)

    def kill_all(self, timeout_s: float) -> bool:
        """Kill until nothing of the job is alive, and reap it.

        That means all of its cgroup, and every descendant of the calling process, which must be a subreaper.

        Returns:
            False when something is still there after `timeout_s`: it hangs in the kernel, and the slot must
            not be used again until it is gone.
        """
        deadline = now() + timeout_s
        if self.group is not None:
            self.group.kill()
            if not self.group.wait_empty(timeout_s):
                return False
        # A job with the rights of the miner's own user may have moved itself out of its group.
        return self._kill_descendants(deadline)

    def survivors(self) -> list[int]:
        """Name what `kill_all` could not end."""
        return self.group.pids() if self.group else [each.pid for each in _descendants(os.getpid())]

    def _kill_descendants(self, deadline: float) -> bool:
        # Having no child is proof: an orphan, whatever it did, comes to its subreaper the moment it is one.
        while not self._reap():
            stopped: set[psutil.Process] = set()
            # Stopped first, so that nothing can fork between being seen and being killed.
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
        # One that we may not signal is still our descendant: the caller goes on until its deadline.
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            process.send_signal(number)


def _io_of(pid: int) -> tuple[int, int] | None:
    try:
        text = Path(f"/proc/{pid}/io").read_text("ascii")
    except OSError:
        return None  # some kernels do not count, and some do not tell everybody
    counts = dict(line.split(": ") for line in text.splitlines())
    return int(counts["read_bytes"]), int(counts["write_bytes"])


def spawn(  # noqa: PLR0913  # what a process is made of; every one by name
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
    """Start the program `argv[0]` (PATH is not searched); when this returns, it has begun.

    In it, `fds` are open, each number as what that one is here, and nothing else; `env` is all of its
    environment; it is in `group` from its first instruction on. `uid` and its only group `gid` go together;
    None: those of the worker. `cwd` must be reachable for that user. `enclosed`: where `argv` is from, if so.

    Raises:
        JobError: E_SANDBOX; it was not started, and the message names the step that failed.
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
        (f"directory {cwd}", partial(os.chdir, cwd)),  # as the job's user, who may not reach it
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
    """What the child said before it gave up."""


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
    """Fork a child that is born in the group. Like os.fork, for a process of one thread.

    A child that moved itself there would wait some 10 ms for the kernel's lock on all moves between groups.

    Raises:
        OSError: the group is gone, or the kernel has no clone3 with CLONE_INTO_CGROUP (before 5.7).
    """
    fd = os.open(group.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        args = _CloneArgs(flags=_CLONE_INTO_CGROUP, exit_signal=signal.SIGCHLD, cgroup=fd)
        # PyDLL keeps the interpreter's lock, so the child has it, as after os.fork.
        pid: int = _PYTHON.syscall(_SYS_CLONE3, ctypes.byref(args), ctypes.sizeof(args))
        if pid < 0:
            number = ctypes.get_errno()
            remedy = "; if a container forbids clone3, set cgroup.mode: off" if number == errno.ENOSYS else ""
            raise OSError(number, f"in cgroup {group.path}: {os.strerror(number)}{remedy}")
        return pid
    finally:
        os.close(fd)


def _fork(steps: Steps, group: Group | None, enclosed: int | None, kept: Iterable[int]) -> Job:
    """Run the steps in a child, the last of which is the exec; return when that has happened.

    Of our descriptors it has those in `kept`.
    """
    with contextlib.ExitStack() as stack:
        # The exec closes the child's end of this pipe, so an end without a word means success.
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
            raise OSError(int(number), why) if int(number) in _SCARCE else _StepError(why)
        return job


def _run_child(steps: Steps, failure_fd: int, kept: Iterable[int]) -> NoReturn:
    name = "fork"
    try:
        # Out of the way of the numbers that the program's own descriptors get.
        failure_fd = fcntl.fcntl(failure_fd, fcntl.F_DUPFD_CLOEXEC, _HIGH)
        _close_all_but({failure_fd, *kept})
        for name, step in steps:  # noqa: B007  # the name is for the report below
            step()
    except Exception as error:  # noqa: BLE001  # reported to the parent, which raises it
        number = (error.errno or 0) if isinstance(error, OSError) else 0
        if name == "exec" and number == errno.ENOMEM:
            number = 0  # the slot's own limits may leave no room for the program
        cause = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        said = f"{number} {name}: {cause or type(error).__name__}"
        os.write(failure_fd, said.encode("utf-8", "replace"))
    finally:
        # Whatever happened, this copy of the worker must not go on as a second worker.
        os._exit(127)


def _close_all_but(kept: Collection[int]) -> None:
    # Not left to the exec: a process of the slot's user could look into us once we are his.
    for entry in list(Path("/proc/self/fd").iterdir()):
        if int(entry.name) not in kept:
            with contextlib.suppress(OSError):  # the listing's own is gone
                os.close(int(entry.name))


def _arrange_fds(fds: Mapping[int, int]) -> None:
    # By way of high numbers, for one of the sources may have the number of another's target.
    high = {target: fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, _HIGH) for target, fd in fds.items()}
    for target, fd in high.items():
        os.dup2(fd, target)
    for fd in set(fds.values()) - set(fds):
        os.set_inheritable(fd, False)  # noqa: FBT003  # takes no keyword


def _go_first() -> None:
    # Raising it takes no privilege.
    score = Path("/proc/self/oom_score_adj")
    if int(score.read_bytes()) < JOB_OOM_SCORE:
        score.write_bytes(b"%d" % JOB_OOM_SCORE)


def _die_with(parent: int) -> None:
    # The worker's death ends the program even where no cgroup does.
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        raise OSError("the worker has died meanwhile")


def _reset_signals() -> None:
    # Ignored signals and the mask survive an exec, and Python ignores SIGPIPE.
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
