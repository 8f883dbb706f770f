"""A process that waits for the slot's next task with modules imported ahead, so that the task starts at once.

It is started as a job is, in the same sandbox, limits and cgroup, while the slot has nothing to do; its
directories become those of the job whose task it gets, and it runs no second one. A job that cannot use it
ends it.
"""

import fcntl
import os
import select
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress

import msgspec

from aitbc_miner.runners.interface import JobPaths, Launch
from aitbc_miner.runners.python import PythonRunner
from aitbc_miner.runners.registry import RunnerSet
from aitbc_miner.sandbox.bubblewrap import HOME
from aitbc_miner.task import Preloaded
from aitbc_miner.util import clock
from aitbc_miner.util.log import events
from aitbc_miner.worker import workspace
from aitbc_miner.worker.context import SlotContext
from aitbc_miner.worker.hold import JobHold
from aitbc_miner.worker.launch import Started, start_program

NO_PRELOAD = "there is no sandbox, and nothing waits without one"
# Seconds: a slot with a job after the other keeps its CPUs for them; what has not imported all by then never
# will; the next try after one that failed.
IDLE_S, IMPORT_S, AGAIN_S = 0.1, 60.0, 60.0
ORDER_MAX = 1 << 20


class Warm:
    """One such process; ends with `end`, or with the job that it was given to."""

    def __init__(self, launch: Launch, slot: SlotContext) -> None:
        self.launch, self.slot = launch, slot
        self.since = clock.now()
        self.ready = False
        self._said = b""
        place = workspace.make_ahead(slot.config.workspace.root, slot.spec.name, slot.runs_as)
        if slot.group is not None:
            slot.group.renew_job()
        with ExitStack() as stack, ExitStack() as ours:
            read_end, self._order = os.pipe2(os.O_CLOEXEC)
            ours.callback(os.close, read_end)
            stack.callback(os.close, self._order)
            # Written in one go, so that a process that does not read holds up nobody.
            with suppress(OSError):
                fcntl.fcntl(self._order, fcntl.F_SETPIPE_SZ, ORDER_MAX)
            self.started = start_program(launch, place, slot, stack, stdin=read_end)
            self._stack = stack.pop_all()

    @property
    def sources(self) -> list[int]:
        """Give the descriptors that say when there is something to `listen` to."""
        reports = [] if self.ready or self.started.reports is None else [self.started.reports]
        return [self.started.job.pidfd, *reports]

    def listen(self) -> str:
        """Hear what it says; the reason when it is of no use any more, else ''."""
        log = events("worker", slot=self.slot.spec.name)
        reports = self.started.reports
        if not self.ready and reports is not None and select.select([reports], [], [], 0)[0]:
            with suppress(BlockingIOError):
                self._said = (self._said + os.read(reports, ORDER_MAX))[:ORDER_MAX]
            if b"\n" in self._said:
                self.ready = True
                for name, why in _failed(self._said).items():
                    log.warning("cannot preload", module=name, reason=why)
        if self.started.job.poll() is not None:
            return "it has ended"
        if not self.ready and clock.now() >= self.since + IMPORT_S:
            return f"it imports for more than {IMPORT_S:g} s"
        return ""

    def fits(self, launch: Launch, slot: SlotContext) -> bool:
        """Whether it can run this in place of a process of its own."""
        return (
            launch.may_wait
            and slot is self.slot
            and self.launch.argv[: len(launch.argv)] == launch.argv
            and set(launch.binds) <= set(self.launch.binds)
            and len(launch.stdin) <= fcntl.fcntl(self._order, fcntl.F_GETPIPE_SZ)
            and not self.listen()
        )

    def give(self, launch: Launch, stack: ExitStack) -> Started:
        """Let it run its task; what is open of it is `stack`'s then.

        Raises:
            OSError: it has ended at this moment.
        """
        stack.push(self._stack.pop_all())
        self.started.job.begin()
        os.set_blocking(self._order, False)
        # A process that is gone by now is judged as any other that ended without a result.
        with suppress(BrokenPipeError):
            os.write(self._order, launch.stdin)
        # Its end is what the process reads up to; the number stays ours to close.
        null = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
        os.dup2(null, self._order, inheritable=False)
        os.close(null)
        return self.started

    def end(self) -> None:
        """Kill it, and remove what it was to have."""
        self.started.job.kill_all(self.slot.delays.kill)
        self._stack.close()
        workspace.remove_ahead(self.slot.config.workspace.root, self.slot.spec.name)


class Warmer:
    """Sees to it that one waits whenever the slot is idle and its jobs may be tasks."""

    def __init__(self, runners: RunnerSet, name: str) -> None:
        self._runners = runners
        self._warm: Warm | None = None
        self._not_before = 0.0
        self._log = events("worker", slot=name)

    @property
    def sources(self) -> list[int]:
        """Give the descriptors that say when to `tend` again."""
        return self._warm.sources if self._warm else []

    def tend(self, slot: SlotContext) -> float | None:
        """Start, hear or end it as is due; gives the seconds until there is more to do, if that is known."""
        if self._warm and self._warm.slot is not slot:
            self.end()
        if self._warm and (reason := self._warm.listen()):
            self._log.warning("prewarmed process lost", reason=reason)
            self._fail()
        if self._warm is None:
            if (left := self._not_before - clock.now()) > 0:
                return left
            self._start(slot)
        if self._warm is None:
            return max(0.0, self._not_before - clock.now()) or None
        if self._warm.ready:
            return None
        return max(0.0, self._warm.since + IMPORT_S - clock.now())

    def take(self, launch: Launch, slot: SlotContext) -> Warm | None:
        """Give away the one that waits, if it fits; else it is ended, and makes room."""
        if self._warm and self._warm.fits(launch, slot):
            warm, self._warm = self._warm, None
            return warm
        self.end()
        return None

    def rest(self) -> None:
        """Wait a moment: the slot may get its next job at once."""
        self._not_before = clock.now() + IDLE_S

    def end(self) -> None:
        """End what waits, if anything does."""
        warm, self._warm = self._warm, None
        if warm is not None:
            warm.end()

    def _start(self, slot: SlotContext) -> None:
        if "python" not in slot.spec.runners or slot.sandbox is None:
            return
        try:
            runner = self._runners.current().get("python")
            if isinstance(runner, PythonRunner) and runner.preload:
                self._warm = Warm(runner.waiting(JobPaths(HOME), slot.spec, slot.gpu_env), slot)
        except Exception as error:  # noqa: BLE001  # whatever it is, jobs can do without
            self._log.warning("cannot preload", reason=f"{error!a:.300}")
            self._fail()

    def _fail(self) -> None:
        self.end()
        self._not_before = clock.now() + AGAIN_S


@contextmanager
def take_waiting(hold: JobHold) -> Iterator[Warm | None]:
    """Hold the process that waits, if it can run the job, which then has its directories and its cgroup.

    A job that is not started ends it.
    """
    warm = hold[Warmer].take(hold.launch, hold.slot)
    if warm is None:
        yield None
        return
    hold.prewarmed = True
    try:
        # Where this fails they may be half moved; the next try goes without.
        workspace.prepare(hold.job, hold.slot, ahead=True)
        yield warm
    finally:
        if hold.prewarmed:
            hold.prewarmed = False
            warm.end()


def _failed(said: bytes) -> dict[str, str]:
    try:
        return msgspec.json.decode(said.partition(b"\n")[0], type=Preloaded).failed
    except (msgspec.DecodeError, UnicodeDecodeError):
        return {"?": "it does not say what it has imported"}
