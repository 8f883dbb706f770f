"""After very many short jobs of all kinds the machine has no more of anything than before."""

import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from aitbc_miner.agent.context import POOLS
from tests.vm.conftest import Count
from tests.vm.machine import CGROUP, RUN, STATE, WAIT_S, Machine, run
from tests.vm.witness import assert_once
from tools.lib.local_node import wait_until
from tools.mock.bootstrap.records import State

pytestmark = pytest.mark.one_release("12", "what could leak is the node's own")

WAVE = 12
# What a job does, and what becomes of it; the programs must not outlive it in any of these ways.
KINDS: dict[str, tuple[str, dict[str, Any], str | None]] = {
    "success": ("echo done", {}, None),
    "files": (
        "mkdir -p $TMPDIR/a/b; echo x >$TMPDIR/a/b/c; mkfifo p; : >../output/o; ln -s / l",
        {},
        None,
    ),
    "elsewhere": ("for i in /run/lock /var/lock /tmp /var/tmp; do : >$i/left-$$; done; echo tried", {}, None),
    "failure": ("exit 3", {}, "E_EXIT"),
    "signal": ("kill -SEGV $$", {}, "E_SIGNAL"),
    "cancelled": ("exec sleep 1000", {}, "E_CANCELLED"),
    "timeout": ("exec sleep 1000", {"timeout_s": 1}, "E_TIMEOUT"),
    "background": ("sleep 1000 & sleep 1000 & disown -a; echo left", {}, None),
    "memory": ("set -e; echo x >/dev/shm/left-$$; : >/dev/mqueue/left-$$; ipcmk -M 4096 -S 2 -Q", {}, None),
    "daemon": ("(setsid bash -c 'trap \"\" TERM HUP; sleep 1000; sleep 1000' &) ; echo left", {}, None),
}
TEMPORARY = ("/tmp", "/var/tmp", "/dev/shm", "/run/lock", str(RUN), str(STATE))
# Ours, and what pytest keeps for the test.
NOT_ITS_OWN = ("/tmp/pytest-of-root", str(STATE / "jobs") + "/")


def test_short_jobs_leak_nothing(machine: Machine, count: Count, reports: Path) -> None:
    machine.slots(4)
    machine.start()
    # What is made once, for the first jobs: threads, connections, modules.
    submit_and_wait(machine, 0, 2 * WAVE)
    before = quiet_census(machine)
    jobs = count(60, 1000)
    submit_and_wait(machine, 2 * WAVE, jobs)
    after = quiet_census(machine)
    figures = {name: {"before": before[name], "after": after[name]} for name in before}
    (reports / "leaks.json").write_text(json.dumps({"jobs": jobs, **figures}, indent=1, default=sorted))
    print(json.dumps({"jobs": jobs, "summary": summary(before, after)}))
    for name in ("groups", "processes", "mounts", "files", "memory", "descriptors"):
        assert after[name] == before[name], name
    # Each of the agent's threads keeps the connection that it had last, and no more than that.
    for name, sockets in after["sockets"].items():
        assert sockets <= max(before["sockets"][name], sum(POOLS.values()) + 8), name
    assert len([path for path in machine.jobs.iterdir() if path.name[0].isalnum()]) == 2 * WAVE + jobs


def submit_and_wait(machine: Machine, first: int, number: int) -> None:
    """Have jobs of all kinds done, in waves, and see that each was what it should be."""
    for begin in range(first, first + number, WAVE):
        wave = {
            f"{kind}-{i}": kind
            for i in range(begin, min(begin + WAVE, first + number))
            for kind in [list(KINDS)[i % len(KINDS)]]
        }
        for job_id, kind in wave.items():
            line, more, _ = KINDS[kind]
            machine.submit(machine.script(job_id, line, **more))
        for job_id, kind in wave.items():
            if kind == "cancelled":
                machine.running(job_id)
                machine.mock.cancel(job_id)
        jobs = machine.wait_final(wave)
        codes = {job.job_id: job.error_code if job.state is State.FAILED else None for job in jobs}
        assert codes == {job_id: KINDS[kind][2] for job_id, kind in wave.items()}
        assert_once(machine.mock, wave)


def quiet_census(machine: Machine) -> dict[str, Any]:
    """Count when all is at rest: what ends may take a moment to be gone."""
    wait_until(lambda: at_rest(machine), WAIT_S, 0.5)
    last: list[dict[str, Any]] = [census(machine)]

    def the_same_again() -> bool:
        last.append(census(machine))
        return last[-1] == last[-2]

    wait_until(the_same_again, WAIT_S, 2.0)
    return last[-1]


