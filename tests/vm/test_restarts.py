"""The miner restarted, killed, stopped and replaced under running jobs: none ends, none runs twice."""

import json
import signal
import statistics
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from aitbc_miner.util.clock import now
from tests.vm.conftest import Count
from tests.vm.machine import (
    CGROUP,
    CURRENT,
    MAIN,
    RUN,
    SLOTS,
    WAIT_S,
    Machine,
    alive,
    hold,
    install,
    run,
    wait_gone,
)
from tests.vm.witness import (
    Running,
    assert_once,
    expected_log,
    heartbeats,
    longest_gap,
    outcome,
    sha256,
    uploaded_log,
    wait_heartbeat,
    writer,
)
from tools.lib.local_node import wait_until
from tools.mock.bootstrap.records import State

pytestmark = pytest.mark.one_release(
    "12", "what is adopted is told by pipes and files; the units are tried in both"
)

JOBS = [f"long-{i}" for i in range(4)]
TASKS = Path("/usr/local/lib/aitbc/miner/tasks")
# Modules that nothing has imported before: one of Python, one of the node's own environment.
LATE_TASK = """\
import os, sys, time
from pathlib import Path


def run(marks: str) -> str:
    Path(marks, f"late+{os.getpid()}").touch()
    assert "colorsys" not in sys.modules and "yaml" not in sys.modules
    while not Path(marks, "release").exists():
        time.sleep(0.2)
    import colorsys
    import yaml

    return f"{colorsys.rgb_to_hsv(0, 0, 1)[0]:.3f} {yaml.safe_load('[7]')[0]}"
"""


def started(machine: Machine, jobs: list[str], then: str) -> Running:
    """Start the node with a slot for each job, and have all of them run."""
    machine.slots(len(jobs))
    machine.start()
    for job_id in jobs:
        machine.submit(machine.script(job_id, then))
    running = Running(machine, jobs)
    wait_heartbeat(machine.mock)
    return running


def helpers(machine: Machine) -> dict[str, int]:
    """Give the pids of agent and heartbeat; the latter alone serves /metrics."""
    workers = set(machine.workers().values())
    others = [child for child in psutil.Process(machine.main_pid()).children() if child.pid not in workers]
    try:
        listens = {
            child.pid: any(each.status == psutil.CONN_LISTEN for each in child.net_connections("inet"))
            for child in others
        }
    except psutil.NoSuchProcess:
        return {}  # a child that had one thing to do, and is done
    if sorted(listens.values()) != [False, True]:
        return {}
    return {"heartbeat" if each else "agent": pid for pid, each in listens.items()}


def kill_supervisor(machine: Machine) -> None:
    machine.wait_new_main(machine.kill(signal.SIGKILL))


# --- restarts ----------------------------------------------------------------------------------------------


def test_restarts_lose_no_byte_of_four_jobs(
    machine: Machine, release: Path, count: Count, reports: Path
) -> None:
    running = started(machine, JOBS, writer(release))
    restarts, mains, begin = count(3, 30), [machine.main_pid()], now()
    steps, gaps = [], []
    for i in range(restarts):
        how, act = ("SIGKILL", kill_supervisor) if i % 6 == 2 else ("restart", Machine.restart)
        at = now()
        act(machine)
        answered = now()
        running.wait_adopted()
        taken_up = now()
        wait_heartbeat(machine.mock)
        gaps.append(longest_gap(heartbeats(machine.mock), at, now()))
        mains.append(machine.main_pid())
        steps.append({"how": how, "answers_s": answered - at, "adopted_s": taken_up - at, "gap_s": gaps[-1]})
    assert len(set(mains)) == restarts + 1
    at = now()
    while now() < at + 20:
        wait_heartbeat(machine.mock)
    usual = longest_gap(heartbeats(machine.mock), at, now())
    running.assert_same()
    release.touch()
    jobs = machine.wait_final(JOBS)
    assert {job.state for job in jobs} == {State.DONE}
    assert_once(machine.mock, JOBS)
    # Compared with a run that nothing has disturbed: there the file to wait for is there from the start.
    machine.submit(machine.script("undisturbed", writer(release)))
    machine.wait_final(["undisturbed"])
    undisturbed = sha256(uploaded_log(machine.mock, "undisturbed"))
    assert undisturbed == sha256(expected_log())
    logs = {job_id: uploaded_log(machine.mock, job_id) for job_id in JOBS}
    assert {sha256(log) for log in logs.values()} == {undisturbed}
    running.assert_ran_once()
    figures = {
        "restarts": restarts,
        "by_sigkill": sum(step["how"] == "SIGKILL" for step in steps),
        "log_bytes": {job_id: len(log) for job_id, log in logs.items()},
        "log_sha256": undisturbed,
        "heartbeat_interval_s": 2,
        "gap_without_restarts_s": usual,
        "longest_gap_s": max(gaps),
        "median_gap_s": statistics.median(gaps),
        "took_s": now() - begin,
        "steps": steps,
    }
    (reports / "restarts.json").write_text(json.dumps(figures, indent=1))
    print(json.dumps({key: value for key, value in figures.items() if key != "steps"}))


