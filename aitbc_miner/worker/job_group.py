"""The cgroup of a job, below the slot's cgroup."""

from collections.abc import Iterator
from contextlib import contextmanager

from aitbc_miner.worker.hold import JobHold


@contextmanager
def make_group(hold: JobHold) -> Iterator[None]:
    """Make the job's cgroup anew, unless the job takes over the cgroup of a prewarmed process.

    The program's step empties the cgroup. The cgroup stays until the slot's next job, because its counters
    tell the cause of the job's end.
    """
    if hold.slot.group is not None and not hold.prewarmed:
        hold.slot.group.renew_job()
    yield
