"""systemd and the supervisor: when it is up, when it hangs, what is said of it, and stops at bad moments."""

import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tests.vm.machine import CGROUP, MAIN, SLOTS, WAIT_S, Machine, run
from tests.vm.witness import Running, adopted, assert_once, expected_log, sha256, uploaded_log, writer
from tools.lib.local_node import wait_until
from tools.mock.bootstrap.records import State

JOBS = [f"long-{i}" for i in range(4)]
DROP_IN = Path("/run/systemd/system", f"{MAIN}.d", "watchdog.conf")
# Shorter than the unit's own, so that the test is; long enough for an emulated machine.
LIMIT_S = 10


@pytest.fixture
def watchdog(machine: Machine) -> Iterator[None]:
    """Have a watchdog with less patience."""
    DROP_IN.parent.mkdir(parents=True)
    DROP_IN.write_text(f"[Service]\nWatchdogSec={LIMIT_S}\n")
    run("systemctl", "daemon-reload")
    yield
    DROP_IN.unlink()
    DROP_IN.parent.rmdir()
    run("systemctl", "daemon-reload")


def started(machine: Machine, release: Path) -> Running:
    """Start the node with four slots, and have four jobs run."""
    machine.slots(len(JOBS))
    machine.start()
    for job_id in JOBS:
        machine.submit(machine.script(job_id, writer(release)))
    return Running(machine, JOBS)


def finish(machine: Machine, running: Running, release: Path) -> None:
    """Let the jobs end, and see that nothing of what happened to the node has touched them."""
    running.assert_same()
    release.touch()
    assert {job.state for job in machine.wait_final(JOBS)} == {State.DONE}
    assert_once(machine.mock, JOBS)
    running.assert_ran_once()
    assert {sha256(uploaded_log(machine.mock, job_id)) for job_id in JOBS} == {sha256(expected_log())}


# --- the watchdog ------------------------------------------------------------------------------------------


def test_a_supervisor_that_hangs_is_replaced_and_its_jobs_go_on(
    machine: Machine, watchdog: None, release: Path
) -> None:
    running = started(machine, release)
    assert machine.show("WatchdogUSec") == f"{LIMIT_S}s"
    # A loop that runs is left alone, however long; pings are only sent from it.
    fed = machine.show("WatchdogTimestampMonotonic")
    wait_until(lambda: machine.show("WatchdogTimestampMonotonic") != fed, WAIT_S, 0.5)
    assert machine.show("NRestarts") == "0"
    agent_and_heartbeat = psutil.Process(machine.main_pid()).children()
    before = machine.journal_end()
    old = machine.kill(signal.SIGSTOP)
    # The others live, and do not feed it in the supervisor's place.
    assert all(child.is_running() for child in agent_and_heartbeat)
    running.assert_same()
    assert machine.wait_new_main(old) != old
    assert not psutil.pid_exists(old)
    assert machine.show("NRestarts") == "1"
    assert f"Watchdog timeout (limit {LIMIT_S}s)!" in machine.journal(after=before)
    running.wait_adopted()
    finish(machine, running, release)


def test_nobody_but_the_supervisor_can_speak_to_systemd(machine: Machine) -> None:
    machine.start()
    assert machine.show("NotifyAccess") == "main"
    job_id = machine.submit(machine.script("look", "export -p"))
    assert machine.wait_final([job_id])[0].state is State.DONE
    log = uploaded_log(machine.mock, job_id).decode()
    assert "PATH=" in log
    assert "NOTIFY" not in log
    assert "WATCHDOG" not in log


# --- start and stop ----------------------------------------------------------------------------------------


def test_started_means_that_it_answers(machine: Machine) -> None:
    machine.slots(4)
    run("systemctl", "start", MAIN)
    assert machine.status() is not None
    run("systemctl", "restart", MAIN)
    assert machine.status() is not None
    machine.stop()
    run("systemctl", "start", "--no-block", MAIN)
    seen = []
    while (state := machine.show("ActiveState")) != "active":
        # Nothing may be said to be active before; and a start takes its time.
        assert state in {"inactive", "activating"}, machine.journal()[-4000:]
        seen.append(state)
    assert machine.status() is not None
    assert "activating" in seen
    machine.wait_up()


def test_systemd_shows_what_belongs_to_whom(machine: Machine, release: Path) -> None:
    running = started(machine, release)
    shown = {unit: run("systemctl", "status", "--no-pager", "-l", unit) for unit in (MAIN, SLOTS)}
    for unit, text in shown.items():
        assert "Active: active (running)" in text, text
        assert f"└─{unit}" not in text
    assert f"Main PID: {machine.main_pid()} (aitbc-miner)" in shown[MAIN]
    for pid in [*running.pids.values(), *machine.workers().values()]:
        assert f"{pid} " not in shown[MAIN].partition("CGroup:")[2].partition("\n\n")[0]
        assert any(line.split("─")[-1].startswith(f"{pid} ") for line in shown[SLOTS].splitlines())
    main = psutil.Process(machine.main_pid())
    own = {main.pid, *(child.pid for child in main.children())} - set(machine.workers().values())
    group = CGROUP.with_name(MAIN) / "cgroup.procs"
    assert set(map(int, group.read_text().split())) == own
    assert len(own) == 3
    finish(machine, running, release)


def begun(machine: Machine) -> bool:
    return machine.main_pid() != 0


def python_runs(machine: Machine) -> bool:
    return (pid := machine.main_pid()) != 0 and "aitbc-miner" in " ".join(_argv(pid))


def has_children(machine: Machine) -> bool:
    pid = machine.main_pid()
    return pid != 0 and psutil.pid_exists(pid) and len(psutil.Process(pid).children()) > 0


def has_adopted_one(machine: Machine) -> bool:
    return bool(adopted(machine))


def _argv(pid: int) -> list[str]:
    try:
        return psutil.Process(pid).cmdline()
    except psutil.NoSuchProcess:
        return []


def test_a_stop_in_the_middle_of_a_start_ends_it_and_no_job(machine: Machine, release: Path) -> None:
    running = started(machine, release)
    moments: list[Callable[[Machine], bool]] = [begun, python_runs, has_children, has_adopted_one]
    for moment in moments:
        machine.stop()
        run("systemctl", "start", "--no-block", MAIN)
        wait_until(lambda moment=moment: moment(machine), WAIT_S, 0.05)
        # systemd sends SIGTERM and waits: that is no failure, and nothing to be started again for.
        machine.stop()
        assert machine.show("ActiveState") == "inactive", (moment, machine.journal()[-4000:])
        assert machine.show("Result") == "success", moment
        assert not (CGROUP.with_name(MAIN)).exists()
        running.assert_same()
    machine.start()
    running.wait_adopted()
    finish(machine, running, release)
