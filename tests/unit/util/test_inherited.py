"""Whatever a process inherits, the node's own state is the same."""

import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from aitbc_miner.util.inherited import LIMITS, environment

# Writes what it is like after the start; as a module it is begun anew where the environment misleads Python.
PROBE = """
import json, os, resource, signal, sys
from aitbc_miner.util.inherited import begin_node

def start():
    begin_node(f"import runpy; runpy.run_path({__file__!r}, run_name='__main__')")
    numbers = signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}
    fds = sorted(int(name) for name in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{name}"))
    limits = [name for name in dir(resource) if name.startswith("RLIMIT_")]
    said = {
        "ignored": sorted(int(n) for n in numbers if signal.getsignal(n) is signal.SIG_IGN),
        "odd": sorted(int(n) for n in numbers if signal.getsignal(n) not in (signal.SIG_IGN, signal.SIG_DFL)),
        "blocked": sorted(int(n) for n in signal.pthread_sigmask(signal.SIG_BLOCK, [])),
        "timer": signal.getitimer(signal.ITIMER_REAL)[0],
        "umask": os.umask(0),
        "fds": fds,
        "streams": [type(stream).__name__ for stream in (sys.stdin, sys.stdout, sys.stderr)],
        "limits": {name: resource.getrlimit(getattr(resource, name)) for name in limits},
        "nice": os.getpriority(os.PRIO_PROCESS, 0),
        "oom": int(open("/proc/self/oom_score_adj").read()),
        "policy": os.sched_getscheduler(0),
        "cwd": os.getcwd(),
        "environ": dict(os.environ),
        "warnings": sys.warnoptions,
        "encoding": sys.getfilesystemencoding(),
        "optimize": sys.flags.optimize,
        "arguments": sys.argv[1:],
    }
    sys.stderr.write("to stderr\\n")
    with open(sys.argv[1], "w") as file:
        json.dump(said, file)

if __name__ == "__main__":
    start()
"""


def _ignore_all() -> None:
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        signal.signal(number, signal.SIG_IGN)


def _block_all() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, signal.valid_signals())


def _set_timer() -> None:
    signal.setitimer(signal.ITIMER_REAL, 3600)


def _close_standard() -> None:
    os.closerange(0, 3)


def _close_input() -> None:
    os.close(0)


def _leave_open() -> None:
    for number in range(3, 40):
        os.dup2(os.open("/dev/null", os.O_RDONLY), number)
        os.set_inheritable(number, True)


def _low_limits() -> None:
    lower = {"NOFILE": 64, "FSIZE": 1 << 20, "NPROC": 4000, "CPU": 600, "STACK": 4 << 20, "CORE": 0}
    for name, soft in lower.items():
        number = getattr(resource, f"RLIMIT_{name}")
        resource.setrlimit(number, (soft, resource.getrlimit(number)[1]))


def _low_rank() -> None:
    os.nice(15)
    os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    Path("/proc/self/oom_score_adj").write_text("900")


def _lost_directory(directory: Path) -> Callable[[], None]:
    def lose() -> None:
        place = directory / "lost"
        place.mkdir()
        os.chdir(place)
        place.rmdir()

    return lose


def start(
    directory: Path, spoil: Callable[[], None] | None = None, environ: Mapping[str, str] | None = None
) -> dict[str, Any]:
    (directory / "probe.py").write_text(PROBE)
    out = directory / "said.json"
    subprocess.run(
        [sys.executable, str(directory / "probe.py"), str(out)],
        check=True,
        preexec_fn=spoil,
        env={"PATH": "/nowhere", **(environ or {})},
        cwd=directory,
        timeout=60,
    )
    said: dict[str, Any] = json.loads(out.read_text())
    return said


GOOD_SIGNALS = sorted(
    map(int, (signal.SIGHUP, signal.SIGPIPE, signal.SIGTTIN, signal.SIGTTOU, signal.SIGXFSZ))
)


@pytest.mark.parametrize(
    "spoil",
    [
        None,
        _ignore_all,
        _block_all,
        _set_timer,
        _close_standard,
        _close_input,
        _leave_open,
        _low_limits,
        pytest.param(
            _low_rank,
            marks=pytest.mark.xfail(os.geteuid() != 0, reason="only root may take it back", strict=True),
        ),
        "lost directory",
        lambda: os.umask(0o777) and None,
        os.setsid,
    ],
)
def test_what_a_parent_leaves_does_not_matter(spoil: Any, tmp_path: Path) -> None:
    said = start(tmp_path, _lost_directory(tmp_path) if spoil == "lost directory" else spoil)
    assert said["ignored"] == GOOD_SIGNALS
    assert said["odd"] == []
    assert said["blocked"] == []
    assert said["timer"] == 0
    assert said["umask"] == 0o022
    assert said["fds"] == [0, 1, 2]
    assert said["streams"] == ["TextIOWrapper"] * 3
    assert said["nice"] <= 0
    assert said["oom"] <= 0
    assert said["policy"] == os.SCHED_OTHER
    assert said["cwd"] == "/"
    for name, (soft, hard) in LIMITS.items():
        # Where not even root may go higher here, as high as can be.
        most = resource.getrlimit(getattr(resource, f"RLIMIT_{name}"))[1]
        wanted = [_lower(soft, most), _lower(hard, most)]
        assert said["limits"][f"RLIMIT_{name}"] in (wanted, [soft, hard]), name


def _lower(wanted: int, most: int) -> int:
    return most if wanted == resource.RLIM_INFINITY or 0 <= most < wanted else wanted


@pytest.mark.parametrize(
    "environ",
    [
        {"PYTHONWARNINGS": "error", "PYTHONOPTIMIZE": "2"},
        {"PYTHONPATH": "/nowhere"},
        {"PYTHONINSPECT": "1"},
        {"PYTHONUTF8": "0", "LC_ALL": "C"},
        {"LC_ALL": "en_US.ISO-8859-1", "TZ": "Pacific/Chatham", "LANGUAGE": "de"},
        {"LD_DEBUG": "", "GLIBC_TUNABLES": "glibc.malloc.check=0", "MALLOC_ARENA_MAX": "1"},
        {"SSLKEYLOGFILE": "/tmp/keys", "OPENSSL_CONF": "/nowhere", "SSL_CERT_FILE": "/nowhere"},
        {"TMPDIR": "/nowhere", "HOSTALIASES": "/nowhere"},
    ],
)
def test_what_the_environment_says_of_libraries_does_not_matter(
    environ: dict[str, str], tmp_path: Path
) -> None:
    kept = {"MINER_AUTH": "kept", "http_proxy": "kept", "LD_LIBRARY_PATH": "/kept"}
    said = start(tmp_path, environ=kept | environ)
    assert said["environ"].pop("PATH").startswith("/usr/local/sbin:")
    assert said["environ"] == {**kept, "LANG": "C.UTF-8", "LC_ALL": "C.UTF-8"}
    assert said["encoding"] == "utf-8"
    assert said["warnings"] == []
    assert said["optimize"] == 0
    assert said["arguments"] == [str(tmp_path / "said.json")]


def test_a_name_that_only_begins_like_one_is_kept() -> None:
    assert (
        environment({"TZ_OF_OFFICE": "a", "LANGUAGES": "b"}).items()
        >= {"TZ_OF_OFFICE": "a", "LANGUAGES": "b"}.items()
    )
