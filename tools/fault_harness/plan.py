"""The boundaries of a node's steps, and the sequence of faults of a campaign. Pure.

The sequence follows from the seed alone. The machine decides the moment of each fault, so a second run with
the same seed has the same faults, but not the same interleaving.
"""

import random
from collections.abc import Iterator
from enum import StrEnum
from typing import NamedTuple

from msgspec import Struct


class Whom(StrEnum):
    """The process to kill; `HERE` is the process at the boundary."""

    HERE = "here"
    SUPERVISOR = "supervisor"
    AGENT = "agent"
    HEARTBEAT = "heartbeat"
    WORKER = "worker"
    ALL = "all"


class Side(StrEnum):
    """The side of a step."""

    BEFORE = "before"
    AFTER = "after"


class Boundary(NamedTuple):
    """One side of a named step."""

    step: str
    side: Side


RECORDS = {
    "manifest": "manifest.json of a job is renamed to its name",
    "PULLED": "state.json likewise, in a directory that has no name yet",
    "directory": "the directory of the job gets its name",
    "ACKED": "state.json says so",
    "PREP": "state.json says so",
    "RUNNING": "state.json says so",
    "COLLECTING": "state.json says so",
    "RETRY_WAIT": "state.json says so",
    "outcome": "outcome.json gets its name",
    "UPLOADING": "state.json says so",
    "DONE": "state.json says so",
    "FAILED": "state.json says so",
    "workers": "workers.json, the supervisor's list of its workers, is written anew",
}
PROGRAM = {
    "started": "the worker's child becomes the program; after: the program has made its mark",
    "ended": "the program has ended, and the worker takes its exit status",
}
CALLS = {
    "register": "the coordinator carries out the call; after: its answer is lost",
    "heartbeat": "likewise",
    "pull": "likewise",
    "ack": "likewise",
    "progress": "likewise",
    "result": "likewise",
    "fail": "likewise",
}
STEPS = {**RECORDS, **PROGRAM, **CALLS}
BOUNDARIES = tuple(Boundary(step, side) for step in STEPS for side in Side)

# From here on the program may have run; until the outcome is written, the worker's death is the job's loss.
# An outcome that is whole and has no name yet is named after that death.
LOSING = frozenset(
    {
        Boundary("RUNNING", Side.AFTER),
        *(Boundary(step, side) for step in ("started", "ended", "COLLECTING") for side in Side),
    }
)
ELSEWHERE = (Whom.ALL, Whom.ALL, Whom.SUPERVISOR)
AT_RANDOM = (Whom.SUPERVISOR, Whom.SUPERVISOR, Whom.AGENT, Whom.HEARTBEAT, Whom.WORKER, Whom.WORKER, Whom.ALL)


class Fault(Struct, frozen=True):
    """A kill, at a boundary or at any moment.

    passes: the boundary is first passed so often. pause_s: the time before the fault is prepared. down_s: the
    node stays down for so long if its supervisor is killed.
    """

    number: int
    whom: Whom
    boundary: Boundary | None
    passes: int
    pause_s: float
    down_s: float

    def __str__(self) -> str:
        at = f"{self.boundary.side} {self.boundary.step}" if self.boundary else "at random"
        skip = f", pass {self.passes + 1}" if self.passes else ""
        return f"{self.number:4} kill {self.whom} {at}{skip}"


def faults(seed: str) -> Iterator[Fault]:
    """Yield the faults of a seed without end; see `_round`."""
    rng = random.Random(seed)
    number = 0
    while True:
        for whom, boundary in _round(rng):
            number += 1
            yield Fault(
                number,
                whom,
                boundary,
                passes=rng.choice((0, 0, 0, 1, 2)),
                pause_s=round(rng.uniform(0.0, 0.3), 3),
                down_s=rng.choice((0.0, 0.0, 0.3, 1.0)),
            )


def _round(rng: random.Random) -> Iterator[tuple[Whom, Boundary | None]]:
    """Yield each boundary twice: kill the process at the boundary, and kill the supervisor or all.

    The two kinds alternate, because the supervisor restarts a dying child after ever longer pauses, until a
    new supervisor runs. One kind is half a round ahead, so that half a round has every boundary.
    """
    order = rng.sample(BOUNDARIES, len(BOUNDARIES))
    half = len(order) // 2
    for here, elsewhere in zip(order, order[half:] + order[:half], strict=True):
        yield Whom.HERE, here
        yield rng.choice(ELSEWHERE), elsewhere
        if rng.random() < 0.5:
            yield rng.choice(AT_RANDOM), None
