"""A whole node, its processes killed, stopped and started again: no job is lost, none is run twice."""

import os
import signal
from typing import Any

import psutil
import pytest

from aitbc_miner.errors import EXIT_CONFIG
from aitbc_miner.ipc.messages import SlotView
from aitbc_miner.slots.state import SlotState
from tests.node.conftest import NodeFactory
from tests.node.harness import (
    WAIT_S,
    Node,
    alive,
    assert_once,
    submit,
    until,
    verdicts,
    wait_final,
    wait_gone,
    wait_settled,
)
from tools.lib.local_node import wait_until
from tools.mock.bootstrap.coordinator import MockCoordinator
from tools.mock.bootstrap.records import State


def wait_slot(node: Node, state: SlotState, name: str = "cpu0") -> SlotView:
    """Wait until a slot is in a state."""
    wait_until(
        lambda: any(s.slot.state == state and s.slot.offer.name == name for s in node.now().slots), WAIT_S
    )
    return node.slot(name)


# --- children that die -------------------------------------------------------------------------------------


def test_jobs_outlive_the_agent(coordinator: MockCoordinator, node_factory: NodeFactory) -> None:
    node = node_factory(2).start()
    go = node.marks / "go"
    jobs = [coordinator.submit(node.script(f"long-{i}", until(go))) for i in (0, 1)]
    pids = [node.running(job_id) for job_id in jobs]
    first = node.kill_child("agent")
    assert all(alive(pid) for pid in pids)
    go.touch()
    jobs += submit(coordinator, 10)
    wait_final(coordinator, jobs)
    assert wait_until(lambda: node.children().get("agent"), WAIT_S) != first
    assert_once(coordinator, jobs, repeats=True)
    assert all(len(node.runs(job_id)) == 1 for job_id in jobs[:2])
    assert {job.state for job in wait_final(coordinator, jobs)} == {State.DONE}


def test_agent_killed_again_and_again_loses_nothing(
    coordinator: MockCoordinator, node_factory: NodeFactory
) -> None:
    node = node_factory(2).start()
    jobs = [coordinator.submit(node.script(f"j-{i}", "sleep 0.05")) for i in range(30)]
    for done in (3, 8, 13):
        coordinator.wait(
            lambda ledger, done=done: sum(j.accepted is not None for j in ledger.jobs().values()) >= done  # type: ignore[misc]
        )
        node.kill_child("agent")
    wait_final(coordinator, jobs)
    assert_once(coordinator, jobs, repeats=True)
    assert [len(node.runs(job_id)) for job_id in jobs] == [1] * len(jobs)
    assert {coordinator.job(job_id).state for job_id in jobs} == {State.DONE}


def test_heartbeat_is_started_again_and_registers(
    coordinator: MockCoordinator, node_factory: NodeFactory
) -> None:
    node = node_factory().start()
    wait_final(coordinator, submit(coordinator, 1))
    node.kill_child("heartbeat")
    # The token of the first registration is void for the agent as well: it must ask for the new one.
    coordinator.ledger.revoke_tokens()
    coordinator.wait(lambda ledger: len(ledger.nodes()[node.node_id].registrations) >= 2, WAIT_S)
    jobs = submit(coordinator, 3)
    wait_final(coordinator, jobs)
    assert_once(coordinator, jobs)
    at = len(coordinator.ledger.nodes()[node.node_id].heartbeats)
    coordinator.wait(lambda ledger: len(ledger.nodes()[node.node_id].heartbeats) > at)
    assert any("heartbeat was killed by SIGKILL" in problem.what for problem in node.now().problems)


def test_job_of_a_killed_worker_is_lost_once_and_its_slot_comes_back(
    coordinator: MockCoordinator, node_factory: NodeFactory
) -> None:
    node = node_factory().start()
    job_id = coordinator.submit(node.script("victim", "(setsid sleep 600 &) ; sleep 600 & sleep 600"))
    node.running(job_id)
    sleepers = wait_until(lambda: three_sleepers(node), WAIT_S)
    node.kill_child("cpu0")
    (lost,) = wait_final(coordinator, [job_id])
    assert lost.error_code == "E_LOST"
    assert lost.accepted is not None
    assert "cpu0" in lost.accepted.body["error_msg"]
    wait_gone(sleepers)
    next_job = submit(coordinator, 1)
    assert wait_final(coordinator, next_job)[0].state == State.DONE
    assert_once(coordinator, [job_id, *next_job])
    assert len(node.runs(job_id)) == 1
    wait_slot(node, SlotState.IDLE)


