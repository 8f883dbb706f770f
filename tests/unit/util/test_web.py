import os
import socket
import ssl
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from aitbc_miner.util import web
from aitbc_miner.util.clock import now
from aitbc_miner.util.web import Address, Dialer, NoConnection, tls_context
from tests.support.certificates import Party
from tests.unit.coordinator.test_http import OK, Peer, Start, answering, client, failure, peer, read_request

__all__ = ["peer"]

Resolve = Callable[..., None]


@pytest.fixture
def resolve(monkeypatch: pytest.MonkeyPatch) -> Resolve:
    """Have the name `many.test` lead to the given addresses and ports."""

    def use(*where: tuple[str, int]) -> None:
        found = [Address(socket.AF_INET, one) for one in where]
        monkeypatch.setattr(web, "look_up", lambda *_: list(found))

    return use


@pytest.fixture
def deaf() -> Iterator[Callable[[str], tuple[str, int]]]:
    """Give addresses whose port takes no connection and refuses none: their queue is full."""
    with ExitStack() as stack:

        def make(host: str) -> tuple[str, int]:
            listener = stack.enter_context(socket.create_server((host, 0), backlog=0))
            for _ in range(3):
                waiting = stack.enter_context(socket.socket())
                waiting.setblocking(False)
                waiting.connect_ex(listener.getsockname())
            where: tuple[str, int] = listener.getsockname()
            return where

        yield make


def listening(stack: ExitStack, host: str = "127.0.0.1") -> tuple[socket.socket, tuple[str, int]]:
    listener = stack.enter_context(socket.create_server((host, 0)))
    return listener, listener.getsockname()


def test_an_address_that_does_not_answer_uses_up_no_time_of_the_others(
    resolve: Resolve, deaf: Callable[[str], tuple[str, int]]
) -> None:
    with ExitStack() as stack:
        _, good = listening(stack, "127.0.0.9")
        resolve(deaf("127.0.0.7"), deaf("127.0.0.8"), good)
        dialer = Dialer()
        with dialer.connect("many.test", 1, 5) as sock:
            assert sock.getpeername() == good
        # And it is not asked first for ever.
        asked: list[str] = []
        begin = web._begin

        def noting(one: Address) -> socket.socket:
            asked.append(one.sockaddr[0])
            return begin(one)

        stack.enter_context(pytest.MonkeyPatch.context()).setattr(web, "_begin", noting)
        dialer.connect("many.test", 1, 5).close()
        assert asked == ["127.0.0.9"]


def test_no_address_answers(resolve: Resolve, deaf: Callable[[str], tuple[str, int]]) -> None:
    resolve(deaf("127.0.0.7"), deaf("127.0.0.8"))
    begun = now()
    with pytest.raises(NoConnection):
        Dialer().connect("many.test", 1, 0.5)
    assert 0.45 < now() - begun < 5


def test_an_address_that_refuses_does_not_delay_the_next(resolve: Resolve) -> None:
    with ExitStack() as stack:
        with socket.create_server(("127.0.0.7", 0)) as gone:
            refusing = gone.getsockname()
        _, good = listening(stack)
        resolve(refusing, good)
        with Dialer().connect("many.test", 1, 3600) as sock:
            assert sock.getpeername() == good
        resolve(refusing)
        with pytest.raises(ConnectionRefusedError):
            Dialer().connect("many.test", 1, 5)


def test_an_address_that_answers_no_handshake_leaves_the_next_its_time(
    resolve: Resolve, peer: Start, tmp_path: Path
) -> None:
    authority = Party("our CA", ca=True)
    server = peer(answering(OK, OK), Party("server", authority, names=["many.test"]).server(tmp_path))
    host, port = server.address.split(":")
    with ExitStack() as stack:
        silent, where = listening(stack, "127.0.0.7")
        resolve(where, (host, int(port)))
        url = f"https://many.test:{port}"
        with client(url, 5, connect_s=1.0, ca_file=authority.file(tmp_path)) as http:
            assert http.call("POST", "/x", {}, doing="x").status == 200
        resolve(where)
        said = failure(url, 5, connect_s=0.3, ca_file=authority.file(tmp_path))
        assert said.startswith(f"cannot pull a job: many.test:{port} did not answer the TLS handshake within")
        assert silent


def test_an_address_that_takes_requests_and_answers_none_is_asked_last(resolve: Resolve, peer: Start) -> None:
    box: list[Peer] = []
    box.append(peer(lambda _: box[0].stop.wait(10)))
    with socket.create_server(("127.0.0.9", 0)) as listener:
        resolve(("127.0.0.1", int(box[0].address.rpartition(":")[2])), listener.getsockname())

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                read_request(connection)
                connection.sendall(OK)

        thread = threading.Thread(target=serve)
        thread.start()
        with client("http://many.test", 0.3) as http:
            with pytest.raises(Exception, match=r"no complete reply from many\.test within 0\.3 s"):
                http.call("POST", "/x", {}, doing="x")
            assert http.call("POST", "/x", {}, doing="x").status == 200
        thread.join(10)


