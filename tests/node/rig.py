"""A node that others mean harm, and how to tell that it has taken none."""

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from aitbc_miner.jobs import Outcome
from aitbc_miner.slots.state import SlotState
from tests.node.harness import Node, assert_once, wait_final
from tests.node.hostile_jobs import OK, cli
from tools.lib.local_node import wait_until
from tools.mock.bootstrap.coordinator import MockCoordinator
from tools.mock.bootstrap.records import Job

HERE = Path(__file__).parent
CHECKOUT = HERE.parent.parent
PATIENCE_S = 180.0


class Rig(NamedTuple):
    """A coordinator, a node, and the processes that the node had in the beginning."""

    mock: MockCoordinator
    node: Node
    children: dict[str, int]

    def assert_unharmed(self) -> None:
        """Assert that no part of the node has died or complains."""
        status = self.node.now()
        assert self.node.process is not None
        assert status.pid == self.node.process.pid
        assert [row.slot.reason for row in status.slots if row.slot.reason] == []
        died = [problem.what for problem in status.problems if " deaths so far" in problem.what]
        assert died == [], self.node.log.read_text()[-8000:]
        # One that is just starting a program of its own cannot be told for a moment.
        wait_until(lambda: self.node.children() == self.children, PATIENCE_S)

    def assert_works(self, job_id: str) -> None:
        """Assert that a good job goes through and is accepted exactly once."""
        self.mock.submit({"job_id": job_id, **cli()})
        (job,) = wait_final(self.mock, [job_id])
        assert code(job) == OK
        assert_once(self.mock, [job_id])


def new_node(mock: MockCoordinator, slots: list[dict[str, Any]], **changes: Any) -> Node:
    """Make a node with our tasks, and sha256sum as the allowlist's sample has it."""
    node = Node(mock.url, slots, **changes)
    node.put("tasks", HERE / "hostile_tasks")
    node.put("allowlist.d", CHECKOUT / "etc" / "allowlist.d")
    # Nobody but root reads it: not even the node's own processes, once they are no longer root.
    node.config.chmod(0o600)
    return node


@contextmanager
def running(mock: MockCoordinator, slots: list[dict[str, Any]], **changes: Any) -> Iterator[Rig]:
    """Run a node whose slots are set up, and leave nothing of it."""
    node = new_node(mock, slots, **changes)
    try:
        node.start()
        wait_until(lambda: node.now().slots and all_idle(node), PATIENCE_S)
        # Not before they are told apart: at the start there are children that only do one thing.
        yield Rig(mock, node, node.all_children())
    finally:
        node.clean_up()
        # An ordinary user cannot look into the directories that some jobs have shut.
        shutil.rmtree(node.directory, ignore_errors=True)


def all_idle(node: Node) -> bool:
    """Whether every slot is free for a job."""
    return all(row.slot.state == SlotState.IDLE for row in node.now().slots)


def code(job: Job) -> str:
    """Give what the coordinator knows of a job's end."""
    return OK if job.state == "done" else job.error_code or f"still {job.state}"


def outcome(rig: Rig, job_id: str) -> Outcome:
    """Give the node's own record of a job's end."""
    wait_final(rig.mock, [job_id], PATIENCE_S)
    return msgspec.json.decode((rig.node.jobs / job_id / "outcome.json").read_bytes(), type=Outcome)


def peak_mib(pid: int) -> int:
    """Give the most memory that a process ever had."""
    text = Path(f"/proc/{pid}/status").read_text()
    found = re.search(r"VmHWM:\s+(\d+) kB", text)
    assert found, text
    return int(found[1]) >> 10
