import codecs
import contextlib
import errno
import gzip
import json
import os
import socket
import ssl
import threading
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import pytest
import requests
import responses
from requests_toolbelt import MultipartEncoder

from aitbc_miner.coordinator.answers import BOOTSTRAP, Call, check, decode_answer
from aitbc_miner.coordinator.http import MAX_REPLY, HttpClient, HttpReply, clean, retry_after
from aitbc_miner.coordinator.interface import Busy, CoordinatorError, Gone, Refused, Unauthorized, Unreachable
from aitbc_miner.errors import MinerError
from aitbc_miner.util.clock import now
from aitbc_miner.util.web import Dialer

# Of nobody: made for these tests, valid for 127.0.0.1, signed by itself.
CERTIFICATE = """\
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgcbKqb7NILYtL4L8F
Ii8CLY+r/i3jcblzTQgmV1RPJ92hRANCAATVxiCdXr22SCNMTof7TGmTQ9+ReHu2
ETV88KVy9/x7zDqCaVJ87eH5A7RWhbVvmyuUk587746SqeSbXoWwrg4A
-----END PRIVATE KEY-----
-----BEGIN CERTIFICATE-----
MIIBjzCCATagAwIBAgIUa5FQpg/84eGEo8S0kAEARNqcKZkwCgYIKoZIzj0EAwIw
FDESMBAGA1UEAwwJMTI3LjAuMC4xMCAXDTI2MTEyMzE0NDgyM1oYDzIxMjYxMDMw
MTQ0ODIzWjAUMRIwEAYDVQQDDAkxMjcuMC4wLjEwWTATBgcqhkjOPQIBBggqhkjO
PQMBBwNCAATVxiCdXr22SCNMTof7TGmTQ9+ReHu2ETV88KVy9/x7zDqCaVJ87eH5
A7RWhbVvmyuUk587746SqeSbXoWwrg4Ao2QwYjAdBgNVHQ4EFgQUnxqSQHfSGQI3
hZgDUIhFbyVU5rMwHwYDVR0jBBgwFoAUnxqSQHfSGQI3hZgDUIhFbyVU5rMwDwYD
VR0TAQH/BAUwAwEB/zAPBgNVHREECDAGhwR/AAABMAoGCCqGSM49BAMCA0cAMEQC
IEEVEDYR9UKiC9NKuXIrEB7umCZ+fu4jfERHxovPFxL2AiAKItN4CJiR5RflXaOH
vdvRIGzmg9EWen0t0ealNoFx0g==
-----END CERTIFICATE-----
"""

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"

Talk = Callable[[socket.socket], None]


class Peer:
    """A server on loopback that lets a function talk on each connection, and counts them."""

    def __init__(self, talk: Talk, tls: ssl.SSLContext | None = None) -> None:
        self.connections = 0
        self.stop = threading.Event()
        self.talks: list[threading.Thread] = []
        self._talk = talk
        self._tls = tls
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = "{}:{}".format(*self._listener.getsockname())
        self.url = f"http://{self.address}/api"
        self._acceptor = threading.Thread(target=self._accept)
        self._acceptor.start()

    def _accept(self) -> None:
        while True:
            connection, _ = self._listener.accept()
            if self.stop.is_set():
                connection.close()
                return
            self.connections += 1
            self.talks.append(threading.Thread(target=self._serve, args=(connection,)))
            self.talks[-1].start()

    def _serve(self, connection: socket.socket) -> None:
        connection.settimeout(10)
        # The client may leave at any moment; that is what many tests are about.
        with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
            stack.callback(connection.close)
            if self._tls:
                connection = stack.enter_context(self._tls.wrap_socket(connection, server_side=True))
            self._talk(connection)

    def close(self) -> None:
        self.stop.set()
        socket.create_connection(self._listener.getsockname()).close()
        for thread in [self._acceptor, *self.talks]:
            thread.join(10)
            assert not thread.is_alive()
        self._listener.close()


Start = Callable[..., Peer]


