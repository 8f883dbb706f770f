"""Through a proxy: the coordinator's, and that of inputs."""

from pathlib import Path

import pytest

from aitbc_miner.config.settings import CoordinatorSection
from aitbc_miner.coordinator.connect import proxy_of
from aitbc_miner.coordinator.diagnosis import likely_cause
from aitbc_miner.coordinator.interface import Unreachable
from aitbc_miner.util import log
from aitbc_miner.util.web import Proxy
from tests.support.certificates import Party
from tests.support.small_proxy import SmallProxy
from tests.unit.agent.test_inputs import Server, fetch, server
from tests.unit.agent.test_inputs import failure as input_failure
from tests.unit.coordinator.test_http import OK, Start, answering, client, failure, peer

__all__ = ["peer", "server"]

SECRET = "user:pass-word"


def test_the_coordinator_over_http(peer: Start) -> None:
    there = peer(answering(OK, OK))
    with SmallProxy(SECRET) as proxy, client(there.url, proxy=Proxy(proxy.url, lambda: SECRET)) as http:
        assert http.call("POST", "/x", {}, doing="x").status == 200
        assert proxy.asked == [f"POST {there.url}/x"]


@pytest.mark.parametrize("secure", [False, True])
def test_the_coordinator_over_https(
    peer: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, secure: bool
) -> None:
    authority = Party("our CA", ca=True)
    there = peer(answering(OK, OK), Party("server", authority).server(tmp_path))
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:1")
    tls = Party("proxy", authority).server(tmp_path) if secure else None
    with SmallProxy(SECRET, tls) as proxy:
        ours = Proxy(proxy.url, lambda: SECRET)
        with client(f"https://{there.address}", proxy=ours, ca_file=authority.file(tmp_path)) as http:
            for _ in range(2):
                assert http.call("POST", "/x", {}, doing="x").status == 200
        assert proxy.asked == [f"CONNECT {there.address}"]
        assert b"s3cret" not in proxy.heads[0]


def test_a_name_that_only_the_proxy_knows(peer: Start) -> None:
    there = peer(answering(OK))
    port = there.address.rpartition(":")[2]
    with SmallProxy(leads={"inside.test": "127.0.0.1"}) as proxy:
        said = f"http://inside.test:{port}"
        with client(said, proxy=Proxy(proxy.url)) as http:
            assert http.call("POST", "/x", {}, doing="x").status == 200
        assert proxy.asked == [f"POST {said}/x"]


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_proxy_that_refuses_our_credential(scheme: str) -> None:
    with SmallProxy(SECRET) as proxy:
        said = failure(f"{scheme}://127.0.0.1:1", proxy=Proxy(proxy.url, lambda: "user:wrong"))
        assert said.startswith(f"cannot pull a job: the proxy {proxy.url} refuses (")
        assert said.endswith("see coordinator.proxy and coordinator.proxy_auth")
        assert "407" in said
        assert "wrong" not in said


def test_a_credential_that_is_replaced_is_used_for_the_next_call(
    peer: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = peer(answering(OK))
    kept = tmp_path / "credential"
    masked: list[str] = []
    monkeypatch.setattr(log, "mask", masked.append)
    with SmallProxy(SECRET) as proxy:
        ours = proxy_of(proxy.url, f"file:{kept}", {})
        with client(there.url, proxy=ours) as http:
            with pytest.raises(Unreachable, match=r"^cannot x: cannot read the credential file:"):
                http.call("POST", "/x", {}, doing="x")
            for text in ("user:wrong", SECRET):
                kept.write_text(text)
                kept.chmod(0o600)
                if text != SECRET:
                    with pytest.raises(Unreachable, match="407"):
                        http.call("POST", "/x", {}, doing="x")
            assert http.call("POST", "/x", {}, doing="x").status == 200
    assert masked == ["user:wrong", SECRET]


def test_no_proxy_there(peer: Start) -> None:
    with SmallProxy() as proxy:
        pass
    for scheme in ("http", "https"):
        said = failure(f"{scheme}://coordinator.test", proxy=Proxy(proxy.url))
        assert said == f"cannot pull a job: connection refused by the proxy {proxy.url}"


@pytest.mark.parametrize("secure", [False, True])
def test_inputs(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, secure: bool) -> None:
    authority = Party("our CA", ca=True)
    monkeypatch.setenv("SSL_CERT_FILE", str(authority.file(tmp_path)))
    tls = Party("proxy", authority).server(tmp_path) if secure else None
    server.pages["/a"] = lambda h: h.reply(302, Location="/b?c=1")
    server.pages["/b"] = lambda h: h.reply(body=b"data")
    port = server.server_address[1]
    # Nobody but the proxy can look this name up, so that none of its addresses can be refused.
    with SmallProxy(SECRET, tls, {"inside.test": "127.0.0.1"}) as proxy:
        ours = Proxy(proxy.url, lambda: SECRET)
        fetch(tmp_path, f"http://inside.test:{port}/a", proxy=ours, allow_private=False)
        assert (tmp_path / "a").read_bytes() == b"data"
        assert proxy.asked == [f"GET http://inside.test:{port}{path}" for path in ("/a", "/b?c=1")]
        server.socket = (
            Party("server", authority, names=["inside.test"])
            .server(tmp_path)
            .wrap_socket(server.socket, server_side=True)
        )
        fetch(tmp_path, f"https://inside.test:{port}/b", proxy=ours, allow_private=False)
        assert (tmp_path / "b").read_bytes() == b"data"
        assert proxy.asked[2:] == [f"CONNECT inside.test:{port}"]
        assert all("Proxy-Authorization" not in headers for _, headers in server.requests[2:])


def test_numbers_are_checked_with_a_proxy_too(server: Server, tmp_path: Path) -> None:
    with SmallProxy() as proxy:
        for host in ("127.0.0.1", "2130706433", "0x7f.1", "[::1]"):
            said = input_failure(tmp_path, f"http://{host}:1/x", proxy=Proxy(proxy.url), allow_private=False)
            assert "inputs may not come from the address" in said
        assert proxy.asked == []


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_inputs_and_a_proxy_that_refuses_our_credential(tmp_path: Path, scheme: str) -> None:
    with SmallProxy(SECRET) as proxy:
        said = input_failure(tmp_path, f"{scheme}://inside.test/x", proxy=Proxy(proxy.url))
        assert "407" in said
        assert said.endswith("(4 attempts)")


def test_a_ca_file_that_is_gone(tmp_path: Path) -> None:
    said = failure("https://coordinator.test", proxy=Proxy("http://127.0.0.1:1"), ca_file=tmp_path / "gone")
    assert "No such file" in said


def test_a_proxy_that_does_not_show_who_it_is_sees_no_credential(tmp_path: Path) -> None:
    settings = CoordinatorSection("https://coordinator.test/v1", "env:T")
    with SmallProxy(SECRET, Party("nobody").server(tmp_path)) as proxy:
        assert likely_cause(settings, Proxy(proxy.url, lambda: SECRET)) is None
        assert proxy.heads
        assert not any(b"Proxy-Authorization" in head for head in proxy.heads)
