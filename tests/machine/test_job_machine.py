"""Random histories of one job on a real disk: steps, attempts, reports, and crashes in between."""

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from aitbc_miner.agent.delivery import deliver
from aitbc_miner.agent.outcomes import REFUSED, settle, take_back_refused
from aitbc_miner.agent.recovery import Found, recover
from aitbc_miner.agent.retry_policy import Where, next_attempt
from aitbc_miner.config.settings import GiveUp
from aitbc_miner.coordinator.interface import CoordinatorError, Gone, Refused, Told
from aitbc_miner.errors import ErrorCode
from aitbc_miner.ipc.messages import CancelJob, JobSettled
from aitbc_miner.jobs import FINAL, MOVES, Outcome, RetryPolicy, State, StateRecord
from aitbc_miner.store.records import JobDir, RecordError, Records
from tests.support.mute_coordinator import MuteCoordinator
from tests.support.power_cut import cut_after

S = State
MOST = 3
STARTABLE = (S.ACKED, S.RETRY_WAIT)
E = ErrorCode
IN_SLOT = {S.PREP, S.RUNNING, S.COLLECTING}
CODES = st.sampled_from([None, E.E_LOST, E.E_EXIT, E.E_INTERNAL, E.E_CANCELLED])
POLICIES = st.builds(
    RetryPolicy, st.integers(1, 3), st.lists(st.sampled_from([E.E_LOST, E.E_EXIT]), max_size=2)
)
# Instead of which of the fsyncs and renames the power is cut.
CUTS = st.sampled_from([None, None, None, None, 0, 1, 2, 3, 4, 5])


class Answering(MuteCoordinator):
    """Takes each report once; `answer` is raised before, `lost` when the report has been taken."""

    def __init__(self) -> None:
        self.answer: Exception | None = None
        self.lost = False
        self.taken: dict[str, Outcome] = {}

    def _take(self, key: str, outcome: Outcome) -> None:
        if self.answer is not None:
            raise self.answer
        self.taken.setdefault(key, outcome)
        if self.lost:
            raise CoordinatorError("cannot report: the reply was lost")

    def result(self, job_id: str, outcome: Outcome, root: Path, key: str, *, again: bool = False) -> Told:
        self._take(key, outcome)
        return Told()

    def fail(self, job_id: str, outcome: Outcome, key: str, *, again: bool = False) -> Told:
        self._take(key, outcome)
        return Told()


