"""A machine that loses its power with jobs in every step: `tools/vm test tests/vm/powercut.py [--full]`.

Not collected with the others: after each cut the laboratory boots the machine again with the same disk, and
runs the command again. What the test must know by then is below KEPT, flushed.
"""

import json
import os
import random
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from aitbc_miner.agent.recovery import STARTED
from aitbc_miner.jobs import BROKEN, StateRecord
from aitbc_miner.store.records import RecordError, Records
from aitbc_miner.util import fs
from tests.vm.conftest import Count
from tests.vm.kept_ledger import KeptLedger
from tests.vm.machine import MAIN, STATE, WAIT_S, Machine, run
from tools.lib.local_node import wait_until
from tools.mock.bootstrap import coordinator as mock_coordinator
from tools.mock.bootstrap.coordinator import MockCoordinator
from tools.mock.bootstrap.records import FINAL, Job, Rules, State, Verdict

KEPT = Path("/var/lib/aitbc/powercut")
# One file for each job, with a line for each run.
RUNS = KEPT / "runs"
BOOT = int(os.environ["AITBC_VM_BOOT"])
POWER = Path("/dev/virtio-ports/power")
SEED = 1
PORT = 18_080
SLOT_COUNT = 3
JOBS_PER_BOOT = 8
# About as long as a node takes to start, here, or the jobs of one boot to end.
LONGEST_S = 10.0
# A lease must outlast a boot; one of a job that got lost on its way must run out before we do.
LEASE_S = 120.0


@pytest.fixture
def coordinator(monkeypatch: pytest.MonkeyPatch) -> Iterator[MockCoordinator]:
    """Give a coordinator that forgets nothing in a power cut, always in the same place."""
    RUNS.mkdir(parents=True, exist_ok=True)
    RUNS.chmod(0o777)

    def ledger(rules: Rules) -> KeptLedger:
        return KeptLedger(rules, KEPT / "ledger")

    monkeypatch.setattr(mock_coordinator, "Ledger", ledger)
    with MockCoordinator(PORT, lease_s=LEASE_S, out_dir=KEPT / f"taken-{BOOT}") as mock:
        yield mock


@pytest.fixture
def machine(installed: None, coordinator: MockCoordinator) -> Iterator[Machine]:
    """Give the machine with a node that is not started yet; it is configured once only, at the first boot."""
    shutil.rmtree("/var/lib/aitbc/marks", ignore_errors=True)
    machine = Machine(coordinator)
    if BOOT == 1:
        machine.configure()
        machine.slots(SLOT_COUNT)
        run("sync")
    yield machine
    machine.clean_up()
    assert machine.remains() == []


# --- one boot ----------------------------------------------------------------------------------------------


def manifest(job_id: str, seconds: float) -> dict[str, Any]:
    """Make a job that writes down, durably, that it runs, before it does anything else."""
    mark = RUNS / job_id
    line = f"echo run >> {mark}; sync {mark} {RUNS}; sleep {seconds:.2f}; echo done"
    return {"job_id": job_id, "runner": "cli", "command": "bash", "args": ["-c", line], "timeout_s": 300}


def note(name: str, value: object) -> None:
    """Keep a value over all boots to come."""
    with fs.directory(KEPT) as directory:
        fs.write_durably(directory, name, json.dumps(value, indent=1).encode())


def noted(pattern: str) -> list[dict[str, Any]]:
    """Give what was kept of each boot."""
    files = sorted(KEPT.glob(pattern), key=lambda file: int(file.stem.partition("-")[2]))
    return [json.loads(file.read_text()) for file in files]


def look_around(ledger: dict[str, Job]) -> None:
    """Note what the last cut has left, before the node gets to see it; every record must be whole."""
    records = Records(STATE / "jobs")
    steps: dict[str, str] = {}
    unreadable: dict[str, str] = {}
    if records.root.exists():
        for job_id in records.ids():
            record = records.state_of(job_id)
            if isinstance(record, StateRecord):
                steps[job_id] = record.state.value
            else:
                unreadable[job_id] = str(record)
    told = {
        "steps": steps,
        "unreadable": unreadable,
        "bad_outcomes": [job_id for job_id in steps if not readable(records, job_id)],
        "half_written": [path.name for path in records.root.rglob("*") if is_half_written(path)],
        # What the coordinator was told that we have, and of which it was not told yet how it ended.
        "missing": [each.job_id for each in ledger.values() if each.acks and each.job_id not in steps],
        "never_arrived": [
            each.job_id for each in ledger.values() if each.state is State.LEASED and each.job_id not in steps
        ],
        "unflushed_lost": not content(KEPT / f"unflushed-{BOOT - 1}"),
    }
    note(f"boot-{BOOT}.json", told)
    assert not told["missing"], told
    assert not told["unreadable"], told
    assert not told["bad_outcomes"], told


def readable(records: Records, job_id: str) -> bool:
    """Whether the manifest and the outcome, if there is one, can be read."""
    try:
        with records.open(job_id) as job:
            job.manifest()
            job.outcome()
    except RecordError:
        return False
    return True


def is_half_written(path: Path) -> bool:
    """Whether this is what a record is called before it is whole."""
    return path.name.startswith("+new-") or (path.name.startswith(".") and path.name.endswith(".new"))


