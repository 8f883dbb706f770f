"""The JSON of the dialect `aitbc-v1`: encodes the node's calls, decodes the coordinator's replies. Pure."""

import base64
import binascii
import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

import msgspec
from msgspec import Struct

from aitbc_miner.coordinator.answers import AITBC, confirm
from aitbc_miner.coordinator.broken_json import find_text
from aitbc_miner.coordinator.http import HttpReply, clean
from aitbc_miner.coordinator.interface import Assignment, Heartbeat, PulledJob, Unreachable
from aitbc_miner.coordinator.job_failure import log_of, message_of
from aitbc_miner.jobs import ManifestError, Outcome, decode_manifest
from aitbc_miner.util import forgiving

MAX_MESSAGE = 2000
LOG_TAIL = 1000
MAX_LISTED = 5000
"""The most jobs of a page; 100 are requested. 20 bytes of a reply cost a kilobyte of memory here."""
_UNREADABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)

ToManifest = Callable[[str, Mapping[str, Any]], dict[str, Any]]
"""Makes a manifest from a job's id and payload. Raises ManifestError."""


class Claims(Struct, frozen=True):
    """The claims of a JSON web token. Only the coordinator can check the token's signature."""

    sub: str = ""
    role: str = ""
    exp: float | None = None


def claims_of(token: str) -> Claims | None:
    """Read the claims of a JSON web token; None for any other text."""
    parts = token.split(".")
    try:
        text = base64.urlsafe_b64decode(parts[1] + "=" * (-len(parts[1]) % 4))
        return forgiving.decode(text, Claims) if len(parts) == 3 else None
    except (IndexError, binascii.Error, ValueError, msgspec.DecodeError, RecursionError):
        return None


def fault_of(token: str, scheme: str) -> str | None:
    """Give the fault that a credential itself shows, by the node's clock; None without a fault."""
    claims = claims_of(token)
    if scheme == "api_key":
        return "is a JSON web token; set coordinator.auth_scheme: bearer" if claims else None
    if claims is None:
        return "is no JSON web token; for an API key set coordinator.auth_scheme: api_key"
    if claims.role != "miner":
        return f"has the role {clean(claims.role, 40)!r}; ask for a token with the role 'miner'"
    if claims.exp is not None and claims.exp < time.time():
        with suppress(ValueError, OverflowError, OSError):
            end = datetime.fromtimestamp(claims.exp, UTC)
            return f"expired at {end:%Y-%m-%d %H:%M} UTC; ask for a new token"
    return None


# --- this node ---------------------------------------------------------------------------------------------


_GPU_KEYS = {"name": "name", "memory_mb": "vram_mb", "uuid": "uuid"}


def registration(
    capabilities: Mapping[str, Any],
    *,
    cuda: Sequence[str],
    models: Sequence[str],
    price: float | None,
    region: str | None,
) -> dict[str, Any]:
    """Describe this node: the keys that the coordinator's matcher reads, and all capabilities.

    `cuda` are the versions of the installed toolkits. The matcher searches their text for a job's version.
    """
    gpus = [{ours: gpu[its] for ours, its in _GPU_KEYS.items() if its in gpu} for gpu in capabilities["gpu"]]
    read: dict[str, Any] = {"gpus": gpus, "models": list(models)}
    if cuda:
        read["cuda"] = " ".join(cuda)
    if price is not None:
        read["price"] = price
    # The coordinator reads 0 as unlimited, and a negative number as no jobs.
    concurrency = sum(slot.get("offers", True) for slot in capabilities["slots"]) or -1
    return {"capabilities": {**capabilities, **read}, "concurrency": concurrency, "region": region}


def heartbeat(report: Heartbeat, arch: str) -> dict[str, Any]:
    """Report the node's state. The coordinator offers jobs to the ONLINE node of the highest reputation."""
    return {
        "inflight": report.inflight,
        "status": "ONLINE" if report.accepting else "DRAINING",
        "metadata": {
            "load": report.load,
            "free_mb": report.free_mb,
            "gpu_free": report.gpu_free,
            "slots": report.slots,
        },
        "architecture": arch,
    }


# --- incoming jobs -----------------------------------------------------------------------------------------


class _State(Struct):
    job_id: str
    state: str = ""


class _Job(_State):
    payload: dict[str, Any] = {}
    expires_at: str | None = None


class _Page(Struct):
    # Raw, so that one unreadable job does not hide the others.
    jobs: list[msgspec.Raw]
    error: Any = None


def pulled_job(reply: HttpReply, bound: int, to_manifest: ToManifest, doing: str) -> PulledJob:
    """Read the reply to a poll.

    Raises:
        Unreachable: the reply has no job with an id.
    """
    why = f"it is larger than {bound // 1024} KiB"
    try:
        if reply.complete:
            return _in_our_words(forgiving.decode(reply.body, _Job), to_manifest)
    except RecursionError:
        why = "it is nested too deeply"
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        why = clean(str(error), 100)
    if job_id := find_text(reply.body, ("job_id",)):
        return _unreadable(job_id, why)
    raise Unreachable(f"cannot {doing}: garbage reply: {why}")