def three_sleepers(node: Node) -> list[int]:
    """Give the pids of the sleeps of a job when there are three."""
    pids = [pid for pid in node.processes() if _argv(pid)[:2] == ["sleep", "600"]]
    return pids if len(pids) == 3 else []


def _argv(pid: int) -> list[str]:
    try:
        return psutil.Process(pid).cmdline()
    except psutil.NoSuchProcess:
        return []


def test_slot_whose_worker_keeps_dying_is_quarantined(
    coordinator: MockCoordinator, node_factory: NodeFactory
) -> None:
    node = node_factory(2).start()
    for _ in range(5):
        wait_slot(node, SlotState.IDLE)
        node.kill_child("cpu0")
    slot = wait_slot(node, SlotState.QUARANTINED)
    assert slot.reason is not None
    assert "5 times" in slot.reason
    assert "SIGKILL" in slot.reason
    assert any("cpu0" in problem.what and "5 times" in problem.what for problem in node.now().problems)
    jobs = submit(coordinator, 4)
    assert {job.state for job in wait_final(coordinator, jobs)} == {State.DONE}
    assert_once(coordinator, jobs)


# --- stopping and starting again ---------------------------------------------------------------------------


def leave(node: Node, how: signal.Signals) -> None:
    """End the supervisor, politely or not, and wait until the agent and the heartbeat are gone too."""
    children = wait_until(lambda: len(own := node.children()) >= 3 and own, WAIT_S)
    code = node.stop(how)
    assert code == (0 if how is signal.SIGTERM else -how)
    wait_gone([children["agent"], children["heartbeat"]])


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_job_is_handed_over_to_the_next_start(
    coordinator: MockCoordinator, node_factory: NodeFactory, how: signal.Signals
) -> None:
    node = node_factory(2, shutdown={"mode": "handover"}).start()
    go = node.marks / "go"
    job_id = coordinator.submit(node.script("baton", until(go)))
    pid = node.running(job_id)
    coordinator.wait(lambda ledger: ledger.job(job_id).state == State.ACKED)
    leave(node, how)
    assert alive(pid)
    node.start()
    wait_until(lambda: [s.slot.job_id for s in node.now().slots if s.slot.state == SlotState.ADOPTED], WAIT_S)
    assert alive(pid)
    # The rest of the node works meanwhile.
    others = submit(coordinator, 3)
    wait_final(coordinator, others)
    go.touch()
    (job,) = wait_final(coordinator, [job_id])
    assert job.state == State.DONE
    wait_settled(node)
    after = submit(coordinator, 4)
    wait_final(coordinator, after)
    assert_once(coordinator, [job_id, *others, *after])
    assert node.runs(job_id) == [pid]
    wait_gone([pid])
    for name in ("cpu0", "cpu1"):
        wait_slot(node, SlotState.IDLE, name)


def test_job_that_ends_while_no_supervisor_is_there_is_delivered_later(
    coordinator: MockCoordinator, node_factory: NodeFactory
) -> None:
    node = node_factory(1, shutdown={"mode": "handover"}).start()
    go = node.marks / "go"
    job_id = coordinator.submit(node.script("alone", until(go)))
    node.running(job_id)
    leave(node, signal.SIGKILL)
    go.touch()
    wait_until((node.jobs / job_id / "outcome.json").exists, WAIT_S)
    wait_until(lambda: not node.processes(), WAIT_S)
    node.start()
    (job,) = wait_final(coordinator, [job_id])
    assert job.state == State.DONE
    assert_once(coordinator, [job_id])
    assert len(node.runs(job_id)) == 1


@pytest.mark.parametrize("who", ["coordinator", "operator"])
def test_adopted_job_can_be_cancelled(
    coordinator: MockCoordinator, node_factory: NodeFactory, who: str
) -> None:
    node = node_factory(1, shutdown={"mode": "handover"}).start()
    job_id = coordinator.submit(node.script("unwanted", "exec sleep 600"))
    pid = node.running(job_id)
    leave(node, signal.SIGTERM)
    node.start()
    assert wait_slot(node, SlotState.ADOPTED).job_id == job_id
    if who == "coordinator":
        coordinator.cancel(job_id)
    else:
        node.tell("cancel", job_id)
    (job,) = wait_final(coordinator, [job_id])
    assert job.error_code == "E_CANCELLED"
    wait_gone([pid])
    assert_once(coordinator, [job_id])
    wait_slot(node, SlotState.IDLE)


