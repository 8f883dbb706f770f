"""The mock coordinator's state: the jobs, their nodes, and every report.

A lock protects the state; the returned records (records.py) never change.
"""

import json
import secrets
from bisect import insort
from dataclasses import replace
from typing import Any

from aitbc_miner.util.clock import now
from tools.mock.bootstrap.records import (
    FINAL,
    Handout,
    Job,
    Message,
    Node,
    Progress,
    Report,
    Rules,
    State,
    Verdict,
    fits,
    peek_manifest,
)
from tools.mock.http import Refusal
from tools.mock.watched import Watched


class Ledger(Watched):
    """All nodes and jobs. Any thread may call any method."""

    def __init__(self, rules: Rules) -> None:
        super().__init__()
        self.rules = rules
        self._jobs: dict[str, Job] = {}
        self._queue: list[tuple[int, int, str]] = []
        self._out: set[str] = set()
        self._nodes: dict[str, Node] = {}
        self._tokens: dict[str, str] = {}
        self._keys: dict[str, str] = {}
        self._strays: list[Report] = []

    # What tests look at.

    def job(self, job_id: str) -> Job:
        """Return a job as it is now.

        Raises:
            KeyError: no job has this id.
        """
        with self._now():
            return self._jobs[job_id]

    def jobs(self) -> dict[str, Job]:
        """Return all jobs as they are now, oldest first."""
        with self._now():
            return dict(self._jobs)

    def nodes(self) -> dict[str, Node]:
        """Return all registered nodes."""
        with self._lock:
            return dict(self._nodes)

    def strays(self) -> list[Report]:
        """Return the reports on unknown jobs."""
        with self._lock:
            return list(self._strays)

    # What tests and sources of jobs do.

    def submit(self, manifest: dict[str, Any]) -> str:
        """Queue a job; a job without an id gets an id.

        Raises:
            ValueError: the id is taken.
        """
        with self._change():
            number = len(self._jobs) + 1
            manifest = {"job_id": f"job-{number:04d}", **manifest}
            job_id = str(manifest["job_id"])
            if job_id in self._jobs:
                raise ValueError(f"cannot submit job {job_id!r}: the id is taken")
            return self._add(Job(job_id, number, json.dumps({"job": manifest}).encode(), manifest))

    def submit_raw(self, value: bytes, *, whole_reply: bool = False) -> str:
        """Queue bytes for a pull reply, verbatim as its job or as the whole reply.

        Filters do not apply. The returned id is the job's own id, if the bytes have a free id.
        """
        manifest = peek_manifest(value, whole_reply=whole_reply)
        with self._change():
            number = len(self._jobs) + 1
            job_id = manifest.get("job_id")
            anonymous = not isinstance(job_id, str) or not job_id or job_id in self._jobs
            name = f"raw-{number:04d}" if anonymous else str(job_id)
            reply = value if whole_reply else b'{"job": ' + value + b"}"
            return self._add(Job(name, number, reply, manifest, raw=True, anonymous=anonymous))

    def cancel(self, job_id: str) -> None:
        """Cancel a job: at once if no node runs it, else its node learns of it at the next progress note."""
        with self._change():
            job = replace(self._jobs[job_id], cancelled=True)
            if job.state in {State.QUEUED, State.LEASED}:
                job = self._finish(job, State.FAILED)
            self._jobs[job_id] = job

    def revoke_tokens(self) -> None:
        """Make every node token invalid, as after a restart of the coordinator."""
        with self._change():
            self._tokens.clear()

    def forget_nodes(self) -> None:
        """Forget every node while its token stays valid, so that heartbeats are answered 404."""
        with self._change():
            self._nodes.clear()

    # What the calls do.

    def register(self, node_id: str, payload: dict[str, Any]) -> str:
        """Register a node and return its token."""
        token = secrets.token_urlsafe(24)
        with self._change():
            node = self._nodes.get(node_id, Node(node_id))
            entries = (*node.registrations, Message(now(), payload))
            self._nodes[node_id] = replace(node, registrations=entries)
            self._tokens[token] = node_id
        return token

    def node_of(self, token: str) -> str | None:
        """Return the node of a token."""
        with self._lock:
            return self._tokens.get(token)

    def heartbeat(self, node_id: str, payload: dict[str, Any], at: float) -> None:
        """Record a heartbeat; 404: the node is unknown."""
        with self._change():
            node = self._nodes.get(node_id)
            if node is None:
                raise Refusal(404, "unknown_node", f"node {node_id!r} is not registered")
            self._nodes[node_id] = replace(node, heartbeats=(*node.heartbeats, Message(at, payload)))

    def pull(self, node_id: str, filters: dict[str, Any]) -> Job | None:
        """Hand out the first job in the queue that the node can take."""
        with self._change():
            job = self._first(filters)
            if job is None:
                return None
            at = now()
            job = replace(job, handed=(*job.handed, Handout(at, node_id)))
            if job.state is State.QUEUED:
                self._queue.remove(job.order)
                self._out.add(job.job_id)
                ends = None if job.anonymous else at + self.rules.lease_s
                job = replace(job, state=State.LEASED, node=node_id, lease_ends=ends)
            self._jobs[job.job_id] = job
            return job

    def ack(self, job_id: str, node_id: str, holder: str | None = None) -> None:
        """Acknowledge a lease. The same node may acknowledge again; another node gets 409.

        A node that names the present holder is a node of the same fleet, and takes the job over.
        """
        with self._change():
            if holder is not None and self._jobs.get(job_id):
                self._pass_on(job_id, node_id, holder)
            job = self._held(job_id, node_id)
            self._jobs[job_id] = replace(
                job, state=State.ACKED, lease_ends=None, acks=job.acks + 1, acked_at=job.acked_at or now()
            )

    def note_progress(self, job_id: str, node_id: str, progress: Progress) -> bool:
        """Record a progress note of the node's job; return whether the job is cancelled."""
        with self._change():
            job = self._held(job_id, node_id)
            self._jobs[job_id] = replace(job, progress=(*job.progress, progress))
            return job.cancelled

    def report(self, report: Report) -> Verdict:
        """Record a report; return whether the report is new or known already.

        Raises:
            Refusal: 404, the job is unknown; 409, the job is final; 400, the report is wrong.
        """
        with self._change():
            job = self._jobs.get(report.job_id) or self._anonymous(report)
            if job is None:
                self._strays.append(replace(report, verdict=Verdict.REFUSED, complaint="unknown job"))
                raise Refusal(404, "unknown_job", f"job {report.job_id[:128]!r} is not known")
            verdict, complaint = self._judge(job, report)
            report = replace(report, verdict=verdict, complaint=complaint)
            job = replace(job, reports=(*job.reports, report))
            if verdict is Verdict.ACCEPTED:
                job = self._finish(job, State.DONE if report.kind == "result" else State.FAILED)
                if report.key is not None:
                    self._keys[report.key] = job.job_id
            self._jobs[job.job_id] = job
        if verdict is Verdict.CONFLICT:
            raise Refusal(409, "already_final", complaint)
        if verdict is Verdict.REFUSED:
            raise Refusal(400, "bad_report", complaint)
        return verdict

    # How.

    def _where(self) -> dict[str, str]:
        return {job.job_id: job.state.value for job in self._jobs.values()}

    def _add(self, job: Job) -> str:
        self._jobs[job.job_id] = job
        insort(self._queue, job.order)
        return job.job_id

    def _first(self, filters: dict[str, Any]) -> Job | None:
        if self.rules.repeat:
            return next(iter(self._jobs.values()), None)
        slots, known = filters.get("slots"), filters.get("known", [])
        for _, _, job_id in self._queue:
            job = self._jobs[job_id]
            if job.raw or self.rules.ignore_filters or slots is None:
                return job
            if job_id not in known and any(fits(job.manifest, slot) for slot in slots):
                return job
        return None

    def _pass_on(self, job_id: str, node_id: str, holder: str) -> None:
        job = self._jobs[job_id]
        if job.state is State.ACKED and job.node == holder:
            self._jobs[job_id] = replace(job, node=node_id, handed=(*job.handed, Handout(now(), node_id)))

    def _held(self, job_id: str, node_id: str) -> Job:
        job = self._jobs.get(job_id)
        if job is None or job.node != node_id or job.state not in {State.LEASED, State.ACKED}:
            raise Refusal(409, "not_yours", f"job {job_id[:128]!r} is not leased to {node_id!r}")
        return job

    def _anonymous(self, report: Report) -> Job | None:
        # A failure of a manifest without a usable id cannot name it; it answers the oldest such one there.
        held = (self._jobs[job_id] for job_id in self._out)
        open_ones = [
            job for job in held if job.anonymous and job.node == report.node and report.kind == "fail"
        ]
        return min(open_ones, key=lambda job: job.number, default=None)

    def _judge(self, job: Job, report: Report) -> tuple[Verdict, str]:
        counted = job.accepted
        if report.complaint:
            return Verdict.REFUSED, report.complaint
        if counted and report.key is not None and (counted.key, counted.kind) == (report.key, report.kind):
            return Verdict.DUPLICATE, ""
        if job.state in FINAL:
            return Verdict.CONFLICT, f"job {job.job_id!r} is final: {job.state}"
        if report.node not in {handout.node for handout in job.handed}:
            return Verdict.REFUSED, f"job {job.job_id!r} was never handed to {report.node!r}"
        if report.key is not None and report.key in self._keys:
            return Verdict.REFUSED, f"Idempotency-Key was used for job {self._keys[report.key]!r} already"
        return Verdict.ACCEPTED, ""

    def _finish(self, job: Job, state: State) -> Job:
        if self._jobs[job.job_id].state is State.QUEUED:
            self._queue.remove(job.order)
        self._out.discard(job.job_id)
        return replace(job, state=state, lease_ends=None, finished_at=now())

    def _ends(self, job: Job) -> float | None:
        """Give the time at which a silent node loses the job."""
        if job.state is State.LEASED:
            return job.lease_ends
        if self.rules.silent_s is None or job.acked_at is None:
            return None
        node = self._nodes.get(job.node or "")
        heard = node.heartbeats[-1].at if node and node.heartbeats else 0.0
        return max(job.acked_at, heard) + self.rules.silent_s

    def _expiries(self) -> list[float]:
        at = now()
        ends = (self._ends(self._jobs[job_id]) for job_id in self._out)
        return [max(end - at, 0.0) for end in ends if end is not None]

    def _expire(self) -> None:
        for job_id in list(self._out):
            job = self._jobs[job_id]
            end = self._ends(job)
            if end is not None and end <= now():
                self._out.discard(job_id)
                self._add(replace(job, state=State.QUEUED, node=None, lease_ends=None, acked_at=None))
