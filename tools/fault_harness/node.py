"""A node for kills: finds its processes and kills them."""

import os
import signal
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import psutil

from aitbc_miner.cgroup.group import CgroupError, Group
from aitbc_miner.supervisor.adoption import WorkerName
from aitbc_miner.util.system import process_start
from tools.fault_harness.plan import Whom
from tools.lib.local_node import LocalNode, wait_until
from tools.lib.marked_jobs import MarkedJobs, allow_programs

GONE_S = 20.0


class FaultNode(MarkedJobs, LocalNode):
    """A node whose processes load the shim, and whose jobs leave marks in `marks`."""

    def __init__(self, base_url: str, slots: int, environ: Mapping[str, str], **changes: Any) -> None:
        rows = [{"name": f"cpu{i}", "kind": "cpu", "pids_max": 64} for i in range(slots)]
        super().__init__(base_url, rows, keep=True, environ=environ, **changes)
        self._environ["AITBC_FAULT_ROOT"] = str(self.directory)
        self.patience_s = GONE_S
        self.marks = self.directory / "marks"
        self.marks.mkdir()
        self.marks.chmod(0o777)
        allow_programs(self.directory / "allowlist.d")

    @property
    def supervisor(self) -> int:
        """The pid of the supervisor, alive or not."""
        return self.process.pid if self.process else 0

    def own_processes(self) -> list[int]:
        """Find the live processes of the node and its earlier runs, without the programs of jobs."""
        return [pid for pid in psutil.pids() if str(self.config) in _command(pid)]

    def all_processes(self) -> list[int]:
        """Find the live processes of the node and its jobs, whatever their parent."""
        return [pid for pid in psutil.pids() if _belongs(pid, self.directory)]

    def workers(self) -> dict[str, int]:
        """Give the pids of live workers by slot, including earlier runs."""
        try:
            book = msgspec.json.decode(
                self.socket.with_name("workers.json").read_bytes(), type=dict[str, WorkerName]
            )
        except FileNotFoundError:
            return {}
        return {slot: name.pid for slot, name in book.items() if process_start(name.pid) == name.start}

    def find(self, whom: Whom, slot: int = 0) -> int | None:
        """Give the pid of a process of this kind, if it is known now; of the workers any."""
        if whom in {Whom.SUPERVISOR, Whom.ALL}:
            return None if self.process_ended() else self.supervisor
        workers = sorted(self.workers().values())
        if whom is Whom.WORKER:
            return workers[slot % len(workers)] if workers else None
        with suppress(psutil.NoSuchProcess):
            children = psutil.Process(self.supervisor).children()
            others = {child.pid: _listens(child) for child in children if child.pid not in workers}
            # The heartbeat alone serves pages; there may also be children that do one thing and end.
            if sorted(others.values()) == [False, True]:
                return next(pid for pid, listens in others.items() if listens is (whom is Whom.HEARTBEAT))
        return None

    def calling_from(self, port: int) -> int | None:
        """Give the pid of the process with this TCP port."""
        for pid in self.own_processes():
            with suppress(psutil.Error):
                connections = psutil.Process(pid).net_connections("tcp")
                if any(each.laddr.port == port for each in connections):
                    return pid
        return None

    def kill(self, pids: Iterable[int]) -> None:
        """Kill processes and wait until they are gone."""
        pids = list(pids)
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not any(alive(pid) for pid in pids), GONE_S, 0.002)

    def kill_all(self) -> None:
        """Kill every process of the node; programs of jobs may outlive their workers."""
        # The supervisor first, for nobody else starts workers.
        self.kill([self.supervisor])
        while pids := self.own_processes():
            self.kill(pids)

    def remains(self) -> list[str]:
        """Name the node's remaining processes and cgroups, of which none should remain."""
        found = [f"process {pid}: {' '.join(_command(pid))[:100]}" for pid in self.all_processes()]
        group = self.cgroup()
        return [*found, *([f"cgroup {group}"] if group else [])]

    def clean_up(self) -> None:
        """Remove all processes and cgroups in any state of the node; keep the directory."""
        if self.process is not None:
            self.kill_all()
            self.process.wait(GONE_S)
        self.kill(self.all_processes())
        if group := self.cgroup():
            with suppress(CgroupError):
                Group(group).kill()
                Group(group).remove(5.0)


def _command(pid: int) -> list[str]:
    # Not by psutil: it looks at more than this, and this is asked of every process again and again.
    try:
        return os.fsdecode(Path(f"/proc/{pid}/cmdline").read_bytes()).split("\0")
    except OSError:
        return []  # it has gone


def alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _listens(process: psutil.Process) -> bool:
    try:
        return any(each.status == psutil.CONN_LISTEN for each in process.net_connections("tcp"))
    except psutil.Error:
        return False


def _belongs(pid: int, directory: Path) -> bool:
    if pid == os.getpid() or not alive(pid):
        return False
    where = _command(pid)
    with suppress(OSError):
        where.append(str(Path(f"/proc/{pid}/cwd").readlink()))
    return any(str(directory) in text for text in where)
