"""The double of the AITBC coordinator: each fact that was observed of it, as a miner sees it."""

import json
import time
from collections.abc import Iterator
from typing import Any

import pytest
import requests

from tools.local_node import wait_until
from tools.mock_aitbc import KEY, MockAitbc
from tools.mock_aitbc_records import CONSTRAINTS, LIMITS
from tools.mock_faults import AITBC_ENDPOINTS

PAYLOAD = {"type": "x"}
CAPABILITIES = {
    "gpus": [{"name": "NVIDIA X", "memory_mb": 24564}],
    "cuda": "12.4.1",
    "models": ["m:1"],
    "price": 0.5,
}


class Wire:
    """Calls with an API key, as miner `m-1` unless said otherwise."""

    def __init__(self, mock: MockAitbc) -> None:
        self.mock = mock
        self.session = requests.Session()
        self.session.trust_env = False

    def call(self, path: str, body: Any = None, miner: str = "m-1", **more: Any) -> requests.Response:
        headers = more.pop("headers", {"X-Api-Key": KEY, "X-Miner-ID": miner})
        method = more.pop("method", "POST")
        return self.session.request(
            method, self.mock.url + path, json=body, headers=headers, timeout=10, **more
        )

    def register(self, miner: str = "m-1", concurrency: int = 1, **more: Any) -> None:
        body = {"capabilities": more.pop("capabilities", CAPABILITIES), "concurrency": concurrency, **more}
        assert self.call("/miners/register", body, miner).status_code == 200

    def poll(self, miner: str = "m-1") -> dict[str, Any] | None:
        reply = self.call("/miners/poll", {}, miner)
        assert reply.status_code in {200, 204}, reply.text
        return None if reply.status_code == 204 else reply.json()

    def result(self, job_id: str, miner: str = "m-1", **more: Any) -> requests.Response:
        return self.call(f"/miners/{job_id}/result", {"result": {}, **more}, miner)

    def fail(self, job_id: str, miner: str = "m-1") -> requests.Response:
        return self.call(f"/miners/{job_id}/fail", {"error_code": "E", "error_message": "no"}, miner)

    def listed(self, state: str = "RUNNING", miner: str = "m-1", **query: Any) -> Any:
        return self.call(f"/miners/{miner}/jobs", params={"job_status": state, **query}).json()


@pytest.fixture
def wire() -> Iterator[Wire]:
    with MockAitbc(rate_limits=False) as mock:
        made = Wire(mock)
        yield made
        made.session.close()


# --- who calls ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("headers", "status", "said"),
    [
        ({}, 401, "Authentication required"),
        ({"X-Api-Key": "wrong"}, 401, "Invalid API key"),
        ({"X-Api-Key": KEY, "Authorization": "Bearer none"}, 401, "Invalid token"),
        ({"X-Api-Key": KEY, "User-Agent": "nmap"}, 403, "Access denied"),
    ],
)
def test_refusals(headers: dict[str, str], status: int, said: str, wire: Wire) -> None:
    reply = wire.call("/miners/poll", {}, headers=headers)
    assert (reply.status_code, reply.json()) == (status, {"detail": said})
    assert (reply.headers.get("WWW-Authenticate") == "Bearer") == (status == 401)


def test_a_token_decides_alone_and_its_role_counts(wire: Wire) -> None:
    def bearer(**claims: Any) -> requests.Response:
        token = wire.mock.token(**claims)
        headers = {"Authorization": f"Bearer {token}", "X-Miner-ID": "another"}
        return wire.call("/miners/register", {"capabilities": {}}, headers=headers)

    assert bearer(sub="jwt-1").status_code == 200
    assert list(wire.mock.miners()) == ["jwt-1"]
    assert (bearer(role="client").status_code, bearer(role="client").json()) == (403, {"detail": "Forbidden"})
    assert bearer(ttl_s=-1).status_code == 401
    client = {"Authorization": f"Bearer {wire.mock.token(role='client')}"}
    assert wire.call("/jobs", {"payload": PAYLOAD}, headers=client).status_code == 201
    assert wire.call("/jobs", {"payload": PAYLOAD}).status_code == 403


def test_without_a_name_the_key_is_the_name(wire: Wire) -> None:
    wire.call("/miners/register", {"capabilities": {}}, headers={"X-Api-Key": KEY})
    assert list(wire.mock.miners()) == [KEY]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/miners/register", {}),
        ("/miners/register", {"capabilities": []}),
        ("/miners/poll", None),
        ("/miners/x/result", {"result": None}),
        ("/miners/x/result", {"result": "text"}),
        ("/miners/x/fail", {"error_code": "E"}),
    ],
)
def test_bodies_that_do_not_fit(path: str, body: Any, wire: Wire) -> None:
    reply = wire.call(path, body)
    assert reply.status_code == 422
    assert reply.json()["error"]["code"] == "VALIDATION_ERROR"


