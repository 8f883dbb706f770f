"""A node whose slots.d is changed under it: reload does what it can, and no job notices."""

import copy
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from aitbc_miner.control.protocol import Done, Refusal
from aitbc_miner.errors import EXIT_CONFIG
from tests.node.harness import Node, assert_once, states, submit, until, wait_final, wait_gone
from tools.lib.local_node import wait_until
from tools.mock.bootstrap.coordinator import MockCoordinator
from tools.mock.bootstrap.records import State

WAIT_S = 120.0


def rows(*names: str, **limits: Any) -> list[dict[str, Any]]:
    # Copies, for YAML writes what is there twice as an alias.
    return [copy.deepcopy({"name": name, "kind": "cpu", **limits}) for name in names]


def reload(node: Node) -> str:
    answer = node.ask("reload")
    assert isinstance(answer, Done), answer
    return answer.message


def names(node: Node) -> set[str]:
    return {row.slot.offer.name for row in node.now().slots}


@pytest.fixture
def node(node_factory: Any) -> Node:
    made: Node = node_factory(rows("one", "two"))
    made.start()
    wait_until(lambda: len(made.now().slots) == 2 and all(row.slot.free for row in made.now().slots), WAIT_S)
    return made


def test_slots_come_change_and_go_and_a_running_job_goes_on(node: Node, coordinator: MockCoordinator) -> None:
    assert reload(node) == "reloaded: no change"
    gate = node.directory / "gate"
    job = coordinator.submit(node.script("long", until(gate), requirements={"cpu_threads": 1}))
    pid = node.running(job)
    busy = next(row.slot.offer.name for row in node.now().slots if row.slot.job_id == job)
    idle = ({"one", "two"} - {busy}).pop()
    node.write_slots(rows(busy, "three", pids_max=77))
    said = reload(node)
    assert f"changed: {busy}" in said
    assert "added: three" in said
    assert f"removed: {idle}" in said
    wait_until(lambda: names(node) == {busy, "three"}, WAIT_S)
    wait_until(lambda: node.slot("three").free, WAIT_S)
    assert "pids" in node.slot(busy).enforced
    # Now the busy one goes as well, but not before its job is done.
    node.write_slots(rows("three"))
    assert reload(node) == f"reloaded: changed: three; will be removed after the running job: {busy}"
    assert node.slot(busy).reason == "will be removed when its job ends"
    more = submit(coordinator, 3)
    wait_final(coordinator, more)
    assert node.runs(job) == [pid]
    assert names(node) == {busy, "three"}
    gate.touch()
    wait_final(coordinator, [job])
    wait_until(lambda: names(node) == {"three"}, WAIT_S)
    assert states(coordinator, [job, *more]) == {State.DONE}
    assert_once(coordinator, [job, *more])


def test_a_slot_that_is_wanted_again_stays(node: Node, coordinator: MockCoordinator) -> None:
    gate = node.directory / "gate"
    jobs = [coordinator.submit(node.script(f"j{number}", until(gate))) for number in range(2)]
    for job in jobs:
        node.running(job)
    node.write_slots(rows("one"))
    assert reload(node) == "reloaded: will be removed after the running job: two"
    node.write_slots(rows("one", "two"))
    assert reload(node) == "reloaded: removal cancelled: two"
    gate.touch()
    wait_final(coordinator, jobs)
    wait_until(lambda: node.slot("two").free, WAIT_S)
    assert_once(coordinator, jobs)


def test_what_is_wrong_changes_nothing(node: Node) -> None:
    before = node.all_children()
    (node.directory / "slots.d" / "slots.yaml").write_text("slots:\n  - {name: one, kind: cpu, nicee: 3}\n")
    answer = node.ask("reload")
    assert isinstance(answer, Refusal)
    assert answer.exit_code == EXIT_CONFIG
    assert "slots.yaml:2" in answer.message
    told = subprocess.run(
        [sys.executable, "-m", "aitbc_miner.ctl.main", "--socket", str(node.socket), "reload"],
        check=False,
        capture_output=True,
        text=True,
        timeout=WAIT_S,
    )
    assert (told.returncode, told.stdout) == (EXIT_CONFIG, "")
    # Each fault has a line of its own.
    assert told.stderr == f"aitbc-minerctl: {answer.message}\n"
    assert "nicee" in answer.message
    assert names(node) == {"one", "two"}
    # Under load the two that are no workers may not be told apart at once.
    wait_until(lambda: node.children() == before, WAIT_S)


def test_what_needs_a_restart_is_named(node: Node) -> None:
    config = yaml.safe_load(node.config.read_text())
    config["heartbeat"]["interval_s"] = 3
    node.config.write_text(yaml.safe_dump(config))
    said = reload(node)
    assert said.startswith("reloaded: no change; restart the miner to apply heartbeat.interval_s")


def test_a_signal_reloads_too(node: Node) -> None:
    node.write_slots(rows("one", "two", "three"))
    os.kill(node.now().pid, signal.SIGHUP)
    wait_until(lambda: names(node) == {"one", "two", "three"}, WAIT_S)


def test_a_job_whose_slot_is_gone_after_a_restart_is_finished_all_the_same(
    node_factory: Any, coordinator: MockCoordinator
) -> None:
    node: Node = node_factory(rows("one"), shutdown={"mode": "handover"})
    node.start()
    gate = node.directory / "gate"
    job = coordinator.submit(node.script("long", until(gate)))
    pid = node.running(job)
    assert node.stop() == 0
    node.write_slots(rows("other"))
    node.start()
    wait_until(lambda: names(node) == {"one", "other"}, WAIT_S)
    wait_final(coordinator, submit(coordinator, 1))
    assert node.runs(job) == [pid]
    Path(gate).touch()
    wait_final(coordinator, [job])
    wait_until(lambda: names(node) == {"other"}, WAIT_S)
    assert_once(coordinator, [job])
    wait_gone([pid])


def test_a_changed_limit_holds_for_the_next_job(node: Node, coordinator: MockCoordinator) -> None:
    node.write_slots(rows("one", "two", rlimits={"nofile": 123}))
    reload(node)
    job = coordinator.submit(node.script("limits", "[ $(ulimit -n) = 123 ]"))
    wait_final(coordinator, [job])
    assert states(coordinator, [job]) == {State.DONE}
