"""Many jobs, a coordinator that fails, the choice of slots, cancelling: each job ends once, as it should."""

import contextlib
import socket
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil

from aitbc_miner.control.protocol import Refusal
from tests.node.conftest import NodeFactory
from tests.node.harness import (
    IMPATIENT,
    WAIT_S,
    Node,
    alive,
    assert_once,
    noop,
    states,
    submit,
    until,
    wait_final,
    wait_gone,
    wait_settled,
)
from tools.lib.local_node import wait_until
from tools.mock.bootstrap.coordinator import MockCoordinator
from tools.mock.bootstrap.ledger import Ledger
from tools.mock.bootstrap.records import Rules, State

SMALL_AND_LARGE = [
    {"name": "small", "kind": "cpu", "cpu_max": "100%", "memory_max": "64M"},
    {"name": "large", "kind": "cpu", "cpu_max": "100%", "memory_max": "512M"},
]
LARGE = {"requirements": {"memory_mb": 256}}


# --- many --------------------------------------------------------------------------------------------------


def test_500_jobs_through_4_slots_are_each_accepted_once(
    coordinator: MockCoordinator, node_factory: NodeFactory
) -> None:
    # On a busy machine an acknowledgement may come later than the lease of the other tests lasts.
    coordinator.ledger.rules = Rules(lease_s=300)
    node = node_factory(4, coordinator={"poll_interval_s": 0.05}).start()
    began = time.monotonic()
    jobs = submit(coordinator, 500)
    done = wait_final(coordinator, jobs, 300.0)
    print(f"\n500 no-op jobs through 4 slots: {time.monotonic() - began:.2f} s")
    assert {job.state for job in done} == {State.DONE}
    assert [len(job.handed) for job in done] == [1] * 500
    assert_once(coordinator, jobs)
    wait_settled(node)
    assert node.now().finished == {"OK": 500}
    used = Counter(report.body["slot"] for job in done for report in job.reports)
    assert set(used) == {"cpu0", "cpu1", "cpu2", "cpu3"}
    pids = node.pids()
    assert node.stop() == 0
    wait_gone(pids)
    assert node.remains() == []


def test_nothing_leaks_from_job_to_job(coordinator: MockCoordinator, node_factory: NodeFactory) -> None:
    node = node_factory(2).start()
    finish(coordinator, node, 10)
    pids = {**node.all_children(), "supervisor": node.now().pid}
    before = {name: resources(pid) for name, pid in pids.items()}
    finish(coordinator, node, 200)
    assert {**node.all_children(), "supervisor": node.now().pid} == pids
    # What is open just for a moment counts in either: less than before is no leak.
    more: dict[str, Counter[str]] = {}

    def none_more() -> bool:
        now = {name: resources(pid) - before[name] for name, pid in pids.items()}
        more.clear()
        more.update({name: grown for name, grown in now.items() if grown})
        return not more

    with contextlib.suppress(TimeoutError):
        wait_until(none_more, WAIT_S)
    assert more == {}
    # The coordinator's connections: one for each thread at most that calls it, however many jobs there were.
    assert sockets(pids["agent"]) <= 30
    # The heartbeat keeps the last process that it asked about GPUs until it starts the next one.
    spare = zombies(pids.pop("heartbeat"))
    assert len(spare) <= 1
    assert [child for pid in pids.values() for child in zombies(pid)] == []


def finish(mock: MockCoordinator, node: Node, count: int) -> None:
    jobs = submit(mock, count)
    wait_final(mock, jobs, 120.0)
    wait_settled(node)


def resources(pid: int) -> Counter[str]:
    """Count a process's open files by what they are; connections over the network come and go."""
    kinds: Counter[str] = Counter()
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        try:
            kinds[str(entry.readlink()).partition(":")[0]] += 1
        except FileNotFoundError:
            continue
    kinds["socket"] -= sockets(pid)
    return kinds


def sockets(pid: int) -> int:
    """Count a process's connections over the network."""
    return len(psutil.Process(pid).net_connections("inet"))


def zombies(pid: int) -> list[int]:
    children = psutil.Process(pid).children()
    return [child.pid for child in children if not alive(child.pid)]


# --- slots -------------------------------------------------------------------------------------------------


