"""The supervisor: one thread, no network, no waiting for the disk. Slots, kills, the control socket.

It waits, turns what happened into events, and feeds each to the rules of the slot or child it concerns. Each
tick also compares what should be with what is, so that an event that was missed heals.
"""

import os
import select
import signal
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from typing import Any, TypeVar

from msgspec import Struct

from aitbc_miner.config.settings import Config
from aitbc_miner.control.protocol import Problem, Request
from aitbc_miner.control.server import ControlServer, Source
from aitbc_miner.gpu.facts import GpuFact
from aitbc_miner.ipc.channel import ExcessError
from aitbc_miner.ipc.messages import (
    CancelJob,
    CoordinatorView,
    Counted,
    Deliveries,
    FoundJob,
    FromAgent,
    FromHeartbeat,
    Inventory,
    JobDone,
    JobEnded,
    JobReady,
    JobSettled,
    JobStep,
    JobUpdate,
    NodeView,
    Recovered,
    Retried,
    Retuned,
    Slots,
    Starved,
    Sweepable,
    Troubles,
)
from aitbc_miner.jobs import EndReason, State
from aitbc_miner.slots.state import Cancel, Slot
from aitbc_miner.supervisor.adoption import WorkerBook, kill_strangers
from aitbc_miner.supervisor.allowing import Examiner
from aitbc_miner.supervisor.children import Errands, Keeper, Main
from aitbc_miner.supervisor.control_api import Desk, RetryDesk
from aitbc_miner.supervisor.disk_watch import Storage
from aitbc_miner.supervisor.historian import Historian
from aitbc_miner.supervisor.job_index import JobIndex
from aitbc_miner.supervisor.reload import Reloader
from aitbc_miner.supervisor.running_slot import Layout, Outcomes, SlotPlan
from aitbc_miner.supervisor.shutdown import Stopping
from aitbc_miner.supervisor.slot_pool import SlotSet
from aitbc_miner.util import clock
from aitbc_miner.util.log import events
from aitbc_miner.util.log import flush as flush_log
from aitbc_miner.util.notify import Notifier

M = TypeVar("M")

COMING = frozenset({State.PULLED, State.ACKED, State.RETRY_WAIT})
TICK_S = 1.0


class Parts(Struct, frozen=True):
    """What the supervisor is made of.

    `plan` says what each slot is to be, once the GPUs are known, and `stray` one that is not wanted any more;
    `end_others`, in a child, ends what runs in none of the named slots. `layout` is for the start, and
    `read_layout` the main function of a child that reads it anew, `read_history` of one for the `Historian`,
    `judge` of one for the `Examiner`.
    """

    config: Config
    agent: Keeper[FromAgent]
    heartbeat: Keeper[FromHeartbeat]
    layout: Layout
    plan: Callable[[Layout, list[GpuFact]], list[SlotPlan]]
    stray: Callable[[str], SlotPlan]
    end_others: Callable[[set[str], "Connection[Any, Any]"], None]
    read_layout: Main
    read_history: Callable[[Request, int, "Connection[Any, Any]"], None]
    judge: Callable[[Request, "Connection[Any, Any]"], None]
    book: WorkerBook
    notices: list[str] = []


