"""A machine that goes down with a job running, and comes up again: `tools/vm test tests/vm/reboot.py`.

Not collected with the others, for the machine, and pytest with it, is started a second time in the middle.
"""

import json
import os
import shutil
from pathlib import Path

import pytest

from tests.vm.machine import STATE, WAIT_S, Machine, hold, run
from tools.lib.local_node import wait_until

MARKS = Path("/var/lib/aitbc/marks")
SECOND = os.environ.get("AITBC_VM_BOOT") == "2"


@pytest.fixture(autouse=True)
def no_marks() -> None:
    """Make room for the marks of this boot's jobs."""
    shutil.rmtree(MARKS, ignore_errors=True)


def codes(job_id: str) -> set[str]:
    """Give the codes that are on record of a job."""
    files = [STATE / "jobs" / job_id / name for name in ("outcome.json", "outcome.refused.json")]
    return {json.loads(file.read_text())["code"] for file in files if file.exists()}


def test_a_job_goes_down_with_its_machine_and_is_not_run_again(no_marks: None, machine: Machine) -> None:
    manifest = machine.script("doomed", hold(STATE / "never"))
    machine.slots(1)
    machine.submit(manifest)
    if not SECOND:
        machine.start()
        machine.running("doomed")
        # As from a power cut: nobody is told, and nothing is written any more.
        Path("/proc/sysrq-trigger").write_text("b")
        wait_until(lambda: False, WAIT_S)
    assert json.loads((STATE / "jobs" / "doomed" / "state.json").read_text())["state"] == "RUNNING"
    # The coordinator has it still, and hands it out once more. If systemd has started the node at the boot,
    # the node may not have read this coordinator's address.
    machine.restart()
    wait_until(lambda: "E_LOST" in codes("doomed"), WAIT_S, 0.5)
    after = machine.submit(machine.script("next", "true"))
    machine.wait_final([after])
    assert machine.runs("doomed") == []
    assert "E_LOST" in run("aitbc-minerctl", "job", "doomed")
