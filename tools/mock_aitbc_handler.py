"""The double's HTTP side: authentication, the four shapes of errors, and one method for each call."""

import base64
import binascii
import hashlib
import hmac
import json
import re
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from aitbc_miner.util.clock import now
from tools.mock_aitbc_ledger import AitbcLedger, Broken, Missing
from tools.mock_aitbc_records import CONSTRAINTS, AitbcCall, AitbcJob
from tools.mock_faults import Faults
from tools.mock_server import Boundary, FaultyHandler
from tools.mock_wire import Body, Refusal, Reply, json_reply

MAX_BODY = 10 << 20
SCANNERS = re.compile("sqlmap|nmap|nikto|burp", re.IGNORECASE)


# Its name for limits and faults, the method here, the role that it needs; `*` stands for an id.
_ROUTES = (
    ("health", "_health", "", r"GET /health"),
    ("page", "_state", "", r"GET /"),
    ("register", "_register", "miner", r"POST /v1/miners/register"),
    ("heartbeat", "_heartbeat", "miner", r"POST /v1/miners/heartbeat"),
    ("poll", "_poll", "miner", r"POST /v1/miners/poll"),
    ("result", "_result", "miner", r"POST /v1/miners/[*]/result"),
    ("fail", "_fail", "miner", r"POST /v1/miners/[*]/fail"),
    ("jobs", "_list", "miner", r"POST /v1/miners/[*]/jobs"),
    ("earnings", "_earnings", "miner", r"POST /v1/miners/[*]/earnings"),
    ("unused", "_broken", "miner", r"POST /v1/miners/[*]/jobs/[^/]+/(complete|fail)"),
    ("leave", "_register", "miner", r"PUT /v1/miners/[*]/capabilities"),
    ("leave", "_leave", "miner", r"DELETE /v1/miners/[*]"),
    ("submit", "_submit", "client", r"POST /v1/jobs"),
    ("cancel", "_cancel", "client", r"POST /v1/jobs/[*]/cancel"),
    ("read", "_read", "client", r"GET /v1/jobs/[*](/result)?"),
)


@dataclass(frozen=True)
class AitbcDesk:
    """What every request needs."""

    ledger: AitbcLedger
    faults: Faults
    keys: tuple[str, ...]
    jwt_secret: str
    verbose: bool
    boundary: Boundary
    stopping: threading.Event = field(default_factory=threading.Event)


class Invalid(Exception):  # noqa: N818  # says what it is
    """A 422: which field of the body, and what is wrong with it."""

    def __init__(self, name: str, message: str) -> None:
        super().__init__(message)
        self.name = name


