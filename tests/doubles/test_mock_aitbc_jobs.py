"""What becomes of jobs at the double of the AITBC coordinator: reports, the list, cancelling, expiring."""

import time
from collections.abc import Iterator
from datetime import datetime
from typing import Any

import pytest

from aitbc_miner.util.clock import now
from tools.mock.aitbc.client import JobClient, Miner
from tools.mock.aitbc.coordinator import MockAitbc

NOBODY = "f" * 32


@pytest.fixture
def client(double: MockAitbc) -> Iterator[JobClient]:
    with JobClient(double) as made:
        yield made


def until_overdue(double: MockAitbc, job_id: str) -> None:
    """Wait until a job that was submitted with the least time there is may be found expired."""
    deadline = now() + 10
    while not double.job(job_id).overdue:
        assert now() < deadline
        time.sleep(0.01)


# Results and failures.


def test_a_result_and_what_its_client_sees(double: MockAitbc, miner: Miner, client: JobClient) -> None:
    job_id = double.submit({})
    assert client.outcome(job_id) == 425
    miner.take()
    assert (client.state(job_id), client.outcome(job_id)) == ("RUNNING", 425)
    reply = miner.result(job_id, {"status": "failed"}, duration_ms=5)
    assert reply.json() == {"status": "ok", "receipt": None}
    assert double.miners()["m-1"].inflight == 0
    told = client.call("GET", f"/jobs/{job_id}/result").json()
    assert (client.state(job_id), told) == ("COMPLETED", {"result": {"status": "failed"}, "receipt": None})


def test_a_result_again_is_not_refused_and_counts_again(double: MockAitbc, miner: Miner) -> None:
    jobs = [double.submit({}), double.submit({})]
    miner.register(2)
    for _ in jobs:
        miner.take()
    for answer in (1, 2):
        miner.result(jobs[0], {"answer": answer})
    job, row = double.job(jobs[0]), double.miners()["m-1"]
    assert (job.result, [report.body["result"] for report in job.results]) == (
        {"answer": 2},
        [{"answer": 1}, {"answer": 2}],
    )
    assert (row.completed, row.inflight) == (2, 0), "the place of the other job is given back, too"
    assert double.job(jobs[1]).state == "RUNNING"
    miner.result(jobs[0])
    assert double.miners()["m-1"].inflight == 0


@pytest.mark.parametrize("before", ["QUEUED", "RUNNING", "COMPLETED", "FAILED", "CANCELED", "EXPIRED"])
@pytest.mark.parametrize("known", [True, False])
def test_a_result_is_taken_from_anyone_whatever_the_state(
    double: MockAitbc, miner: Miner, client: JobClient, before: str, known: bool
) -> None:
    job_id = double.submit({}, ttl_seconds=1 if before == "EXPIRED" else 900)
    if before not in {"QUEUED", "EXPIRED"}:
        miner.take()
    match before:
        case "COMPLETED":
            miner.result(job_id)
        case "FAILED":
            miner.fail(job_id)
        case "CANCELED":
            double.cancel(job_id)
        case "EXPIRED":
            until_overdue(double, job_id)
    assert client.state(job_id) == before
    owner = double.job(job_id).assigned_miner_id
    with Miner(double, "other", concurrency=1 if known else None) as other:
        assert other.result(job_id, {"late": True}).status_code == 200
    job = double.job(job_id)
    assert (job.state, job.result, job.assigned_miner_id) == ("COMPLETED", {"late": True}, owner)
    assert job.results[-1].miner == "other"


def test_a_failure_is_told_by_its_message_alone_and_keeps_its_place(
    double: MockAitbc, miner: Miner, client: JobClient
) -> None:
    job_id = double.submit({})
    double.submit({})
    miner.take()
    assert miner.fail(job_id, "E_EXIT: why").json() == {"status": "ok"}
    job = client.call("GET", f"/jobs/{job_id}").json()
    assert (job["state"], job["error"], client.outcome(job_id)) == ("FAILED", "E_EXIT: why", 425)
    assert double.miners()["m-1"].inflight == 1
    assert miner.poll() is None, "not before the next heartbeat"
    miner.beat(inflight=0)
    assert miner.take() != job_id, "nothing is queued again"


