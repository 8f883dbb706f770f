"""The agent's table of jobs: what may follow what, and who has which jobs."""

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from msgspec.structs import replace

from aitbc_miner.agent.job_table import MOVES, JobTable, Stage
from aitbc_miner.errors import IllegalMove
from aitbc_miner.ipc.messages import Slots, SlotView
from aitbc_miner.slots.placement import Ticket
from aitbc_miner.slots.state import SlotState
from tests.bench.agent_bench import OFFER, in_slot
from tests.support.stopped_clock import Time

WAY = (Stage.ADMITTING, Stage.READY, Stage.RUNNING, Stage.SETTLING, Stage.ENDED, Stage.REPORTING)


@pytest.fixture
def table() -> JobTable:
    return JobTable(15.0)


def moved(table: JobTable, job_id: str, *stages: Stage) -> None:
    for stage in stages:
        table.move(job_id, stage)


def free(*names: str) -> Slots:
    views = [SlotView(replace(OFFER, name=name), SlotState.IDLE, free=True) for name in names]
    return Slots(views, [], accepting=True)


def test_every_stage_is_reached_and_left() -> None:
    assert MOVES.keys() == set(Stage)
    assert set().union(*MOVES.values()) == set(Stage)
    for start in Stage:
        seen, waiting = {start}, [start]
        while waiting:
            further = MOVES[waiting.pop()] - seen
            seen |= further
            waiting += further
        assert Stage.GONE in seen, f"a job could stay for ever after {start}"


def test_only_the_supervisor_or_a_record_says_that_a_job_has_ended() -> None:
    assert {stage for stage in Stage if Stage.REPORTING in MOVES[stage]} == {
        *(Stage.UNREAD, Stage.ENDED, Stage.HANDING_ON),
        *(Stage.RUNNING, Stage.GONE),
    }


def test_a_job_enters_goes_its_way_and_leaves(table: JobTable) -> None:
    for stage in WAY:
        assert table.move("j1", stage).stage is stage
        assert (table.stage("j1"), "j1" in table) == (stage, True)
        assert [entry.job_id for entry in table.among(stage)] == ["j1"]
    assert table.move("j1", Stage.GONE).ended_here
    assert (table.get("j1"), table.stage("j1"), table.names()) == (None, Stage.GONE, [])
    # It may come again, and then nothing of before counts.
    assert not table.move("j1", Stage.REPORTING).ended_here


def test_an_illegal_move_changes_nothing(table: JobTable) -> None:
    moved(table, "j1", Stage.ADMITTING, Stage.READY)
    with pytest.raises(IllegalMove, match="job j1: READY -> REPORTING"):
        table.move("j1", Stage.REPORTING)
    with pytest.raises(IllegalMove, match="job j2: GONE -> READY"):
        table.move("j2", Stage.READY)
    assert (table.stage("j1"), table.names()) == (Stage.READY, ["j1"])


def test_ours_is_what_is_acknowledged_and_not_reported(
    table: JobTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    time = Time(monkeypatch)
    table.acknowledge("nobody")
    moved(table, "j1", Stage.ADMITTING)
    assert table.ours() == set()
    table.acknowledge("j1")
    assert table.ours() == {"j1"}
    entry = table.get("j1")
    assert entry is not None
    assert entry.progress is not None
    assert entry.progress.due == time.now + 15.0
    entry.progress.pct = 50.0
    table.acknowledge("j1")
    assert entry.progress.pct == 50.0
    moved(table, "j1", *WAY[1:])
    table.acknowledge("j1")
    assert (table.ours(), table.undone()) == (set(), 0)
    # It may be ours: nobody could read its record yet.
    table.move("j2", Stage.UNREAD)
    assert (table.ours(), table.undone()) == ({"j2"}, 1)


def test_what_is_to_be_done_is_named_before_what_is_to_be_told(table: JobTable) -> None:
    for job_id in ("old", "new"):
        table.move(job_id, Stage.REPORTING)
    table.move("runs", Stage.RUNNING)
    assert table.names() == ["runs", "new", "old"]


def test_a_job_that_is_taken_in_takes_a_place(table: JobTable) -> None:
    assert table.room() == []
    table.see(free("a", "b"))
    assert [offer.name for offer in table.room()] == ["a", "b"]
    table.move("j1", Stage.ADMITTING)
    assert len(table.room()) == 1
    table.move("j1", Stage.READY).ticket = Ticket("j1", "cli")
    assert [offer.name for offer in table.room()] == ["b"]
    table.see(in_slot("j1"))
    assert (table.stage("j1"), table.ours(), table.room()) == (Stage.RUNNING, {"j1"}, [])
    table.see(replace(free("a"), accepting=False))
    assert table.room() == []


@pytest.mark.parametrize("stage", [Stage.UNREAD, Stage.RETRY_WAIT, Stage.ENDED, Stage.REPORTING])
def test_what_the_supervisor_last_showed_may_be_older_than_what_is_known(
    table: JobTable, stage: Stage
) -> None:
    table.move("j1", stage)
    table.see(in_slot("j1"))
    assert (table.stage("j1"), table.in_slots()) == (stage, {"j1"})


def test_who_has_come_is_noted_while_somebody_asks(table: JobTable) -> None:
    table.move("before", Stage.ADMITTING)
    table.came = set(table.names())
    moved(table, "done", Stage.REPORTING, Stage.GONE)
    table.move("before", Stage.READY)
    assert table.came == {"before", "done"}


class Life(RuleBasedStateMachine):
    """Moves jobs by chance, and sees slots: the table never says two things of one job."""

    def __init__(self) -> None:
        super().__init__()
        self.table = JobTable(15.0)
        self.stages: dict[str, Stage] = {}

    @rule(job_id=st.sampled_from("abc"), to=st.sampled_from(Stage), ours=st.booleans())
    def move(self, job_id: str, to: Stage, ours: bool) -> None:
        before = self.stages.get(job_id, Stage.GONE)
        if to in MOVES[before]:
            self.table.move(job_id, to)
            self.stages[job_id] = to
        else:
            with pytest.raises(IllegalMove):
                self.table.move(job_id, to)
        if ours:
            self.table.acknowledge(job_id)

    @rule(job_id=st.sampled_from("abc"))
    def see(self, job_id: str) -> None:
        self.table.see(in_slot(job_id))
        self.stages[job_id] = self.table.stage(job_id)

    @invariant()
    def each_job_stands_in_one_place(self) -> None:
        there = {job_id: stage for job_id, stage in self.stages.items() if stage is not Stage.GONE}
        assert sorted(self.table.names()) == sorted(there)
        for stage in Stage:
            named = {entry.job_id for entry in self.table.among(stage)}
            assert named == {job_id for job_id, each in there.items() if each is stage}
        told = {job_id for job_id, stage in there.items() if stage in {Stage.HANDING_ON, Stage.REPORTING}}
        assert self.table.undone() == len(there) - len(told)
        assert not self.table.ours() & told


TestLife = Life.TestCase
