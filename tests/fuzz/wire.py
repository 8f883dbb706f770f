"""HTTP as it comes over the wire: of a coordinator, of servers with inputs, and of who reads our pages."""

import contextlib
import shutil
import socket
import sys
import threading
from collections.abc import Iterator

from hypothesis import strategies as st

from aitbc_miner.coordinator.answers import AITBC, BOOTSTRAP, answer
from aitbc_miner.coordinator.http import MAX_REPLY, HttpClient
from aitbc_miner.coordinator.interface import CoordinatorError
from aitbc_miner.errors import JobError
from aitbc_miner.inputs.fetch import InputLimits, fetch_inputs
from aitbc_miner.jobs import Inputs, Manifest
from aitbc_miner.telemetry.httpd import Page, PageServer
from tests.fuzz.engine import Check, Target, directory, only
from tests.fuzz.mutations import mutated, words

LIMITS = InputLimits(max_bytes_each=10_000, max_bytes_total=20_000, timeout_s=20.0, stall_s=5.0, attempts=3)


class Server:
    """A server on the loopback that answers each connection with `answer` and closes it."""

    def __init__(self) -> None:
        self.answer: bytes | None = b""
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            client, _ = self._listener.accept()
            with client, contextlib.suppress(OSError):
                if self.answer is None:
                    return
                client.settimeout(5)
                client.recv(1 << 16)
                client.sendall(self.answer)
                # With bytes of ours unread it would be reset, and the answer lost.
                client.shutdown(socket.SHUT_WR)
                while client.recv(1 << 16):
                    pass

    def close(self) -> None:
        """Stop."""
        self.answer = None
        socket.create_connection(self._listener.getsockname()).close()
        self._thread.join(10)
        self._listener.close()


@contextlib.contextmanager
def _serving() -> Iterator[Server]:
    server = Server()
    try:
        yield server
    finally:
        server.close()


@contextlib.contextmanager
def _coordinator() -> Iterator[Check]:
    with _serving() as server:
        http = HttpClient(server.url, 5.0)

        def check(data: bytes) -> None:
            server.answer = data
            dialect = AITBC if len(data) % 2 else BOOTSTRAP
            with only(CoordinatorError, size=100_000 + len(data)):
                reply = http.call("POST", "/x", {}, doing="ask")
                assert len(reply.body) <= MAX_REPLY
                assert reply.retry_after is None or 0 <= reply.retry_after <= 3600
                answer(reply, dialect.calls["result"], dialect, "ask", "the token")

        try:
            yield check
        finally:
            http.close()


@contextlib.contextmanager
def _inputs() -> Iterator[Check]:
    with _serving() as server, directory() as where:
        into = where / "input"

        def check(data: bytes) -> None:
            server.answer = data.replace(b"SELF", server.url.encode())
            shutil.rmtree(into, ignore_errors=True)
            into.mkdir()
            manifest = Manifest("job-1", "cli", input=Inputs(urls=[f"{server.url}/a.bin"]))
            with only(JobError, size=1_000_000):
                try:
                    fetch_inputs(manifest, into, limits=LIMITS, allow_private=True, wait=lambda _: None)
                except JobError:
                    assert not [*into.iterdir()]
                    raise
                (file,) = into.iterdir()
                assert file.name == "a.bin"
                assert file.stat().st_size <= LIMITS.max_bytes_each

        yield check


@contextlib.contextmanager
def _pages() -> Iterator[Check]:
    server = PageServer("127.0.0.1:0", {"/": lambda: Page(200, "text/plain", b"here")}, timeout_s=5.0)
    broken: list[object] = []

    def handle_error(_request: object, _client: object) -> None:
        error = sys.exception()
        if not isinstance(error, OSError):
            broken.append(error)

    server.handle_error = handle_error  # type: ignore[method-assign,assignment]
    server.start()
    host, _, port = server.address.rpartition(":")

    def check(data: bytes) -> None:
        broken.clear()
        with socket.create_connection((host, int(port)), timeout=60) as client:
            with contextlib.suppress(OSError):
                client.sendall(data)
                client.shutdown(socket.SHUT_WR)
            answer = b""
            with contextlib.suppress(ConnectionResetError):
                while more := client.recv(1 << 16):
                    answer += more
        assert len(answer) < 40_000
        # A page, a refusal, or nothing at all; never a header that the client made.
        head = answer.partition(b"\r\n\r\n")[0]
        assert b"\nX-Made" not in head
        assert not broken, broken

    try:
        yield check
    finally:
        server.stop()


HEADERS = words(
    *(
        "Content-Length: 11",
        "Content-Length: 99",
        "Content-Length: -1",
        "Transfer-Encoding: chunked",
        "Connection: close",
    ),
    *(
        "Location: SELF/a.bin",
        "Location: //127.0.0.1:1/",
        "Location: https://[::1]/x",
        "Location: http://h:x/",
        "ETag: W/x",
    ),
    *(
        "Content-Range: bytes 5-10/11",
        "Content-Encoding: gzip",
        "Retry-After: 5",
        "Date: x",
        "Set-Cookie: a=b",
        "X: y",
    ),
)
STATUS_LINES = words(
    *(
        "HTTP/1.1 200 OK",
        "HTTP/1.1 200 OK",
        "HTTP/1.0 200 OK",
        "HTTP/1.1 206 x",
        "HTTP/1.1 302 x",
        "HTTP/1.1 100 Continue",
    ),
    *(
        "HTTP/1.1 204 x",
        "HTTP/1.1 401 x",
        "HTTP/1.1 429 x",
        "HTTP/1.1 503 x",
        "HTTP/1.1 404 x",
        "HTTP/9.9 99999 x",
        "ICY 200",
    ),
)
BODIES = words(
    '{"a": "b"}\n', "", "5\r\nabcde\r\n0\r\n\r\n", "ffffffffffffffff\r\nx", "-5\r\nx", "x" * 20_000
)
REPLIES = st.tuples(STATUS_LINES, st.lists(HEADERS, max_size=4), BODIES).map(
    lambda one: b"\r\n".join([one[0], *one[1], b"", one[2]])
)
WIRE_WORDS = (
    b"\r\n",
    b"\r\n\r\n",
    b"\n ",
    b": ",
    b"X-A: b\r\n" * 120,
    b"X: " + b"A" * 70_000 + b"\r\n",
    b"HTTP/1.1 100 C\r\n\r\n",
)
REQUESTS = words(
    *(
        "GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        "GET /\r\n",
        "HEAD /x HTTP/1.0\r\n\r\n",
        "POST / HTTP/1.1\r\nContent-Length: 5\r\n\r\nhello",
    ),
    *(
        "GET http://[x/ HTTP/1.1\r\n\r\n",
        "BREW / HTTP/2.0\r\n\r\n",
        "GET /%0d%0aX-Made:%20y HTTP/1.1\r\n\r\n",
    ),
)

TARGETS = (
    Target("coordinator-wire", mutated(REPLIES, WIRE_WORDS), _coordinator),
    Target("input-wire", mutated(REPLIES, WIRE_WORDS), _inputs),
    Target("page-requests", mutated(REQUESTS, WIRE_WORDS), _pages),
)
