"""A node at the AITBC coordinator: its quirks, one by one, in whole nodes."""

import contextlib
import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from typing import Any

import psutil
import pytest

from tests.node.harness import WAIT_S, Node, until, wait_gone, wait_settled
from tests.node.networks import KEY, Aitbc, network
from tools.lib.local_node import wait_until
from tools.mock.aitbc.coordinator import MockAitbc

Maker = Callable[..., Node]
# So that what is asked for at once is told from what comes in its turn.
RARELY = {"interval_s": 120}


@pytest.fixture
def double() -> Iterator[MockAitbc]:
    with network("aitbc-v1") as net:
        assert isinstance(net.mock, MockAitbc)
        yield net.mock


@pytest.fixture
def node_of(double: MockAitbc) -> Iterator[Maker]:
    made: list[Node] = []

    def make(slots: int = 1, there: MockAitbc | None = None, **changes: Any) -> Node:
        made.append(Aitbc(there or double).node(slots, **changes))
        return made[-1]

    yield make
    for node in made:
        node.clean_up()
        shutil.rmtree(node.directory)


def submit(double: MockAitbc, line: str = "true", **more: Any) -> str:
    return double.submit({"type": "script", "line": line}, **more)


def wait_state(double: MockAitbc, job_id: str, state: str, timeout: float = WAIT_S) -> None:
    double.wait(lambda _: double.job(job_id).state == state, timeout)


def marked(node: Node, name: str, then: str) -> str:
    return f': > {node.marks}/{name}"+$$"; {then}'


def test_the_slot_of_a_failed_job_is_free_at_once(double: MockAitbc, node_of: Maker) -> None:
    """Until the next heartbeat the coordinator counts it as taken, and that would be two minutes."""
    node = node_of(1, heartbeat=RARELY, coordinator={"poll_interval_s": 10 * WAIT_S}).start()
    go = node.marks / "go"
    bad = submit(double, f"{until(go)}; exit 3")
    wait_state(double, bad, "RUNNING")
    # The node asks once when the slot is free, and not again for very long: it must be there by then.
    after = submit(double)
    go.touch()
    wait_state(double, after, "COMPLETED")
    assert double.job(bad).state == "FAILED"


def test_a_job_whose_reply_was_lost_is_found_on_the_list_at_once(double: MockAitbc, node_of: Maker) -> None:
    double.fault("poll", "drop_after", 1)
    job_id = submit(double)
    node_of(1, heartbeat=RARELY).start()
    wait_state(double, job_id, "COMPLETED")
    assert len(double.job(job_id).results) == 1
    assert len(double.job(job_id).assigned) == 1


def test_what_ran_when_the_disk_was_lost_is_taken_up(double: MockAitbc, node_of: Maker) -> None:
    """The coordinator alone remembers it."""
    node = node_of(1).start()
    job_id = submit(double, marked(node, "j", "sleep 600"))
    pid = node.running("j")
    node.stop(signal.SIGKILL)
    for left in node.processes():
        with contextlib.suppress(ProcessLookupError):
            os.kill(left, signal.SIGKILL)
    wait_gone([pid, *node.processes()])
    shutil.rmtree(node.jobs)
    shutil.rmtree(node.directory / "state")
    node.start()
    wait_until(lambda: len(node.runs("j")) == 2, WAIT_S)
    assert double.job(job_id).state == "RUNNING"


def test_back_with_an_empty_database(double: MockAitbc, node_of: Maker) -> None:
    node = node_of(2, coordinator={"give_up": {"refusals": 2, "over_s": 0}}).start()
    go, on = node.marks / "go", node.marks / "on"
    old = submit(double, marked(node, "old", until(go)))
    submit(double, marked(node, "busy", until(on)))
    node.running("old")
    busy = node.running("busy")
    double.stop()
    go.touch()
    wait_until(lambda: node.now().pending_reports == 1, WAIT_S)
    double.wipe()
    double.start()
    new = [submit(double) for _ in range(3)]
    for job_id in new:
        wait_state(double, job_id, "COMPLETED")
    # Nobody has cancelled what is on no list any more.
    asked = len(double.calls("jobs"))
    double.wait(lambda _: len(double.calls("jobs")) >= asked + 4, WAIT_S)
    assert psutil.pid_exists(busy)
    on.touch()
    wait_gone([busy])
    wait_settled(node)
    assert [len(double.job(job_id).results) for job_id in new] == [1, 1, 1]
    assert old not in double.jobs()
    assert node.now().coordinator.registered


def test_a_job_ends_when_it_is_waited_for_no_longer(double: MockAitbc, node_of: Maker) -> None:
    node = node_of(1).start()
    job_id = submit(double, marked(node, "j", "sleep 600"), ttl_seconds=3)
    pid = node.running("j")
    wait_gone([pid])
    wait_state(double, job_id, "FAILED")
    assert str(double.job(job_id).error).startswith("E_TIMEOUT")


def test_a_cancelled_job_is_neither_completed_nor_failed_and_its_slot_is_free(
    double: MockAitbc, node_of: Maker
) -> None:
    node = node_of(1, heartbeat={"interval_s": 2}).start()
    job_id = submit(double, marked(node, "j", "sleep 600"))
    pid = node.running("j")
    assert double.cancel(job_id)
    wait_gone([pid])
    wait_state(double, submit(double), "COMPLETED")
    wait_settled(node)
    assert double.job(job_id).state == "CANCELED"
    assert (double.job(job_id).results, double.job(job_id).fails) == ((), ())


