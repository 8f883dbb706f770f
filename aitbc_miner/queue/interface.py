"""The retry queue: reports to send again, and jobs to run again, on this node or on any node of a fleet.

Each backend has one file: `sqlite` belongs to this node, nodes may share `redis`. The records on disk stay
the truth about the jobs; the queue holds only the time, the number of attempts and the node.

A task is waiting, held, or dead. The holder has a lease and must renew the lease. When a lease has run out,
the task is due again; until a node claims the task, the old holder may still renew the lease. A token
identifies one holding of a task: nobody can change a held task with a wrong token. Delays and leases are in
seconds, by a clock that nobody sets: `Database.now`, or the clock of the Redis server.
"""

from enum import StrEnum
from typing import Annotated, Protocol

from msgspec import Meta, Struct

from aitbc_miner.errors import MinerError


class QueueError(MinerError):
    """The node cannot reach, read or write the queue. "cannot X: cause; remedy"."""


class Kind(StrEnum):
    """The work of a task: run a job, or send its report."""

    RUN = "run"
    REPORT = "report"


class Task(Struct, frozen=True):
    """A run or a report of one job; kind and job identify the task.

    `node` entered the task. Only the same node may send a report, because the outcome lies on its disk.
    `attempts` counts the attempts begun, `max_attempts` is their limit (0: none). `payload` is the data for a
    node that takes the job over. `reason` says why the last attempt failed.
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
        """Whether the task has used up its attempts."""
        return 0 < self.max_attempts <= self.attempts


class Claim(Struct, frozen=True):
    """A task that we hold until the lease runs out; `task.attempts` counts the present attempt already."""

    task: Task
    token: str


class RetryQueue(Protocol):
    """The queue. Any thread may call the methods. Each method raises QueueError."""

    shared: bool
    """Whether several nodes use the queue."""

    def examine(self) -> None:
        """Raise QueueError if the queue may lose tasks."""

    def hold(self, task: Task, token: str, lease_s: float) -> bool:
        """Enter a task as held by us, or update the task and renew our lease.

        The caller chooses the token, and records the token before the call. False, and no change, if the
        queue has the task with a different token or with none.
        """

    def put(self, task: Task, delay_s: float, token: str | None = None) -> bool:
        """Enter a task to be done after a delay; replaces an entry of the same kind and job.

        With a token, gives a held task back. False, and no change, if the token is wrong, or if the task is
        held and there is no token. An exhausted task is dead at once.
        """

    def bury(self, task: Task) -> None:
        """Enter a task as dead; replaces an entry of the same kind and job."""

    def due(self, node: str, limit: int) -> list[Task]:
        """Give at most `limit` tasks that the node may claim now, the longest due first.

        Due are waiting tasks after their delay, and runs with an expired lease and attempts left. A run with
        an expired lease and no attempts left is dead; the last holder can revive the run by `renew`. A report
        is due for its own node only.
        """

    def claim(self, kind: Kind, job_id: str, node: str, lease_s: float) -> Claim | None:
        """Hold a due task; if several nodes try, only the first gets it. None if not due for `node`."""

    def renew(self, kind: Kind, job_id: str, token: str, lease_s: float) -> bool:
        """Make a lease end `lease_s` from now; False if the token is wrong."""

    def remove(self, kind: Kind, job_id: str, token: str | None = None) -> bool:
        """Remove a finished task; True also if the queue has no such task.

        False, and no change, if the token is wrong, or if the task is held and there is no token.
        """

    def waiting(self, kind: Kind, node: str) -> list[tuple[Task, float]]:
        """Give the waiting tasks of one kind that `node` entered, with the seconds until each is due."""

    def dead(self) -> list[Task]:
        """Give the dead tasks, the oldest first."""

    def requeue(self, kind: Kind, job_id: str) -> Task | None:
        """Make a dead or waiting task due now, with no attempts counted; None if the queue has neither."""

    def close(self) -> None:
        """Close files and connections."""
