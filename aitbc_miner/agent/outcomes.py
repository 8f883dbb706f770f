"""The outcome of a job that nobody works on any more: cancelled, expired, lost, refused."""

import os

from aitbc_miner.errors import ErrorCode
from aitbc_miner.ipc.messages import CancelJob, JobSettled
from aitbc_miner.jobs import FINAL, Outcome, State
from aitbc_miner.store.records import OUTCOME, JobDir, RecordError, Records
from aitbc_miner.util import clock, fs
from aitbc_miner.util.log import events

# The outcome of a job whose result the coordinator would not take; outcome.json says E_UPLOAD then.
REFUSED = "outcome.refused.json"
# While the result is sent once more of a job of which the coordinator has heard that it could not be.
CALLED_FAILED = "called_failed"


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
                outcome_of(job, said)
    except RecordError as error:
        events("agent").error("cannot settle job", job_id=said.job_id, error=str(error))
    return True


def outcome_of(job: JobDir, said: JobSettled | CancelJob) -> Outcome:
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