def test_impossible_jobs_are_refused_at_once(node_factory: NodeFactory) -> None:
    needs: dict[str, tuple[dict[str, Any], str]] = {
        "gpu": ({"gpu": True}, "E_NOGPU"),
        "vram": ({"vram_mb": 1000}, "E_NOGPU"),
        "memory": ({"memory_mb": 100_000_000}, "E_NOSLOT"),
        "threads": ({"cpu_threads": 5000}, "E_NOSLOT"),
    }
    with MockCoordinator(ignore_filters=True) as mock:
        rows = [{"name": "only", "kind": "cpu", "memory_max": "64M", "runners": ["cli"]}]
        node = node_factory(rows, base_url=mock.url).start()
        for job_id, (requirements, _) in needs.items():
            mock.submit(noop(job_id=job_id, requirements=requirements))
        mock.submit({"job_id": "runner", "runner": "python", "task": "word_statistics"})
        mock.submit(noop(job_id="possible"))
        jobs = [*needs, "runner", "possible"]
        wait_final(mock, jobs)
        codes = {job_id: mock.job(job_id).error_code for job_id in jobs}
        expected: dict[str, str | None] = {job_id: code for job_id, (_, code) in needs.items()}
        assert codes == expected | {"runner": "E_NOSLOT", "possible": None}
        assert all(mock.job(job_id).acks == 0 for job_id in [*needs, "runner"])
        assert_once(mock, jobs)
        assert node.stop() == 0


def test_jobs_for_a_busy_slot_wait_and_the_more_important_goes_first(node_factory: NodeFactory) -> None:
    with MockCoordinator(ignore_filters=True) as mock:
        node = node_factory(SMALL_AND_LARGE, base_url=mock.url).start()
        go = node.marks / "go"
        mock.submit(node.script("blocker", until(go), **LARGE))
        node.running("blocker")
        waiting = [("low-1", 0), ("low-2", 0), ("high", 5), ("low-3", 0)]
        for job_id, priority in waiting:
            mock.submit(node.script(job_id, "true", priority=priority, **LARGE))
            acked(mock, job_id)
        wait_until(lambda: len(node.now().queued) == 4, WAIT_S)
        # They hold up nobody for whom there is a slot.
        mock.submit(noop(job_id="little"))
        wait_final(mock, ["little"])
        assert mock.job("little").reports[0].body["slot"] == "small"
        assert not any(node.runs(job_id) for job_id, _ in waiting)
        go.touch()
        jobs = [job_id for job_id, _ in waiting]
        done = wait_final(mock, ["blocker", *jobs])
        assert {job.reports[0].body["slot"] for job in done} == {"large"}
        assert_once(mock, ["blocker", "little", *jobs])
        assert sorted(jobs, key=lambda job_id: began(node, job_id)) == ["high", "low-1", "low-2", "low-3"]
        assert node.stop() == 0


def began(node: Node, job_id: str) -> float:
    """Tell when a job's program began, by its mark."""
    (mark,) = node.marks.glob(f"{job_id}+*")
    return mark.stat().st_mtime


def acked(mock: MockCoordinator, job_id: str) -> None:
    mock.wait(lambda ledger: ledger.job(job_id).state == State.ACKED, WAIT_S)


def test_jobs_for_a_busy_slot_are_not_pulled(coordinator: MockCoordinator, node_factory: NodeFactory) -> None:
    node = node_factory(SMALL_AND_LARGE).start()
    go = node.marks / "go"
    coordinator.submit(node.script("first", until(go), **LARGE))
    node.running("first")
    coordinator.submit(noop(job_id="second", **LARGE))
    coordinator.submit(noop(job_id="little"))
    wait_final(coordinator, ["little"])
    assert coordinator.job("second").handed == ()
    go.touch()
    wait_final(coordinator, ["second"])
    assert_once(coordinator, ["first", "second", "little"])


def test_waiting_jobs_survive_a_restart(node_factory: NodeFactory) -> None:
    with MockCoordinator(ignore_filters=True) as mock:
        node = node_factory(SMALL_AND_LARGE, base_url=mock.url).start()
        mock.submit(node.script("blocker", "exec sleep 600", **LARGE))
        node.running("blocker")
        jobs = ["w-1", "w-2"]
        for job_id in jobs:
            mock.submit(node.script(job_id, "true", **LARGE))
            acked(mock, job_id)
        wait_until(lambda: len(node.now().queued) == 2, WAIT_S)
        assert node.stop() == 0
        assert mock.job("blocker").error_code == "E_LOST"
        assert states(mock, jobs) == {State.ACKED}
        node.start()
        wait_final(mock, jobs)
        assert states(mock, jobs) == {State.DONE}
        assert [len(node.runs(job_id)) for job_id in jobs] == [1, 1]
        assert_once(mock, ["blocker", *jobs])
        assert node.stop() == 0


# --- the operator's and the coordinator's word -------------------------------------------------------------