def test_a_late_failure_spoils_what_was_complete(double: MockAitbc, miner: Miner, client: JobClient) -> None:
    job_id = double.submit({})
    miner.take()
    miner.result(job_id, {"kept": 1})
    with Miner(double, "other") as other:
        other.fail(job_id)
    job = double.job(job_id)
    assert (job.state, job.assigned_miner_id, job.result) == ("FAILED", "other", {"kept": 1})
    assert [report.miner for report in job.fails] == ["other"]
    assert client.outcome(job_id) == 425


def test_reports_on_a_job_that_is_not_known(double: MockAitbc, miner: Miner) -> None:
    for reply in (miner.result(NOBODY), miner.fail(NOBODY)):
        assert (reply.status_code, reply.json()) == (404, {"detail": "job not found"})
    assert [(stray.kind, stray.job_id, stray.miner) for stray in double.strays()] == [
        ("result", NOBODY, "m-1"),
        ("fail", NOBODY, "m-1"),
    ]
    assert double.miners()["m-1"].completed == 0


@pytest.mark.parametrize(
    ("duration", "status"),
    [("soon", 500), ([1], 500), ({}, 500), ("12", 200), (-5, 200), (1.5, 200), (None, 200)],
)
def test_a_duration_that_is_no_number_breaks_it(
    double: MockAitbc, miner: Miner, duration: Any, status: int
) -> None:
    job_id = double.submit({})
    miner.take()
    assert miner.result(job_id, duration_ms=duration).status_code == status
    job = double.job(job_id)
    assert (job.state, len(job.results)) == (("COMPLETED", 1) if status == 200 else ("RUNNING", 0))


def test_a_request_id_is_kept_with_the_report(double: MockAitbc, miner: Miner) -> None:
    job_id = double.submit({})
    miner.post(f"/miners/{job_id}/result", {"result": {}}, headers={"X-Request-ID": "r-1"})
    miner.result(job_id)
    assert [report.request_id for report in double.job(job_id).results] == ["r-1", None]


def test_calls_that_nobody_should_use(double: MockAitbc, miner: Miner) -> None:
    job_id = double.submit({})
    miner.take()
    path = f"/miners/m-1/jobs/{job_id}"
    failed = miner.post(f"{path}/fail", {})
    assert (failed.status_code, double.job(job_id).state) == (500, "RUNNING")
    first = miner.post(f"{path}/complete", {})
    assert (first.status_code, first.json()) == (500, {"detail": "Internal server error"})
    assert double.job(job_id).state == "COMPLETED"
    assert (miner.post(f"{path}/complete", {}).status_code, double.job(job_id).state) == (400, "FAILED")
    assert double.miners()["m-1"].inflight == 1


# The list.


def test_the_list_of_a_miners_jobs(double: MockAitbc, miner: Miner) -> None:
    jobs = [double.submit({"n": number}) for number in range(25)]
    double.submit({"n": "waits"})
    miner.register(25)
    for _ in jobs:
        miner.take()
    newest = jobs[::-1]
    reply = miner.post("/miners/m-1/jobs").json()
    assert {name: value for name, value in reply.items() if name != "jobs"} == {
        "total": 25,
        "limit": 20,
        "offset": 0,
        "miner_id": "m-1",
    }
    assert [job["job_id"] for job in reply["jobs"]] == newest[:20]
    assert miner.listed(limit=100) == newest
    assert miner.listed(limit=10, offset=20) == newest[20:]
    shown = reply["jobs"][0]
    assert (shown["state"], shown["payload"]) == ("RUNNING", {"n": 24})
    assert "constraints" not in shown
    ends = datetime.fromisoformat(shown["expires_at"])
    assert ends.tzinfo is None
    assert (ends - datetime.fromisoformat(shown["requested_at"])).total_seconds() == 900
    miner.result(jobs[0])
    miner.fail(jobs[1])
    assert miner.listed(job_status="COMPLETED") == [jobs[0]]
    assert miner.listed(job_status="FAILED") == [jobs[1]]
    assert len(miner.listed(job_status="RUNNING", limit=100)) == 23
    assert len(miner.listed(job_status="NONE_SUCH", limit=100)) == 25
    with Miner(double, "other") as other:
        assert other.listed() == []
        assert other.listed("m-1", limit=1) == [jobs[24]]


