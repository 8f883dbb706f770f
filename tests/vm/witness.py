"""Jobs under a node that is restarted: whether they go on, what their logs say, what the coordinator saw."""

import hashlib
import json
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil

from aitbc_miner.slots.state import SlotState
from tests.vm.machine import NODE_ID, WAIT_S, Machine, wait_gone
from tools.lib.local_node import wait_until
from tools.mock.bootstrap.coordinator import MockCoordinator
from tools.mock.bootstrap.records import Verdict

LINES = 20_000
PADDING = "." * 80


def writer(release: Path) -> str:
    """Give a line for bash that prints numbered lines: steadily until a file is there, then the rest at once.

    It waits without starting anything, for a fork is dear on an emulated machine.
    """
    return (
        "exec 9<> <(:); pace=0.1; "
        f"for ((i = 0; i < {LINES}; i++)); do printf 'line %07d {PADDING}\\n' $i; "
        f'[ -n "$pace" ] || continue; read -rt $pace -u 9; [ ! -e {release} ] || pace=; done'
    )


def expected_log() -> bytes:
    """Give what `writer` prints, whatever its pace was."""
    return b"".join(b"line %07d %s\n" % (i, PADDING.encode()) for i in range(LINES))


def sha256(data: bytes) -> str:
    """Give the digest of some bytes."""
    return hashlib.sha256(data).hexdigest()


def uploaded_log(mock: MockCoordinator, job_id: str) -> bytes:
    """Give the log of a job as the coordinator has got it."""
    report = mock.job(job_id).accepted
    assert report is not None, job_id
    (log,) = [each for each in report.artifacts if each.path == "logs/exec.log"]
    data = log.file.read_bytes()
    assert sha256(data) == log.sha256
    return data


class Running:
    """Jobs that run: each must stay the process that it was, in the slot that it is in."""

    def __init__(self, machine: Machine, job_ids: Iterable[str]) -> None:
        self.machine = machine
        self.pids = {job_id: machine.running(job_id) for job_id in job_ids}
        self._began = {pid: psutil.Process(pid).create_time() for pid in self.pids.values()}

    def assert_ran_once(self) -> None:
        """Assert that no job was ever started a second time."""
        assert {job_id: self.machine.runs(job_id) for job_id in self.pids} == {
            job_id: [pid] for job_id, pid in self.pids.items()
        }

    def assert_same(self) -> None:
        """Assert that all are still run by the process that they began with, and were started once."""
        self.assert_ran_once()
        for job_id, pid in self.pids.items():
            process = psutil.Process(pid)
            assert process.status() != psutil.STATUS_ZOMBIE, job_id
            # A pid can come again.
            assert process.create_time() == self._began[pid], job_id

    def wait_adopted(self) -> None:
        """Wait until the node that runs now has taken all of them up from an earlier one."""
        wait_until(lambda: adopted(self.machine) == self.pids.keys(), WAIT_S, 0.2)
        self.assert_same()

    def wait_gone(self) -> None:
        """Wait until all have ended."""
        wait_gone(self.pids.values())


def adopted(machine: Machine) -> set[str]:
    """Name the jobs that run under a worker of an earlier run of the node."""
    status = machine.status()
    rows = [row.slot for row in status.slots] if status else []
    return {slot.job_id for slot in rows if slot.state == SlotState.ADOPTED and slot.job_id}


def assert_once(mock: MockCoordinator, job_ids: Iterable[str], *, repeats: bool = False) -> None:
    """Assert that each job was accepted exactly once, and nothing was said of it that had to be refused.

    With `repeats`, the same report may have come again, as when whoever sent it was killed meanwhile.
    """
    allowed = {Verdict.ACCEPTED, Verdict.DUPLICATE} if repeats else {Verdict.ACCEPTED}
    for job_id in job_ids:
        job = mock.job(job_id)
        verdicts = [report.verdict for report in job.reports]
        assert verdicts.count(Verdict.ACCEPTED) == 1, (job_id, job.reports)
        assert set(verdicts) <= allowed, (job_id, job.reports)
        assert len({report.key for report in job.reports}) == 1, (job_id, job.reports)
    assert mock.ledger.strays() == []


def outcome(machine: Machine, job_id: str) -> dict[str, Any]:
    """Give a job's outcome as the node has it on disk."""
    text = (machine.jobs / job_id / "outcome.json").read_text()
    return json.loads(text)  # type: ignore[no-any-return]


def heartbeats(mock: MockCoordinator) -> list[float]:
    """Give the times at which the coordinator heard a heartbeat, in seconds of the boot-time clock."""
    node = mock.ledger.nodes().get(NODE_ID)
    return [message.at for message in node.heartbeats] if node else []


def wait_heartbeat(mock: MockCoordinator) -> None:
    """Wait until the coordinator hears one more heartbeat."""
    had = len(heartbeats(mock))
    mock.wait(lambda _: len(heartbeats(mock)) > had, WAIT_S)


def longest_gap(times: list[float], begin: float, end: float) -> float:
    """Give the longest pause between heartbeats, of those that touch the time from `begin` to `end`."""
    pairs = pairwise(times)
    return max(after - before for before, after in pairs if after > begin and before < end)
