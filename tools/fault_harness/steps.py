"""Observes every step of the node's processes and can stop a process at a step: the server of the shim.

`shim.c`, loaded into the node's processes, asks this module before and after each step on disk; the mock
coordinator asks before and after each call. A process waits for the answer before it goes on.
"""

import errno
import os
import socketserver
import subprocess
import threading
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import NamedTuple

import msgspec
import psutil

from aitbc_miner.jobs import StateRecord
from aitbc_miner.store.records import BUILDING, MANIFEST, OUTCOME, STATE
from tools.fault_harness.plan import STEPS, Boundary, Side
from tools.lib.compiler import c_compiler
from tools.lib.local_node import wait_until

MARK_S = 2.0
DISK_FAULTS = {"create": errno.ENOSPC, "rename": errno.ENOSPC, "fsync": errno.EIO}


class Moment(NamedTuple):
    """A process at a boundary; known by `port` instead of `pid` during a call to the coordinator."""

    boundary: Boundary
    pid: int | None = None
    port: int | None = None
    job_id: str | None = None


class Trap:
    """A trap at a boundary: `spring` is called once, while the process waits there."""

    def __init__(self, boundary: Boundary, passes: int, spring: Callable[[Moment], None]) -> None:
        self.boundary = boundary
        self.sprung = threading.Event()
        self._passes = passes
        self._spring = spring
        self._lock = threading.Lock()
        self._taken = False

    def meets(self, moment: Moment) -> bool:
        """Spring the trap if this is its boundary; False otherwise."""
        if moment.boundary != self.boundary:
            return False
        with self._lock:
            if self._taken or self._passes > 0:
                self._passes -= 1
                return False
            self._taken = True
        self._spring(moment)
        self.sprung.set()
        return True

    def disarm(self) -> bool:
        """Disarm the trap; True if it has sprung already."""
        with self._lock:
            taken, self._taken = self._taken, True
        return taken and self.sprung.wait(30.0)


class Gate:
    """Handles all steps of a node, each in its own thread.

    drop: the share of lost answers of the coordinator. disk: the share of failed writes. The seed selects
    them. marks: the directory of the marks of the jobs' programs.
    """

    def __init__(self, seed: str, marks: Callable[[], Path], *, drop: float = 0.0, disk: float = 0.0) -> None:
        self._seed = seed
        self._marks = marks
        self._drop = drop
        self._disk = disk
        self._lock = threading.Lock()
        self._dice: dict[str, Random] = {}
        self._programs: dict[int, str] = {}
        self.trap: Trap | None = None
        self.passed: Counter[Boundary] = Counter()
        self.dropped = 0
        self.failed: Counter[str] = Counter()

    def calm(self) -> None:
        """Make no more faults."""
        self.trap = None
        self._drop = self._disk = 0.0

    def call(self, endpoint: str, side: str, port: int) -> bool:
        """Handle a call to the coordinator; True loses the answer. See `mock.exchange.Boundary`."""
        if endpoint not in STEPS:
            return False
        if self._meet(Moment(Boundary(endpoint, Side(side)), port=port)):
            return True
        lost = side == "after" and self._falls(endpoint, self._drop)
        self.dropped += lost
        return lost

    def before(self, operation: str, pid: int, first: str, second: str) -> tuple[int, Moment | None]:
        """Handle the moment before a step on disk: give its errno if it must fail, and its record."""
        if operation in DISK_FAULTS and self._falls(operation, self._disk):
            self.failed[operation] += 1
            return DISK_FAULTS[operation], None
        if (named := self._name(operation, pid, first, second)) is None:
            return 0, None
        self._meet(named)
        return 0, named

    def after(self, operation: str, moment: Moment) -> None:
        """Handle the moment after a step on disk."""
        moment = moment._replace(boundary=Boundary(moment.boundary.step, Side.AFTER))
        if operation == "execve" and not self._marked(moment):
            return
        self._meet(moment)

    def _meet(self, moment: Moment) -> bool:
        with self._lock:
            self.passed[moment.boundary] += 1
        trap = self.trap
        return trap is not None and trap.meets(moment)

    def _falls(self, what: str, share: float) -> bool:
        if not share:
            return False
        with self._lock:
            return self._dice.setdefault(what, Random(f"{self._seed}/{what}")).random() < share

    def _name(self, operation: str, pid: int, first: str, second: str) -> Moment | None:
        match operation:
            case "rename":
                return _name_rename(pid, Path(first), Path(second))
            case "execve":
                job_id = Path(first).parent.name
                with self._lock:
                    self._programs[pid] = job_id
                # The child is the program in a moment; who stands here is its worker.
                return Moment(Boundary("started", Side.BEFORE), _parent(pid), job_id=job_id)
            case "wait4":
                with self._lock:
                    ended = self._programs.pop(int(first), None)
                return (ended and Moment(Boundary("ended", Side.BEFORE), pid, job_id=ended)) or None
        return None

    def _marked(self, moment: Moment) -> bool:
        """Wait for the program's mark, if a trap needs the mark."""
        if self.trap is None or self.trap.boundary != moment.boundary:
            return False
        with suppress(TimeoutError):
            return bool(wait_until(lambda: any(self._marks().glob(f"{moment.job_id}+*")), MARK_S, 0.002))
        return False


