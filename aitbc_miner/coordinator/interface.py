"""The calls of the node to a coordinator of any dialect, and their errors.

There is one error class for each reaction of the caller: wait, register again, drop the job, or give up the
report.
"""

# ruff: noqa: N818  # Unreachable, Busy, Gone name the cause; a suffix "Error" would add nothing.

from pathlib import Path
from typing import Any, Protocol

from msgspec import Struct

from aitbc_miner.coordinator.service_result import FileChanged
from aitbc_miner.errors import MinerError
from aitbc_miner.identity.receipts import Receipt
from aitbc_miner.jobs import Manifest, ManifestError, Outcome


class CoordinatorError(MinerError):
    """A call failed ("cannot pull a job: CAUSE"). Except for Refused and Gone, trying again may help.

    `status` is the HTTP status of the reply, 0 without a reply.
    """

    def __init__(self, message: str, status: int = 0) -> None:
        super().__init__(message)
        self.status = status


class Unreachable(CoordinatorError):
    """No usable reply: connection refused, unknown name, TLS fault, time-out, redirect, or garbage."""


class Unauthorized(CoordinatorError):
    """The coordinator rejects the credential. The message names the credential's source, never its value."""


class UnknownNode(CoordinatorError):
    """The coordinator does not know this node: the caller registers again."""


class Busy(CoordinatorError):
    """The coordinator answered 429 or 503; `retry_after` is the pause in seconds, None if it named none."""

    def __init__(self, message: str, retry_after: float | None = None, status: int = 503) -> None:
        super().__init__(message, status)
        self.retry_after = retry_after


class Paced(CoordinatorError):
    """The node sent nothing, to stay below the coordinator's limits; it may call in `wait_s` seconds."""

    def __init__(self, message: str, wait_s: float) -> None:
        super().__init__(message)
        self.wait_s = wait_s


class Refused(CoordinatorError):
    """The coordinator itself rejects the content of the call (4xx). Final if it repeats the answer."""


class Gone(CoordinatorError):
    """The coordinator gave the job to another node or has closed the job: the node need not report it."""


class ArtifactChanged(FileChanged):
    """An artifact has changed since the node collected it: sending again cannot help."""


class Heartbeat(Struct, frozen=True):
    """The node's state: load average of one minute, free memory in MiB, free GPUs, each slot as a dict.

    `inflight` counts running jobs and jobs that wait for a slot. `accepting` is whether the node takes more.
    """

    node_id: str
    load: float
    free_mb: int
    gpu_free: int
    slots: list[dict[str, Any]] = []
    inflight: int = 0
    accepting: bool = True


class PullFilters(Struct, frozen=True):
    """The work that this node can take now.

    `slots` are the free slots, each `{name, kind, cpu_threads, memory_mb, vram_mb, runners}`.
    `known` are the ids of jobs that this node already has and does not want again.
    """

    slots: list[dict[str, Any]] = []
    known: list[str] = []


class PulledJob(Struct, frozen=True):
    """A pulled job: its JSON (empty if unreadable), and either its manifest or the error in the JSON.

    `error.job_id` is never None: the node cannot report a job without an id, so the pull raises Unreachable.
    """

    raw: bytes
    manifest: Manifest | None = None
    error: ManifestError | None = None


class Assignment(Struct, frozen=True):
    """A job in the coordinator's list of this node's jobs. It expires there in `left_s` seconds."""

    job_id: str
    job: PulledJob
    left_s: float | None = None


class Assignments(Struct, frozen=True):
    """The coordinator's list of this node's jobs; `complete` is false if the list was too long to read."""

    jobs: list[Assignment]
    complete: bool = True


class Told(Struct, frozen=True):
    """The coordinator's reply to a report: a receipt, if the coordinator issues receipts.

    If `beat` is true, the coordinator counts the job as running until the next heartbeat.
    """

    receipt: Receipt | None = None
    beat: bool = False


class Standing(Struct, frozen=True):
    """How many jobs of this node succeeded and failed, which may explain why the node gets no jobs."""

    succeeded: int = 0
    failed: int = 0


class Coordinator(Protocol):
    """A coordinator. Every method raises CoordinatorError; several threads may call the same method."""

    slowest: float
    """The factor by which the pause between two pulls may grow while there are no jobs."""

    def use_token(self, token: str) -> None:
        """Use the node token that another process got by registering."""

    def register(self, capabilities: dict[str, Any]) -> str:
        """Register this node. Return the node token, which later calls of this object use at once."""

    def leave(self) -> None:
        """Sign off: this node takes no more jobs and runs none."""

    def heartbeat(self, report: Heartbeat) -> None:
        """Report the node's state. Raises UnknownNode if the node must register again."""

    def assignments(self) -> Assignments | None:
        """Ask for the coordinator's list of this node's jobs; None if the dialect has no such call."""

    def why_idle(self, standing: Standing) -> list[str]:
        """List the possible reasons why this node gets no jobs, each as "cause; remedy"."""

    def pull(self, filters: PullFilters) -> PulledJob | None:
        """Ask for one job; None if the coordinator has none."""

    def ack(self, job_id: str, holder: str | None = None) -> None:
        """Accept a pulled job, or a job that another node of the fleet, the `holder`, did not finish.

        Raises Gone if the node must not run the job, Refused if the node cannot have the job now.
        """

    def progress(self, job_id: str, pct: float, note: str) -> bool:
        """Report a job's progress, 0 to 100. True if the coordinator wants the job cancelled."""

    def result(self, job_id: str, outcome: Outcome, root: Path, key: str, *, again: bool = False) -> Told:
        """Deliver a job's result, with the artifacts below `root`, the job's directory.

        `key` is the same for every try. `again` is whether an earlier try may have arrived although its reply
        was lost. Gone counts as delivered. Raises FileChanged if a file has changed since its collection.
        """

    def fail(self, job_id: str, outcome: Outcome, key: str, *, again: bool = False) -> Told:
        """Report that a job failed; `key` and `again` as for `result`. Gone counts as delivered."""
