"""What is guessed of a coordinator that is not what the configuration says."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from aitbc_miner.config.settings import CoordinatorSection
from aitbc_miner.coordinator import diagnosis
from aitbc_miner.coordinator.diagnosis import likely_cause
from tests.support.certificates import Party
from tests.unit.coordinator.test_http import Peer, Start, peer, read_request
from tools.mock.aitbc.coordinator import MockAitbc
from tools.mock.bootstrap.coordinator import MockCoordinator

__all__ = ["peer"]


@pytest.fixture
def aitbc() -> Iterator[MockAitbc]:
    with MockAitbc() as mock:
        yield mock


@pytest.fixture
def bootstrap() -> Iterator[MockCoordinator]:
    with MockCoordinator() as mock:
        yield mock


def guess(base_url: str, dialect: Any = "bootstrap") -> str:
    said = likely_cause(CoordinatorSection(base_url, "env:T", dialect=dialect, allow_http=True))
    return said or ""


def origin_of(url: str) -> str:
    return "/".join(url.split("/")[:3])


@pytest.mark.parametrize("path", ["", "/v1", "/api/v1", "/api"])
def test_an_aitbc_coordinator_and_the_dialect_bootstrap(aitbc: MockAitbc, path: str) -> None:
    origin = origin_of(aitbc.url)
    said = guess(origin + path)
    assert said.startswith("an AITBC coordinator answers there: set coordinator.dialect: aitbc-v1 ")
    assert ("coordinator.base_url" in said) == (path != "/v1")
    assert path == "/v1" or said.endswith(f"coordinator.base_url: {origin}/v1")


@pytest.mark.parametrize("path", ["", "/api/v1", "/api"])
def test_an_aitbc_coordinator_and_another_path(aitbc: MockAitbc, path: str) -> None:
    origin = origin_of(aitbc.url)
    said = guess(origin + path, "aitbc-v1")
    assert said == f"an AITBC coordinator answers there: set coordinator.base_url: {origin}/v1"
    assert guess(f"{origin}/v1", "aitbc-v1") == ""


@pytest.mark.parametrize("path", ["", "/v1", "/api"])
def test_a_bootstrap_coordinator(bootstrap: MockCoordinator, path: str) -> None:
    origin = origin_of(bootstrap.url)
    there = "a coordinator of the dialect bootstrap answers there: set "
    assert guess(bootstrap.url) == ""
    assert guess(bootstrap.url, "aitbc-v1") == f"{there}coordinator.dialect: bootstrap"
    if origin + path != bootstrap.url:
        assert guess(origin + path) == f"{there}coordinator.base_url: {bootstrap.url}"
        both = f"coordinator.dialect: bootstrap and coordinator.base_url: {bootstrap.url}"
        assert guess(origin + path, "aitbc-v1") == there + both


def replying(status: str, body: bytes, kind: str = "text/html") -> Callable[[Any], None]:
    def talk(connection: Any) -> None:
        while read_request(connection)[0]:
            head = f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n"
            connection.sendall(head.encode() + body)

    return talk


@pytest.mark.parametrize("dialect", ["bootstrap", "aitbc-v1"])
@pytest.mark.parametrize("status", ["200 OK", "404 Not Found", "405 Not Allowed", "403 Forbidden"])
def test_a_web_server_that_is_no_coordinator(peer: Start, status: str, dialect: str) -> None:
    server = peer(replying(status, b"<html>Welcome to nginx!</html>"))
    assert guess(f"{server.url}/v1", dialect).startswith(
        f"the server at http://{server.address} seems to be a web server and no coordinator"
    )


def test_a_server_that_denies_all_paths_alike(peer: Start) -> None:
    denial = b'{"detail": "Authentication required"}'
    origin = f"http://{peer(replying('401 Unauthorized', denial, 'application/json')).address}"
    assert guess(f"{origin}/api/v1").startswith(
        "the server refuses every path alike, as AITBC coordinators do"
    )
    assert guess(origin, "aitbc-v1").endswith(f"set coordinator.base_url: {origin}/v1")
    assert guess(f"{origin}/v1", "aitbc-v1") == ""


def test_an_aitbc_coordinator_that_denies_only_what_is_there(peer: Start) -> None:
    """One of an earlier era: without /health, and a path that is not there is just that."""

    def talk(connection: Any) -> None:
        while head := read_request(connection)[0]:
            known = head.startswith(b"POST /v1/miners/heartbeat ")
            status, body = ("401 No", b'{"detail":"no"}') if known else ("404 No", b'{"detail":"Not Found"}')
            connection.sendall(f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)

    origin = f"http://{peer(talk).address}"
    assert guess(f"{origin}/v1").startswith("an AITBC coordinator answers there: set coordinator.dialect")
    assert guess(f"{origin}/api/v1", "aitbc-v1").endswith(f": set coordinator.base_url: {origin}/v1")
    assert guess(f"{origin}/v1", "aitbc-v1") == ""


def test_http_and_https_taken_for_each_other(
    peer: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(diagnosis, "LOOK_S", 1.0)  # this server waits for more of the handshake
    plain = peer(replying("404 Not Found", b"{}", "application/json"))
    said = guess(f"https://{plain.address}/v1")
    assert said.startswith(
        f"the server speaks http: set coordinator.base_url: http://{plain.address}/v1, and"
    )
    secure = peer(replying("404 Not Found", b"{}"), Party("server").server(tmp_path))
    said = guess(f"http://{secure.address}/v1")
    assert said == f"the server speaks https: set coordinator.base_url: https://{secure.address}/v1"


def test_nobody_there() -> None:
    box = Peer(lambda _: None)
    box.close()
    assert guess(f"http://{box.address}/v1") == ""


def test_a_coordinator_that_is_down(peer: Start) -> None:
    assert guess(peer(replying("502 Bad Gateway", b"<html></html>")).url) == ""
