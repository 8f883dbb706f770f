"""The calls of the AITBC coordinator: their parameters, rate limits and forms of errors."""

import json
import re
import threading
from collections import defaultdict, deque
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from email.message import Message
from typing import Any, NamedTuple
from urllib.parse import parse_qsl

from aitbc_miner.util.clock import now
from tools.mock.aitbc.records import is_number
from tools.mock.http import Body, Refusal, Reply, json_reply

MAX_LENGTH = 10 * 1024 * 1024
# A body that does not tell its length is not limited there; here by what a test machine has.
MAX_CHUNKED = 64 * 1024 * 1024
MAX_LIMIT = 100
SCANNERS = re.compile("sqlmap|nmap|nikto|burp", re.IGNORECASE)


class Member(NamedTuple):
    """A member of a body or query: its type, the type's name in errors, and its default."""

    kind: str
    default: Any = None
    required: bool = False
    null: bool = False
    least: int | None = None
    most: int | None = None

    def holds(self, value: object) -> bool:
        """Whether a value is of this type."""
        match self.kind:
            case "dictionary":
                return isinstance(value, dict)
            case "string":
                return isinstance(value, str)
            case "boolean":
                return isinstance(value, bool)
            case "integer":
                return isinstance(value, int) and not isinstance(value, bool)
        return is_number(value)


OBJECT = Member("dictionary", required=True)
METRICS = Member("dictionary", default={})
TEXT = Member("string", required=True)
ANY_TEXT = Member("string", null=True)
MINER = {"capabilities": OBJECT, "concurrency": Member("integer", 1), "region": ANY_TEXT}
Shape = dict[str, Member]


class Route(NamedTuple):
    """A call: its path, its name for faults and tests, its limit a minute, and its parameters."""

    method: str
    path: re.Pattern[str]
    name: str
    limit: int | None
    endpoint: str
    body: Shape | None
    query: Shape


def _route(
    method: str,
    path: str,
    name: str,
    limit: int | None,
    body: Shape | None = None,
    *,
    query: Shape | None = None,
    endpoint: str = "",
) -> Route:
    pattern = re.compile(re.sub(r"\{\w+\}", "([^/]+)", path))
    return Route(method, pattern, name, limit, endpoint or name, body, query or {})


HEARTBEAT = {
    "inflight": Member("integer", 0),
    "status": Member("string", "ONLINE"),
    "metadata": METRICS,
    "architecture": ANY_TEXT,
    "edge_optimized": Member("boolean", null=True),
    "network_latency_ms": Member("number", null=True),
}
POLL = {"max_wait_seconds": Member("integer", 15)}
RESULT = {"result": OBJECT, "metrics": METRICS, "tee_attestation_id": ANY_TEXT, "tee_quote": ANY_TEXT}
FAILURE = {"error_code": TEXT, "error_message": TEXT, "metrics": METRICS}
LIST = {
    "job_status": ANY_TEXT,
    "limit": Member("integer", 20, least=1, most=MAX_LIMIT),
    "offset": Member("integer", 0, least=0),
}
JOB = {
    "payload": OBJECT,
    "constraints": METRICS,
    "ttl_seconds": Member("integer", 900),
    "payment_amount": Member("number", null=True),
}
ROUTES = (
    _route("POST", "/v1/miners/register", "register", 50, MINER),
    _route("POST", "/v1/miners/heartbeat", "heartbeat", 100, HEARTBEAT),
    _route("POST", "/v1/miners/poll", "poll", 100, POLL),
    _route("POST", "/v1/miners/{job_id}/result", "result", 50, RESULT),
    _route("POST", "/v1/miners/{job_id}/fail", "fail", 50, FAILURE),
    _route("POST", "/v1/miners/{miner_id}/jobs", "jobs", 200, query=LIST),
    _route("POST", "/v1/miners/{miner_id}/earnings", "earnings", 200),
    _route("PUT", "/v1/miners/{miner_id}/capabilities", "capabilities", 50, MINER),
    _route("DELETE", "/v1/miners/{miner_id}", "leave", 50),
    _route("POST", "/v1/miners/{miner_id}/jobs/{job_id}/complete", "complete", None),
    _route("POST", "/v1/miners/{miner_id}/jobs/{job_id}/fail", "broken_fail", None),
    _route("POST", "/v1/jobs", "submit", 50, JOB, endpoint="client"),
    _route("GET", "/v1/jobs/{job_id}", "job", 200, endpoint="client"),
    _route("GET", "/v1/jobs/{job_id}/result", "job_result", 200, endpoint="client"),
    _route("POST", "/v1/jobs/{job_id}/cancel", "cancel", 50, endpoint="client"),
)


