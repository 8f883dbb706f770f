"""The base of all mock coordinators: a server on a port, its faults, and the jobs of a directory."""

import json
import socket
import sys
import threading
from contextlib import suppress
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar, Self

from tools.mock.exchange import Desk, Exchange


class _Server(ThreadingHTTPServer):
    """A server that joins its threads at the end, and cuts their connections first."""

    daemon_threads = False
    request_queue_size = 128

    def __init__(self, address: tuple[str, int], handler: type[Exchange], desk: Desk) -> None:
        self.open: set[socket.socket] = set()
        super().__init__(address, type("DeskHandler", (handler,), {"desk": desk}))

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


class MockServer:
    """A context manager, or `start` and `close`.

    Port 0 takes a free port and keeps it over `stop` and `start`, which simulate an outage: the ledger stays.
    """

    api: ClassVar[str]
    """The path below which the API is."""

    def __init__(self, address: tuple[str, int], handler: type[Exchange], desk: Desk) -> None:
        self.faults = desk.faults
        self._address = address
        self._handler = handler
        self._desk = desk
        self._server: _Server | None = None
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def root(self) -> str:
        """The URL of the page and of the files beside the API."""
        return f"http://{self._address[0]}:{self._address[1]}"

    @property
    def url(self) -> str:
        """The root of the API, for a node's `coordinator.base_url`."""
        return self.root + self.api

    def start(self) -> None:
        """Start listening.

        Raises:
            OSError: the port is taken.
        """
        self._desk.stopping.clear()
        self._server = _Server(self._address, self._handler, self._desk)
        self._address = (self._address[0], self._server.server_port)
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.02,), name="mock-coordinator"
        )
        self._thread.start()

    def stop(self) -> None:
        """Stop listening and cut every connection."""
        server, thread, self._server = self._server, self._thread, None
        if server is None or thread is None:
            return
        self._desk.stopping.set()
        server.shutdown()
        thread.join()
        server.cut()
        server.server_close()

    def close(self) -> None:
        """Stop for good."""
        self.stop()

    def fault(self, endpoint: str, kind: str, times: int | None = None) -> None:
        """Add a fault, see faults.py. Raises ValueError: the endpoint or fault is unknown."""
        self.faults.add(endpoint, kind, times)

    def clear_faults(self) -> None:
        """Remove all faults."""
        self.faults.clear()

    def load(self, folder: Path) -> list[str]:
        """Queue the job of every file of a directory (*.json, *.yaml, *.yml), by name.

        Raises:
            ValueError: a file has no job; the message names the file.
        """
        files = sorted(path for path in folder.iterdir() if path.suffix in {".json", ".yaml", ".yml"})
        return [self._load(_read_job(path)) for path in files]

    def _load(self, job: dict[str, Any]) -> str:
        """Queue a job of a file, and return its id."""
        raise NotImplementedError


def _read_job(path: Path) -> dict[str, Any]:
    text = path.read_text(encoding="utf-8")
    try:
        job = json.loads(text) if path.suffix == ".json" else _yaml(text)
        json.dumps(job)
    except (ValueError, TypeError) as error:
        raise ValueError(f"cannot load job {path}: {error}") from error
    if not isinstance(job, dict):
        raise ValueError(f"cannot load job {path}: it is not an object")  # noqa: TRY004  a bad value in a file
    return job


def _yaml(text: str) -> object:
    import yaml  # noqa: PLC0415  so that all but YAML works with the standard library alone

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error
