import errno
import gzip
import hashlib
import ipaddress
import os
import re
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, BinaryIO

import pytest

from aitbc_miner.errors import ErrorCode, JobError, LocalError
from aitbc_miner.inputs import addresses as neighbours
from aitbc_miner.inputs import fetch as inputs
from aitbc_miner.inputs import urls
from aitbc_miner.inputs.fetch import InputLimits, fetch_inputs
from aitbc_miner.jobs import Inputs, InputUrl, Manifest
from aitbc_miner.util import fs, web
from aitbc_miner.util.clock import now
from tests.unit.coordinator.test_http import CERTIFICATE

LIMITS = InputLimits(max_bytes_each=1_000_000, max_bytes_total=1_500_000, timeout_s=20, stall_s=5)
BARRED = "inputs may not come from the address"
DATA = bytes(range(256)) * 1000
SHA = hashlib.sha256(DATA).hexdigest()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: "Server"

    def do_GET(self) -> None:
        self.server.requests.append((self.path, dict(self.headers)))
        self.server.pages[self.path.partition("?")[0]](self)
        self.close_connection = True

    def reply(self, status: int = 200, body: bytes = b"", **headers: str) -> None:
        """Answer; `length` pretends another length than the body has."""
        self.send_response(status)
        self.send_header("Content-Length", headers.pop("length", str(len(body))))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        return


Page = Callable[[Handler], None]


