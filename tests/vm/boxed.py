"""The installed node with its jobs in the sandbox, as it is packaged."""

from pathlib import Path
from typing import Any

from tests.vm.machine import Machine
from tools.lib.local_node import wait_until


class BoxedMachine(Machine):
    """A machine whose jobs can leave their marks nowhere but in their own directory."""

    def configure(self, **changes: Any) -> None:
        """Write the configuration, see `Machine`."""
        super().configure(**{"sandbox": {"mode": "required"}, **changes})

    def script(self, job_id: str, then: str, **more: Any) -> dict[str, Any]:
        """Make the manifest of a job that marks its run and then does `then`, a line for bash."""
        return super().script(job_id, then, **more) | {"args": ["-c", f": > ran+$$; {then}"]}

    def runs(self, job_id: str) -> list[int]:
        """Give the pids of a job's program as the job knows them, one for each time that it was run."""
        marks = (self.jobs / job_id / "work").glob("ran+*")
        return [int(path.name.rpartition("+")[2]) for path in marks]

    def running(self, job_id: str) -> int:
        """Wait until a job has begun and give the pid of its program."""
        (inner,) = wait_until(lambda: self.runs(job_id), self.patience_s)
        slot = next(row.slot.offer.name for row in self.now().slots if row.slot.job_id == job_id)
        pids = map(int, (self.slot_group(slot) / "job" / "cgroup.procs").read_text().split())
        return next(pid for pid in pids if pid_within(pid) == inner)


def pid_within(pid: int) -> int | None:
    """Give the pid that a process has in its own namespace."""
    try:
        status = Path("/proc", str(pid), "status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    line = next(line for line in status.splitlines() if line.startswith("NSpid:"))
    own = line.split()[1:]
    return int(own[-1]) if len(own) > 1 else None