class AitbcHandler(FaultyHandler):
    """One connection; `desk` is set in a subclass, because socketserver makes the instances."""

    desk: AitbcDesk

    # Every request.

    def serve(self, method: str) -> None:
        """Answer a request."""
        at = now()
        target = urlsplit(self.path)
        self.query = {name: values[-1] for name, values in parse_qs(target.query).items()}
        self.parts = [unquote(part) for part in target.path.split("/")[1:]]
        self.body = Body(self.rfile, self.headers)
        served = time.monotonic()
        endpoint, call, role = self._route(method)
        reply, fault = self.with_faults(endpoint, partial(self._answer, endpoint, call, role))
        self.desk.ledger.note_call(AitbcCall(at, endpoint, reply.status, fault, dict(self.headers.items())))
        took = f"{time.monotonic() - served:.6f}"
        named = self.headers.get("X-Request-ID") or secrets.token_hex(8)
        self.send(reply, {"x-request-id": named, "x-process-time": took})

    def _route(self, method: str) -> tuple[str, Callable[[], Reply], str]:
        """Find the call: its name for limits and faults, its method, and the role that it needs."""
        asked = (
            f"{method} /{'/'.join('*' if number == 2 else part for number, part in enumerate(self.parts))}"
        )
        for endpoint, name, role, pattern in _ROUTES:
            if re.fullmatch(pattern, asked if "*" in pattern else f"{method} /{'/'.join(self.parts)}"):
                return endpoint, getattr(self, name), role
        return "unknown", self._unknown, "miner"

    def _answer(self, endpoint: str, call: Callable[[], Reply], role: str) -> Reply:
        try:
            self._guard()
            self.miner = self._identity(role) if role else ""
            if not self.desk.ledger.allowed(endpoint, self.client_address[0]):
                return json_reply({"detail": "Rate limit exceeded"}, 429, Retry_After="60")
            return call()
        except Missing as error:
            return json_reply({"detail": str(error)}, 404)
        except Invalid as error:
            self.desk.ledger.forgive(endpoint, self.client_address[0])
            return self._invalid(error)
        except Broken:
            error_body = {"type": "internal_error", "message": "Internal server error", "status_code": 500}
            return json_reply({"error": {**error_body, "path": self.path}}, 500)
        except Refusal as error:
            more = {"WWW_Authenticate": "Bearer"} if error.status == 401 else {}
            return json_reply({"detail": error.message}, error.status, **more)

    def _invalid(self, error: Invalid) -> Reply:
        details = [{"field": f"body.{error.name}", "message": str(error), "code": "invalid"}]
        said = {"code": "VALIDATION_ERROR", "message": "Request validation failed", "status": 422}
        body = {"error": {**said, "details": details}, "timestamp": time.time(), "request_id": None}
        return json_reply(body, 422)

    # What requests have in common.

    def _guard(self) -> None:
        if SCANNERS.search(self.headers.get("User-Agent", "")):
            raise Refusal(403, "", "Access denied")
        length = self.headers.get("Content-Length", "0")
        if length.isdigit() and int(length) > MAX_BODY:
            raise Refusal(413, "", "Request body too large")

    def _identity(self, role: str) -> str:
        """Say who calls. A bearer token decides alone, whatever stands beside it."""
        scheme, _, token = self.headers.get("Authorization", "").partition(" ")
        if scheme.lower() == "bearer":
            claims = read_token(token.strip(), self.desk.jwt_secret)
            if claims is None:
                raise Refusal(401, "", "Invalid token")
            if claims.get("role") != role:
                raise Refusal(403, "", "Forbidden")
            return str(claims.get("sub"))
        key = self.headers.get("X-Api-Key")
        if key is None:
            raise Refusal(401, "", "Authentication required")
        if key not in self.desk.keys:
            raise Refusal(401, "", "Invalid API key")
        if role != "miner":
            raise Refusal(403, "", "Forbidden")
        return self.headers.get("X-Miner-ID") or key

    def _json(self) -> dict[str, Any]:
        text = self.body.text(64 << 20)
        try:
            # Anything else than JSON is not even looked at.
            said = json.loads(text) if self.headers.get_content_type() == "application/json" else None
        except (ValueError, RecursionError):
            said = None
        if not isinstance(said, dict):
            raise Invalid("", "Input should be a valid dictionary")
        return said

    # The miner's calls.

    def _register(self) -> Reply:
        said = self._json()
        _need(said, "capabilities", dict)
        _need(said, "concurrency", int, 1)
        _need(said, "region", str, None)
        self.desk.ledger.register(self.miner, said)
        return json_reply({"status": "ok", "session_token": secrets.token_hex(16)})

    def _heartbeat(self) -> Reply:
        said = self._json()
        _need(said, "inflight", int, 0)
        _need(said, "status", str, "ONLINE")
        _need(said, "metadata", dict, {})
        self.desk.ledger.heartbeat(self.miner, said)
        return json_reply({"status": "ok"})

    def _poll(self) -> Reply:
        said = self._json()
        _need(said, "max_wait_seconds", int, 15)
        job = self.desk.ledger.poll(self.miner)
        if job is None:
            return Reply(204)
        return json_reply({"job_id": job.job_id, "payload": job.payload, "constraints": job.constraints})

    def _result(self) -> Reply:
        said = self._json()
        _need(said, "result", dict)
        _need(said, "metrics", dict, {})
        receipt = self.desk.ledger.result(self.parts[2], self.miner, said)
        return json_reply({"status": "ok", "receipt": receipt})

    def _fail(self) -> Reply:
        said = self._json()
        _need(said, "error_code", str)
        _need(said, "error_message", str)
        _need(said, "metrics", dict, {})
        self.desk.ledger.fail(self.parts[2], self.miner, said)
        return json_reply({"status": "ok"})

    def _list(self) -> Reply:
        state, limit = self.query.get("job_status", ""), int(self.query.get("limit", "20"))
        offset, miner = int(self.query.get("offset", "0")), self.parts[2]
        jobs, total = self.desk.ledger.listed(miner, state, limit, offset)
        body = {"jobs": [_view(job) for job in jobs], "total": total, "limit": limit, "offset": offset}
        return json_reply({**body, "miner_id": miner})

    def _leave(self) -> Reply:
        self.desk.ledger.leave(self.parts[2])
        return json_reply({"miner_id": self.parts[2], "status": "deregistered"})

    def _broken(self) -> Reply:
        return json_reply({"detail": "Internal server error"}, 500)

    # The client's calls, and the page.

    def _submit(self) -> Reply:
        said = self._json()
        _need(said, "payload", dict)
        _need(said, "constraints", dict, {})
        _need(said, "ttl_seconds", int, 900)
        asked = {
            name: value for name, value in (said.get("constraints") or {}).items() if name in CONSTRAINTS
        }
        job_id = self.desk.ledger.submit(
            said["payload"], asked, said.get("ttl_seconds", 900), said.get("payment_amount"), None
        )
        return json_reply(_view(self.desk.ledger.read(job_id)), 201)

    def _cancel(self) -> Reply:
        if not self.desk.ledger.cancel(self.parts[2]):
            raise Refusal(409, "", "job not cancelable")
        return json_reply(_view(self.desk.ledger.read(self.parts[2])))

    def _read(self) -> Reply:
        job = self.desk.ledger.read(self.parts[2])
        if self.parts[3:] != ["result"]:
            return json_reply(_view(job))
        if job.result is None or job.state != "COMPLETED":
            raise Refusal(425, "", "job not ready")
        return json_reply({"result": job.result, "receipt": job.receipt})

    def _health(self) -> Reply:
        return json_reply({"status": "ok", "env": "test", "python_version": "3"})

    def _earnings(self) -> Reply:
        return json_reply({"total": 0, "jobs": 0})

    def _state(self) -> Reply:
        ledger = self.desk.ledger
        miners = {
            name: {"status": one.status, "inflight": one.inflight, "concurrency": one.concurrency}
            for name, one in ledger.miners().items()
        }
        return json_reply({"miners": miners, "jobs": [_view(job) for job in ledger.jobs().values()]})

    def _unknown(self) -> Reply:
        raise Refusal(404, "", "Not Found")


