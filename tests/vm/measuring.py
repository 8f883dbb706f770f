"""Jobs to measure: the same program in every slot at the same time, and what each gets of the machine."""

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from aitbc_miner.cgroup.group import Group
from tests.vm.machine import WAIT_S, Machine, hold
from tools.lib.local_node import wait_until
from tools.mock.bootstrap.records import Job

MIB = 1 << 20
WINDOW_S = 10.0
SHORT_WINDOW_S, WINDOWS = 5.0, 12


def note(reports: Path, what: str, figures: Mapping[str, Any]) -> None:
    """Print what was measured, and add it to a file that outlives the machine."""
    print(f"\n{what}: {json.dumps(figures)}")
    path = reports / "limits.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**known, what: figures}, indent=1))


def write_slots(machine: Machine, *rows: dict[str, Any]) -> None:
    """Write slots.d; a node that runs takes it up."""
    machine.slots([{"kind": "cpu", **row} for row in rows])


def start(machine: Machine, *rows: dict[str, Any]) -> None:
    """Start a node that leaves the processors to the jobs that are measured."""
    machine.configure(coordinator={"poll_interval_s": 3}, heartbeat={"interval_s": 30})
    write_slots(machine, *rows)
    machine.start()


def occupy(machine: Machine, then: str) -> dict[str, str]:
    """Give every slot a job that does `then`, all at once, and give their ids by slot."""
    go = machine.marks / f"go-{time.monotonic_ns()}"
    ids = [f"{go.name}-{number}" for number, _ in enumerate(machine.now().slots)]
    for job_id in ids:
        machine.submit(machine.script(job_id, f"{hold(go)}; {then}"))
    for job_id in ids:
        machine.running(job_id)
    go.touch()
    return {json.loads((machine.jobs / each / "state.json").read_text())["slot"]: each for each in ids}


def finish(machine: Machine, jobs: Mapping[str, str]) -> dict[str, Job]:
    """Wait for the jobs of `occupy`."""
    return dict(zip(jobs, machine.wait_final(jobs.values()), strict=True))


def log_of(machine: Machine, job_id: str) -> str:
    return (machine.jobs / job_id / "logs" / "exec.log").read_text()


def job_group(machine: Machine, name: str) -> Group:
    return Group(machine.slot_group(name) / "job")


def cpu_shares(machine: Machine, *names: str, seconds: float = WINDOW_S) -> dict[str, float]:
    """Measure how much of one CPU the job of each slot gets."""
    groups = {name: job_group(machine, name) for name in names}

    def used(name: str) -> tuple[float, float]:
        usage = groups[name].cpu_usage()
        assert usage is not None
        return time.monotonic(), usage.total_s

    before = {name: used(name) for name in names}
    let_pass(seconds)
    after = {name: used(name) for name in names}
    return {
        name: round((after[name][1] - before[name][1]) / (after[name][0] - before[name][0]), 4)
        for name in names
    }


def shares_under(machine: Machine, limits: Mapping[str, float]) -> dict[str, list[float]]:
    """Measure until each slot has once come within 10 % of its limit; no window may show more than that.

    One window may show less: a quota that falls due while the host does not run the machine is lost.
    """
    seen: dict[str, list[float]] = {name: [] for name in limits}
    for _ in range(WINDOWS):
        for name, share in cpu_shares(machine, *limits, seconds=SHORT_WINDOW_S).items():
            seen[name].append(share)
        if all(max(seen[name]) >= 0.9 * limit for name, limit in limits.items()):
            break
    for name, limit in limits.items():
        assert 0.9 * limit <= max(seen[name]) <= 1.1 * limit, seen
    return seen


def let_pass(seconds: float, meanwhile: Callable[[], object] = lambda: None) -> None:
    end = time.monotonic() + seconds
    wait_until(lambda: (meanwhile(), time.monotonic() > end)[1], WAIT_S, 0.2)


def spin(until: Path) -> str:
    return f"until [ -e {until} ]; do :; done"


def program(machine: Machine, name: str, text: str) -> str:
    """Write a program where jobs can read it and give the command that runs it."""
    path = machine.marks / name
    path.write_text(text)
    return f"/usr/bin/python3 {path}"
