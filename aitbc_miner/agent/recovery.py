"""Reads the records at the start, and sorts the jobs: finished, to report, to resume, or with a worker.

The agent sets a broken record aside, and still reports the rest of its job.
"""

from collections.abc import Container
from functools import partial

import msgspec
from msgspec import Struct

from aitbc_miner.errors import ErrorCode
from aitbc_miner.ipc.messages import FoundJob
from aitbc_miner.jobs import BROKEN, FINAL, Outcome, State, StateRecord
from aitbc_miner.store.records import OUTCOME, STATE, JobDir, RecordError, Records
from aitbc_miner.util import clock, fs
from aitbc_miner.util.log import events

STARTED = frozenset({State.PREP, State.RUNNING, State.COLLECTING})


class Found(Struct, frozen=True):
    """The jobs on disk, by their next step. `ended` have an outcome, but no decision on report or retry.

    `finished` are settled. `leases` has the tokens of jobs that a fleet shares. `unread` has the jobs that a
    temporary fault of this machine kept unread, with the error. `broken` counts broken records.
    """

    finished: list[str] = []
    to_deliver: list[str] = []
    ended: list[str] = []
    to_resume: list[str] = []
    to_retry: list[str] = []
    started: list[FoundJob] = []
    leases: dict[str, str] = {}
    unread: dict[str, str] = {}
    broken: int = 0


def recover(records: Records, settled: Container[str] = ()) -> Found:
    """Read the records of all jobs but the `settled`, and set broken records aside."""
    records.remove_unfinished()
    found = Found()
    return _recover(records, [job_id for job_id in records.ids() if job_id not in settled], found)


def recover_rest(records: Records, unread: list[str]) -> Found:
    """Read the records of these jobs again; an earlier call could not."""
    return _recover(records, unread, Found())


def _recover(records: Records, job_ids: list[str], found: Found) -> Found:
    broken = 0
    for job_id in job_ids:
        try:
            broken += fs.tried_again(partial(_recover_one, records, job_id, found))
        except (RecordError, OSError) as error:
            events("agent").error("record not read", job_id=job_id, error=str(error))
            found.unread[job_id] = str(error)
    return msgspec.structs.replace(found, broken=broken)


def _recover_one(records: Records, job_id: str, found: Found) -> bool:
    """Sort one job into `found`; True if a record of the job is broken."""
    record = records.state_of(job_id)
    if isinstance(record, OSError):
        raise record
    if isinstance(record, RecordError):
        if _salvage(records, job_id, record):
            found.to_deliver.append(job_id)
        return True
    try:
        _sort(records, record, found)
    except RecordError as error:
        _set_aside(records, job_id, OUTCOME, error)
        _sort(records, record, found)
        return True
    return False


def _sort(records: Records, record: StateRecord, found: Found) -> None:
    job_id = record.job_id
    if record.lease is not None and record.state not in FINAL:
        found.leases[job_id] = record.lease
    if record.state in FINAL:
        found.finished.append(job_id)
        return
    with records.open(job_id) as job:
        if record.state is not State.UPLOADING:
            job.drop_stale_outcome(record)
        has_outcome = job.outcome() is not None
    if record.state is State.UPLOADING:
        found.to_deliver.append(job_id)
    elif has_outcome:
        found.ended.append(job_id)
    elif record.state in STARTED:
        found.started.append(
            FoundJob(
                job_id, record.state, record.slot, record.worker_pid, record.worker_start, record.deadline
            )
        )
    elif record.state is State.RETRY_WAIT:
        found.to_retry.append(job_id)
    else:
        found.to_resume.append(job_id)


def _salvage(records: Records, job_id: str, error: RecordError) -> bool:
    """Save a job with a broken state; True if the job has a report to send.

    A job with an outcome keeps the outcome. Without an outcome nobody knows the job's progress, so the job is
    lost. A directory without a manifest is no job, and is only set aside.
    """
    with records.open(job_id) as job:
        outcome = _if_readable(job)
        is_job = outcome is not None or _manifest_of(job) is not None
        if is_job:
            # The outcome first: after a crash in between, the next start finds the outcome.
            outcome = outcome or _declare_lost(records, job)
            _set_aside(records, job_id, STATE, error)
            state = StateRecord(job_id=job_id, state=State.UPLOADING, slot=outcome.slot, started=True)
            job.write_state(state)
            return True
    _set_aside(records, job_id, None, error)
    return False


def _declare_lost(records: Records, job: JobDir) -> Outcome:
    if job.has_outcome():
        records.set_aside(job.job_id, OUTCOME)
    why = f"the job was lost: its record was broken; the node has moved the record to {BROKEN}"
    outcome = Outcome(job_id=job.job_id, code=ErrorCode.E_LOST, message=why, finished_wall=clock.wall())
    job.write_outcome(outcome)
    return outcome


def _set_aside(records: Records, job_id: str, file: str | None, error: Exception) -> None:
    try:
        aside = str(records.set_aside(job_id, file))
    except FileNotFoundError:
        aside = None  # the error was that the file is missing
    events("agent").error("broken record set aside", job_id=job_id, error=str(error), aside=aside)


def _if_readable(job: JobDir) -> Outcome | None:
    try:
        return job.outcome()
    except RecordError:
        return None


def _manifest_of(job: JobDir) -> bytes | None:
    """Give the manifest as it came, or None: a directory without a manifest of its job is no job."""
    try:
        said = msgspec.json.decode(raw := job.raw_manifest())
    except (RecordError, msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    return raw if isinstance(said, dict) and said.get("job_id") == job.job_id else None


def read_outcome(records: Records, job_id: str) -> Outcome | None:
    """Give a job's outcome; None if the outcome is missing, broken or unreadable now."""
    try:
        with records.open(job_id) as job:
            return job.outcome()
    except RecordError as error:
        events("agent").error("broken record found", job_id=job_id, error=str(error))
    except OSError as error:
        events("agent").error("record not read", job_id=job_id, error=str(error))
    return None
