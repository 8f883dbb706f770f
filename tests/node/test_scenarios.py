"""What every coordinator may expect of a node, whatever its dialect: the same scenarios against each."""

import contextlib
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.node.harness import WAIT_S, Node, until, wait_gone, wait_settled
from tests.node.networks import DIALECTS, Network, network
from tools.lib.local_node import wait_until

Maker = Callable[..., Node]


@pytest.fixture(params=DIALECTS)
def net(request: pytest.FixtureRequest) -> Iterator[Network]:
    with network(request.param) as made:
        yield made


@pytest.fixture
def node_of(net: Network) -> Iterator[Maker]:
    made: list[Node] = []

    def make(slots: int = 1, **changes: Any) -> Node:
        made.append(net.node(slots, **changes))
        return made[-1]

    yield make
    for node in made:
        node.clean_up()
        shutil.rmtree(node.directory)


def marked(node: Node, name: str, then: str = "true") -> str:
    """Make a line that leaves a mark named after its process each time that it runs."""
    return f': > {node.marks}/{name}"+$$"; {then}'


def kill_everything(node: Node) -> None:
    """Kill all that belongs to the node at once, jobs and workers too, as a power cut would."""
    pids = node.processes()
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    assert node.process is not None
    node.process.wait(WAIT_S)
    wait_gone(pids)


def test_jobs_are_done_and_count_once(net: Network, node_of: Maker) -> None:
    node = node_of(2).start()
    jobs = [net.submit(marked(node, f"j-{number}", "echo done")) for number in range(10)]
    for number, job_id in enumerate(jobs):
        net.wait_state(job_id, "done")
        assert len(node.runs(f"j-{number}")) == 1
    wait_settled(node)
    assert [net.counted(job_id) for job_id in jobs] == [1] * len(jobs)
    assert node.now().finished == {"OK": len(jobs)}


def test_a_failure_is_told_and_the_next_job_follows_at_once(net: Network, node_of: Maker) -> None:
    # The next heartbeat in its turn would come too late for what is waited for below.
    node = node_of(1, heartbeat={"interval_s": 600}).start()
    bad = net.submit(marked(node, "bad", "echo the reason; exit 3"))
    good = net.submit(marked(node, "good"))
    net.wait_state(bad, "failed")
    net.wait_state(good, "done")
    assert "E_EXIT" in net.message(bad)
    wait_settled(node)
    assert (net.counted(bad), net.counted(good)) == (1, 1)


def test_what_is_not_offered_is_refused_at_once(net: Network, node_of: Maker) -> None:
    node = node_of(1).start()
    job_id = net.submit_unknown()
    net.wait_state(job_id, "failed")
    assert "E_DENY" in net.message(job_id)
    assert node.now().finished == {"E_DENY": 1}


def test_killed_all_at_once_in_the_middle_of_a_job_and_started_again(net: Network, node_of: Maker) -> None:
    node = node_of(1).start()
    go = node.marks / "go"
    job_id = net.submit(marked(node, "j", until(go)))
    node.running("j")
    kill_everything(node)
    go.touch()
    node.start()
    net.wait_state(job_id, "done")
    wait_settled(node)
    assert net.counted(job_id) == 1


@pytest.mark.parametrize("side", ["refuse", "drop_after"])
def test_lost_replies_lose_no_job_and_count_none_twice(side: str, net: Network, node_of: Maker) -> None:
    for call in ("pull", "result", "fail"):
        net.fault(call, side, 4)
    node = node_of(2).start()
    jobs = [net.submit(marked(node, f"j-{number}", f"exit {number % 2}")) for number in range(8)]
    for number, job_id in enumerate(jobs):
        net.wait_state(job_id, "failed" if number % 2 else "done")
        assert len(node.runs(f"j-{number}")) == 1
    wait_settled(node)
    assert [net.counted(job_id) for job_id in jobs] == [1] * len(jobs)


def test_away_as_a_result_is_due(net: Network, node_of: Maker) -> None:
    node = node_of(2).start()
    go = node.marks / "go"
    jobs = [net.submit(marked(node, f"j-{number}", until(go))) for number in range(2)]
    for number in range(2):
        node.running(f"j-{number}")
    net.mock.stop()
    go.touch()
    wait_until(lambda: node.now().pending_reports == 2, WAIT_S)
    net.mock.start()
    for job_id in jobs:
        net.wait_state(job_id, "done")
    wait_settled(node)
    assert [net.counted(job_id) for job_id in jobs] == [1, 1]


def test_a_coordinator_that_has_forgotten_us_gets_to_know_us_again(net: Network, node_of: Maker) -> None:
    node = node_of(1).start()
    net.wait_state(net.submit("true"), "done")
    net.forget_nodes()
    net.wait_state(net.submit("true"), "done")
    wait_settled(node)
    assert node.now().coordinator.registered


def test_results_wait_while_they_are_too_many_and_nothing_else_does(net: Network, node_of: Maker) -> None:
    node = node_of(2).start()
    net.fault("result", "status:429:1")
    jobs = [net.submit("true") for _ in range(4)]
    wait_until(lambda: node.now().pending_reports == 4, WAIT_S)
    bad = net.submit("exit 1")
    net.wait_state(bad, "failed")
    net.mock.clear_faults()
    for job_id in jobs:
        net.wait_state(job_id, "done")
    wait_settled(node)
    assert [net.counted(job_id) for job_id in [*jobs, bad]] == [1] * 5


def test_a_cancelled_job_stops_and_is_not_done(net: Network, node_of: Maker) -> None:
    node = node_of(1).start()
    job_id = net.submit(marked(node, "j", "sleep 600"))
    pid = node.running("j")
    net.cancel(job_id)
    wait_gone([pid])
    after = net.submit("true")
    net.wait_state(after, "done")
    wait_settled(node)
    assert net.state(job_id) == "cancelled"


def test_never_more_at_a_time_than_there_are_slots(net: Network, node_of: Maker) -> None:
    node = node_of(4).start()
    go = node.marks / "go"
    jobs = [net.submit(marked(node, f"j-{number}", until(go))) for number in range(7)]
    net.wait(lambda: net.running(jobs) == 4)
    wait_until(lambda: sum(len(node.runs(f"j-{number}")) for number in range(7)) == 4, WAIT_S)
    beats = node.now().up_s
    seen: set[int] = set()

    def five_heartbeats() -> bool:
        seen.add(net.running(jobs))
        return node.now().up_s > beats + 5.5

    wait_until(five_heartbeats, WAIT_S)
    assert seen == {4}
    go.touch()
    for job_id in jobs:
        net.wait_state(job_id, "done")
    assert sum(len(node.runs(f"j-{number}")) for number in range(7)) == 7
