"""Processes that a dead worker, or an earlier run of the node, left behind.

Where there is no cgroup to kill, the program dies with its worker, but what it forked does not: it becomes a
child of the supervisor, which is their subreaper. A child that it did not start has no right to be.
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
    """A process, named so that no other can be meant: its pid and when it started."""

    pid: int
    start: int


class WorkerBook:
    """The workers that this node has started, in a file that only the supervisor writes.

    A job's record names its worker too, but it belongs to the process that reads the network, and whom root
    signals must not be for that one to say.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._before = self._read()
        # A slot whose worker of an earlier run goes on gets no new one, and keeps its entry for the next run.
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
            events("supervisor").warning("worker book not read", path=str(self._path), error=str(error))
            return {}

    def note(self, slot: str, pid: int) -> None:
        """Enter a worker that was just started."""
        start = process_start(pid)
        if start is None:
            return
        self._now[slot] = WorkerName(pid, start)
        self._written = False
        with contextlib.suppress(OSError):
            self.write()

    def write(self) -> None:
        """Bring the file up to date, if it is not. Without it the next run cannot adopt a worker's job.

        Raises:
            OSError: it cannot be written now; to be called again.
        """
        if not self._written:
            with fs.directory(self._path.parent) as folder:
                fs.write_durably(folder, self._path.name, msgspec.json.encode(self._now), mode=0o600)
            self._written = True

    def knows(self, slot: str | None, pid: int | None, start: int | None) -> bool:
        """Whether an earlier run of the node started this process as the worker of this slot."""
        known = self._before.get(slot or "")
        return known is not None and (known.pid, known.start) == (pid, start)


def works_in(group: Path | None, pid: int) -> bool:
    """Whether a process is where a slot's worker is: in its group, or where there is none, our user's.

    Raises:
        OSError: that cannot be told now. Taken for gone, a worker would go on with a job that is called lost.
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
    """Kill a worker of an earlier run that cannot be adopted, and with it the program of its job."""
    try:
        fd = os.pidfd_open(pid)
    except OSError:
        return  # it is gone, as it should be
    try:
        # Looked at when the pidfd is held: the number may belong to somebody else by now.
        if process_start(pid) == start:
            signal.pidfd_send_signal(fd, signal.SIGKILL)
    except ProcessLookupError:
        return
    finally:
        os.close(fd)


def children() -> set[int]:
    """Name the children of this process, zombies included; of all threads, though there is one."""
    found: set[int] = set()
    for task in Path("/proc/self/task").iterdir():
        found.update(int(pid) for pid in (task / "children").read_text().split())
    return found


def kill_strangers(own: set[int]) -> None:
    """Kill and collect all children but our own."""
    for pid in children() - own:
        os.kill(pid, signal.SIGKILL)
        # Only this one: our own must keep their exit status until their pidfd is heard.
        if os.waitpid(pid, os.WNOHANG) != (0, 0):
            # Told when it has gone, for one that hangs in the kernel is killed again each second.
            events("supervisor").warning("orphan of a job killed", pid=pid)
