"""`systemctl reload` changes the slots of a node that runs, and touches no job."""

import time
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import yaml

from aitbc_miner.slots.state import SlotState
from tests.vm.machine import ETC, MAIN, WAIT_S, Machine, alive, hold, run
from tests.vm.measuring import (
    MIB,
    finish,
    log_of,
    note,
    occupy,
    program,
    shares_under,
    spin,
    start,
    write_slots,
)
from tools.lib.local_node import wait_until
from tools.mock.bootstrap.records import State

pytestmark = pytest.mark.one_release("13", "files and messages; the limits themselves are tried in both")

FILE = ETC / "slots.d" / "slots.yaml"
BEFORE = {"cpu_max": "25%", "cpu_weight": 100, "memory_max": "128M", "pids_max": 50}
AFTER = {"cpu_max": "60%", "cpu_weight": 300, "memory_max": "160M", "pids_max": 70}
# What the kernel then has; memory.high and cpuset.cpus are new and go again.
WRITTEN = {
    "cpu.weight": "300",
    "cpuset.cpus": "1",
    "job/cpu.max": "60000 100000",
    "job/memory.max": str(160 * MIB),
    "job/memory.high": str(150 * MIB),
    "job/pids.max": "70",
}
LIFTED = {
    "cpu.weight": "100",
    "cpuset.cpus": "0-1",
    "job/cpu.max": "max 100000",
    "job/memory.max": "max",
    "job/memory.high": "max",
    "job/pids.max": "max",
}
# Has 40 MiB until a file is there, and then asks for as much again.
GROWING = """\
import pathlib, sys, time
kept = [b"x" * (40 << 20)]
print("has it", flush=True)
while not pathlib.Path(sys.argv[1]).exists():
    time.sleep(0.2)
kept.append(b"x" * (40 << 20))
print("has more", flush=True)
"""
Files = dict[str, str]


def files_of(machine: Machine, name: str, wanted: Mapping[str, str]) -> Files:
    """Give what the slot's files hold, of those that are wanted."""
    return {file: (machine.slot_group(name) / file).read_text().strip() for file in wanted}


def wait_written(machine: Machine, name: str, wanted: Mapping[str, str]) -> None:
    """Wait for the slot's files to hold what is wanted: an adopted slot gets it from a child."""
    try:
        wait_until(lambda: files_of(machine, name, wanted) == wanted, WAIT_S / 3, 0.2)
    except TimeoutError:
        assert files_of(machine, name, wanted) == wanted


def reload_badly(text: str) -> tuple[bool, str]:
    """Have a file taken up that is wrong, and give whether that failed, and what the journal has."""
    FILE.write_text(text)
    since = time.strftime("%F %T")
    said = run("systemctl", "reload", MAIN, check=False)
    run("journalctl", "--sync")
    return "failed" in said, run("journalctl", "--no-pager", "-o", "cat", "-u", MAIN, "--since", since)


def restarted(machine: Machine) -> None:
    """Have the node restarted, so that what runs is adopted."""
    old = machine.main_pid()
    machine.restart()
    assert machine.main_pid() != old
    wait_until(lambda: any(row.slot.state == SlotState.ADOPTED for row in machine.now().slots), WAIT_S, 0.2)


def left_alone(machine: Machine) -> None:
    """Have nothing happen."""


ADOPTING = pytest.mark.parametrize("meanwhile", [left_alone, restarted], ids=["running", "adopted"])
Meanwhile = Callable[[Machine], None]


@ADOPTING
@pytest.mark.own_kernel("limits need controllers")
def test_a_running_job_gets_other_limits(machine: Machine, reports: Path, meanwhile: Meanwhile) -> None:
    start(machine, {"name": "cpu0", **BEFORE})
    stop = machine.marks / "stop"
    jobs = occupy(machine, spin(stop))
    pid = machine.running(jobs["cpu0"])
    slow = shares_under(machine, {"cpu0": 0.25})["cpu0"]
    meanwhile(machine)
    write_slots(machine, {"name": "cpu0", **AFTER, "cpus": "1", "memory_high": "150M"})
    wait_written(machine, "cpu0", WRITTEN)
    fast = shares_under(machine, {"cpu0": 0.6})["cpu0"]
    write_slots(machine, {"name": "cpu0"})
    wait_written(machine, "cpu0", LIFTED)
    free = shares_under(machine, {"cpu0": 1.0})["cpu0"]
    figures = {"25%": slow, "60%": fast, "lifted": free}
    note(reports, f"reload, {meanwhile.__name__}", figures)
    assert alive(pid)
    stop.touch()
    assert finish(machine, jobs)["cpu0"].state is State.DONE
    assert machine.runs(jobs["cpu0"]) == [pid]