def at_rest(machine: Machine) -> bool:
    now = machine.now()
    return not now.pending_reports and not now.queued and all(row.slot.free for row in now.slots)


def census(machine: Machine) -> dict[str, Any]:
    """Count what a job could leave behind."""
    parts = node_processes(machine)
    descriptors = {name: Counter(kinds(pid)) for name, pid in parts.items()}
    return {
        "groups": sorted(str(path.relative_to(CGROUP)) for path in CGROUP.rglob("*") if path.is_dir()),
        "processes": dict(sorted(Counter(map(described, foreign_processes())).items())),
        "mounts": {name: mounts(pid) for name, pid in {"machine": os.getpid(), **parts}.items()},
        "descriptors": {
            name: {kind: n for kind, n in sorted(found.items()) if kind != "socket"}
            for name, found in descriptors.items()
        },
        "sockets": {name: found["socket"] for name, found in descriptors.items()},
        "files": sorted(temporary_files()),
        "memory": memory_by_name(machine),
        "dying_groups": dying(CGROUP),
        "resident_kib": {name: psutil.Process(pid).memory_info().rss >> 10 for name, pid in parts.items()},
    }


def summary(before: dict[str, Any], after: dict[str, Any]) -> dict[str, list[Any]]:
    """Give before and after of each count in a line."""

    def total(value: Any) -> Any:
        return sum(map(total, value.values())) if isinstance(value, dict) else value

    def size(value: Any) -> Any:
        return len(value) if isinstance(value, list) else total(value)

    return {name: [size(before[name]), size(after[name])] for name in before}


def node_processes(machine: Machine) -> dict[str, int]:
    """Give the node's own processes by what they are."""
    workers = machine.workers()
    children = psutil.Process(machine.main_pid()).children()
    others = sorted(child.pid for child in children if child.pid not in workers.values())
    # Agent and heartbeat, in the order in which they were started; neither has died.
    assert len(others) == 2
    return {"supervisor": machine.main_pid(), "agent": others[0], "heartbeat": others[1], **workers}


def foreign_processes() -> Iterator[psutil.Process]:
    """Give all processes but the kernel's, udev's helpers, which come and go, and this test with its own."""
    own = {os.getpid(), *(child.pid for child in psutil.Process().children(recursive=True))}
    for process in psutil.process_iter():
        try:
            kernel = 2 in {process.pid, process.ppid()}
            helper = process.name() == "(udev-worker)"
        except psutil.NoSuchProcess:
            continue
        if not kernel and not helper and process.pid not in own:
            yield process


def described(process: psutil.Process) -> str:
    """Say whose process it is, what it is, and who started it."""
    try:
        parent = process.parent()
        return f"{process.username()} {process.name()} of {parent.name() if parent else 'nobody'}"
    except psutil.NoSuchProcess:
        return "gone"


def kinds(pid: int) -> Iterator[str]:
    """Say what each open descriptor of a process is: sockets and pipes without their numbers."""
    for entry in Path("/proc", str(pid), "fd").iterdir():
        try:
            target = str(entry.readlink())
        except FileNotFoundError:
            continue
        yield target.partition(":[")[0]


def mounts(pid: int) -> int:
    return len(Path("/proc", str(pid), "mountinfo").read_text().splitlines())


def temporary_files() -> Iterator[str]:
    """Give what is in places for temporary files, and in the node's own outside of the jobs' directories."""
    for place in TEMPORARY:
        for directory, directories, names in os.walk(place):
            for name in [*directories, *names]:
                path = str(Path(directory, name))
                if not path.startswith(NOT_ITS_OWN):
                    yield path


def memory_by_name(machine: Machine) -> list[str]:
    """Give what there is of shared memory, queues and semaphores where the jobs see it: among their own."""
    look = "ls -A /dev/shm /dev/mqueue; tail -qn +2 /proc/sysvipc/*"
    return run("nsenter", "-t", str(machine.main_pid()), "-m", "-i", "sh", "-c", look).splitlines()


def dying(group: Path) -> int:
    """Give how many removed groups the kernel still keeps, for memory that was theirs; it takes its time."""
    fields = dict(line.split() for line in (group / "cgroup.stat").read_text().splitlines())
    return int(fields["nr_dying_descendants"])