class Server(ThreadingHTTPServer):
    """Pages by path; a client that leaves early is expected."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.pages: dict[str, Page] = {}
        self.requests: list[tuple[str, dict[str, str]]] = []
        self.stop = threading.Event()
        self.base = f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, *_: object) -> None:
        return

    def ranges(self) -> list[str | None]:
        return [headers.get("Range") for _, headers in self.requests]


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    thread = threading.Thread(target=made.serve_forever, args=(0.01,))
    thread.start()
    yield made
    made.stop.set()
    made.shutdown()
    made.server_close()
    thread.join()


def fetch(
    into: Path,
    *urls: str | InputUrl,
    inline: dict[str, str] | None = None,
    limits: InputLimits = LIMITS,
    **kwargs: Any,
) -> None:
    manifest = Manifest("j-1", "cli", input=Inputs(list(urls), inline or {}))
    fetch_inputs(manifest, into, limits=limits, **{"allow_private": True, "wait": lambda _: None, **kwargs})


def failure(into: Path, *urls: str | InputUrl, code: ErrorCode = ErrorCode.E_INPUT, **kwargs: Any) -> str:
    with pytest.raises(JobError) as caught:
        fetch(into, *urls, **kwargs)
    assert caught.value.code == code
    assert not list(into.glob(".*.part"))
    return caught.value.message


# Names and addresses


def test_inline_texts_and_addresses(server: Server, tmp_path: Path) -> None:
    server.pages["/dir/a%20b.txt"] = lambda h: h.reply(body=DATA)
    server.pages["/c"] = lambda h: h.reply(body=b"")
    old = os.umask(0o077)
    try:
        fetch(
            tmp_path,
            f"{server.base}/dir/a%20b.txt?token=1#part",
            InputUrl(f"{server.base}/c", name="named", sha256=hashlib.sha256(b"").hexdigest().upper()),
            inline={"prompt.txt": "grüße\n"},
        )
    finally:
        os.umask(old)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {
        "prompt.txt": "grüße\n".encode(),
        "a b.txt": DATA,
        "named": b"",
    }
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o600}
    assert server.requests[0][0] == "/dir/a%20b.txt?token=1"


PATH = "a name must not be a path"
CONTROL = "a name must be UTF-8 without control characters"


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("", "the input has no name; add a 'name'"),
        (".", PATH),
        ("..", PATH),
        ("a/b", PATH),
        ("/etc/passwd", PATH),
        ("../x", PATH),
        ("-rf", "a name must not begin with a dash: programs would read the name as an option"),
        ("a\0b", CONTROL),
        ("a\nb", CONTROL),
        ("a\x7fb", CONTROL),
        ("a\x9bb", CONTROL),
        ("ü" * 128, "a name must not be longer than 255 bytes"),
    ],
)
def test_bad_names(tmp_path: Path, name: str, fault: str) -> None:
    said = f"cannot take input {name[:80]!a}: {fault}"
    assert failure(tmp_path, InputUrl("http://127.0.0.1:1/x", name=name)) == said
    assert failure(tmp_path, inline={name: "x"}) == said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("path", "name", "fault"),
    [
        ("", "", "the input has no name; add a 'name'"),
        ("/", "", "the input has no name; add a 'name'"),
        ("/a/..%2f..%2fetc", "../../etc", PATH),
        ("/%2e%2e", "..", PATH),
        ("/a/..", "", "the input has no name; add a 'name'"),
        ("/%2drf", "-rf", "a name must not begin with a dash: programs would read the name as an option"),
        ("/a%00", "a\0", CONTROL),
        ("/a%0a", "a\n", CONTROL),
        ("/a%ff", "a\udcff", CONTROL),
    ],
)
def test_bad_names_in_addresses(tmp_path: Path, path: str, name: str, fault: str) -> None:
    said = failure(tmp_path, f"http://127.0.0.1:1{path}")
    assert said.endswith(fault)
    if name:
        assert said == f"cannot take input {name!a}: {fault}"


def test_the_same_name_twice(tmp_path: Path) -> None:
    said = "cannot take input 'x': two inputs have this name"
    assert failure(tmp_path, "http://h/x", "http://i/x") == said
    assert failure(tmp_path, "http://h/x", inline={"x": ""}) == said


def test_names_of_the_greatest_length_and_like_our_own(server: Server, tmp_path: Path) -> None:
    server.pages["/x"] = lambda h: h.reply(body=b"1")
    names = ["n" * 255, "a", "a.part", ".part"]
    fetch(tmp_path, *[InputUrl(f"{server.base}/x", name=name) for name in names])
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("file:///etc/passwd", "file:///etc/passwd: the node fetches only http and https URLs"),
        ("ftp://h/x", "ftp://h/x: the node fetches only http and https URLs"),
        ("data:text/plain,x", "data:text/plain,x: the node fetches only http and https URLs"),
        ("/etc/passwd", "/etc/passwd: the node fetches only http and https URLs"),
        ("", ": the node fetches only http and https URLs"),
        ("http:///x", "http:///x: a URL must have a host and no user name"),
        ("http://u:p4ss@h/x?k=v", "http://h/x: a URL must have a host and no user name"),
        ("http://h:99999/x", "http://h:99999/x: not a URL"),
        ("http://[::1/x", "http://[::1/x: not a URL"),
    ],
)
def test_addresses_that_are_not_fetched(tmp_path: Path, url: str, said: str) -> None:
    assert failure(tmp_path, InputUrl(url, name="x")) == f"cannot fetch {said}"


def test_a_line_break_in_an_address_reaches_no_header(server: Server, tmp_path: Path) -> None:
    server.pages["/x%0D%0AX-Evil:%201"] = lambda h: h.reply(body=b"1")
    fetch(tmp_path, InputUrl(f"{server.base}/x\r\nX-Evil: 1", name="x"))
    assert "X-Evil" not in server.requests[0][1]


def test_nothing_of_ours_is_sent_along(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login a password b\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    server.pages["/x"] = lambda h: h.reply(307, Location="/y", Set_Cookie="a=b; path=/")
    server.pages["/y"] = lambda h: h.reply(body=b"1")
    fetch(tmp_path, f"{server.base}/x")
    for _, headers in server.requests:
        assert set(headers) == {"Host", "User-Agent", "Accept-Encoding", "Connection"}


# Bounds


def test_a_size_over_the_bound(server: Server, tmp_path: Path) -> None:
    def endless(h: Handler) -> None:
        h.send_response(200)
        h.end_headers()
        while True:
            h.wfile.write(DATA)

    server.pages["/declared"] = lambda h: h.reply(length="1000001")
    server.pages["/endless"] = endless
    server.pages["/x"] = lambda h: h.reply(body=DATA)
    for page in ("declared", "endless"):
        said = failure(tmp_path, f"{server.base}/{page}")
        assert said == f"cannot take input {page}: larger than 1 MB (coordinator.max_input_mb)"
    small = InputUrl(f"{server.base}/x", max_mb=0.2)
    assert failure(tmp_path, small) == "cannot take input x: larger than 0.2 MB (max_mb of the input)"
    assert failure(tmp_path, inline={"i": "ü" * 500_001}) == (
        "cannot take input i: larger than 1 MB (coordinator.max_input_mb)"
    )
    assert list(tmp_path.iterdir()) == []


def test_all_inputs_together_over_the_bound(server: Server, tmp_path: Path) -> None:
    server.pages["/x"] = lambda h: h.reply(body=b"x" * 900_000)
    said = failure(tmp_path, f"{server.base}/x", inline={"i": "y" * 600_001})
    assert (
        said == "cannot take input x: all inputs together are larger than 1.5 MB (coordinator.max_input_mb)"
    )


def test_a_wrong_sha256(server: Server, tmp_path: Path) -> None:
    server.pages["/x"] = lambda h: h.reply(body=DATA)
    said = failure(tmp_path, InputUrl(f"{server.base}/x?key=1", sha256="0" * 64))
    assert said == f"cannot take input x: its sha256 is {SHA}, not {'0' * 64}"
    assert list(tmp_path.iterdir()) == []


def stalling(server: Server, head: bytes) -> Page:
    def page(h: Handler) -> None:
        h.wfile.write(head)
        server.stop.wait(10)

    return page


@pytest.mark.parametrize("head", [b"", b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nabc"])
def test_a_server_that_stalls(server: Server, tmp_path: Path, head: bytes) -> None:
    server.pages["/x"] = stalling(server, head)
    limits = InputLimits(1000, 1000, timeout_s=20, stall_s=0.3, attempts=2)
    assert failure(tmp_path, f"{server.base}/x?key=1", limits=limits) == (
        f"cannot fetch {server.base}/x: the server does not answer, or has stopped sending (2 attempts)"
    )


@pytest.mark.parametrize(
    "head", [b"HTTP/1.1 200 OK\r\nX: ", b"HTTP/1.1 200 OK\r\nContent-Length: 999\r\n\r\n"]
)
def test_a_byte_now_and_then_does_not_outlast_the_deadline(
    server: Server, tmp_path: Path, head: bytes
) -> None:
    def drip(h: Handler) -> None:
        h.wfile.write(head)
        while not server.stop.wait(0.02):
            h.wfile.write(b"x")

    server.pages["/x"] = drip
    limits = InputLimits(1000, 1000, timeout_s=0.5, stall_s=5)
    begun = now()
    assert failure(tmp_path, f"{server.base}/x", limits=limits) == (
        "cannot fetch the inputs: not complete after 0.5 s"
    )
    assert now() - begun < 4


def test_a_cancelled_job_stops_waiting(server: Server, tmp_path: Path) -> None:
    asked = threading.Event()

    def page(_: Handler) -> None:
        asked.set()
        server.stop.wait(10)

    server.pages["/x"] = page
    limits = InputLimits(1000, 1000, timeout_s=60, stall_s=60)
    begun = now()
    said = failure(
        tmp_path, f"{server.base}/x", limits=limits, cancelled=asked.is_set, code=ErrorCode.E_CANCELLED
    )
    assert said == "cannot fetch the inputs: the job was cancelled"
    assert now() - begun < 5


def test_a_cancelled_job_does_not_wait_for_another_attempt(server: Server, tmp_path: Path) -> None:
    server.pages["/x"] = lambda h: h.reply(500)
    waits: list[float] = []
    failure(
        tmp_path,
        f"{server.base}/x",
        wait=waits.append,
        cancelled=lambda: bool(waits),
        code=ErrorCode.E_CANCELLED,
    )
    assert len(server.requests) == 1


def test_a_full_disk(tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    server.pages["/x"] = lambda h: h.reply(body=DATA)
    monkeypatch.setattr(inputs, "_create", lambda _: Path("/dev/full").open("r+b"))  # noqa: SIM115
    monkeypatch.setattr("aitbc_miner.inputs.fetch._Transfer.restart", restart_without_truncate)
    # There is room: somebody else was about to give it back.
    with pytest.raises(LocalError, match="No space left"):
        fetch(tmp_path, f"{server.base}/x")
    with pytest.raises(LocalError, match="No space left"):
        fetch(tmp_path, inline={"i": "x" * 100})
    monkeypatch.setattr(fs, "free_space", lambda _: fs.Room())
    said = "cannot write the inputs: No space left on device"
    assert failure(tmp_path, f"{server.base}/x", code=ErrorCode.E_DISK) == said
    assert failure(tmp_path, inline={"i": "x" * 100}, code=ErrorCode.E_DISK) == said


def restart_without_truncate(transfer: Any, reply: object = None) -> None:
    # /dev/full can be written to, in vain, but not be cut.
    transfer.sha256, transfer.got, transfer.total = hashlib.sha256(), 0, None
    transfer.etag = transfer.modified = None


def test_a_want_of_descriptors_is_not_the_servers_fault(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none_left(*_: object, **__: object) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr("aitbc_miner.inputs.fetch.Dialer.connect", none_left)
    with pytest.raises(LocalError, match="Too many open files"):
        fetch(tmp_path, f"{server.base}/x")


def test_other_errors_of_the_disk_are_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(_: Path) -> BinaryIO:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(inputs, "_create", denied)
    with pytest.raises(LocalError, match="cannot write the inputs: Read-only file system"):
        fetch(tmp_path, inline={"i": "x"})


# Attempts and resumption


@pytest.mark.parametrize(
    ("status", "requests"), [(404, 1), (403, 1), (206, 1), (304, 1), (416, 1), (500, 4), (503, 4), (429, 4)]
)
def test_statuses(server: Server, tmp_path: Path, status: int, requests: int) -> None:
    server.pages["/x"] = lambda h: h.reply(status)
    said = failure(tmp_path, f"{server.base}/x")
    tail = " (4 attempts)" if requests == 4 else ""
    assert said == f"cannot fetch {server.base}/x: the server answered {status}{tail}"
    assert len(server.requests) == requests


def test_waits_grow_and_are_random(server: Server, tmp_path: Path) -> None:
    server.pages["/x"] = lambda h: h.reply(500)
    waits: list[float] = []
    failure(tmp_path, f"{server.base}/x", wait=waits.append)
    assert waits
    assert all(0 < one <= inputs.POLL_S for one in waits)
    assert len(set(waits)) > 1


def test_no_server_no_name_and_garbage(server: Server, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        base = "http://{}:{}".format(*closed.getsockname())
    assert failure(tmp_path, f"{base}/x") == f"cannot fetch {base}/x: connection refused (4 attempts)"
    said = failure(tmp_path, "http://no-such-host.invalid/x")
    assert re.fullmatch(r"cannot fetch http://no-such-host.invalid/x: .*name.* \(4 attempts\)", said)
    server.pages["/x"] = stalling(server, b"SSH-2.0-OpenSSH\r\n")
    said = failure(tmp_path, f"{server.base}/x")
    assert said == f"cannot fetch {server.base}/x: the reply is not HTTP, or was cut short (4 attempts)"


class Breaking:
    """A page that breaks off every `step` bytes and knows ranges; `lie` answers them in another way."""

    def __init__(self, step: int, lie: Callable[[Handler, int], bool] | None = None, **headers: str) -> None:
        self.step = step
        self.lie = lie
        self.headers = headers

    def __call__(self, h: Handler) -> None:
        asked = h.headers.get("Range")
        start = int(asked[6:-1]) if asked else 0
        if asked and self.lie and self.lie(h, start):
            return
        self.answer(h, start, 206 if asked else 200)

    def answer(self, h: Handler, start: int, status: int) -> None:
        said = {"Content_Range": f"bytes {start}-{len(DATA) - 1}/{len(DATA)}"} if status == 206 else {}
        piece = DATA[start : start + self.step]
        h.reply(status, piece, length=str(len(DATA) - start), **said, **self.headers)


def fetched(server: Server, into: Path, page: Page) -> bytes:
    server.pages["/x"] = page
    fetch(into, InputUrl(f"{server.base}/x", sha256=SHA))
    return (into / "x").read_bytes()


def test_a_broken_transfer_goes_on_where_it_broke(server: Server, tmp_path: Path) -> None:
    # More breaks than attempts: only failures without progress count.
    assert fetched(server, tmp_path, Breaking(40_000, ETag='"v1"')) == DATA
    assert server.ranges() == [None, *[f"bytes={40_000 * n}-" for n in range(1, 7)]]
    assert {headers.get("If-Range") for _, headers in server.requests[1:]} == {'"v1"'}


@pytest.mark.parametrize(
    ("headers", "validator"),
    [
        ({}, None),
        ({"ETag": 'W/"v1"'}, None),
        (
            {"ETag": 'W/"v1"', "Last_Modified": "Wed, 01 Jan 2020 00:00:00 GMT"},
            "Wed, 01 Jan 2020 00:00:00 GMT",
        ),
    ],
)
def test_what_a_resumption_depends_on(
    server: Server, tmp_path: Path, headers: dict[str, str], validator: str | None
) -> None:
    assert fetched(server, tmp_path, Breaking(200_000, None, **headers)) == DATA
    assert server.requests[1][1].get("If-Range") == validator


def test_a_server_that_ignores_ranges_starts_again(server: Server, tmp_path: Path) -> None:
    def whole(h: Handler, _: int) -> bool:
        h.reply(200, DATA)
        return True

    assert fetched(server, tmp_path, Breaking(100_000, whole)) == DATA
    assert len(server.requests) == 2


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Content_Range": "bytes 0-255999/256000"},
        {"Content_Range": "bytes 100001-255999/256000"},
        {"Content_Range": "bytes 100000-255999/256001"},
        {"Content_Range": "bytes 100000-255999/256000", "ETag": '"v2"'},
        {"Content_Range": "cows 100000-255999/256000"},
        {"Content_Range": "bytes */256000"},
    ],
)
def test_a_range_that_is_not_the_rest_starts_again(
    server: Server, tmp_path: Path, headers: dict[str, str]
) -> None:
    def lie(h: Handler, start: int) -> bool:
        page.step = len(DATA)
        h.reply(206, b"?" * (len(DATA) - start), **headers)
        return True

    page = Breaking(100_000, lie, ETag='"v1"')
    assert fetched(server, tmp_path, page) == DATA
    assert server.ranges() == [None, "bytes=100000-", None]


def test_a_file_that_shrank_starts_again(server: Server, tmp_path: Path) -> None:
    def gone(h: Handler, _: int) -> bool:
        page.step = len(DATA)
        h.reply(416)
        return True

    page = Breaking(100_000, gone)
    assert fetched(server, tmp_path, page) == DATA


def test_a_transfer_that_always_breaks_at_the_same_place(server: Server, tmp_path: Path) -> None:
    def whole(h: Handler, _: int) -> bool:
        page.answer(h, 0, 200)
        return True

    page = Breaking(1000, whole)
    server.pages["/x"] = page
    assert failure(tmp_path, f"{server.base}/x") == (
        f"cannot fetch {server.base}/x: the transfer broke off after 1000 of 256000 bytes (4 attempts)"
    )


def test_chunks(server: Server, tmp_path: Path) -> None:
    def page(h: Handler) -> None:
        h.send_response(200)
        h.send_header("Transfer-Encoding", "chunked")
        h.end_headers()
        for start in range(0, len(DATA), 50_000):
            piece = DATA[start : start + 50_000]
            h.wfile.write(f"{len(piece):x}\r\n".encode() + piece + b"\r\n")
        if len(server.requests) > 1:
            h.wfile.write(b"0\r\n\r\n")

    assert fetched(server, tmp_path, page) == DATA
    assert len(server.requests) == 2


@pytest.mark.parametrize("length", [True, False])
def test_what_is_packed_is_taken_as_it_comes(server: Server, tmp_path: Path, length: bool) -> None:
    bomb = gzip.compress(bytes(50 << 20))

    def page(h: Handler) -> None:
        h.send_response(200)
        h.send_header("Content-Encoding", "gzip")
        if length:
            h.send_header("Content-Length", str(len(bomb)))
        h.end_headers()
        h.wfile.write(bomb)

    server.pages["/x"] = page
    fetch(tmp_path, f"{server.base}/x")
    assert (tmp_path / "x").read_bytes() == bomb
    assert server.requests[0][1]["Accept-Encoding"] == "identity"
    # And it is its own bytes that are bounded.
    low = InputLimits(max_bytes_each=len(bomb) - 1, max_bytes_total=1 << 30, timeout_s=20, stall_s=5)
    (tmp_path / "x").unlink()
    assert failure(tmp_path, f"{server.base}/x", limits=low).endswith(
        f"larger than {(len(bomb) - 1) / 1e6} MB (coordinator.max_input_mb)"
    )


# Redirects


def test_redirects_up_to_the_bound(server: Server, tmp_path: Path) -> None:
    for number in range(9):
        server.pages[f"/{number}"] = lambda h, n=number: h.reply(302, Location=f"/{n + 1}?k=v")  # type: ignore[misc]
    server.pages["/9"] = lambda h: h.reply(body=b"end")
    fetch(tmp_path, f"{server.base}/4")
    assert (tmp_path / "4").read_bytes() == b"end"
    said = failure(tmp_path, f"{server.base}/3")
    assert said == f"cannot fetch {server.base}/9: more than 5 redirects"


@pytest.mark.parametrize(
    ("location", "said"),
    [
        ("file:///etc/passwd", "file:///etc/passwd: the node fetches only http and https URLs"),
        ("gopher://h/", "gopher://h/: the node fetches only http and https URLs"),
        ("http://u:p@h/", "http://h/: a URL must have a host and no user name"),
        ("//[", "//[: not a URL"),
    ],
)
def test_redirects_that_are_not_followed(server: Server, tmp_path: Path, location: str, said: str) -> None:
    server.pages["/x"] = lambda h: h.reply(302, Location=location)
    assert failure(tmp_path, f"{server.base}/x") == f"cannot fetch {said}"


def test_no_redirect_from_https_to_http() -> None:
    with pytest.raises(JobError) as caught:
        urls.redirected("https://h/a?k=1", "http://i/b?k=2")
    assert caught.value.message == "cannot fetch https://h/a: the server redirects from https to http://i/b"
    assert urls.redirected("https://h/a", "/b") == "https://h/b"
    assert urls.redirected("http://h/a", "https://h/b") == "https://h/b"


# TLS


def tls_server(server: Server, pem: Path) -> str:
    pem.write_text(CERTIFICATE)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pem)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    server.pages["/x"] = lambda h: h.reply(body=DATA)
    return server.base.replace("http:", "https:")


def test_a_trusted_certificate(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tls_server(server, tmp_path / "pem")
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "pem"))
    fetch(tmp_path, f"{base}/x")
    assert (tmp_path / "x").read_bytes() == DATA
    # The certificate is for 127.0.0.1 only.
    said = failure(tmp_path, f"{base.replace('127.0.0.1', 'localhost')}/x")
    assert (
        "/x: its TLS certificate is for another name (Hostname mismatch, certificate is not valid for" in said
    )


def test_an_untrusted_certificate(server: Server, tmp_path: Path) -> None:
    base = tls_server(server, tmp_path / "pem")
    said = failure(tmp_path, f"{base}/x")
    assert said == (
        f"cannot fetch {base}/x: its TLS certificate is not trusted (self-signed certificate) (4 attempts)"
    )
    assert server.requests == []


@pytest.mark.parametrize("head", ["HTTP/1.1 103 Early Hints\r\nLink: </y>\r\n\r\n", "X-Many: y\r\n" * 200])
def test_interim_replies_and_many_headers(server: Server, tmp_path: Path, head: str) -> None:
    def page(h: Handler) -> None:
        interim, more = (head, "") if head.startswith("HTTP") else ("", head)
        h.wfile.write(f"{interim * 2}HTTP/1.1 200 OK\r\n{more}Content-Length: 4\r\n\r\ndata".encode())

    server.pages["/x"] = page
    fetch(tmp_path, f"{server.base}/x")
    assert (tmp_path / "x").read_bytes() == b"data"


@pytest.mark.parametrize(
    "error", [socket.gaierror(socket.EAI_AGAIN, "not now"), OSError(errno.ENETUNREACH, "no way")]
)
def test_a_network_of_ours_that_is_away_for_a_while_is_not_the_inputs_fault(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: OSError
) -> None:
    server.pages["/x"] = lambda h: h.reply(body=b"data")
    look_up, left = web.look_up, [error] * 20

    def look_up_later(host: str, port: int, flags: int = 0) -> list[web.Address]:
        if left:
            raise left.pop()
        return look_up(host, port, flags)

    monkeypatch.setattr(web, "look_up", look_up_later)
    fetch(tmp_path, f"{server.base}/x")
    assert (tmp_path / "x").read_bytes() == b"data"
    left[:] = [error] * 1000
    assert failure(tmp_path, f"{server.base}/y").endswith(" (40 attempts)")


def test_headers_without_end_are_named(server: Server, tmp_path: Path) -> None:
    endless = b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 300 + b"\r\n"

    def page(h: Handler) -> None:
        h.wfile.write(endless)

    server.pages["/x"] = page
    assert "the reply is not usable: got more than 256 headers" in failure(tmp_path, f"{server.base}/x")


def test_an_input_of_a_neighbour_is_refused_unless_allowed(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        neighbours, "_is_private", lambda _: False
    )  # as if this were a public address of ours
    said = f"cannot fetch from 127.0.0.1: {BARRED} 127.0.0.1; see coordinator.allow_private_inputs"
    assert failure(tmp_path, f"{server.base}/x", allow_private=False) == said
    assert server.requests == []


def test_of_several_addresses_those_that_are_permitted_are_asked(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = server.server_address[1]
    found = [web.Address(socket.AF_INET, (host, port)) for host in ("10.0.0.1", "127.0.0.1", "169.254.1.1")]
    monkeypatch.setattr(web, "look_up", lambda *_: list(found))
    monkeypatch.setattr(inputs, "forbidden", lambda address, **_: address != "127.0.0.1")
    server.pages["/x"] = lambda h: h.reply(body=b"1")
    fetch(tmp_path, f"http://many.test:{port}/x", allow_private=False)
    assert (tmp_path / "x").read_bytes() == b"1"


def test_an_address_that_takes_requests_and_answers_none_is_asked_last(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.7", 0)) as silent:
        found = [web.Address(socket.AF_INET, one) for one in (silent.getsockname(), server.server_address)]
        monkeypatch.setattr(web, "look_up", lambda *_: list(found))
        server.pages["/x"] = lambda h: h.reply(body=b"1")
        limits = InputLimits(1000, 1000, timeout_s=20, stall_s=0.3, attempts=2)
        fetch(tmp_path, "http://many.test/x", limits=limits)
    assert (tmp_path / "x").read_bytes() == b"1"


# Addresses inside the operator's network


def test_a_private_address_is_refused_unless_allowed(server: Server, tmp_path: Path) -> None:
    said = f"cannot fetch from 127.0.0.1: {BARRED} 127.0.0.1; see coordinator.allow_private_inputs"
    assert failure(tmp_path, f"{server.base}/x", allow_private=False) == said
    port = server.server_address[1]
    for host in ("2130706433", "0x7f.1", "127.1"):
        assert f"{BARRED} 127.0.0.1" in failure(tmp_path, f"http://{host}:{port}/x", allow_private=False)
    assert server.requests == []


def test_a_redirect_to_the_metadata_service_is_refused(server: Server, tmp_path: Path) -> None:
    server.pages["/x"] = lambda h: h.reply(302, Location="http://169.254.169.254/latest/meta-data")
    said = failure(tmp_path, f"{server.base}/x")
    assert said == (
        f"cannot fetch from 169.254.169.254: {BARRED} 169.254.169.254; see coordinator.allow_private_inputs"
    )


def test_the_connection_goes_to_the_address_that_was_checked(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, lookups = socket.getaddrinfo, []

    def rebinding(host: str, port: int, *args: Any, **kwargs: Any) -> Any:
        if host != "rebinding.test":
            ipaddress.ip_address(host)
            return real(host, port, *args, **kwargs)
        lookups.append(host)
        addresses = ["169.254.169.254", "127.0.0.1"] if len(lookups) == 1 else ["169.254.169.254"]
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (one, port)) for one in addresses]

    monkeypatch.setattr(socket, "getaddrinfo", rebinding)
    server.pages["/x"] = lambda h: h.reply(body=b"1")
    port = server.server_address[1]
    fetch(tmp_path, f"http://rebinding.test:{port}/x")
    assert lookups == ["rebinding.test"]
    assert server.requests[0][1]["Host"] == f"rebinding.test:{port}"