def test_without_its_type_a_body_is_not_read(wire: Wire) -> None:
    headers = {"X-Api-Key": KEY, "X-Miner-ID": "m-1", "Content-Type": "text/plain"}
    reply = requests.post(wire.mock.url + "/miners/poll", data="{}", headers=headers, timeout=10)
    assert reply.status_code == 422


def test_too_large_a_body_and_ids_of_requests(wire: Wire) -> None:
    reply = wire.result("x", result={"x": "y" * (11 << 20)})
    assert reply.status_code == 413
    headers = {"X-Api-Key": KEY, "X-Request-ID": "abc"}
    reply = wire.call("/miners/poll", None, headers=headers)
    assert reply.headers["x-request-id"] == "abc"
    assert {"x-process-time", "Date"} <= set(reply.headers)
    health = requests.get(wire.mock.url.removesuffix("/v1") + "/health", timeout=10)
    assert health.json()["status"] == "ok"


# --- jobs --------------------------------------------------------------------------------------------------


def test_strangers(wire: Wire) -> None:
    assert wire.call("/miners/heartbeat", {}).json() == {"detail": "miner not registered"}
    reply = wire.call("/miners/poll", {})
    assert (reply.status_code, reply.json()["error"]["type"]) == (500, "internal_error")
    assert wire.call("/miners/m-1", method="DELETE").status_code == 404


def test_a_poll_gives_one_job_the_oldest_and_it_is_ours(wire: Wire) -> None:
    first, second = wire.mock.submit(PAYLOAD), wire.mock.submit(PAYLOAD)
    wire.register(concurrency=5)
    job = wire.poll()
    assert job == {"job_id": first, "payload": PAYLOAD, "constraints": CONSTRAINTS}
    assert wire.mock.job(first).state == "RUNNING"
    assert wire.mock.miners()["m-1"].inflight == 1
    assert (wire.poll() or {})["job_id"] == second
    assert wire.call("/miners/poll", {}).content == b""


@pytest.mark.parametrize(("concurrency", "handed"), [(0, 3), (2, 2), (-1, 0)])
def test_concurrency(concurrency: int, handed: int, wire: Wire) -> None:
    for _ in range(3):
        wire.mock.submit(PAYLOAD)
    wire.register(concurrency=concurrency)
    assert sum(wire.poll() is not None for _ in range(4)) == handed


def test_what_gives_a_slot_back(wire: Wire) -> None:
    jobs = [wire.mock.submit(PAYLOAD) for _ in range(6)]
    wire.register()
    assert (wire.poll() or {})["job_id"] == jobs[0]
    assert wire.poll() is None
    wire.result(jobs[0])
    assert (wire.poll() or {})["job_id"] == jobs[1]
    wire.fail(jobs[1])
    assert wire.poll() is None, "a failure gives nothing back"
    wire.call("/miners/heartbeat", {})
    assert (wire.poll() or {})["job_id"] == jobs[2]
    assert wire.mock.cancel(jobs[2])
    assert wire.poll() is None, "nor does a cancellation"
    wire.register()
    assert (wire.poll() or {})["job_id"] == jobs[3]
    wire.call("/miners/heartbeat", {"inflight": 0, "status": "DRAINING"})
    assert wire.poll() is not None, "it is believed, whatever runs, and drains nobody"


def test_every_result_counts_whoever_sends_it(wire: Wire) -> None:
    job_id = wire.mock.submit(PAYLOAD)
    for state in ("QUEUED", "COMPLETED", "FAILED"):
        assert wire.mock.job(job_id).state == state
        reply = wire.result(job_id, "stranger", result={"n": state})
        assert reply.json() == {"status": "ok", "receipt": None}
        assert wire.mock.job(job_id).state == "COMPLETED"
        if state == "COMPLETED":
            assert wire.fail(job_id).status_code == 200
            assert wire.mock.job(job_id).state == "FAILED"
    job = wire.mock.job(job_id)
    assert (len(job.results), len(job.fails), job.result) == (3, 1, {"n": "FAILED"})
    assert job.error == "no"


def test_jobs_that_are_not_there(wire: Wire) -> None:
    for reply in (wire.result("x"), wire.fail("x")):
        assert (reply.status_code, reply.json()) == (404, {"detail": "job not found"})
    assert len(wire.mock.strays()) == 2
    assert wire.call("/nowhere").status_code == 404


