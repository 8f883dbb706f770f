"""`aitbc-minerctl history` of a whole node: before the first job, and where its child may not look."""

import json
import subprocess
import sys
from typing import Any

from harness import Node, submit, wait_final, wait_settled

from tools.local_node import wait_until
from tools.mock_coordinator import MockCoordinator

WAIT_S = 30.0


def history(node: Node, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "aitbc_miner.ctl", "--socket", str(node.socket), "history", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=WAIT_S, check=False)


def document(node: Node) -> Any:
    said = history(node, "--json")
    assert said.returncode == 0, said.stderr
    return json.loads(said.stdout)


def test_a_node_without_jobs_has_an_empty_history(node_factory: Any) -> None:
    node = node_factory().start()
    assert history(node).stdout == "no job has ended in the last 7d\n"
    assert document(node)["jobs"] == []
    assert len(history(node, "--csv").stdout.splitlines()) == 1


def test_jobs_that_were_delivered_are_its_history(node_factory: Any, coordinator: MockCoordinator) -> None:
    node = node_factory().start()
    jobs = submit(coordinator, 2)
    jobs.append(coordinator.submit({"runner": "cli", "command": "not-allowed"}))
    wait_final(coordinator, jobs)
    wait_settled(node)
    wait_until(lambda: document(node)["totals"]["all"]["jobs"] == 3, WAIT_S)
    said = document(node)
    assert {row["job_id"] for row in said["jobs"]} == set(jobs)
    assert {row["delivery"] for row in said["jobs"]} == {"accepted"}
    assert {total["name"]: total["jobs"] for total in said["totals"]["codes"]} == {"OK": 2, "E_DENY": 1}
    assert "E_DENY" in history(node).stdout


def test_it_is_read_with_the_rights_of_the_service_alone(node_factory: Any) -> None:
    node = node_factory().start()
    wait_until(lambda: history(node).returncode == 0, WAIT_S)
    state = node.directory / "state"
    state.chmod(0)  # which root would not notice
    try:
        said = history(node)
    finally:
        state.chmod(0o750)
    assert said.returncode == 1
    assert str(state) in said.stderr
    assert "Permission denied; see that" in said.stderr
    assert node.now().slots, "it goes on"
