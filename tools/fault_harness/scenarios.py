"""Two scenarios: the coordinator is away for minutes, or its answers are lost."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from msgspec import Struct

from tools.fault_harness.checks import Fates, Finding, check
from tools.fault_harness.jobs import Kind
from tools.fault_harness.node import FaultNode
from tools.lib.local_node import wait_until
from tools.mock.bootstrap.coordinator import MockCoordinator
from tools.mock.bootstrap.records import FINAL, Verdict

REACH_S = 60.0
WELL = Kind("well", "", frozenset({None}), 1)


class Shown(Struct):
    """The result of a scenario: a summary, the findings, and the node's directory."""

    said: list[str] = []
    findings: list[Finding] = []
    directory: str = ""


Told = Callable[[str], None]


def outage(jobs: int, minutes: float, tell: Told) -> Shown:
    """Let `jobs` jobs, each in its own slot, end while the coordinator is away for `minutes`."""
    with _scene(jobs) as (mock, node, shown):
        go = node.marks / "go"
        names = [
            mock.submit(node.script(f"away-{i}", f"until [ -e {go} ]; do sleep 0.2; done"))
            for i in range(jobs)
        ]
        for name in names:
            node.running(name)
        mock.stop()
        began = time.monotonic()
        go.touch()
        wait_until(lambda: (now := node.status()) is not None and now.pending_reports == jobs, REACH_S)
        tell(f"the coordinator is away; {jobs} jobs have ended {time.monotonic() - began:.1f} s later")
        wait_until(lambda: time.monotonic() - began >= minutes * 60, minutes * 60 + REACH_S, 0.2)
        early = sum(len(mock.job(name).reports) for name in names)
        mock.start()
        back = time.monotonic()
        _wait_final(mock, node, names)
        shown.said = [
            f"away for {back - began:.0f} s; all of the {jobs} reports that waited came within"
            f" {time.monotonic() - back:.1f} s of its return, {early} before it"
        ]
        _conclude(mock, node, names, shown)
    return shown


def drop(times: int, tell: Told, jobs: int = 10) -> Shown:
    """Lose `times` answers to /jobs/result, each after the coordinator accepted or knew the result."""
    with _scene(4) as (mock, node, shown):
        mock.fault("result", "drop_after", times)
        names = [mock.submit(node.script(f"dropped-{i}", "true")) for i in range(jobs)]
        _wait_final(mock, node, names)
        verdicts = [report.verdict for name in names for report in mock.job(name).reports]
        tell(f"{len(verdicts)} results came in")
        shown.said = [
            f"{jobs} jobs, {times} answers lost: {verdicts.count(Verdict.ACCEPTED)} results accepted,"
            f" {verdicts.count(Verdict.DUPLICATE)} known already, {verdicts.count(Verdict.CONFLICT)} refused"
        ]
        if len(verdicts) != jobs + times:
            shown.findings.append(
                Finding("wrong", f"{len(verdicts)} results came, and {jobs + times} should have")
            )
        _conclude(mock, node, names, shown)
    return shown


@contextmanager
def _scene(slots: int) -> Iterator[tuple[MockCoordinator, FaultNode, Shown]]:
    shown = Shown()
    with MockCoordinator() as mock:
        node = FaultNode(
            mock.url, slots, {}, heartbeat={"interval_s": 1, "backoff": {"min_s": 0.1, "max_s": 2}}
        )
        shown.directory = str(node.directory)
        try:
            node.start()
            yield mock, node, shown
        except TimeoutError as error:
            shown.findings.append(Finding("lost", f"the scenario came to a halt: {error}"))
        finally:
            node.clean_up()


def _wait_final(mock: MockCoordinator, node: FaultNode, names: list[str]) -> None:
    mock.wait(lambda ledger: all(ledger.job(name).state in FINAL for name in names), REACH_S)
    wait_until(lambda: (now := node.status()) is not None and now.pending_reports == 0, REACH_S)


def _conclude(mock: MockCoordinator, node: FaultNode, names: list[str], shown: Shown) -> None:
    node.stop()
    shown.findings += check(mock, node, dict.fromkeys(names, WELL), Fates(set(), set()), disk=False)
