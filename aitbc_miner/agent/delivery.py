"""Handing a job's outcome to the coordinator, again and again, until it has been accepted.

The outcome is on disk before the first try and stays there; what is kept in memory here is only when to try
next, and it is made anew from the disk at every start.
"""

import os
from collections.abc import Callable

from msgspec import Struct
from msgspec.structs import replace

from aitbc_miner.config.settings import GiveUp
from aitbc_miner.coordinator.interface import Coordinator, Gone, Refused, Told
from aitbc_miner.coordinator.service_result import FileChanged
from aitbc_miner.errors import ErrorCode
from aitbc_miner.identity.receipts import Receipt
from aitbc_miner.ipc.messages import CancelJob, JobSettled
from aitbc_miner.jobs import FINAL, Outcome, State, StateRecord
from aitbc_miner.store.records import OUTCOME, JobDir, RecordError, Records, pretty
from aitbc_miner.util import clock, fs
from aitbc_miner.util.backoff import Backoff
from aitbc_miner.util.log import events
from aitbc_miner.util.system import boot_id

# The outcome of a job whose result the coordinator would not take; outcome.json says E_UPLOAD then.
REFUSED = "outcome.refused.json"
# Jobs of a fleet whose report is another node's to send, however often they are handed to this one.
OTHERS = frozenset({"lost", "handed_on"})
GIVE_UP = GiveUp()
# While the result is sent once more of a job of which the coordinator has heard that it could not be.
CALLED_FAILED = "called_failed"


class Delivered(Struct, frozen=True):
    """A report that is settled: `how` is `accepted`, `superseded` or `refused`; or `lost`, and none was sent.

    `state` is the job's last one. `beat`: the coordinator counts the job as ours until it hears from us.
    """

    job_id: str
    outcome: Outcome
    how: str
    state: StateRecord
    receipt: Receipt | None = None
    beat: bool = False


def deliver(
    records: Records,
    coordinator: Coordinator,
    node_id: str,
    job_id: str,
    is_ours: Callable[[StateRecord], bool] = lambda _: True,
    give_up: GiveUp = GIVE_UP,
) -> Delivered:
    """Send one job's report and record that it was accepted.

    The key is the same for every try of the same report, so that a coordinator can tell a repetition. A job
    that `is_ours` denies has been taken over by another node, which reports it.

    Raises:
        CoordinatorError, QueueError: not accepted now; try again. So is a refusal before `give_up`.
        RecordError, OSError: the record cannot be read or written.
    """
    with records.open(job_id) as job:
        outcome = _outcome_of(job, JobSettled(job_id, "its record has no outcome"))
        # A repetition, asked for by a coordinator that has forgotten: it changes nothing here any more.
        state = job.state()
        told = Told()
        if state.state in FINAL and state.delivery in OTHERS:
            how = state.delivery
        elif state.state in FINAL:
            how, told = _send_again(coordinator, node_id, job, outcome)
        elif not is_ours(state):
            how = "lost"
            job.move(State.UPLOADING)
            state = job.move(State.FAILED, delivery=how)
        else:
            # Once: each writing takes its part of what is set aside for a full disk.
            if not (again := state.state is State.UPLOADING):
                job.move(State.UPLOADING)
            outcome, how, told = _send_or_refuse(coordinator, node_id, job, outcome, give_up, again=again)
            if how == "superseded" and outcome.ok and state.delivery == CALLED_FAILED:
                outcome = _as_failed(job, outcome, "the coordinator keeps to what it was told before")
            state = job.move(State.DONE if outcome.ok else State.FAILED, delivery=how)
    return Delivered(job_id, outcome, how, state, told.receipt, told.beat or how == "superseded")


def _keep(job: JobDir, receipt: Receipt | None) -> None:
    try:
        if receipt is not None:
            job.write_receipt(receipt)
    except (OSError, ValueError, RecordError) as error:
        # The job is paid all the same; to have its result sent once more would be worse.
        events("agent").error("receipt not kept", job_id=job.job_id, error=str(error))


