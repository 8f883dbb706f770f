"""A small HTTP server for a few read-only pages, bounded in everything a client could use up.

It has neither directories nor keep-alive, so that its whole surface is the table of pages it is given.
"""

import contextlib
import io
import socket
import socketserver
import sys
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import urlsplit

from msgspec import Struct

from aitbc_miner.errors import MinerError
from aitbc_miner.util import clock
from aitbc_miner.util.log import events

MAX_CONNECTIONS = 16
MAX_REQUEST = 16 * 1024
MAX_TARGET = 1024
TIMEOUT_S = 5.0


class Page(Struct, frozen=True):
    """What is answered: the status, the media type and the body."""

    status: int
    media_type: str
    body: bytes


Pages = Mapping[str, Callable[[], Page]]
"""Path to the function that makes the page; called from several threads."""


class PageServer(socketserver.ThreadingTCPServer):
    """Serves `pages` on `listen` ("host:port", port 0 for a free one) from `start` to `stop`.

    There are no more than `MAX_CONNECTIONS` at a time: for one more, the oldest of the client that has most
    is closed. So nobody who only holds connections keeps the others from their answer.

    Raises:
        MinerError: the address cannot be had; the message names it and the remedy.
    """

    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 8 * MAX_CONNECTIONS

    def __init__(self, listen: str, pages: Pages, *, timeout_s: float = TIMEOUT_S) -> None:
        self.pages = pages
        self.timeout_s = timeout_s
        self._log = events("httpd")
        # Those that are served, in the order in which they came, with the client's address.
        self._served: dict[socket.socket, str] = {}
        self._lock = threading.Lock()
        host, _, port = listen.rpartition(":")
        host = host.strip("[]")
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            super().__init__((host, int(port)), _Handler)
        except (OSError, ValueError, OverflowError) as error:
            cause = error.strerror if isinstance(error, OSError) else "not an address as 127.0.0.1:9464"
            raise MinerError(
                f"cannot serve on {listen}: {cause}; set telemetry.listen to a free address of this machine"
            ) from error

    @property
    def address(self) -> str:
        """Where it really listens, as "host:port"."""
        host, port = self.server_address[:2]
        return f"[{host!s}]:{port}" if self.address_family == socket.AF_INET6 else f"{host!s}:{port}"

    def start(self) -> None:
        """Serve from a thread of its own until `stop`."""
        threading.Thread(target=self.serve_forever, name="httpd", daemon=True).start()

    def stop(self) -> None:
        """Take no more connections; answers under way are left to end or not."""
        self.shutdown()
        self.server_close()

    def process_request(self, request: Any, client_address: Any) -> None:
        """Give the connection a thread, and end another one if there are too many."""
        with self._lock:
            if len(self._served) >= MAX_CONNECTIONS:
                self._cut_one()
            self._served[request] = str(client_address[0])
        try:
            super().process_request(request, client_address)
        except RuntimeError:  # the system has no thread for us
            self._forget(request)
            self.shutdown_request(request)

    def _cut_one(self) -> None:
        counts = Counter(self._served.values())
        most = max(counts.values())
        victim = next(line for line, address in self._served.items() if counts[address] == most)
        del self._served[victim]
        # Its thread finds the end of the connection, whatever it waits for, and closes it.
        with contextlib.suppress(OSError):
            victim.shutdown(socket.SHUT_RDWR)

    def _forget(self, request: Any) -> None:
        with self._lock:
            self._served.pop(request, None)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Answer, and give the place free whatever happens."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._forget(request)

    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ARG002  # given by the base
        """Tell of a defect of ours; a connection that broke is its client's own affair."""
        if not isinstance(sys.exception(), OSError):
            self._log.error("page failed", exc_info=True)


class _DeadlineReader(io.RawIOBase):
    """Reads a request as long as time and size allow: one byte every four seconds is no way to stay."""

    def __init__(self, connection: socket.socket, timeout_s: float) -> None:
        super().__init__()
        self._connection = connection
        self._deadline = clock.now() + timeout_s
        self._left = MAX_REQUEST

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        left_s = self._deadline - clock.now()
        if left_s <= 0:
            raise TimeoutError("the request took too long")
        self._connection.settimeout(left_s)
        received = self._connection.recv_into(memoryview(buffer)[: self._left])
        self._left -= received
        return received


class _Handler(BaseHTTPRequestHandler):
    server: PageServer
    server_version = "aitbc-miner"
    sys_version = ""

    def setup(self) -> None:
        super().setup()
        self.rfile = io.BufferedReader(_DeadlineReader(self.connection, self.server.timeout_s))

    def handle_one_request(self) -> None:
        super().handle_one_request()
        self.close_connection = True

    def do_GET(self) -> None:  # the base class looks for this name
        self._answer(with_body=True)

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def _refuse(self) -> None:
        self._send(_plain(HTTPStatus.METHOD_NOT_ALLOWED), with_body=True)

    do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = _refuse  # noqa: N815

    def _answer(self, *, with_body: bool) -> None:
        if len(self.path) > MAX_TARGET:
            page = _plain(HTTPStatus.REQUEST_URI_TOO_LONG)
        else:
            make = self.server.pages.get(_path(self.path))
            page = make() if make else _plain(HTTPStatus.NOT_FOUND)
        self._send(page, with_body=with_body)

    def _send(self, page: Page, *, with_body: bool) -> None:
        # Of one sendall, and so for the whole answer.
        self.connection.settimeout(self.server.timeout_s)
        self.send_response(page.status)
        self.send_header("Content-Type", page.media_type)
        self.send_header("Content-Length", str(len(page.body)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Content-Security-Policy", "default-src 'none'; style-src 'unsafe-inline'")
        if page.status == HTTPStatus.METHOD_NOT_ALLOWED:
            self.send_header("Allow", "GET, HEAD")
        self.end_headers()
        if with_body:
            self.wfile.write(page.body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Say nothing: who asks, and how often, is not the node's concern."""


def _path(target: str) -> str:
    try:
        return urlsplit(target).path
    except ValueError:
        return ""  # `http://[`, for one


def _plain(status: HTTPStatus) -> Page:
    return Page(status, "text/plain; charset=utf-8", f"{status.value} {status.phrase}\n".encode())