def test_an_adopted_job_can_be_cancelled_and_has_its_deadline(machine: Machine, release: Path) -> None:
    machine.slots(3)
    machine.start()
    limit = 60.0
    for job_id, more in {"cancelled": {}, "late": {"timeout_s": limit}, "told": {}}.items():
        machine.submit(machine.script(job_id, hold(release), **more))
    running = Running(machine, ["cancelled", "late", "told"])
    machine.restart()
    running.wait_adopted()
    machine.mock.cancel("cancelled")
    run("aitbc-minerctl", "cancel", "told")
    cancelled, late, told = machine.wait_final(running.pids)
    assert (cancelled.error_code, told.error_code) == ("E_CANCELLED", "E_CANCELLED")
    assert late.error_code == "E_TIMEOUT"
    wall = outcome(machine, "late")["usage"]["wall_s"]
    # What was left of it, not the whole again.
    assert limit * 0.9 < wall < limit * 1.5
    running.wait_gone()
    assert_once(machine.mock, running.pids)
    # Their slots take jobs again, with workers of this run.
    jobs = [machine.submit(machine.script(f"next-{i}", "true")) for i in range(6)]
    assert {job.state for job in machine.wait_final(jobs)} == {State.DONE}
    assert_once(machine.mock, jobs)


def test_jobs_go_on_without_agent_and_heartbeat(
    machine: Machine, release: Path, count: Count, reports: Path
) -> None:
    running = started(machine, JOBS, writer(release))
    main, workers, gaps = machine.main_pid(), machine.workers(), []
    for i in range(count(2, 10)):
        name = ("agent", "heartbeat")[i % 2]
        victim = wait_until(lambda name=name: helpers(machine).get(name), WAIT_S, 0.2)
        at = now()
        machine.kill(pid=victim)
        wait_gone([victim])
        wait_until(lambda name=name, victim=victim: helpers(machine).get(name, victim) != victim, WAIT_S, 0.2)
        wait_heartbeat(machine.mock)
        gaps.append({"killed": name, "gap_s": longest_gap(heartbeats(machine.mock), at, now())})
        running.assert_same()
    assert machine.main_pid() == main
    assert machine.show("NRestarts") == "0"
    assert machine.workers() == workers
    release.touch()
    assert {job.state for job in machine.wait_final(JOBS)} == {State.DONE}
    assert_once(machine.mock, JOBS, repeats=True)
    assert {sha256(uploaded_log(machine.mock, job_id)) for job_id in JOBS} == {sha256(expected_log())}
    (reports / "helpers-killed.json").write_text(json.dumps(gaps, indent=1))


def test_jobs_end_while_the_miner_is_stopped(machine: Machine, release: Path) -> None:
    running = started(machine, JOBS, writer(release))
    workers = machine.workers()
    machine.stop()
    assert not machine.is_active()
    assert machine.is_active(SLOTS)
    running.assert_same()
    release.touch()
    running.wait_gone()
    wait_gone(workers.values())
    assert {machine.mock.job(job_id).state for job_id in JOBS} == {State.ACKED}
    assert {outcome(machine, job_id)["code"] for job_id in JOBS} == {None}
    machine.start()
    assert {job.state for job in machine.wait_final(JOBS)} == {State.DONE}
    assert_once(machine.mock, JOBS)
    assert {sha256(uploaded_log(machine.mock, job_id)) for job_id in JOBS} == {sha256(expected_log())}
    running.assert_ran_once()


