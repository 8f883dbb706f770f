"""The job's program: its start, and the end of all that it has started."""

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
    """Start the program; on the way out, say in `hold.remains` what of the job is still alive.

    Where the worker fails meanwhile, all of the job is killed here; else the monitor has done that.
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
            hold.remains = f"what job {job_id} has left behind is not known"
            look = partial(_left_behind, hold, started.job)
            hold.remains = hold.link.patiently(job_id, "see what the job has left behind", look, over=True)


def _start(hold: JobHold, stack: ExitStack) -> Started:
    if not hold.prewarmed:
        return start_program(hold.launch, hold.job.path, hold.slot, stack)
    try:
        return hold[Warm].give(hold.launch, stack)
    except OSError:
        # The next try starts a process of the job's own.
        hold[Warm].end()
        if hold.slot.group is not None:
            hold.slot.group.renew_job()
        raise
    finally:
        hold.prewarmed = False


def _left_behind(hold: JobHold, job: Job) -> str:
    runs_as, most = hold.slot.runs_as, hold.slot.delays.kill
    if not hold.ending.clean:
        # Between the last look and this one it may have ended after all.
        left = named(job.survivors()) or "something"
        return f"{left} of job {hold.job.job_id} could not be killed within {most:g} s"
    # Not started by the job, but for it: by cron, at, or a service manager of the user.
    if runs_as and (owned := clear_user(runs_as.uid, most)):
        return f"user {runs_as.name} still owns {named(owned)}"
    return ""
