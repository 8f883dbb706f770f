"""Miners at the double of the AITBC coordinator: what they say of themselves, and the jobs that they get."""

import re
import threading
from typing import Any

import pytest

from aitbc_miner.util.clock import now
from tools.mock.aitbc.client import Miner
from tools.mock.aitbc.coordinator import MockAitbc
from tools.mock.aitbc.records import CONSTRAINTS

ID = re.compile("[0-9a-f]{32}")
NOBODY = "f" * 32


# Miners.


def test_registering_replaces_what_was_said_and_keeps_what_came_of_it(
    double: MockAitbc, miner: Miner
) -> None:
    jobs = [double.submit({"n": number}) for number in range(3)]
    miner.register(5, "eu", models=["a"])
    assert [miner.take() for _ in jobs] == jobs
    miner.result(jobs[0])
    miner.fail(jobs[1])
    assert double.miners()["m-1"].inflight == 2
    assert ID.fullmatch(miner.register(2, price=1).json()["session_token"])
    row = double.miners()["m-1"]
    assert (row.inflight, row.concurrency, row.region, row.capabilities) == (0, 2, None, {"price": 1})
    assert (row.status, row.completed, row.failed, len(row.registrations)) == ("ONLINE", 1, 1, 3)
    assert double.job(jobs[2]).state == "RUNNING"
    assert miner.poll() is None, "what runs is not handed out again"


def test_defaults_of_a_registration(double: MockAitbc, miner: Miner) -> None:
    assert miner.post("/miners/register", {"capabilities": {}, "unknown": 1}).status_code == 200
    row = double.miners()["m-1"]
    assert (row.concurrency, row.region) == (1, None)
    assert row.registrations[-1].payload == {"capabilities": {}, "unknown": 1}


def test_a_heartbeat_overwrites_what_was_counted(double: MockAitbc, miner: Miner) -> None:
    for _ in range(2):
        double.submit({})
    miner.take()
    assert miner.poll() is None
    assert miner.beat().json() == {"status": "ok"}
    assert miner.poll() is not None, "it said that nothing is under way"
    miner.beat(inflight=7, status="DRAINING", metadata={"load": 1}, network_latency_ms=1.5, other=[])
    row = double.miners()["m-1"]
    assert (row.inflight, row.status, row.metadata) == (7, "DRAINING", {"load": 1})
    assert [beat.payload.get("inflight") for beat in row.heartbeats] == [None, 7]
    assert row.heartbeats[0].at <= row.heartbeats[1].at


def test_who_is_not_known(double: MockAitbc) -> None:
    with Miner(double, concurrency=None) as stranger:
        beat = stranger.beat()
        assert (beat.status_code, beat.json()) == (404, {"detail": "miner not registered"})
        poll = stranger.post("/miners/poll", {})
        assert (poll.status_code, poll.json()["error"]["type"]) == (500, "internal_error")
        assert stranger.call("DELETE", "/miners/m-1").status_code == 404
        assert stranger.listed() == []
    assert double.miners() == {}


@pytest.mark.parametrize("status", ["OFFLINE", "DRAINING", "active"])
def test_polls_are_served_whatever_the_status(double: MockAitbc, miner: Miner, status: str) -> None:
    double.submit({})
    miner.beat(status=status)
    assert miner.poll() is not None


def test_leaving_marks_the_row_and_no_more_and_anyone_may_do_it(double: MockAitbc, miner: Miner) -> None:
    double.submit({})
    with Miner(double, "m-2") as other:
        reply = other.call("DELETE", "/miners/m-1")
    assert (reply.status_code, reply.json()) == (200, {"miner_id": "m-1", "status": "deregistered"})
    assert double.miners()["m-1"].status == "OFFLINE"
    assert miner.poll() is not None
    miner.register()
    assert double.miners()["m-1"].status == "ONLINE"


def test_capabilities_are_those_of_the_caller(double: MockAitbc, miner: Miner) -> None:
    double.submit({})
    miner.take()
    body = {"capabilities": {"cuda": "12.4"}, "concurrency": 3}
    assert miner.call("PUT", "/miners/somebody/capabilities", body).status_code == 200
    row = double.miners()["m-1"]
    assert (row.capabilities, row.concurrency, row.inflight) == ({"cuda": "12.4"}, 3, 0)
    assert list(double.miners()) == ["m-1"]


