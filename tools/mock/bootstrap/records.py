"""The mock coordinator's records: jobs, nodes, reports and requests.

The ledger replaces records and never changes them. Times are seconds of the boot-time clock.
"""

import json
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Literal

from tools.mock.http import SavedArtifact


class State(StrEnum):
    """The state of a job at the coordinator."""

    QUEUED = "queued"
    LEASED = "leased"
    ACKED = "acked"
    DONE = "done"
    FAILED = "failed"


FINAL = frozenset({State.DONE, State.FAILED})


class Verdict(StrEnum):
    """The answer to a report: counted, known already (200), too late (409), or wrong (400)."""

    ACCEPTED = "accepted"
    DUPLICATE = "duplicate"
    CONFLICT = "conflict"
    REFUSED = "refused"


@dataclass(frozen=True)
class Report:
    """A result or a failure as it arrived. `body` is a result's metadata or the whole failure.

    The files of `artifacts` are kept only if the report was accepted. `complaint`: the reason of a refusal.
    """

    kind: Literal["result", "fail"]
    job_id: str
    node: str
    key: str | None
    body: dict[str, Any]
    at: float
    artifacts: tuple[SavedArtifact, ...] = ()
    verdict: Verdict = Verdict.ACCEPTED
    complaint: str = ""


@dataclass(frozen=True)
class Handout:
    """One hand-out of a job to a node."""

    at: float
    node: str


@dataclass(frozen=True)
class Progress:
    """One progress note."""

    at: float
    pct: float
    note: str
    key: str | None


@dataclass(frozen=True)
class Job:
    """A job and its history. `reply` is the pull reply's body, verbatim.

    anonymous: `submit_raw` made the job from bytes without a usable id; it is handed out once.
    """

    job_id: str
    number: int
    reply: bytes
    manifest: dict[str, Any]
    raw: bool = False
    anonymous: bool = False
    state: State = State.QUEUED
    node: str | None = None
    handed: tuple[Handout, ...] = ()
    lease_ends: float | None = None
    acks: int = 0
    acked_at: float | None = None
    finished_at: float | None = None
    cancelled: bool = False
    progress: tuple[Progress, ...] = ()
    reports: tuple[Report, ...] = ()

    @property
    def accepted(self) -> Report | None:
        """The counted report."""
        return next((report for report in self.reports if report.verdict is Verdict.ACCEPTED), None)

    @property
    def error_code(self) -> str | None:
        """The E_ code of the counted failure."""
        report = self.accepted
        return str(report.body.get("error_code")) if report and report.kind == "fail" else None

    @property
    def order(self) -> tuple[int, int, str]:
        """The place in the queue: by priority, then by age."""
        priority = self.manifest.get("priority")
        return (-priority if isinstance(priority, int) else 0, self.number, self.job_id)


@dataclass(frozen=True)
class Message:
    """A registration or a heartbeat as it arrived."""

    at: float
    payload: dict[str, Any]


@dataclass(frozen=True)
class Node:
    """A node, as it described itself."""

    node_id: str
    registrations: tuple[Message, ...] = ()
    heartbeats: tuple[Message, ...] = ()


@dataclass(frozen=True)
class Call:
    """A request: its status before a fault, the fault, and whether it had credentials."""

    at: float
    endpoint: str
    status: int
    fault: str | None
    credentials: bool


@dataclass(frozen=True)
class Rules:
    """The rules of hand-outs; a node without heartbeats for `silent_s` loses its acked jobs."""

    lease_s: float = 30.0
    silent_s: float | None = None
    ignore_filters: bool = False
    repeat: bool = False


def fits(manifest: dict[str, Any], slot: dict[str, Any]) -> bool:
    """Whether a free slot, as `filters` describes it, can take the job."""
    needs = manifest.get("requirements")
    needs = needs if isinstance(needs, dict) else {}
    runners = slot.get("runners")
    if isinstance(runners, list) and manifest.get("runner") not in runners:
        return False
    if needs.get("gpu") and slot.get("kind") != "gpu":
        return False
    return all(
        _number(needs.get(name)) <= _number(slot.get(name))
        for name in ("cpu_threads", "memory_mb", "vram_mb")
    )


def _number(value: object) -> float:
    return value if isinstance(value, int | float) else 0


def peek_manifest(value: bytes, *, whole_reply: bool) -> dict[str, Any]:
    """Read the readable part of a raw job."""
    try:
        decoded = json.loads(value)
    except (ValueError, RecursionError):
        return {}
    if whole_reply and isinstance(decoded, dict):
        decoded = decoded.get("job")
    return decoded if isinstance(decoded, dict) else {}
