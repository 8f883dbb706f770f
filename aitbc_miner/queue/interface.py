"""What is to be done later: reports to send again, and jobs to run again, here or on any node of a fleet.

One small interface, a file for each backend: `sqlite` is this node's own, `redis` may be shared.
The records of jobs on disk stay the truth about them; this holds when, how often, and whose turn it is.

A task is waiting, held, or dead. Who holds one has a lease, and keeps it by renewing it. When a lease has run
out, the task is due again for whoever may do it; until somebody has taken it, its old holder may renew it all
the same. A token stands for one holding of a task: with a token that is not the present one nothing can be
done to it. Delays and leases are in seconds, on a clock that is none of the node's: `Database.now`, or the
Redis server's.
"""

from enum import StrEnum
from typing import Annotated, Protocol

from msgspec import Meta, Struct

from aitbc_miner.errors import MinerError


class QueueError(MinerError):
    """The queue cannot be reached, read or written. "cannot X: cause; remedy"."""


class Kind(StrEnum):
    """What is to be done."""

    RUN = "run"
    REPORT = "report"


class Task(Struct, frozen=True):
    """One thing to do, by kind and job.

    `node` is where it comes from; a report is for that node alone, for what it tells of lies there.
    `attempts` counts those that were begun, `max_attempts` how many there may be (0: no end). `payload` is
    what another node needs to take a job over: its manifest as it came. `reason` is why the last one failed.
    """

    kind: Kind
    job_id: str
    node: str
    attempts: int = 1
    max_attempts: Annotated[int, Meta(ge=0)] = 0
    reason: str = ""
    payload: bytes = b""

    @property
    def exhausted(self) -> bool:
        """Whether there may be no further attempt."""
        return 0 < self.max_attempts <= self.attempts


class Claim(Struct, frozen=True):
    """A task that is ours until the lease runs out; `task.attempts` counts this attempt already."""

    task: Task
    token: str


class RetryQueue(Protocol):
    """The queue. Every method may be called from any thread and raises QueueError."""

    shared: bool
    """Whether other nodes see it."""

    def examine(self) -> None:
        """Raise QueueError where it may lose what it has."""
        ...

    def hold(self, task: Task, token: str, lease_s: float) -> bool:
        """Enter a task that we are at work on, or bring up to date and renew what we hold by this token.

        The token is ours to choose, and to record before. False when the task is there under no token or
        another one.
        """
        ...

    def put(self, task: Task, delay_s: float, token: str | None = None) -> bool:
        """Have a task done after a delay, in place of what is there of the same kind and job.

        With a token it is given back: False, and nothing happens, unless that is the present one. Without, it
        must not be held: False when it is. One that is exhausted is dead.
        """
        ...

    def bury(self, task: Task) -> None:
        """Put a task among the dead, whatever is there of the same kind and job."""
        ...

    def due(self, node: str, limit: int) -> list[Task]:
        """Give tasks that this node may claim now, the longest due first.

        These are the waiting ones whose time has come, and runs whose lease has run out and that are not
        exhausted. Those that are exhausted when their lease runs out are dead from then on; `renew` with the
        token of the last holder gives such a one back to him. A report is due only for its own node.
        """
        ...

    def claim(self, kind: Kind, job_id: str, node: str, lease_s: float) -> Claim | None:
        """Take a task that is due; atomic: of several nodes one gets it. None when it is not due for us."""
        ...

    def renew(self, kind: Kind, job_id: str, token: str, lease_s: float) -> bool:
        """Keep a task for so long from now on; False when the token is not the present one."""
        ...

    def remove(self, kind: Kind, job_id: str, token: str | None = None) -> bool:
        """Forget a task: it is done. With a token only if that is the present one; False when it is not.

        Without a token it must not be held by anybody. Removing what is not there is True.
        """
        ...

    def next_due(self, node: str) -> float | None:
        """In how many seconds a task is due for this node, 0 if one is; None when there is none."""
        ...

    def waiting(self, kind: Kind, node: str) -> list[tuple[Task, float]]:
        """Give what waits of one kind and comes from this node, and in how many seconds each is due."""
        ...

    def dead(self) -> list[Task]:
        """Give the dead, the oldest first."""
        ...

    def requeue(self, kind: Kind, job_id: str) -> Task | None:
        """Have a dead task, or one that waits, done now, its attempts counted anew; None: there is none."""
        ...

    def close(self) -> None:
        """Let go of files and connections."""
        ...
