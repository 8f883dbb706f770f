"""The records of the double of the AITBC coordinator: jobs, miners and reports; which miner fits which job.

The ledger replaces records and never changes them. Times named `at` are seconds of the boot-time clock;
`requested_at` and `expires_at` are wall-clock times, as in the AITBC coordinator.
"""

from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any, Literal, TypeGuard

from tools.mock.bootstrap.records import Handout, Message

CONSTRAINTS: dict[str, Any] = {
    "gpu": None,
    "cuda": None,
    "min_vram_gb": None,
    "models": None,
    "region": None,
    "max_price": None,
    "zk_proof_required": False,
    "tee_attestation_required": False,
    "tee_enclave_id": None,
    "min_reputation": None,
    "auto_reinvest_pct": None,
    "bond_required": False,
    "min_bond_amount": None,
    "confidential": False,
    "required_enclave_measurement": None,
}
DECIMALS = ("max_price", "auto_reinvest_pct", "min_bond_amount")
BOND_FROM = 10


class AitbcState(StrEnum):
    """The state of a job, in the words of the AITBC coordinator."""

    QUEUED = "QUEUED"
    RUNNING = "RUNNING"
    COMPLETED = "COMPLETED"
    FAILED = "FAILED"
    CANCELED = "CANCELED"
    EXPIRED = "EXPIRED"


OPEN = frozenset({AitbcState.QUEUED, AitbcState.RUNNING})


@dataclass(frozen=True)
class AitbcReport:
    """A result or failure as it arrived; `request_id`: the caller's id of the request, if any."""

    kind: Literal["result", "fail"]
    job_id: str
    at: float
    miner: str
    body: dict[str, Any]
    request_id: str | None = None


@dataclass(frozen=True)
class AitbcJob:
    """A job and its history. The coordinator accepted all `results` and `fails`, as it never refuses any."""

    job_id: str
    payload: dict[str, Any]
    constraints: dict[str, Any]
    requested_at: datetime
    expires_at: datetime
    client: str = "demo-client"
    payment_amount: float | None = None
    state: AitbcState = AitbcState.QUEUED
    assigned_miner_id: str | None = None
    result: dict[str, Any] | None = None
    error: str | None = None
    receipt: dict[str, Any] | None = None
    assigned: tuple[Handout, ...] = ()
    results: tuple[AitbcReport, ...] = ()
    fails: tuple[AitbcReport, ...] = ()

    @property
    def overdue(self) -> bool:
        """Whether a reader finds the job expired now."""
        return self.state in OPEN and datetime.now(UTC) > self.expires_at

    @property
    def needs_bond(self) -> bool:
        """Whether the job is only for miners with a bond, which the double does not have."""
        return bool(self.constraints["bond_required"]) or (self.payment_amount or 0) >= BOND_FROM

    def view(self) -> dict[str, Any]:
        """Return the job for clients and miners; times are UTC without a suffix."""
        return {
            "job_id": self.job_id,
            "state": self.state,
            "payload": self.payload,
            "assigned_miner_id": self.assigned_miner_id,
            "requested_at": self.requested_at.replace(tzinfo=None).isoformat(),
            "expires_at": self.expires_at.replace(tzinfo=None).isoformat(),
            "error": self.error,
        }


@dataclass(frozen=True)
class Miner:
    """A miner; registrations and heartbeats as they were sent."""

    miner_id: str
    status: str = "ONLINE"
    inflight: int = 0
    concurrency: int = 1
    region: str | None = None
    capabilities: dict[str, Any] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)
    completed: int = 0
    failed: int = 0
    registrations: tuple[Message, ...] = ()
    heartbeats: tuple[Message, ...] = ()

    @property
    def has_room(self) -> bool:
        """Whether the miner may get a further job: a capacity of 0 is no bound, below 0 means no jobs."""
        return self.concurrency == 0 or self.inflight < self.concurrency

    @property
    def reputation(self) -> float:
        """The reputation that the miner reports, else the coordinator's trust."""
        for told in (self.metadata, self.capabilities):
            if is_number(score := told.get("reputation_score")):
                return float(score)
        return self.trust

    @property
    def trust(self) -> float:
        """The trust by the results of its jobs, 0 to 1; close to measured values for jobs of 0.1 s."""
        ended = self.completed + self.failed
        if not ended:
            return 0.5
        best: float = 0.69 - 0.088 / max(1, self.completed) ** 0.8
        return 0.311 + (best - 0.311) * self.completed / ended


def is_number(value: object) -> TypeGuard[int | float]:
    """Whether a value is a JSON number."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def asked_of(constraints: dict[str, Any]) -> dict[str, Any]:
    """Return all constraints of a job, with decimals as text, as the coordinator sends them.

    Raises:
        ValueError: a constraint is unknown; the message names the constraint.
    """
    if unknown := sorted(constraints.keys() - CONSTRAINTS.keys()):
        raise ValueError(f"cannot submit a job with constraint {unknown[0]!r}: there is none of that name")
    asked = {**CONSTRAINTS, **constraints}
    return {
        name: str(value) if name in DECIMALS and value is not None else value for name, value in asked.items()
    }


def fits(job: AitbcJob, miner: Miner) -> bool:
    """Whether the coordinator's matcher accepts the miner for the job."""
    asked, has = job.constraints, miner.capabilities
    gpus = [gpu for gpu in _list(has.get("gpus")) if isinstance(gpu, dict)]
    wanted, vram, cuda = asked["gpu"], asked["min_vram_gb"], has.get("cuda")
    most, price = asked["max_price"], has.get("price")
    return (
        asked["region"] in {None, miner.region}
        and (wanted is None or any(gpu.get("name") == wanted for gpu in gpus))
        and (vram is None or any(vram * 1024 <= _number(gpu.get("memory_mb")) for gpu in gpus))
        and (asked["cuda"] is None or (isinstance(cuda, str) and asked["cuda"] in cuda))
        and all(model in _list(has.get("models")) for model in asked["models"] or ())
        and (most is None or (is_number(price) and float(most) >= float(price)))
        and (asked["min_reputation"] is None or asked["min_reputation"] <= miner.reputation)
        and not job.needs_bond
    )


def _list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def _number(value: Any) -> float:
    return float(value) if is_number(value) else 0.0
