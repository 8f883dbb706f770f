"""When the coordinator is asked for jobs, with which words, and what its answers change."""

from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from aitbc_miner.agent.pull import MAX_KNOWN, MAX_UNREPORTED, Puller
from aitbc_miner.agent.reconcile import Reconciler
from aitbc_miner.coordinator.interface import (
    Busy,
    CoordinatorError,
    Paced,
    PulledJob,
    Unauthorized,
    Unreachable,
)
from aitbc_miner.ipc.channel import ChannelError
from aitbc_miner.ipc.messages import Deliveries, TokenWanted
from aitbc_miner.slots.placement import Offer
from tests.bench.agent_bench import OFFER, Desk
from tests.support.pulled_jobs import pulled
from tests.support.stopped_clock import Time


class Pulling(Desk):
    """A puller whose room, known jobs and acceptance the test sets."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.room: list[Offer] = [OFFER]
        self.known: list[str] = []
        self.accepted: list[PulledJob] = []
        self.is_new: bool | Exception = True
        self.lost: list[bool] = []
        self.jobs.room = lambda: self.room  # type: ignore[method-assign]
        self.jobs.names = lambda: self.known  # type: ignore[method-assign]
        self.admission.accept = self.accept  # type: ignore[method-assign]
        reconciler = Reconciler(self.context, self.admission, self.delivery)
        reconciler.asked = True
        reconciler.hurry = lambda: self.lost.append(True)  # type: ignore[method-assign]
        self.puller = Puller(self.context, self.admission, reconciler)

    def accept(self, job: PulledJob) -> bool:
        self.accepted.append(job)
        if isinstance(self.is_new, Exception):
            raise self.is_new
        return self.is_new

    def pull(self) -> None:
        """Pull, and take in what comes of it."""
        before = len(self.coordinator.asked)
        self.puller.start_due()
        self.turn_until(lambda: len(self.coordinator.asked) > before and not self.puller._pulling)


@pytest.fixture
def desk(tmp_path: Path, time: Time) -> Iterator[Pulling]:
    made = Pulling(tmp_path)
    made.register()
    yield made
    made.close()


def test_one_job_follows_the_other_and_an_empty_hand_waits(desk: Pulling, time: Time) -> None:
    desk.coordinator.jobs = [pulled(job_id="a"), pulled(job_id="b")]
    for due in (time.now, time.now, time.now + desk.context.config.coordinator.poll_interval_s):
        desk.pull()
        assert desk.puller.next_due() == due
    assert [job.manifest and job.manifest.job_id for job in desk.accepted] == ["a", "b"]
    desk.puller.start_due()
    assert not desk.puller._pulling


def test_a_job_that_was_known_already_does_not_make_it_pull_without_a_pause(
    desk: Pulling, time: Time
) -> None:
    desk.coordinator.jobs, desk.is_new = [pulled()], False
    desk.pull()
    assert desk.puller.next_due() == time.now + desk.context.config.coordinator.poll_interval_s


def test_the_coordinator_is_told_what_is_free_and_what_is_here(desk: Pulling) -> None:
    desk.known = ["a", "b", *map(str, range(MAX_KNOWN))]
    desk.pull()
    (filters,) = desk.coordinator.asked
    assert filters.slots == [msgspec.to_builtins(OFFER)]
    assert filters.known[:3] == ["a", "b", "0"]
    assert len(filters.known) == MAX_KNOWN


def test_nothing_is_pulled_without_room_or_token_or_while_one_pull_is_under_way(
    desk: Pulling, tmp_path: Path
) -> None:
    desk.puller.start_due()
    assert desk.puller.next_due() is None
    desk.puller.start_due()
    desk.turn_until(lambda: not desk.puller._pulling)
    assert len(desk.coordinator.asked) == 1
    desk.room = []
    desk.puller.hurry()
    assert desk.puller.next_due() is None
    (tmp_path / "b").mkdir()
    other = Pulling(tmp_path / "b")
    other.puller.start_due()
    assert (other.puller.next_due(), other.puller._pulling) == (None, False)
    other.close()


def test_nothing_is_pulled_as_long_as_jobs_cannot_be_taken_in(desk: Pulling, time: Time) -> None:
    desk.admission.troubled_until = time.now + 30
    assert desk.puller.next_due() == time.now + 30
    # Not even when a new token has come.
    desk.puller.hurry()
    desk.puller.start_due()
    assert not desk.puller._pulling
    time.now += 30
    desk.pull()


def test_failures_wait_ever_longer_and_as_long_as_asked(desk: Pulling, time: Time) -> None:
    pauses = []
    for _ in range(12):
        desk.coordinator.answers["pull"] = [CoordinatorError("cannot pull: 500")]
        desk.pull()
        due = desk.puller.next_due()
        assert due is not None
        pauses.append(due - time.now)
        time.now = due
    assert pauses[0] <= 2 * desk.context.config.coordinator.poll_interval_s
    assert max(pauses) > 4 * desk.context.config.coordinator.poll_interval_s
    assert desk.context.error == "cannot pull: 500"
    desk.coordinator.answers["pull"] = [Busy("cannot pull: 503", 777.0)]
    desk.pull()
    assert desk.puller.next_due() == time.now + 777.0
    time.now += 777.0
    desk.said()
    desk.pull()
    assert Deliveries(0, None) in desk.said()
    desk.coordinator.answers["pull"] = [CoordinatorError("cannot pull: 500")]
    time.now += 10
    desk.pull()
    # It had worked in between.
    assert (desk.puller.next_due() or 0) - time.now <= 2 * desk.context.config.coordinator.poll_interval_s


def test_a_refused_token_is_asked_for_anew(desk: Pulling) -> None:
    desk.coordinator.answers["pull"] = [Unauthorized("cannot pull: 401")]
    desk.pull()
    assert [type(each) for each in desk.heartbeat.receive()] == [TokenWanted]


def test_a_job_that_cannot_be_accepted_ends_nothing_but_a_lost_supervisor_does(desk: Pulling) -> None:
    desk.coordinator.jobs, desk.is_new = [pulled()], OSError(28, "No space left on device")
    desk.pull()
    assert desk.context.error == "[Errno 28] No space left on device"
    desk.coordinator.jobs, desk.is_new = [pulled()], ChannelError("cannot send: Broken pipe")
    desk.puller.hurry()
    with pytest.raises(ChannelError):
        desk.pull()


# --- the pace ----------------------------------------------------------------------------------------------


def test_pauses_grow_while_there_is_nothing_as_far_as_the_coordinator_wants(
    desk: Pulling, time: Time
) -> None:
    desk.coordinator.slowest = 4.0
    pauses = []
    for _ in range(8):
        time.now = desk.puller.next_due() or 0.0
        desk.pull()
        pauses.append((desk.puller.next_due() or 0.0) - time.now)
    every = desk.context.config.coordinator.poll_interval_s
    assert pauses[0] == pytest.approx(every)
    assert pauses == sorted(pauses)
    assert pauses[-1] == pytest.approx(4.0 * every)
    assert desk.puller.idle_since is not None
    desk.puller.hurry()
    assert desk.puller.next_due() == time.now


def test_after_thousands_of_empty_answers_it_asks_on(desk: Pulling, time: Time) -> None:
    # 1.5 to the power of 1,751 is no float any more.
    for _ in range(2000):
        time.now = desk.puller.next_due() or 0.0
        desk.pull()
    every = desk.context.config.coordinator.poll_interval_s * desk.coordinator.slowest
    assert (desk.puller.next_due() or 0.0) - time.now == pytest.approx(every)


def test_what_is_held_back_by_ourselves_is_no_failure(desk: Pulling, time: Time) -> None:
    desk.coordinator.answers["pull"] = [Paced("slowly", 5.0)]
    desk.pull()
    assert desk.puller.next_due() == time.now + 5.0
    assert desk.context.error is None


def test_a_lost_reply_may_have_brought_a_job(desk: Pulling, time: Time) -> None:
    desk.coordinator.answers["pull"] = [Unreachable("lost"), CoordinatorError("500")]
    desk.pull()
    assert desk.lost == [True]
    time.now = desk.puller.next_due() or 0.0
    desk.pull()
    assert desk.lost == [True]


def test_nothing_is_pulled_before_the_list_of_our_jobs_was_asked_for(desk: Pulling, time: Time) -> None:
    desk.puller._reconciler.asked = False
    assert (desk.puller.next_due() or 0.0) > time.now
    desk.puller._reconciler.asked = True
    assert desk.puller.next_due() == 0.0
    desk.context.homeless = "its disk is not there"
    assert (desk.puller.next_due() or 0.0) > time.now


def test_the_end_of_a_job_and_the_end_of_its_report_let_it_pull_at_once(desk: Pulling, time: Time) -> None:
    desk.pull()
    for _ in range(2):
        assert (desk.puller.next_due() or 0.0) > time.now
        desk.jobs.ends += 1
        assert desk.puller.next_due() == time.now
        desk.pull()


def test_with_too_many_results_waiting_no_more_work_is_begun(desk: Pulling) -> None:
    desk.context.pending = MAX_UNREPORTED
    assert desk.puller.next_due() is None
    desk.context.pending -= 1
    assert desk.puller.next_due() is not None


@pytest.mark.parametrize("error", [Busy("busy", 9.0), Paced("slowly", 9.0)], ids=repr)
def test_nothing_shortens_the_time_for_which_the_coordinator_asks(
    error: Exception, desk: Pulling, time: Time
) -> None:
    desk.coordinator.answers["pull"] = [error]
    desk.pull()
    desk.puller.hurry()
    assert desk.puller.next_due() == time.now + 9.0