def test_the_answer_has_its_whole_time_however_long_connecting_took(
    peer: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    box: list[Peer] = []

    def late(connection: socket.socket) -> None:
        read_request(connection)
        box[0].stop.wait(1.8)
        connection.sendall(OK)

    box.append(peer(late))
    race = web._race

    def slowly(*args: Any) -> Any:
        threading.Event().wait(1.8)
        return race(*args)

    monkeypatch.setattr(web, "_race", slowly)
    with client(box[0].url, 3.0) as http:
        assert http.call("POST", "/x", {}, doing="x").status == 200


# TLS


def refusal(peer: Start, tls: ssl.SSLContext, trusted: Path | None = None) -> str:
    server = peer(answering(OK), tls)
    said = failure(f"https://{server.address}", ca_file=trusted)
    start = f"cannot pull a job: the TLS certificate of {server.address} "
    assert said.startswith(start)
    return said.removeprefix(start)


def test_each_fault_of_a_certificate_has_its_remedy(peer: Start, tmp_path: Path) -> None:
    authority, stranger = Party("our CA", ca=True), Party("another CA", ca=True)
    trusted = authority.file(tmp_path)

    def made(**how: Any) -> ssl.SSLContext:
        return Party("server", authority, **how).server(tmp_path)

    said = refusal(peer, made(starts=-2, ends=-1), trusted)
    renew = "have the server's operator renew the certificate, or correct this machine's clock"
    assert said.startswith(f"has expired (certificate has expired); {renew}")
    said = refusal(peer, made(starts=1, ends=2), trusted)
    assert said.startswith("is not valid yet (certificate is not yet valid); set this machine's clock if it")
    said = refusal(peer, made(names=["other.test"]), trusted)
    assert said.startswith("is for another name (IP address mismatch, ")
    assert said.endswith("use one of its names, or have the name added as subjectAltName")
    for tls, whom in ((made(), stranger.file(tmp_path)), (made(), None)):
        said = refusal(peer, tls, whom)
        assert said.startswith(
            "is not trusted (unable to get local issuer certificate); name the issuer's certificate in"
        )
        assert "coordinator.ca_file" in said
    between = Party("between", authority, ca=True)
    incomplete = Party("server", between).server(tmp_path)
    assert "must also send intermediate certificates" in refusal(peer, incomplete, trusted)
    pretender = Party("no CA", authority)
    false = Party("server", pretender).server(tmp_path, pretender)
    assert f"make the CA's certificate anew: `{web._NEW_CA}`" in refusal(peer, false, trusted)


@pytest.mark.needs("openssl")
def test_a_ca_of_a_plain_openssl_line_is_taken(peer: Start, tmp_path: Path) -> None:
    """On 3.13, too, whose strict checks want extensions that this line does not make."""
    ca, key = tmp_path / "ca.pem", tmp_path / "ca.key"
    config = tmp_path / "openssl.cnf"
    config.write_text(
        "[req]\ndistinguished_name=d\nx509_extensions=e\nprompt=no\n[d]\nCN=our CA\n"
        "[e]\nbasicConstraints=critical,CA:true\nsubjectKeyIdentifier=hash\n"
    )
    line = f"openssl req -x509 -newkey rsa:2048 -nodes -days 9 -keyout {key} -out {ca} -config {config}"
    subprocess.run(line.split(), check=True, capture_output=True)
    leaf, request = tmp_path / "leaf.pem", tmp_path / "leaf.csr"
    names = tmp_path / "names"
    names.write_text("subjectAltName=IP:127.0.0.1\n")
    for line in (
        f"openssl req -newkey rsa:2048 -nodes -keyout {tmp_path}/leaf.key -out {request} -subj /CN=server",
        f"openssl x509 -req -in {request} -CA {ca} -CAkey {key} -CAcreateserial -extfile {names} -out {leaf}",
    ):
        subprocess.run(line.split(), check=True, capture_output=True)
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(leaf, tmp_path / "leaf.key")
    with client(f"https://{peer(answering(OK), tls).address}", ca_file=ca) as http:
        assert http.call("POST", "/x", {}, doing="x").status == 200
    assert not tls_context(ca).verify_flags & ssl.VERIFY_X509_STRICT


def test_a_certificate_that_signs_itself_is_taken_where_it_is_named(peer: Start, tmp_path: Path) -> None:
    own = Party("server", extended=False)
    server = peer(answering(OK), own.server(tmp_path))
    with client(f"https://{server.address}", ca_file=own.file(tmp_path)) as http:
        assert http.call("POST", "/x", {}, doing="x").status == 200
    assert refusal(peer, own.server(tmp_path)).startswith("is not trusted (self-signed certificate); ")


def test_what_the_system_trusts_is_trusted_and_nothing_else(
    peer: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    authority = Party("our CA", ca=True)
    server = peer(answering(OK), Party("server", authority).server(tmp_path))
    # The system's store, as OpenSSL finds it.
    monkeypatch.setenv("SSL_CERT_FILE", str(authority.file(tmp_path)))
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", os.devnull)
    with client(f"https://{server.address}") as http:
        assert http.call("POST", "/x", {}, doing="x").status == 200
        (adapter,) = {id(one): one for one in http._session().adapters.values()}.values()
        names = {str(dict(x[0] for x in one["subject"])) for one in adapter._context.get_ca_certs()}  # type: ignore[attr-defined]
    assert names == {"{'commonName': 'our CA'}"}


def test_a_name_with_thousands_of_addresses_costs_no_more_sockets_than_a_few(
    resolve: Resolve, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolve(*[(f"127.1.{n // 250}.{n % 250 + 1}", 9) for n in range(4000)])
    asked: list[Address] = []

    def refusing(one: Address) -> socket.socket:
        asked.append(one)
        raise ConnectionRefusedError

    monkeypatch.setattr(web, "_begin", refusing)
    with pytest.raises(ConnectionRefusedError):
        Dialer().connect("many.test", 1, 5)
    assert len(asked) == web.MAX_ADDRESSES
