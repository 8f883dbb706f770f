"""Machines that do not let the miner limit its jobs: it refuses and says why, or does with less and says so.

Each is this machine with other mounts, in a mount namespace that the node has for itself.
"""

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.vm.machine import CURRENT, ETC, WAIT_S, Machine, run
from tools.lib.local_node import wait_until
from tools.mock.bootstrap.records import State

pytestmark = pytest.mark.one_release("13", "other mounts look the same in both")

EXIT_CONFIG = 78
CGROUPS = Path("/sys/fs/cgroup")
# A group that hands on nothing but what a test gives it, and one below it that the node is in.
OUTER, INNER = CGROUPS / "bare", CGROUPS / "bare" / "inner"
LIMITS: dict[str, Any] = {
    "cpus": "0",
    "cpu_max": "50%",
    "memory_max": "96M",
    "pids_max": 24,
    "io_weight": 10,
}
BY_PROCESS = {
    "cpu": "nice", "cpuset": "affinity", "io": "ionice", "memory": "rlimit", "pids": "rlimit",
}  # fmt: skip
BOOT = "boot with systemd.unified_cgroup_hierarchy=1"
CONTAINER = "let the container write its cgroups"
ONLY = "only limits of single processes apply"
WHERE_THEY_CAN = "limits of single processes apply where possible"


class Host(NamedTuple):
    """A machine: how it is made, with which controllers, what is wrong with it, what helps, what holds then.

    `grouped`: jobs are in a control group all the same.
    """

    setup: str
    cause: str
    remedy: str
    held: dict[str, str] = BY_PROCESS
    controllers: tuple[str, ...] = ()
    grouped: bool = False


IN_BARE = f"echo $$ > {INNER}/cgroup.procs"
READ_ONLY = f"mount -o remount,bind,ro {CGROUPS}"
# What this machine is, a container perhaps.
FORGET = "mount -t tmpfs tmpfs /run/systemd"
HYBRID = (
    f"{IN_BARE}; umount {CGROUPS}; mount -t tmpfs tmpfs {CGROUPS}; "
    f"mkdir {CGROUPS}/unified {CGROUPS}/systemd; "
    f"mount -t cgroup2 cgroup2 {CGROUPS}/unified; "
    f"mount -t cgroup -o none,name=systemd,xattr cgroup {CGROUPS}/systemd"
)
HOSTS = {
    "without cgroup2": Host(f"umount {CGROUPS}", "the machine has no cgroup2 mount", BOOT),
    "read-only": Host(
        READ_ONLY, f"the miner may not write in {CGROUPS}/", "start the miner as systemd's service"
    ),
    "container": Host(
        f"{READ_ONLY}; echo docker > /run/systemd/container",
        f"the miner may not write in {CGROUPS}/",
        CONTAINER,
    ),
    "no controllers": Host(
        IN_BARE, f"no controller for cpu, memory, pids in {INNER}", "start the miner as systemd's service",
        grouped=True,
    ),
    "hybrid": Host(
        HYBRID, f"no controller for cpu, memory, pids in {CGROUPS}/unified/bare/inner", BOOT, grouped=True
    ),
    "some controllers": Host(
        IN_BARE, f"no controller for cpu in {INNER}", "start the miner as systemd's service",
        held=BY_PROCESS | {"memory": "cgroup", "pids": "cgroup"}, controllers=("memory", "pids"),
        grouped=True,
    ),
}  # fmt: skip


