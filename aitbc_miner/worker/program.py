"""Starts the job's program, and ends all its processes."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

from aitbc_miner.jobs import ExitStatus
from aitbc_miner.sandbox.spawn import Job
from aitbc_miner.worker.cleanup import clear_user, named
from aitbc_miner.worker.hold import Ending, JobHold
from aitbc_miner.worker.launch import Started, start_program
from aitbc_miner.worker.prewarm import Warm


@contextmanager
def run_program(hold: JobHold) -> Iterator[Started]:
    """Start the program; on leaving, name the job's surviving processes in `hold.remains`.

    If the worker fails meanwhile, kill the whole job here; otherwise the monitor has done so.
    """
    job_id = hold.job.job_id
    with ExitStack() as stack:
        started = _start(hold, stack)
        try:
            yield started
        except BaseException:
            hold.ending = Ending(ExitStatus(), clean=False, reports=[])
            clean = started.job.kill_all(hold.slot.delays.kill)
            hold.ending = Ending(started.job.poll() or ExitStatus(), clean, reports=[])
            raise
        finally:
            hold.remains = f"cannot tell which processes of job {job_id} are still running"
            look = partial(_left_behind, hold, started.job)
            hold.remains = hold.link.patiently(job_id, "list the job's remaining processes", look, over=True)


def _start(hold: JobHold, stack: ExitStack) -> Started:
    if not hold.prewarmed:
        return start_program(hold.launch, hold.job.path, hold.slot, stack)
    try:
        return hold[Warm].give(hold.launch, stack)
    except OSError:
        # The next try starts a new process.
        hold[Warm].end()
        if hold.slot.group is not None:
            hold.slot.group.renew_job()
        raise
    finally:
        hold.prewarmed = False


def _left_behind(hold: JobHold, job: Job) -> str:
    runs_as, most = hold.slot.runs_as, hold.slot.delays.kill
    if not hold.ending.clean:
        # A survivor may have ended since the kill: then its pid is unknown.
        left = named(job.survivors()) or "a process"
        return f"{left} of job {hold.job.job_id} could not be killed within {most:g} s"
    # cron, at, or a service manager of the user may have started processes for the job.
    if runs_as and (owned := clear_user(runs_as.uid, most)):
        return f"user {runs_as.name} still owns {named(owned)}"
    return ""
