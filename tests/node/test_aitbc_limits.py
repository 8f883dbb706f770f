"""The coordinator's real limits, in real time: as much as they allow, and nothing lost to them."""

import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import requests

from aitbc_miner.util import clock
from tests.node.harness import Node, until, wait_settled
from tests.node.networks import KEY, Aitbc
from tools.lib.local_node import wait_until
from tools.mock.aitbc.coordinator import MockAitbc

JOBS = 110
PER_MINUTE = 50
MINUTE_S = 60.0
# AITBC_TEST_FULL=1 has them as long as in the field.
FULL = os.environ.get("AITBC_TEST_FULL") == "1"
AWAY_S, REFUSED_S = (60.0, 120.0) if FULL else (3.0, 5.0)


@pytest.fixture
def double() -> Iterator[MockAitbc]:
    with MockAitbc() as made:
        yield made


@pytest.fixture
def node(double: MockAitbc) -> Iterator[Node]:
    made = Aitbc(double).node(4)
    yield made
    made.clean_up()
    shutil.rmtree(made.directory)


def spend_the_minute(double: MockAitbc) -> None:
    """Have another miner of our address use up all results of this minute, for jobs that nobody knows."""
    headers = {"X-Api-Key": KEY, "X-Miner-ID": "another"}

    def send(number: int) -> int:
        url = f"{double.url}/miners/{number:032x}/result"
        return requests.post(url, json={"result": {}}, headers=headers, timeout=20).status_code

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(send, range(PER_MINUTE))) == [404] * PER_MINUTE


def test_results_at_the_pace_that_is_allowed_and_each_once(double: MockAitbc, node: Node) -> None:
    """Some three minutes: one for what others have used up, two for the jobs."""
    spend_the_minute(double)
    jobs = [double.submit({"type": "script", "line": "true"}) for _ in range(JOBS)]
    node.start()
    double.wait(lambda _: all(double.job(job_id).state == "COMPLETED" for job_id in jobs), 400.0)
    wait_settled(node)
    assert [len(double.job(job_id).results) for job_id in jobs] == [1] * JOBS
    assert [double.job(job_id).fails for job_id in jobs if double.job(job_id).fails] == []
    assert len(double.strays()) == PER_MINUTE
    times = sorted(double.job(job_id).results[0].at for job_id in jobs)
    in_two_minutes = sum(at < times[0] + 2 * MINUTE_S for at in times)
    assert in_two_minutes > 0.95 * 2 * PER_MINUTE
    print(f"{in_two_minutes} of {2 * PER_MINUTE} results in two minutes, all in {times[-1] - times[0]:.1f} s")


def test_away_as_results_are_due(double: MockAitbc, node: Node) -> None:
    node.start()
    go = node.marks / "go"
    jobs = [double.submit({"type": "script", "line": until(go)}) for _ in range(4)]
    # The node has them, and not the coordinator's word alone: an answer may be lost as it stops.
    wait_until(lambda: sum(row.slot.job_id is not None for row in node.now().slots) == 4, 60.0)
    double.stop()
    go.touch()
    wait_until(lambda: node.now().pending_reports == 4, 60.0)
    pass_time(AWAY_S)
    double.start()
    back_at = clock.now()
    double.wait(lambda _: all(double.job(job_id).state == "COMPLETED" for job_id in jobs), 180.0)
    wait_settled(node)
    assert [len(double.job(job_id).results) for job_id in jobs] == [1] * 4
    last = max(double.job(job_id).results[0].at for job_id in jobs)
    print(f"away for {AWAY_S:g} s: all results {last - back_at:.1f} s after the return")


def test_refused_for_long(double: MockAitbc, node: Node) -> None:
    node.start()
    double.fault("result", "status:429:60")
    jobs = [double.submit({"type": "script", "line": "true"}) for _ in range(20)]
    wait_until(lambda: node.now().pending_reports == 20, 60.0)
    pass_time(REFUSED_S)
    tried = len(double.calls("result"))
    bad = double.submit({"type": "script", "line": "exit 1"})
    double.wait(lambda _: double.job(bad).state == "FAILED", 60.0)
    double.clear_faults()
    back_at = clock.now()
    double.wait(lambda _: all(double.job(job_id).state == "COMPLETED" for job_id in jobs), 180.0)
    wait_settled(node)
    assert [len(double.job(job_id).results) for job_id in jobs] == [1] * 20
    last = max(double.job(job_id).results[0].at for job_id in jobs)
    print(f"refused for {REFUSED_S:g} s, tried {tried} times: all results {last - back_at:.1f} s after that")


def pass_time(seconds: float) -> None:
    """Let this much time pass: how long the coordinator is away is what is tried here."""
    until_then = clock.now() + seconds
    wait_until(lambda: clock.now() > until_then, seconds + 60.0)
