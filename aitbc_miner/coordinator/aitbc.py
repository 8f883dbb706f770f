"""The dialect `aitbc-v1`: the AITBC coordinator-api as deployed, with its quirks.

The coordinator has no leases, refuses no report and announces no cancellation. So this client asks for the
list of the node's jobs, stays below the coordinator's limits, and checks a job's state before it repeats its
report.
"""

import platform
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

import msgspec
from msgspec import Struct

from aitbc_miner.config.settings import CoordinatorSection
from aitbc_miner.coordinator import aitbc_wire as wire
from aitbc_miner.coordinator.answers import AITBC, check, confirm, decode_answer, is_own_error
from aitbc_miner.coordinator.http import HttpClient, HttpReply, clean
from aitbc_miner.coordinator.interface import (
    Assignment,
    Assignments,
    Busy,
    CoordinatorError,
    Gone,
    Heartbeat,
    Paced,
    PulledJob,
    PullFilters,
    Standing,
    Told,
    Unauthorized,
)
from aitbc_miner.coordinator.rate_limits import Limits
from aitbc_miner.coordinator.service_result import FileChanged, opened, result_object
from aitbc_miner.coordinator.services import ServiceBook
from aitbc_miner.coordinator.why_idle import Known, why_idle
from aitbc_miner.errors import ErrorCode, MinerError
from aitbc_miner.identity.receipts import Receipt, examine
from aitbc_miner.jobs import Outcome
from aitbc_miner.util import clock

LIMITS = {"register": 50, "heartbeat": 100, "poll": 100, "result": 50, "fail": 50, "jobs": 200, "leave": 50}
"""The calls of each kind that the coordinator accepts from one IP address in 60 s."""
PAGE = 100
MAX_PAGES = 10
MAX_LIST = 8 << 20
MAX_REPLY_TO_RESULT = 24 << 20
"""A receipt repeats the job and its result, which may be 10 MiB each."""
ENVELOPE = 8192
REPORTS_S = 0.5
"""How long a poll waits for reports being sent: the coordinator counts their slots as taken until then."""
MANIFEST = "manifest.json"
MAX_MANIFEST = 64 << 20


class Profile(Struct, frozen=True):
    """The node's settings and properties for this coordinator; `source` is the source of its credential."""

    node_id: str
    source: str
    settings: CoordinatorSection
    cuda: Sequence[str] = ()


