"""The HTTP side of the double of the AITBC coordinator, with one method for each call."""

import platform
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any
from urllib.parse import SplitResult, unquote

from aitbc_miner.util.clock import now
from tools.mock.aitbc.auth import Gate
from tools.mock.aitbc.ledger import AitbcLedger, broken
from tools.mock.aitbc.pages import page, state_reply
from tools.mock.aitbc.records import CONSTRAINTS, AitbcReport
from tools.mock.aitbc.wire import (
    MAX_LENGTH,
    ROUTES,
    SCANNERS,
    Route,
    Windows,
    check,
    error_body,
    read_body,
    read_query,
    role_for,
    say,
)
from tools.mock.exchange import Desk, Exchange
from tools.mock.http import Refusal, Reply

LOOPBACK = "127.0.0.1"


@dataclass(frozen=True, kw_only=True)
class AitbcDesk(Desk):
    """The state that requests of this dialect need; without `windows` no rate limit applies."""

    ledger: AitbcLedger
    gate: Gate
    windows: Windows | None


class AitbcHandler(Exchange):
    """A connection."""

    desk: AitbcDesk
    credentials = ("Authorization", "X-Api-Key")

    def do_PUT(self) -> None:  # noqa: N802  the name is the base class's idea
        """Answer a PUT."""
        self._serve("PUT")

    def do_DELETE(self) -> None:  # noqa: N802
        """Answer a DELETE."""
        self._serve("DELETE")

    # Every request.

    def _route(self, method: str, target: SplitResult) -> tuple[str, Callable[[], Reply]]:
        self.request_id = self.headers.get("X-Request-ID") or secrets.token_hex(16)
        own = {
            ("GET", "/"): ("page", lambda: page(self.desk.ledger)),
            ("GET", "/state.json"): ("page", lambda: state_reply(self.desk.ledger, self.desk.faults)),
            ("POST", "/_faults"): ("_faults", self._faults),
            ("GET", "/elsewhere"): ("elsewhere", self._elsewhere),
            ("POST", "/elsewhere"): ("elsewhere", self._elsewhere),
            ("GET", "/health"): ("health", self._health),
        }
        if (method, target.path) in own:
            return own[method, target.path]
        path = unquote(target.path)
        found = [(route, match) for route in ROUTES if (match := route.path.fullmatch(path))]
        for route, match in found:
            if route.method == method:
                return route.endpoint, partial(self._admit, route, path, *match.groups())
        return "unknown", partial(self._unknown, path, known=bool(found))

    def _refused(self, refusal: Refusal) -> Reply:
        return error_body(refusal, self.target.path, self.request_id)

    def _always(self) -> dict[str, str]:
        return {"x-request-id": self.request_id, "x-process-time": f"{now() - self.arrived:.6f}"}

    def _answer(self, call: Callable[[], Reply]) -> Reply:
        length = self.headers.get("Content-Length", "")
        if SCANNERS.search(self.headers.get("User-Agent", "")):
            return self._refused(Refusal(403, "http", "Access denied"))
        if length.isdigit() and int(length) > MAX_LENGTH:
            return self._refused(Refusal(413, "http", "Request body too large"))
        return super()._answer(call)

    def _admit(self, route: Route, path: str, *named: str) -> Reply:
        # In this order: what is refused for one reason is not counted by the next.
        self.caller = self.desk.gate.caller(self._bearer(), self.headers, role_for(path))
        self.sent: Any = read_body(self.body, self.headers) if route.body is not None else {}
        asked = check(self.sent, route.body or {}, "body")
        asked |= read_query(self.target.query, route.query)
        if self.desk.windows and route.limit is not None:
            self.desk.windows.enter(route.name, route.limit, self._address())
        return self._calls()[route.name](asked, *named)

    def _address(self) -> str:
        """Return the address for the rate limits; a proxy on this machine may name the address."""
        hops = [hop.strip() for hop in self.headers.get("X-Forwarded-For", "").split(",")]
        address: str = self.client_address[0]
        told = [hop for hop in hops if hop not in {"", LOOPBACK}]
        return told[-1] if told and address == LOOPBACK else address

    def _calls(self) -> dict[str, Callable[..., Reply]]:
        return {
            "register": self._register,
            "heartbeat": self._heartbeat,
            "poll": self._poll,
            "result": self._result,
            "fail": self._fail,
            "jobs": self._jobs,
            "earnings": self._earnings,
            "capabilities": self._capabilities,
            "leave": self._leave,
            "complete": self._complete,
            "broken_fail": self._broken_fail,
            "submit": self._submit,
            "job": self._job,
            "job_result": self._job_result,
            "cancel": self._cancel,
        }

    # A miner's calls.

    def _register(self, asked: dict[str, Any]) -> Reply:
        self.desk.ledger.register(self.caller, asked, self.sent)
        return say({"status": "ok", "session_token": secrets.token_hex(16)})

    def _heartbeat(self, asked: dict[str, Any]) -> Reply:
        self.desk.ledger.heartbeat(self.caller, asked, self.sent)
        return say({"status": "ok"})

    def _poll(self, _asked: dict[str, Any]) -> Reply:
        job = self.desk.ledger.poll(self.caller)
        if job is None:
            return Reply(204)
        return say({"job_id": job.job_id, "payload": job.payload, "constraints": job.constraints})

    def _result(self, _asked: dict[str, Any], job_id: str) -> Reply:
        receipt = self.desk.ledger.result(self._report("result", job_id))
        return say({"status": "ok", "receipt": receipt})

    def _fail(self, _asked: dict[str, Any], job_id: str) -> Reply:
        self.desk.ledger.fail(self._report("fail", job_id))
        return say({"status": "ok"})

    def _report(self, kind: Any, job_id: str) -> AitbcReport:
        called = self.headers.get("X-Request-ID")
        return AitbcReport(kind, job_id, self.arrived, self.caller, self.sent, called)

    def _jobs(self, asked: dict[str, Any], miner_id: str) -> Reply:
        found = self.desk.ledger.assigned_to(miner_id, asked["job_status"])
        limit, offset = asked["limit"], asked["offset"]
        views = [job.view() for job in found[offset : offset + limit]]
        about = {"total": len(found), "limit": limit, "offset": offset, "miner_id": miner_id}
        return say({"jobs": views, **about})

    def _earnings(self, _asked: dict[str, Any], miner_id: str) -> Reply:
        return say({"miner_id": miner_id, "total_earnings": 0.0, "completed_jobs": 0})

    def _capabilities(self, asked: dict[str, Any], _miner_id: str) -> Reply:
        # Of whoever calls, and not of the one that the path names.
        return self._register(asked)

    def _leave(self, _asked: dict[str, Any], miner_id: str) -> Reply:
        self.desk.ledger.leave(miner_id)
        return say({"miner_id": miner_id, "status": "deregistered"})

    def _complete(self, _asked: dict[str, Any], _miner_id: str, job_id: str) -> Reply:
        self.desk.ledger.complete(job_id)
        raise broken()

    def _broken_fail(self, _asked: dict[str, Any], _miner_id: str, _job_id: str) -> Reply:
        raise broken()

    # A client's calls.

    def _submit(self, asked: dict[str, Any]) -> Reply:
        known = {name: value for name, value in asked["constraints"].items() if name in CONSTRAINTS}
        job_id = self.desk.ledger.submit(
            None,
            asked["ttl_seconds"],
            known,
            payload=asked["payload"],
            client=self.caller,
            payment_amount=asked["payment_amount"],
        )
        return say(self.desk.ledger.job(job_id).view(), 201)

    def _job(self, _asked: dict[str, Any], job_id: str) -> Reply:
        return say(self.desk.ledger.read(job_id).view())

    def _job_result(self, _asked: dict[str, Any], job_id: str) -> Reply:
        job = self.desk.ledger.read(job_id)
        if job.state != "COMPLETED" or job.result is None:
            raise Refusal(425, "http", "job not ready")
        return say({"result": job.result, "receipt": job.receipt})

    def _cancel(self, _asked: dict[str, Any], job_id: str) -> Reply:
        if not self.desk.ledger.cancel(job_id):
            raise Refusal(409, "http", "job not cancelable")
        return self._job(_asked, job_id)

    # Beside them.

    def _health(self) -> Reply:
        return say({"status": "ok", "env": "test", "python_version": platform.python_version()})

    def _unknown(self, path: str, *, known: bool) -> Reply:
        self.desk.gate.caller(self._bearer(), self.headers, role_for(path))
        raise Refusal(405, "http", "Method Not Allowed") if known else Refusal(404, "http", "Not Found")
