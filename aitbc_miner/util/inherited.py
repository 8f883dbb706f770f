"""Resets the state that a process inherits from its parent: signals, descriptors, limits, environment.

A shell, `nohup`, cron, a supervisor or a container may leave signals ignored or blocked, timers running,
standard descriptors closed, other descriptors open, limits low, and variables that change Python or libc.
"""

import contextlib
import os
import resource
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

UMASK = 0o022
_ANY = resource.RLIM_INFINITY
MIB = 1 << 20

LIMITS: dict[str, tuple[int, int]] = {
    **dict.fromkeys(("CPU", "FSIZE", "DATA", "AS", "RSS", "NPROC", "RTTIME"), (_ANY, _ANY)),
    "STACK": (8 * MIB, _ANY),
    "NOFILE": (65_536, 65_536),
    "CORE": (0, 0),
    "MEMLOCK": (8 * MIB, 8 * MIB),
    "MSGQUEUE": (819_200, 819_200),
    **dict.fromkeys(("NICE", "RTPRIO"), (0, 0)),
}
"""Soft and hard limits of the node's processes, and of a job unless its slot sets others."""

_LANGUAGE = "C.UTF-8"
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
# These variables change how Python, libc and OpenSSL work, or make OpenSSL log keys. LD_LIBRARY_PATH stays,
# because it may lead to the GPU's driver. Variables of proxies stay, because `check` reports them.
_PREFIXES = ("PYTHON", "LC_", "LD_", "MALLOC_", "GLIBC_", "OPENSSL_", "SSL_CERT_")
_NAMES = frozenset(
    {
        *("LANG", "LANGUAGE", "NLSPATH", "GCONV_PATH", "TZ", "TZDIR", "TMPDIR", "SSLKEYLOGFILE"),
        *("RES_OPTIONS", "LOCALDOMAIN", "HOSTALIASES", "RESOLV_HOST_CONF"),
    }
)
_KEPT = frozenset({"LD_LIBRARY_PATH"})
_TIMERS = (signal.ITIMER_REAL, signal.ITIMER_VIRTUAL, signal.ITIMER_PROF)


def begin_node(again: str) -> None:
    """Reset all inherited state, at the very start of the node's first process.

    The function closes inherited descriptors and may restart the process: `again` is Python code that starts
    the same program.
    """
    begin_command()
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP, signal.SIGPIPE, signal.SIGXFSZ}:
        signal.signal(number, signal.SIG_DFL)
    # SIGHUP would ask for a reload too early; SIGTTOU and SIGTTIN would stop a process in the background.
    for number in (signal.SIGHUP, signal.SIGTTOU, signal.SIGTTIN):
        signal.signal(number, signal.SIG_IGN)
    wanted = environment(os.environ)
    # Python has already read its variables, so only a restart undoes their effect.
    misled = any(name.startswith("PYTHON") for name in os.environ) or sys.getfilesystemencoding() != "utf-8"
    if misled and not sys.flags.isolated:
        _start_again(again, wanted)
    os.environ.clear()
    os.environ.update(wanted)
    for entry in list(Path("/proc/self/fd").iterdir()):
        if (fd := int(entry.name)) > 2:
            with contextlib.suppress(OSError):
                os.close(fd)
    os.chdir("/")
    for step in _rights():
        # A user without these rights may run a node too.
        with contextlib.suppress(OSError, ValueError):
            step()


def begin_command() -> None:
    """Reset the state that every command needs: descriptors 0 to 2, blocked signals, timers, the umask."""
    open_standard()
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    # With SIGCHLD ignored, waitpid(2) finds no children.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for timer in _TIMERS:
        signal.setitimer(timer, 0)
    os.umask(UMASK)


def open_standard() -> None:
    """Open closed descriptors among 0 to 2, which the next opened file would otherwise become."""
    for fd, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        try:
            os.fstat(fd)
        except OSError:
            null = os.open(os.devnull, os.O_RDWR)
            if null != fd:
                os.dup2(null, fd)
                os.close(null)
            os.set_inheritable(fd, True)  # noqa: FBT003  # takes no keyword
        if getattr(sys, name) is None:
            setattr(
                sys, name, os.fdopen(fd, mode, encoding="utf-8", errors="backslashreplace", closefd=False)
            )


def environment(inherited: Mapping[str, str]) -> dict[str, str]:
    """Give the environment of the node's processes."""
    kept = {
        name: text
        for name, text in inherited.items()
        if name in _KEPT or (name not in _NAMES and not name.startswith(_PREFIXES))
    }
    return {**kept, "PATH": _PATH, "LANG": _LANGUAGE, "LC_ALL": _LANGUAGE}


def _start_again(again: str, environ: Mapping[str, str]) -> None:
    """Replace the process by the same program with the same arguments, in a Python that ignores variables."""
    # -I ignores PYTHONPATH, which may have led to this package, so the code adds the package's directory.
    place = str(Path(__file__).resolve().parents[2])
    boot = f"import sys; sys.path.append({place!r}); {again}"
    program = [sys.executable, "-I", "-c", boot, *sys.argv[1:]]
    os.execve(program[0], program, dict(environ))  # noqa: S606


def _rights() -> Iterator[Callable[[], object]]:
    for name, (soft, hard) in LIMITS.items():
        yield partial(_limit, getattr(resource, f"RLIMIT_{name}"), soft, hard)
    yield partial(os.sched_setscheduler, 0, os.SCHED_OTHER, os.sched_param(0))
    # A raised priority may be the operator's choice; a lowered priority would make the node miss deadlines.
    yield lambda: os.setpriority(os.PRIO_PROCESS, 0, min(0, os.getpriority(os.PRIO_PROCESS, 0)))
    yield _ordinary_io
    yield _be_spared


def _limit(number: int, soft: int, hard: int) -> None:
    try:
        resource.setrlimit(number, (soft, hard))
    except (OSError, ValueError):
        # Only root may raise a hard limit.
        most = resource.getrlimit(number)[1]
        hard = hard if most == _ANY else most if hard == _ANY else min(hard, most)
        resource.setrlimit(
            number, (hard if soft == _ANY else soft if hard == _ANY else min(soft, hard), hard)
        )


def _ordinary_io() -> None:
    import psutil  # noqa: PLC0415  # the operator's client does not need psutil

    psutil.Process().ionice(psutil.IOPRIO_CLASS_NONE)


def _be_spared() -> None:
    score = Path("/proc/self/oom_score_adj")
    if int(score.read_bytes()) > 0:
        score.write_bytes(b"0")
