"""How jobs die, in every way and in any order: each must be reported with the code of its cause."""

import json
import random
import re
import shutil
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.vm.boxed import BoxedMachine
from tests.vm.conftest import Count
from tests.vm.disks import mounted
from tests.vm.machine import SLOTS, WAIT_S, Machine, run
from tools.lib.local_node import wait_until
from tools.mock.bootstrap.records import FINAL, Job

pytestmark = pytest.mark.one_release(
    "12", "codes are the node's own; the limits behind them are tried in both"
)

SEED = 20
SLOT_COUNT = 4
MEMORY_MAX = 96 << 20
LIMITS: dict[str, Any] = {
    "memory_max": MEMORY_MAX,
    "pids_max": 16,
    "rlimits": {"fsize": "4M"},
    # Longer than any of the others takes in an emulated machine.
    "max_runtime_s": 90,
}
OK = "OK"
FOR_EVER = "exec sleep 1000"
DEAF = 'trap "" TERM; while :; do sleep 1; done'
MUCH_MEMORY = """python3 -c 'x = b"x" * (1 << 28)'"""
FORKS = "exec python3 -c 'import os, time; [os.fork() or time.sleep(1000) for _ in range(100)]'"
LARGE_FILE = """exec python3 -c 'open("large", "wb").write(bytes(8 << 20))'"""

Act = Callable[[Machine, str], object]


class Death(NamedTuple):
    """A line for bash, the code that it must be reported with, and a pattern that the message must have.

    `act` is done to the job when it runs; `more` goes into its manifest.
    """

    code: str
    line: str
    says: str = ""
    act: Act | None = None
    more: dict[str, Any] = {}  # noqa: RUF012  # never changed


def kill_from_outside(machine: Machine, job_id: str) -> None:
    machine.kill(pid=machine.running(job_id))


def kill_worker(machine: Machine, job_id: str) -> None:
    slot = next(row.slot for row in machine.now().slots if row.slot.job_id == job_id)
    assert slot.worker_pid
    machine.kill(pid=slot.worker_pid)


def cancel_at_coordinator(machine: Machine, job_id: str) -> None:
    machine.mock.cancel(job_id)


def cancel_as_operator(machine: Machine, job_id: str) -> None:
    assert f"cancelling job {job_id}" in run("aitbc-minerctl", "cancel", job_id)


def causes(chance: random.Random) -> dict[str, Death]:
    """Give all causes; some have a part that chance decides."""
    status = chance.choice([number for number in range(1, 256) if number not in {137, 143}])
    by_term = {"timeout_s": 4}
    full = rf"peak (\d+) bytes.* limit {MEMORY_MAX} bytes"
    refused = r"failed, and the kernel refused the job a new process \d+ times; the limit is 16"
    too_large = r"reached the size limit of 4194304 bytes"
    operator, coordinator = "cancelled: by the operator", "cancelled: by the coordinator"
    return {
        "success": Death(OK, "echo done"),
        "success after all": Death(OK, "bash -c 'kill -9 $$'; bash -c 'exit 137'; echo done"),
        "own status": Death("E_EXIT", f"exit {status}", rf"\b{status}\b"),
        "own status 137": Death("E_EXIT", "exit 137", "137"),
        "own status 143": Death("E_EXIT", "exit 143", "143"),
        "status of a killed child": Death("E_EXIT", "sleep 99 & kill -9 $!; wait $!; exit $?", "137"),
        "own SIGSEGV": Death("E_SIGNAL", "kill -SEGV $$", "SIGSEGV"),
        "own SIGABRT": Death("E_SIGNAL", "kill -ABRT $$", "SIGABRT"),
        "own SIGTERM": Death("E_SIGNAL", "kill -TERM $$", "SIGTERM"),
        "own SIGKILL": Death("E_SIGNAL", "kill -KILL $$", "SIGKILL"),
        "SIGKILL by an outsider": Death("E_SIGNAL", FOR_EVER, "SIGKILL", kill_from_outside),
        "memory of the program": Death("E_OOM", f"exec {MUCH_MEMORY}", full),
        "memory of a child": Death("E_OOM", f"{MUCH_MEMORY}; exit 0", full),
        "processes": Death("E_PIDS", FORKS, refused),
        "time of the job": Death("E_TIMEOUT", FOR_EVER, "its time limit of 4 s was reached", more=by_term),
        "time of the job, deaf": Death("E_TIMEOUT", DEAF, "its time limit of 4 s was reached", more=by_term),
        "time of the slot": Death("E_TIMEOUT", FOR_EVER, "its time limit of 90 s was reached"),
        "cancel by the coordinator": Death("E_CANCELLED", FOR_EVER, coordinator, cancel_at_coordinator),
        "cancel by the operator": Death("E_CANCELLED", FOR_EVER, operator, cancel_as_operator),
        "cancel of a deaf one": Death("E_CANCELLED", DEAF, coordinator, cancel_at_coordinator),
        "file of the program": Death("E_OUTPUT", "exec head -c 8M /dev/zero > large", too_large),
        "file of a child": Death("E_OUTPUT", "head -c 8M /dev/zero > large; exit $?", too_large),
        "file, told by an error": Death("E_OUTPUT", LARGE_FILE, f"work/large of the job {too_large}"),
        "worker killed": Death("E_LOST", FOR_EVER, "the worker of slot cpu[0-3] .*SIGKILL", kill_worker),
    }


