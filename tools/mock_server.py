"""A server of threads on a port that it keeps over `stop` and `start`, which play an outage."""

import socket
import sys
import threading
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


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