def _name_rename(pid: int, old: Path, new: Path) -> Moment | None:
    job_id = new.parent.name.removeprefix(BUILDING)
    step = {MANIFEST: "manifest", OUTCOME: "outcome", "workers.json": "workers"}.get(new.name)
    if new.name == STATE:
        with suppress(OSError, msgspec.DecodeError):
            step = msgspec.json.decode(old.read_bytes(), type=StateRecord).state.value
    elif old.name == f"{BUILDING}{new.name}":
        step, job_id = "directory", new.name
    return Moment(Boundary(step, Side.BEFORE), pid, job_id=job_id) if step in STEPS else None


def _parent(pid: int) -> int | None:
    with suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).ppid()
    return None


class _Conversation(socketserver.StreamRequestHandler):
    """Handles one step of one process by the protocol at the top of shim.c."""

    server: "StepServer"

    def handle(self) -> None:
        # Who was killed at the boundary does not read the answer any more.
        with suppress(BrokenPipeError, ConnectionResetError):
            asked = self.rfile.readline().decode().rstrip("\n").split("\t")
            if len(asked) < 4:
                return  # killed in the middle of the question
            operation, pid, first, second = asked
            number, moment = self.server.gate.before(operation, int(pid), first, second)
            self.wfile.write(b"%d\n" % number)
            said = self.rfile.readline()
            # A program that has begun has closed this; a call that failed was no step.
            if moment is not None and said.strip() != b"-1":
                self.server.gate.after(operation, moment)
            self.wfile.write(b"0\n")


class StepServer(socketserver.ThreadingUnixStreamServer):
    """Listens for the shim. `environ`: the variables that load the shim; `disk`: also observe writes."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, folder: Path, gate: Gate, *, disk: bool) -> None:
        self.gate = gate
        path = folder / "steps.sock"
        super().__init__(str(path), _Conversation)
        # Jobs' programs begin as their own users, and the agent is nobody in particular.
        path.chmod(0o777)
        shim = build_shim(folder)
        self.environ = {
            "LD_PRELOAD": str(shim),
            "AITBC_FAULT_SOCKET": str(path),
            **({"AITBC_FAULT_DISK": "1"} if disk else {}),
        }
        self._thread = threading.Thread(target=self.serve_forever, args=(0.05,), name="steps", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop listening, and let all waiting processes go on."""
        self.shutdown()
        self._thread.join()
        self.server_close()


def build_shim(folder: Path) -> Path:
    """Compile the shim.

    Raises:
        RuntimeError: the machine has no C compiler.
        subprocess.CalledProcessError: the shim does not compile.
    """
    shim = folder / "fault_shim.so"
    source = Path(__file__).with_name("shim.c")
    flags = ["-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
    subprocess.run([*c_compiler(), *flags, "-o", str(shim), str(source), "-ldl"], check=True, timeout=600)
    os.chmod(shim, 0o755)  # noqa: PTH101  # whoever becomes a job's user has loaded it already; be sure
    return shim
