"""The limits of the double of the AITBC coordinator, its faults, and what it notes of both."""

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import requests

from tools.mock.aitbc.client import Caller, JobClient, Miner, plain
from tools.mock.aitbc.coordinator import MockAitbc
from tools.mock.faults import AITBC_ENDPOINTS

NOBODY = "f" * 32
ANY: dict[str, Any] = {"capabilities": {}}
LIMITS: list[tuple[str, int, str, str, Any]] = [
    ("register", 50, "POST", "/miners/register", ANY),
    ("heartbeat", 100, "POST", "/miners/heartbeat", {}),
    ("poll", 100, "POST", "/miners/poll", {}),
    ("result", 50, "POST", f"/miners/{NOBODY}/result", {"result": {}}),
    ("fail", 50, "POST", f"/miners/{NOBODY}/fail", {"error_code": "x", "error_message": "y"}),
    ("jobs", 200, "POST", "/miners/m-1/jobs", None),
    ("earnings", 200, "POST", "/miners/m-1/earnings", None),
    ("capabilities", 50, "PUT", "/miners/m-1/capabilities", ANY),
    ("leave", 50, "DELETE", "/miners/m-1", None),
]
CLIENT_LIMITS: list[tuple[int, str, str, Any]] = [
    (50, "POST", "/jobs", {"payload": {}}),
    (50, "POST", f"/jobs/{NOBODY}/cancel", None),
    (200, "GET", f"/jobs/{NOBODY}", None),
    (200, "GET", f"/jobs/{NOBODY}/result", None),
]


@pytest.fixture
def limited() -> Iterator[MockAitbc]:
    with MockAitbc() as double:
        yield double


# Limits.


def spend(caller: Caller, limit: int, method: str, path: str, body: Any) -> requests.Response:
    """Make as many calls as are allowed, and return what one more is told."""
    for number in range(limit):
        assert caller.call(method, path, body).status_code != 429, number
    return caller.call(method, path, body)


@pytest.mark.parametrize(("endpoint", "limit", "method", "path", "body"), LIMITS)
def test_so_many_calls_of_a_kind_and_no_more(
    limited: MockAitbc, endpoint: str, limit: int, method: str, path: str, body: Any
) -> None:
    with Miner(limited, concurrency=None) as miner:
        reply = spend(miner, limit, method, path, body)
        assert (reply.status_code, reply.json()) == (429, {"detail": "Rate limit exceeded"})
        assert reply.headers["Retry-After"] == "60"
        for other, _, its_method, its_path, its_body in LIMITS:
            assert (miner.call(its_method, its_path, its_body).status_code == 429) is (other == endpoint)


@pytest.mark.parametrize(("limit", "method", "path", "body"), CLIENT_LIMITS)
def test_clients_have_limits(limited: MockAitbc, limit: int, method: str, path: str, body: Any) -> None:
    with JobClient(limited) as client:
        assert spend(client, limit, method, path, body).status_code == 429


def test_the_address_is_limited_whoever_calls(limited: MockAitbc) -> None:
    with (
        Miner(limited, "m-1") as one,
        Miner(limited, "m-2") as two,
        Caller(limited, Authorization=f"Bearer {limited.token('m-1')}") as three,
    ):
        for number in range(100):
            assert (one, two)[number % 2].beat().status_code == 200
        assert [caller.post("/miners/heartbeat", {}).status_code for caller in (one, two, three)] == [429] * 3
        # Whom a proxy on this machine speaks for.
        elsewhere = {"X-Forwarded-For": "10.0.0.9, 127.0.0.1"}
        assert one.post("/miners/heartbeat", {}, headers=elsewhere).status_code == 200
        assert requests.get(f"{limited.root}/health", timeout=10).status_code == 200


def test_what_is_refused_otherwise_is_not_counted(limited: MockAitbc) -> None:
    with Miner(limited, concurrency=None) as miner:
        for _ in range(60):
            assert miner.post("/miners/register", {}).status_code == 422
            assert plain(limited).status_code == 401
        assert spend(miner, 50, "POST", "/miners/register", ANY).status_code == 429
        limited.fault("result", "status:429:60", 60)
        for _ in range(60):
            assert miner.result(NOBODY).status_code == 429
        assert spend(miner, 50, "POST", f"/miners/{NOBODY}/result", {"result": {}}).status_code == 429