@ADOPTING
@pytest.mark.own_kernel("limits need controllers")
def test_what_would_kill_the_job_waits_for_the_next(machine: Machine, meanwhile: Meanwhile) -> None:
    start(machine, {"name": "cpu0", "memory_max": "200M"})
    grow = machine.marks / "grow"
    line = f"{program(machine, 'growing.py', GROWING)} {grow}; echo gave $?"
    jobs = occupy(machine, line)
    wait_until(lambda: "has it" in log_of(machine, jobs["cpu0"]), WAIT_S, 0.2)
    meanwhile(machine)
    write_slots(machine, {"name": "cpu0", "memory_max": "32M", "pids_max": 60})
    # What harms nobody holds at once.
    wait_written(machine, "cpu0", {"job/pids.max": "60", "job/memory.max": str(200 * MIB)})
    wait_until(
        lambda: "so memory_max 32M applies from the next job on" in (machine.slot().reason or ""),
        WAIT_S / 3,
        0.2,
    )
    grow.touch()
    assert finish(machine, jobs)["cpu0"].state is State.DONE
    assert log_of(machine, jobs["cpu0"]) == "has it\nhas more\ngave 0\n"
    # Who has it learns that it is over; the next one comes to the same program with less.
    next_jobs = occupy(machine, line)
    assert machine.slot().reason is None
    (job,) = machine.wait_final(next_jobs.values())
    assert job.error_code == "E_OOM", job
    assert files_of(machine, "cpu0", {"job/memory.max": ""}) == {"job/memory.max": str(32 * MIB)}


def test_slots_come_and_go(machine: Machine) -> None:
    start(machine, {"name": "stays"}, {"name": "goes"})
    stop = machine.marks / "stop"
    jobs = occupy(machine, hold(stop))
    pids = [machine.running(job_id) for job_id in jobs.values()]
    write_slots(machine, {"name": "stays"}, {"name": "comes", "pids_max": 40})
    machine.submit(machine.script("new", "cat /proc/self/cgroup"))
    assert machine.wait_final(["new"])[0].state is State.DONE
    assert log_of(machine, "new").rstrip().endswith("/comes/job")
    assert machine.slot("goes").job_id == jobs["goes"]
    assert all(map(alive, pids))
    # The one that is to go takes no other job, though it is the only one that will be free.
    new = machine.marks / "new-stop"
    machine.submit(machine.script("holds", hold(new)))
    machine.running("holds")
    stop.touch()
    assert {job.state for job in finish(machine, jobs).values()} == {State.DONE}
    wait_until(lambda: len(machine.now().slots) == 2, WAIT_S, 0.2)
    wait_until(lambda: not machine.slot_group("goes").exists(), WAIT_S, 0.2)
    assert machine.slot("comes").job_id == "holds"
    new.touch()
    assert machine.wait_final(["holds"])[0].state is State.DONE
    assert [machine.runs(job_id) for job_id in jobs.values()] == [[pid] for pid in pids]


def test_a_slot_that_was_adopted_can_go(machine: Machine) -> None:
    start(machine, {"name": "stays"}, {"name": "goes"})
    stop = machine.marks / "stop"
    jobs = occupy(machine, hold(stop))
    restarted(machine)
    write_slots(machine, {"name": "stays"})
    stop.touch()
    assert {job.state for job in finish(machine, jobs).values()} == {State.DONE}
    wait_until(lambda: [row.slot.offer.name for row in machine.now().slots] == ["stays"], WAIT_S, 0.2)
    wait_until(lambda: not machine.slot_group("goes").exists(), WAIT_S, 0.2)


@pytest.mark.one_release("12", "files and messages; it has less to do than the other")
@pytest.mark.own_kernel("limits need controllers")
@ADOPTING
def test_a_file_that_is_wrong_changes_nothing(machine: Machine, meanwhile: Meanwhile) -> None:
    start(machine, {"name": "cpu0", **BEFORE})
    stop = machine.marks / "stop"
    jobs = occupy(machine, hold(stop))
    pid = machine.running(jobs["cpu0"])
    meanwhile(machine)
    had = files_of(machine, "cpu0", WRITTEN)
    main, slots = machine.main_pid(), [row.slot for row in machine.now().slots]
    row = {"name": "cpu0", "kind": "cpu", **AFTER}
    wrong = {
        "pids_maxx: unknown key; did you mean pids_max": {**row, "pids_maxx": 3},
        "there is no CPU 7": {**row, "cpus": "7"},
        "cannot find the disk of /proc": {**row, "io_max": {"/proc": {"wbps": "1M"}}},
    }
    for fault, each in wrong.items():
        failed, journal = reload_badly(yaml.safe_dump({"slots": [each]}))
        assert failed, journal
        assert f"{FILE}:" in journal
        assert fault in journal, journal
    assert files_of(machine, "cpu0", WRITTEN) == had
    assert (machine.main_pid(), [row.slot for row in machine.now().slots]) == (main, slots)
    write_slots(machine, row)
    wait_written(
        machine, "cpu0", {file: WRITTEN[file] for file in ("cpu.weight", "job/cpu.max", "job/pids.max")}
    )
    stop.touch()
    assert finish(machine, jobs)["cpu0"].state is State.DONE
    assert machine.runs(jobs["cpu0"]) == [pid]
