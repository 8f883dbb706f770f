"""What a job holds from its first step until its program has ended, and what has come of it so far."""

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from typing import TypeVar, cast

from msgspec import Struct

from aitbc_miner.jobs import ExitStatus, LogInfo, Manifest, Usage
from aitbc_miner.runners.interface import Launch
from aitbc_miner.store.records import JobDir
from aitbc_miner.task import Report
from aitbc_miner.worker.context import SlotContext
from aitbc_miner.worker.link import SupervisorLink

T = TypeVar("T")


class Ending(Struct, frozen=True):
    """How it went: the exit, why we ended it if we did, whether anything survived, and what it reported.

    `excess` says what it had too much of on disk, where that is why.
    """

    exit: ExitStatus
    clean: bool
    reports: list[Report]
    excess: str = ""


class JobHold:
    """One job, what it holds, and what has come of it; `stack` lets go of what it holds.

    What a step yields, later steps find by its type: `hold[JobLog]`. `manifest` and `launch` are there before
    the first step; a step that changes what the program gets puts another Launch there. `prewarmed`: a
    process waits for the job's task, and the job has the directories and the cgroup of that process.
    """

    manifest: Manifest
    launch: Launch

    def __init__(self, job: JobDir, slot: SlotContext, link: SupervisorLink) -> None:
        self.job = job
        self.slot = slot
        self.link = link
        self.stack = ExitStack()
        self.prewarmed = False
        self.ending = Ending(ExitStatus(), clean=True, reports=[])
        self.remains = ""
        self.usage = Usage()
        self.log = LogInfo()
        self._given: dict[type, object] = {}

    def enter(self, step: Callable[["JobHold"], AbstractContextManager[object]]) -> None:
        """Hold what a step holds. May be called again: the step makes its context manager anew."""
        self.give(self.stack.enter_context(step(self)))

    def give(self, given: object) -> None:
        """Let the steps to come have this."""
        self._given[type(given)] = given

    def __getitem__(self, kind: type[T]) -> T:
        return cast("T", self._given[kind])

    @property
    def clean(self) -> bool:
        """Whether the slot's next job finds nothing of this one alive."""
        return self.ending.clean and not self.remains
