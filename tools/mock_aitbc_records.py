"""What the double of the AITBC coordinator knows, as records that are replaced and never changed.

Times named `at` are seconds of the boot-time clock; `requested_at` and `expires_at` are of the day, as that
coordinator has them.
"""

from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

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
LIMITS = {
    "register": 50,
    "heartbeat": 100,
    "poll": 100,
    "result": 50,
    "fail": 50,
    "jobs": 200,
    "leave": 50,
    "earnings": 200,
    "submit": 50,
    "cancel": 50,
    "read": 200,
}


@dataclass(frozen=True)
class Said:
    """One report, heartbeat or registration that was taken."""

    at: float
    miner: str
    payload: dict[str, Any]


@dataclass(frozen=True)
class Assigned:
    """One time that a job was handed out."""

    at: float
    miner: str


@dataclass(frozen=True)
class AitbcJob:
    """A job and all that happened to it; `results` and `fails` are those that counted, which is each."""

    job_id: str
    number: int
    payload: dict[str, Any]
    constraints: dict[str, Any]
    requested_at: datetime
    expires_at: datetime
    payment_amount: float | None = None
    state: str = "QUEUED"
    assigned_miner_id: str | None = None
    result: dict[str, Any] | None = None
    error: str | None = None
    receipt: dict[str, Any] | None = None
    assigned: tuple[Assigned, ...] = ()
    results: tuple[Said, ...] = ()
    fails: tuple[Said, ...] = ()


@dataclass(frozen=True)
class Miner:
    """A miner and what it said of itself."""

    miner_id: str
    status: str = "ONLINE"
    inflight: int = 0
    concurrency: int = 1
    region: str | None = None
    capabilities: dict[str, Any] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)
    completed: int = 0
    failed: int = 0
    registrations: tuple[Said, ...] = ()
    heartbeats: tuple[Said, ...] = ()

    @property
    def free(self) -> bool:
        """Whether it has room, as the dispatcher sees it: of 0, any number may run."""
        return self.concurrency == 0 or self.inflight < self.concurrency

    @property
    def reputation(self) -> float:
        """What it says of itself before all else, then what came of its jobs; new ones have 0.5."""
        for said in (self.metadata, self.capabilities):
            if isinstance(said.get("reputation_score"), int | float):
                return float(said["reputation_score"])
        if not self.completed and not self.failed:
            return 0.5
        # As measured, roughly: one failure costs far more than a success brings.
        score: float = 0.5 + 0.17 * (1 - 0.6**self.completed) - 0.19 * min(2, self.failed)
        return max(0.0, score)

    def can(self, job: AitbcJob) -> bool:
        """Whether it has what a job asks for; a bond it never has."""
        asked, has = job.constraints, self.capabilities
        gpus = [gpu for gpu in has.get("gpus") or [] if isinstance(gpu, dict)]
        return all(
            (
                asked["region"] in {None, self.region},
                asked["gpu"] is None or any(gpu.get("name") == asked["gpu"] for gpu in gpus),
                not asked["min_vram_gb"]
                or any(asked["min_vram_gb"] * 1024 <= gpu.get("memory_mb", 0) for gpu in gpus),
                asked["cuda"] is None or asked["cuda"] in str(has.get("cuda") or ""),
                set(asked["models"] or []) <= set(has.get("models") or []),
                asked["max_price"] is None
                or ("price" in has and float(asked["max_price"]) >= float(has["price"])),
                asked["min_reputation"] is None or asked["min_reputation"] <= self.reputation,
                not asked["bond_required"] and (job.payment_amount or 0) < 10,
            )
        )


@dataclass(frozen=True)
class AitbcCall:
    """One request."""

    at: float
    endpoint: str
    status: int
    fault: str | None
    headers: dict[str, str]
