"""Each limit of slots.d bites: what a job gets with it, beside the same program without it."""

import contextlib
import json
import re
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from aitbc_miner.cgroup.group import Group
from aitbc_miner.sandbox.users import job_user
from tests.vm.conftest import Count
from tests.vm.disks import DISK
from tests.vm.machine import STATE, WAIT_S, Machine, alive, run, wait_gone
from tests.vm.measuring import (
    MIB,
    WINDOW_S,
    cpu_shares,
    finish,
    job_group,
    let_pass,
    log_of,
    note,
    occupy,
    program,
    shares_under,
    spin,
    start,
)
from tools.lib.local_node import wait_until
from tools.mock.bootstrap.records import State

pytestmark = pytest.mark.own_kernel("limits need controllers")

# The newer kernel has another scheduler and reclaim: weights, memory.high and OOM are tried in both.
SAME = "both kernels do the same with what the node writes"
in_12, in_13 = (pytest.mark.one_release(release, SAME) for release in ("12", "13"))

# Touches that many MiB one after the other, says so, and waits for a file.
HOG = """\
import pathlib, sys, time
kept = [b"x" * (1 << 20) for _ in range(int(sys.argv[1]))]
print("has it", flush=True)
while len(sys.argv) > 2 and not pathlib.Path(sys.argv[2]).exists():
    time.sleep(0.2)
"""
# A thousand attempts and no more, whatever becomes of them.
BOMB = """\
import os, sys
refused = 0
for _ in range(1000):
    try:
        os.posix_spawn("/usr/bin/sleep", ["sleep", "3600"], {})
    except BlockingIOError:
        refused += 1
print("started", 1000 - refused, "refused", refused, flush=True)
sys.exit(refused > 0)
"""

# --- CPUs --------------------------------------------------------------------------------------------------


@in_12
def test_a_quota_of_cpu_time(machine: Machine, reports: Path) -> None:
    start(
        machine,
        {"name": "half", "cpus": "0", "cpu_max": "50%"},
        {"name": "quarter", "cpus": "0", "cpu_max": "25%"},
        {"name": "free", "cpus": "1"},
    )
    stop = machine.marks / "stop"
    jobs = occupy(machine, spin(stop))
    got = shares_under(machine, {"half": 0.5, "quarter": 0.25, "free": 1.0})
    stop.touch()
    note(reports, "cpu_max", got)
    assert {job.state for job in finish(machine, jobs).values()} == {State.DONE}


def test_a_weight_where_cpu_time_is_contended(machine: Machine, reports: Path) -> None:
    start(
        machine,
        {"name": "heavy", "cpus": "1", "cpu_weight": 300},
        {"name": "light", "cpus": "1", "cpu_weight": 100},
    )
    occupy(machine, spin(machine.marks / "stop"))
    got = cpu_shares(machine, "heavy", "light")
    note(reports, "cpu_weight 300:100", {**got, "ratio": round(got["heavy"] / got["light"], 3)})
    assert got["heavy"] / got["light"] == pytest.approx(3, rel=0.25)


def seen_on(group: Group) -> tuple[set[str], set[str]]:
    """Give which CPUs the processes of a group may use, and which each is on at this moment."""
    allowed, on = set(), set()
    for pid in group.pids():
        with contextlib.suppress(ProcessLookupError, FileNotFoundError):
            status = Path(f"/proc/{pid}/status").read_text()
            allowed.add(re.findall(r"^Cpus_allowed_list:\s*(\S+)$", status, re.M)[0])
            on.add(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[36])
    return allowed, on


