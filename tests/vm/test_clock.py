"""The wall clock set years forth and back, again and again: nothing but what is shown may notice."""

import json
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest

from aitbc_miner.util.clock import now
from tests.vm.conftest import Count
from tests.vm.machine import WAIT_S, Machine, run
from tests.vm.witness import assert_once, heartbeats, longest_gap, outcome, wait_heartbeat

pytestmark = [
    pytest.mark.own_kernel("the clock is set"),
    pytest.mark.one_release("13", "both kernels keep the same two clocks"),
]

YEARS = 10.0
YEAR_S = 365.25 * 86_400
SLOT_COUNT = 3
TIMEOUT_S = 5.0
BEAT_S = 2.0
LONGEST_BACKOFF_S = 2.0
PATIENCE_S = 3.0
# How much longer than in a calm time something may take, where others use the same processors.
FACTOR = 3.0
FAULTS = {"busy": f"status:503:{PATIENCE_S:.0f}", "gone": "refuse"}
AWAY = ("heartbeat", "pull", "result")


class WallClock:
    """The wall clock of this machine; `jumps` says how often it was put wrong."""

    def __init__(self) -> None:
        self._booted = time.time() - now()
        self.jumps = 0

    def jump(self) -> None:
        """Set it ten years ahead of the time that it is, or behind, in turn."""
        years = -YEARS if self.jumps % 2 else YEARS
        self._set(years)
        self.jumps += 1
        assert abs(time.time() - self._booted - now() - years * YEAR_S) < 60

    def restore(self) -> None:
        """Set it to the time that it is."""
        self._set(0.0)

    def _set(self, years: float) -> None:
        time.clock_settime(time.CLOCK_REALTIME, self._booted + now() + years * YEAR_S)


@pytest.fixture
def wall() -> Iterator[WallClock]:
    """Give the wall clock, which is right again afterwards."""
    clock = WallClock()
    try:
        yield clock
    finally:
        clock.restore()