def test_a_name_is_free_text(double: MockAitbc) -> None:
    with Miner(double, "a b/c") as odd:
        double.submit({})
        odd.take()
    assert double.miners()["a b/c"].inflight == 1


# Polls.


def test_an_assignment_has_just_these_members(double: MockAitbc, miner: Miner) -> None:
    wanted = {"max_price": 0.5, "auto_reinvest_pct": 10, "confidential": True}
    job_id = double.submit({"type": "x", "deep": {"a": [1]}}, constraints=wanted)
    miner.register(price=0.5)
    assert miner.poll() == {
        "job_id": job_id,
        "payload": {"type": "x", "deep": {"a": [1]}},
        "constraints": {
            **CONSTRAINTS,
            "max_price": "0.5",
            "auto_reinvest_pct": "10",
            "confidential": True,
        },
    }
    assert ID.fullmatch(job_id)
    assert len(CONSTRAINTS) == 15
    job = double.job(job_id)
    assert (job.state, job.assigned_miner_id, [entry.node for entry in job.assigned]) == (
        "RUNNING",
        "m-1",
        ["m-1"],
    )


def test_an_empty_poll_answers_at_once_and_with_nothing(miner: Miner) -> None:
    begun = now()
    reply = miner.post("/miners/poll", {"max_wait_seconds": 30})
    assert now() - begun < 5
    assert (reply.status_code, reply.content) == (204, b"")
    assert "Content-Type" not in reply.headers


def test_the_oldest_comes_first_and_one_at_a_time(double: MockAitbc, miner: Miner) -> None:
    jobs = [double.submit({"n": number}) for number in range(4)]
    miner.register(3)
    assert [miner.take() for _ in range(3)] == jobs[:3]
    assert miner.poll() is None, "as many as it said run already"
    miner.result(jobs[1])
    assert miner.take() == jobs[3]


@pytest.mark.parametrize(("concurrency", "taken"), [(0, 5), (-1, 0), (1, 1)])
def test_concurrency_is_taken_as_it_is(double: MockAitbc, miner: Miner, concurrency: int, taken: int) -> None:
    for number in range(5):
        double.submit({"n": number})
    miner.register(concurrency)
    assert [miner.poll() is not None for _ in range(5)].count(True) == taken


def test_a_job_goes_to_one_of_many_who_ask_at_once(double: MockAitbc) -> None:
    miners = [Miner(double, f"m-{number}") for number in range(6)]
    job_id = double.submit({})
    found: list[Any] = []
    threads = [threading.Thread(target=lambda each=each: found.append(each.poll())) for each in miners]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for each in miners:
        each.session.close()
    assert [job["job_id"] for job in found if job] == [job_id]
    assert len(double.job(job_id).assigned) == 1


# What tests rely on.


def test_submitting(double: MockAitbc) -> None:
    assert double.submit({}, job_id="a" * 32) == "a" * 32
    with pytest.raises(ValueError, match="the id is taken"):
        double.submit({}, job_id="a" * 32)
    with pytest.raises(ValueError, match="constraint 'gpus'"):
        double.submit({}, constraints={"gpus": "x"})
    with pytest.raises(KeyError):
        double.job(NOBODY)
    assert list(double.jobs()) == ["a" * 32]


def test_an_outage_keeps_the_database_and_the_port(double: MockAitbc, miner: Miner) -> None:
    job_id, url = double.submit({}), double.url
    double.stop()
    with pytest.raises(OSError, match="refused"):
        miner.poll()
    double.start()
    assert (double.url, miner.take()) == (url, job_id)


def test_a_database_that_is_empty(double: MockAitbc, miner: Miner) -> None:
    job_id = double.submit({})
    miner.take()
    double.forget_miners()
    assert (double.miners(), list(double.jobs())) == ({}, [job_id])
    assert miner.beat().status_code == 404
    calls = len(double.calls())
    double.wipe()
    assert (double.jobs(), len(double.calls())) == ({}, calls)
    assert miner.result(job_id).status_code == 404
    assert [stray.job_id for stray in double.strays()] == [job_id]


def test_waiting(double: MockAitbc, miner: Miner) -> None:
    job_id = double.submit({})
    timer = threading.Timer(0.05, miner.take)
    timer.start()
    assert double.wait(lambda ledger: ledger.job(job_id).assigned_miner_id) == "m-1"
    timer.join()
    with pytest.raises(TimeoutError, match=f"{job_id}': 'RUNNING'"):
        double.wait(lambda ledger: ledger.job(job_id).state == "COMPLETED", 0.01)
