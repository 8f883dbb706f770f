"""What the operator is told when there are no jobs, and when."""

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from aitbc_miner.agent.idle_monitor import STARVED_S, IdleMonitor
from aitbc_miner.agent.pull import Puller
from aitbc_miner.agent.reconcile import Reconciler
from aitbc_miner.coordinator.interface import Standing
from aitbc_miner.ipc.messages import Starved
from tests.bench.agent_bench import Desk
from tests.support.stopped_clock import Time


class Idle(Desk):
    """A watch on a puller; the test says since when it has been idle."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.causes = ["no region"]
        self.standings: list[Standing] = []
        self.coordinator.why_idle = self.why  # type: ignore[method-assign]
        reconciler = Reconciler(self.context, self.admission, self.delivery)
        self.puller = Puller(self.context, self.admission, reconciler)
        self.watch = IdleMonitor(self.context, self.puller)

    def why(self, standing: Standing) -> list[str]:
        self.standings.append(standing)
        return self.causes

    def look(self) -> list[Starved]:
        self.watch.start_due()
        self.turn_until(lambda: not self.watch._asking)
        return [each for each in self.said() if isinstance(each, Starved)]


@pytest.fixture
def desk(tmp_path: Path, time: Time) -> Iterator[Idle]:
    made = Idle(tmp_path)
    yield made
    made.close()


def test_only_long_hunger_is_told_and_once(desk: Idle, time: Time) -> None:
    assert desk.watch.next_due() is None
    desk.puller.idle_since = time.now
    assert desk.watch.next_due() == time.now + STARVED_S
    time.now += STARVED_S - 1
    assert desk.look() == []
    time.now += 2
    assert desk.look() == [Starved(desk.puller.idle_since, ["no region"])]
    time.now += 3600
    assert desk.look() == []
    desk.causes = ["another"]
    time.now += 3600
    assert desk.look() == [Starved(desk.puller.idle_since, ["another"])]


def test_work_ends_it_at_once(desk: Idle, time: Time) -> None:
    desk.puller.idle_since = time.now
    time.now += STARVED_S
    assert desk.look() != []
    desk.puller.idle_since = None
    assert desk.watch.next_due() == time.now
    assert desk.look() == [Starved()]
    assert desk.watch.next_due() is None


def test_a_coordinator_that_gives_no_causes_leaves_it_at_that(desk: Idle, time: Time) -> None:
    desk.causes = []
    desk.puller.idle_since = time.now
    time.now += STARVED_S
    assert desk.look() == []
    assert desk.standings == [Standing(0, 0)]


def test_hunger_is_logged_when_it_begins_and_ends(
    desk: Idle, time: Time, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    desk.puller.idle_since = time.now
    for _ in range(3):
        time.now += STARVED_S + 1
        desk.look()
        desk.causes = [*desk.causes, "another"]
    desk.puller.idle_since = None
    desk.look()
    said = [each.message for each in caplog.records if "come" in each.message]
    assert said == ["no job has come for long", "jobs come again"]
