"""Jobs that mark their runs: each run leaves a file in a directory, named after the job and its pid."""

from pathlib import Path
from typing import Any

import yaml

from tools.lib.local_node import wait_until

PROGRAMS = {"true": "/usr/bin/true", "sleep": "/usr/bin/sleep", "bash": "/usr/bin/bash"}


def allow_programs(allowlist: Path) -> None:
    """Permit jobs to run the commands of tests."""
    for name, path in PROGRAMS.items():
        entry = {"command": {"path": path}, "args": [["-c", ".+"], [".+"]]}
        (allowlist / f"{name}.yaml").write_text(yaml.safe_dump(entry))


class MarkedJobs:
    """The jobs with marks in the directory `marks`; `patience_s` is the longest wait for a job."""

    marks: Path
    patience_s: float

    def script(self, job_id: str, then: str, **more: Any) -> dict[str, Any]:
        """Make the manifest of a job that marks its run and then runs `then`, a line for bash."""
        line = f': > {self.marks}/{job_id}"+$$"; {then}'
        return {"job_id": job_id, "runner": "cli", "command": "bash", "args": ["-c", line], **more}

    def runs(self, job_id: str) -> list[int]:
        """Give the pids of a job's program, one for each run."""
        return [int(path.name.rpartition("+")[2]) for path in self.marks.glob(f"{job_id}+*")]

    def running(self, job_id: str) -> int:
        """Wait until a job has begun and give the pid of its program."""
        pid: int = wait_until(lambda: self.runs(job_id), self.patience_s)[0]
        return pid