class Supervisor:
    """The node's main loop and what it knows."""

    def __init__(self, parts: Parts, notifier: Notifier) -> None:
        self._config = parts.config
        self._notifier = notifier
        self._agent = parts.agent
        self._heartbeat = parts.heartbeat
        self._parts = parts
        self._log = events("supervisor")
        self._errands = Errands()
        self._reloader = Reloader(self._errands, parts.read_layout, self._follow)
        outcomes = Outcomes(self._settle, self._ended, self._agent.send, self._stepped, self._aside)
        self._slots = SlotSet(parts.book, parts.stray, outcomes)
        self._inventory: Inventory | None = None
        self._recovered: list[FoundJob] | None = None
        self._index = JobIndex()
        self._dirty = False
        self._told: list[Slot] = []
        self._untold: set[Keeper[Any]] = set()
        self._retries = RetryDesk(self._agent.send)
        self._storage = Storage(parts.config.workspace, self._errands, self._agent.send)
        self._desk = Desk(
            parts.config,
            self._index,
            self._slots.slots,
            self._slots.queue,
            parts.notices,
            self._cancel,
            {
                "reload": lambda _, later: self._reloader.reload(later),
                "history": Historian(self._errands, parts.read_history).show,
                "allow": Examiner(self._errands, parts.judge).ask,
                "retry": self._retries.ask,
            },
        )
        keepers = (self._agent, self._heartbeat)
        self._stopping = Stopping(parts.config, self._slots, self._index, self._desk, keepers, notifier)
        self._control = ControlServer(parts.config.control.socket, self._desk.answer)
        self._signals, self._wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._ticked = clock.now()

    # --- the loop ------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Run until told to stop, and then until it is done."""
        self._listen()
        self._watch_disk()
        self._notifier.say("READY=1")
        while not self._stopping.finished():
            self._tick()
            self._tell()
            self._turn()
        self._control.close()
        self._log.info("stopped", mode=self._stopping.mode)

    def _turn(self) -> None:
        """Wait for something to happen, and deal with it."""
        sources = self._sources()
        poller = select.poll()
        for fd, (_, wanted) in sources.items():
            poller.register(fd, wanted)
        for fd, _ in poller.poll(TICK_S * 1000):
            sources[fd][0]()

    def _sources(self) -> dict[int, Source]:
        sources = self._control.sources()
        sources[self._signals] = (self._take_signals, select.POLLIN)
        if agent := self._agent.child:
            sources |= agent.sources(self._hear_agent, partial(self._child_gone, self._agent))
        if heartbeat := self._heartbeat.child:
            gone = partial(self._child_gone, self._heartbeat)
            sources |= heartbeat.sources(self._hear_heartbeat, gone)
        for errand in self._errands.under_way():
            over = partial(self._errands.over, errand)
            sources |= errand.sources(partial(self._errands.hear, errand), over)
        for slot in self._slots:
            if slot.child:
                sources |= slot.child.sources(slot.hear, slot.worker_gone)
            if slot.adopted is not None:
                sources[slot.adopted] = (slot.adopted_gone, select.POLLIN)
        return sources

    def _tick(self) -> None:
        """Do what is due, and put right what an event that was missed left wrong."""
        if self._stopping.mode is None:
            for keeper in (self._agent, self._heartbeat):
                if keeper.start_if_due():
                    self._dirty = True
        if not self._stopping.told:
            self._slots.tick()
        if self._stopping.mode is None:
            # Once for all that have come, for each goes through all that wait.
            if self._slots.unjudged:
                self._refuse_hopeless()
            self._slots.place()
        self._stopping.proceed()
        if clock.now() - self._ticked >= TICK_S:
            self._ticked = clock.now()
            # From this loop and nowhere else: a supervisor that hangs is to be restarted.
            self._notifier.say("WATCHDOG=1")
            self._control.tend()
            flush_log()
            self._watch_disk()
            self._chore("look for orphans of jobs", lambda: kill_strangers(self._own_children()))
            self._chore("note our workers for the next run", self._parts.book.write)

    def _chore(self, what: str, do: Callable[[], object]) -> None:
        """Do something that the next tick does again, should this machine's own trouble be in its way."""
        try:
            do()
        except OSError as error:
            if what not in self._desk.troubles:
                self._log.warning("chore left for the next tick", what=what, error=str(error))
            self._desk.troubles[what] = Problem(f"cannot {what}: {error}", "it is tried again by itself")
        else:
            self._desk.troubles.pop(what, None)

    def _watch_disk(self) -> None:
        self._dirty |= self._storage.tick()
        self._desk.disk_problem, self._desk.disk_short = self._storage.problem, self._storage.short
        self._desk.agent_runs = self._agent.child is not None

    def _tell(self) -> None:
        """Tell agent and heartbeat of the slots, when they have changed.

        One that has not read what it was told before is told only the latest, when it has.
        """
        rules = self._slots.rules
        if self._desk.take_changed() or self._dirty or rules != self._told:
            self._untold = {self._agent, self._heartbeat}
        self._dirty = False
        self._told = rules
        self._heartbeat.tell_waiting()
        ready = {k for k in self._untold if k.child is None or not k.child.channel.has_unsent}
        if not ready:
            return
        self._untold -= ready
        accepting = self._desk.accepting and not self._storage.short and self._stopping.mode is None
        view = Slots([slot.view() for slot in self._slots], list(self._slots.queue), accepting)
        for keeper in ready:
            keeper.send(view)

    def _own_children(self) -> set[int]:
        own = {keeper.child.pid for keeper in (self._agent, self._heartbeat) if keeper.child}
        return own | self._slots.workers | {errand.pid for errand in self._errands.under_way()}

    # --- what the children say -----------------------------------------------------------------------------

    def _hear_heartbeat(self) -> None:
        for message in self._receive(self._heartbeat):
            self._guarded(self._heartbeat, self._take_from_heartbeat, message)

    def _take_from_heartbeat(self, message: FromHeartbeat) -> None:
        match message:
            case Inventory():
                self._desk.gpu_error = message.error
                if self._inventory is None:
                    self._inventory = message
                    self._begin()
            case CoordinatorView():
                self._desk.coordinator = message
            case Troubles():
                self._desk.reported = message.texts

    def _hear_agent(self) -> None:
        for message in self._receive(self._agent):
            self._guarded(self._agent, self._take_from_agent, message)

    def _take_from_agent(self, message: FromAgent) -> None:
        match message:
            case Recovered():
                self._recovered = message.started
                self._begin()
            case JobReady():
                self._dirty |= self._slots.enqueue(message.ticket)
            case JobUpdate():
                if self._index.update(message):
                    self._heartbeat.send(JobDone(message.code))
            case CancelJob():
                self._cancel(message.job_id, message.why, message.detail)
            case Deliveries():
                self._desk.deliveries = message
                self._heartbeat.tell(NodeView(message.pending, message.error))
            case Starved():
                self._desk.starved = message
                self._heartbeat.tell(message)
            case Sweepable():
                self._storage.sweep(message)
            case Retried():
                self._retries.answered(message)
            case Counted():
                self._heartbeat.send(message)

    def _guarded(self, keeper: Keeper[Any], take: Callable[[M], None], message: M) -> None:
        """Take a message. Whatever is wrong with it costs the child that sent it, and never this process."""
        if keeper.child is None or not keeper.child.heard:
            return
        try:
            take(message)
        except ExcessError as error:
            keeper.child.end(str(error))
        except Exception:  # noqa: BLE001  # a defect; it is told, and the node goes on
            self._log.error("message not taken", child=keeper.name, exc_info=True)
            if keeper.child:
                keeper.child.kill()

    def _receive(self, keeper: Keeper[M]) -> list[M]:
        return keeper.child.receive() if keeper.child else []

    def _child_gone(self, keeper: Keeper[FromAgent] | Keeper[FromHeartbeat]) -> None:
        how = keeper.died()
        if self._stopping.told:
            keeper.stop()
            return
        self._log.error("child died", child=keeper.name, how=how, deaths=keeper.deaths)
        self._desk.note_death(keeper.name, f"{how}; {keeper.deaths} deaths so far")
        if keeper is self._agent:
            # The next agent reads the records and says again what is ready.
            self._slots.queue.clear()

    # --- slots ---------------------------------------------------------------------------------------------

    def _begin(self) -> None:
        """Lay out the slots when the GPUs and the unfinished jobs are known; later, settle what was found."""
        if self._inventory is None or self._recovered is None or self._stopping.mode is not None:
            return
        first = not self._slots.slots
        if first:
            self._slots.lay_out(self._parts.plan(self._parts.layout, self._inventory.gpus))
        for job in self._recovered:
            self._slots.take_up(job, self._adopted)
        self._recovered = []
        if first:
            # It may have to wait for what dies slowly.
            self._aside("old slots", partial(self._parts.end_others, set(self._slots.slots)))
        self._slots.begin()
        self._dirty = True

    def _follow(self, layout: Layout) -> str:
        """Make the slots what a reload wants them to be, and say what that changes."""
        if self._inventory is None or not self._slots.slots or self._stopping.mode is not None:
            return "nothing, for the node is starting or stopping; reload again when it is up"
        changes = str(self._slots.lay_out(self._parts.plan(layout, self._inventory.gpus)))
        self._refuse_hopeless()
        self._slots.begin()
        self._dirty = True
        return changes

    def _refuse_hopeless(self) -> None:
        """Have the agent report jobs that were accepted when there was a slot for them, and now is none."""
        for job_id, error in self._slots.refuse_hopeless():
            self._index.settled(job_id)
            self._agent.send(JobSettled(job_id, error.message, error.code))

    def _adopted(self, job: FoundJob, slot: str) -> None:
        self._index.step(job.job_id, job.state, slot)
        self._log.info("job adopted", job_id=job.job_id, slot=slot)

    def _stepped(self, step: JobStep, slot: str) -> None:
        self._index.step(step.job_id, step.state, slot)

    def _ended(self, ended: JobEnded) -> None:
        self._index.ended(ended)
        self._heartbeat.send(JobDone(ended.code, ended.timings))

    def _settle(self, job_id: str, why: str) -> None:
        self._index.settled(job_id)
        self._agent.send(JobSettled(job_id, why))

    def _aside(self, name: str, main: Main, done: Callable[[Retuned | str], None] | None = None) -> None:
        """Have something done by a child of its own, and tell what came of it."""
        done = done or (lambda how: self._log.debug("done", what=name, how=how))
        try:
            self._errands.start(name, main, Retuned, done)
        except OSError as error:
            done(f"could not be started: {error.strerror}")

    def _cancel(self, job_id: str, why: EndReason, detail: str) -> bool:
        """End a job in a slot, waiting for one, or being taken in; False when it is none of these."""
        if self._slots.cancel(job_id, Cancel(why, detail)):
            return True
        row = self._index.get(job_id)
        coming = row is not None and row.state in COMING
        if self._slots.queue.pop(job_id, None) is None and not coming:
            return False
        self._agent.send(CancelJob(job_id, why, detail))
        self._dirty = True
        return True

    # --- signals ------------------------------------------------------------------------------

    def _listen(self) -> None:
        # The handler does nothing: the number arrives in the pipe, and the loop deals with it.
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, lambda *_: None)
        signal.set_wakeup_fd(self._wake, warn_on_full_buffer=False)

    def _take_signals(self) -> None:
        for number in os.read(self._signals, 64):
            if number == signal.SIGHUP:
                self._reloader.reload(
                    lambda said: self._log.info("reload", answer=getattr(said, "message", ""))
                )
            else:
                self._stopping.order()
                self._dirty = True