def role_for(path: str) -> str | None:
    """Return the role that a path requires; None: no role may call the path."""
    if path.startswith("/v1/miners/"):
        return "miner"
    return "client" if path == "/v1/jobs" or path.startswith("/v1/jobs/") else None


class Invalid(Refusal):
    """A 422 with the faults of each field."""

    def __init__(self, *details: tuple[str, str, str]) -> None:
        super().__init__(422, "VALIDATION_ERROR", "Request validation failed")
        self.details = [dict(zip(("field", "message", "code"), detail, strict=True)) for detail in details]


def read_body(body: Body, headers: Message) -> Any:
    """Decode a body if its media type is JSON.

    Raises:
        Refusal: 422, the body is no JSON; 400, the body has a fault that the coordinator does not expect.
    """
    data = body.text(MAX_CHUNKED)
    if not data:
        raise Invalid(("body", "Field required", "missing"))
    if headers.get_content_type() != "application/json":
        return data
    try:
        return json.loads(data)
    except json.JSONDecodeError as error:
        raise Invalid((f"body.{error.pos}", "JSON decode error", "json_invalid")) from error
    except (ValueError, RecursionError) as error:
        raise Refusal(400, "http", "There was an error parsing the body") from error


def check(value: object, shape: Shape, where: str) -> dict[str, Any]:
    """Return the members of a shape, with defaults for absent members.

    Raises:
        Invalid: the error has all faults.
    """
    if not isinstance(value, dict):
        what = "Input should be a valid dictionary or object to extract fields from"
        raise Invalid((where, what, "model_attributes_type"))
    wrong = [
        (f"{where}.{name}", *complaint)
        for name, member in shape.items()
        if (complaint := _complaint(value, name, member))
    ]
    if wrong:
        raise Invalid(*wrong)
    return {name: value.get(name, member.default) for name, member in shape.items()}


def read_query(query: str, shape: Shape) -> dict[str, Any]:
    """Return the members of a query. Raises Invalid as `check`."""
    values: dict[str, Any] = dict(parse_qsl(query))
    for name, text in values.items():
        if name in shape and shape[name].kind == "integer" and re.fullmatch(r"-?[0-9]{1,9}", text):
            values[name] = int(text)
    return check(values, shape, "query")


def _complaint(value: dict[str, Any], name: str, member: Member) -> tuple[str, str] | None:
    if name not in value:
        return ("Field required", "missing") if member.required else None
    found = value[name]
    if found is None and member.null:
        return None
    if not member.holds(found):
        return (f"Input should be a valid {member.kind}", f"{member.kind}_type")
    if member.least is not None and found < member.least:
        return (f"Input should be greater than or equal to {member.least}", "greater_than_equal")
    if member.most is not None and found > member.most:
        return (f"Input should be less than or equal to {member.most}", "less_than_equal")
    return None


def say(value: object, status: int = 200, **headers: str) -> Reply:
    """Return a reply in the coordinator's JSON, which differs from the JSON that it signs in receipts."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    # Half a surrogate pair cannot be sent, but its escape can.
    return replace(json_reply(None, status, **headers), body=text.encode(errors="backslashreplace"))


def error_body(refusal: Refusal, path: str, request_id: str) -> Reply:
    """Give an error in the form of the component that raised it."""
    match refusal:
        case Invalid():
            error = {
                "code": refusal.code,
                "message": refusal.message,
                "status": 422,
                "details": refusal.details,
            }
            body: dict[str, Any] = {"error": error, "timestamp": datetime.now(UTC).isoformat()}
            body["request_id"] = request_id
        case Refusal(code="internal_error"):
            error = {"type": "internal_error", "message": refusal.message, "status_code": 500, "path": path}
            body = {"error": error}
        case _:
            body = {"detail": refusal.message}
    return say(body, refusal.status, **refusal.headers)


@dataclass
class Windows:
    """Counts the calls of each kind and address in the last `window_s` seconds. Thread-safe."""

    window_s: float
    _taken: dict[tuple[str, str], deque[float]] = field(default_factory=lambda: defaultdict(deque))
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def enter(self, name: str, limit: int, address: str) -> None:
        """Count a call. Raises Refusal (429): too many calls; the refused call does not count."""
        with self._lock:
            at, taken = now(), self._taken[name, address]
            while taken and taken[0] <= at - self.window_s:
                taken.popleft()
            if len(taken) >= limit:
                # Whatever the time until one is allowed again.
                raise Refusal(429, "http", "Rate limit exceeded", Retry_After="60")
            taken.append(at)
