"""The resources that a job holds until its program has ended, and the job's results so far."""

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
    """The end of a program.

    exit: its exit, with the reason if the worker ended it. clean: whether no process survives. reports: its
    reports. excess: the text about too much on disk, if the worker ended the job for it.
    """

    exit: ExitStatus
    clean: bool
    reports: list[Report]
    excess: str = ""


class JobHold:
    """A job with its resources and results; `stack` releases the resources.

    Later steps find the value that a step yields by its type: `hold[JobLog]`. `manifest` and `launch` are set
    before the first step; a step may replace `launch` to change the program's start. `prewarmed`: a prewarmed
    process waits for the job's task, and the job has its directories and cgroup.
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
        """Enter a step. May be called again after a failure: the step makes its context manager anew."""
        self.give(self.stack.enter_context(step(self)))

    def give(self, given: object) -> None:
        """Make a value available to later steps, by its type."""
        self._given[type(given)] = given

    def __getitem__(self, kind: type[T]) -> T:
        return cast("T", self._given[kind])

    @property
    def clean(self) -> bool:
        """Whether no process of the job is left when the slot's next job starts."""
        return self.ending.clean and not self.remains
