"""What the node says to a coordinator, whatever its dialect, and what can come of saying it.

One small interface, one module for each dialect. The errors are told apart by what the caller does next:
wait, register again, drop the job, or give the report up.
"""

# ruff: noqa: N818  # Unreachable, Busy, Gone say what happened; "Error" behind each would add nothing.

from pathlib import Path
from typing import Any, Protocol

from msgspec import Struct

from aitbc_miner.coordinator.service_result import FileChanged
from aitbc_miner.errors import MinerError
from aitbc_miner.identity.receipts import Receipt
from aitbc_miner.jobs import Manifest, ManifestError, Outcome


class CoordinatorError(MinerError):
    """A call failed. "cannot pull a job: cause"; worth another try later unless `retryable` is false.

    `status` is the HTTP status that says so, where it is one.
    """

    retryable = True

    def __init__(self, message: str, status: int = 0) -> None:
        super().__init__(message)
        self.status = status


class Unreachable(CoordinatorError):
    """No usable answer: refused, unknown name, TLS, too slow, broken off, endless, a redirect, or garbage."""


class Unauthorized(CoordinatorError):
    """The coordinator does not accept the credential. The message names its source, never its value."""


class UnknownNode(CoordinatorError):
    """The coordinator does not know this node (any more): register again."""


class Busy(CoordinatorError):
    """The coordinator asks for patience: `retry_after` seconds, as far as it may; None if it did not say.

    It does so with HTTP `status` 429 or 503.
    """

    def __init__(self, message: str, retry_after: float | None = None, status: int = 503) -> None:
        super().__init__(message, status)
        self.retry_after = retry_after


class Paced(CoordinatorError):
    """Nothing was sent: this node keeps below the coordinator's limits. It may be in `wait_s` seconds."""

    def __init__(self, message: str, wait_s: float) -> None:
        super().__init__(message)
        self.wait_s = wait_s


class _Final(CoordinatorError):
    retryable = False


class Refused(_Final):
    """The coordinator itself says that it will not take this: HTTP `status` 4xx. Final if it goes on so."""


class Gone(_Final):
    """The job is not ours, or is already final there: nothing is left to say about it."""


class ArtifactChanged(FileChanged):
    """A file is no longer the one that was collected: sending again cannot help."""


class Heartbeat(Struct, frozen=True):
    """How this node is: load average of one minute, free memory in MiB, free GPUs, each slot as a dict.

    `inflight` counts the jobs that it is at work on, those that wait for a slot included; `accepting`:
    whether it takes more.
    """

    node_id: str
    load: float
    free_mb: int
    gpu_free: int
    slots: list[dict[str, Any]] = []
    inflight: int = 0
    accepting: bool = True


class PullFilters(Struct, frozen=True):
    """What this node can take now.

    `slots`: the free ones, each `{name, kind, cpu_threads, memory_mb, vram_mb, runners}`.
    `known`: ids of jobs that this node still holds and does not want again.
    """

    slots: list[dict[str, Any]] = []
    known: list[str] = []


class PulledJob(Struct, frozen=True):
    """A job as it came: its JSON (empty if unreadable), and either the manifest or what is wrong with it.

    `error.job_id` is never None: a job that did not even say its name is an `Unreachable` instead, because
    nobody could be told about it.
    """

    raw: bytes
    manifest: Manifest | None = None
    error: ManifestError | None = None


class Assignment(Struct, frozen=True):
    """A job that the coordinator believes us to be at work on; in `left_s` seconds its time there is over."""

    job_id: str
    job: PulledJob
    left_s: float | None = None


class Assignments(Struct, frozen=True):
    """All of them; not `complete` where there are too many to be told."""

    jobs: list[Assignment]
    complete: bool = True


class Told(Struct, frozen=True):
    """What the coordinator says to a report: its receipt, where it gives one.

    `beat`: it does not take the job for ended before the next heartbeat.
    """

    receipt: Receipt | None = None
    beat: bool = False


class Standing(Struct, frozen=True):
    """What this node knows that may explain why it gets no jobs: how many of its jobs have come to what."""

    succeeded: int = 0
    failed: int = 0


class Coordinator(Protocol):
    """A coordinator. Every method raises CoordinatorError; each may be used from several threads."""

    slowest: float
    """By how much the pause between two pulls may grow as long as there is no job."""

    def use_token(self, token: str) -> None:
        """Use a node token that another process got by registering."""
        ...

    def register(self, capabilities: dict[str, Any]) -> str:
        """Make this node known; returns the node token, which later calls of this object use at once."""
        ...

    def leave(self) -> None:
        """Say that this node takes no more jobs and runs none: it stops."""
        ...

    def heartbeat(self, report: Heartbeat) -> None:
        """Say how this node is. UnknownNode: register again."""
        ...

    def assignments(self) -> Assignments | None:
        """Ask what we are believed to be at work on; None where a coordinator does not say."""
        ...

    def why_idle(self, standing: Standing) -> list[str]:
        """Say why there may be no jobs for this node, as far as can be told; each "cause; remedy"."""
        ...

    def pull(self, filters: PullFilters) -> PulledJob | None:
        """Ask for one job; None when there is none."""
        ...

    def ack(self, job_id: str, holder: str | None = None) -> None:
        """Accept a pulled job, or one that another node of our fleet, the `holder`, could not finish.

        Gone: it is no longer ours and must not be run. Refused: it is not had now.
        """
        ...

    def progress(self, job_id: str, pct: float, note: str) -> bool:
        """Say how far a job is, 0 to 100. True: the coordinator wants it cancelled."""
        ...

    def result(self, job_id: str, outcome: Outcome, root: Path, key: str, *, again: bool = False) -> Told:
        """Deliver what a job made; artifacts are read below `root`, its directory.

        `key` is the same for every try; `again`: there may have been one whose answer was lost. Gone counts
        as delivered. Raises FileChanged when a file is not the collected one.
        """
        ...

    def fail(self, job_id: str, outcome: Outcome, key: str, *, again: bool = False) -> Told:
        """Report that a job failed; `key` and `again` as above. Gone counts as delivered."""
        ...