def test_adopted_job_is_lost_when_the_miner_must_stop_at_once(
    coordinator: MockCoordinator, node_factory: NodeFactory
) -> None:
    """Lost, and not cancelled: nobody said that it is not wanted any more."""
    node = node_factory(1, shutdown={"mode": "handover"}).start()
    job_id = coordinator.submit(node.script("unlucky", "exec sleep 600"))
    node.running(job_id)
    leave(node, signal.SIGTERM)
    node.write_config(coordinator.url, shutdown={"mode": "kill"})
    node.start()
    wait_slot(node, SlotState.ADOPTED)
    assert node.stop() == 0
    assert coordinator.job(job_id).error_code == "E_LOST"
    assert_once(coordinator, [job_id])
    assert node.remains() == []


def test_adopted_worker_that_is_killed_loses_its_job_once(
    coordinator: MockCoordinator, node_factory: NodeFactory
) -> None:
    node = node_factory(1, shutdown={"mode": "handover"}).start()
    job_id = coordinator.submit(node.script("orphan", "exec sleep 600"))
    pid = node.running(job_id)
    worker = node.children()["cpu0"]
    leave(node, signal.SIGTERM)
    node.start()
    wait_slot(node, SlotState.ADOPTED)
    os.kill(worker, signal.SIGKILL)
    (job,) = wait_final(coordinator, [job_id])
    assert job.error_code == "E_LOST"
    wait_gone([pid, worker])
    after = submit(coordinator, 1)
    assert wait_final(coordinator, after)[0].state == State.DONE
    assert_once(coordinator, [job_id, *after])


def test_drain_finishes_what_runs_and_pulls_nothing(
    coordinator: MockCoordinator, node_factory: NodeFactory
) -> None:
    node = node_factory(2, shutdown={"mode": "drain", "grace_s": 60}).start()
    go = node.marks / "go"
    job_id = coordinator.submit(node.script("last", until(go)))
    pid = node.running(job_id)
    assert node.process is not None
    node.process.send_signal(signal.SIGTERM)
    wait_until(lambda: node.now().stopping, WAIT_S)
    pulls = len(coordinator.ledger.calls("pull"))
    unwanted = coordinator.submit({"runner": "cli", "command": "true"})
    beats = len(coordinator.ledger.calls("heartbeat"))
    coordinator.wait(lambda ledger: len(ledger.calls("heartbeat")) >= beats + 2)
    # One may have been under way when the order came.
    assert len(coordinator.ledger.calls("pull")) <= pulls + 1
    assert alive(pid)
    go.touch()
    assert node.process.wait(WAIT_S) == 0
    assert coordinator.job(job_id).state == State.DONE
    assert coordinator.job(unwanted).handed == ()
    assert_once(coordinator, [job_id])
    assert node.remains() == []


def test_drain_ends_jobs_when_its_grace_is_over(
    coordinator: MockCoordinator, node_factory: NodeFactory
) -> None:
    node = node_factory(1, shutdown={"mode": "drain", "grace_s": 1}).start()
    job_id = coordinator.submit(node.script("endless", "exec sleep 600"))
    node.running(job_id)
    assert node.stop() == 0
    assert coordinator.job(job_id).error_code == "E_LOST"
    assert_once(coordinator, [job_id])
    assert node.remains() == []


@pytest.mark.parametrize("slow", [False, True], ids=["at once", "slow coordinator"])
def test_kill_reports_its_jobs_lost_before_it_ends(
    coordinator: MockCoordinator, node_factory: NodeFactory, slow: bool
) -> None:
    node = node_factory(3).start()
    jobs = [coordinator.submit(node.script(f"short-lived-{i}", "exec sleep 600")) for i in range(3)]
    for job_id in jobs:
        node.running(job_id)
    if slow:
        coordinator.fault("fail", "delay:1")
    assert node.stop() == 0
    assert [coordinator.job(job_id).error_code for job_id in jobs] == ["E_LOST"] * 3
    assert_once(coordinator, jobs)
    assert node.remains() == []