class JobMachine(RuleBasedStateMachine):
    """One job, as the agent and the workers drive it; `starts` counts how often its program was."""

    def __init__(self) -> None:
        super().__init__()
        self.records = Records(Path(tempfile.mkdtemp(prefix="job-machine-")))
        self.coordinator = Answering()
        self.policy = RetryPolicy()
        self.starts = 0
        self.begun_by_attempt: set[int] = set()
        self.last: StateRecord | None = None

    def teardown(self) -> None:
        shutil.rmtree(self.records.root)

    @initialize(policy=POLICIES, steps=st.integers(0, 3))
    def pulled(self, policy: RetryPolicy, steps: int) -> None:
        self.policy = policy
        raw = {"job_id": "j1", "runner": "cli", "command": "x", "retry": msgspec.to_builtins(policy)}
        self.records.create("j1", msgspec.json.encode(raw))
        self.last = self.state
        # Most histories are short, and most of what may go wrong comes late.
        for step in (self.acknowledge, self.prepare, self.start)[:steps]:
            step(cut=None)

    @property
    def state(self) -> StateRecord:
        with self.records.open("j1") as job:
            return job.state()

    def perhaps_cut(self, cut: int | None, act: Callable[[], object]) -> None:
        """Do something, and cut the power instead of the given one of its fsyncs and renames."""
        if cut is None:
            act()
            return
        if cut_after(cut, act):
            self.restart()

    # --- steps ---------------------------------------------------------------------------------------------

    @precondition(lambda self: self.state.state is S.PULLED and not self.has_outcome())
    @rule(cut=CUTS)
    def acknowledge(self, cut: int | None) -> None:
        """The coordinator has let us have the job."""
        self.perhaps_cut(cut, lambda: self.move(S.ACKED))

    @precondition(lambda self: self.state.state is S.RUNNING and not self.has_outcome())
    @rule(cut=CUTS)
    def collect(self, cut: int | None) -> None:
        """The program has ended."""
        self.perhaps_cut(cut, lambda: self.move(S.COLLECTING))

    @precondition(lambda self: self.state.state in STARTABLE and not self.has_outcome())
    @rule(cut=CUTS)
    def prepare(self, cut: int | None) -> None:
        """A worker begins with the job."""
        self.perhaps_cut(cut, lambda: self.move(S.PREP))

    @precondition(lambda self: self.state.state is S.PREP and not self.has_outcome())
    @rule(cut=CUTS)
    def start(self, cut: int | None) -> None:
        """The worker records that the program starts, and starts it."""

        def act() -> None:
            self.move(S.RUNNING, started=True)
            self.starts += 1
            assert self.state.attempt not in self.begun_by_attempt, "two starts in one attempt"
            self.begun_by_attempt.add(self.state.attempt)

        self.perhaps_cut(cut, act)

    def move(self, to: State, **changes: object) -> None:
        with self.records.open("j1") as job:
            job.move(to, **changes)

    def has_outcome(self) -> bool:
        with self.records.open("j1") as job:
            return job.has_outcome()

    # --- the end of an attempt -----------------------------------------------------------------------------

    @precondition(lambda self: self.state.state in IN_SLOT and not self.has_outcome())
    @rule(code=CODES, cut=CUTS)
    def conclude(self, code: ErrorCode | None, cut: int | None) -> None:
        """The worker writes what came of it."""

        def act() -> None:
            with self.records.open("j1") as job:
                job.write_outcome(Outcome("j1", attempt=job.state().attempt, code=code))

        self.perhaps_cut(cut, act)

    @precondition(lambda self: self.state.state in IN_SLOT | set(STARTABLE))
    @rule(by_operator=st.booleans(), cut=CUTS)
    def nobody_works_on_it(self, by_operator: bool, cut: int | None) -> None:
        said = CancelJob("j1", "cancel", "an operator") if by_operator else JobSettled("j1", "it died")
        self.perhaps_cut(cut, lambda: settle(self.records, said))

    @precondition(lambda self: self.state.state not in FINAL | {S.UPLOADING} and self.has_outcome())
    @rule(cut=CUTS)
    def decide(self, cut: int | None) -> None:
        """The agent tries again if it may, and else begins to report."""

        def act() -> None:
            with self.records.open("j1") as job:
                self.decide_about(job)

        self.perhaps_cut(cut, act)

    def decide_about(self, job: JobDir) -> None:
        outcome, state = job.outcome(), job.state()
        assert outcome is not None
        where = next_attempt(
            outcome.code,
            started=state.started,
            attempt=state.attempt,
            policy=job.manifest().retry,
            most=MOST,
            shared=False,
        )
        if where is Where.HERE and S.RETRY_WAIT in MOVES[state.state]:
            assert job.try_again().attempt == state.attempt + 1
            assert not job.has_outcome()
        else:
            job.move(S.UPLOADING)

    # --- reports -------------------------------------------------------------------------------------------

    @precondition(lambda self: self.state.state is S.UPLOADING)
    @rule(
        answer=st.sampled_from([None, CoordinatorError("500"), Gone("409", 409), Refused("413", 413)]),
        lost=st.booleans(),
        cut=CUTS,
    )
    def report(self, answer: Exception | None, lost: bool, cut: int | None) -> None:
        self.coordinator.answer, self.coordinator.lost = answer, lost

        def act() -> None:
            try:
                give_up = GiveUp(refusals=2, over_s=0.0)
                deliver(self.records, self.coordinator, "node", "j1", give_up=give_up)
            except CoordinatorError:
                assert self.state.state is S.UPLOADING

        self.perhaps_cut(cut, act)

    @precondition(lambda self: self.state.delivery == "refused")
    @rule(cut=CUTS)
    def send_once_more(self, cut: int | None) -> None:
        def act() -> None:
            with self.records.open("j1") as job:
                assert take_back_refused(job)

        self.perhaps_cut(cut, act)

    # --- restarts ------------------------------------------------------------------------------------------

    @rule()
    def restart(self) -> None:
        before = self.state
        found = recover(self.records)
        assert found.broken == 0
        assert self.state == before
        self.check_place(found)

    def check_place(self, found: Found) -> None:
        state = self.state
        lists = {
            "finished": found.finished,
            "to_deliver": found.to_deliver,
            "ended": found.ended,
            "to_resume": found.to_resume,
            "to_retry": found.to_retry,
            "started": [each.job_id for each in found.started],
        }
        (place,) = [name for name, ids in lists.items() if ids]
        assert lists[place] == ["j1"]
        if state.state in FINAL:
            assert place == "finished"
        elif state.state is S.UPLOADING:
            assert place == "to_deliver"
        else:
            assert (place == "ended") == self.has_outcome()
        if place in {"to_resume", "to_retry"}:
            self.check_startable(state)
        # Nothing of an earlier attempt is in the way of this one.
        with self.records.open("j1") as job:
            outcome = job.outcome()
        assert outcome is None or outcome.attempt == state.attempt

    # --- what always holds ---------------------------------------------------------------------------------

    @invariant()
    def no_illegal_step_is_taken(self) -> None:
        if self.last is None:
            return
        before = self.state
        for to in set(State) - MOVES[before.state]:
            with pytest.raises(RecordError, match="not a legal step"):
                self.move(to)
        assert self.state == before

    @invariant()
    def only_legal_steps_are_recorded(self) -> None:
        if self.last is None:
            return
        state = self.state
        # Within one rule there may be up to three steps; each of them is in the table.
        assert state.state in reachable(self.last.state, 3) | {self.last.state}
        assert state.attempt >= self.last.attempt
        assert state.started >= self.last.started
        self.last = state

    @invariant()
    def it_is_started_no_more_often_than_it_may_be(self) -> None:
        assert self.starts <= self.policy.max_attempts
        assert self.last is None or self.starts == 0 or self.state.started

    def check_startable(self, state: StateRecord) -> None:
        assert not state.started or self.policy.max_attempts > 1
        assert not state.started or self.starts < self.policy.max_attempts

    @invariant()
    def what_was_started_does_not_wait_without_a_policy(self) -> None:
        if self.last is not None and self.state.state in STARTABLE:
            self.check_startable(self.state)

    @invariant()
    def a_job_that_is_over_has_one_report(self) -> None:
        # A result that was refused is said to have failed: under another key, and only then.
        kinds = {key.split(":")[0] for key in self.coordinator.taken}
        assert len(kinds) < 2 or (self.records.root / "j1" / REFUSED).exists() or self.was_refused

    @property
    def was_refused(self) -> bool:
        return any(outcome.code is ErrorCode.E_UPLOAD for outcome in self.coordinator.taken.values())


def reachable(state: State, steps: int) -> frozenset[State]:
    if steps == 0:
        return frozenset()
    return MOVES[state].union(*(reachable(to, steps - 1) for to in MOVES[state]))


TestJobMachine = JobMachine.TestCase
TestJobMachine.settings = settings(
    max_examples=100, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
)
