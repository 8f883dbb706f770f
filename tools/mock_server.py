"""What both mocks serve with: requests that may go wrong as asked for, on a port that outlives an outage."""

import socket
import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Protocol

from tools.mock_faults import DROPPED, REFUSED, Faults
from tools.mock_wire import Body, Reply, Sending

Boundary = Callable[[str, str, int], bool]
"""Asked `before` a call is carried out and `after` it, before the answer: the endpoint, which of the two, and
the caller's port. True hangs up there, without an answer."""


def no_boundary(_endpoint: str, _side: str, _port: int) -> bool:
    """Let every call be."""
    return False


class FaultyDesk(Protocol):
    """What a handler needs to make calls go wrong."""

    @property
    def faults(self) -> Faults:
        """The faults that are set."""
        ...

    @property
    def verbose(self) -> bool:
        """Whether to print each request."""
        ...

    @property
    def boundary(self) -> Boundary:
        """Whom to ask around each call."""
        ...

    @property
    def stopping(self) -> threading.Event:
        """Set when the server does not listen any more."""
        ...


class FaultyHandler(BaseHTTPRequestHandler):
    """One connection, whose calls go wrong as its desk wants; `body` is that of the request under way."""

    desk: FaultyDesk
    body: Body
    protocol_version = "HTTP/1.1"
    server_version = "mock-coordinator"
    sys_version = ""
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        """Answer a GET."""
        self.serve("GET")

    def do_POST(self) -> None:
        """Answer a POST."""
        self.serve("POST")

    def do_PUT(self) -> None:
        """Answer a PUT."""
        self.serve("PUT")

    def do_DELETE(self) -> None:
        """Answer a DELETE."""
        self.serve("DELETE")

    def serve(self, method: str) -> None:
        """Answer a request."""
        raise NotImplementedError(method)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002  the name is the base class's
        """Print a request, if asked to."""
        if self.desk.verbose:
            super().log_message(format, *args)

    def with_faults(self, endpoint: str, answer: Callable[[], Reply]) -> tuple[Reply, str | None]:
        """Carry a call out, or not, as the faults want; gives what is to be sent, and the fault."""
        port = self.client_address[1]
        fault = REFUSED if self.desk.boundary(endpoint, "before", port) else self.desk.faults.take(endpoint)
        reply = Reply()
        if fault:
            self.desk.stopping.wait(fault.delay_s)
        if fault is None or fault.after:
            reply = answer()
            fault = DROPPED if self.desk.boundary(endpoint, "after", port) else fault
        if fault:
            host, port = self.connection.getsockname()[:2]
            other = "localhost" if host == "127.0.0.1" else host
            reply = fault.spoil(reply, f"http://{other}:{port}/elsewhere")
        if fault is None or fault.name != "refuse" or fault.after:
            self.body.drain()
        return reply, str(fault) if fault else None

    def send(self, reply: Reply, more: Mapping[str, str] | None = None) -> None:
        """Send a reply, as much of it and as fast as it wants, with further headers."""
        if reply.sending is not Sending.WHOLE:
            self.close_connection = True
        if reply.sending is Sending.NOTHING:
            return
        self.send_response(reply.status)
        for name, value in {**reply.headers, **(more or {})}.items():
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


class _Server(ThreadingHTTPServer):
    """Threads that are joined at the end, and connections that can be cut to get there."""

    daemon_threads = False
    request_queue_size = 128

    def __init__(self, address: tuple[str, int], handler: type[BaseHTTPRequestHandler]) -> None:
        self.open: set[socket.socket] = set()
        super().__init__(address, handler)

    def get_request(self) -> tuple[socket.socket, Any]:
        connection, address = super().get_request()
        self.open.add(connection)
        return connection, address

    def shutdown_request(self, request: Any) -> None:
        self.open.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        # Clients that hang up are what a mock with faults is for; anything else is a defect of it.
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)

    def cut(self) -> None:
        for connection in list(self.open):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


class Listener:
    """Serves with a handler; port 0 takes a free one. `stopping` is set while it does not listen."""

    def __init__(
        self, host: str, port: int, handler: type[BaseHTTPRequestHandler], stopping: threading.Event
    ) -> None:
        self.address = (host, port)
        self._handler = handler
        self._stopping = stopping
        self._server: _Server | None = None
        self._thread: threading.Thread | None = None

    @property
    def root(self) -> str:
        """The address as a URL without a path."""
        return f"http://{self.address[0]}:{self.address[1]}"

    def start(self) -> None:
        """Listen; OSError when the port is taken."""
        self._stopping.clear()
        self._server = _Server(self.address, self._handler)
        self.address = (self.address[0], self._server.server_port)
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.02,), name="mock-coordinator"
        )
        self._thread.start()

    def stop(self) -> None:
        """Stop listening and cut every connection."""
        server, thread, self._server = self._server, self._thread, None
        if server is None or thread is None:
            return
        self._stopping.set()
        server.shutdown()
        thread.join()
        server.cut()
        server.server_close()