def test_a_duration_that_is_no_number_breaks_it(wire: Wire) -> None:
    job_id = wire.mock.submit(PAYLOAD)
    wire.register()
    wire.poll()
    assert wire.result(job_id, metrics={"duration_ms": "long"}).status_code == 500
    assert wire.mock.job(job_id).state == "RUNNING"


def test_the_list_of_our_jobs(wire: Wire) -> None:
    jobs = [wire.mock.submit(PAYLOAD) for _ in range(25)]
    wire.register(concurrency=0)
    while wire.poll():
        pass
    wire.result(jobs[0])
    page = wire.listed()
    assert [job["job_id"] for job in page["jobs"]] == jobs[:4:-1], "20, the newest first"
    assert (page["total"], page["limit"], page["miner_id"]) == (24, 20, "m-1")
    assert [job["job_id"] for job in wire.listed(limit=100, offset=23)["jobs"]] == [jobs[1]]
    assert wire.listed("ANY")["total"] == 25
    assert wire.mock.cancel(jobs[3])
    assert jobs[3] not in [job["job_id"] for job in wire.listed("ANY", limit=100)["jobs"]]
    view = page["jobs"][0]
    assert "constraints" not in view
    assert view["expires_at"].count("+") == 0
    assert wire.listed(miner="m-2")["jobs"] == []


def test_a_job_expires_when_somebody_looks(wire: Wire) -> None:
    queued, running = (wire.mock.submit(PAYLOAD, ttl_seconds=0) for _ in range(2))
    wire.register(concurrency=0)
    (wire.mock.ledger)._jobs.pop(queued)
    wire.poll()
    late = wire.mock.submit(PAYLOAD, ttl_seconds=1)
    wire.mock.wait(lambda _: time.time() > wire.mock.job(late).expires_at.timestamp(), 10)
    assert wire.mock.job(running).state == "RUNNING", "nobody has looked"
    assert wire.listed()["total"] == 1
    assert wire.poll() is None
    assert wire.mock.job(late).state == "EXPIRED"
    client = {"Authorization": f"Bearer {wire.mock.token(role='client')}"}
    assert wire.call(f"/jobs/{running}", method="GET", headers=client).json()["state"] == "EXPIRED"
    assert wire.result(running).status_code == 200, "a late result is taken"
    assert wire.mock.job(running).state == "COMPLETED"


def test_the_client(wire: Wire) -> None:
    client = {"Authorization": f"Bearer {wire.mock.token(role='client')}"}
    job_id = wire.call("/jobs", {"payload": PAYLOAD}, headers=client).json()["job_id"]

    def result() -> requests.Response:
        return wire.call(f"/jobs/{job_id}/result", method="GET", headers=client)

    assert (result().status_code, result().json()) == (425, {"detail": "job not ready"})
    wire.fail(job_id)
    assert result().status_code == 425
    wire.result(job_id, result={"a": 1})
    assert result().json()["result"] == {"a": 1}
    assert wire.call(f"/jobs/{job_id}/cancel", headers=client).status_code == 409
    other = wire.call("/jobs", {"payload": PAYLOAD}, headers=client).json()["job_id"]
    assert wire.call(f"/jobs/{other}/cancel", headers=client).json()["state"] == "CANCELED"


def test_calls_that_are_not_to_be_used(wire: Wire) -> None:
    for what in ("complete", "fail"):
        assert wire.call(f"/miners/m-1/jobs/x/{what}").status_code == 500
    wire.register()
    assert wire.call("/miners/m-1/earnings").status_code == 200
    assert wire.call("/miners/m-1/capabilities", {"capabilities": {}}, method="PUT").status_code == 200
    assert wire.mock.miners()["m-1"].capabilities == {}
    assert wire.call("/miners/m-1", method="DELETE").json()["status"] == "deregistered"
    assert wire.mock.miners()["m-1"].status == "OFFLINE"


# --- who gets what -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("constraints", "payment", "fits"),
    [
        ({}, None, True),
        ({"region": "eu"}, None, False),
        ({"gpu": "NVIDIA X"}, None, True),
        ({"gpu": "nvidia"}, None, False),
        ({"min_vram_gb": 23}, None, True),
        ({"min_vram_gb": 24}, None, False),
        ({"cuda": "12.4"}, None, True),
        ({"cuda": "11.8"}, None, False),
        ({"models": ["m:1"]}, None, True),
        ({"models": ["m"]}, None, False),
        ({"max_price": "0.5"}, None, True),
        ({"max_price": "0.4"}, None, False),
        ({"min_reputation": 0.5}, None, True),
        ({"min_reputation": 0.6}, None, False),
        ({"bond_required": True}, None, False),
        ({}, 9.9, True),
        ({}, 10, False),
        ({"zk_proof_required": True, "confidential": True}, None, True),
    ],
)
def test_constraints(constraints: dict[str, Any], payment: float | None, fits: bool, wire: Wire) -> None:
    wire.mock.submit(PAYLOAD, constraints=constraints, payment_amount=payment)
    wire.register()
    assert (wire.poll() is not None) == fits


