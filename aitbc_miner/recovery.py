"""What the records say at the start: which jobs are done, to deliver, to resume, or in a worker's hands."""

from msgspec import Struct

from aitbc_miner.jobs import FINAL, Outcome, State
from aitbc_miner.messages import FoundJob
from aitbc_miner.records import RecordError, Records
from aitbc_miner.util.log import events

STARTED = frozenset({State.PREP, State.RUNNING, State.COLLECTING})


class Found(Struct, frozen=True):
    """The jobs on disk: finished ones with their outcome, and ids of the others by what they need."""

    finished: list[tuple[str, State, Outcome | None]]
    to_deliver: list[str]
    to_resume: list[str]
    started: list[FoundJob]


def recover(records: Records) -> Found:
    """Read all records. One that is broken is told in the log and left alone."""
    found = Found([], [], [], [])
    for job_id, record in records.scan():
        if isinstance(record, RecordError):
            events("agent").error("broken record", job_id=job_id, error=str(record))
        elif record.state in FINAL:
            found.finished.append((job_id, record.state, read_outcome(records, job_id)))
        elif record.state is State.UPLOADING or has_outcome(records, job_id):
            found.to_deliver.append(job_id)
        elif record.state in STARTED:
            found.started.append(
                FoundJob(
                    job_id,
                    record.state,
                    record.slot,
                    record.worker_pid,
                    record.worker_start,
                    record.deadline,
                )
            )
        else:
            found.to_resume.append(job_id)
    return found


def has_outcome(records: Records, job_id: str) -> bool:
    """Whether the job's result stands."""
    with records.open(job_id) as job:
        return job.has_outcome()


def read_outcome(records: Records, job_id: str) -> Outcome | None:
    """Give a job's outcome; None when it has none or a broken one."""
    try:
        with records.open(job_id) as job:
            return job.outcome()
    except (RecordError, OSError) as error:
        events("agent").error("broken record", job_id=job_id, error=str(error))
        return None