def test_the_window_slides_and_refusals_are_free() -> None:
    with MockAitbc(window_s=1.0) as double, Miner(double, concurrency=None) as miner:
        assert spend(miner, 50, "POST", f"/miners/{NOBODY}/result", {"result": {}}).status_code == 429
        while miner.result(NOBODY).status_code == 429:
            pass
        calls = double.calls("result")
        counted = [call.at for call in calls if call.status != 429]
        assert len(calls) > len(counted) == 51
        assert 0.9 < counted[50] - counted[0] < 10


def test_limits_outlive_an_empty_database_and_can_be_off(limited: MockAitbc, double: MockAitbc) -> None:
    with Miner(limited) as miner:
        spend(miner, 50, "POST", f"/miners/{NOBODY}/result", {"result": {}})
        limited.wipe()
        limited.stop()
        limited.start()
        assert miner.result(NOBODY).status_code == 429
    with Miner(double) as miner:
        assert spend(miner, 250, "POST", f"/miners/{NOBODY}/result", {"result": {}}).status_code == 404


# Faults, and what is noted.


@pytest.mark.parametrize("endpoint", sorted(AITBC_ENDPOINTS))
def test_every_endpoint_can_be_made_to_fail(double: MockAitbc, miner: Miner, endpoint: str) -> None:
    calls = {name: (method, path, body) for name, _, method, path, body in LIMITS}
    with JobClient(double) as client:
        caller: Caller = client if endpoint == "client" else miner
        call = calls.get(endpoint, ("GET", f"/jobs/{NOBODY}", None))
        double.fault(endpoint, "status:429:7", 2)
        replies = [caller.call(*call) for _ in range(3)]
    assert [reply.status_code == 429 for reply in replies] == [True, True, False]
    assert replies[0].headers["Retry-After"] == "7"
    assert set(replies[0].json()) == {"detail"}
    noted = double.calls(endpoint)[-3:]
    assert [(each.fault, each.status == 429, each.credentials) for each in noted] == [
        ("status:429:7", True, True),
        ("status:429:7", True, True),
        (None, False, True),
    ]


@pytest.mark.parametrize(("kind", "counted"), [("refuse", 0), ("drop_after", 1), ("after:status:500", 1)])
def test_a_lost_reply_may_have_counted(double: MockAitbc, miner: Miner, kind: str, counted: int) -> None:
    job_id = double.submit({})
    miner.take()
    double.fault("result", kind, 1)
    with contextlib.suppress(requests.ConnectionError):
        assert miner.result(job_id).status_code == 500
    assert len(double.job(job_id).results) == counted
    assert miner.result(job_id).status_code == 200


def test_faults_by_hand_and_those_that_there_are_not(double: MockAitbc, miner: Miner) -> None:
    with pytest.raises(ValueError, match="not one of client, fail"):
        double.fault("pull", "refuse")
    reply = requests.post(f"{double.root}/_faults", json={"endpoint": "poll", "kind": "empty"}, timeout=10)
    assert reply.json() == {"faults": [{"endpoint": "poll", "kind": "empty", "times": None}]}
    assert miner.post("/miners/poll", {}).content == b""
    wrong = requests.post(f"{double.root}/_faults", json={"endpoint": "pull", "kind": "empty"}, timeout=10)
    assert (wrong.status_code, set(wrong.json())) == (400, {"detail"})
    requests.post(f"{double.root}/_faults", json={"clear": True}, timeout=10)
    assert miner.poll() is None


def test_a_boundary_hangs_up_on_either_side() -> None:
    seen: list[tuple[str, str]] = []

    def boundary(endpoint: str, side: str, _port: int) -> bool:
        seen.append((endpoint, side))
        return (endpoint, side) == ("poll", "after")

    with MockAitbc(rate_limits=False, boundary=boundary) as double, Miner(double) as miner:
        job_id = double.submit({})
        with pytest.raises(requests.ConnectionError):
            miner.poll()
        assert double.job(job_id).state == "RUNNING"
    assert seen == [(name, side) for name in ("register", "poll") for side in ("before", "after")]
