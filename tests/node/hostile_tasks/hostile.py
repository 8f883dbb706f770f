"""A task that does its worst: `trick` names what. Run by the tests of a whole node, as a job."""

import ctypes
import errno
import functools
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from aitbc_miner.task import output_dir, progress, work_dir

REPORTS = int(os.environ.get("AITBC_REPORT_FD", "-1"))
TRICKS: dict[str, Callable[..., Any]] = {}


def trick(function: Callable[..., Any]) -> Callable[..., Any]:
    """Enter a trick under its function's name."""
    TRICKS[function.__name__] = function
    return function


def run(trick: str, **options: Any) -> Any:
    """Do one trick."""
    return TRICKS[trick](**options)


# --- what a job can leave behind ---------------------------------------------------------------------------


@trick
def symlink(target: str) -> None:
    (work_dir() / "promised").symlink_to(target)


@trick
def symlink_in_output(target: str) -> None:
    (output_dir() / "stray").symlink_to(target)


@trick
def linked_directory() -> None:
    (work_dir() / "etc").symlink_to("/etc")


@trick
def fifo() -> None:
    os.mkfifo(output_dir() / "pipe")


@trick
def unix_socket() -> None:
    os.chdir(output_dir())
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind("s")


@trick
def device() -> None:
    os.mknod(output_dir() / "zero", 0o20666, os.makedev(1, 5))


@trick
def hard_link() -> None:
    (output_dir() / "one").write_text("x")
    (work_dir() / "two").hardlink_to(output_dir() / "one")


@trick
def many_files(count: int) -> None:
    for number in range(count):
        (output_dir() / str(number)).touch()


@trick
def many_directories(count: int) -> None:
    for number in range(count):
        (output_dir() / str(number)).mkdir()


@trick
def big_file(megabytes: int) -> None:
    with (output_dir() / "big").open("wb") as file:
        file.truncate(megabytes * 1_000_000)


@trick
def deep_directories(depth: int) -> None:
    os.chdir(output_dir())
    for _ in range(depth):
        Path("d").mkdir()
        os.chdir("d")
    Path("end").touch()


@trick
def odd_name(name: str) -> None:
    with open(bytes(output_dir()) + b"/" + bytes.fromhex(name), "wb"):  # noqa: PTH123  # bytes
        pass


@trick
def no_permissions() -> None:
    (output_dir() / "shut").write_text("x")
    (output_dir() / "shut").chmod(0)
    (output_dir() / "below").mkdir()
    (output_dir() / "below" / "file").write_text("y")
    (output_dir() / "below").chmod(0)
    output_dir().chmod(0)


@trick
def set_uid_file() -> None:
    (output_dir() / "suid").write_text("x")
    (output_dir() / "suid").chmod(0o6777)


@trick
def replace_directories() -> str:
    """Put links to /etc in the places of our own directories."""
    for path in (output_dir(), work_dir()):
        try:
            path.rename(path.with_name("moved-" + path.name))
            path.symlink_to("/etc")
        except PermissionError:
            return "denied"
    return "replaced"


@trick
def litter(count: int) -> None:
    for number in range(count):
        Path(os.environ["TMPDIR"], f"f{number}").touch()


# --- what a job can say ------------------------------------------------------------------------------------


def _say(data: bytes) -> None:
    left = memoryview(data)
    while left:
        left = left[os.write(REPORTS, left) :]


@trick
def garbage_reports() -> str:
    _say(os.urandom(100_000) + b"\n" + b"\0" * 5000 + b'\n{"type":"result"\n[]\n{}\nnull\n')
    return "came back"


@trick
def say(line: str, leave: int) -> None:
    _say(line.encode() + b"\n")
    os._exit(leave)


@trick
def nested_result(depth: int) -> None:
    _say(b'{"type":"result","value":' + b"[" * depth + b"]" * depth + b"}\n")
    os._exit(0)


@trick
def endless_report(megabytes: int) -> str:
    for _ in range(megabytes):
        _say(b"x" * 1_000_000)
    _say(b"\n")
    return "came back"


@trick
def many_reports(count: int, wait: bool = False) -> str:
    if wait:
        (work_dir() / "waiting").touch()
        _wait_for_release()
    for number in range(count):
        progress(number % 100, "\x1b[31m\n" * 50)
    return "came back"


@trick
def bad_progress() -> str:
    _say(b'{"type":"progress","pct":1e308,"note":"\\u0000\\u001b[2J"}\n' * 3)
    _say(b'{"type":"progress","pct":-1e308}\n{"type":"progress","pct":"much"}\n')
    return "came back"


@trick
def flood(megabytes: int) -> str:
    block = b"all work and no play\n" * 50_000
    for _ in range(megabytes):
        os.write(1, block[:1_000_000])
    return "came back"


# --- how a job can end -------------------------------------------------------------------------------------


@trick
def leave_by_exit() -> None:
    sys.exit(0)


@trick
def leave_at_once(status: int) -> None:
    os._exit(status)


@trick
def close_everything() -> None:
    os.closerange(0, 1024)


@trick
def signal_self(number: int) -> None:
    os.kill(os.getpid(), number)
    signal.pause()


@trick
def kill_the_node() -> list[str]:
    """Signal every process that is not ours; gives how each try ended."""
    ended = set()
    for process in psutil.process_iter():
        if process.pid != os.getpid():
            try:
                # Signal 0 kills nobody, and is refused exactly where SIGKILL would be.
                os.kill(process.pid, 0)
                if process.uids().real != os.getuid():
                    ended.add(f"may signal {process.pid}")
            except OSError as error:
                ended.add(errno.errorcode[error.errno or 0])
            except psutil.NoSuchProcess:
                continue
    return sorted(ended - {"ESRCH"})