@pytest.mark.parametrize("query", [{"limit": 0}, {"limit": 101}, {"limit": "x"}, {"offset": -1}])
def test_a_list_that_cannot_be(miner: Miner, query: dict[str, Any]) -> None:
    reply = miner.post("/miners/m-1/jobs", params=query)
    assert reply.status_code == 422
    assert reply.json()["error"]["details"][0]["field"] == f"query.{next(iter(query))}"


# Cancelling and expiring.


def test_a_cancelled_job_is_only_missed_on_the_list(
    double: MockAitbc, miner: Miner, client: JobClient
) -> None:
    job_id = double.submit({})
    miner.take()
    assert client.post(f"/jobs/{job_id}/cancel").json()["state"] == "CANCELED"
    assert (miner.listed(), double.job(job_id).assigned_miner_id) == ([], None)
    assert double.miners()["m-1"].inflight == 1, "its place stays taken"
    assert client.post(f"/jobs/{job_id}/cancel").status_code == 409
    assert double.cancel(job_id) is False
    queued = double.submit({})
    assert double.cancel(queued) is True
    miner.beat()
    assert miner.poll() is None


def test_a_job_expires_when_somebody_looks(double: MockAitbc, miner: Miner, client: JobClient) -> None:
    running, queued = double.submit({}, ttl_seconds=0), double.submit({}, ttl_seconds=-5)
    assert miner.take() == running
    for job_id in (running, queued):
        job = double.job(job_id)
        assert (job.expires_at - job.requested_at).total_seconds() == 1
        until_overdue(double, job_id)
    assert miner.listed(job_status="RUNNING") == [running], "the list does not look"
    assert (double.job(running).state, double.job(queued).state) == ("RUNNING", "QUEUED")
    miner.beat()
    assert miner.poll() is None
    assert double.job(queued).state == "EXPIRED", "a poll looks at what waits"
    assert double.job(running).state == "RUNNING", "and not at what runs"
    job = client.call("GET", f"/jobs/{running}").json()
    assert (job["state"], job["error"]) == ("EXPIRED", "job expired")
    assert double.cancel(running) is False
    assert miner.listed(job_status="EXPIRED") == [running]


def test_nothing_gets_back_the_job_of_a_miner_that_died(double: MockAitbc, miner: Miner) -> None:
    job_id = double.submit({})
    miner.take()
    miner.register()
    miner.beat()
    miner.call("DELETE", "/miners/m-1")
    with Miner(double, "other") as other:
        assert other.poll() is None
    assert double.job(job_id).state == "RUNNING"


# Clients.


def test_a_client_by_hand(double: MockAitbc, miner: Miner, client: JobClient) -> None:
    body = {"payload": {"type": "x"}, "constraints": {"region": None, "other": 1}, "ttl_seconds": 60}
    reply = client.post("/jobs", body)
    assert (reply.status_code, reply.json()["state"]) == (201, "QUEUED")
    job_id = reply.json()["job_id"]
    assert miner.take() == job_id
    assert (double.job(job_id).client, double.job(job_id).payment_amount) == ("c-1", None)
    for path in (f"/jobs/{NOBODY}", f"/jobs/{NOBODY}/result"):
        assert client.call("GET", path).status_code == 404
    assert client.post(f"/jobs/{NOBODY}/cancel").status_code == 404
    assert client.post("/jobs", {"payload": "text"}).status_code == 422
