"""A small HTTP server for a few read-only pages, with bounds on connections, time and sizes.

The server reads no files and keeps no connection alive: a client reaches only the pages of the given table.
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
    """An answer: status, media type and body."""

    status: int
    media_type: str
    body: bytes


Pages = Mapping[str, Callable[[], Page]]
"""Maps a path to the function that makes its page; several threads call the functions."""


class PageServer(socketserver.ThreadingTCPServer):
    """Serves `pages` on `listen` ("host:port"; port 0 is any free port) from `start` to `stop`.

    Beyond `MAX_CONNECTIONS` the server closes the oldest connection of the client with the most connections.
    So a client that only holds connections cannot keep other clients from their answers.

    Raises:
        MinerError: the address is taken or wrong; the message names the address and the remedy.
    """

    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 8 * MAX_CONNECTIONS

    def __init__(self, listen: str, pages: Pages, *, timeout_s: float = TIMEOUT_S) -> None:
        self.pages = pages
        self.timeout_s = timeout_s
        self._log = events("httpd")
        # The open connections, the oldest first, with the client's address.
        self._served: dict[socket.socket, str] = {}
        self._lock = threading.Lock()
        host, _, port = listen.rpartition(":")
        host = host.strip("[]")
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            super().__init__((host, int(port)), _Handler)
        except (OSError, ValueError, OverflowError) as error:
            cause = error.strerror if isinstance(error, OSError) else "not an address such as 127.0.0.1:9464"
            raise MinerError(
                f"cannot serve on {listen}: {cause}; set telemetry.listen to a free address of this machine"
            ) from error

    @property
    def address(self) -> str:
        """The bound address, as "host:port"."""
        host, port = self.server_address[:2]
        return f"[{host!s}]:{port}" if self.address_family == socket.AF_INET6 else f"{host!s}:{port}"

    def start(self) -> None:
        """Start a thread that serves until `stop`."""
        threading.Thread(target=self.serve_forever, name="httpd", daemon=True).start()

    def stop(self) -> None:
        """Stop accepting connections; do not wait for unfinished answers."""
        self.shutdown()
        self.server_close()

    def process_request(self, request: Any, client_address: Any) -> None:
        """Start a thread for the connection; close another connection if there are too many."""
        with self._lock:
            if len(self._served) >= MAX_CONNECTIONS:
                self._cut_one()
            self._served[request] = str(client_address[0])
        try:
            super().process_request(request, client_address)
        except RuntimeError:  # the system cannot start another thread
            self._forget(request)
            self.shutdown_request(request)

    def _cut_one(self) -> None:
        counts = Counter(self._served.values())
        most = max(counts.values())
        victim = next(line for line, address in self._served.items() if counts[address] == most)
        del self._served[victim]
        # `shutdown` wakes the connection's thread, whatever it waits for; the thread closes the socket.
        with contextlib.suppress(OSError):
            victim.shutdown(socket.SHUT_RDWR)

    def _forget(self, request: Any) -> None:
        with self._lock:
            self._served.pop(request, None)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Answer, and release the connection's place also after an error."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._forget(request)

    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ARG002  # given by the base
        """Log a defect of the node; ignore a broken connection, which only its client needs to know."""
        if not isinstance(sys.exception(), OSError):
            self._log.error("page failed", exc_info=True)


class _DeadlineReader(io.RawIOBase):
    """Reads a request within a total time and size, so that a slow client cannot hold a connection."""

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

    def _refuse(self) -> None:
        self._send(_plain(HTTPStatus.METHOD_NOT_ALLOWED))

    def _answer(self) -> None:
        if len(self.path) > MAX_TARGET:
            page = _plain(HTTPStatus.REQUEST_URI_TOO_LONG)
        else:
            make = self.server.pages.get(_path(self.path))
            page = make() if make else _plain(HTTPStatus.NOT_FOUND)
        self._send(page)

    # The base class calls the method do_NAME for a request of this name.
    do_GET = do_HEAD = _answer  # noqa: N815
    do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = _refuse  # noqa: N815

    def _send(self, page: Page) -> None:
        # sendall takes this as the time-out of the whole call, so of the whole answer.
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
        if self.command != "HEAD":
            self.wfile.write(page.body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Log no requests."""


def _path(target: str) -> str:
    try:
        return urlsplit(target).path
    except ValueError:
        return ""  # for example `http://[`


def _plain(status: HTTPStatus) -> Page:
    return Page(status, "text/plain; charset=utf-8", f"{status.value} {status.phrase}\n".encode())