def test_running_jobs_are_cancelled_by_either(
    coordinator: MockCoordinator, node_factory: NodeFactory
) -> None:
    node = node_factory(2, heartbeat=IMPATIENT).start()
    jobs = [coordinator.submit(node.script(name, "exec sleep 600")) for name in ("theirs", "ours")]
    pids = [node.running(job_id) for job_id in jobs]
    coordinator.cancel("theirs")
    node.tell("cancel", "ours")
    done = wait_final(coordinator, jobs)
    assert [job.error_code for job in done] == ["E_CANCELLED"] * 2
    messages = [job.reports[0].body["error_msg"] for job in done]
    assert "coordinator" in messages[0]
    assert "operator" in messages[1]
    wait_gone(pids)
    assert_once(coordinator, jobs)
    wait_until(lambda: all(row.slot.free for row in node.now().slots), WAIT_S)
    assert isinstance(node.ask("cancel", "ours"), Refusal)


def test_waiting_jobs_are_cancelled_by_either(node_factory: NodeFactory) -> None:
    with MockCoordinator(ignore_filters=True) as mock:
        node = node_factory(SMALL_AND_LARGE, base_url=mock.url).start()
        go = node.marks / "go"
        mock.submit(node.script("blocker", until(go), **LARGE))
        node.running("blocker")
        jobs = ["theirs", "ours", "stays"]
        for job_id in jobs:
            mock.submit(node.script(job_id, "true", **LARGE))
            acked(mock, job_id)
        wait_until(lambda: len(node.now().queued) == 3, WAIT_S)
        mock.cancel("theirs")
        node.tell("cancel", "ours")
        done = wait_final(mock, ["theirs", "ours"])
        assert [job.error_code for job in done] == ["E_CANCELLED"] * 2
        assert node.now().queued == ["stays"]
        go.touch()
        wait_final(mock, ["blocker", "stays"])
        assert states(mock, ["blocker", "stays"]) == {State.DONE}
        assert [len(node.runs(job_id)) for job_id in jobs] == [0, 0, 1]
        assert_once(mock, ["blocker", *jobs])
        assert node.stop() == 0


def test_jobs_are_cancelled_while_their_inputs_are_fetched(
    coordinator: MockCoordinator, node_factory: NodeFactory
) -> None:
    node = node_factory(1, heartbeat=IMPATIENT).start()
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/never"
        coordinator.submit(node.script("theirs", "true", input={"urls": [url]}))
        acked(coordinator, "theirs")
        coordinator.cancel("theirs")
        (job,) = wait_final(coordinator, ["theirs"])
    assert job.error_code == "E_CANCELLED"
    assert node.runs("theirs") == []
    assert_once(coordinator, ["theirs"])
    wait_final(coordinator, submit(coordinator, 1))


def test_inputs_are_for_their_own_job_alone(coordinator: MockCoordinator, node_factory: NodeFactory) -> None:
    node = node_factory(1).start()
    job_id = coordinator.submit(
        node.script("reads", "set -e; cat words; echo more >> words", input={"inline": {"words": "secret"}})
    )
    (job,) = wait_final(coordinator, [job_id])
    assert job.state == State.DONE
    found = node.jobs / job_id
    assert (found / "work/words").read_text() == "secretmore\n"
    assert [(found / name).stat().st_mode & 0o777 for name in ("input", "work", "work/words")] == [
        0o700,
        0o700,
        0o600,
    ]


def test_drain_stops_pulling_until_resume(coordinator: MockCoordinator, node_factory: NodeFactory) -> None:
    node = node_factory(2, heartbeat=IMPATIENT).start()
    go = node.marks / "go"
    coordinator.submit(node.script("running", until(go)))
    node.running("running")
    node.tell("drain")
    wait_until(lambda: not node.now().accepting, WAIT_S)
    pulls_settle(coordinator)
    jobs = submit(coordinator, 3)
    before = len(coordinator.ledger.calls("pull"))
    beats(coordinator, 2)
    assert len(coordinator.ledger.calls("pull")) == before
    go.touch()
    wait_final(coordinator, ["running"])
    beats(coordinator, 1)
    assert all(coordinator.job(job_id).handed == () for job_id in jobs)
    node.tell("resume")
    wait_final(coordinator, jobs)
    assert_once(coordinator, ["running", *jobs])


def pulls_settle(mock: MockCoordinator) -> None:
    """Wait until a heartbeat has come and gone without a pull since the one before."""

    def quiet(ledger: Ledger) -> bool:
        last = ledger.calls("heartbeat")[-2:]
        pulls = ledger.calls("pull")
        return len(last) == 2 and (not pulls or pulls[-1].at < last[0].at)

    mock.wait(quiet, WAIT_S)


def beats(mock: MockCoordinator, count: int) -> None:
    """Wait for this many further heartbeats."""
    sofar = len(mock.ledger.calls("heartbeat"))
    mock.wait(lambda ledger: len(ledger.calls("heartbeat")) >= sofar + count, WAIT_S)