def test_second_sigterm_ends_a_drain(coordinator: MockCoordinator, node_factory: NodeFactory) -> None:
    node = node_factory(1, shutdown={"mode": "drain", "grace_s": 600}).start()
    job_id = coordinator.submit(node.script("patient", "exec sleep 600"))
    pid = node.running(job_id)
    assert node.process is not None
    node.process.send_signal(signal.SIGTERM)
    wait_until(lambda: node.now().stopping, WAIT_S)
    assert alive(pid)
    assert node.stop() == 0
    assert coordinator.job(job_id).error_code == "E_LOST"
    assert node.remains() == []


# --- what a restart knows ----------------------------------------------------------------------------------


def test_restart_knows_finished_jobs_and_resends_their_reports(node_factory: NodeFactory) -> None:
    """A coordinator that has lost its memory hands the same ids out again: they are reported, not run."""
    with MockCoordinator() as first:
        port = int(first.root.rpartition(":")[2])
        node = node_factory(2, base_url=first.url).start()
        jobs = [first.submit(node.script(f"old-{i}", "echo done")) for i in range(3)]
        jobs.append(first.submit({"job_id": "old-bad", "runner": "cli", "command": "no-such"}))
        wait_final(first, jobs)
        wait_settled(node)
        assert node.stop() == 0
    with MockCoordinator(port) as second:
        for job_id in jobs:
            second.submit(first.job(job_id).manifest)
        node.start()
        again = wait_final(second, jobs)
        assert_once(second, jobs)
        assert [job.state for job in again] == [State.DONE] * 3 + [State.FAILED]
        assert again[-1].error_code == "E_DENY"
        # Said of a job that was never acknowledged anew: it did not start.
        assert [job.acks for job in again] == [0] * 4
        assert [len(node.runs(job_id)) for job_id in jobs[:3]] == [1] * 3
        rows = {row.job_id: row.state for row in node.ask("jobs").jobs}
        assert set(jobs) <= set(rows)


def test_undelivered_outcomes_are_delivered_by_the_next_start(
    coordinator: MockCoordinator, node_factory: NodeFactory
) -> None:
    node = node_factory(2, shutdown={"mode": "handover"}).start()
    coordinator.fault("result", "status:500")
    coordinator.fault("fail", "status:500")
    jobs = [coordinator.submit(node.script(f"held-{i}", "true")) for i in range(4)]
    jobs.append(coordinator.submit(node.script("held-fail", "exit 3")))
    wait_until(lambda: all((node.jobs / job_id / "outcome.json").exists() for job_id in jobs), WAIT_S)
    assert node.stop(signal.SIGKILL) == -signal.SIGKILL
    wait_until(lambda: not node.processes(), WAIT_S)
    assert not any(coordinator.job(job_id).reports for job_id in jobs)
    node.start()
    wait_until(lambda: node.now().pending_reports == len(jobs), WAIT_S)
    # The operator sees what is still to be delivered.
    rows: dict[str, Any] = {row.job_id: row.state for row in node.ask("jobs").jobs}
    assert {rows.get(job_id) for job_id in jobs} == {"UPLOADING"}
    coordinator.clear_faults()
    wait_final(coordinator, jobs)
    assert_once(coordinator, jobs)
    assert coordinator.job("held-fail").error_code == "E_EXIT"
    assert all(len(node.runs(job_id)) == 1 for job_id in jobs)
    wait_settled(node)
    delivered = sum(len(verdicts(coordinator.job(job_id))) for job_id in jobs)
    assert delivered == len(jobs)


def test_a_second_node_with_something_of_the_first_does_not_start(
    coordinator: MockCoordinator, node_factory: NodeFactory
) -> None:
    node = node_factory(1).start()
    job_id = coordinator.submit(node.script("mine", "exec sleep 600"))
    pid = node.running(job_id)
    others: dict[str, dict[str, Any]] = {
        "node id": {"node_id": node.node_id},
        "workspace.root": {"workspace": {"root": str(node.jobs)}},
        "queue.path": {"queue": {"path": str(node.directory / "state" / "other.db")}},
        "control.socket": {"control": {"socket": str(node.socket.with_name("other.sock"))}},
    }
    for what, changes in others.items():
        second = node_factory(1, **changes)
        second.launch()
        assert second.process is not None
        assert second.process.wait(WAIT_S) == EXIT_CONFIG
        said = second.log.read_text()
        assert what in said
        assert f"(pid {node.now().pid}, since 20" in said
        assert f"configuration {node.config})" in said
    assert alive(pid)
    assert node.now().pid == (node.process.pid if node.process else 0)
    assert node.stop() == 0
    assert_once(coordinator, [job_id])
