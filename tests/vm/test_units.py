"""The units as systemd sees them."""

import json
from pathlib import Path

import pytest

from tests.vm.machine import MAIN, SLOTS, WAIT_S, Machine, run
from tools.lib.local_node import wait_until
from tools.mock.bootstrap.records import State

EXPOSURE = {MAIN: 5.0, SLOTS: 2.0}


def test_systemd_finds_no_fault(installed: None) -> None:
    assert run("systemd-analyze", "verify", MAIN, SLOTS, "aitbc.slice") == ""


def test_memory_that_is_promised_to_the_units_is_promised_to_their_slice(installed: None) -> None:
    miner, slots, both = (
        int(run("systemctl", "show", "--value", "-p", "MemoryMin", unit))
        for unit in (MAIN, SLOTS, "aitbc.slice")
    )
    assert both == miner + slots
    assert min(miner, slots) > 0


@pytest.mark.parametrize("unit", EXPOSURE)
def test_exposure(installed: None, reports: Path, unit: str) -> None:
    text = run("systemd-analyze", "security", "--no-pager", unit)
    (reports / f"security-{unit}.txt").write_text(text)
    exposure = float(text.rpartition("Overall exposure level for")[2].split(": ")[1].split()[0])
    rows = json.loads(run("systemd-analyze", "security", "--json=short", unit))
    (reports / f"security-{unit}.json").write_text(json.dumps(rows, indent=1))
    assert exposure < EXPOSURE[unit], text


def test_a_lost_placeholder_comes_back_and_the_miner_with_it(machine: Machine) -> None:
    machine.start()
    old = machine.main_pid()
    machine.kill(pid=int(machine.show("MainPID", SLOTS)))
    machine.wait_new_main(old)
    wait_until(lambda: machine.is_active(SLOTS), WAIT_S, 0.2)
    job_id = machine.submit(machine.script("after", "true"))
    (job,) = machine.wait_final([job_id])
    assert job.state is State.DONE, job