class AitbcCoordinator:
    """A coordinator that speaks `aitbc-v1`; `Coordinator` documents each method.

    `credential` is the operator's API key or JSON web token, and serves as the node token as well.
    """

    slowest = 5.0

    def __init__(
        self, http: HttpClient, profile: Profile, credential: str, book: ServiceBook, limits: Limits
    ) -> None:
        self._http = http
        self._profile, self._settings = profile, profile.settings
        self._book = book
        self._limits = limits
        self._credential = credential
        self._miner_id = profile.node_id
        self._bound = self._settings.max_manifest_kb * 1024
        # Jobs whose reports certainly did not count, so that a further report cannot count twice.
        self._unheard: set[str] = set()
        self._fresh: set[str] = set()
        self._on_their_way = 0
        self._arrived = threading.Condition()

    # --- this node -----------------------------------------------------------------------------------------

    def use_token(self, token: str) -> None:
        """Use the operator's credential. Raises MinerError if no header can carry the credential."""
        self._http.set_token(token)
        self._credential = token
        claims = wire.claims_of(token) if self._settings.auth_scheme == "bearer" else None
        # If the token names a miner, the coordinator uses this name and ignores X-Miner-ID.
        self._miner_id = claims.sub if claims and claims.sub else self._profile.node_id

    def register(self, capabilities: dict[str, Any]) -> str:
        """POST /miners/register. The coordinator accepts the session token of its reply nowhere."""
        doing = "register this node"
        try:
            self.use_token(self._credential)
        except MinerError as error:
            raise Unauthorized(
                f"cannot {doing}: the credential from {self._profile.source}: {error}"
            ) from None
        models = sorted({model for service in self._book.services for model in service.models})
        there = self._settings
        payload = wire.registration(
            capabilities, cuda=self._profile.cuda, models=models, price=there.price, region=there.region
        )
        reply = self._call("register", "/miners/register", payload, doing)
        if reply.status == 403:
            raise Unauthorized(f"cannot {doing}: {self._why_denied(reply)}")
        self._answer("register", reply, doing)
        return self._credential

    def leave(self) -> None:
        """DELETE /miners/ID: a node that only falls silent stays listed as free and blocks other nodes."""
        doing = "sign this node off"
        reply = self._call("leave", f"/miners/{_segment(self._miner_id)}", None, doing, method="DELETE")
        if reply.status != 404:
            self._answer("leave", reply, doing)

    def heartbeat(self, report: Heartbeat) -> None:
        """POST /miners/heartbeat: the number of jobs in it replaces the coordinator's own count."""
        doing = "send a heartbeat"
        reply = self._call(
            "heartbeat", "/miners/heartbeat", wire.heartbeat(report, platform.machine()), doing
        )
        self._answer("heartbeat", reply, doing)

    def why_idle(self, standing: Standing) -> list[str]:
        """List the possible reasons why this node gets no jobs."""
        known = Known(
            region=self._settings.region,
            price=self._settings.price,
            cuda=bool(self._profile.cuda),
            models=any(service.models for service in self._book.services),
            services=tuple(service.name for service in self._book.services),
            resting=tuple(self._limits.resting()),
        )
        return why_idle(known, standing)

    # --- incoming jobs -------------------------------------------------------------------------------------

    def pull(self, _filters: PullFilters) -> PulledJob | None:
        """POST /miners/poll: the coordinator assigns the job even if its reply is lost."""
        doing = "pull a job"
        with self._arrived:
            self._arrived.wait_for(lambda: not self._on_their_way, REPORTS_S)
        most = self._bound + ENVELOPE
        reply = self._call("poll", "/miners/poll", {"max_wait_seconds": 0}, doing, most=most)
        self._check("poll", reply, doing)
        if reply.status == 204:
            return None
        job = wire.pulled_job(reply, most, self._book.manifest, doing)
        if job.manifest is not None:
            self._fresh.add(job.manifest.job_id)
        return job

    def ack(self, job_id: str, holder: str | None = None) -> None:
        """Do nothing for a job just pulled; for any other job, check that the list of this node has it."""
        if job_id in self._fresh:
            self._fresh.discard(job_id)
            return
        state = self._state_of(job_id, f"ask for job {clean(job_id, 128)}", holder)
        if state not in {"RUNNING", "QUEUED"}:
            cause = f"the coordinator lists it as {state}" if state else "the coordinator does not list it"
            raise Gone(f"cannot accept job {clean(job_id, 128)}: {cause}", 404)

    def progress(self, _job_id: str, _pct: float, _note: str) -> bool:
        """Do nothing: the coordinator takes no progress. `assignments` shows whether a job was cancelled."""
        return False

    def assignments(self) -> Assignments:
        """POST /miners/ID/jobs, page by page."""
        doing = "ask for the list of our jobs"
        found: list[Assignment] = []
        complete = False
        for reply, is_last in self._pages(doing, "RUNNING"):
            if reply.complete:
                found += wire.assigned_jobs(reply, self._book.manifest, doing)
            else:
                found += filter(None, [wire.oversized_assignment(reply, MAX_LIST)])
            complete = is_last
        return Assignments(found, complete)

    # --- reports -------------------------------------------------------------------------------------------

    # The coordinator ignores keys.
    def result(self, job_id: str, outcome: Outcome, root: Path, key: str, *, again: bool = False) -> Told:  # noqa: ARG002
        """POST /miners/JOB/result. The coordinator counts every result that arrives, repeated ones too."""
        doing = f"deliver the result of job {clean(job_id, 128)}"
        if again and self._settled(job_id, doing, "COMPLETED"):
            return Told()
        made = result_object(_manifest_in(root), outcome, root)
        send = partial(self._call, "result", f"/miners/{job_id}/result", wire.result(made, outcome), doing)
        reply = self._report("result", job_id, doing, lambda: send(most=MAX_REPLY_TO_RESULT))
        return Told(self._receipt(reply, job_id))

    def fail(self, job_id: str, outcome: Outcome, key: str, *, again: bool = False) -> Told:  # noqa: ARG002
        """POST /miners/JOB/fail, but not for a job that its client cancelled: it would count as failed."""
        doing = f"report the failure of job {clean(job_id, 128)}"
        if outcome.code is ErrorCode.E_CANCELLED and self._state_of(job_id, doing) != "RUNNING":
            raise Gone(f"cannot {doing}: its client has cancelled it", 404)
        if again and self._settled(job_id, doing, "FAILED"):
            return Told(beat=True)
        send = partial(self._call, "fail", f"/miners/{_segment(job_id)}/fail", wire.failure(outcome), doing)
        self._report("fail", job_id, doing, send)
        return Told(beat=True)

    def _report(self, call: str, job_id: str, doing: str, send: Callable[[], HttpReply]) -> HttpReply:
        """Send a report; remember the job if the report certainly did not count."""
        with self._arrived:
            self._on_their_way += 1
        self._unheard.discard(job_id)
        reply: HttpReply | None = None
        try:
            reply = send()
            self._answer(call, reply, doing)
        except CoordinatorError as error:
            if isinstance(error, Paced | Busy) if reply is None else _was_not_read(reply):
                self._unheard.add(job_id)
            raise
        finally:
            with self._arrived:
                self._on_their_way -= 1
                self._arrived.notify_all()
        return reply

    def _settled(self, job_id: str, doing: str, state: str) -> bool:
        """Whether a report counted although its reply was lost."""
        return job_id not in self._unheard and self._state_of(job_id, doing) == state

    def _receipt(self, reply: HttpReply, job_id: str) -> Receipt | None:
        try:
            said = wire.receipt_in(reply)
        except (ValueError, RecursionError) as error:
            said = f"unreadable: {clean(str(error), 100)}"
        if said is None:
            return None
        return examine(said, job_id, self._miner_id, self._settings.receipt_keys, clock.wall())

    # --- helpers -------------------------------------------------------------------------------------------

    def _state_of(self, job_id: str, doing: str, miner_id: str | None = None) -> str | None:
        """Give the state of a job in the list of this node; None without the job, as after a cancellation."""
        # The coordinator ignores an unknown state and lists all jobs.
        for reply, _ in self._pages(doing, "ANY", miner_id):
            if reply.complete:
                known = dict(wire.states(reply, doing))
                if job_id in known:
                    return known[job_id]
            elif (found := wire.oversized_assignment(reply, MAX_LIST)) and found.job_id == job_id:
                return "RUNNING"  # a job with a result of this node is never so large
        return None

    def _pages(self, doing: str, state: str, miner_id: str | None = None) -> Iterator[tuple[HttpReply, bool]]:
        """Yield the pages of a list of jobs, the newest first, and for each page whether it is the last.

        A page over `MAX_LIST` bytes is requested again with fewer jobs; a page of one job is truncated.
        """
        path = f"/miners/{_segment(miner_id or self._miner_id)}/jobs"
        size, at = PAGE, 0
        for _ in range(MAX_PAGES):
            query = {"job_status": state, "limit": str(size), "offset": str(at)}
            reply = self._call("jobs", path, None, doing, query=query, most=MAX_LIST)
            self._check("jobs", reply, doing)
            if not reply.complete and size > 1:
                size = max(1, size // 10)
                continue
            last = reply.complete and len(wire.states(reply, doing)) < size
            yield reply, last
            if last:
                return
            at += size

    def _call(
        self,
        endpoint: str,
        path: str,
        payload: Any,
        doing: str,
        *,
        method: str = "POST",
        query: dict[str, str] | None = None,
        most: int = 64 * 1024,
    ) -> HttpReply:
        """Make a call within the limits. Raises Paced, or Busy if the coordinator refuses all the same."""
        self._limits.take(endpoint)
        named = {} if self._settings.auth_scheme == "bearer" else {"X-Miner-ID": self._profile.node_id}
        reply = self._http.call(
            method, path, payload, doing=doing, params=query, headers=named, max_bytes=most
        )
        if reply.status == 429 and is_own_error(reply, AITBC):
            # Retry-After is ignored: the coordinator always sends the same number, and always a wrong one.
            pause_s = self._limits.refused(endpoint)
            raise Busy(
                f"cannot {doing}: the coordinator limits such calls per IP address; the node retries;"
                " if N nodes share this address, set coordinator.share to 1/N on each",
                pause_s,
                429,
            )
        self._limits.answered(endpoint)
        return reply

    def _answer(self, call: str, reply: HttpReply, doing: str) -> None:
        """Raise unless the coordinator confirms the call; a web page with status 200 confirms nothing."""
        self._check(call, reply, doing)
        # An oversized receipt truncates the reply, but the confirmation comes before the receipt.
        confirm(AITBC.calls[call], decode_answer(reply, doing) if reply.complete else wire.head(reply), doing)

    def _check(self, call: str, reply: HttpReply, doing: str) -> None:
        if reply.status == 401:
            raise Unauthorized(f"cannot {doing}: {self._why_denied(reply)}")
        check(reply, AITBC.calls[call], AITBC, doing, self._profile.source)

    def _why_denied(self, reply: HttpReply) -> str:
        """Explain why the coordinator rejects the credential."""
        used, scheme = f"the credential from {self._profile.source}", self._settings.auth_scheme
        if fault := wire.fault_of(self._credential, scheme):
            return f"{used} {fault}"
        if scheme == "api_key":
            return (
                f"the coordinator does not accept {used} as an API key ({reply.status}); ask its operator"
                " to register the key"
            )
        if reply.status == 403:
            remedy = "check proxies and address filters in front of the coordinator"
            return f"the coordinator answers 403 to {used}, although the token's role is miner; {remedy}"
        return (
            f"the coordinator does not accept {used}: it was signed with another key or is invalid; ask the"
            " coordinator's operator for a new token"
        )


def _was_not_read(reply: HttpReply) -> bool:
    """Whether the coordinator rejected a report unread, so that the report cannot count."""
    return reply.status in {401, 422} and is_own_error(reply, AITBC)


def _segment(text: str) -> str:
    return quote(text, safe="")


def _manifest_in(root: Path) -> dict[str, Any]:
    """Read the job's manifest; {} if it is missing or unreadable: then the result has only the artifacts."""
    with suppress(FileChanged, msgspec.DecodeError, UnicodeDecodeError), opened(root, MANIFEST) as file:
        found = msgspec.json.decode(file.read(MAX_MANIFEST))
        return found if isinstance(found, dict) else {}
    return {}
