"""Tasks that get a process which has waited for them, in a whole node with the sandbox."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.node.conftest import NodeFactory
from tests.node.harness import WAIT_S, Node, alive, wait_final, wait_gone
from tools.lib.local_node import wait_until
from tools.mock.bootstrap.coordinator import MockCoordinator
from tools.mock.bootstrap.records import Job, State

pytestmark = pytest.mark.needs("bubblewrap", "time")
# A module of Python's that nothing else of ours imports.
MODULE = "wave"
TASK = """
import os, sys
from pathlib import Path
had = "wave" in sys.modules
from aitbc_miner.task import output_dir, work_dir

def run(name: str = "x") -> dict:
    places = {each: sorted(os.listdir(f"/job/{each}")) for each in ("work", "output", "tmp")}
    (output_dir() / name).write_text(name)
    (work_dir() / "left").write_text(name)
    began = Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]
    return {"had": had, "began": int(began), "job": os.environ["AITBC_JOB_ID"], "places": places,
            "cwd": os.getcwd(), "more": os.environ.get("MORE"), "stdin": os.readlink("/proc/self/fd/0")}
"""
NUMPY = """
import sys
had = "numpy" in sys.modules
import numpy

def run(n: int) -> list:
    return [had, int(numpy.arange(n).sum())]
"""
SLOW = """
from pathlib import Path
import signal
from aitbc_miner.task import TaskCancelled, progress

def run() -> None:
    try:
        progress(1)
        signal.pause()
    except TaskCancelled:
        print("told to end")
        raise
"""
Make = Callable[..., Node]


@pytest.fixture
def make(node_factory: NodeFactory, coordinator: MockCoordinator) -> Make:
    """Give a maker of running nodes with one slot, these tasks, and what is to be preloaded."""

    def make(*preload: str, **slot: Any) -> Node:
        node = node_factory(
            [{"name": "cpu0", "kind": "cpu", "env": ["MORE"], **slot}], sandbox={"mode": "required"}
        )
        for name, text in {"told": TASK, "total": NUMPY, "slow": SLOW}.items():
            (node.directory / "tasks" / f"{name}.py").write_text(text)
            (node.directory / "tasks" / f"{name}.py").chmod(0o644)
        python = {"task_paths": [str(node.directory / "tasks")], "preload": list(preload)}
        node.write_config(coordinator.url, sandbox={"mode": "required"}, runners={"python": python})
        return node.start()

    return make


def waiting(node: Node, module: str = MODULE) -> psutil.Process | None:
    """Find the process that waits for the slot's next task; it has done its imports, and reads its order."""
    workers = [row.slot.worker_pid for row in node.now().slots]
    for each in psutil.Process(workers[0]).children(recursive=True) if any(workers) else []:
        try:
            reads = "pipe_read" in Path(f"/proc/{each.pid}/wchan").read_text()
            if each.name().startswith("python") and module in each.cmdline() and reads:
                return each
        except (psutil.NoSuchProcess, OSError):
            continue
    return None


def began(process: psutil.Process) -> int:
    return int(Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[19])


def wait_for(node: Node, module: str = MODULE) -> psutil.Process:
    found: psutil.Process = wait_until(lambda: waiting(node, module), WAIT_S)
    return found


def done(mock: MockCoordinator, **manifest: Any) -> Any:
    """Have a task done and give its result."""
    job = run(mock, **manifest)
    assert job.state is State.DONE, job
    assert job.accepted is not None
    return job.accepted.body["result"]


def run(mock: MockCoordinator, **manifest: Any) -> Job:
    (job,) = wait_final(mock, [mock.submit({"runner": "python", "task": "told", **manifest})])
    return job


