"""How the double of the AITBC coordinator is spoken to: who may, what it refuses, and in which words."""

import json
import re
from typing import Any

import pytest
import requests

from tools.mock.aitbc.client import Caller, JobClient, Miner, plain
from tools.mock.aitbc.coordinator import KEY, MockAitbc

NOBODY = "f" * 32
ANY: dict[str, Any] = {"capabilities": {}}


# Who may.


def test_no_credential_and_a_wrong_one(double: MockAitbc, miner: Miner) -> None:
    nobody = plain(double)
    assert (nobody.status_code, nobody.json()) == (401, {"detail": "Authentication required"})
    assert nobody.headers["WWW-Authenticate"] == "Bearer"
    wrong = plain(double, X_Api_Key="wrong-key-0123456789")
    assert (wrong.status_code, wrong.json()) == (401, {"detail": "Invalid API key"})
    token = miner.register().json()["session_token"]
    assert plain(double, X_Session_Token=token).status_code == 401
    assert plain(double, Authorization=f"Bearer {token}").status_code == 401
    assert plain(double, Authorization=f"Basic {KEY}").json() == {"detail": "Authentication required"}


def test_a_bearer_token_decides_alone(double: MockAitbc, miner: Miner) -> None:
    key = {"X_Api_Key": KEY, "X_Miner_ID": "m-1"}
    assert plain(double, **key).status_code == 200
    for token in ("", KEY, "a.b.c", double.token(ttl_s=-1), double.token(sub=""), double.token()[:-1] + "?"):
        reply = plain(double, **key, Authorization=f"Bearer {token}")
        assert (reply.status_code, reply.json()) == (401, {"detail": "Invalid token"})
    with MockAitbc(jwt_secret="another-secret-0123456789") as other:
        assert plain(double, **key, Authorization=f"Bearer {other.token()}").status_code == 401
    reply = plain(double, **key, Authorization=f"Bearer {double.token(role='client')}")
    assert (reply.status_code, reply.json()) == (403, {"detail": "Forbidden"})
    # It is its subject that calls, whatever the other header says.
    assert plain(double, **key, Authorization=f"Bearer {double.token('m-2')}").status_code == 404
    with Caller(double, Authorization=f"bearer {double.token('m-2')}", X_Miner_ID="m-1") as caller:
        caller.post("/miners/register", ANY)
    assert set(double.miners()) == {"m-1", "m-2"}


def test_without_a_name_the_key_is_the_name(double: MockAitbc) -> None:
    with Caller(double, X_Api_Key=KEY) as caller:
        assert caller.post("/miners/register", ANY).status_code == 200
    assert set(double.miners()) == {KEY}


def test_several_keys_and_none_is_bound_to_a_name() -> None:
    keys = ("first-key-0123456789", "second-key-0123456789")
    with MockAitbc(keys=keys, rate_limits=False) as double:
        for key in keys:
            with Caller(double, X_Api_Key=key, X_Miner_ID="m-1") as caller:
                assert caller.post("/miners/register", ANY).status_code == 200
        assert len(double.miners()["m-1"].registrations) == 2
        assert plain(double, X_Api_Key=KEY).status_code == 401


def test_miners_and_clients_keep_apart(double: MockAitbc, miner: Miner) -> None:
    assert miner.post("/jobs", {"payload": {}}).status_code == 403
    assert miner.call("GET", f"/jobs/{NOBODY}").status_code == 403
    with JobClient(double) as client:
        assert client.post("/miners/poll", {}).status_code == 403
        assert client.post("/jobs", {"payload": {}}).status_code == 201


@pytest.mark.parametrize(
    ("method", "path", "anonymous", "as_miner"),
    [
        ("GET", "/v1/miners", 401, 403),
        ("POST", "/v1/miners", 401, 403),
        ("GET", "/v1/miners/m-1", 401, 405),
        ("GET", "/v1/miners/poll", 401, 405),
        ("POST", "/v1/miners/m-1/stats", 401, 404),
        ("POST", "/miners/register", 401, 403),
        ("GET", "/docs", 401, 403),
        ("GET", "/health", 200, 200),
    ],
)
def test_paths_that_are_not_there(
    double: MockAitbc, method: str, path: str, anonymous: int, as_miner: int
) -> None:
    key = {"X-Api-Key": KEY, "X-Miner-ID": "m-1"}
    replies = [
        requests.request(method, double.root + path, headers=headers, timeout=10) for headers in ({}, key)
    ]
    assert [reply.status_code for reply in replies] == [anonymous, as_miner]
    assert path == "/health" or set(replies[1].json()) == {"detail"}


