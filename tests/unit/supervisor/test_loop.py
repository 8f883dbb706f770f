"""What the supervisor tells the agent and the heartbeat of the slots."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from aitbc_miner.ipc.messages import FromAgent, Slots
from aitbc_miner.slots.placement import Offer, Ticket
from aitbc_miner.slots.spec import SlotSpec
from aitbc_miner.slots.state import Slot, SlotState
from aitbc_miner.supervisor.adoption import WorkerBook
from aitbc_miner.supervisor.children import Keeper, OneShots
from aitbc_miner.supervisor.job_index import JobIndex
from aitbc_miner.supervisor.loop import Supervisor
from aitbc_miner.supervisor.node_plan import SlotPlan
from aitbc_miner.supervisor.running_slot import Outcomes
from aitbc_miner.supervisor.slot_pool import SlotPool


class Recorder:
    """A child that reads when the test says."""

    def __init__(self) -> None:
        self.said: list[Any] = []
        self.channel = SimpleNamespace(has_unsent=False)

    def send(self, message: Any) -> None:
        self.said.append(message)


class Site:
    """As much of a supervisor as tells of slots, with two children."""

    def __init__(self, root: Path) -> None:
        unwanted: Any = lambda: pytest.fail("no child wanted")  # noqa: E731
        keepers: list[Keeper[Any]] = [
            Keeper(name, unwanted, FromAgent, [], pause_min=0.0, pause_max=0.0)
            for name in ("agent", "heartbeat")
        ]
        self.agent, self.heartbeat = Recorder(), Recorder()
        children: Any = (self.agent, self.heartbeat)
        for keeper, child in zip(keepers, children, strict=True):
            keeper.child = child
        node: Any = SimpleNamespace(book=WorkerBook(root / "workers.json"))
        self.slots = SlotPool(node, Outcomes(JobIndex(), keepers[0], keepers[1], OneShots()))
        self.plan = SlotPlan(SlotSpec("a", "cpu"), Offer("a", "cpu", 1, 1), None, unwanted, unwanted)
        self.api = SimpleNamespace(accepting=True)
        self.supervisor: Any = SimpleNamespace(
            _keepers=keepers,
            _api=self.api,
            _disk=SimpleNamespace(short=False),
            _shutdown=SimpleNamespace(mode=None),
            _slots=self.slots,
            _told=None,
        )

    def tell(self) -> None:
        Supervisor._tell(self.supervisor)


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


def test_both_are_told_of_each_change_once(site: Site) -> None:
    def change_slots() -> None:
        site.slots.lay_out([site.plan])

    def change_state() -> None:
        site.slots.slots["a"].rules = Slot("a", SlotState.QUARANTINED)

    def enqueue() -> None:
        site.slots.enqueue(Ticket("j1", "cli"))

    def drain() -> None:
        site.api.accepting = False

    def cancel() -> None:
        site.slots.cancel("j1", "cancel", "")
        site.agent.said.pop()  # that it is cancelled

    def stop() -> None:
        site.api.accepting = True
        site.supervisor._shutdown.mode = "drain"
        site.supervisor._disk.short = True

    site.tell()
    assert site.agent.said == site.heartbeat.said == [Slots([], [], accepting=True)]
    for number, change in enumerate([change_slots, change_state, enqueue, drain, cancel], 2):
        change()
        for _ in range(2):
            site.tell()
        assert [len(child.said) for child in (site.agent, site.heartbeat)] == [number, number], change
        assert site.agent.said[-1] == site.slots.view(accepting=site.api.accepting)
    stop()
    site.tell()
    assert not site.agent.said[-1].accepting


def test_one_that_does_not_read_is_told_only_the_latest(site: Site) -> None:
    site.heartbeat.channel.has_unsent = True
    for number in range(3):
        site.slots.enqueue(Ticket(f"j{number}", "cli"))
        site.tell()
    assert [len(said.queued) for said in site.agent.said] == [1, 2, 3]
    assert site.heartbeat.said == []
    site.heartbeat.channel.has_unsent = False
    site.tell()
    site.tell()
    assert [said.queued for said in site.heartbeat.said] == [["j0", "j1", "j2"]]
