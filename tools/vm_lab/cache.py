"""The cache of images and wheels outside the tree. A lock makes each entry once, complete or not at all."""

import contextlib
import ctypes
import fcntl
import getpass
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO

from tools.vm_lab import debian

EX_UNAVAILABLE = 69
# Room for a whole Debian: /tmp may be in memory.
BIG = "/var/tmp"
PR_SET_PDEATHSIG = 1


class LabError(Exception):
    """The laboratory cannot carry out a command; `status` is the exit status."""

    def __init__(self, message: str, status: int = 1) -> None:
        super().__init__(message)
        self.status = status


def say(message: str) -> None:
    """Print a message to standard error, beside the output of the machine."""
    print(f"vm: {message}", file=sys.stderr, flush=True)


def require_packages() -> None:
    """Check that the packages of the laboratory are installed.

    Raises:
        LabError: a package or subordinate id is missing; the message has the command to add it.
    """
    root = os.geteuid() == 0
    if missing := debian.missing("vm") if root else debian.missing("vm", "user"):
        remedy = f"{debian.INSTALL} {' '.join(missing)}"
        raise LabError(
            f"cannot make a virtual machine: packages are missing; as root: {remedy}", EX_UNAVAILABLE
        )
    user = getpass.getuser()
    if not root and not has_subordinate_ids(user, os.getuid()):
        raise LabError(
            f"cannot make an image as {user}: no subordinate ids in /etc/subuid and /etc/subgid; "
            f"as root: usermod --add-subuids 100000-165535 --add-subgids 100000-165535 {user}",
            EX_UNAVAILABLE,
        )


def has_subordinate_ids(user: str, uid: int, etc: Path = Path("/etc")) -> bool:
    """Whether both tables have a line of this user, by name or by number."""

    def listed(table: Path) -> bool:
        lines = table.read_text().splitlines() if table.exists() else []
        return any(line.partition(":")[0] in {user, str(uid)} for line in lines)

    return listed(etc / "subuid") and listed(etc / "subgid")


def cache_root() -> Path:
    """Give the directory of images and wheels: in the system's cache for root, else in the user's cache."""
    if os.geteuid() == 0:
        return Path("/var/cache/aitbc-miner-vm")
    own = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(own).expanduser() / "aitbc-miner-vm"


def digest(*parts: object) -> str:
    """Give a short name that changes with each of the parts, which JSON must be able to encode."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]


def entry(cache: Path, name: str, build: Callable[[Path], None]) -> Path:
    """Give the directory `name` of the cache; `build` fills the directory if it is missing.

    The directory gets its name when it is complete. If several processes need it, one process builds it.
    """
    target = cache / name
    if target.exists():
        return target
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if target.exists():
            return target
        # Left by a build that was killed: we hold its lock, so nobody works on it.
        for remains in cache.glob(f".{name}.*"):
            shutil.rmtree(remains)
        unfinished = Path(tempfile.mkdtemp(prefix=f".{name}.", dir=cache))
        try:
            build(unfinished)
            unfinished.rename(target)
        except BaseException:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise
    return target


def die_with_parent(number: int = signal.SIGKILL) -> Callable[[], None]:
    """Make a preexec function: the kernel ends the child when this process ends, even by SIGKILL."""
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    parent = os.getpid()

    def prepare() -> None:
        prctl(PR_SET_PDEATHSIG, number)
        # The parent may have died before the kernel knew that it matters.
        if os.getppid() != parent:
            os._exit(1)

    return prepare


def call(command: list[str], *, keep: Sequence[int] = (), **changes: str) -> None:
    """Run a program of the host, with the inherited descriptors `keep`; print its output if it fails.

    Raises:
        LabError: the program failed; the message ends with its last output.
    """
    environment = {**os.environ, "PATH": debian.SEARCH, "LC_ALL": "C.UTF-8", **changes}
    # It led here, and would lead pip to take this checkout for something installed.
    environment.pop("PYTHONPATH", None)
    # Not a pipe: mmdebstrap could not even clean up after itself, with nobody to tell.
    with tempfile.TemporaryFile() as output:
        with _child(command, environment, output, keep) as child:
            child.wait()
        output.seek(0)
        tail = output.read().decode(errors="replace").splitlines()[-30:]
    if child.returncode != 0:
        said = "\n".join(tail)
        raise LabError(f"cannot run {command[0]}: exit status {child.returncode}:\n{said}")


@contextlib.contextmanager
def _child(
    command: list[str], environment: Mapping[str, str], output: IO[bytes], keep: Sequence[int]
) -> Iterator[subprocess.Popen[bytes]]:
    child = subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        pass_fds=keep,
        preexec_fn=die_with_parent(signal.SIGTERM),  # noqa: PLW1509 - there are no threads here
    )
    try:
        yield child
    finally:
        # mmdebstrap removes its directories when it is asked to end, and only then.
        if child.poll() is None:
            child.terminate()
        child.wait()
