"""A whole node under test: its programs, the traces that its jobs leave, and what must be gone afterwards."""

import contextlib
import os
import signal
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import psutil

from aitbc_miner.cgroup.group import CgroupError, Group
from aitbc_miner.control.client import ask
from aitbc_miner.control.protocol import Done, Request, Status
from aitbc_miner.ipc.messages import SlotView
from tools.lib.local_node import LocalNode, wait_until
from tools.lib.marked_jobs import MarkedJobs, allow_programs
from tools.mock.bootstrap.coordinator import MockCoordinator
from tools.mock.bootstrap.records import FINAL, Job, State, Verdict

WAIT_S = 120.0
# So that a node that is refused again and again is soon through.
IMPATIENT = {"interval_s": 0.5, "backoff": {"min_s": 0.1, "max_s": 0.5}}


class Node(MarkedJobs, LocalNode):
    """A node whose jobs may say in `marks` that they have begun: one file for each run."""

    def __init__(
        self, base_url: str, slots: int | list[dict[str, Any]] = 1, *, keep: bool = False, **changes: Any
    ) -> None:
        rows = [{"name": f"cpu{i}", "kind": "cpu"} for i in range(slots)] if isinstance(slots, int) else slots
        super().__init__(base_url, rows, keep=keep, **changes)
        self.patience_s = WAIT_S
        self.marks = self.directory / "marks"
        self.marks.mkdir()
        # Each slot's jobs have a user of their own.
        self.marks.chmod(0o777)
        allow_programs(self.directory / "allowlist.d")

    def now(self) -> Status:
        """Give the status, which must be there."""
        status = self.status()
        assert status is not None, self.log.read_text()[-4000:]
        return status

    def slot(self, name: str = "cpu0") -> SlotView:
        """Give a slot as `status` shows it."""
        return next(row.slot for row in self.now().slots if row.slot.offer.name == name)

    def children(self) -> dict[str, int]:
        """Give the pids of the supervisor's children: each worker by its slot's name, agent and heartbeat.

        These two are left out until they are told from children for a moment: only the heartbeat serves
        /metrics, and only the agent keeps the database open.
        """
        assert self.process is not None
        found = {row.slot.offer.name: row.slot.worker_pid for row in self.now().slots if row.slot.worker_pid}
        others = [
            each for each in psutil.Process(self.process.pid).children() if each.pid not in found.values()
        ]
        kinds = {child.pid: _kind(child) for child in others}
        if sorted(filter(None, kinds.values())) == ["agent", "heartbeat"]:
            found |= {kind: pid for pid, kind in kinds.items() if kind}
        return found

    def all_children(self) -> dict[str, int]:
        """Wait until agent and heartbeat can be told apart, and give all children's pids."""
        found: dict[str, int] = wait_until(
            lambda: own if (own := self.children()).keys() >= {"agent", "heartbeat"} else None, WAIT_S
        )
        return found

    def kill_child(self, name: str) -> int:
        """Kill a child of the supervisor, wait until it is gone and give the pid that it had."""
        pid: int = wait_until(lambda: self.children().get(name), WAIT_S)
        os.kill(pid, signal.SIGKILL)
        wait_gone([pid])
        return pid

    def ask(self, verb: str, job_id: str | None = None) -> Any:
        """Ask on the control socket."""
        answer, fds = ask(self.socket, Request(verb, job_id), WAIT_S)
        for fd in fds:
            os.close(fd)
        return answer

    def tell(self, verb: str, job_id: str | None = None) -> None:
        """Say something on the control socket that must be done."""
        answer = self.ask(verb, job_id)
        assert isinstance(answer, Done), answer

    def remains(self) -> list[str]:
        """Name what is left of the node and its jobs on the machine: processes and cgroups."""
        group = self.cgroup()
        return [*map(str, self.processes()), *([str(group)] if group else [])]

    def processes(self) -> list[int]:
        """Give the pids of all processes of the node and its jobs, whoever their parent is now."""
        return [each.pid for each in psutil.process_iter() if _belongs(each, self.directory)]

    def clean_up(self) -> None:
        """Leave nothing behind, whatever state the test has left the node in."""
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if self.process is not None:
            self.process.wait(WAIT_S)
        wait_gone(self.processes())
        group = self.cgroup()
        if group:
            with contextlib.suppress(CgroupError):
                Group(group).kill()
            Group(group).remove(5.0)


def _kind(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
        if any(each.status == psutil.CONN_LISTEN for each in process.net_connections("inet")):
            return "heartbeat"
        if any(each.path.endswith("/queue.db") for each in process.open_files()):
            return "agent"
    return ""  # a child for a moment, or one that is ending: its descriptors are root's to see then


def _belongs(process: psutil.Process, directory: Path) -> bool:
    try:
        if process.status() == psutil.STATUS_ZOMBIE:
            return False
        where = [*process.cmdline(), process.cwd()]
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return False
    # A `bash -c` of a job carries the directory within a longer argument.
    return process.pid != os.getpid() and any(str(directory) in text for text in where)


def alive(pid: int) -> bool:
    """Whether a process runs; one that nobody has collected yet does not."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def wait_gone(pids: Iterable[int]) -> None:
    """Wait until none of the processes runs any more."""
    wait_until(lambda: not any(alive(pid) for pid in pids), WAIT_S)


def wait_final(mock: MockCoordinator, job_ids: Iterable[str], timeout: float = WAIT_S) -> list[Job]:
    """Wait until all jobs are final at the coordinator and give them."""
    wanted = list(job_ids)
    mock.wait(lambda ledger: all(ledger.job(job_id).state in FINAL for job_id in wanted), timeout)
    return [mock.job(job_id) for job_id in wanted]


def wait_settled(node: Node) -> None:
    """Wait until the node has written down that all its reports were accepted."""
    wait_until(lambda: node.now().pending_reports == 0, WAIT_S)


def verdicts(job: Job) -> list[Verdict]:
    """Give what became of each report on a job."""
    return [report.verdict for report in job.reports]


def assert_once(mock: MockCoordinator, job_ids: Iterable[str], *, repeats: bool = False) -> None:
    """Assert that each job was accepted exactly once, and nothing was said of it that had to be refused.

    With `repeats`, the same report may have come again, as when its answer was lost.
    """
    allowed = {Verdict.ACCEPTED, Verdict.DUPLICATE} if repeats else {Verdict.ACCEPTED}
    for job_id in job_ids:
        job = mock.job(job_id)
        assert verdicts(job).count(Verdict.ACCEPTED) == 1, (job_id, job.reports)
        assert set(verdicts(job)) <= allowed, (job_id, job.reports)
        assert len({report.key for report in job.reports}) == 1, (job_id, job.reports)
    assert mock.ledger.strays() == []


def noop(**more: Any) -> dict[str, Any]:
    """Make the manifest of a job that does nothing."""
    return {"runner": "cli", "command": "true", **more}


def submit(mock: MockCoordinator, count: int) -> list[str]:
    """Queue jobs that do nothing and give their ids."""
    return [mock.submit(noop()) for _ in range(count)]


def until(path: Path) -> str:
    """Give a shell line that waits for a file."""
    return f"until [ -e {path} ]; do sleep 0.05; done"


def states(mock: MockCoordinator, jobs: Iterable[str]) -> set[State]:
    """Give the states in which the coordinator has these jobs."""
    return {mock.job(job_id).state for job_id in jobs}
