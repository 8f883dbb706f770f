"""The database of the double of the AITBC coordinator: chooses the miner of a job, and applies reports.

As the AITBC coordinator, the ledger checks neither who reports, nor whether the miner has the job, nor its
end.
"""

import math
import secrets
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

from aitbc_miner.util.clock import now
from tools.mock.aitbc.records import OPEN, AitbcJob, AitbcReport, AitbcState, Miner, asked_of, fits
from tools.mock.bootstrap.records import Handout, Message
from tools.mock.http import Refusal
from tools.mock.watched import Watched

Sign = Callable[[AitbcJob, AitbcReport], dict[str, Any]]
"""Makes the receipt of a result."""


class AitbcLedger(Watched):
    """All miners and jobs. Any thread may call any method."""

    def __init__(self, sign: Sign | None) -> None:
        super().__init__()
        self._sign = sign
        self._jobs: dict[str, AitbcJob] = {}
        self._miners: dict[str, Miner] = {}
        self._strays: list[AitbcReport] = []

    # What tests look at, and do.

    def job(self, job_id: str) -> AitbcJob:
        """Return a job as in the database, expired or not. Raises KeyError: the job is unknown."""
        with self._lock:
            return self._jobs[job_id]

    def jobs(self) -> dict[str, AitbcJob]:
        """Return all jobs, oldest first."""
        with self._lock:
            return dict(self._jobs)

    def miners(self) -> dict[str, Miner]:
        """Return all miners."""
        with self._lock:
            return dict(self._miners)

    def strays(self) -> list[AitbcReport]:
        """Return the reports on unknown jobs."""
        with self._lock:
            return list(self._strays)

    def forget_miners(self) -> None:
        """Forget all miners, but keep the jobs."""
        with self._change():
            self._miners.clear()

    def wipe(self) -> None:
        """Begin with an empty database; keep the lists of calls and of reports on unknown jobs."""
        with self._change():
            self._miners.clear()
            self._jobs.clear()

    # What clients do.

    def submit(self, job_id: str | None, ttl_seconds: float, constraints: dict[str, Any], **job: Any) -> str:
        """Queue a job, whose lifetime begins now; `job` has the other fields of `AitbcJob`.

        Raises:
            ValueError: the id is taken, or a constraint is unknown.
        """
        asked, at = asked_of(constraints), datetime.now(UTC)
        job_id = job_id or secrets.token_hex(16)
        ends = at + timedelta(seconds=max(1, ttl_seconds))
        with self._change():
            if job_id in self._jobs:
                raise ValueError(f"cannot submit job {job_id!r}: the id is taken")
            self._jobs[job_id] = AitbcJob(
                job_id=job_id, constraints=asked, requested_at=at, expires_at=ends, **job
            )
        return job_id

    def read(self, job_id: str) -> AitbcJob:
        """Return a job as a client sees it; the call also expires the job. 404: the job is unknown."""
        with self._change():
            return self._read(job_id)

    def cancel(self, job_id: str) -> bool:
        """Cancel a job that has not ended; its miner learns nothing, and its place stays taken."""
        with self._change():
            job = self._found(job_id)
            if job.state in OPEN:
                self._jobs[job_id] = replace(job, state=AitbcState.CANCELED, assigned_miner_id=None)
            return job.state in OPEN

    # What miners do.

    def register(self, miner_id: str, told: dict[str, Any], payload: dict[str, Any]) -> None:
        """Register a miner, or register it again, by `payload` (parsed: `told`). Its jobs do not change."""
        with self._change():
            old = self._miners.get(miner_id, Miner(miner_id))
            entries = (*old.registrations, Message(now(), payload))
            self._miners[miner_id] = replace(old, **told, status="ONLINE", inflight=0, registrations=entries)

    def heartbeat(self, miner_id: str, told: dict[str, Any], payload: dict[str, Any]) -> None:
        """Record a heartbeat; 404: the miner is unknown."""
        with self._change():
            miner = self._miner(miner_id)
            kept = {name: told[name] for name in ("inflight", "status", "metadata")}
            beats = (*miner.heartbeats, Message(now(), payload))
            self._miners[miner_id] = replace(miner, **kept, heartbeats=beats)

    def leave(self, miner_id: str) -> None:
        """Mark a miner as gone; 404: the miner is unknown."""
        with self._change():
            self._miners[miner_id] = replace(self._miner(miner_id), status="OFFLINE")

    def poll(self, miner_id: str) -> AitbcJob | None:
        """Hand out the oldest job that fits the miner; 500: the miner is unknown."""
        with self._change():
            miner = self._miners.get(miner_id)
            if miner is None:
                raise Refusal(500, "internal_error", "An unexpected error occurred")
            if not miner.has_room:
                return None
            waiting = [job.job_id for job in self._jobs.values() if job.state is AitbcState.QUEUED]
            for job_id in waiting:
                job = self._read(job_id)
                if job.state is AitbcState.QUEUED and fits(job, miner) and not self._withheld(job, miner):
                    return self._assign(job, miner)
            return None

    def result(self, report: AitbcReport) -> dict[str, Any] | None:
        """Accept a result and return its receipt.

        Raises:
            Refusal: 404, the job is unknown; 500, its duration is no number.
        """
        with self._change():
            job = self._reported(report)
            _check_duration(report.body.get("metrics", {}).get("duration_ms"))
            receipt = self._sign(job, report) if self._sign else None
            job = replace(job, result=report.body["result"], receipt=receipt, results=(*job.results, report))
            self._jobs[job.job_id] = replace(job, state=AitbcState.COMPLETED)
            if miner := self._miners.get(report.miner):
                left = max(0, miner.inflight - 1)
                self._miners[report.miner] = replace(miner, inflight=left, completed=miner.completed + 1)
            return receipt

    def fail(self, report: AitbcReport) -> None:
        """Accept a failure and keep only its message; the place stays taken. 404: the job is unknown."""
        with self._change():
            job = self._reported(report)
            job = replace(job, error=report.body["error_message"], fails=(*job.fails, report))
            self._jobs[job.job_id] = replace(job, state=AitbcState.FAILED, assigned_miner_id=report.miner)
            if miner := self._miners.get(report.miner):
                self._miners[report.miner] = replace(miner, failed=miner.failed + 1)

    def complete(self, job_id: str) -> None:
        """Carry out a broken call: complete a job, and at the second time fail the job."""
        with self._change():
            job = self._found(job_id)
            done = job.state is AitbcState.COMPLETED
            self._jobs[job_id] = replace(job, state=AitbcState.FAILED if done else AitbcState.COMPLETED)
        if done:
            raise Refusal(400, "http", "job already completed")

    def assigned_to(self, miner_id: str, state: str | None) -> list[AitbcJob]:
        """Return the jobs of a miner in a state, the newest first; an unknown state returns all jobs."""
        with self._lock:
            mine = [job for job in self._jobs.values() if job.assigned_miner_id == miner_id]
        any_state = state not in set(AitbcState)
        return [job for job in reversed(mine) if any_state or job.state == state]

    # How.

    def _where(self) -> dict[str, str]:
        return {job.job_id: job.state.value for job in self._jobs.values()}

    def _miner(self, miner_id: str) -> Miner:
        if miner_id not in self._miners:
            raise Refusal(404, "http", "miner not registered")
        return self._miners[miner_id]

    def _found(self, job_id: str) -> AitbcJob:
        if job_id not in self._jobs:
            raise Refusal(404, "http", "job not found")
        return self._jobs[job_id]

    def _read(self, job_id: str) -> AitbcJob:
        # Nobody sweeps there: a job expires when somebody looks.
        job = self._found(job_id)
        if job.overdue:
            self._jobs[job_id] = job = replace(job, state=AitbcState.EXPIRED, error="job expired")
        return job

    def _reported(self, report: AitbcReport) -> AitbcJob:
        if report.job_id not in self._jobs:
            self._strays.append(report)
        return self._read(report.job_id)

    def _withheld(self, job: AitbcJob, miner: Miner) -> bool:
        """Whether a better miner could take the job, alive or only left in the database."""
        return any(
            other.status == "ONLINE"
            and other.reputation > miner.reputation
            and other.has_room
            and fits(job, other)
            for other in self._miners.values()
        )

    def _assign(self, job: AitbcJob, miner: Miner) -> AitbcJob:
        entries = (*job.assigned, Handout(now(), miner.miner_id))
        job = replace(job, state=AitbcState.RUNNING, assigned_miner_id=miner.miner_id, assigned=entries)
        self._jobs[job.job_id] = job
        self._miners[miner.miner_id] = replace(miner, inflight=miner.inflight + 1)
        return job


def broken() -> Refusal:
    """Return an internal error in the form of the AITBC coordinator."""
    return Refusal(500, "http", "Internal server error")


def _check_duration(given: Any) -> None:
    try:
        number = 0.0 if given is None else float(given)
    except (TypeError, ValueError):
        number = math.nan
    if math.isnan(number):
        raise Refusal(500, "internal_error", "An unexpected error occurred")
