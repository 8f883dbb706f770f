"""The double's database: its miners and jobs, who gets what, what each report changes; behind one lock."""

import threading
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar

from aitbc_miner.util.clock import now
from tools.mock_aitbc_receipts import Signer
from tools.mock_aitbc_records import CONSTRAINTS, LIMITS, AitbcCall, AitbcJob, Assigned, Miner, Said

T = TypeVar("T")
MAX_LISTED = 100


class Missing(Exception):  # noqa: N818  # says what it is
    """A job or a miner that is not there; the text is what the coordinator says."""


class Broken(Exception):  # noqa: N818
    """What the coordinator answers with a 500 of its own."""


class AitbcLedger:
    """All of it. Every method may be called from any thread."""

    def __init__(self, signer: Signer | None, window_s: float, *, rate_limits: bool) -> None:
        self._signer = signer
        self._window_s = window_s
        self._limited = rate_limits
        self._lock = threading.Condition(threading.RLock())
        self._jobs: dict[str, AitbcJob] = {}
        self._miners: dict[str, Miner] = {}
        self._strays: list[Said] = []
        self._made = 0
        self._receipts = 0
        self._taken: dict[tuple[str, str], deque[float]] = defaultdict(deque)
        self._calls: deque[AitbcCall] = deque(maxlen=100_000)

    # What tests look at and do.

    def job(self, job_id: str) -> AitbcJob:
        """Return a job as the database has it; KeyError without one."""
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

    def strays(self) -> list[Said]:
        """Return the reports on jobs that are not known here."""
        with self._lock:
            return list(self._strays)

    def calls(self, endpoint: str | None = None) -> list[AitbcCall]:
        """Return the requests, of one endpoint or of all, oldest first."""
        with self._lock:
            return [call for call in self._calls if endpoint in {None, call.endpoint}]

    def wait(self, predicate: "Callable[[AitbcLedger], T]", timeout: float) -> T:
        """Return what the predicate returns as soon as that is true; TimeoutError with where each job is."""
        deadline = now() + timeout
        with self._lock:
            while not (value := predicate(self)):
                left = deadline - now()
                if left <= 0:
                    where = {job.job_id[:8]: job.state for job in self._jobs.values()}
                    raise TimeoutError(f"cannot wait longer than {timeout} s; jobs: {where}")
                self._lock.wait(min(left, 0.5))
            return value

    def submit(
        self,
        payload: dict[str, Any],
        constraints: dict[str, Any],
        ttl_seconds: float,
        payment_amount: float | None,
        job_id: str | None,
    ) -> str:
        """Queue a job; its time begins now."""
        with self._change():
            self._made += 1
            job_id = job_id or f"{self._made:032x}"
            at = datetime.now(UTC)
            asked = {**CONSTRAINTS, **constraints}
            ends = at + timedelta(seconds=max(1, ttl_seconds))
            self._jobs[job_id] = AitbcJob(job_id, self._made, payload, asked, at, ends, payment_amount)
            return job_id

    def cancel(self, job_id: str) -> bool:
        """Cancel a job that is not over; its miner is not told, and its slot stays counted."""
        with self._change():
            job = self._read(job_id)
            if job.state not in {"QUEUED", "RUNNING"}:
                return False
            self._jobs[job_id] = replace(job, state="CANCELED", assigned_miner_id=None)
            return True

    def wipe(self, *, jobs: bool) -> None:
        """Begin with an empty database, or one without miners alone."""
        with self._change():
            self._miners.clear()
            if jobs:
                self._jobs.clear()

    # What the calls do.

    def allowed(self, endpoint: str, address: str) -> bool:
        """Whether the window has room for a call, which is counted then; those that are refused are not."""
        most = LIMITS.get(endpoint)
        if not self._limited or most is None:
            return True
        with self._lock:
            taken, at = self._taken[endpoint, address], now()
            while taken and taken[0] <= at - self._window_s:
                taken.popleft()
            if len(taken) >= most:
                return False
            taken.append(at)
            return True

    def forgive(self, endpoint: str, address: str) -> None:
        """Count a call no longer: what does not fit is not let in."""
        with self._lock:
            if taken := self._taken[endpoint, address]:
                taken.pop()

    def note_call(self, call: AitbcCall) -> None:
        """Enter a request."""
        with self._change():
            self._calls.append(call)

    def register(self, miner_id: str, said: dict[str, Any]) -> None:
        """Enter a miner, or what it says anew; jobs that run are none of its business."""
        with self._change():
            old = self._miners.get(miner_id, Miner(miner_id))
            self._miners[miner_id] = replace(
                old,
                status="ONLINE",
                inflight=0,
                concurrency=said.get("concurrency", 1),
                region=said.get("region"),
                capabilities=said["capabilities"],
                registrations=(*old.registrations, Said(now(), miner_id, said)),
            )

    def heartbeat(self, miner_id: str, said: dict[str, Any]) -> None:
        """Believe what a miner says of itself; Missing when it is not known."""
        with self._change():
            old = self._miner(miner_id, "miner not registered")
            self._miners[miner_id] = replace(
                old,
                inflight=said.get("inflight", 0),
                status=said.get("status", "ONLINE"),
                metadata=said.get("metadata") or {},
                heartbeats=(*old.heartbeats, Said(now(), miner_id, said)),
            )

    def leave(self, miner_id: str) -> None:
        """Mark a miner as gone; Missing when it is not known."""
        with self._change():
            self._miners[miner_id] = replace(self._miner(miner_id, "miner not found"), status="OFFLINE")

    def poll(self, miner_id: str) -> AitbcJob | None:
        """Hand out the oldest job that fits; Broken for a miner that is not known."""
        with self._change():
            if miner_id not in self._miners:
                raise Broken(f"miner {miner_id} not found")
            miner = self._miners[miner_id]
            for job_id in [job_id for job_id, job in self._jobs.items() if job.state == "QUEUED"]:
                job = self._read(job_id)
                if (
                    job.state != "QUEUED"
                    or not miner.free
                    or not miner.can(job)
                    or self._withheld(miner, job)
                ):
                    continue
                entry = Assigned(now(), miner_id)
                job = replace(
                    job, state="RUNNING", assigned_miner_id=miner_id, assigned=(*job.assigned, entry)
                )
                self._jobs[job_id] = job
                self._miners[miner_id] = replace(miner, inflight=miner.inflight + 1)
                return job
            return None

    def result(self, job_id: str, miner_id: str, said: dict[str, Any]) -> dict[str, Any] | None:
        """Take a result, whoever sends it and whatever the job is; returns the receipt."""
        with self._change():
            job = self._reported(job_id, miner_id, said)
            duration = (said.get("metrics") or {}).get("duration_ms", 0)
            if isinstance(duration, bool) or not isinstance(duration, int | float):
                raise Broken("could not convert string to float")
            self._receipts += 1
            receipt = self._signer.receipt(job, miner_id, self._receipts, said) if self._signer else None
            self._jobs[job_id] = replace(
                job,
                state="COMPLETED",
                result=said["result"],
                receipt=receipt,
                results=(*job.results, Said(now(), miner_id, said)),
            )
            if miner := self._miners.get(miner_id):
                self._miners[miner_id] = replace(
                    miner, inflight=max(0, miner.inflight - 1), completed=miner.completed + 1
                )
            return receipt

    def fail(self, job_id: str, miner_id: str, said: dict[str, Any]) -> None:
        """Take a failure, whatever the job is; the slot stays counted."""
        with self._change():
            job = self._reported(job_id, miner_id, said)
            self._jobs[job_id] = replace(
                job,
                state="FAILED",
                error=said["error_message"],
                assigned_miner_id=miner_id,
                fails=(*job.fails, Said(now(), miner_id, said)),
            )
            if miner := self._miners.get(miner_id):
                self._miners[miner_id] = replace(miner, failed=miner.failed + 1)

    def listed(self, miner_id: str, state: str, limit: int, offset: int) -> tuple[list[AitbcJob], int]:
        """Return a page of a miner's jobs, the newest first, and how many there are, overdue ones too."""
        with self._lock:
            known = {"QUEUED", "RUNNING", "COMPLETED", "FAILED", "CANCELED", "EXPIRED"}
            found = [
                job
                for job in reversed(self._jobs.values())
                if job.assigned_miner_id == miner_id and (state not in known or job.state == state)
            ]
            return found[offset : offset + min(limit, MAX_LISTED)], len(found)

    def read(self, job_id: str) -> AitbcJob:
        """Return a job as a client sees it, who also finds it expired; Missing without one."""
        with self._change():
            return self._read(job_id)

    # How.

    @contextmanager
    def _change(self) -> Iterator[None]:
        with self._lock:
            try:
                yield
            finally:
                self._lock.notify_all()

    def _miner(self, miner_id: str, otherwise: str) -> Miner:
        if miner_id not in self._miners:
            raise Missing(otherwise)
        return self._miners[miner_id]

    def _read(self, job_id: str) -> AitbcJob:
        job = self._jobs.get(job_id)
        if job is None:
            raise Missing("job not found")
        if job.state in {"QUEUED", "RUNNING"} and datetime.now(UTC) > job.expires_at:
            self._jobs[job_id] = job = replace(job, state="EXPIRED", error="job expired")
        return job

    def _reported(self, job_id: str, miner_id: str, said: dict[str, Any]) -> AitbcJob:
        if job_id not in self._jobs:
            self._strays.append(Said(now(), miner_id, said))
        return self._read(job_id)

    def _withheld(self, miner: Miner, job: AitbcJob) -> bool:
        """Whether somebody else has precedence, alive or not."""
        return any(
            other.status == "ONLINE" and other.free and other.can(job) and other.reputation > miner.reputation
            for other in self._miners.values()
            if other.miner_id != miner.miner_id
        )