# --- ends --------------------------------------------------------------------------------------------------


def stop_slots(machine: Machine) -> None:
    machine.stop(SLOTS)


def lose_power(machine: Machine) -> None:
    """Do what a loss of power does, as far as it can be done without one: nobody has time for a last word."""
    for group in (CGROUP.with_name(MAIN), CGROUP):
        (group / "cgroup.kill").write_text("1")
    run("systemctl", "stop", MAIN, SLOTS)
    for path in RUN.iterdir():
        run("rm", "-r", path)


@pytest.mark.parametrize("end", [stop_slots, lose_power])
def test_a_job_that_ended_with_the_slots_is_lost_and_not_run_again(
    machine: Machine, release: Path, end: Callable[[Machine], None]
) -> None:
    running = started(machine, JOBS, hold(release))
    # One that was adopted must end like the others.
    machine.restart()
    running.wait_adopted()
    workers = [pid for pid in _in(CGROUP) if alive(pid)]
    end(machine)
    assert not machine.is_active()
    assert not machine.is_active(SLOTS)
    assert not any(alive(pid) for pid in [*running.pids.values(), *workers])
    assert machine.remains() == []
    assert {machine.mock.job(job_id).state for job_id in JOBS} == {State.ACKED}
    machine.start()
    assert machine.is_active(SLOTS)
    assert {job.error_code for job in machine.wait_final(JOBS)} == {"E_LOST"}
    assert_once(machine.mock, JOBS)
    after = [machine.submit(machine.script(f"after-{i}", "true")) for i in range(4)]
    assert {job.state for job in machine.wait_final(after)} == {State.DONE}
    running.assert_ran_once()


def _in(group: Path) -> list[int]:
    """Give the processes of a control group and of those below it."""
    return [int(pid) for path in group.rglob("cgroup.procs") for pid in path.read_text().split()]


# --- an upgrade --------------------------------------------------------------------------------------------


def test_an_upgrade_replaces_the_environment_under_running_jobs(
    machine: Machine, release: Path, count: Count, reports: Path
) -> None:
    task = TASKS / "late.py"
    task.write_text(LATE_TASK)
    try:
        _upgrade(machine, release, count(1, 3), reports)
    finally:
        task.unlink()


def _upgrade(machine: Machine, release: Path, upgrades: int, reports: Path) -> None:
    scripts = JOBS[:3]
    machine.slots(4)
    machine.start()
    for job_id in scripts:
        machine.submit(machine.script(job_id, writer(release)))
    marks = {"marks": str(machine.marks)}
    machine.submit({"job_id": "late", "runner": "python", "task": "late", "params": marks})
    running = Running(machine, [*scripts, "late"])
    wait_heartbeat(machine.mock)
    first, gaps = CURRENT.resolve(), []
    for _ in range(upgrades):
        old, main, at = CURRENT.resolve(), machine.main_pid(), now()
        said = install("--upgrade")
        machine.wait_new_main(main)
        running.wait_adopted()
        wait_heartbeat(machine.mock)
        gaps.append(longest_gap(heartbeats(machine.mock), at, now()))
        assert CURRENT.resolve() != old
        assert f"keeping {first} for its running jobs" in said
    assert first.exists()
    release.touch()
    jobs = machine.wait_final(running.pids)
    assert {job.state for job in jobs} == {State.DONE}, jobs
    assert_once(machine.mock, running.pids)
    assert {sha256(uploaded_log(machine.mock, job_id)) for job_id in scripts} == {sha256(expected_log())}
    assert outcome(machine, "late")["result"] == "0.667 7"
    running.assert_ran_once()
    # The workers that were started from it have ended with their jobs.
    install("--no-start")
    assert not first.exists()
    assert [path.name for path in first.parent.iterdir()] == [CURRENT.resolve().name]
    (reports / "upgrades.json").write_text(json.dumps({"upgrades": upgrades, "heartbeat_gaps_s": gaps}))
