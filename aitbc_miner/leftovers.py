"""What is left of a job: processes that nothing ends, and those that something else started for its user.

A job can have cron, at, or a service manager of its user start something outside of its group.
"""

import contextlib
import os
import signal
import time
from collections.abc import Sequence

import psutil

from aitbc_miner.cgroup import RETRY_S
from aitbc_miner.privileges import UNALLOCATED, UNALLOCATED_END
from aitbc_miner.util.clock import now

NAMED_AT_MOST = 10


def processes_of(uid: int) -> list[int]:
    """Find what a slot's own user runs, wherever on the machine; zombies count, for threads can outlive them.

    Of an unallocated id nothing is found: another node of this machine may have given it to its own jobs.
    """
    if UNALLOCATED <= uid < UNALLOCATED_END:
        return []
    try:
        # Fails when the user has no process, which takes the kernel microseconds to see.
        os.getpriority(os.PRIO_USER, uid)
    except ProcessLookupError:
        return []
    return [pid for pid in psutil.pids() if _owner(pid) == uid]


def kill_processes_of(uid: int, timeout_s: float) -> list[int]:
    """Kill what a slot's own user runs; returns what is still there when the time is over."""
    deadline = now() + timeout_s
    while (found := processes_of(uid)) and now() < deadline:
        for pid in found:
            with contextlib.suppress(ProcessLookupError), os.fdopen(os.pidfd_open(pid), "rb", 0) as process:
                # Checked while the pidfd is held: the number may belong to somebody else by now.
                if _owner(pid) == uid:
                    signal.pidfd_send_signal(process.fileno(), signal.SIGKILL)
        time.sleep(RETRY_S)
    return found


def named(pids: Sequence[int]) -> str:
    """Write processes and their states into a sentence: "the processes 12 (disk-sleep), 13 (zombie)"."""
    if not pids:
        return ""
    shown = [f"{pid}{_doing(pid)}" for pid in sorted(pids)[:NAMED_AT_MOST]]
    more = f" and {len(pids) - NAMED_AT_MOST} more" if len(pids) > NAMED_AT_MOST else ""
    return f"the process{'es' if len(pids) > 1 else ''} {', '.join(shown)}{more}"


def _owner(pid: int) -> int | None:
    # From `status` in /proc/<pid>: that directory itself is root's, whoever runs what cannot be dumped.
    try:
        return int(psutil.Process(pid).uids().real)
    except psutil.Error:
        return None


def _doing(pid: int) -> str:
    try:
        return f" ({psutil.Process(pid).status()})"
    except psutil.Error:
        return ""