class Elsewhere:
    """The installed node on such a host, with a configuration, a workspace and a socket of its own."""

    def __init__(self, machine: Machine, host: Host, mode: str) -> None:
        self.directory = Path("/var/lib/aitbc/elsewhere")
        self.directory.mkdir(mode=0o755)
        machine.jobs = self.directory / "jobs"
        machine.socket = self.directory / "control.sock"
        machine.configure(
            cgroup={"mode": mode},
            workspace={"root": str(machine.jobs)},
            control={"socket": str(machine.socket)},
            shutdown={"mode": "kill"},
        )
        machine.slots([{"name": "cpu0", "kind": "cpu", **LIMITS}])
        config = shutil.copy2(ETC / "config.yaml", self.directory)
        self._log = self.directory / "node.log"
        node = shlex.join([str(CURRENT / "bin" / "aitbc-miner"), "run", "--config", str(config)])
        self._command = [
            "unshare",
            "--mount",
            "--propagation=private",
            "sh",
            "-ec",
            f"{FORGET}; {host.setup}; exec {node}",
        ]
        self._machine = machine
        self._host = host
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> "subprocess.Popen[bytes]":
        OUTER.mkdir()
        for name in self._host.controllers:
            (OUTER / "cgroup.subtree_control").write_text(f"+{name}")
        INNER.mkdir()
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(self._command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        return self.process

    def said(self) -> str:
        return self._log.read_text()

    def wait_up(self) -> None:
        def settled() -> bool:
            assert self.process is not None
            assert self.process.poll() is None, self.said()
            now = self._machine.status()
            return bool(now and [row for row in now.slots if row.slot.state == "IDLE"])

        wait_until(settled, WAIT_S, 0.2)

    def close(self) -> None:
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.process.pid, signal.SIGTERM)
            try:
                self.process.wait(WAIT_S)
            finally:
                self.process.kill()
        for group in sorted(OUTER.rglob("*/"), reverse=True):
            group.rmdir()
        if OUTER.exists():
            OUTER.rmdir()
        shutil.rmtree(self.directory)


@pytest.fixture
def elsewhere(machine: Machine, request: pytest.FixtureRequest) -> Iterator[Elsewhere]:
    """Give the node on the host and with the mode of the test's parameters; not started."""
    name, mode = request.param
    node = Elsewhere(machine, HOSTS[name], mode)
    yield node
    node.close()


def on(mode: str) -> pytest.MarkDecorator:
    own_kernel = pytest.mark.own_kernel("needs controllers")
    cases = [
        pytest.param(host, (name, mode), id=name, marks=[own_kernel] if host.controllers else [])
        for name, host in HOSTS.items()
    ]
    return pytest.mark.parametrize(("host", "elsewhere"), cases, indirect=["elsewhere"])


@on("required")
def test_what_is_required_and_not_there_is_refused(elsewhere: Elsewhere, host: Host) -> None:
    assert elsewhere.start().wait(WAIT_S) == EXIT_CONFIG, elsewhere.said()
    said = elsewhere.said()
    assert f"cannot limit jobs: {host.cause}" in said
    assert f"; {host.remedy}" in said
    assert "or set cgroup.mode: auto" in said


@on("auto")
def test_with_auto_it_does_with_less_and_says_so(
    elsewhere: Elsewhere, host: Host, machine: Machine, reports: Path, request: pytest.FixtureRequest
) -> None:
    elsewhere.start()
    elsewhere.wait_up()
    notice = WHERE_THEY_CAN if host.grouped else ONLY
    problems = [problem.what for problem in machine.now().problems]
    assert [what for what in problems if host.cause in what and notice in what], problems
    assert host.cause in elsewhere.said()
    assert machine.slot().enforced == host.held
    page = run("aitbc-minerctl", "--socket", machine.socket, "status")
    (reports / f"host-{request.node.callspec.id.replace(' ', '-')}.txt").write_text(page)
    held = " ".join(f"{limit}={how}" for limit, how in sorted(host.held.items()))
    assert f"limits      {held}" in page
    see_limits(machine, host)


def see_limits(machine: Machine, host: Host) -> None:
    """Have a job tell what it is held by."""
    line = "ulimit -d; ulimit -u; nice; taskset -cp $$ | sed 's/.*: //'; ionice -p $$; cat /proc/self/cgroup"
    (job,) = machine.wait_final([machine.submit(machine.script("limited", line))])
    assert job.state is State.DONE, job
    log = (machine.jobs / "limited" / "logs" / "exec.log").read_text()
    data, processes, nice, cpus, io, *groups = log.splitlines()
    by_process = host.held["memory"] == "rlimit"
    assert (data == str(96 << 10)) == by_process, log
    assert (processes == "24") == by_process, log
    assert (nice, cpus, io) == ("10", "0", "best-effort: prio 7"), log
    own = next(each for each in groups if each.startswith("0::"))
    assert own.endswith("/cpu0/job") == host.grouped, log