def test_a_task_gets_the_process_that_waits(make: Make, coordinator: MockCoordinator) -> None:
    node = make(MODULE)
    first = wait_for(node)
    since = began(first)
    said = done(coordinator, job_id="j1", input={"inline": {"a": "1"}}, params={"name": "one"})
    assert said == {
        "had": True,
        "began": since,
        "job": "j1",
        "places": {"work": ["a"], "output": [], "tmp": []},
        "cwd": "/job/work",
        "more": None,
        "stdin": "/dev/null",
    }
    # The next one is another's, and finds nothing of the first.
    wait_gone([first.pid])
    since = began(wait_for(node))
    said = done(coordinator, job_id="j2", params={"name": "two"})
    assert (said["had"], said["began"], said["job"]) == (True, since, "j2")
    assert said["places"] == {"work": [], "output": [], "tmp": []}
    names = [each.path for each in coordinator.job("j2").accepted.artifacts]  # type: ignore[union-attr]
    assert "two" in " ".join(names)
    assert "one" not in " ".join(names)


def test_what_cannot_use_it_ends_it(make: Make, coordinator: MockCoordinator) -> None:
    node = make(MODULE)
    first = wait_for(node)
    wait_final(coordinator, [coordinator.submit(node.script("cli", "true"))])
    wait_gone([first.pid])
    second = wait_for(node)
    # The variable is there from the start, so whatever is imported may go by it.
    said = done(coordinator, env={"MORE": "1"})
    assert (said["had"], said["more"]) == (False, "1")
    wait_gone([second.pid])
    wait_for(node)
    assert done(coordinator)["had"] is True


def test_its_end_costs_no_job(make: Make, coordinator: MockCoordinator) -> None:
    node = make(MODULE)
    process = wait_for(node)
    os.kill(process.pid, signal.SIGKILL)
    wait_until(lambda: "prewarmed process lost" in node.log.read_text(), WAIT_S)
    assert done(coordinator)["had"] is False


def test_a_module_that_is_not_there_is_said(make: Make, coordinator: MockCoordinator) -> None:
    node = make("no_such_module", MODULE)
    wait_for(node)
    wait_until(lambda: "cannot preload" in node.log.read_text(), WAIT_S)
    assert done(coordinator)["had"] is True


@pytest.mark.parametrize("how", ["stop", "kill the worker", "kill the supervisor"])
def test_none_is_left(make: Make, how: str) -> None:
    node = make(MODULE)
    process = wait_for(node)
    if how == "stop":
        assert node.stop() == 0
        assert not (node.jobs / ".next" / "cpu0").exists()
    elif how == "kill the worker":
        node.kill_child("cpu0")
    else:
        assert node.process is not None
        os.kill(node.process.pid, signal.SIGKILL)
        wait_until(lambda: not node.processes(), WAIT_S)
    wait_gone([process.pid])
    if how == "kill the worker":
        assert alive(wait_for(node).pid)


def test_a_slot_without_tasks_has_none(make: Make, coordinator: MockCoordinator) -> None:
    node = make(MODULE, runners=["cli"])
    wait_final(coordinator, [coordinator.submit(node.script("cli", "true"))])
    assert waiting(node) is None


def test_its_task_hears_of_a_cancellation(make: Make, coordinator: MockCoordinator) -> None:
    node = make(MODULE)
    wait_for(node)
    job_id = coordinator.submit({"runner": "python", "task": "slow"})
    coordinator.wait(lambda ledger: ledger.job(job_id).progress, WAIT_S)
    coordinator.cancel(job_id)
    (job,) = wait_final(coordinator, [job_id])
    assert job.error_code == "E_CANCELLED"
    assert "told to end" in (node.jobs / job_id / "logs" / "exec.log").read_text()


@pytest.mark.parametrize("preload", [[], ["numpy"]])
def test_a_task_with_numpy(make: Make, coordinator: MockCoordinator, preload: list[str]) -> None:
    node = make(*preload)
    if preload:
        wait_for(node, "numpy")
    assert done(coordinator, task="total", params={"n": 1000}) == [bool(preload), 499500]


def test_other_limits_are_for_the_next_one(make: Make, coordinator: MockCoordinator) -> None:
    node = make(MODULE)
    first = wait_for(node)
    node.write_slots([{"name": "cpu0", "kind": "cpu", "env": ["MORE"], "pids_max": 77}])
    node.tell("reload")
    wait_gone([first.pid])
    since = began(wait_for(node))
    assert done(coordinator)["began"] == since
