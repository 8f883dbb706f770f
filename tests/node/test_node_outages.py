"""A coordinator that fails, forgets and repeats itself: each report is sent until it is accepted, once."""

import json
from collections import Counter
from datetime import datetime

from tests.node.conftest import NodeFactory
from tests.node.harness import (
    IMPATIENT,
    WAIT_S,
    Node,
    assert_once,
    states,
    submit,
    until,
    verdicts,
    wait_final,
    wait_settled,
)
from tools.lib.local_node import wait_until
from tools.mock.bootstrap.coordinator import MockCoordinator
from tools.mock.bootstrap.ledger import Ledger
from tools.mock.bootstrap.records import FINAL, State, Verdict


def test_results_survive_an_outage(coordinator: MockCoordinator, node_factory: NodeFactory) -> None:
    node = node_factory(4).start()
    go = node.marks / "go"
    jobs = [coordinator.submit(node.script(f"j-{i}", until(go))) for i in range(4)]
    for job_id in jobs:
        node.running(job_id)
    coordinator.stop()
    go.touch()
    wait_until(lambda: node.now().pending_reports == 4, WAIT_S)
    wait_until(lambda: not node.now().coordinator.reachable, WAIT_S)
    coordinator.start()
    jobs += submit(coordinator, 3)
    wait_final(coordinator, jobs)
    assert states(coordinator, jobs) == {State.DONE}
    assert_once(coordinator, jobs)
    wait_until(lambda: node.now().coordinator.reachable, WAIT_S)


def test_lost_answers_lead_to_no_second_report(
    coordinator: MockCoordinator, node_factory: NodeFactory
) -> None:
    node = node_factory(2, heartbeat=IMPATIENT).start()
    for endpoint in ("result", "fail", "ack"):
        coordinator.fault(endpoint, "drop_after", 10)
    jobs = submit(coordinator, 12)
    jobs += [coordinator.submit({"runner": "cli", "command": "missing"}) for _ in range(3)]
    wait_final(coordinator, jobs)
    wait_settled(node)
    assert_once(coordinator, jobs, repeats=True)
    # Each answer that was lost was asked for again.
    assert sum(len(coordinator.job(job_id).reports) for job_id in jobs) == len(jobs) + 20
    assert node.now().finished["OK"] == 12


def test_errors_of_every_kind_on_the_way(coordinator: MockCoordinator, node_factory: NodeFactory) -> None:
    node = node_factory(2, heartbeat=IMPATIENT).start()
    for kind in ("status:500", "refuse", "garbage", "truncate", "status:503:0", "wrong_json"):
        for endpoint in ("pull", "heartbeat"):
            coordinator.fault(endpoint, kind, 1)
    # A 200 that is JSON would mean that these were accepted.
    for kind in ("status:500", "refuse", "garbage", "truncate", "status:503:0"):
        for endpoint in ("ack", "result"):
            coordinator.fault(endpoint, kind, 1)
    jobs = submit(coordinator, 8)
    wait_final(coordinator, jobs)
    wait_settled(node)
    assert states(coordinator, jobs) == {State.DONE}
    assert_once(coordinator, jobs, repeats=True)


def test_retry_after_is_obeyed(coordinator: MockCoordinator, node_factory: NodeFactory) -> None:
    """Not even the success of another report shortens the time for which the coordinator asks."""
    node = node_factory(2).start()
    for endpoint in ("pull", "ack", "result"):
        coordinator.fault(endpoint, "status:429:2", 1)
    jobs = submit(coordinator, 8)
    wait_final(coordinator, jobs)
    wait_settled(node)
    assert_once(coordinator, jobs)
    (refused,) = [call for call in coordinator.ledger.calls("pull") if call.status == 429]
    later = [call.at - refused.at for call in coordinator.ledger.calls("pull") if call.at > refused.at]
    assert min(later) >= 2.0
    waits = [(job.acked_at or 0.0) - job.handed[0].at for job in coordinator.ledger.jobs().values()]
    assert max(waits) >= 2.0
    assert pause_before_second_try(node, "report not accepted") >= 2.0