def test_the_operator_cancels_and_the_client_is_told(double: MockAitbc, node_of: Maker) -> None:
    node = node_of(1).start()
    job_id = submit(double, marked(node, "j", "sleep 600"))
    node.running("j")
    node.tell("cancel", job_id)
    wait_state(double, job_id, "FAILED")
    assert str(double.job(job_id).error).startswith("E_CANCELLED")


def test_heartbeats_tell_what_is_under_way(double: MockAitbc, node_of: Maker) -> None:
    node = node_of(3, heartbeat={"interval_s": 0.5}).start()
    go = node.marks / "go"
    for number in range(2):
        submit(double, marked(node, f"j-{number}", until(go)))
        node.running(f"j-{number}")
    double.wait(lambda _: _last(double, node)["inflight"] == 2, WAIT_S)
    assert _last(double, node)["status"] == "ONLINE"
    node.tell("drain")
    double.wait(lambda _: _last(double, node)["status"] == "DRAINING", WAIT_S)
    go.touch()
    double.wait(lambda _: _last(double, node)["inflight"] == 0, WAIT_S)
    assert double.miners()[node.node_id].concurrency == 3


@pytest.mark.parametrize(("mode", "busy"), [("kill", True), ("handover", False)])
def test_a_node_that_stops_signs_off(mode: str, busy: bool, double: MockAitbc, node_of: Maker) -> None:
    node = node_of(1, shutdown={"mode": mode}).start()
    if busy:
        submit(double, marked(node, "j", "sleep 600"))
        node.running("j")
    wait_until(lambda: node.now().coordinator.registered, WAIT_S)
    assert node.stop() == 0
    assert double.miners()[node.node_id].status == "OFFLINE"
    # The next start is there again.
    node.start()
    double.wait(lambda _: double.miners()[node.node_id].status == "ONLINE", WAIT_S)


def test_a_node_whose_jobs_go_on_does_not_sign_off(double: MockAitbc, node_of: Maker) -> None:
    node = node_of(1, shutdown={"mode": "handover"}).start()
    go = node.marks / "go"
    job_id = submit(double, marked(node, "j", until(go)))
    node.running("j")
    assert node.stop() == 0
    assert double.miners()[node.node_id].status == "ONLINE"
    node.start()
    go.touch()
    wait_state(double, job_id, "COMPLETED")
    assert len(node.runs("j")) == 1


@pytest.mark.parametrize(
    ("environ", "coordinator", "said"),
    [
        ({"MINER_AUTH": "wrong-key-0123456789"}, {}, "does not accept the credential from env:MINER_AUTH"),
        ({}, {"auth_scheme": "bearer"}, "is no JSON web token; for an API key set coordinator.auth_scheme"),
        ({}, {"auth_token": "env:NOT_THERE"}, "env:NOT_THERE"),
    ],
)
def test_status_says_what_is_wrong_with_the_credential(
    environ: dict[str, str], coordinator: dict[str, str], said: str, double: MockAitbc, node_of: Maker
) -> None:
    node = node_of(1, environ=environ, coordinator=coordinator).start()
    wait_until(lambda: any(said in problem.what for problem in node.now().problems), WAIT_S)
    assert not node.now().coordinator.registered
    assert KEY not in node.log.read_text()


def test_a_json_web_token_of_a_client_is_told_apart(double: MockAitbc, node_of: Maker) -> None:
    token = double.token(role="client")
    node = node_of(1, environ={"MINER_AUTH": token}, coordinator={"auth_scheme": "bearer"}).start()
    wait_until(lambda: any("has the role 'client'" in each.what for each in node.now().problems), WAIT_S)
    assert token not in node.log.read_text()


def test_with_a_json_web_token_the_node_works(double: MockAitbc, node_of: Maker) -> None:
    environ = {"MINER_AUTH": double.token(sub="jwt-miner")}
    node = node_of(1, environ=environ, coordinator={"auth_scheme": "bearer"}).start()
    job_id = submit(double)
    wait_state(double, job_id, "COMPLETED")
    assert double.job(job_id).assigned_miner_id == "jwt-miner"
    bad = submit(double, marked(node, "j", "sleep 600"))
    pid = node.running("j")
    assert double.cancel(bad)
    wait_gone([pid])


def test_receipts_are_kept_with_the_job(node_of: Maker) -> None:
    with MockAitbc(rate_limits=False, receipts=True) as signing:
        node = node_of(1, there=signing).start()
        job_id = signing.submit({"type": "script", "line": "true"})
        receipt = node.jobs / job_id / "receipt.json"
        wait_until(receipt.exists, WAIT_S)
        assert json.loads(receipt.read_text())["verified"] is True


def _last(double: MockAitbc, node: Node) -> dict[str, Any]:
    miner = double.miners().get(node.node_id)
    if miner is None or not miner.heartbeats:
        return {"inflight": None, "status": None}
    payload: dict[str, Any] = miner.heartbeats[-1].payload
    return payload
