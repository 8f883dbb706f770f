"""The prewarmed process: it imports modules and waits for the slot's next task, so the task starts at once.

The worker starts the process while the slot is idle, in the sandbox, limits and cgroup of a job. The next job
that can use the process takes over its directories and cgroup. The process runs only a single task; a job
that cannot use it ends it.
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

NO_PRELOAD = "preloading needs a sandbox, and this node has none (sandbox.mode)"
# Seconds: the pause after a job, in which the next job may come; the longest import; the pause after a
# failure.
IDLE_S, IMPORT_S, AGAIN_S = 0.1, 60.0, 60.0
ORDER_MAX = 1 << 20


class Warm:
    """A prewarmed process; `end` ends it, or the end of the job that took it."""

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
            # The pipe takes the whole order at once, so that a process that does not read delays nobody.
            with suppress(OSError):
                fcntl.fcntl(self._order, fcntl.F_SETPIPE_SZ, ORDER_MAX)
            self.started = start_program(launch, place, slot, stack, stdin=read_end)
            self._stack = stack.pop_all()

    @property
    def sources(self) -> list[int]:
        """Give the descriptors to wait on before `listen`."""
        reports = [] if self.ready or self.started.reports is None else [self.started.reports]
        return [self.started.job.pidfd, *reports]

    def listen(self) -> str:
        """Read the process's report; give the reason if the process is useless by now, else ''."""
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
            return "the process has ended"
        if not self.ready and clock.now() >= self.since + IMPORT_S:
            return f"the imports take more than {IMPORT_S:g} s"
        return ""

    def fits(self, launch: Launch, slot: SlotContext) -> bool:
        """Whether the process can run this launch in place of a new process."""
        return (
            launch.may_wait
            and slot is self.slot
            and self.launch.argv[: len(launch.argv)] == launch.argv
            and set(launch.binds) <= set(self.launch.binds)
            and len(launch.stdin) <= fcntl.fcntl(self._order, fcntl.F_GETPIPE_SZ)
            and not self.listen()
            # Before it is ready, bubblewrap may still be mounting the directories, which must not move then.
            and self.ready
        )

    def give(self, launch: Launch, stack: ExitStack) -> Started:
        """Give the process its task; `stack` then closes its descriptors.

        Raises:
            OSError: the process has just ended.
        """
        stack.push(self._stack.pop_all())
        self.started.job.begin()
        os.set_blocking(self._order, False)
        # A process that has ended by now is judged like any process that ended without a result.
        with suppress(BrokenPipeError):
            os.write(self._order, launch.stdin)
        # Close the pipe, because the process reads to its end; keep the number, because `_stack` closes it.
        null = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
        os.dup2(null, self._order, inheritable=False)
        os.close(null)
        return self.started

    def end(self) -> None:
        """Kill the process, and remove its directories."""
        self.started.job.kill_all(self.slot.delays.kill)
        self._stack.close()
        workspace.remove_ahead(self.slot.config.workspace.root, self.slot.spec.name)


class Warmer:
    """Keeps a prewarmed process waiting while the slot is idle, if its jobs may be Python tasks."""

    def __init__(self, runners: RunnerSet, name: str) -> None:
        self._runners = runners
        self._warm: Warm | None = None
        self._not_before = 0.0
        self._log = events("worker", slot=name)

    @property
    def sources(self) -> list[int]:
        """Give the descriptors to wait on before the next `tend`."""
        return self._warm.sources if self._warm else []

    def tend(self, slot: SlotContext) -> float | None:
        """Start, hear or end the process, as due; give the seconds until the next call, if known."""
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
        """Give the process away if it fits; otherwise end it to make room."""
        if self._warm and self._warm.fits(launch, slot):
            warm, self._warm = self._warm, None
            return warm
        self.end()
        return None

    def rest(self) -> None:
        """Wait a moment: the slot may get its next job at once."""
        self._not_before = clock.now() + IDLE_S

    def end(self) -> None:
        """End the process, if any."""
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
        except Exception as error:  # noqa: BLE001  # jobs run without prewarming, too
            self._log.warning("cannot preload", reason=f"{error!a:.300}")
            self._fail()

    def _fail(self) -> None:
        self.end()
        self._not_before = clock.now() + AGAIN_S


@contextmanager
def take_waiting(hold: JobHold) -> Iterator[Warm | None]:
    """Hold the prewarmed process if it can run the job; the job then has its directories and cgroup.

    If the job is not started, the process ends.
    """
    warm = hold[Warmer].take(hold.launch, hold.slot)
    if warm is None:
        yield None
        return
    hold.prewarmed = True
    try:
        # After a failure the directories may be half moved, so the next try makes new ones.
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
        return {"?": "the process did not report its imports"}