def assigned_jobs(reply: HttpReply, to_manifest: ToManifest, doing: str) -> list[Assignment]:
    """Read a page of the list of this node's jobs.

    Raises:
        Unreachable: the page cannot be read.
    """
    found: list[Assignment] = []
    for raw in _page(reply, doing):
        try:
            job = forgiving.decode(raw, _Job)
        except _UNREADABLE as error:
            if job_id := find_text(raw, ("job_id",)):
                found.append(Assignment(job_id, _unreadable(job_id, clean(str(error), 100))))
        else:
            if job.state in {"", "RUNNING"}:
                left_s = _left(job.expires_at, reply.date)
                found.append(Assignment(job.job_id, _in_our_words(job, to_manifest), left_s))
    return found


def states(reply: HttpReply, doing: str) -> list[tuple[str, str]]:
    """Read the ids and states of a page's jobs. Raises as `assigned_jobs` does."""
    found: list[tuple[str, str]] = []
    for raw in _page(reply, doing):
        try:
            job = forgiving.decode(raw, _State)
        except _UNREADABLE:
            found.append((find_text(raw, ("job_id",)) or "", find_text(raw, ("state",)) or ""))
        else:
            found.append((job.job_id, job.state))
    return found


def _page(reply: HttpReply, doing: str) -> list[bytes]:
    try:
        page = msgspec.json.decode(reply.body, type=_Page)
        # The coordinator reports a fault of its database as 200 with an empty list and an `error`.
        confirm(AITBC.calls["jobs"], {"jobs": page.jobs, "error": page.error}, doing)
        if len(page.jobs) > MAX_LISTED:
            raise Unreachable(f"cannot {doing}: garbage reply: a page of {len(page.jobs)} jobs")
        return [bytes(raw) for raw in page.jobs]
    except _UNREADABLE as error:
        raise Unreachable(f"cannot {doing}: garbage reply: {clean(str(error), 100)}") from error


def oversized_assignment(reply: HttpReply, bound: int) -> Assignment | None:
    """Name the job of a truncated page of one job; None if the id is unreadable, too."""
    job_id = find_text(reply.body, ("jobs[]", "job_id"))
    cause = f"it is larger than {bound // 1024} KiB"
    return Assignment(job_id, _unreadable(job_id, cause)) if job_id else None


def _in_our_words(job: _Job, to_manifest: ToManifest) -> PulledJob:
    """Make a manifest from a job. If that fails, keep the job's JSON with the error."""
    if forgiving.too_deep(job.payload):
        return _unreadable(job.job_id, "it is nested too deeply")
    try:
        made = to_manifest(job.job_id, job.payload)
        return PulledJob(msgspec.json.encode(made), decode_manifest(made))
    except ManifestError as error:
        named = ManifestError(str(error), job.job_id, error.code)
        return PulledJob(msgspec.json.encode({"job_id": job.job_id, "payload": job.payload}), error=named)


def _unreadable(job_id: str, why: str) -> PulledJob:
    raw = msgspec.json.encode({"job_id": job_id})
    return PulledJob(raw, error=ManifestError(f"cannot read the job: {why}", job_id))


def _left(expires_at: str | None, served: float | None) -> float | None:
    """Give the seconds until a job expires. Both times are by the coordinator's clock; ours may be wrong."""
    try:
        ends = datetime.fromisoformat(expires_at or "")
    except ValueError:
        return None
    ends = ends if ends.tzinfo else ends.replace(tzinfo=UTC)
    return None if served is None else ends.timestamp() - served


# --- reports -----------------------------------------------------------------------------------------------


def result(made: Mapping[str, Any], outcome: Outcome) -> dict[str, Any]:
    """Report a job's result. The coordinator pays by the duration in the metrics."""
    return {"result": made, "metrics": metrics(outcome)}


def failure(outcome: Outcome) -> dict[str, Any]:
    """Report a failed job. The message repeats the code, because the client sees only the message."""
    message = f"{outcome.code}: {message_of(outcome)}"
    if tail := clean(log_of(outcome)[-LOG_TAIL:], LOG_TAIL):
        message += f" | the end of its log: {tail}"
    return {
        "error_code": outcome.code,
        "error_message": clean(message, MAX_MESSAGE),
        "metrics": metrics(outcome),
    }


def metrics(outcome: Outcome) -> dict[str, Any]:
    """Give the node's own measurements of a job; the job cannot set any."""
    usage = outcome.usage
    return {
        "duration_ms": max(0, round(usage.wall_s * 1000)),
        "attempt": outcome.attempt,
        "slot": outcome.slot,
        "cpu_s": None if usage.user_s is None else usage.user_s + (usage.system_s or 0.0),
        "peak_memory_bytes": usage.peak_memory_bytes,
        "versions": outcome.versions,
    }


def head(reply: HttpReply) -> dict[str, str | None]:
    """Give the status of a truncated reply; `status` comes before the receipt."""
    return {"status": find_text(reply.body, ("status",))}


def receipt_in(reply: HttpReply) -> object:
    """Give the receipt in the reply to a result, with numbers as Python's `json` decodes them; or None."""
    body = json.loads(reply.body)
    return body.get("receipt") if isinstance(body, dict) else None
