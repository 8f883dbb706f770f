"""The short jobs of a campaign; each run leaves a mark. The sequence follows from the seed alone."""

import random
from typing import Any

from msgspec import Struct

from aitbc_miner.errors import ErrorCode
from tools.lib.marked_jobs import MarkedJobs

# How a job that was handed to its program with the node's own environment would show it.
CLEAN = '[ -z "$LD_PRELOAD$AITBC_FAULT_SOCKET" ] || exit 99; '


class Kind(Struct, frozen=True):
    """A kind of job: its program after the mark, its permitted end (None: success), its frequency.

    attempts: the most starts of the program by its retry policy. The names of the job's marks replace
    `MARKS`.
    """

    name: str
    line: str
    endings: frozenset[ErrorCode | None]
    weight: int
    attempts: int = 1
    artifact: bool = False
    cancel: bool = False


WELL: frozenset[ErrorCode | None] = frozenset({None})
KINDS = (
    Kind("quick", "exit 0", WELL, 6),
    Kind("short", "sleep 0.2", WELL, 4),
    Kind("long", "sleep 1.5", WELL, 3),
    Kind("artifact", 'echo it is done > "$AITBC_OUTPUT_DIR/result.txt"', WELL, 4, artifact=True),
    # What it leaves running must be gone when the job is.
    Kind("forking", "(setsid sleep 600 &) ; sleep 0.1", WELL, 1),
    Kind("failing", "exit 3", frozenset({ErrorCode.E_EXIT}), 4),
    # Fails the first time that it is run.
    Kind("retried", "set -- MARKS; [ $# -ge 2 ]", WELL, 3, attempts=3),
    Kind("cancelled", "sleep 2", frozenset({None, ErrorCode.E_CANCELLED}), 1, cancel=True),
)


class Jobs:
    """Makes the jobs of a seed."""

    def __init__(self, seed: str, marks: MarkedJobs) -> None:
        self._rng = random.Random(seed)
        self._marks = marks
        self.kinds: dict[str, Kind] = {}

    def next(self) -> dict[str, Any]:
        """Make the manifest of the next job."""
        (kind,) = self._rng.choices(KINDS, [kind.weight for kind in KINDS])
        job_id = f"{kind.name}-{len(self.kinds) + 1:05}"
        self.kinds[job_id] = kind
        more: dict[str, Any] = {}
        if kind.artifact:
            more["artifacts"] = [{"path": "result.txt"}]
        if kind.attempts > 1:
            more["retry"] = {"max_attempts": kind.attempts, "on": [ErrorCode.E_EXIT, ErrorCode.E_LOST]}
        line = kind.line.replace("MARKS", f"{self._marks.marks}/{job_id}+*")
        return self._marks.script(job_id, CLEAN + line, **more)
