"""Makes the system calls of a node's process fail, one after the other, by strace.

For each process (agent, worker, supervisor), each call that touches the disk and each error: in the first run
the first such call fails (or kills the process) while a job goes through the node, in the second run the
second call, and so on, until no call fails in a run. The job must end as without the fault.
"""

import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from msgspec import Struct, field

from tools.fault_harness.checks import Fates, Finding, check
from tools.fault_harness.jobs import CLEAN, WELL, Kind
from tools.fault_harness.node import FaultNode, alive
from tools.fault_harness.plan import Whom
from tools.lib.local_node import wait_until
from tools.mock.bootstrap.coordinator import MockCoordinator
from tools.mock.bootstrap.records import FINAL, Job

ROLES = (Whom.WORKER, Whom.AGENT, Whom.SUPERVISOR)
# What Python and glibc make of each.
CALLS = {
    "openat": "openat",
    "rename": "rename,renameat,renameat2",
    "fsync": "fsync,fdatasync",
    "unlink": "unlink,unlinkat,rmdir",
    "mkdir": "mkdir,mkdirat",
    "write": "write",
}
ERRORS = {
    "openat": ("EMFILE", "ENOMEM", "EIO", "EINTR"),
    "rename": ("ENOSPC", "EIO"),
    "fsync": ("EIO", "ENOSPC"),
    "unlink": ("EIO",),
    "mkdir": ("ENOSPC", "EIO"),
    "write": ("ENOSPC", "EINTR"),
}
KILL = "KILL"
MOST = 400
UP_S, JOB_S, ATTACH_S, TICKS_S = 60.0, 90.0, 20.0, 1.5
SEE_OFF_S = 5.0
KIND = Kind("whole", 'cat in; echo it is done > "$AITBC_OUTPUT_DIR/result.txt"', WELL, 1, artifact=True)


class Plan(NamedTuple):
    """A process, a system call, and the fault: an errno such as `EIO`, or `KILL`."""

    whom: Whom
    call: str
    fault: str

    def __str__(self) -> str:
        return f"{self.whom} {self.call} {self.fault}"


FULL = tuple(Plan(whom, call, fault) for whom in ROLES for call in CALLS for fault in (*ERRORS[call], KILL))
FEW = (
    Plan(Whom.WORKER, "rename", KILL),
    Plan(Whom.WORKER, "mkdir", "ENOSPC"),
    Plan(Whom.WORKER, "fsync", "EIO"),
    Plan(Whom.AGENT, "rename", "EIO"),
    Plan(Whom.SUPERVISOR, "openat", "EMFILE"),
)


class Injected(Struct):
    """The number of faults by plan, and the findings."""

    hits: Counter[Plan] = field(default_factory=Counter)
    runs: int = 0
    endings: Counter[str] = field(default_factory=Counter)
    findings: list[Finding] = []
    directory: str = ""


def inject(plans: tuple[Plan, ...], most: int, tell: Callable[[str], None]) -> Injected:
    """Carry out the plans, each with up to `most` runs.

    Raises:
        RuntimeError: strace is not installed.
    """
    if shutil.which("strace") is None:
        raise RuntimeError("cannot inject faults: strace is not installed; apt-get install strace")
    with ExitStack() as stack:
        mock = stack.enter_context(MockCoordinator(lease_s=2.0))
        node = FaultNode(
            mock.url, 1, {}, heartbeat={"interval_s": 0.5, "backoff": {"min_s": 0.1, "max_s": 1}}
        )
        stack.callback(node.clean_up)
        return _Injector(mock, node, tell).run(plans, most)


