"""A running node and everybody who means it harm: jobs, their authors, a broken coordinator, local users."""

import json
import os
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import msgspec
import psutil
import pytest
from harness import Node, assert_once, verdicts, wait_final
from hostile_jobs import IDS, NAMELESS, OK, RAW, ROOT, cases, cli, task, with_id

from aitbc_miner.jobs import Outcome
from aitbc_miner.slot import SlotState
from tools.local_node import wait_until
from tools.mock_coordinator import MockCoordinator
from tools.mock_records import FINAL, Job

HERE = Path(__file__).parent
CHECKOUT = HERE.parent.parent
SLOTS = [
    {
        "name": f"cpu{number}",
        "kind": "cpu",
        "memory_max": "512M",
        "pids_max": 200,
        "max_runtime_s": 60,
        "env": ["GREETING"],
    }
    for number in (0, 1)
]
CHANGES = {
    "coordinator": {"poll_interval_s": 0.05, "timeout_s": 5},
    "workspace": {"max_log_mb": 1, "max_artifacts": 100, "max_artifacts_mb": 8},
}
PATIENCE_S = 90.0


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
        assert self.node.children() == self.children
        assert [row.slot.reason for row in status.slots if row.slot.reason] == []
        died = [problem.what for problem in status.problems if " deaths so far" in problem.what]
        assert died == [], self.node.log.read_text()[-8000:]

    def assert_works(self, job_id: str) -> None:
        """Assert that a good job goes through and is accepted exactly once."""
        self.mock.submit({"job_id": job_id, **cli()})
        (job,) = wait_final(self.mock, [job_id])
        assert code(job) == OK
        assert_once(self.mock, [job_id])


def new_node(mock: MockCoordinator, slots: list[dict[str, object]], **changes: object) -> Node:
    """Make a node with our tasks, and sha256sum as the allowlist's sample has it."""
    node = Node(mock.url, slots, **changes)
    node.put("tasks", HERE / "hostile_tasks")
    node.put("allowlist.d", CHECKOUT / "etc" / "allowlist.d")
    return node


def ready(mock: MockCoordinator, node: Node) -> Rig:
    """Wait until a node has set up all its slots, and note what it consists of."""
    wait_until(lambda: node.now().slots and all_idle(node), PATIENCE_S)
    return Rig(mock, node, node.children())


def all_idle(node: Node) -> bool:
    """Whether every slot is free for a job."""
    return all(row.slot.state is SlotState.IDLE for row in node.now().slots)


def code(job: Job) -> str:
    """Give what the coordinator knows of a job's end."""
    return OK if job.state == "done" else job.error_code or f"still {job.state}"


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    files = tmp_path_factory.mktemp("files")
    (files / "a").write_text("1")
    with MockCoordinator(files_dir=files) as mock:
        node = new_node(mock, SLOTS, **CHANGES)
        try:
            yield ready(mock, node.start())
        finally:
            node.clean_up()


@pytest.fixture(scope="module")
def handed_out(rig: Rig) -> Rig:
    """All hostile jobs, given to the node at once."""
    for name, (_, manifest) in cases(rig.mock.root).items():
        rig.mock.submit({"job_id": name, **manifest})
    for value in RAW.values():
        rig.mock.submit_raw(value)
    return rig


@pytest.mark.parametrize("name", cases(""))
def test_a_hostile_job_gets_its_code(handed_out: Rig, name: str) -> None:
    expected, _ = cases("")[name]
    (job,) = wait_final(handed_out.mock, [name], PATIENCE_S)
    assert code(job) == expected, job.reports
    assert len(job.reports) == 1