@in_13
@pytest.mark.parametrize("cpus", [("0", "1"), ("auto", "auto")], ids=["named", "auto"])
def test_cpus_of_its_own(machine: Machine, reports: Path, cpus: tuple[str, str]) -> None:
    rows = [{"name": f"cpu{number}", "cpus": each} for number, each in enumerate(cpus)]
    start(machine, *rows, *([{"name": "free"}] if "auto" not in cpus else []))
    stop = machine.marks / "stop"
    burn = spin(stop)
    tried = "for c in 0 1 0-1; do taskset -pc $c $$ >/dev/null 2>&1; echo $c gave $?, $(taskset -pc $$); done"
    jobs = occupy(machine, f"{tried}; {burn} & {burn} & {burn}; wait")
    seen: dict[str, tuple[set[str], set[str]]] = {name: (set(), set()) for name in jobs}

    def look() -> None:
        for name in jobs:
            for known, new in zip(seen[name], seen_on(job_group(machine, name)), strict=True):
                known.update(new)

    wait_until(lambda: all(len(job_group(machine, name).pids()) == 3 for name in jobs), WAIT_S, 0.2)
    let_pass(WINDOW_S / 2, look)
    own = {name: machine.slot(name).cpus for name in jobs}
    stop.touch()
    assert {job.state for job in finish(machine, jobs).values()} == {State.DONE}
    note(
        reports,
        f"cpus {cpus[0]}",
        {name: [sorted(allowed), sorted(on)] for name, (allowed, on) in seen.items()},
    )
    assert {own["cpu0"], own["cpu1"]} == {"0", "1"}
    for name in ("cpu0", "cpu1"):
        mine = own[name] or ""
        assert seen[name] == ({mine}, {mine})
        lines = log_of(machine, jobs[name]).splitlines()
        assert [line.split(", ")[1].rpartition(": ")[2] for line in lines] == [mine] * 3
        assert f"{1 - int(mine)} gave 1" in " ".join(lines)
    if "free" in seen:
        # What the limits have taken away: it may use both, and may choose.
        assert "0 gave 0" in (freely := log_of(machine, jobs["free"]))
        assert "1 gave 0" in freely
        assert seen["free"][0] == {"0-1"}


# --- memory ------------------------------------------------------------------------------------------------


def test_out_of_memory_ends_the_job_and_not_its_worker(machine: Machine, reports: Path) -> None:
    start(machine, {"name": "small", "memory_max": "64M"}, {"name": "free"})
    hog = program(machine, "hog.py", HOG)
    workers = machine.workers()
    child = machine.marks / "child"
    jobs = occupy(machine, f"{hog} 160 & echo $! >{child}-$$; wait $!; echo child gave $?; sleep 3600")
    # The one without the limit is left waiting by a child that has had all it wanted.
    wait_until(lambda: "child gave 0" in log_of(machine, jobs["free"]), WAIT_S, 0.2)
    (job,) = machine.wait_final([jobs["small"]])
    pid = machine.running(jobs["small"])
    wait_gone([pid, int(Path(f"{child}-{pid}").read_text())])
    assert job.error_code == "E_OOM", job
    assert job.accepted
    said = job.accepted.body["error_msg"]
    found = re.search(r"peak (\d+) bytes .* limit (\d+) bytes", said)
    assert found, said
    note(reports, "memory_max 64M", {"said": said})
    assert int(found[2]) == 64 * MIB
    assert 60 * MIB < int(found[1]) <= 64 * MIB
    assert "child gave" not in log_of(machine, jobs["small"])
    machine.submit(machine.script("next", "echo fine"))
    assert machine.wait_final(["next"])[0].state is State.DONE
    assert json.loads((machine.jobs / "next" / "outcome.json").read_text())["slot"] == "small"
    assert machine.workers() == workers


def test_above_memory_high_a_job_is_slowed(machine: Machine, reports: Path) -> None:
    high = 48 * MIB
    start(machine, {"name": "slow", "memory_high": "48M"}, {"name": "free"})
    hog = program(machine, "hog.py", HOG)
    jobs = occupy(machine, f"{hog} 120")
    group = job_group(machine, "slow")
    assert finish(machine, {"free": jobs["free"]})["free"].state is State.DONE
    wait_until(lambda: group.events("memory.events")["high"] > 0, WAIT_S, 0.2)
    used: list[int] = []
    let_pass(WINDOW_S, lambda: used.append(group.memory_current() or 0))
    events = group.events("memory.events")
    note(
        reports, "memory_high 48M", {"max_mib": max(used) / MIB, "last_mib": used[-1] / MIB, "events": events}
    )
    assert 0.9 * high < used[-1] <= max(used) < 1.3 * high
    assert events["oom_kill"] == 0
    assert alive(machine.running(jobs["slow"]))
    run("aitbc-minerctl", "cancel", jobs["slow"])
    assert machine.wait_final([jobs["slow"]])[0].error_code == "E_CANCELLED"