class Untouched:
    """The node's own processes: none may be ended, least of all by the watchdog."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._began = now()
        self._journal = machine.journal_end()
        self._pids = self._now()
        self._up_s = machine.now().up_s

    def check(self) -> None:
        """Assert that all go on, and that `status` tells what is so."""
        assert self._now() == self._pids, self._machine.journal()[-8000:]
        assert self._machine.show("NRestarts") == "0"
        assert "Watchdog timeout" not in self._machine.journal(after=self._journal)
        before, began = self._up_s, now()
        status = self._machine.now()
        assert before <= status.up_s <= began - self._began + before + WAIT_S
        assert all(0 <= row.for_s <= status.up_s for row in status.slots), status
        assert [
            problem.what for problem in status.problems if "sandbox.mode is off" not in problem.what
        ] == []
        self._up_s, self._began = status.up_s, began
        page = run("aitbc-minerctl", "status")
        assert re.search(rf"up (\d+h\d\dm|\d+m\d\ds|\d+s), pid {status.pid}$", page, re.MULTILINE), page
        assert re.search(
            r"reachable since \d{4}-\d\d-\d\d \d\d:\d\d:\d\d UTC, registered$", page, re.MULTILINE
        )

    def _now(self) -> set[int]:
        main = psutil.Process(self._machine.main_pid())
        return {main.pid, *(child.pid for child in main.children()), *self._machine.workers().values()}


def start(machine: Machine) -> Untouched:
    """Start the node and have the heartbeats begin."""
    machine.configure(heartbeat={"interval_s": BEAT_S, "backoff": {"min_s": 0.2, "max_s": LONGEST_BACKOFF_S}})
    machine.slots(SLOT_COUNT)
    machine.start()
    wait_heartbeat(machine.mock)
    return Untouched(machine)


# --- jobs --------------------------------------------------------------------------------------------------


def queue(machine: Machine, name: str) -> dict[str, str]:
    """Queue a job for each that time decides; give the code that each must end with, by id."""
    mark = machine.marks / f"{name}-second"
    twice = {"max_attempts": 2, "on": ["E_EXIT"]}
    jobs: list[tuple[str, str, str, dict[str, Any]]] = [
        (f"{name}-in-time", "OK", "sleep 3", {"timeout_s": 200}),
        (f"{name}-too-late", "E_TIMEOUT", "exec sleep 1000", {"timeout_s": TIMEOUT_S}),
        (f"{name}-again", "OK", f"[ -e {mark} ] || {{ : > {mark}; exit 3; }}", {"retry": twice}),
    ]
    for job_id, _, line, more in jobs:
        machine.submit(machine.script(job_id, line, **more))
    return {job_id: code for job_id, code, _, _ in jobs}


def check(machine: Machine, expected: dict[str, str]) -> Counter[str]:
    """Assert of each job that it was reported once, as it must have ended, and count the codes."""
    machine.wait_final(expected)
    assert_once(machine.mock, expected)
    found = {job_id: machine.mock.job(job_id).error_code or "OK" for job_id in expected}
    assert found == expected
    for job_id in expected:
        assert len(machine.runs(job_id)) == (2 if job_id.endswith("-again") else 1), job_id
    return Counter(found.values())


def took(machine: Machine, job_ids: Iterable[str]) -> list[float]:
    """Give how long the jobs ran that had to be ended, in seconds, as their outcomes have it."""
    late = [job_id for job_id in job_ids if job_id.endswith("-too-late")]
    return [float(outcome(machine, job_id)["usage"]["wall_s"]) for job_id in late]


# --- jumps while jobs run ----------------------------------------------------------------------------------


class Beats(NamedTuple):
    """How the heartbeats came in a time."""

    seconds: float
    beats: int
    longest_gap_s: float

    def of_expected(self) -> float:
        """Give how many came of those that should."""
        return self.beats * BEAT_S / self.seconds


def rounds(machine: Machine, times: int, name: str, act: Callable[[], None]) -> tuple[dict[str, str], Beats]:
    """Do something `times` times while jobs run; give what these must end with, and the heartbeats."""
    expected: dict[str, str] = {}
    began = now()
    for number in range(times):
        fresh = queue(machine, f"{name}-{number:02}")
        expected |= fresh
        machine.running(next(iter(fresh)))
        act()
        # It goes on; and so the jumps do not all come at the same moment of a beat.
        wait_heartbeat(machine.mock)
    ended = now()
    came = heartbeats(machine.mock)
    inside = sum(began <= at <= ended for at in came)
    return expected, Beats(ended - began, inside, longest_gap(came, began, ended))


def test_jobs_and_heartbeats_go_by_another_clock(
    machine: Machine, wall: WallClock, reports: Path, count: Count
) -> None:
    untouched = start(machine)
    calm, calm_beats = rounds(machine, count(2, 10), "calm", lambda: None)
    wild, wild_beats = rounds(machine, count(4, 34), "wild", wall.jump)
    untouched.check()
    codes = check(machine, calm | wild)
    # Once more, with the clock years away all the while.
    untouched.check()
    late = {"calm": took(machine, calm), "wild": took(machine, wild)}
    figures = {
        "jumps": wall.jumps,
        "codes": codes,
        "heartbeats_calm": calm_beats._asdict(),
        "heartbeats_wild": wild_beats._asdict(),
        "timed_out_after_s": {name: (min(times), max(times)) for name, times in late.items()},
    }
    note(reports, "jobs", figures)
    assert wild_beats.longest_gap_s <= FACTOR * calm_beats.longest_gap_s
    assert wild_beats.of_expected() >= calm_beats.of_expected() / FACTOR
    # They come on a grid, however late: never more than it has points.
    assert wild_beats.beats <= wild_beats.seconds / BEAT_S + 2
    # A deadline is set before the program is started, and here starting it takes a part of the time.
    assert min(late["wild"]) >= TIMEOUT_S / 2
    assert max(late["wild"]) <= FACTOR * max(late["calm"])


def note(reports: Path, what: str, figures: dict[str, Any]) -> None:
    """Print what was measured, and keep it."""
    print(f"\n{what}: {json.dumps(figures)}")
    (reports / f"clock-{what}.json").write_text(json.dumps(figures, indent=1))


# --- jumps while the coordinator is away -------------------------------------------------------------------


def outage(machine: Machine, name: str, fault: str, act: Callable[[], None]) -> dict[str, list[float]]:
    """Have a job end while nobody takes its result; give the pauses between the attempts, by kind of call."""
    mock = machine.mock
    job_id = mock.submit(machine.script(name, "sleep 1"))
    machine.running(job_id)
    began = now()
    for endpoint in AWAY:
        mock.fault(endpoint, fault)

    def calls(endpoint: str, *, failed: bool) -> list[float]:
        made = mock.ledger.calls(endpoint)
        return [call.at for call in made if call.at >= began and bool(call.fault) == failed]

    mock.wait(lambda _: calls("result", failed=True), WAIT_S)
    act()
    mock.wait(lambda _: all(len(calls(each, failed=True)) > 2 for each in AWAY), WAIT_S)
    act()
    back = now()
    mock.clear_faults()
    mock.wait(lambda _: all(max(calls(each, failed=False), default=0) > back for each in AWAY), WAIT_S)
    pauses = {}
    for endpoint in AWAY:
        failed = calls(endpoint, failed=True)
        # The last pause is the one that was under way at the second jump.
        answered = next(at for at in calls(endpoint, failed=False) if at > failed[-1])
        pauses[endpoint] = [later - at for at, later in pairwise([*failed, answered])]
    return pauses


@pytest.mark.parametrize("how", FAULTS)
def test_no_pause_is_longer_or_shorter(
    machine: Machine, wall: WallClock, reports: Path, count: Count, how: str
) -> None:
    untouched = start(machine)
    fault = FAULTS[how]
    # The node knows a job that it has had once for ever, also that of the other fault.
    calm = [outage(machine, f"{how}-calm-{i}", fault, lambda: None) for i in range(count(1, 2))]
    wild = [outage(machine, f"{how}-wild-{i}", fault, wall.jump) for i in range(count(1, 4))]
    figures: dict[str, Any] = {"jumps": wall.jumps}
    for endpoint in AWAY:
        before = [pause for one in calm for pause in one[endpoint]]
        pauses = [pause for one in wild for pause in one[endpoint]]
        figures[f"{endpoint}_calm"] = (len(before), min(before), max(before))
        figures[f"{endpoint}_wild"] = (len(pauses), min(pauses), max(pauses))
    note(reports, how, figures)
    for endpoint in AWAY:
        _, shortest, longest = figures[f"{endpoint}_wild"]
        # A pause is drawn by chance; one of the shortest may be all that was seen in calm.
        assert longest <= FACTOR * max(figures[f"{endpoint}_calm"][2], LONGEST_BACKOFF_S)
        if how == "busy":
            assert shortest >= PATIENCE_S
    check(machine, dict.fromkeys(machine.mock.ledger.jobs(), "OK"))
    untouched.check()
