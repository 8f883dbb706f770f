"""Measures the time that preloading saves a task: two nodes, with and without preloading, run it in turn."""

import contextlib
import importlib.util
import statistics
import time
from pathlib import Path

from aitbc_miner.sandbox.bubblewrap import Sandbox, why_not
from aitbc_miner.sandbox.users import resolve
from tools.lib.local_node import LocalNode
from tools.mock.bootstrap.coordinator import MockCoordinator
from tools.mock.bootstrap.records import FINAL

MIB = 1 << 20
MODULE = "numpy"
TASK = f"import {MODULE}\n\n\ndef run() -> int:\n    return int({MODULE}.arange(1000).sum())\n"
# Long enough for a process to be there that has imported all; no job is as early as that by design.
IDLE_S = 2.0


def saved(turns: int) -> None:
    """Print the time of the task on both nodes, from its preparation to its end."""
    if importlib.util.find_spec(MODULE) is None:
        print(f"cannot measure preload: the module {MODULE} is missing")
        return
    user = resolve("auto", "aitbc", []).service
    if problem := why_not(Sandbox(user, tmp_bytes=MIB, shm_bytes=MIB)):
        print(f"cannot measure preload: {problem}")
        return
    print(f"preload: a task that imports {MODULE}, {turns} runs on each node, idle slot, ms (median, best)")
    with contextlib.ExitStack() as stack:
        cold, warm = (_coordinator(stack, preload) for preload in ([], [MODULE]))
        took: dict[str, list[float]] = {"cold": [], "preloaded": []}
        for _ in range(turns):
            time.sleep(IDLE_S)
            took["cold"].append(_run(cold))
            took["preloaded"].append(_run(warm))
    middle = {name: statistics.median(each) for name, each in took.items()}
    for name, each in took.items():
        print(f"  {name:22} {middle[name] * 1000:7.1f} {min(each) * 1000:7.1f}")
    print(f"  ratio {middle['cold'] / middle['preloaded']:.1f}")


def _coordinator(stack: contextlib.ExitStack, preload: list[str]) -> MockCoordinator:
    """Start a node with its coordinator."""
    mock = stack.enter_context(MockCoordinator())
    node = LocalNode(mock.url, [{"name": "cpu0", "kind": "cpu"}])
    file: Path = node.directory / "tasks" / "total.py"
    file.write_text(TASK)
    file.chmod(0o644)
    python = {"task_paths": [str(file.parent)], "preload": preload}
    node.write_config(mock.url, sandbox={"mode": "required"}, runners={"python": python})
    stack.enter_context(node)
    return mock


def _run(mock: MockCoordinator) -> float:
    job_id = mock.submit({"runner": "python", "task": "total"})
    mock.wait(lambda ledger: ledger.job(job_id).state in FINAL, 60.0)
    body = mock.job(job_id).reports[-1].body
    if body.get("error_code"):
        raise RuntimeError(f"cannot measure preload: the task failed: {body}")
    timings: dict[str, float] = body["timings"]
    return timings["prepare"] + timings["run"]
