"""Processes that a dead worker left behind.

Where there is no cgroup to kill, the program dies with its worker, but what it forked does not: it becomes a
child of the supervisor, which is their subreaper. A child that it did not start has no right to be.
"""

import os
import signal
from pathlib import Path

from aitbc_miner.util.log import events
from aitbc_miner.util.system import process_start


def children() -> set[int]:
    """Name the children of this process, zombies included; of all threads, though there is one."""
    found: set[int] = set()
    for task in Path("/proc/self/task").iterdir():
        found.update(int(pid) for pid in (task / "children").read_text().split())
    return found


def end_worker(pid: int, start: int | None) -> None:
    """Kill a worker of an earlier run that cannot be adopted, and with it the program of its job."""
    try:
        fd = os.pidfd_open(pid)
    except OSError:
        return  # it is gone, as it should be
    try:
        # Looked at when the pidfd is held: the number may belong to somebody else by now.
        if start is not None and process_start(pid) == start:
            signal.pidfd_send_signal(fd, signal.SIGKILL)
    except ProcessLookupError:
        return
    finally:
        os.close(fd)


def kill_strangers(own: set[int]) -> None:
    """Kill and collect all children but our own."""
    for pid in children() - own:
        events("supervisor").warning("orphan of a job killed", pid=pid)
        os.kill(pid, signal.SIGKILL)
        # Only this one: our own must keep their exit status until their pidfd is heard.
        os.waitpid(pid, os.WNOHANG)