@in_13
def test_what_can_be_written_back_fits_below_memory_high(machine: Machine, reports: Path) -> None:
    start(machine, {"name": "slow", "memory_high": "48M"}, {"name": "free"})
    jobs = occupy(machine, "dd if=/dev/zero of=big bs=1M count=120 && rm big")
    assert {job.state for job in finish(machine, jobs).values()} == {State.DONE}
    peaks = {name: job_group(machine, name).memory_peak() or 0 for name in jobs}
    note(reports, "memory_high 48M, page cache", {name: peak / MIB for name, peak in peaks.items()})
    assert peaks["slow"] < 1.3 * 48 * MIB
    assert peaks["free"] > 120 * MIB


@pytest.fixture
def swap() -> Iterator[None]:
    """Have the scratch disk as swap."""
    run("mkswap", "-f", DISK)
    run("swapon", DISK)
    yield
    run("swapoff", DISK)
    run("wipefs", "-a", DISK)


@in_12
def test_swap_is_limited(swap: None, machine: Machine, reports: Path) -> None:
    start(
        machine,
        {"name": "none", "memory_max": "64M", "swap_max": 0},
        {"name": "some", "memory_max": "64M", "swap_max": "16M"},
        {"name": "free", "memory_max": "64M"},
    )
    stop = machine.marks / "stop"
    jobs = occupy(machine, f"{program(machine, 'hog.py', HOG)} 110 {stop}")
    most = dict.fromkeys(jobs, 0)

    def look() -> bool:
        for name in jobs:
            text = (job_group(machine, name).path / "memory.swap.current").read_text()
            most[name] = max(most[name], int(text))
        over = {name for name in jobs if machine.mock.job(jobs[name]).state is State.FAILED}
        return over == {"none", "some"} and "has it" in log_of(machine, jobs["free"])

    wait_until(look, WAIT_S, 0.05)
    stop.touch()
    codes = {name: job.error_code for name, job in finish(machine, jobs).items()}
    note(reports, "swap_max", {"MiB": {name: value / MIB for name, value in most.items()}, "codes": codes})
    assert codes == {"none": "E_OOM", "some": "E_OOM", "free": None}
    assert most["none"] == 0
    assert 0 < most["some"] <= 16 * MIB
    assert most["free"] > 32 * MIB


# --- processes ---------------------------------------------------------------------------------------------


@in_12
def test_a_fork_bomb_is_stopped_and_the_node_answers(machine: Machine, reports: Path) -> None:
    start(machine, {"name": "few", "pids_max": 32}, {"name": "free"})
    jobs = occupy(machine, program(machine, "bomb.py", BOMB))
    latencies: list[float] = []

    def final() -> bool:
        asked = time.monotonic()
        machine.now()
        latencies.append(time.monotonic() - asked)
        return all(machine.mock.job(each).state in {State.DONE, State.FAILED} for each in jobs.values())

    wait_until(final, WAIT_S, 0.05)
    done = finish(machine, jobs)
    started = {name: int(log_of(machine, jobs[name]).split()[1]) for name in jobs}
    figures = {"asked": len(latencies), "worst": max(latencies), "median": statistics.median(latencies)}
    note(reports, "pids_max 32", {"started": started, "status_latency_s": figures})
    assert started["free"] == 1000
    assert 25 <= started["few"] <= 31
    assert done["few"].error_code == "E_PIDS", done["few"]
    assert done["free"].state is State.DONE
    # The watchdog's patience is what it may never take.
    assert max(latencies) < 15
    users = {job_user(name) for name in jobs}
    wait_until(lambda: all(slot.slot.free for slot in machine.now().slots), WAIT_S, 0.2)
    assert [each for each in psutil.process_iter(["username"]) if each.info["username"] in users] == []
    assert job_group(machine, "few").pids() == job_group(machine, "free").pids() == []


# --- what each process carries -----------------------------------------------------------------------------


