"""Writes the outcome of a job that no worker has: cancelled, expired, lost or refused."""

import os

from aitbc_miner.errors import ErrorCode
from aitbc_miner.ipc.messages import CancelJob, JobSettled
from aitbc_miner.jobs import FINAL, Outcome, State
from aitbc_miner.store.records import OUTCOME, JobDir, RecordError, Records
from aitbc_miner.util import clock, fs
from aitbc_miner.util.log import events

# The outcome whose result the coordinator refused; outcome.json says E_UPLOAD then.
REFUSED = "outcome.refused.json"
# The `delivery` of a job whose refused result the agent sends again, after the coordinator has got E_UPLOAD.
CALLED_FAILED = "called_failed"


def was_refused(job: JobDir) -> bool:
    """Whether the coordinator refused the job's report or result, so that the agent may send it again."""
    state = job.state()
    return state.state is State.FAILED and (state.delivery == "refused" or fs.exists(job.fd, REFUSED))


def take_back_refused(job: JobDir) -> bool:
    """Restore the first report of a job to be sent again; False if the coordinator has not refused it."""
    if not was_refused(job):
        return False
    # The state first: after a crash in between, the agent sends the report with E_UPLOAD.
    job.move(State.UPLOADING, delivery=None if job.state().delivery == "refused" else CALLED_FAILED)
    if fs.exists(job.fd, REFUSED):
        os.rename(REFUSED, OUTCOME, src_dir_fd=job.fd, dst_dir_fd=job.fd)
        os.fsync(job.fd)
    return True


def settle(records: Records, said: JobSettled | CancelJob) -> bool:
    """Write an outcome for a job without a worker, unless it has an outcome; False if already reported.

    Raises:
        OSError: a temporary fault; try again.
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
    """Give the outcome of a job without a worker; writes an outcome if the worker has left none."""
    if not job.has_outcome():
        job.rescue_outcome()
    return job.outcome() or declare(job, said)


def declare(job: JobDir, said: JobSettled | CancelJob) -> Outcome:
    """Write the outcome of a job that has neither a worker nor an outcome; `said` gives the reason."""
    if isinstance(said, CancelJob) and said.why == "expired":
        code, message = ErrorCode.E_TIMEOUT, f"the job did not start in time: {said.detail}"
    elif isinstance(said, CancelJob):
        code, message = ErrorCode.E_CANCELLED, f"the job was cancelled before it started: {said.detail}"
    elif said.code is not None:
        code, message = said.code, said.why
    else:
        why = said.why or "its worker process died before it wrote an outcome"
        code, message = ErrorCode.E_LOST, f"the job was lost: {why}"
    return conclude(job, code, message)


def conclude(job: JobDir, code: ErrorCode, message: str) -> Outcome:
    """Write a failure as the outcome of a job's present attempt."""
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