def content(file: Path) -> bytes:
    return file.read_bytes() if file.exists() else b""


def submit_more(machine: Machine, chance: random.Random) -> list[str]:
    """Queue jobs of all lengths, each with an id of its own."""
    lengths = [chance.choice((0.1, 0.3, 1.0, 2.0, 5.0)) for _ in range(JOBS_PER_BOOT)]
    return [machine.submit(manifest(f"job-{BOOT:02}-{i}", length)) for i, length in enumerate(lengths)]


def lose_power(chance: random.Random) -> None:
    """Have the power cut within LONGEST_S, and wait for that."""
    milliseconds = round(chance.uniform(0, LONGEST_S) * 1000)
    # To see that a cut does lose what was not flushed.
    (KEPT / f"unflushed-{BOOT}").write_bytes(b"x" * 10_000)
    POWER.write_text(f"{milliseconds}\n")
    print(f"\nboot {BOOT}: the power goes in {milliseconds} ms", flush=True)
    wait_until(lambda: False, WAIT_S)


def test_nothing_is_lost_or_run_twice_when_the_power_goes(
    machine: Machine, reports: Path, count: Count
) -> None:
    cuts = count(3, 20)
    chance = random.Random(f"{SEED}/{BOOT}")
    if BOOT > 1:
        look_around(machine.mock.ledger.jobs())
    if cuts >= BOOT:
        jobs = submit_more(machine, chance)
        run("systemctl", "start", "--no-block", MAIN)
        # Every third cut comes while the node starts and recovers, or soon after.
        if BOOT % 3:
            machine.wait_up()
            machine.mock.wait(lambda ledger: any(ledger.job(each).acks for each in jobs), WAIT_S)
        lose_power(chance)
    machine.start()
    every = [machine.mock.job(job_id) for job_id in machine.mock.ledger.jobs()]
    assert len(every) == cuts * JOBS_PER_BOOT
    machine.wait_final([job.job_id for job in every])
    table = figures(machine)
    (reports / "powercut.json").write_text(json.dumps(table, indent=1))
    print("\n" + json.dumps(table, indent=1))
    check(machine)
    assert table["cuts"] == cuts
    assert table["broken"] <= cuts
    assert table["cuts_that_lost_what_was_not_flushed"] > 0
    assert table["jobs_that_a_cut_found_started"] > 0


# --- all boots ---------------------------------------------------------------------------------------------


def runs(job_id: str) -> int:
    """Give how often a job was run."""
    return len(content(RUNS / job_id).splitlines())


def verdict(job: Job) -> str:
    """Give the code that the coordinator has counted."""
    assert job.accepted is not None, job
    return job.error_code or "OK"


def found_started() -> set[str]:
    """Name the jobs that a cut has found in a slot, where nobody can say how far their program got."""
    steps = ((job_id, step) for boot in noted("boot-*.json") for job_id, step in boot["steps"].items())
    return {job_id for job_id, step in steps if step in STARTED}


def figures(machine: Machine) -> dict[str, Any]:
    """Give what came of it, for the report."""
    jobs = list(machine.mock.ledger.jobs().values())
    boots = noted("boot-*.json")
    broken = STATE / "jobs" / BROKEN
    repeated = [report for job in jobs for report in job.reports if report.verdict is Verdict.DUPLICATE]
    return {
        "seed": SEED,
        "cuts": len(boots),
        "jobs": len(jobs),
        "codes": Counter(map(verdict, jobs)),
        "runs_of_a_job": Counter(runs(job.job_id) for job in jobs),
        "reports_that_came_again": len(repeated),
        "handed_out_again": sum(len(job.handed) - 1 for job in jobs),
        "found_by_a_cut": Counter(
            step for boot in boots for step in boot["steps"].values() if step not in {"DONE", "FAILED"}
        ),
        "handed_out_and_never_arrived": len({job_id for boot in boots for job_id in boot["never_arrived"]}),
        "jobs_that_a_cut_found_started": len(found_started()),
        "half_written": sum(len(boot["half_written"]) for boot in boots),
        "unreadable": [boot["unreadable"] for boot in boots if boot["unreadable"]],
        "broken": len(list(broken.iterdir())) if broken.exists() else 0,
        "cuts_that_lost_what_was_not_flushed": sum(boot["unflushed_lost"] for boot in boots),
    }


def check(machine: Machine) -> None:
    """Assert of every job that it ended once, and was run as often as its report says."""
    started = found_started()
    for job in machine.mock.ledger.jobs().values():
        verdicts = [report.verdict for report in job.reports]
        assert verdicts.count(Verdict.ACCEPTED) == 1, job
        assert set(verdicts) <= {Verdict.ACCEPTED, Verdict.DUPLICATE}, job
        assert len({report.key for report in job.reports}) == 1, job
        if verdict(job) == "OK":
            assert runs(job.job_id) == 1, job
        else:
            # Only what was in a slot when the power went may be given up.
            assert verdict(job) == "E_LOST", job
            assert job.job_id in started, job
            assert runs(job.job_id) <= 1, job
    assert machine.mock.ledger.strays() == []
    assert {job.state for job in machine.mock.ledger.jobs().values()} <= FINAL
