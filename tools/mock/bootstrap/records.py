"""What the mock coordinator knows, as records: jobs, nodes, reports and requests.

They are frozen and replaced, never changed: whoever has one may keep it. Times are seconds of the
boot-time clock.
"""

import json
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Literal

from tools.mock.http import SavedArtifact


class State(StrEnum):
    """Where a job is, as the coordinator sees it."""

    QUEUED = "queued"
    LEASED = "leased"
    ACKED = "acked"
    DONE = "done"
    FAILED = "failed"


FINAL = frozenset({State.DONE, State.FAILED})


class Verdict(StrEnum):
    """What became of a report: counted, known already (200), too late (409), or wrong (400)."""

    ACCEPTED = "accepted"
    DUPLICATE = "duplicate"
    CONFLICT = "conflict"
    REFUSED = "refused"


@dataclass(frozen=True)
class Report:
    """A result or a failure as it arrived. `body` is a result's metadata or the whole failure.

    The files of `artifacts` are kept only when the report was accepted. `complaint` says why it was not.
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
    """One time that a job was given to a node."""

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
    """A job and all that happened to it. `reply` is the pull reply's body, verbatim.

    A job with `anonymous` came from `submit_raw` without an id that could name it; it is handed out once.
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
        """The one report that was counted."""
        return next((report for report in self.reports if report.verdict is Verdict.ACCEPTED), None)

    @property
    def error_code(self) -> str | None:
        """The E_ code of the failure that was counted."""
        report = self.accepted
        return str(report.body.get("error_code")) if report and report.kind == "fail" else None

    @property
    def order(self) -> tuple[int, int, str]:
        """Its place in the queue: priority, then age."""
        priority = self.manifest.get("priority")
        return (-priority if isinstance(priority, int) else 0, self.number, self.job_id)


@dataclass(frozen=True)
class Message:
    """A registration or a heartbeat as it arrived."""

    at: float
    payload: dict[str, Any]


@dataclass(frozen=True)
class Node:
    """A node and what it said of itself."""

    node_id: str
    registrations: tuple[Message, ...] = ()
    heartbeats: tuple[Message, ...] = ()


@dataclass(frozen=True)
class Call:
    """One request: the status that was meant, the fault that spoilt it, whether it had credentials."""

    at: float
    endpoint: str
    status: int
    fault: str | None
    credentials: bool


@dataclass(frozen=True)
class Rules:
    """How jobs are handed out; with `silent_s`, acked ones leave a node without heartbeats so long."""

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
    """Read as much of a raw job as can be read."""
    try:
        decoded = json.loads(value)
    except (ValueError, RecursionError):
        return {}
    if whole_reply and isinstance(decoded, dict):
        decoded = decoded.get("job")
    return decoded if isinstance(decoded, dict) else {}
