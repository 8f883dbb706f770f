"""`aitbc-minerctl history` of a whole node: before the first job, what jobs were worth, who may not look."""

import json
import shutil
import subprocess
import sys
from typing import Any

import pytest

from tests.node.harness import Node, submit, wait_final, wait_settled
from tests.node.networks import network
from tools.lib.local_node import wait_until
from tools.mock.bootstrap.coordinator import MockCoordinator

WAIT_S = 120.0


def ctl(node: Node, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "aitbc_miner.ctl.main", "--socket", str(node.socket), *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=WAIT_S, check=False)


def history(node: Node, *words: str) -> subprocess.CompletedProcess[str]:
    return ctl(node, "history", *words)


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


@pytest.mark.parametrize("believed", [True, False])
def test_what_receipts_say_is_added_up_if_their_key_is_believed(*, believed: bool) -> None:
    keys = {} if believed else {"coordinator": {"receipt_keys": ["A" * 43]}}
    with network("aitbc-v1", receipts=True) as there:
        node = there.node(1, **keys)
        try:
            node.start()
            jobs = [there.submit("true") for _ in range(2)]
            wait_until(lambda: document(node)["totals"]["all"]["jobs"] == 2, WAIT_S)
            said, page = document(node), history(node).stdout
            shown = ctl(node, "job", jobs[0]).stdout
        finally:
            node.clean_up()
            shutil.rmtree(node.directory)
    sums = said["totals"]["all"]
    assert {row["receipt"] for row in said["jobs"]} == {"verified" if believed else "unverified"}
    assert all(row["units"] > 0 for row in said["jobs"])
    assert (sums["receipts"], sums["unverified"]) == ((2, 0) if believed else (0, 2))
    if believed:
        assert sums["units"] == pytest.approx(sum(row["units"] for row in said["jobs"]))
        assert sums["price"] == pytest.approx(sum(row["price"] for row in said["jobs"]))
        assert "verified, signed by " in shown
    else:
        assert (sums["units"], sums["price"]) == (None, None)
        assert "NOT VERIFIED: its key is not in coordinator.receipt_keys" in shown
    assert "RECEIPTS" in page


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
    assert "Permission denied; let the miner's user" in said.stderr
    assert node.now().slots, "it goes on"
