"""A node whose slots take all that the machine has: it must still be heard, and answer."""

import os
import statistics
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise

from aitbc_miner.util import clock
from tests.node.harness import assert_once, wait_final
from tests.node.hostile_jobs import OK, task
from tests.node.rig import PATIENCE_S, all_idle, code, peak_mib, running
from tools.lib.local_node import wait_until
from tools.mock.bootstrap.coordinator import MockCoordinator
from tools.mock.bootstrap.ledger import Ledger

SLOTS = [{"name": f"cpu{number}", "kind": "cpu", "memory_max": "128M", "pids_max": 64} for number in range(4)]
BEAT_S = 1.0
BEATS = 11
# What is left of a slot's 128 MiB is for the interpreter.
FILL_MIB = 100
JOBS = [f"burn-{slot['name']}" for slot in SLOTS]


def arrivals(ledger: Ledger) -> list[float]:
    """Give when the only node's heartbeats came."""
    (node,) = ledger.nodes().values()
    return [beat.at for beat in node.heartbeats]


@contextmanager
def felt_load() -> Iterator[list[float]]:
    """Give, at the end, how late this process itself came to run: what the machine does to everybody."""
    late = [0.0]
    over = threading.Event()

    def feel() -> None:
        began = clock.now()
        while not over.wait(0.05):
            late[0] = max(late[0], clock.now() - began - 0.05)
            began = clock.now()

    thread = threading.Thread(target=feel)
    thread.start()
    try:
        yield late
    finally:
        over.set()
        thread.join()


def test_heartbeats_and_status_keep_their_time_under_load() -> None:
    beat = {"interval_s": BEAT_S, "jitter_pct": 0}
    with MockCoordinator() as mock, running(mock, SLOTS, heartbeat=beat) as rig, felt_load() as felt:
        node = rig.node
        cores = min(8, os.cpu_count() or 1)
        burn = task("burn", seconds=PATIENCE_S, mebibytes=FILL_MIB, processes=cores)
        for job_id in JOBS:
            mock.submit({"job_id": job_id, **burn})
        signs = [node.jobs / job_id / "work" / "burning" for job_id in JOBS]
        wait_until(lambda: all(sign.exists() for sign in signs), PATIENCE_S)
        first = len(arrivals(mock.ledger))
        answers = []
        for number in range(first, first + BEATS):
            mock.wait(lambda ledger, number=number: len(arrivals(ledger)) > number, PATIENCE_S)  # type: ignore[misc]
            for _ in range(2):
                began = clock.now()
                assert all(row.slot.state == "BUSY" for row in node.now().slots)
                answers.append(clock.now() - began)
        for sign in signs:
            (sign.parent / "enough").touch()
        beats = arrivals(mock.ledger)[max(0, first - 1) :]
        late = [max(0.0, after - before - BEAT_S) for before, after in pairwise(beats)]
        print(
            f"\nload of {os.getloadavg()[0]:.1f} on {os.cpu_count()} CPUs, felt as {felt[0] * 1000:.1f} ms;"
            f" heartbeats late by at most {max(late) * 1000:.1f} ms of {len(late)};"
            f" status: median {statistics.median(answers) * 1000:.1f} ms,"
            f" worst {max(answers) * 1000:.1f} ms of {len(answers)}"
        )
        # A call passes through several processes, each of which may be as late as this one.
        bound = 1.0 + 5 * felt[0]
        assert max(late) < bound
        assert max(answers) < bound
        for job in wait_final(mock, JOBS, PATIENCE_S):
            assert code(job) == OK, job.reports
        assert_once(mock, JOBS)
        wait_until(lambda: all_idle(node), PATIENCE_S)
        rig.assert_unharmed()
        assert max(peak_mib(pid) for pid in rig.children.values()) < 256
