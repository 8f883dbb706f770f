"""Processes that a dead worker left behind.

Where there is no cgroup to kill, the program dies with its worker, but what it forked does not: it becomes a
child of the supervisor, which is their subreaper. A child that it did not start has no right to be.
"""

import os
import signal
from pathlib import Path

from aitbc_miner.util.log import events


def children() -> set[int]:
    """Name the children of this process, zombies included; of all threads, though there is one."""
    found: set[int] = set()
    for task in Path("/proc/self/task").iterdir():
        found.update(int(pid) for pid in (task / "children").read_text().split())
    return found


def kill_strangers(own: set[int]) -> None:
    """Kill and collect all children but our own."""
    for pid in children() - own:
        events("supervisor").warning("orphan of a job killed", pid=pid)
        os.kill(pid, signal.SIGKILL)
        # Only this one: our own must keep their exit status until their pidfd is heard.
        os.waitpid(pid, os.WNOHANG)
