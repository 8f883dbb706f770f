"""Processes that a dead worker or an earlier run of the node left behind.

Without a cgroup, the kernel kills a job's program with its worker, but not the program's own children. The
kernel gives these orphans to the supervisor, which is their subreaper. The supervisor kills every child that
it did not start.
"""

import contextlib
import os
import signal
from functools import partial
from pathlib import Path

import msgspec
from msgspec import Struct

from aitbc_miner.cgroup.group import Group
from aitbc_miner.util import fs
from aitbc_miner.util.log import events
from aitbc_miner.util.system import process_start

MAX_BOOK = 1 << 20


class WorkerName(Struct, frozen=True):
    """A process identified without doubt: its pid and its start time."""

    pid: int
    start: int


class WorkerBook:
    """The workers that this node has started, in a file that only the supervisor writes.

    A job's record names its worker too, but the agent owns the record and reads the network. Root must not
    signal a process because the agent named it.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._before = self._read()
        # If a slot's worker survived the last run, the slot starts no new worker: its entry must stay.
        self._now = dict(self._before)
        self._written = True

    def _read(self) -> dict[str, WorkerName]:
        try:
            with fs.directory(self._path.parent) as folder:
                read = partial(fs.read_bounded, folder, self._path.name, MAX_BOOK, own=True)
                text = fs.tried_again(read)
            return msgspec.json.decode(text, type=dict[str, WorkerName])
        except FileNotFoundError:
            return {}
        except (OSError, msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            events("supervisor").warning("list of workers not read", path=str(self._path), error=str(error))
            return {}

    def note(self, slot: str, pid: int) -> None:
        """Record a worker that was just started."""
        start = process_start(pid)
        if start is None:
            return
        self._now[slot] = WorkerName(pid, start)
        self._written = False
        with contextlib.suppress(OSError):
            self.write()

    def write(self) -> None:
        """Write the file if an entry changed. Without the file, the next run cannot adopt the workers.

        Raises:
            OSError: the file cannot be written; call again later.
        """
        if not self._written:
            with fs.directory(self._path.parent) as folder:
                fs.write_durably(folder, self._path.name, msgspec.json.encode(self._now), mode=0o600)
            self._written = True

    def knows(self, slot: str | None, pid: int | None, start: int | None) -> bool:
        """Whether an earlier run of the node started process `pid` as the worker of `slot`."""
        known = self._before.get(slot or "")
        return known is not None and (known.pid, known.start) == (pid, start)


def works_in(group: Path | None, pid: int) -> bool:
    """Whether a process is in the cgroup of a slot's worker; without cgroups, whether our user owns it.

    Raises:
        OSError: the kernel cannot tell now. The caller must not take the worker for dead: the worker may go
            on with its job.
    """
    try:
        if group is not None:
            return pid in Group(group / "worker").pids()
        return fs.tried_again(Path(f"/proc/{pid}").stat).st_uid == os.geteuid()
    except OSError as error:
        if fs.may_pass(error):
            raise
        return False


def end_worker(pid: int, start: int) -> None:
    """Kill a worker of an earlier run that cannot be adopted; its job's program dies as well."""
    try:
        fd = os.pidfd_open(pid)
    except OSError:
        return  # the process is gone
    try:
        # Checked while the pidfd is open: the kernel may have given the pid to another process.
        if process_start(pid) == start:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(fd, signal.SIGKILL)
    finally:
        os.close(fd)


def children() -> set[int]:
    """Give the pids of this process's children, zombies included."""
    found: set[int] = set()
    for task in Path("/proc/self/task").iterdir():
        found.update(int(pid) for pid in (task / "children").read_text().split())
    return found


def kill_strangers(own: set[int]) -> None:
    """Kill and reap all children except those in `own`."""
    for pid in children() - own:
        os.kill(pid, signal.SIGKILL)
        # Reaps this pid only: our own children keep their exit status until `Child.reap`.
        if os.waitpid(pid, os.WNOHANG) != (0, 0):
            # Logged after the reap: an orphan that hangs in the kernel is killed again each second.
            events("supervisor").warning("orphan of a job killed", pid=pid)