@trick
def kill_parent() -> str:
    try:
        os.kill(os.getppid(), signal.SIGKILL)
    except PermissionError:
        return "denied"
    return "killed"


# --- jobs that do not end ----------------------------------------------------------------------------------


def _never_end() -> None:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    (work_dir() / f"pid-{os.getpid()}").touch()
    os.chdir("/")
    os.closerange(0, 64)
    while True:
        time.sleep(60)


@trick
def brood(children: int) -> None:
    """Leave children, ignoring SIGTERM, in sessions of their own, and half of them as daemons."""
    for number in range(children):
        child = os.fork()
        if child == 0:
            if number % 2:
                os.setsid()
                if os.fork():
                    os._exit(0)
            _never_end()
        if number % 2:
            os.waitpid(child, 0)
    _never_end()


# --- jobs that take all there is ---------------------------------------------------------------------------


@trick
def burn(seconds: float, mebibytes: int, processes: int) -> int:
    """Fill memory and keep as many cores busy as there are processes, until a file says that it is enough."""
    until = time.monotonic() + seconds
    # Written to, or it would be no more than a promise.
    hoard = [b"x" * (1 << 20) for _ in range(mebibytes)]
    (work_dir() / "burning").touch()
    children: list[int] = []
    while len(children) < processes - 1 and (child := os.fork()):
        children.append(child)
    leader = len(children) == processes - 1
    enough = work_dir() / "enough"
    while time.monotonic() < until and not enough.exists():
        sum(range(100_000))
    if not leader:
        os._exit(0)
    for child in children:
        os.waitpid(child, 0)
    return len(hoard)


# --- what a job can reach ----------------------------------------------------------------------------------


@trick
def wait_for_release() -> str:
    """Be another job for a while: with a secret on disk, until a file says that it is enough."""
    (work_dir() / "secret").write_text("theirs")
    (output_dir() / "secret").write_text("theirs")
    _wait_for_release()
    return "released"


def _wait_for_release() -> None:
    deadline = time.monotonic() + 30
    while not (work_dir() / "release").exists() and time.monotonic() < deadline:
        time.sleep(0.02)


def _try(doing: Callable[[], object]) -> str:
    try:
        doing()
    except OSError as error:
        return errno.errorcode[error.errno or 0]
    return "done"


@trick
def trespass(other: str, node: str, supervisor: int) -> dict[str, Any]:
    """Try to reach what is not ours; gives what came of each try."""
    worker = os.getppid()
    theirs = Path(other)
    return {
        "uids": [*os.getresuid(), *os.getresgid(), *os.getgroups()],
        "environment": dict(os.environ),
        "fds": {
            int(name): str(Path(f"/proc/self/fd/{name}").readlink())
            for name in os.listdir("/proc/self/fd")  # noqa: PTH208  # of descriptors
            if _try(lambda name=name: os.fstat(int(name))) == "done"  # type: ignore[misc]
        },
        "tries": {
            "list the jobs": _try(lambda: os.listdir(theirs.parent)),  # noqa: PTH208
            "list their job": _try(lambda: os.listdir(theirs)),  # noqa: PTH208
            "read their secret": _try((theirs / "work" / "secret").read_bytes),
            "read their output": _try((theirs / "output" / "secret").read_bytes),
            "read their log": _try((theirs / "logs" / "exec.log").read_bytes),
            "read their manifest": _try((theirs / "manifest.json").read_bytes),
            "write into their job": _try((theirs / "mine").touch),
            "write into our record": _try((work_dir().parent / "outcome.json").touch),
            "write into our log": _try(lambda: os.open(work_dir().parent / "logs" / "exec.log", os.O_WRONLY)),
            "read our own state": _try((work_dir().parent / "state.json").read_bytes),
            "read the config": _try((Path(node) / "config.yaml").read_bytes),
            "connect to the control socket": _try(lambda: _connect(Path(node) / "run" / "control.sock")),
            "supervisor's environment": _try(Path(f"/proc/{supervisor}/environ").read_bytes),
            "worker's environment": _try(Path(f"/proc/{worker}/environ").read_bytes),
            "worker's memory": _try(lambda: os.open(f"/proc/{worker}/mem", os.O_RDWR)),
            "worker's descriptors": _try(lambda: os.listdir(f"/proc/{worker}/fd")),  # noqa: PTH208
            "worker's root": _try(lambda: os.listdir(f"/proc/{worker}/root/")),  # noqa: PTH208
            "ptrace": _ptrace(worker),
            "signal the worker": _try(lambda: os.kill(worker, 0)),
            "become root": _try(lambda: os.setresuid(0, 0, 0)),
            "leave the cgroup": _leave_the_cgroup(),
        },
    }


def _connect(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(str(path))


def _ptrace(pid: int) -> str:
    libc = ctypes.CDLL(None, use_errno=True)
    # PTRACE_SEIZE, which stops nobody; it ends with this process.
    if libc.ptrace(0x4206, pid, None, None) == -1:
        return errno.errorcode[ctypes.get_errno()]
    return "done"


def _leave_the_cgroup() -> str:
    for mount in ("/sys/fs/cgroup/cgroup.procs", "/sys/fs/cgroup/unified/cgroup.procs"):
        if (came_of_it := _try(functools.partial(Path(mount).write_text, "0"))) != "ENOENT":
            return came_of_it
    return "ENOENT"
