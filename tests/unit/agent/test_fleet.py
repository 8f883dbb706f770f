"""A node in a fleet: one node has a job at a time, and one of them reports it."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from aitbc_miner.agent.fleet import GIVE_UP_S, Fleet, FleetFinds
from aitbc_miner.agent.fleet_watch import FleetWatch
from aitbc_miner.agent.job_table import Stage
from aitbc_miner.errors import ErrorCode
from aitbc_miner.ipc.messages import CancelJob, Deliveries
from aitbc_miner.jobs import Outcome, State, StateRecord
from aitbc_miner.queue.interface import Kind, QueueError, Task
from aitbc_miner.slots.placement import Offer
from aitbc_miner.store.database import Database
from aitbc_miner.store.records import Records
from tests.bench.agent_bench import FREE, NODE, OFFER, Desk, FlakyQueue
from tests.support.mute_coordinator import Stranger
from tests.support.pulled_jobs import pulled
from tests.support.stopped_clock import Time

LEASE_S = 60.0
TWICE: dict[str, Any] = {"retry": {"max_attempts": 2}}
GPU = Offer("gpu0", "gpu", 4, 4096, 8000, ("cli",))
FAILED = Outcome("j1", code=ErrorCode.E_NOGPU, message="no GPU here")


class Node:
    """A node of the fleet: its records and its part in the queue."""

    def __init__(self, name: str, directory: Path, queue: FlakyQueue) -> None:
        self.name = name
        self.queue = queue
        self.records = Records(directory / name)
        self.records.root.mkdir(exist_ok=True)
        self.fleet = Fleet(queue, name, LEASE_S, Stranger())

    def restarted(self) -> "Node":
        """Come back from the dead."""
        again = Node(self.name, self.records.root.parent, self.queue)
        found = {job_id: self.records.state_of(job_id) for job_id in self.records.ids()}
        states = {job_id: each for job_id, each in found.items() if isinstance(each, StateRecord)}
        again.fleet.recovered({job_id: each.lease for job_id, each in states.items() if each.lease})
        return again

    def pulls(self, job_id: str = "j1", **more: Any) -> None:
        self.records.create(job_id, pulled(job_id=job_id, **more).raw)

    def hold(self, job_id: str = "j1") -> bool:
        with self.records.open(job_id) as job:
            return self.fleet.hold(job, job.manifest())

    def state(self, job_id: str = "j1") -> StateRecord:
        with self.records.open(job_id) as job:
            return job.state()

    def is_ours(self, job_id: str = "j1") -> bool:
        return self.fleet.is_ours(self.state(job_id))

    def renew(self) -> list[str]:
        lost: list[str] = []
        self.fleet.renew(lost)
        return lost

    def hand_on(self, job_id: str = "j1", most: int = 5) -> bool:
        with self.records.open(job_id) as job:
            given = self.fleet.hand_on(job, FAILED, most)
            job.move(State.FAILED, delivery="handed_on")
        return given

    def seek(self, *offers: Offer) -> FleetFinds:
        seen = FleetFinds([], [])
        self.fleet.seek(self.records, list(offers or (OFFER,)), lambda _: False, seen)
        return seen


@pytest.fixture
def queue(tmp_path: Path, time: Time) -> FlakyQueue:
    return FlakyQueue(Database(tmp_path / "shared.db"))


@pytest.fixture
def a(tmp_path: Path, queue: FlakyQueue) -> Node:
    return Node(NODE, tmp_path, queue)


@pytest.fixture
def b(tmp_path: Path, queue: FlakyQueue) -> Node:
    return Node("node-b", tmp_path, queue)


# --- our hold ----------------------------------------------------------------------------------------------


def test_a_job_that_may_run_once_is_not_shared(a: Node, queue: FlakyQueue) -> None:
    a.pulls()
    assert a.hold()
    assert (a.state().lease, queue.calls, "j1" in a.fleet._tokens) == (None, [], False)
    assert a.is_ours()


def test_the_token_is_recorded_before_the_entry(
    a: Node, queue: FlakyQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    a.pulls(**TWICE)
    real, recorded = FlakyQueue.hold, list[str | None]()

    def looking(each: FlakyQueue, task: Task, token: str, lease_s: float) -> bool:
        recorded.append(a.state().lease)
        assert recorded[-1] == token
        return real(each, task, token, lease_s)

    monkeypatch.setattr(FlakyQueue, "hold", looking)
    assert a.hold()
    assert recorded == [a.state().lease]
    assert recorded != [None]
    assert queue.renew(Kind.RUN, "j1", str(recorded[0]), LEASE_S)


class Cut(BaseException):
    """The power is gone."""


@pytest.mark.parametrize("entered", [False, True])
def test_a_crash_between_token_and_entry_loses_no_job(
    a: Node, monkeypatch: pytest.MonkeyPatch, entered: bool
) -> None:
    a.pulls(**TWICE)
    real = FlakyQueue.hold

    def cut(each: FlakyQueue, task: Task, token: str, lease_s: float) -> bool:
        if entered:
            real(each, task, token, lease_s)
        raise Cut

    with monkeypatch.context() as patch:
        patch.setattr(FlakyQueue, "hold", cut)
        with pytest.raises(Cut):
            a.hold()
    token = a.state().lease
    again = a.restarted()
    assert again.hold()
    assert again.state().lease == token is not None
    assert again.is_ours()


def test_what_another_node_has_is_not_started(a: Node, b: Node) -> None:
    for node in (a, b):
        node.pulls(**TWICE)
    assert a.hold()
    assert not b.hold()
    assert (a.is_ours(), b.is_ours()) == (True, False)


def test_a_lease_is_kept_by_renewing_it(a: Node, b: Node, time: Time) -> None:
    a.pulls(**TWICE)
    assert a.hold()
    for _ in range(10):
        time.now += LEASE_S - 1
        assert a.renew() == []
        assert b.seek() == FleetFinds([], [])
    assert a.is_ours()


def test_a_lease_that_ran_out_but_was_not_taken_is_still_ours(a: Node, time: Time) -> None:
    a.pulls(**TWICE)
    assert a.hold()
    time.now += 10 * LEASE_S
    assert a.is_ours()
    assert a.renew() == []


def test_a_node_that_comes_back_from_the_dead_finds_that_it_has_lost(a: Node, b: Node, time: Time) -> None:
    a.pulls(**TWICE)
    assert a.hold()
    time.now += LEASE_S + 1
    assert b.seek() == FleetFinds(["j1"], [])
    state = b.state()
    assert (state.state, state.origin, state.attempt, state.started) == (State.PULLED, NODE, 2, True)
    assert b.hold()
    again = a.restarted()
    assert not again.is_ours()
    assert again.renew() == ["j1"]
    # Once is enough.
    assert again.renew() == []
    assert b.renew() == []
    assert b.is_ours()
    # And what it says when it is done does not take it from the other.
    again.fleet.done(again.state())
    assert b.is_ours()


def test_a_job_that_is_done_is_in_nobodys_way(a: Node, b: Node, time: Time, queue: FlakyQueue) -> None:
    a.pulls(**TWICE)
    a.hold()
    a.fleet.done(a.state())
    assert "j1" not in a.fleet._tokens
    time.now += 10 * LEASE_S
    assert (b.seek(), queue.dead(), a.renew()) == (FleetFinds([], []), [], [])


# --- the queue out of reach --------------------------------------------------------------------------------


def test_without_the_queue_a_job_goes_on_unshared(a: Node, b: Node, queue: FlakyQueue, time: Time) -> None:
    a.pulls(**TWICE)
    queue.down = True
    assert a.hold()
    assert (a.state().lease, "j1" in a.fleet._tokens) == (None, False)
    assert a.is_ours()
    queue.down = False
    assert a.renew() == []
    time.now += 10 * LEASE_S
    assert b.seek() == FleetFinds([], [])


def test_an_entry_whose_reply_was_lost_is_taken_out_again(
    a: Node, b: Node, queue: FlakyQueue, time: Time, monkeypatch: pytest.MonkeyPatch
) -> None:
    a.pulls(**TWICE)
    real = FlakyQueue.hold

    def unheard(each: FlakyQueue, task: Task, token: str, lease_s: float) -> bool:
        real(each, task, token, lease_s)
        raise QueueError("cannot reach the queue: timed out")

    with monkeypatch.context() as patch:
        patch.setattr(FlakyQueue, "hold", unheard)
        assert a.hold()
    assert a.state().lease is None
    assert a.renew() == []
    time.now += 10 * LEASE_S
    assert (b.seek(), queue.dead()) == (FleetFinds([], []), [])


def test_what_we_say_counts_as_long_as_the_lease_lasts(a: Node, queue: FlakyQueue, time: Time) -> None:
    a.pulls(**TWICE)
    a.hold()
    queue.down = True
    time.now += LEASE_S - 1
    assert a.is_ours()
    with pytest.raises(QueueError):
        a.renew()
    time.now += 2
    with pytest.raises(QueueError):
        a.is_ours()
    queue.down = False
    assert a.is_ours()
    # From here on, for another lease.
    queue.down = True
    time.now += LEASE_S - 1
    assert a.is_ours()


def test_after_a_restart_only_the_queue_can_say_whose_it_is(a: Node, queue: FlakyQueue) -> None:
    a.pulls(**TWICE)
    a.hold()
    again = a.restarted()
    queue.down = True
    with pytest.raises(QueueError):
        again.is_ours()
    queue.down = False
    assert again.is_ours()


def test_what_is_done_while_the_queue_is_away_is_taken_out_when_it_is_back(
    a: Node, b: Node, queue: FlakyQueue, time: Time
) -> None:
    a.pulls(**TWICE)
    a.hold()
    queue.down = True
    a.fleet.done(a.state())
    queue.down = False
    assert a.renew() == []
    time.now += 10 * LEASE_S
    assert (b.seek(), queue.dead()) == (FleetFinds([], []), [])


def test_a_job_that_is_known_to_be_lost_is_told_of_even_if_the_queue_fails_then(
    a: Node, b: Node, queue: FlakyQueue, time: Time, monkeypatch: pytest.MonkeyPatch
) -> None:
    for job_id in ("j1", "j2"):
        a.pulls(job_id, **TWICE)
        a.hold(job_id)
    time.now += LEASE_S + 1
    assert b.seek() == FleetFinds(["j1"], [])
    real = FlakyQueue.renew

    def only_first(each: FlakyQueue, kind: Kind, job_id: str, token: str, lease_s: float) -> bool:
        if job_id == "j2":
            raise QueueError("cannot reach the queue")
        return real(each, kind, job_id, token, lease_s)

    monkeypatch.setattr(FlakyQueue, "renew", only_first)
    lost: list[str] = []
    with pytest.raises(QueueError):
        a.fleet.renew(lost)
    assert lost == ["j1"]


# --- between nodes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("more", [{}, TWICE])
def test_what_one_cannot_do_another_takes_over(a: Node, b: Node, more: dict[str, Any]) -> None:
    a.pulls(requirements={"gpu": True}, **more)
    a.hold()
    assert a.hand_on()
    # Not those whose slots it does not fit either, and not the one it came from.
    assert b.seek(OFFER) == FleetFinds([], [])
    assert a.seek(GPU) == FleetFinds([], [])
    assert b.seek(OFFER, GPU) == FleetFinds(["j1"], [])
    state = b.state()
    assert (state.state, state.origin, state.attempt, state.started) == (State.PULLED, NODE, 2, False)
    with b.records.open("j1") as job:
        assert job.raw_manifest() == pulled(requirements={"gpu": True}, **more).raw
    assert b.hold()
    assert b.is_ours()
    assert a.seek(GPU) == b.seek(GPU) == FleetFinds([], [])


def test_one_slot_is_for_one_job(a: Node, b: Node) -> None:
    for number in range(3):
        a.pulls(f"j{number}")
        a.hand_on(f"j{number}")
    assert b.seek() == FleetFinds(["j0"], [])
    assert b.seek(OFFER, replace(OFFER, name="cpu1")) == FleetFinds(["j1", "j2"], [])


def test_what_was_here_before_is_not_taken_over(a: Node, b: Node) -> None:
    b.pulls()
    a.pulls()
    a.hand_on()
    assert b.seek() == FleetFinds([], [])
    seen = FleetFinds([], [])
    fresh = Node("node-c", b.records.root.parent, b.queue)
    # It was done there long ago, and only the books know of it.
    fresh.fleet.seek(fresh.records, [OFFER], lambda job_id: job_id == "j1", seen)
    assert seen == FleetFinds([], [])


def test_what_another_has_already_cannot_be_handed_on(a: Node, b: Node, time: Time) -> None:
    a.pulls(**TWICE)
    a.hold()
    time.now += LEASE_S + 1
    assert b.seek() == FleetFinds(["j1"], [])
    assert not a.hand_on()
    assert b.is_ours()


BAD: dict[str, bytes] = {
    "nothing": b"",
    "no JSON": b"{",
    "deep": b"[" * 50_000,
    "no handover": b"{}",
    "no manifest": json.dumps({"manifest": {}, "started": False}).encode(),
    "another job": json.dumps({"manifest": json.loads(pulled(job_id="j2").raw), "started": False}).encode(),
    "not UTF-8": b'{"manifest": "\xff", "started": false}',
}


@pytest.mark.parametrize("payload", BAD.values(), ids=BAD)
def test_what_is_no_job_is_left_alone_and_hides_no_other(
    a: Node, b: Node, queue: FlakyQueue, payload: bytes
) -> None:
    queue.put(Task(Kind.RUN, "j1", NODE, payload=payload), 0.0)
    a.pulls("j3")
    a.hand_on("j3")
    assert b.seek() == FleetFinds(["j3"], [])
    assert b.records.ids() == ["j3"]


@pytest.mark.parametrize("job_id", ["../x", "..", "a/b"])
def test_what_has_no_name_for_a_directory_touches_no_disk(b: Node, queue: FlakyQueue, job_id: str) -> None:
    raw = json.loads(pulled().raw)
    payload = json.dumps({"manifest": {**raw, "job_id": job_id}, "started": False}).encode()
    queue.put(Task(Kind.RUN, job_id, NODE, payload=payload), 0.0)
    before = sorted(b.records.root.parent.rglob("*"))
    assert b.seek() == FleetFinds([], [])
    assert sorted(b.records.root.parent.rglob("*")) == before


def test_what_cannot_be_recorded_is_left_to_the_next_node(
    a: Node, b: Node, time: Time, monkeypatch: pytest.MonkeyPatch
) -> None:
    a.pulls()
    a.hand_on()

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Records, "create", full)
        assert b.seek() == FleetFinds([], [])
    assert "j1" not in b.fleet._tokens
    time.now += LEASE_S / 2
    other = Node("node-c", b.records.root.parent, b.queue)
    assert other.seek() == FleetFinds(["j1"], [])


def test_what_was_taken_before_the_queue_fails_is_ours(
    a: Node, b: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    for job_id in ("j1", "j2"):
        a.pulls(job_id)
        a.hand_on(job_id)
    create = Records.create

    def and_then_it_is_away(each: Records, job_id: str, raw: bytes, **more: Any) -> None:
        create(each, job_id, raw, **more)
        b.queue.down = True

    monkeypatch.setattr(Records, "create", and_then_it_is_away)
    seen = FleetFinds([], [])
    with pytest.raises(QueueError):
        b.fleet.seek(b.records, [OFFER, OFFER], lambda _: False, seen)
    assert seen == FleetFinds(["j1"], [])


# --- what nobody takes -------------------------------------------------------------------------------------


def test_what_nobody_takes_comes_back_to_report(a: Node, b: Node, time: Time) -> None:
    a.pulls(requirements={"gpu": True})
    a.hand_on()
    assert a.seek() == FleetFinds([], [])
    time.now += GIVE_UP_S + 1
    assert b.seek() == FleetFinds([], [])
    assert a.seek() == FleetFinds([], ["j1"])
    assert a.is_ours()
    # Nobody gets it any more.
    assert b.seek(GPU) == FleetFinds([], [])


def test_a_record_that_is_gone_by_then_hides_no_other(
    a: Node, b: Node, time: Time, caplog: pytest.LogCaptureFixture
) -> None:
    for job_id in ("j1", "j2"):
        a.pulls(job_id, requirements={"gpu": True})
        a.hand_on(job_id)
    (a.records.root / "j1/state.json").write_bytes(b"{")
    time.now += GIVE_UP_S + 1
    assert a.seek() == FleetFinds([], ["j2"])
    assert [record.getMessage() for record in caplog.records] == ["cannot take job back"]
    # Whoever can do it still may.
    assert b.seek(GPU) == FleetFinds(["j1"], [])


# --- the watch ---------------------------------------------------------------------------------------------


class Watching(Desk):
    """A fleet watch, for a node with a free slot."""

    def __init__(self, directory: Path, fleet: Fleet) -> None:
        self.node = fleet
        super().__init__(directory)
        self.jobs.see(FREE)
        self.watch = FleetWatch(self.context, fleet, self.admission, self.delivery)
        self.lost: list[str] = []

    def make_fleet(self) -> Fleet:
        return self.node

    def ask(self) -> None:
        """Ask the queue, and wait for what comes of it."""
        self.watch.start_due()
        assert self.watch.next_due() is None
        self.turn_until(lambda: self.watch.next_due() is not None)
        self.told = self.said()
        self.lost += [each.job_id for each in self.told if isinstance(each, CancelJob)]


@pytest.fixture
def desk(tmp_path: Path, a: Node) -> Iterator[Watching]:
    made = Watching(tmp_path, a.fleet)
    made.register()
    yield made
    made.close()


def test_it_asks_often_enough_to_keep_its_leases(desk: Watching, time: Time) -> None:
    lease_s = desk.context.config.queue.lease_s
    for _ in range(3):
        desk.ask()
        due = desk.watch.next_due()
        assert due is not None
        assert time.now < due <= time.now + lease_s / 4
        desk.watch.start_due()
        assert desk.watch.next_due() == due
        time.now = due


def test_it_tells_what_is_lost_and_what_is_taken(desk: Watching, a: Node, b: Node, time: Time) -> None:
    a.pulls(**TWICE)
    a.hold()
    time.now += LEASE_S + 1
    b.seek()
    b.pulls("j2")
    b.hand_on("j2")
    desk.ask()
    assert (desk.lost, desk.among(Stage.RESUMING)) == (["j1"], ["j2"])
    assert desk.context.records.known("j2")


def test_it_takes_nothing_without_a_token(tmp_path: Path, a: Node, b: Node) -> None:
    desk = Watching(tmp_path, a.fleet)
    b.pulls("j2")
    b.hand_on("j2")
    desk.ask()
    assert desk.jobs.names() == []
    desk.close()


def test_it_says_once_that_the_queue_is_away_and_once_that_it_is_back(
    desk: Watching, queue: FlakyQueue, time: Time, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    queue.down = True
    for _ in range(3):
        desk.ask()
        due = desk.watch.next_due()
        assert due is not None
        time.now = due
    assert desk.context.queue_error == "cannot reach the queue: it is down; start it"
    queue.down = False
    desk.ask()
    assert not desk.context.queue_error
    assert Deliveries(0, None, 0) in desk.told
    said = [record.getMessage() for record in caplog.records if "fleet" in record.getMessage()]
    assert said == ["fleet queue failed", "fleet queue answers again"]


@pytest.mark.parametrize("error", [QueueError("cannot reach it"), ValueError("odd"), OSError(5, "I/O error")])
def test_what_was_found_before_an_error_is_dealt_with(
    desk: Watching, a: Node, b: Node, time: Time, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    a.pulls(**TWICE)
    a.hold()
    time.now += LEASE_S + 1
    b.seek()

    def fail(*_: object) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(FlakyQueue, "due", fail)
        desk.ask()
    assert (desk.lost, desk.context.queue_error) == (["j1"], str(error))
    time.now += LEASE_S
    desk.ask()
    assert desk.lost == ["j1"]
