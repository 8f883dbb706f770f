"""What a job holds while it runs, in the order in which it gets it; it is taken away in reverse.

Each step is a context manager in the file of its concern, see `docs/adding.md`.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import NamedTuple

from aitbc_miner.jobs import State
from aitbc_miner.worker import disk_use, job_group, job_log, prewarm, program, workspace
from aitbc_miner.worker.hold import JobHold


class Step(NamedTuple):
    """One step: in which state the job comes to it, what it does, and what does it.

    `enter` either holds all that it is to hold, or raises and holds nothing: it is called again after trouble
    that may pass. What it yields, the steps after it find in the JobHold. The operator is told "cannot
    `doing`" where it fails.
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
