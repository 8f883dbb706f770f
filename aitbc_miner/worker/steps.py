"""The steps of a job, in their order: each acquires a resource that the job holds while it runs.

Each step is a context manager in the file of its concern; the worker leaves the steps in reverse order.
`docs/adding.md` says how to add a step.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import NamedTuple

from aitbc_miner.jobs import State
from aitbc_miner.worker import disk_use, job_group, job_log, prewarm, program, workspace
from aitbc_miner.worker.hold import JobHold


class Step(NamedTuple):
    """A step of a job.

    state: the job's state during the step. doing: the step's verb and object, for a message after "cannot".
    enter: makes the context manager, anew for each try after trouble that may pass. The context manager
    either holds its whole resource, or raises and holds nothing. Later steps find its yielded value in the
    JobHold.
    """

    state: State
    doing: str
    enter: Callable[[JobHold], AbstractContextManager[object]]


STEPS = [
    Step(State.PREP, "take the prewarmed process", prewarm.take_waiting),
    Step(State.PREP, "make the job's directories", workspace.make_directories),
    Step(State.PREP, "make the job's cgroup", job_group.make_group),
    Step(State.PREP, "take the inputs", workspace.take_inputs),
    # From here on the record says that the job has started, so only the job's policy allows another run.
    Step(State.RUNNING, "make the job's log", job_log.open_log),
    Step(State.RUNNING, "count the job's files", disk_use.count_use),
    Step(State.RUNNING, "start the job", program.run_program),
]
