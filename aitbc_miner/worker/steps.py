"""The steps of a job: what a job holds while it runs, in the order of acquisition.

Each step is a context manager in the file of its concern; the worker leaves them in reverse order.
`docs/adding.md` says how to add one.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import NamedTuple

from aitbc_miner.jobs import State
from aitbc_miner.worker import disk_use, job_group, job_log, prewarm, program, workspace
from aitbc_miner.worker.hold import JobHold


class Step(NamedTuple):
    """One step of a job.

    state: that of the job when the worker takes the step. doing: what the step does, in words that go on from
    "cannot". enter: makes the context manager, anew for each try after trouble that may pass; it either holds
    all that it is to hold, or raises and holds nothing. What it yields, later steps find in the JobHold.
    """

    state: State
    doing: str
    enter: Callable[[JobHold], AbstractContextManager[object]]


STEPS = [
    Step(State.PREP, "take the process that waits for a task", prewarm.take_waiting),
    Step(State.PREP, "make the job's directories", workspace.make_directories),
    Step(State.PREP, "make the job's cgroup", job_group.make_group),
    Step(State.PREP, "take the inputs", workspace.take_inputs),
    # From here on only the job's own policy lets it run again: the record says that it has started.
    Step(State.RUNNING, "make the job's log", job_log.open_log),
    Step(State.RUNNING, "count what the job has on disk", disk_use.count_use),
    Step(State.RUNNING, "start the job", program.run_program),
]
