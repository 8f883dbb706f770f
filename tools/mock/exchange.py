"""Answers a request of any dialect: the due fault, the call, the reply."""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import Any, ClassVar
from urllib.parse import SplitResult, urlsplit

from aitbc_miner.util.clock import now
from tools.mock.bootstrap.records import Call
from tools.mock.faults import DROPPED, REFUSED, Faults
from tools.mock.http import Body, Refusal, Reply, Sending, error_reply, json_object, json_reply, text_member
from tools.mock.watched import Watched

Boundary = Callable[[str, str, int], bool]
"""Asked `before` a call is carried out and `after` it, before the answer: the endpoint, which of the two, and
the caller's port. True hangs up there, without an answer."""


def no_boundary(_endpoint: str, _side: str, _port: int) -> bool:
    """Make no faults at calls."""
    return False


@dataclass(frozen=True, kw_only=True)
class Desk:
    """The state that every request needs."""

    ledger: Watched
    faults: Faults
    verbose: bool = False
    boundary: Boundary = no_boundary
    stopping: threading.Event = field(default_factory=threading.Event)


class Exchange(BaseHTTPRequestHandler):
    """A connection; a subclass sets `desk`, because socketserver makes the instances."""

    desk: Desk
    credentials: ClassVar[tuple[str, ...]] = ("Authorization",)
    protocol_version = "HTTP/1.1"
    server_version = "mock-coordinator"
    sys_version = ""
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        """Answer a GET."""
        self._serve("GET")

    def do_POST(self) -> None:
        """Answer a POST."""
        self._serve("POST")

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002  the name is the base class's
        """Print a request, if printing is on."""
        if self.desk.verbose:
            super().log_message(format, *args)

    # What a dialect has to say.

    def _route(self, method: str, target: SplitResult) -> tuple[str, Callable[[], Reply]]:
        """Find the endpoint of a request and its method."""
        raise NotImplementedError

    def _refused(self, refusal: Refusal) -> Reply:
        return error_reply(refusal.status, refusal.code, refusal.message, **refusal.headers)

    def _always(self) -> dict[str, str]:
        """Give the headers of every reply."""
        return {}

    # Every request.

    def _serve(self, method: str) -> None:
        self.arrived = now()
        self.target = urlsplit(self.path)
        self.body = Body(self.rfile, self.headers)
        endpoint, call = self._route(method, self.target)
        port = self.client_address[1]
        fault = REFUSED if self.desk.boundary(endpoint, "before", port) else self.desk.faults.take(endpoint)
        reply = Reply()
        if fault:
            self.desk.stopping.wait(fault.delay_s)
        if fault is None or fault.after:
            reply = self._answer(call)
            fault = DROPPED if self.desk.boundary(endpoint, "after", port) else fault
        if fault:
            host, port = self.connection.getsockname()[:2]
            other = "localhost" if host == "127.0.0.1" else host
            reply = fault.spoil(reply, f"http://{other}:{port}/elsewhere", self._refused)
        if fault is None or fault.name != "refuse" or fault.after:
            self.body.drain()
        named = any(name in self.headers for name in self.credentials)
        self.desk.ledger.note_call(
            Call(self.arrived, endpoint, reply.status, str(fault) if fault else None, named)
        )
        self._send(reply)

    def _answer(self, call: Callable[[], Reply]) -> Reply:
        try:
            return call()
        except Refusal as refusal:
            return self._refused(refusal)

    def _send(self, reply: Reply) -> None:
        if reply.sending is not Sending.WHOLE:
            self.close_connection = True
        if reply.sending is Sending.NOTHING:
            return
        self.send_response(reply.status)
        for name, value in {**self._always(), **reply.headers}.items():
            self.send_header(name, value)
        if reply.status != 204:
            self.send_header("Content-Type", reply.content_type)
            if reply.sending is not Sending.ENDLESS:
                self.send_header("Content-Length", str(reply.length))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        if reply.status != 204:
            for block in reply.blocks(self.desk.stopping.wait):
                self.wfile.write(block)

    # What every dialect has.

    def _bearer(self) -> str | None:
        """Return the bearer token; None without a header for a token."""
        scheme, _, token = self.headers.get("Authorization", "").partition(" ")
        return token.strip() if scheme.lower() == "bearer" else None

    def _json(self) -> dict[str, Any]:
        return json_object(self.body.text(), "the request")

    def _elsewhere(self) -> Reply:
        return json_reply({})

    def _faults(self) -> Reply:
        # No page of another site can make a browser send this type here without asking first.
        if self.headers.get_content_type() != "application/json":
            raise Refusal(415, "bad_request", "send Content-Type: application/json")
        asked = self._json()
        try:
            if asked.get("clear"):
                self.desk.faults.clear()
            else:
                endpoint, kind = text_member(asked, "endpoint"), text_member(asked, "kind")
                self.desk.faults.add(endpoint, kind, asked.get("times"))
        except (ValueError, TypeError) as error:
            raise Refusal(400, "bad_fault", str(error)) from error
        return json_reply({"faults": self.desk.faults.as_list()})