def pause_before_second_try(node: Node, event: str) -> float:
    """Read in the log which job was refused first, and how many seconds later it came through."""
    lines = [json.loads(line) for line in node.log.read_text().splitlines() if line.startswith("{")]
    refused = next(line for line in lines if line["event"] == event)
    accepted = next(
        line for line in lines if line["event"] == "report accepted" and line["job_id"] == refused["job_id"]
    )
    return seconds(accepted["ts"]) - seconds(refused["ts"])


def seconds(stamp: str) -> float:
    return datetime.fromisoformat(stamp).timestamp()


def test_registers_again_when_the_coordinator_forgets(
    coordinator: MockCoordinator, node_factory: NodeFactory
) -> None:
    node = node_factory(2).start()
    jobs = submit(coordinator, 2)
    wait_final(coordinator, jobs)
    go = node.marks / "go"
    jobs.append(coordinator.submit(node.script("meanwhile", until(go))))
    node.running("meanwhile")
    coordinator.ledger.revoke_tokens()
    go.touch()
    jobs += submit(coordinator, 2)
    wait_final(coordinator, jobs)
    coordinator.ledger.forget_nodes()
    coordinator.wait(lambda ledger: node.node_id in ledger.nodes())
    jobs += submit(coordinator, 2)
    wait_final(coordinator, jobs)
    assert states(coordinator, jobs) == {State.DONE}
    assert_once(coordinator, jobs)
    # Once for each cause, and not at every call that was refused.
    assert len(coordinator.ledger.calls("register")) <= 5


def test_the_same_job_for_ever_is_run_once(node_factory: NodeFactory) -> None:
    with MockCoordinator(repeat=True) as mock:
        node = node_factory(2, base_url=mock.url).start()
        mock.submit(node.script("again", "true"))
        mock.wait(lambda ledger: len(ledger.job("again").handed) >= 12, WAIT_S)
        job = mock.job("again")
        assert len(node.runs("again")) == 1
        assert job.acks == 1
        assert verdicts(job).count(Verdict.ACCEPTED) == 1
        assert set(verdicts(job)) == {Verdict.ACCEPTED, Verdict.DUPLICATE}
        # Not more often than it was handed out, and that at the pace of polling, but for two: when the job
        # ended, and when its report was taken, there might have been another. On a busy machine one call may
        # come late and the next in time, so the pace is that of all.
        assert len(job.reports) <= len(job.handed)
        pauses = [b.at - a.at for a, b in zip(job.handed[1:], job.handed[2:], strict=False)]
        assert sum(pauses) >= 0.19 * (len(pauses) - 3)
        assert node.stop() == 0


def test_every_job_is_final_somewhere(coordinator: MockCoordinator, node_factory: NodeFactory) -> None:
    """A mixture, with the agent and a worker killed in the middle, and the coordinator away for a moment."""
    node = node_factory(3, heartbeat=IMPATIENT).start()
    jobs = [coordinator.submit(node.script(f"m-{i}", f"exit {i % 4}")) for i in range(60)]
    coordinator.wait(lambda ledger: finished(ledger) >= 10, WAIT_S)
    node.kill_child("agent")
    coordinator.wait(lambda ledger: finished(ledger) >= 20, WAIT_S)
    node.kill_child("cpu1")
    coordinator.stop()
    coordinator.start()
    coordinator.wait(lambda ledger: finished(ledger) >= 30, WAIT_S)
    node.kill_child("heartbeat")
    coordinator.ledger.revoke_tokens()
    wait_final(coordinator, jobs)
    assert_once(coordinator, jobs, repeats=True)
    # At most the one job that the dead worker had is lost; it may have begun, and is not begun again.
    codes = Counter(coordinator.job(job_id).error_code for job_id in jobs)
    assert codes["E_LOST"] <= 1
    assert codes[None] + codes["E_EXIT"] + codes["E_LOST"] == 60
    assert max(len(node.runs(job_id)) for job_id in jobs) == 1


def finished(ledger: Ledger) -> int:
    return sum(job.state in FINAL for job in ledger.jobs().values())