def _view(job: AitbcJob) -> dict[str, Any]:
    return {
        "job_id": job.job_id,
        "state": job.state,
        "payload": job.payload,
        "assigned_miner_id": job.assigned_miner_id,
        "requested_at": job.requested_at.replace(tzinfo=None).isoformat(),
        "expires_at": job.expires_at.replace(tzinfo=None).isoformat(),
        "error": job.error,
    }


def _need(said: dict[str, Any], name: str, kind: type, default: Any = Ellipsis) -> None:
    if name not in said:
        if default is Ellipsis:
            raise Invalid(name, "Field required")
        return
    value = said[name]
    if not isinstance(value, kind) and not (value is None and default is None):
        raise Invalid(name, f"Input should be a valid {kind.__name__}")


def make_token(claims: dict[str, Any], secret: str) -> str:
    """Sign a JSON web token (HS256)."""
    parts = [_b64(json.dumps(part).encode()) for part in ({"alg": "HS256", "typ": "JWT"}, claims)]
    sig = hmac.digest(secret.encode(), ".".join(parts).encode(), hashlib.sha256)
    return ".".join([*parts, _b64(sig)])


def read_token(token: str, secret: str) -> dict[str, Any] | None:
    """Check a JSON web token; None when it is none, has expired, or was signed with another secret."""
    head, _, sig = token.rpartition(".")
    wanted = _b64(hmac.digest(secret.encode(), head.encode(), hashlib.sha256))
    if not hmac.compare_digest(wanted.encode(), sig.encode()):
        return None
    try:
        text = head.partition(".")[2]
        claims: dict[str, Any] = json.loads(base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)))
    except (ValueError, binascii.Error):
        return None
    return claims if claims.get("exp", 0) > time.time() else None


def _b64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode().rstrip("=")