@pytest.fixture
def peer() -> Iterator[Start]:
    with contextlib.ExitStack() as stack:

        def start(talk: Talk, tls: ssl.SSLContext | None = None) -> Peer:
            made = Peer(talk, tls)
            stack.callback(made.close)
            return made

        yield start


def read_request(connection: socket.socket) -> tuple[bytes, bytes]:
    """Read one request: its head and its body. Empty when the client is gone."""
    data = b""
    while b"\r\n\r\n" not in data:
        piece = connection.recv(65536)
        if not piece:
            return b"", b""
        data += piece
    head, _, body = data.partition(b"\r\n\r\n")
    length = next((int(x[15:]) for x in head.split(b"\r\n") if x.lower().startswith(b"content-length:")), 0)
    while len(body) < length:
        body += connection.recv(65536)
    return head, body


def answering(*replies: bytes) -> Talk:
    def talk(connection: socket.socket) -> None:
        for reply in replies:
            if not read_request(connection)[0]:
                return
            connection.sendall(reply)

    return talk


def silent(peer: Start) -> Peer:
    box: list[Peer] = []
    box.append(peer(lambda _: box[0].stop.wait(10)))
    return box[0]


@contextlib.contextmanager
def client(url: str, timeout_s: float = 5, **kwargs: Any) -> Iterator[HttpClient]:
    with contextlib.closing(HttpClient(url, timeout_s, **kwargs)) as http:
        http.set_token("s3cret-token")
        yield http


def failure(url: str, timeout_s: float = 5, payload: object = None, **kwargs: Any) -> str:
    with client(url, timeout_s, **kwargs) as http, pytest.raises(Unreachable) as caught:
        http.call("POST", "/jobs/pull", payload or {}, doing="pull a job")
    assert "s3cret" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("head", "piece"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n", b"x"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\nx\r\n"),
        (b"HTTP/1.1 200 OK\r\nX-Long: ", b"x"),
        (b"", b"H"),
        (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    ],
)
def test_a_byte_now_and_then_does_not_outlast_the_deadline(peer: Start, head: bytes, piece: bytes) -> None:
    box: list[Peer] = []

    def drip(connection: socket.socket) -> None:
        read_request(connection)
        connection.sendall(head)
        while not box[0].stop.wait(0.02):
            connection.sendall(piece)

    box.append(peer(drip))
    begun = now()
    said = failure(box[0].url, 0.4)
    assert said == f"cannot pull a job: no complete reply from {box[0].address} within 0.4 s"
    assert 0.35 < now() - begun < 3


def test_a_silent_peer_and_one_that_does_not_read(peer: Start) -> None:
    quiet = silent(peer)
    said = f"cannot pull a job: no complete reply from {quiet.address} within 0.3 s"
    assert failure(quiet.url, 0.3) == said
    assert failure(quiet.url, 0.3, ["y" * 30_000_000]) == said


def test_an_endless_body_is_cut_at_the_bound(peer: Start) -> None:
    def talk(connection: socket.socket) -> None:
        read_request(connection)
        connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
        while True:
            connection.sendall(b"x" * 65536)

    with client(peer(talk).url) as http:
        reply = http.call("POST", "/x", {}, doing="pull a job", max_bytes=5000)
    assert (len(reply.body), reply.complete) == (5000, False)
    with pytest.raises(Unreachable, match=r"^cannot pull a job: garbage reply: larger than 4 KiB$"):
        decode_answer(reply, "pull a job")


def test_a_body_of_just_the_bound_is_complete(peer: Start) -> None:
    with client(peer(answering(OK)).url) as http:
        assert http.call("POST", "/x", {}, doing="pull a job", max_bytes=2) == HttpReply(200, b"{}")


def test_endless_headers_end(peer: Start) -> None:
    def talk(connection: socket.socket) -> None:
        read_request(connection)
        connection.sendall(b"HTTP/1.1 200 OK\r\n")
        while True:
            connection.sendall(b"X-Y: z\r\n" * 1000)

    server = peer(talk)
    said = f"cannot pull a job: garbage reply from {server.address}: got more than 256 headers"
    assert failure(server.url) == said