def campaign(count: int, seed: int) -> list[tuple[str, Death]]:
    """Choose `count` deaths, every cause at least once, in an order that follows from the seed."""
    chance = random.Random(seed)
    names = list(causes(chance))
    assert count >= len(names)
    names += chance.choices(names, k=count - len(names))
    chance.shuffle(names)
    return [(name, causes(chance)[name]) for name in names]


def verdict(job: Job) -> tuple[str, str]:
    """Give the code and the message that the coordinator has counted."""
    assert job.accepted is not None, job
    return job.error_code or OK, str(job.accepted.body.get("error_msg", ""))


def fault(machine: Machine, job_id: str, death: Death) -> str:
    """Say what is wrong with the report of a job that is over; empty when nothing is."""
    code, message = verdict(machine.mock.job(job_id))
    found = re.search(death.says, message)
    if code != death.code or not found:
        return f"{code} {message!r}, not {death.code} {death.says!r}"
    if code == "E_OOM" and not MEMORY_MAX * 0.9 < int(found[1]) <= MEMORY_MAX:
        return f"a peak of {found[1]} of {MEMORY_MAX}"
    runs = len(machine.runs(job_id))
    return "" if runs == 1 else f"was run {runs} times"


class Table:
    """What became of the deaths, for the report."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._codes: dict[str, Counter[str]] = defaultdict(Counter)
        self._faults: list[str] = []

    def note(self, cause: str, job_id: str, death: Death) -> None:
        """Add a job that is over."""
        self._codes[cause][verdict(self._machine.mock.job(job_id))[0]] += 1
        if wrong := fault(self._machine, job_id, death):
            self._faults.append(f"{cause} ({job_id}): {wrong}")

    def check(self, file: Path) -> None:
        """Write and print the table; none may be misclassified."""
        rows = {cause: dict(codes) for cause, codes in sorted(self._codes.items())}
        total = sum(sum(codes.values()) for codes in rows.values())
        told = {"deaths": total, "causes": rows, "misclassified": self._faults}
        file.write_text(json.dumps(told, indent=1))
        print(f"\n{total} deaths")
        for cause, codes in rows.items():
            print(f"{cause:28}{sum(codes.values()):4}  {', '.join(codes)}")
        assert self._faults == []


def start(machine: Machine, slots: int, **limits: Any) -> None:
    # Copies, or the YAML would have an alias in the place of what is there already.
    machine.slots([{"name": f"cpu{i}", "kind": "cpu", **deepcopy(limits)} for i in range(slots)])
    machine.start()


def finish(machine: Machine, deaths: dict[str, Death], timeout: float) -> None:
    """Do to each job what its death takes as soon as it runs; wait until all are over."""
    waiting = {job_id for job_id, death in deaths.items() if death.act}

    def over() -> bool:
        for job_id in [each for each in waiting if machine.runs(each)]:
            waiting.discard(job_id)
            act = deaths[job_id].act
            assert act is not None
            act(machine, job_id)
        return all(machine.mock.job(job_id).state in FINAL for job_id in deaths)

    wait_until(over, timeout, 0.3)


@pytest.mark.own_kernel("the kernel ends some for want of memory")
def test_every_death_is_told_from_the_others(boxed: BoxedMachine, reports: Path, count: Count) -> None:
    machine = boxed
    start(machine, SLOT_COUNT, **LIMITS)
    chosen = campaign(count(24, 200), SEED)
    deaths = {f"death-{number:03}": death for number, (_, death) in enumerate(chosen)}
    for job_id, death in deaths.items():
        machine.submit(machine.script(job_id, death.line, **death.more))
    finish(machine, deaths, WAIT_S + 30 * len(deaths))
    table = Table(machine)
    for (cause, death), job_id in zip(chosen, deaths, strict=True):
        table.note(cause, job_id, death)
    table.check(reports / "deaths.json")
    # The slots have come through all of it.
    after = [machine.submit(machine.script(f"after-{i}", "echo done")) for i in range(SLOT_COUNT)]
    assert {verdict(job)[0] for job in machine.wait_final(after)} == {OK}
    assert {row.slot.state for row in machine.wait_up().slots} == {"IDLE"}


def test_jobs_of_slots_that_stop_are_lost(machine: Machine, reports: Path, count: Count) -> None:
    lost = "the miner was told to stop at once"
    ways = {
        "stop of the slots": Death("E_LOST", FOR_EVER, lost),
        "stop, in a child": Death("E_LOST", "sleep 1000; exit 0", lost),
        "stop, deaf": Death("E_LOST", DEAF, lost),
        "stop, with status 143": Death("E_LOST", 'trap "exit 143" TERM; sleep 1000 & wait', lost),
    }
    start(machine, len(ways))
    table = Table(machine)
    for turn in range(count(1, 5)):
        jobs = {f"stopped-{turn}-{number}": way for number, way in enumerate(ways.items())}
        for job_id, (_, death) in jobs.items():
            machine.submit(machine.script(job_id, death.line))
        pids = [machine.running(job_id) for job_id in jobs]
        machine.stop(SLOTS)
        assert not [pid for pid in pids if Path("/proc", str(pid)).exists()]
        # Nobody was there any more to report them.
        assert not [job_id for job_id in jobs if machine.mock.job(job_id).state in FINAL]
        machine.start()
        machine.wait_final(jobs)
        for job_id, (cause, death) in jobs.items():
            table.note(cause, job_id, death)
    table.check(reports / "deaths-stop.json")


FULL = {
    "disk": Death("E_DISK", "head -c 64M /dev/zero > large", "disk of the workspace is full: .* bytes free"),
    "disk, told by an error": Death(
        "E_DISK", LARGE_FILE.replace("8 <<", "64 <<"), "disk of the workspace is full: .* bytes free"
    ),
    "files of the disk": Death(
        "E_DISK", "for i in {1..9999}; do : > $i || exit 3; done", "disk of the workspace can hold no more"
    ),
    "disk, filled by its output": Death(
        "E_DISK", "head -c 64M /dev/zero > large; cat /dev/zero", "ended: the disk of the workspace is full"
    ),
    "own status, disk half full": Death("E_EXIT", "head -c 8M /dev/zero > large; exit 9", r"\b9\b"),
}


@pytest.mark.own_kernel("needs a disk")
def test_a_full_disk_is_no_fault_of_the_job(machine: Machine, reports: Path, count: Count) -> None:
    shutil.rmtree(machine.jobs, ignore_errors=True)
    table = Table(machine)
    with mounted(machine, machine.jobs, "-N", "512", size="24M"):
        start(machine, 1)
        for turn in range(count(1, 5)):
            for number, (cause, death) in enumerate(FULL.items()):
                job_id = f"full-{turn}-{number}"
                machine.submit(machine.script(job_id, death.line))
                machine.running(job_id)
                wait_until(lambda job_id=job_id: has_ended(machine, job_id), WAIT_S, 0.2)
                # As the operator does: without any room nobody can write down that there is none.
                make_room((machine.jobs / job_id / "work").iterdir())
                machine.wait_final([job_id])
                table.note(cause, job_id, death)
        table.check(reports / "deaths-disk.json")


def has_ended(machine: Machine, job_id: str) -> bool:
    """Whether the worker has seen how it went with the job, and writes it down or has done so."""
    slot = machine.slot()
    return slot.job_id != job_id or slot.job_state == "COLLECTING"


def make_room(files: Iterable[Path]) -> None:
    for file in files:
        file.unlink()