def _send_or_refuse(
    coordinator: Coordinator, node_id: str, job: JobDir, outcome: Outcome, give_up: GiveUp, *, again: bool
) -> tuple[Outcome, str, Told]:
    """Send a report; of a result that the coordinator will not take as it is, say that it could not be."""
    try:
        return outcome, *_send(coordinator, node_id, job, outcome, again=again)
    except (Refused, FileChanged) as error:
        if isinstance(error, Refused):
            # On disk: a node that is often started anew must come to an end, too.
            refusals = job.state().refusals.another(clock.now(), boot_id())
            job.move(State.UPLOADING, refusals=refusals)
            if refusals.times < give_up.refusals or refusals.over_s < give_up.over_s:
                raise
        if not outcome.ok:
            return outcome, "refused", Told()
        failed = _as_failed(job, outcome, str(error))
    try:
        return failed, *_send(coordinator, node_id, job, failed, again=again)
    except Refused:
        return failed, "refused", Told()


def _as_failed(job: JobDir, outcome: Outcome, why: str) -> Outcome:
    """Write that a result could not be delivered. It is kept beside that, to be sent once more."""
    job.write(REFUSED, pretty(outcome))
    failed = replace(outcome, code=ErrorCode.E_UPLOAD, message=why)
    job.write_outcome(failed)
    return failed


def _send_again(coordinator: Coordinator, node_id: str, job: JobDir, outcome: Outcome) -> tuple[str, Told]:
    try:
        return _send(coordinator, node_id, job, outcome, again=True)
    except (Refused, FileChanged):
        return "refused", Told()


def _send(
    coordinator: Coordinator, node_id: str, job: JobDir, outcome: Outcome, *, again: bool
) -> tuple[str, Told]:
    try:
        if outcome.ok:
            key = f"result:{node_id}:{job.job_id}"
            told = coordinator.result(job.job_id, outcome, job.path, key, again=again)
            _keep(job, told.receipt)
            return "accepted", told
        return "accepted", coordinator.fail(job.job_id, outcome, f"fail:{node_id}:{job.job_id}", again=again)
    except Gone:
        # Already final there, or given to somebody else: nothing is left to say about it.
        return "superseded", Told()


def was_refused(job: JobDir) -> bool:
    """Whether the job's report, or its result, was not taken, so that it may be sent once more."""
    state = job.state()
    return state.state is State.FAILED and (state.delivery == "refused" or fs.exists(job.fd, REFUSED))


def take_back_refused(job: JobDir) -> bool:
    """Have a report that was refused sent once more, as it was at first; False when it was not refused."""
    if not was_refused(job):
        return False
    # The state first: a crash in between leaves the report of the refusal, which is sent then.
    job.move(State.UPLOADING, delivery=None if job.state().delivery == "refused" else CALLED_FAILED)
    if fs.exists(job.fd, REFUSED):
        os.rename(REFUSED, OUTCOME, src_dir_fd=job.fd, dst_dir_fd=job.fd)
        os.fsync(job.fd)
    return True


def settle(records: Records, said: JobSettled | CancelJob) -> bool:
    """See to it that a job which nobody works on has an outcome; False if it is reported already.

    Raises:
        OSError: that cannot be done now.
    """
    try:
        with records.open(said.job_id) as job:
            if job.state().state in FINAL:
                return False
            if not job.has_outcome():
                _outcome_of(job, said)
    except RecordError as error:
        events("agent").error("cannot settle job", job_id=said.job_id, error=str(error))
    return True


def _outcome_of(job: JobDir, said: JobSettled | CancelJob) -> Outcome:
    """Give the outcome of a job that nobody works on any more, or say what became of one without."""
    if not job.has_outcome():
        job.rescue_outcome()
    return job.outcome() or declare(job, said)


