"""Slots that cannot be used take no job, say why, leave the others alone, and come back by themselves."""

import json
import re
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from aitbc_miner.ipc.messages import SlotView
from aitbc_miner.sandbox.users import job_user
from tests.vm.conftest import Count
from tests.vm.disks import frozen, kill_own, mounted
from tests.vm.machine import WAIT_S, Machine, alive, run, wait_gone
from tools.lib.local_node import wait_until
from tools.mock.bootstrap.records import State

pytestmark = pytest.mark.one_release("13", "the states of a slot are the node's own")

# A job goes to the smallest slot that is free and large enough: so each can be meant.
MEMORY_MB = {"cpu0": 128, "cpu1": 192, "cpu2": 256}
DEATHS_ALLOWED = 5


@pytest.fixture
def node(machine: Machine) -> Machine:
    """Give the machine with three slots; not started."""
    machine.slots([{"name": name, "kind": "cpu", "memory_max": f"{mb}M"} for name, mb in MEMORY_MB.items()])
    return machine


def manifest(node: Machine, job_id: str, slot: str, line: str = "echo done") -> dict[str, Any]:
    return node.script(job_id, line, requirements={"memory_mb": MEMORY_MB[slot]})


def works(node: Machine, job_id: str, slot: str, runs_in: str | None = None) -> None:
    """Have a job done that would go into `slot`, and see which slot has done it."""
    (job,) = node.wait_final([node.submit(manifest(node, job_id, slot))])
    assert job.state is State.DONE, job
    outcome = json.loads((node.jobs / job_id / "outcome.json").read_text())
    assert outcome["slot"] == (runs_in or slot)


def quarantined(node: Machine, slot: str, reason: str = "") -> SlotView:
    """Wait until the slot takes no more jobs for a reason that matches, and give it."""

    def now() -> SlotView | None:
        view = node.slot(slot)
        return view if view.state == "QUARANTINED" and re.search(reason, view.reason or "") else None

    view: SlotView = wait_until(now, WAIT_S, 0.2)
    # The operator sees it too, without asking for more.
    page = " ".join(run("aitbc-minerctl", "status").split())
    assert f"slot {slot}: {(view.reason or '')[:40]}" in page
    assert f"{slot}: {view.reason}" in " ".join(run("aitbc-minerctl", "slots").split())
    return view


def recovered(node: Machine, slot: str) -> None:
    """Wait until the slot is free again; nobody does anything for it."""
    # Each try in vain doubles the time until the next.
    wait_until(lambda: node.slot(slot).state == "IDLE", 2 * WAIT_S, 0.5)


def sleeps_in_kernel(pid: int) -> bool:
    return psutil.Process(pid).status() == psutil.STATUS_DISK_SLEEP


@contextmanager
def stranger(slot: str, line: str) -> Iterator["subprocess.Popen[bytes]"]:
    """Run a line of sh as the user of a slot, but outside of it, as cron would."""
    user = job_user(slot)
    become = ["setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups"]
    process = subprocess.Popen([*become, "sh", "-c", line], stdin=subprocess.PIPE)
    # At once, as every good parent does: even a zombie is a process of the user.
    threading.Thread(target=process.wait, daemon=True).start()
    try:
        wait_until(lambda: psutil.Process(process.pid).name() == "sh", WAIT_S)
        assert psutil.Process(process.pid).username() == user
        yield process
    finally:
        kill_own(process.pid)
        process.wait(WAIT_S)
        assert process.stdin
        process.stdin.close()


@pytest.mark.own_kernel("needs a disk that can be frozen")
def test_what_cannot_be_killed_costs_the_slot_and_no_other(node: Machine, count: Count) -> None:
    place = Path("/var/lib/aitbc/frozen")
    with mounted(node, place):
        place.chmod(0o777)
        node.start()
        with stranger("cpu1", f"read _; echo > {place}/stranger") as foreign:
            with frozen(place):
                hang_outside(node, foreign)
                pid = hang_in_job(node, place)
                works(node, "beside", "cpu0", runs_in="cpu2")
                for _ in range(count(0, 1)):
                    # It tries again, finds it as it was, and says so.
                    quarantined(node, "cpu0", f"cannot empty .*: process {pid} cannot be killed")
                    quarantined(node, "cpu1", f"user aitbc-job-cpu1 still owns the process {foreign.pid} ")
            wait_gone([pid, foreign.pid])
            for slot in ("cpu0", "cpu1"):
                recovered(node, slot)
                works(node, f"again-{slot}", slot)


def hang_outside(node: Machine, foreign: "subprocess.Popen[bytes]") -> None:
    """Have a process of the slot's user sleep in the kernel: the slot's next job is done, and is its last."""
    assert foreign.stdin
    foreign.stdin.close()
    wait_until(lambda: sleeps_in_kernel(foreign.pid), WAIT_S)
    works(node, "before", "cpu1")
    quarantined(node, "cpu1", rf"^user aitbc-job-cpu1 still owns the process {foreign.pid} \(disk-sleep\)$")


def hang_in_job(node: Machine, place: Path) -> int:
    """Have a job sleep in the kernel, cancel it, and see what that means for its slot; gives its pid."""
    node.submit(manifest(node, "stuck", "cpu0", f"echo > {place}/job"))
    pid = node.running("stuck")
    wait_until(lambda: sleeps_in_kernel(pid), WAIT_S)
    node.mock.cancel("stuck")
    (job,) = node.wait_final(["stuck"])
    assert job.error_code == "E_CANCELLED", job
    quarantined(node, "cpu0", rf"^the process {pid} \(disk-sleep\) of job stuck could not be killed within")
    assert sleeps_in_kernel(pid)
    return pid


def test_what_a_job_has_others_start_for_it_is_killed(node: Machine) -> None:
    with stranger("cpu0", "read _") as early:
        node.start()
        # Before the slot's first job.
        assert early.wait(WAIT_S) == -9
    with stranger("cpu0", "read _") as late, stranger("cpu1", "read _") as other:
        works(node, "first", "cpu0")
        assert late.wait(WAIT_S) == -9
        assert alive(other.pid)
    assert node.slot("cpu0").state == "IDLE"
    works(node, "second", "cpu0")


def test_a_slot_whose_worker_keeps_dying_rests(node: Machine) -> None:
    node.start()
    killed: list[int] = []
    for _ in range(DEATHS_ALLOWED):
        new = wait_until(lambda: {node.slot("cpu0").worker_pid} - {None, *killed}, WAIT_S, 0.1)
        killed.append(node.kill(pid=new.pop()))
    reason = "^the worker died 5 times within 600 s; last: .*SIGKILL"
    rests = quarantined(node, "cpu0", reason)
    assert rests.worker_pid is None
    works(node, "beside", "cpu0", runs_in="cpu1")
    recovered(node, "cpu0")
    works(node, "again", "cpu0")
