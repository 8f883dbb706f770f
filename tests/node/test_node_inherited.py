"""A whole node whose parent left it everything in disorder: it runs jobs as any other does."""

import json
import os
import resource
import signal
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.node.conftest import NodeFactory
from tests.node.harness import WAIT_S, Node, assert_once, submit, wait_final
from tools.lib.local_node import TOKEN, wait_until
from tools.mock.bootstrap.coordinator import MockCoordinator
from tools.mock.bootstrap.records import State


def spoil_signals() -> None:
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_SETMASK, signal.valid_signals())
    signal.setitimer(signal.ITIMER_REAL, 2.0)
    os.umask(0o777)
    os.closerange(0, 64)


def spoil_limits() -> None:
    os.umask(0)
    os.nice(10)
    os.chdir("/proc/self")
    for name, soft in (("NOFILE", 24), ("FSIZE", 4096), ("STACK", 1 << 20), ("CPU", 3600)):
        number = getattr(resource, f"RLIMIT_{name}")
        resource.setrlimit(number, (soft, resource.getrlimit(number)[1]))
    os.set_inheritable(os.open("/etc", os.O_RDONLY), True)


BAD = {
    "PYTHONWARNINGS": "error",
    "PYTHONPATH": "/nowhere",
    "LC_ALL": "C",
    "TZ": "Asia/Kathmandu",
    "TMPDIR": "/x",
}


@pytest.mark.parametrize("spoil", [spoil_signals, spoil_limits])
def test_node_runs_jobs_whatever_it_inherits(
    spoil: Callable[[], None], coordinator: MockCoordinator, node_factory: NodeFactory
) -> None:
    node = node_factory(2)
    command = [sys.executable, "-m", "aitbc_miner.main", "run", "--config", str(node.config)]
    environ = {**os.environ, "MINER_AUTH": TOKEN, **BAD}
    with node.log.open("ab") as log:
        node.process = subprocess.Popen(command, env=environ, stdin=log, stderr=log, preexec_fn=spoil)  # noqa: PLW1509
    wait_until(lambda: node.status() or node.process_ended(), WAIT_S)
    script = node.script("ended", "kill -TERM $$ & wait")
    jobs = submit(coordinator, 4)
    assert {job.state for job in wait_final(coordinator, jobs)} == {State.DONE}
    assert_once(coordinator, jobs)
    # A child's end is seen, and its successor works.
    node.kill_child("agent")
    killed = coordinator.submit(script)
    assert wait_final(coordinator, [killed])[0].error_code == "E_SIGNAL"
    assert all(_state(pid) == (0, 0o022) for pid in node.all_children().values())
    assert _modes(node) == {"jobs": 0o711, "state": 0o711}
    assert node.stop() == 0


def _state(pid: int) -> tuple[int, int]:
    """Give which signals a process has blocked, and its umask."""
    rows = dict(line.split(":\t") for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return int(rows["SigBlk"], 16), int(rows["Umask"], 8)


def _modes(node: Node) -> dict[str, int]:
    return {name: stat.S_IMODE((node.directory / name).stat().st_mode) for name in ("jobs", "state")}


def test_a_socket_and_a_log_that_are_gone_are_made_again(
    coordinator: MockCoordinator, node_factory: NodeFactory
) -> None:
    node = node_factory(1)
    log = node.directory / "log" / "miner.log"
    log.parent.mkdir()
    with node.config.open("a") as config:
        config.write(f"logging: {{path: {log}, level: debug}}\n")
    node.start()
    wait_final(coordinator, submit(coordinator, 1))
    log.rename(log.with_name("miner.log.1"))
    node.socket.unlink()
    wait_until(node.status, WAIT_S)
    # The worker is as it was, and has the new file from the supervisor or by itself.
    wait_final(coordinator, submit(coordinator, 1))
    wait_until(lambda: {"supervisor", "worker"} <= _parts(log), WAIT_S)
    assert node.stop() == 0


def _parts(log: Path) -> set[str]:
    return {json.loads(line)["part"] for line in log.read_text().splitlines()}