class _Injector:
    def __init__(self, mock: MockCoordinator, node: FaultNode, tell: Callable[[str], None]) -> None:
        self._mock = mock
        self._node = node
        self._tell = tell
        self._kinds: dict[str, Kind] = {}
        self._fates = Fates(set(), set())
        self._done = Injected(directory=str(node.directory))

    def run(self, plans: tuple[Plan, ...], most: int) -> Injected:
        done = self._done
        try:
            for plan in plans:
                for number in range(1, most + 1):
                    if not self._once(plan, number):
                        break
                self._tell(f"{plan}: {done.hits[plan]} hits")
            wait_until(lambda: (now := self._node.status()) is not None and not now.pending_reports, UP_S)
            if status := self._node.stop():
                done.findings.append(Finding("defects", f"the node ended with {status} when told to stop"))
            done.findings += check(self._mock, self._node, self._kinds, self._fates, disk=False)
        except TimeoutError as error:
            done.findings.append(Finding("lost", f"the injection came to a halt: {error}"))
        for job_id in self._kinds:
            job = self._mock.job(job_id)
            done.endings[job.error_code or job.state] += 1
        return done

    def _once(self, plan: Plan, number: int) -> int:
        """Run a job while the call of this number fails; give the number of failed calls."""
        pid = self._up(plan.whom)
        out = self._node.directory / "strace.out"
        how = f"signal={plan.fault}" if plan.fault == KILL else f"error={plan.fault}"
        # The agent's threads are followed; of what the others start, nothing is theirs.
        follow = ["-f"] if plan.whom is Whom.AGENT else []
        words = ["strace", *follow, "-qq", "-o", str(out), "-p", str(pid)]
        words += ["-e", f"trace={CALLS[plan.call]}", "-e", f"inject={CALLS[plan.call]}:{how}:when={number}"]
        out.unlink(missing_ok=True)
        self._done.runs += 1
        job_id = f"{plan.whom}-{plan.call}-{plan.fault}-{number}".lower()
        with subprocess.Popen(words, stderr=subprocess.DEVNULL) as strace:
            try:
                wait_until(lambda: _traced(pid) or strace.poll() is not None, ATTACH_S)
                self._kinds[job_id] = KIND
                if plan.fault == KILL and plan.whom is Whom.WORKER:
                    self._fates.at_risk.add(job_id)
                self._mock.submit(self._manifest(job_id))
                if plan.fault == KILL:
                    wait_until(lambda: self._over(job_id) or not alive(pid), JOB_S)
                    if not alive(pid):
                        _see_off(strace)
                wait_until(lambda: self._over(job_id), JOB_S)
                if plan.whom is Whom.SUPERVISOR:
                    # What it does, it does each second, whether there is a job or not.
                    until = time.monotonic() + TICKS_S
                    wait_until(lambda: _hits(out) or time.monotonic() > until, ATTACH_S)
            finally:
                strace.send_signal(signal.SIGINT)
                _see_off(strace)
        hits = _hits(out)
        self._done.hits[plan] += hits
        if hits and plan.fault == KILL and plan.whom is Whom.WORKER:
            # A slot whose worker dies again and again rests for minutes; that of a new node does not.
            self._node.stop()
            self._node.launch()
        self._tell(f"{plan} at {number}: {hits} hits, {_ended(self._mock.job(job_id))}")
        return hits

    def _up(self, whom: Whom) -> int:
        """Start the node if necessary, and give the process."""

        def ready() -> int | None:
            if self._node.process_ended():
                self._relaunch()
            now = self._node.status()
            if now is None or not now.slots or not all(each.slot.free for each in now.slots):
                return None
            return self._node.find(whom)

        pid: int = wait_until(ready, UP_S)
        return pid

    def _relaunch(self) -> None:
        process = self._node.process
        if process is not None and (status := process.wait()) != -signal.SIGKILL:
            said = f"the node ended by itself with {status}; see {self._node.log}"
            self._done.findings.append(Finding("defects", said))
        self._node.launch()

    def _over(self, job_id: str) -> bool:
        if self._node.process_ended():
            self._relaunch()
        return self._mock.job(job_id).state in FINAL

    def _manifest(self, job_id: str) -> dict[str, object]:
        more = {"artifacts": [{"path": "result.txt"}], "input": {"inline": {"in": "x"}}}
        return self._node.script(job_id, CLEAN + KIND.line, **more)


def _traced(pid: int) -> bool:
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
    return "\nTracerPid:\t0\n" not in text


def _hits(out: Path) -> int:
    text = out.read_text(errors="replace") if out.exists() else ""
    return text.count("(INJECTED)") or text.count("killed by SIGKILL")


def _ended(job: Job) -> str:
    return job.error_code or str(job.state)


def shown(done: Injected) -> Iterator[str]:
    """Give the faults as lines of a table."""
    yield f"{done.runs} runs; jobs: " + ", ".join(f"{n} {how}" for how, n in done.endings.most_common())
    faults = sorted({plan.fault for plan in done.hits})
    yield f"{'process':<11} {'call':<7} " + " ".join(f"{fault:>7}" for fault in faults)
    for whom in ROLES:
        for call in CALLS:
            row = [done.hits.get(Plan(whom, call, fault)) for fault in faults]
            if any(hits is not None for hits in row):
                yield f"{whom:<11} {call:<7} " + " ".join(f"{'-' if n is None else n:>7}" for n in row)


def _see_off(strace: "subprocess.Popen[bytes]") -> None:
    """End strace, which may wait for ever for threads of a killed process."""
    try:
        strace.wait(SEE_OFF_S)
    except subprocess.TimeoutExpired:
        strace.kill()
        strace.wait(ATTACH_S)