def test_a_region_must_be_the_same(wire: Wire) -> None:
    wire.mock.submit(PAYLOAD, constraints={"region": "eu"})
    wire.register(region="eu")
    assert wire.poll() is not None


def test_a_price_must_be_named(wire: Wire) -> None:
    wire.mock.submit(PAYLOAD, constraints={"max_price": "5"})
    wire.register(capabilities={})
    assert wire.poll() is None


def test_a_failure_starves_a_miner_behind_a_ghost(wire: Wire) -> None:
    bad, job_id = wire.mock.submit(PAYLOAD), wire.mock.submit(PAYLOAD)
    wire.register()
    wire.poll()
    wire.fail(bad)
    wire.register("ghost")
    wire.call("/miners/heartbeat", {})
    assert wire.poll() is None
    wire.call("/miners/ghost", method="DELETE")
    assert (wire.poll() or {})["job_id"] == job_id


# --- the limits --------------------------------------------------------------------------------------------


def test_the_limits_are_those_that_were_observed() -> None:
    observed = {
        "register": 50,
        "heartbeat": 100,
        "poll": 100,
        "result": 50,
        "fail": 50,
        "jobs": 200,
        "leave": 50,
    }
    assert {name: LIMITS[name] for name in AITBC_ENDPOINTS} == observed


def test_a_window_for_each_call_that_slides() -> None:
    with MockAitbc(window_s=1.0) as mock:
        wire = Wire(mock)
        assert [wire.result("x").status_code for _ in range(52)] == [404] * 50 + [429] * 2
        reply = wire.result("x")
        assert (reply.json(), reply.headers["Retry-After"]) == ({"detail": "Rate limit exceeded"}, "60")
        assert wire.fail("x").status_code == 404, "each call has a limit of its own"
        wait_until(lambda: wire.result("x").status_code == 404, 10)
        wire.session.close()


def test_what_is_not_let_in_is_not_counted() -> None:
    with MockAitbc() as mock:
        wire = Wire(mock)
        for _ in range(60):
            assert wire.call("/miners/x/result", {"result": {}}, headers={}).status_code == 401
            assert wire.call("/miners/x/result", {}).status_code == 422
        assert wire.result("x").status_code == 404
        wire.session.close()


# --- outages and faults ------------------------------------------------------------------------------------


def test_an_outage_keeps_the_database_and_a_wipe_does_not(wire: Wire) -> None:
    job_id = wire.mock.submit(PAYLOAD)
    wire.register()
    wire.mock.stop()
    with pytest.raises(requests.ConnectionError):
        wire.poll()
    wire.mock.start()
    assert (wire.poll() or {})["job_id"] == job_id
    wire.mock.forget_miners()
    assert wire.call("/miners/poll", {}).status_code == 500
    assert list(wire.mock.jobs()) == [job_id]
    wire.mock.wipe()
    assert wire.result(job_id).status_code == 404


def test_faults(wire: Wire) -> None:
    job_id = wire.mock.submit(PAYLOAD)
    wire.register()
    wire.mock.fault("poll", "drop_after", 1)
    with pytest.raises(requests.ConnectionError):
        wire.poll()
    assert wire.mock.job(job_id).state == "RUNNING"
    wire.mock.fault("result", "status:429:60", 1)
    assert wire.result(job_id).headers["Retry-After"] == "60"
    assert wire.result(job_id).status_code == 200
    assert [call.status for call in wire.mock.calls("result")] == [429, 200]
    with pytest.raises(ValueError, match="pull"):
        wire.mock.fault("pull", "refuse")


def test_files_of_jobs(wire: Wire, tmp_path: Any) -> None:
    (tmp_path / "a.json").write_text(
        json.dumps({"payload": PAYLOAD, "constraints": {"gpu": "x"}, "ttl_seconds": 5})
    )
    (tmp_path / "b.json").write_text(json.dumps(PAYLOAD))
    first, second = wire.mock.load(tmp_path)
    assert wire.mock.job(first).constraints["gpu"] == "x"
    assert wire.mock.job(second).payload == PAYLOAD
    (tmp_path / "c.json").write_text("[")
    with pytest.raises(ValueError, match=r"c\.json"):
        wire.mock.load(tmp_path)
