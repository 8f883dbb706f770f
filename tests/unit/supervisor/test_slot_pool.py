"""The slots together: layouts, jobs that wait, what is found of an earlier run; no process is started."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from aitbc_miner.errors import ErrorCode
from aitbc_miner.ipc.channel import MAX_WAITING, ExcessError
from aitbc_miner.ipc.messages import CancelJob, FoundJob, JobSettled, JobUpdate
from aitbc_miner.jobs import Requirements, State
from aitbc_miner.slots.placement import Ticket, make_offer
from aitbc_miner.slots.spec import SlotSpec
from aitbc_miner.slots.state import Assign, Ended, Slot, SlotState
from aitbc_miner.supervisor.adoption import WorkerBook
from aitbc_miner.supervisor.children import OneShots
from aitbc_miner.supervisor.job_index import JobIndex
from aitbc_miner.supervisor.node_plan import SlotPlan
from aitbc_miner.supervisor.running_slot import Outcomes
from aitbc_miner.supervisor.slot_pool import SlotPool

GIB = 1 << 30


def plan(name: str, memory_max: int = GIB, problem: str | None = None, **keys: Any) -> SlotPlan:
    spec = SlotSpec(name=name, kind="cpu", memory_max=memory_max, **keys)
    offer = make_offer(spec, threads=4, memory_bytes=8 * GIB, vram_mb=0)
    unwanted: Any = lambda: pytest.fail("no child wanted")  # noqa: E731
    return SlotPlan(spec, offer, None, unwanted, unwanted, {}, problem)


class Site:
    """A pool of slots, and what its agent was told."""

    def __init__(self, root: Path) -> None:
        self.said: list[Any] = []
        agent: Any = SimpleNamespace(send=self.said.append)
        node: Any = SimpleNamespace(book=WorkerBook(root / "workers.json"), plan_stray=plan)
        self.slots = SlotPool(node, Outcomes(JobIndex(), agent, agent, OneShots()))

    @property
    def settled(self) -> list[str]:
        return [said.job_id for said in self.said if isinstance(said, JobSettled)]

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
    site.slots.enqueue(ticket("waits", 3000))
    site.slots.place()
    assert (list(site.slots.queue), site.said) == (["waits"], [])
    # The only slot that is large enough is to go, so nothing but its present job will ever run there.
    assert str(site.slots.lay_out([plan("small")])) == "will be removed after the running job: large"
    site.slots.refuse_hopeless()
    (told,) = site.said
    assert (told.job_id, told.code) == ("waits", ErrorCode.E_NOSLOT)
    assert not site.slots.queue
    site.slots.feed(Ended("first"))
    assert site.settled == ["waits", "first"]


def test_a_slot_that_cannot_be_used_offers_nothing(site: Site) -> None:
    site.ready(plan("good"), plan("bad", 4 * GIB, "no user aitbc-job-bad"))
    assert [slot.view().offers for slot in site.slots] == [True, False]
    site.slots.enqueue(ticket("waits", 3000))
    site.slots.place()
    assert site.settled == ["waits"]


def test_a_job_of_an_unknown_worker_is_settled(site: Site) -> None:
    site.slots.lay_out([plan("a")])
    job = FoundJob("j1", State.RUNNING, "a", 1, 1)
    site.slots.take_up(job)
    assert site.settled == ["j1"]
    assert site.slots.of("j1") is None, "nothing to adopt"


def test_processes_of_old_slots_are_ended_once_after_all_jobs_were_taken_up(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[str] = []
    monkeypatch.setattr(Outcomes, "aside", lambda _self, name, *_: begun.append(name))
    node: Any = site.slots._node
    node.layout, node.end_others, node.plan = None, list, lambda *_: [plan("a", problem="no GPU")]
    broken: Any = object()
    with pytest.raises(AttributeError):
        site.slots.begin([], [broken])
    assert begun == [], "the next agent names the jobs again"
    site.slots.begin([], [])
    site.slots.begin([], [])
    assert begun == ["old slots"]


def test_only_a_job_that_is_on_its_way_can_be_cancelled(site: Site) -> None:
    site.ready(plan("a"))
    site.slots.slots["a"].feed(Assign("runs"))
    site.slots.enqueue(ticket("waits", 1))
    site.slots._outcomes.index.update(JobUpdate("comes", State.ACKED))
    site.slots._outcomes.index.update(JobUpdate("over", State.UPLOADING))
    assert [site.slots.cancel(job, "cancel", "") for job in ("runs", "waits", "comes", "over", "none")] == [
        *(True, True, True),
        *(False, False),
    ]
    assert site.slots.slots["a"].rules.state is SlotState.CANCELLING
    assert site.said == [CancelJob("waits", "cancel"), CancelJob("comes", "cancel")]
    assert not site.slots.queue


def test_too_many_jobs_that_wait_are_an_excess(site: Site) -> None:
    for n in range(MAX_WAITING):
        site.slots.enqueue(ticket(f"j{n}", 1))
    with pytest.raises(ExcessError, match="more than 5000 jobs for a slot"):
        site.slots.enqueue(ticket("one-more", 1))