# What is refused, and how.


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        ("/miners/register", {}, "body.capabilities"),
        ("/miners/register", {"capabilities": []}, "body.capabilities"),
        ("/miners/register", {"capabilities": {}, "concurrency": "2"}, "body.concurrency"),
        ("/miners/register", {"capabilities": {}, "concurrency": True}, "body.concurrency"),
        ("/miners/register", {"capabilities": {}, "concurrency": None}, "body.concurrency"),
        ("/miners/register", {"capabilities": {}, "region": 5}, "body.region"),
        ("/miners/heartbeat", {"inflight": 1.5}, "body.inflight"),
        ("/miners/heartbeat", {"metadata": None}, "body.metadata"),
        ("/miners/heartbeat", {"edge_optimized": "no"}, "body.edge_optimized"),
        ("/miners/heartbeat", {"network_latency_ms": "1"}, "body.network_latency_ms"),
        ("/miners/poll", [], "body"),
        ("/miners/poll", {"max_wait_seconds": None}, "body.max_wait_seconds"),
        (f"/miners/{NOBODY}/result", {}, "body.result"),
        *((f"/miners/{NOBODY}/result", {"result": value}, "body.result") for value in (None, "text", [1])),
        (f"/miners/{NOBODY}/result", {"result": {}, "metrics": 1}, "body.metrics"),
        (f"/miners/{NOBODY}/result", {"result": {}, "tee_quote": 1}, "body.tee_quote"),
        (f"/miners/{NOBODY}/fail", {"error_message": "x"}, "body.error_code"),
        (f"/miners/{NOBODY}/fail", {"error_code": "x", "error_message": None}, "body.error_message"),
    ],
)
def test_bodies_that_are_not_right(miner: Miner, path: str, body: Any, field: str) -> None:
    reply = miner.post(path, data=json.dumps(body), headers={"Content-Type": "application/json"})
    assert reply.status_code == 422
    told = reply.json()
    assert set(told) == {"error", "timestamp", "request_id"}
    assert set(told["error"]) == {"code", "message", "status", "details"}
    assert (told["error"]["code"], told["error"]["status"]) == ("VALIDATION_ERROR", 422)
    assert [set(detail) for detail in told["error"]["details"]] == [{"field", "message", "code"}]
    assert told["error"]["details"][0]["field"] == field


def test_all_that_is_wrong_is_told(miner: Miner) -> None:
    reply = miner.post(f"/miners/{NOBODY}/fail", {"metrics": []})
    fields = [detail["field"] for detail in reply.json()["error"]["details"]]
    assert fields == ["body.error_code", "body.error_message", "body.metrics"]


@pytest.mark.parametrize(
    ("data", "kind", "status"),
    [
        ("{}", "application/json", 204),
        ("{}", "application/json; charset=utf-8", 204),
        ("{}", "text/plain", 422),
        ("{}", None, 422),
        ("", "application/json", 422),
        ("{", "application/json", 422),
        ("[" * 200_000, "application/json", 400),
        (b'"\xff"', "application/json", 400),
    ],
)
def test_a_body_must_be_json_and_say_so(miner: Miner, data: Any, kind: str | None, status: int) -> None:
    text = data.encode() if isinstance(data, str) else data
    headers = {"Content-Type": kind} if kind else {}
    assert miner.post("/miners/poll", data=text, headers=headers).status_code == status


def test_a_500_that_nobody_has_handled(double: MockAitbc) -> None:
    with Miner(double, concurrency=None) as stranger:
        told = stranger.post("/miners/poll", {}).json()
    assert set(told) == {"error"}
    assert set(told["error"]) == {"type", "message", "status_code", "path"}
    assert (told["error"]["status_code"], told["error"]["path"]) == (500, "/v1/miners/poll")


@pytest.mark.parametrize("agent", ["sqlmap/1.7", "Mozilla Nmap", "x-nikto", "BurpSuite"])
def test_user_agents_that_are_not_welcome(miner: Miner, agent: str) -> None:
    reply = miner.post("/miners/poll", {}, headers={"User-Agent": agent})
    assert (reply.status_code, reply.json()) == (403, {"detail": "Access denied"})


def test_a_body_may_be_10_mib_or_not_say_so(double: MockAitbc, miner: Miner) -> None:
    job_id = double.submit({})
    path, kind = f"/miners/{job_id}/result", {"Content-Type": "application/json"}
    body = b'{"result": {"x": "' + b"a" * (11 << 20) + b'"}}'
    assert miner.post(path, data=body, headers=kind).status_code == 413
    assert double.job(job_id).state == "QUEUED"
    exact = b'{"result": {"x": "' + b"a" * ((10 << 20) - 21) + b'"}}'
    assert len(exact) == 10 << 20
    assert miner.post(path, data=exact, headers=kind).status_code == 200
    halves = iter([body[: len(body) // 2], body[len(body) // 2 :]])
    assert miner.post(path, data=halves, headers=kind).status_code == 200
    assert len(double.job(job_id).results) == 2


def test_headers_of_every_reply(double: MockAitbc, miner: Miner) -> None:
    reply = miner.beat()
    assert re.fullmatch("[0-9a-f]{32}", reply.headers["x-request-id"])
    assert float(reply.headers["x-process-time"]) >= 0
    assert reply.headers["Date"].endswith(" GMT")
    double.fault("heartbeat", "status:503", 1)
    for status in (503, 200):
        reply = miner.post("/miners/heartbeat", {}, headers={"X-Request-ID": "mine"})
        assert (reply.status_code, reply.headers["x-request-id"]) == (status, "mine")
    assert miner.post("/miners/poll", {}, headers={"X-Request-ID": "mine"}).headers["x-request-id"] == "mine"
    wrong = miner.post("/miners/poll", [], headers={"X-Request-ID": "mine"})
    assert wrong.json()["request_id"] == "mine"


def test_health(double: MockAitbc) -> None:
    reply = requests.get(f"{double.root}/health", timeout=10)
    assert set(reply.json()) == {"status", "env", "python_version"}