def declare(job: JobDir, said: JobSettled | CancelJob) -> Outcome:
    """Write the outcome of a job that nobody works on any more and that has none: it says why."""
    if isinstance(said, CancelJob) and said.why == "expired":
        code, message = ErrorCode.E_TIMEOUT, f"the job did not come to its turn in time: {said.detail}"
    elif isinstance(said, CancelJob):
        code, message = ErrorCode.E_CANCELLED, f"the job was cancelled before it started: {said.detail}"
    elif said.code is not None:
        code, message = said.code, said.why
    else:
        code, message = ErrorCode.E_LOST, f"the job was lost: {said.why or 'its worker ended without a word'}"
    return conclude(job, code, message)


def conclude(job: JobDir, code: ErrorCode, message: str) -> Outcome:
    """Write that the attempt at a job that is under way has failed."""
    state = job.state()
    outcome = Outcome(
        job_id=job.job_id,
        attempt=state.attempt,
        code=code,
        message=message,
        slot=state.slot,
        finished_wall=clock.wall(),
    )
    job.write_outcome(outcome)
    return outcome


class Lane:
    """Which reports wait, and until when. Pure: the times are given."""

    def __init__(self, min_s: float, max_s: float) -> None:
        self._bounds = (min_s, max_s)
        self._due: dict[str, float] = {}
        self._backoffs: dict[str, Backoff] = {}
        self._asked: dict[str, float] = {}
        self._running: set[str] = set()
        self._open_at = 0.0

    def __len__(self) -> int:
        return len(self._backoffs)

    def __contains__(self, job_id: str) -> bool:
        return job_id in self._backoffs

    def newest(self) -> list[str]:
        """Name all jobs with a report to send, the latest first."""
        return list(reversed(self._backoffs))

    def add(self, job_id: str, due: float, failures: int = 0) -> None:
        """Have this job's report sent when it is due; adding it again changes nothing.

        `failures` are the tries that an earlier run of the node has made.
        """
        if job_id not in self._backoffs:
            self._backoffs[job_id] = Backoff(*self._bounds, failures=failures)
            self._due[job_id] = due

    def failures(self, job_id: str) -> int:
        """Count the tries that have failed."""
        return self._backoffs[job_id].failures if job_id in self._backoffs else 0

    def start_due(self, now: float, room: int) -> list[str]:
        """Take what is due, at most `room` of it."""
        if now < self._open_at:
            return []
        due = sorted((at, job_id) for job_id, at in self._due.items() if at <= now)[: max(0, room)]
        for _, job_id in due:
            del self._due[job_id]
            self._running.add(job_id)
        return [job_id for _, job_id in due]

    def succeeded(self, job_id: str, now: float) -> None:
        """Forget this one; and since the coordinator answers, let the others not wait any longer."""
        self._running.discard(job_id)
        self._backoffs.pop(job_id, None)
        self._asked.pop(job_id, None)
        self.hurry(now)

    def failed(
        self, job_id: str, now: float, retry_after: float | None = None, *, alone: bool = False
    ) -> float:
        """Try this one again later; gives the pause in seconds.

        `alone`: it is this one that is not wanted, so that the success of another means nothing for it.
        """
        self._running.discard(job_id)
        pause = max(self._backoffs[job_id].next(), retry_after or 0.0)
        self._due[job_id] = now + pause
        self._asked[job_id] = now + (pause if alone else retry_after or 0.0)
        return pause

    def paced(self, job_id: str, until: float) -> None:
        """Send nothing before this time, nor this one, which was not tried and has not failed."""
        self._running.discard(job_id)
        self._due[job_id] = until
        self._open_at = until

    def hurry(self, now: float) -> None:
        """Make all that waits due now, or when the coordinator asked for it."""
        self._due = {
            job_id: min(at, max(now, self._asked.get(job_id, now))) for job_id, at in self._due.items()
        }

    @property
    def running(self) -> int:
        """How many are being sent."""
        return len(self._running)

    def next_due(self) -> float | None:
        """When the next one is due."""
        return max(self._open_at, min(self._due.values())) if self._due else None
