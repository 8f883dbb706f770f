"""A whole node, its heartbeat or all of it killed again and again: no counter that was shown goes back."""

import os
import signal
import stat
from pathlib import Path

import psutil
import pytest
import requests
from prometheus_client.parser import text_string_to_metric_families

from aitbc_miner.node import WorkspaceError, _make_state
from aitbc_miner.sandbox.users import Identity
from aitbc_miner.telemetry.counters import FILE
from tests.node.conftest import NodeFactory
from tests.node.harness import WAIT_S, Node, alive, submit, wait_final, wait_gone, wait_settled
from tools.lib.local_node import wait_until
from tools.mock.bootstrap.coordinator import MockCoordinator

Series = dict[tuple[str, ...], float]
JOBS = ("aitbc_miner_jobs_total", "OK")


def heartbeat_port(node: Node) -> int | None:
    """Give where the present heartbeat serves /metrics; None while there is none."""
    pid = node.children().get("heartbeat")
    if pid is None:
        return None
    try:
        listening = psutil.Process(pid).net_connections("inet")
    except psutil.NoSuchProcess:
        return None
    return next((each.laddr.port for each in listening if each.status == psutil.CONN_LISTEN), None)


def scrape(node: Node) -> Series:
    """Ask for /metrics, and give what must never go back."""
    port = wait_until(lambda: heartbeat_port(node), WAIT_S)
    with requests.Session() as session:
        session.trust_env = False
        text = session.get(f"http://127.0.0.1:{port}/metrics", timeout=WAIT_S).text
    assert "aitbc_miner_metrics_unsaved 0.0" in text, node.log.read_text()[-4000:]
    return {
        (sample.name, *(value for _, value in sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        if family.type != "gauge"
        for sample in family.samples
    }


def assert_not_behind(later: Series, before: Series) -> None:
    """Assert that each series is there still, and nowhere smaller."""
    assert {key: (before[key], later.get(key)) for key in before if later.get(key, -1.0) < before[key]} == {}


def do_jobs(coordinator: MockCoordinator, node: Node, count: int) -> None:
    """Have jobs done, and their reports accepted."""
    wait_final(coordinator, submit(coordinator, count))
    wait_settled(node)


def kill_node(node: Node) -> None:
    """Kill the supervisor and its children, as a power cut does, and start the node again."""
    assert node.process is not None
    pids = [node.process.pid, *(child.pid for child in psutil.Process(node.process.pid).children())]
    for pid in pids:
        if alive(pid):
            os.kill(pid, signal.SIGKILL)
    node.process.wait(WAIT_S)
    wait_gone(pids)
    node.start()


@pytest.mark.parametrize("killed", ["heartbeat", "node"])
def test_who_is_killed_goes_on_counting(
    coordinator: MockCoordinator, node_factory: NodeFactory, killed: str
) -> None:
    node = node_factory(2).start()
    for done in (3, 6, 9):
        do_jobs(coordinator, node, 3)
        # A heartbeat was there all the while, so that it counts them all.
        shown = wait_until(lambda done=done: (seen := scrape(node)).get(JOBS, 0) >= done and seen, WAIT_S)
        assert shown[JOBS] == done
        assert shown["aitbc_miner_step_duration_seconds_bucket", "+Inf", "run"] == done
        if killed == "node":
            kill_node(node)
        else:
            node.kill_child("heartbeat")
        assert_not_behind(scrape(node), shown)


@pytest.mark.parametrize("mode", ["handover", "kill"])
def test_a_stopped_node_has_counted_to_the_end(
    coordinator: MockCoordinator, node_factory: NodeFactory, mode: str
) -> None:
    node = node_factory(2)
    textfile = node.directory / "state" / "node.prom"
    node.write_config(coordinator.url, shutdown={"mode": mode}, telemetry={"textfile": str(textfile)})
    node.start()
    do_jobs(coordinator, node, 5)
    assert node.stop() == 0
    assert 'aitbc_miner_jobs_total{code="OK"} 5.0' in textfile.read_text()
    node.start()
    assert scrape(node)[JOBS] == 5


def test_a_broken_file_keeps_no_node_from_starting(
    coordinator: MockCoordinator, node_factory: NodeFactory
) -> None:
    node = node_factory().start()
    do_jobs(coordinator, node, 1)
    scrape(node)
    assert node.stop() == 0
    file = node.directory / "state" / FILE
    file.write_bytes(file.read_bytes()[:-20])
    node.start()
    do_jobs(coordinator, node, 1)
    assert wait_until(lambda: scrape(node).get(JOBS), WAIT_S) == 1
    assert (node.directory / "state" / f"{FILE}.broken").exists()


def test_the_state_is_in_a_directory_of_its_own(
    coordinator: MockCoordinator, node_factory: NodeFactory
) -> None:
    node = node_factory().start()
    scrape(node)
    state = (node.directory / "state").stat()
    assert stat.S_IMODE(state.st_mode) & 0o022 == 0
    assert state.st_uid == node.jobs.stat().st_uid == (node.directory / "state" / FILE).stat().st_uid


def test_a_directory_of_others_is_not_taken(tmp_path: Path) -> None:
    other = Identity(tmp_path.stat().st_uid + 1, tmp_path.stat().st_gid, "aitbc")
    (tmp_path / "of-others").touch()
    with pytest.raises(WorkspaceError, match=r"has files, and another user owns it; set queue\.path"):
        _make_state(tmp_path, other)
    assert tmp_path.stat().st_uid == other.uid - 1
