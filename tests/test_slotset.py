"""The slots together: layouts, jobs that wait, what is found of an earlier run; no process is started."""

from pathlib import Path
from typing import Any

import pytest

from aitbc_miner.errors import ErrorCode
from aitbc_miner.ipc.channel import MAX_WAITING, ExcessError
from aitbc_miner.ipc.messages import FoundJob
from aitbc_miner.jobs import Requirements, State
from aitbc_miner.slots.placement import Ticket, make_offer
from aitbc_miner.slots.spec import SlotSpec
from aitbc_miner.slots.state import Assign, Ended, Slot, SlotState
from aitbc_miner.supervisor.adoption import WorkerBook
from aitbc_miner.supervisor.running_slot import Outcomes, SlotPlan
from aitbc_miner.supervisor.slot_pool import SlotSet

GIB = 1 << 30


def nothing(*_: object) -> None:
    return


def plan(name: str, memory_max: int = GIB, problem: str | None = None, **keys: Any) -> SlotPlan:
    spec = SlotSpec(name=name, kind="cpu", memory_max=memory_max, **keys)
    offer = make_offer(spec, threads=4, memory_bytes=8 * GIB, vram_mb=0)
    return SlotPlan(spec, offer, None, lambda: pytest.fail("no worker wanted"), nothing, {}, problem)


class Site:
    """A set of slots, and what it has settled."""

    def __init__(self, root: Path) -> None:
        self.settled: list[str] = []
        outcomes = Outcomes(lambda job, _: self.settled.append(job), nothing, nothing, nothing, nothing)
        self.slots = SlotSet(WorkerBook(root / "workers.json"), plan, outcomes)

    def ready(self, *plans: SlotPlan) -> None:
        """Have slots as if their workers were there."""
        self.slots.lay_out(plans)
        for slot in self.slots:
            slot.rules = Slot(slot.name, SlotState.IDLE)


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


def ticket(job_id: str, memory_mb: int) -> Ticket:
    return Ticket(job_id, "cli", Requirements(memory_mb=memory_mb))


def test_a_layout_says_what_it_changes(site: Site) -> None:
    assert str(site.slots.lay_out([plan("a"), plan("b")])) == "added: a, b"
    assert str(site.slots.lay_out([plan("a"), plan("b")])) == "no change"
    changes = site.slots.lay_out([plan("a", pids_max=5), plan("c")])
    assert changes.said == {"changed": ["a"], "added": ["c"], "removed": ["b"]}
    site.slots.tick()
    assert list(site.slots.slots) == ["a", "c"]


def test_a_waiting_job_that_no_slot_can_ever_take_is_given_back(site: Site) -> None:
    site.ready(plan("small"), plan("large", 4 * GIB))
    site.slots.slots["large"].feed(Assign("first"))
    assert site.slots.enqueue(ticket("waits", 3000))
    site.slots.place()
    assert site.slots.refuse_hopeless() == []
    # The only slot that is large enough is to go, so nothing but its present job will ever run there.
    assert str(site.slots.lay_out([plan("small")])) == "removed after its job: large"
    ((job_id, error),) = site.slots.refuse_hopeless()
    assert (job_id, error.code) == ("waits", ErrorCode.E_NOSLOT)
    assert not site.slots.queue
    site.slots.feed(Ended("first"))
    assert site.settled == ["first"]


def test_a_slot_that_cannot_be_used_offers_nothing(site: Site) -> None:
    site.ready(plan("good"), plan("bad", 4 * GIB, "no user aitbc-job-bad"))
    assert [slot.view().offers for slot in site.slots] == [True, False]
    assert site.slots.enqueue(ticket("waits", 3000))
    assert [job for job, _ in site.slots.refuse_hopeless()] == ["waits"]


def test_a_job_of_an_unknown_worker_is_settled(site: Site) -> None:
    site.slots.lay_out([plan("a")])
    job = FoundJob("j1", State.RUNNING, "a", 1, 1)
    site.slots.take_up(job, lambda *_: pytest.fail("nothing to adopt"))
    assert site.settled == ["j1"]


def test_too_many_jobs_that_wait_are_an_excess(site: Site) -> None:
    for n in range(MAX_WAITING):
        site.slots.enqueue(ticket(f"j{n}", 1))
    with pytest.raises(ExcessError, match="5000 jobs wait"):
        site.slots.enqueue(ticket("one-more", 1))