@pytest.mark.parametrize(
    ("sent", "said"),
    [
        (b"", "{} closed the connection without a reply"),
        (b"SSH-2.0-OpenSSH_9.2\r\n\r\n", "garbage reply from {}: not HTTP"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nabc", "the reply of {} was cut short"),
        (
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nffff\r\nabc",
            "the reply of {} was cut short",
        ),
        (
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\nabc",
            "the reply of {} was cut short",
        ),
    ],
)
def test_broken_replies(peer: Start, sent: bytes, said: str) -> None:
    server = peer(answering(sent))
    assert failure(server.url) == "cannot pull a job: " + said.format(server.address)


def test_connection_refused_and_unknown_name() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = "{}:{}".format(*server.getsockname())
    assert failure(f"http://{address}/api") == f"cannot pull a job: connection refused by {address}"
    said = failure("http://no-such-host.invalid/api")
    assert said.startswith("cannot pull a job: the name of no-such-host.invalid cannot be looked up (")


@pytest.mark.parametrize("number", [errno.ECONNRESET, errno.EPIPE, errno.EHOSTUNREACH])
@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_peer_that_resets_while_we_connect(
    number: int, scheme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def connect(*_: object, **__: object) -> socket.socket:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Dialer, "connect", connect)
    assert failure(f"{scheme}://127.0.0.1:9").endswith(
        f"no connection to 127.0.0.1:9 ({os.strerror(number)})"
    )


def test_an_untrusted_certificate_and_a_trusted_one(peer: Start, tmp_path: Path) -> None:
    pem = tmp_path / "peer.pem"
    pem.write_text(CERTIFICATE)
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(pem)
    server = peer(answering(OK), tls)
    url = f"https://{server.address}"
    assert failure(url).startswith(
        f"cannot pull a job: the TLS certificate of {server.address} is not trusted"
        " (self-signed certificate); name the issuer's certificate in coordinator.ca_file"
    )
    for trusted in ({"ca_file": pem}, {"verify": False}):
        with client(url, **trusted) as http:
            assert http.call("POST", "/x", {}, doing="pull a job").status == 200


def test_tls_with_a_peer_that_has_none(peer: Start) -> None:
    server = peer(lambda connection: connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n"))
    said = failure(f"https://{server.address}")
    assert said == (
        f"cannot pull a job: TLS with {server.address} failed (the server speaks no TLS):"
        " it probably speaks http; see coordinator.base_url"
    )


def test_a_redirect_is_not_followed_and_carries_no_token(peer: Start) -> None:
    other = peer(answering(OK))
    where = f"http://{other.address}/elsewhere"
    head = f"HTTP/1.1 307 Temporary Redirect\r\nLocation: {where}?secret=1\r\nContent-Length: 0\r\n\r\n"
    with client(peer(answering(head.encode())).url) as http:
        reply = http.call("POST", "/x", {}, doing="pull a job")
    with pytest.raises(Unreachable) as caught:
        check(reply, Call(), BOOTSTRAP, "pull a job", "the node token")
    assert str(caught.value) == (
        f"cannot pull a job: the coordinator answered 307, a redirect to {where}; the node follows no"
        " redirects: set coordinator.base_url to the final address"
    )
    assert other.connections == 0


@pytest.mark.parametrize("where", [b"http://[", b"\xff\xfe", b"//", b"http://a:b/", b""])
def test_a_redirect_to_nonsense_is_no_more_than_a_redirect(peer: Start, where: bytes) -> None:
    head = b"HTTP/1.1 302 Found\r\nLocation: " + where + b"\r\nContent-Length: 0\r\n\r\n"
    with client(peer(answering(head)).url) as http:
        reply = http.call("POST", "/x", {}, doing="pull a job")
    with pytest.raises(Unreachable, match="answered 302, a redirect to "):
        check(reply, Call(), BOOTSTRAP, "pull a job", "the node token")


def test_the_body_of_a_redirect_is_bounded_too(peer: Start) -> None:
    sent = 0

    def endless(connection: socket.socket) -> None:
        nonlocal sent
        connection.recv(65536)
        connection.sendall(b"HTTP/1.1 302 Found\r\nLocation: /y\r\nContent-Length: 99999999999\r\n\r\n")
        while True:
            sent += connection.send(b"x" * 65536)

    with client(peer(endless).url) as http:
        reply = http.call("POST", "/x", {}, doing="pull a job", max_bytes=1000)
    assert (reply.status, reply.body, reply.complete, reply.location) == (302, b"x" * 1000, False, "/y")
    # What the sockets of both sides hold by themselves.
    assert sent < 50_000_000


def test_a_reply_that_requests_cannot_take_is_unreachable(
    peer: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    def confused(*_: object, **__: object) -> None:
        raise UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte")

    monkeypatch.setattr(requests.Session, "send", confused)
    with client(peer(answering(OK)).url) as http, pytest.raises(Unreachable, match="UnicodeDecodeError"):
        http.call("POST", "/x", {}, doing="pull a job")


def test_one_connection_for_many_calls_and_one_more_for_a_thread(peer: Start) -> None:
    server = peer(answering(*[OK] * 20))
    with client(server.url) as http:
        for _ in range(5):
            assert http.call("POST", "/x", {}, doing="pull a job").body == b"{}"
        assert server.connections == 1
        thread = threading.Thread(target=http.call, args=("POST", "/x", {}), kwargs={"doing": "pull a job"})
        thread.start()
        thread.join()
        assert server.connections == 2


def test_a_connection_closed_while_idle_is_replaced(peer: Start) -> None:
    server = peer(answering(OK))
    with client(server.url) as http:
        http.call("POST", "/x", {}, doing="pull a job")
        server.talks[0].join(10)
        assert http.call("POST", "/x", {}, doing="pull a job").status == 200
    assert server.connections == 2


def test_what_is_sent(peer: Start, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login a password b\n")
    monkeypatch.setenv("NETRC", str(netrc))
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    seen: list[bytes] = []

    def talk(connection: socket.socket) -> None:
        for _ in range(3):
            seen.append(b"\r\n".join(read_request(connection)))
            connection.sendall(OK.replace(b"\r\n\r\n", b"\r\nSet-Cookie: a=b; path=/\r\n\r\n"))

    with contextlib.closing(HttpClient(peer(talk).url, 5, user_agent="miner/1")) as http:
        http.call("POST", "/x", {"a": 1}, doing="x", params={"q": "ü&"})
        http.set_token("tok-1")
        http.call("GET", "/y", doing="x", headers={"X-More": "1"})
        http.call("POST", "/z", {}, doing="x", headers=http.authorization("tok-2"))
    first, second, third = seen
    assert first.startswith(b"POST /api/x?q=%C3%BC%26 HTTP/1.1\r\n")
    assert first.endswith(b'\r\n{"a":1}')
    assert b"\r\nUser-Agent: miner/1\r\n" in first
    assert b"\r\nAccept-Encoding: identity\r\n" in first
    assert b"Authorization" not in first
    assert second.startswith(b"GET /api/y HTTP/1.1\r\n")
    assert b"\r\nAuthorization: Bearer tok-1\r\n" in second
    assert b"\r\nX-More: 1\r\n" in second
    assert b"\r\nAuthorization: Bearer tok-2\r\n" in third
    assert b"tok-1" not in third
    assert not any(b"Cookie" in one for one in seen)


# Without a time: tests are named for it.
PACKED = {
    "gzip": gzip.compress(b"{}", mtime=0),
    "x-gzip": gzip.compress(b"{}", mtime=0),
    "deflate": zlib.compress(b"{}"),
}


@pytest.mark.parametrize(
    ("coding", "body"),
    [*PACKED.items(), ("deflate", zlib.compress(b"{}")[2:-4]), ("gzip", b"{}"), ("identity", b"{}")],
)
def test_a_packing_that_nobody_asked_for(peer: Start, coding: str, body: bytes) -> None:
    head = f"HTTP/1.1 200 OK\r\nContent-Encoding: {coding}\r\nContent-Length: {len(body)}\r\n\r\n"
    with client(peer(answering(head.encode() + body)).url) as http:
        assert http.call("POST", "/x", {}, doing="x").body == b"{}"


def test_a_packing_that_we_do_not_know_is_named(peer: Start) -> None:
    server = peer(answering(OK.replace(b"\r\n\r\n", b"\r\nContent-Encoding: br\r\n\r\n")))
    assert failure(server.url) == (
        f"cannot pull a job: garbage reply from {server.address}: unknown Content-Encoding br"
    )


def test_a_reply_that_would_unpack_to_much_more_does_not(peer: Start) -> None:
    bomb = gzip.compress(bytes(32 << 20))
    assert len(bomb) < MAX_REPLY
    head = f"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: {len(bomb)}\r\n\r\n"
    with client(peer(answering(head.encode() + bomb)).url) as http:
        tracemalloc.start()
        reply = http.call("POST", "/x", {}, doing="x")
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert (reply.complete, reply.body) == (False, bytes(MAX_REPLY))
    assert peak < 8 << 20


def test_a_byte_order_mark_before_the_json(peer: Start) -> None:
    body = codecs.BOM_UTF8 + b'{"a":1}'
    head = f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\n\r\n"
    with client(peer(answering(head.encode() + body)).url) as http:
        assert decode_answer(http.call("POST", "/x", {}, doing="x"), "x") == {"a": 1}


@pytest.mark.parametrize("status", ["100 Continue", "102 Processing", "103 Early Hints"])
def test_interim_replies_are_no_replies(peer: Start, status: str) -> None:
    interim = f"HTTP/1.1 {status}\r\nLink: </x>; rel=preload\r\n\r\n".encode()
    with client(peer(answering(2 * interim + OK, interim + OK)).url) as http:
        for _ in range(2):
            assert http.call("POST", "/x", {}, doing="x") == HttpReply(200, b"{}")


def test_interim_replies_without_end(peer: Start) -> None:
    url = peer(answering(101 * b"HTTP/1.1 103 Early Hints\r\n\r\n" + OK)).url
    assert failure(url).endswith("more than 100 interim replies")


@pytest.mark.parametrize("scheme", ["bearer", "api_key"])
def test_an_error_that_quotes_the_token_is_told_without_it(peer: Start, scheme: str) -> None:
    """It is shown to who may not read the token, recorded, and may be told to a job's client."""
    body = own("no such token: s3cret-token")
    head = f"HTTP/1.1 422 X\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    with client(peer(answering(head + body)).url, auth_scheme=scheme) as http:
        reply = http.call("POST", "/x", {}, doing="x")
    assert json.loads(reply.body) == json.loads(own("no such token: ***"))


def test_a_token_behind_escapes_or_in_an_address_is_told_by_no_error(peer: Start) -> None:
    body = b'{"error": {"code": "x", "message": "bad \\u0073\\u0033cret-token"}}'
    head = b"HTTP/1.1 302 X\r\nLocation: https://h/s3cret-token/x\r\nContent-Length: %d\r\n\r\n" % len(body)
    with client(peer(answering(head + body)).url) as http:
        reply = http.call("POST", "/x", {}, doing="x")
    assert json.loads(reply.body)["error"]["message"] == "bad ***"
    assert reply.location == "https://h/***/x"


def test_more_headers_than_a_hundred(peer: Start) -> None:
    many = b"".join(b"X-%d: y\r\n" % n for n in range(200))
    with client(peer(answering(OK.replace(b"\r\n\r\n", b"\r\n" + many + b"\r\n"))).url) as http:
        assert http.call("POST", "/x", {}, doing="x").status == 200


def test_an_upload_may_last_longer_than_the_timeout(peer: Start) -> None:
    box: list[Peer] = []

    def slow(connection: socket.socket) -> None:
        got = b""
        while not got.endswith(b"--end--\r\n"):
            box[0].stop.wait(0.01)
            got = got[-20:] + connection.recv(100_000)
        connection.sendall(OK)

    box.append(peer(slow))
    form = MultipartEncoder([("artifact", ("a", b"x" * 12_000_000, "text/plain"))], boundary="end")
    begun = now()
    with client(box[0].url, 0.5) as http:
        assert http.call("POST", "/x", form, doing="deliver").status == 200
    assert now() - begun > 0.5


def test_an_upload_that_stalls_ends(peer: Start) -> None:
    form = MultipartEncoder([("artifact", ("a", b"x" * 30_000_000, "text/plain"))])
    quiet = silent(peer)
    begun = now()
    said = failure(quiet.url, 0.3, form)
    assert said == f"cannot pull a job: no complete reply from {quiet.address} within 0.3 s"
    assert now() - begun < 5


def test_an_answer_in_the_middle_of_an_upload_is_seen(peer: Start) -> None:
    def talk(connection: socket.socket) -> None:
        connection.recv(1000)
        connection.sendall(b"HTTP/1.1 413 Too Large\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
        connection.shutdown(socket.SHUT_WR)
        while connection.recv(65536):
            pass

    form = MultipartEncoder([("artifact", ("a", b"x" * 5_000_000, "text/plain"))])
    with client(peer(talk).url) as http:
        assert http.call("POST", "/x", form, doing="deliver").status == 413


@pytest.mark.parametrize("token", ["", "a b", "a\r\nX-Evil: 1", "tökén", "x" * 8193, "a\n"])
def test_a_token_that_no_header_can_hold(token: str) -> None:
    http = HttpClient("http://127.0.0.1:1", 1)
    with pytest.raises(MinerError) as caught:
        http.set_token(token)
    assert str(caught.value) == (
        "cannot use the token: it is empty or too long, or has spaces, line breaks or non-ASCII text"
    )


def test_the_other_scheme_of_authentication() -> None:
    assert HttpClient("http://h", 1, auth_scheme="api_key").authorization("k") == {"X-Api-Key": "k"}


@responses.activate
def test_an_error_that_wraps_nothing_is_named_by_its_kind() -> None:
    responses.post("http://h/x", body=requests.exceptions.InvalidSchema("inner <repr at 0x1>"))
    with pytest.raises(Unreachable, match=r"^cannot pull a job: InvalidSchema from h$"):
        HttpClient("http://h", 1).call("POST", "/x", {}, doing="pull a job")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("0", 0),
        ("17", 17),
        (" 17 ", 17),
        ("99999999999", 3600),
        ("", None),
        ("-5", None),
        ("soon", None),
        ("1.5", None),
        ("1" * 400, None),
        ("Fri, 32 Foo 2025 99:99:99 GMT", None),
    ],
)
def test_retry_after_in_seconds(value: str, expected: float | None) -> None:
    assert retry_after({"Retry-After": value}) == expected


def test_retry_after_as_a_date() -> None:
    date = "Wed, 01 Jan 2020 00:00:00 GMT"
    assert retry_after({"Retry-After": "Wed, 01 Jan 2020 00:01:30 GMT", "Date": date}) == 90
    assert retry_after({"Retry-After": "Tue, 01 Jan 2030 00:00:00 GMT", "Date": date}) == 3600
    assert retry_after({"Retry-After": "Tue, 01 Jan 2019 00:00:00 GMT", "Date": date}) == 0
    soon = retry_after(
        {"Retry-After": format_datetime(datetime.now(UTC) + timedelta(seconds=100), usegmt=True)}
    )
    assert soon is not None
    assert 90 < soon <= 100


def own(message: str) -> bytes:
    return json.dumps({"error": {"code": "x", "message": message}}).encode()


def raised(status: int, body: bytes = b"", after: float | None = None) -> CoordinatorError:
    call = BOOTSTRAP.calls["result"]
    reply = HttpReply(status, body, retry_after=after)
    with pytest.raises(CoordinatorError) as caught:
        check(reply, call, BOOTSTRAP, "pull a job", "the node token")
    return caught.value


def test_statuses_that_mean_yes_unauthorized_or_busy() -> None:
    check(HttpReply(200), Call(), BOOTSTRAP, "pull a job", "the node token")
    for status in (201, 202, 204, 299):
        assert isinstance(raised(status), Unreachable)
    error = raised(401, b'{"error": {"code": 1, "message": "no"}}')
    assert type(error) is Unauthorized
    assert str(error) == "cannot pull a job: the coordinator does not accept the node token (401: no)"
    busy = raised(429, b'{"detail": "slow down"}', 60.0)
    assert isinstance(busy, Busy)
    assert busy.retry_after == 60
    assert str(busy) == "cannot pull a job: the coordinator is busy (429: slow down) and asks to wait 60 s"
    assert str(raised(503)) == "cannot pull a job: the coordinator is busy (503)"


@pytest.mark.parametrize("status", [408, 425, 500, 502, 504, 599, 777])
def test_statuses_worth_another_try(status: int) -> None:
    error = raised(status, b"<html>")
    assert type(error) is CoordinatorError
    assert str(error) == f"cannot pull a job: the coordinator answered {status}"


@pytest.mark.parametrize("status", [400, 404, 405, 409, 410, 413, 422])
@pytest.mark.parametrize(
    "body",
    [b"", b"<html><center>nginx</center>", b"[]", b'{"message": "no Route matched"}', b'{"error": "no"}'],
)
def test_what_something_on_the_way_says_is_never_final(status: int, body: bytes) -> None:
    error = raised(status, body)
    assert type(error) is CoordinatorError
    assert "not the coordinator but another server" in str(error)


@pytest.mark.parametrize("status", [400, 402, 404, 413, 422])
def test_statuses_that_are_final(status: int) -> None:
    error = raised(status, own("no"))
    assert isinstance(error, Refused)
    assert error.status == status
    assert str(error) == f"cannot pull a job: the coordinator refuses ({status}: no)"


def test_a_status_that_means_gone() -> None:
    error = raised(409, own("taken"))
    assert isinstance(error, Gone)
    assert error.status == 409
    assert str(error) == "cannot pull a job: the job no longer belongs to this node (409: taken)"


@pytest.mark.parametrize(
    ("body", "shown"),
    [
        (b'{"error": {"message": "\\u001b[31mred\\r\\n\\u202etext\\u0000"}}', "400: [31mred text"),
        (b'{"error": {"message": "' + b"x" * 1000 + b'"}}', "400: " + "x" * 199 + "…"),
        (b'{"error": {"message": 5}}', "400"),
        (b'{"error": ["a"]}', "400"),
        (b'["error"]', "400"),
        (b'{"error":' * 50000, "400"),
        (b"\xff\xfe", "400"),
        (b"", "400"),
    ],
)
def test_the_message_of_an_error_is_shown_in_one_short_clean_line(body: bytes, shown: str) -> None:
    assert f" {shown}" in str(raised(400, body)).replace("(", " ").replace(")", "")


def test_a_redirect_to_nowhere() -> None:
    assert "answered 302, a redirect to nowhere; the node follows no redirects" in str(raised(302))


@pytest.mark.parametrize("body", [b"<html>", b"[" * 100_000, b'"\xff"', b"{", b"NaN", b"{} {}"])
def test_garbage_is_unreachable(body: bytes) -> None:
    with pytest.raises(Unreachable, match=r"^cannot pull a job: garbage reply: "):
        decode_answer(HttpReply(200, body), "pull a job")


def test_no_body_is_none() -> None:
    assert decode_answer(HttpReply(200), "x") is None


def test_clean() -> None:
    assert clean("a\tb\x1b[0m  c\u2028d", 80) == "a b [0m c d"
    assert clean("x" * 10, 5) == "xxxx…"
