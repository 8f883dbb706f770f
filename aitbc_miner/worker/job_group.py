"""The cgroup of one job, below that of its slot."""

from collections.abc import Iterator
from contextlib import contextmanager

from aitbc_miner.worker.hold import JobHold


@contextmanager
def make_group(hold: JobHold) -> Iterator[None]:
    """Make the job's cgroup anew, unless the job has that of a process that waits.

    The program's step empties the cgroup. It stays until the slot's next job, for its counters say why this
    job ended.
    """
    if hold.slot.group is not None and not hold.prewarmed:
        hold.slot.group.renew_job()
    yield