@in_13
def test_priorities_and_rlimits_as_the_job_sees_them(machine: Machine) -> None:
    rlimits = {
        "nofile": 77,
        "fsize": "20M",
        "core": 0,
        "nproc": 50,
        "stack": "4M",
        "memlock": "64K",
        "cpu": 600,
    }
    start(
        machine,
        {"name": "own", "nice": 7, "ionice": {"class": "best-effort", "level": 6}, "rlimits": rlimits},
        {"name": "idle", "nice": 19, "ionice": {"class": "idle"}, "rlimits": {"core": "1M"}},
        {"name": "plain"},
    )
    show = "nice; ionice -p $$; cat /proc/self/limits; cat /proc/self/oom_score_adj"
    tries = (
        "echo 499 2>/dev/null >/proc/self/oom_score_adj; cat /proc/self/oom_score_adj; "
        "ulimit -n 100 || echo nofile kept; renice -n 0 $$ || echo nice kept; ionice -c 1 || echo ionice kept"
    )
    jobs = occupy(machine, f"{show}; {{ {tries}; }} 2>/dev/null")
    assert {job.state for job in finish(machine, jobs).values()} == {State.DONE}
    logs = {name: log_of(machine, jobs[name]) for name in jobs}
    limits = dict(re.findall(r"^(Max [a-z -]+?) {2,}(\d+ +\d+|unlimited)", logs["own"], re.M))
    hard_and_soft = {
        "Max open files": 77, "Max file size": 20 * MIB, "Max core file size": 0, "Max processes": 50,
        "Max stack size": 4 * MIB, "Max locked memory": 64 << 10, "Max cpu time": 600,
    }  # fmt: skip
    for name, value in hard_and_soft.items():
        assert limits[name].split() == [str(value)] * 2, logs["own"]
    assert logs["own"].startswith("7\nbest-effort: prio 6\n")
    assert logs["idle"].startswith("19\nidle\n")
    assert logs["plain"].startswith("10\n")
    assert re.search(r"Max core file size +1048576 +1048576", logs["idle"])
    assert re.search(r"Max core file size +0 +0", logs["plain"])
    assert not re.search(r"Max open files +77 ", logs["plain"])
    for text in logs.values():
        assert re.findall(r"^5\d\d$|^499$", text, re.M) == ["500", "500"], text
        assert "nice kept\nionice kept" in text
    assert "nofile kept" in logs["own"]
    scores = [*machine.workers().values(), machine.main_pid()]
    assert {Path(f"/proc/{pid}/oom_score_adj").read_text() for pid in scores} == {"-900\n"}


# --- where it is -------------------------------------------------------------------------------------------


@in_12
def test_a_job_is_born_in_its_group(machine: Machine, count: Count) -> None:
    start(
        machine,
        {
            "name": "all", "cpus": "0", "cpu_max": "90%", "memory_max": "256M", "pids_max": 64,
            "io_max": {str(STATE): {"wbps": "500M"}},
        },
        {"name": "free"},
    )  # fmt: skip
    # A builtin of the shell, so that it is the program itself that reads, before it does anything else.
    line = "read -r own </proc/self/cgroup; echo $own"
    ids = [
        machine.submit({"job_id": f"born-{n}", "runner": "cli", "command": "bash", "args": ["-c", line]})
        for n in range(count(12, 200))
    ]
    assert {job.state for job in machine.wait_final(ids, WAIT_S * 4)} == {State.DONE}
    base = f"0::/{machine.slot_group('x').parent.relative_to('/sys/fs/cgroup')}"
    where = {log_of(machine, job_id) for job_id in ids}
    assert where == {f"{base}/all/job\n", f"{base}/free/job\n"}
    for name, pid in machine.workers().items():
        assert Path(f"/proc/{pid}/cgroup").read_text() == f"{base}/{name}/worker\n"
    limits = ("cpu", "cpuset", "io", "memory", "pids")
    assert machine.slot("all").enforced == dict.fromkeys(limits, "cgroup")
    assert machine.slot("free").enforced == {}
    shown = run("aitbc-minerctl", "slots")
    assert re.search(r"cgroup", shown), shown
