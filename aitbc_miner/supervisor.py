"""The supervisor: one thread, no network, no waiting for the disk. Slots, kills, the control socket.

It waits, turns what happened into events, and feeds each to the rules of the slot or child it concerns. Each
tick also compares what should be with what is, so that an event that was missed heals.
"""

import os
import select
import signal
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

from msgspec import Struct

from aitbc_miner.children import Child, Keeper
from aitbc_miner.config import Config
from aitbc_miner.control import ControlServer, Source
from aitbc_miner.desk import Desk
from aitbc_miner.jobindex import JobIndex
from aitbc_miner.jobs import State
from aitbc_miner.messages import (
    CancelJob,
    CoordinatorView,
    Deliveries,
    EndReason,
    FoundJob,
    FromAgent,
    FromHeartbeat,
    GpuFact,
    Inventory,
    JobDone,
    JobEnded,
    JobReady,
    JobSettled,
    JobStep,
    JobUpdate,
    NodeView,
    Recovered,
    Slots,
    Stop,
    Ticket,
)
from aitbc_miner.orphans import WorkerBook, end_worker, kill_strangers
from aitbc_miner.placing import place
from aitbc_miner.slot import Adopt, Assign, Begin, Cancel, Slot, SlotState, Tick
from aitbc_miner.slots import Outcomes, RunningSlot
from aitbc_miner.util import clock
from aitbc_miner.util.log import events
from aitbc_miner.util.log import flush as flush_log
from aitbc_miner.util.notify import Notifier

M = TypeVar("M")

TICK_S = 1.0
# After the last slot is empty, how long the reports of a stop that was ordered may still take.
LAST_REPORTS_S = 10.0
HOLDING = frozenset({SlotState.BUSY, SlotState.CANCELLING, SlotState.ADOPTED})


class Parts(Struct, frozen=True):
    """What the supervisor is made of; `make_slots` lays the slots out once the GPUs are known."""

    config: Config
    agent: Keeper[FromAgent]
    heartbeat: Keeper[FromHeartbeat]
    make_slots: Callable[[list[GpuFact], Outcomes], list[RunningSlot]]
    book: WorkerBook
    notices: list[str] = []


class Supervisor:
    """The node's main loop and what it knows."""

    def __init__(self, parts: Parts, notifier: Notifier) -> None:
        self._config = parts.config
        self._notifier = notifier
        self._agent = parts.agent
        self._heartbeat = parts.heartbeat
        self._make_slots = parts.make_slots
        self._book = parts.book
        self._log = events("supervisor")
        self._slots: dict[str, RunningSlot] = {}
        self._queue: dict[str, Ticket] = {}
        self._inventory: Inventory | None = None
        self._recovered: list[FoundJob] | None = None
        self._index = JobIndex()
        self._dirty = False
        self._told: list[Slot] = []
        self._stop_mode: str | None = None
        self._stop_at = 0.0
        self._told_to_stop = False
        self._desk = Desk(parts.config, self._index, self._slots, self._queue, parts.notices, self._cancel)
        self._control = ControlServer(parts.config.control.socket, self._desk.answer)
        self._signals, self._wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._ticked = clock.now()

    # --- the loop ------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Run until told to stop, and then until it is done."""
        self._listen()
        self._notifier.say("READY=1")
        while not self._finished():
            self._tick()
            self._tell()
            self._turn()
        self._control.close()
        self._log.info("stopped", mode=self._stop_mode)

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
            sources |= _sources_of(agent, self._hear_agent, partial(self._child_gone, self._agent))
        if heartbeat := self._heartbeat.child:
            gone = partial(self._child_gone, self._heartbeat)
            sources |= _sources_of(heartbeat, self._hear_heartbeat, gone)
        for slot in self._slots.values():
            if slot.child:
                sources |= _sources_of(slot.child, slot.hear, slot.worker_gone)
            if slot.adopted is not None:
                sources[slot.adopted] = (slot.adopted_gone, select.POLLIN)
        return sources

    def _tick(self) -> None:
        """Do what is due, and put right what an event that was missed left wrong."""
        if self._stop_mode is None:
            for keeper in (self._agent, self._heartbeat):
                if keeper.start_if_due():
                    self._dirty = True
        for slot in self._slots.values() if not self._told_to_stop else ():
            slot.feed(Tick())
        self._place()
        self._stop_in_order()
        if clock.now() - self._ticked >= TICK_S:
            self._ticked = clock.now()
            # From this loop and nowhere else: a supervisor that hangs is to be restarted.
            self._notifier.say("WATCHDOG=1")
            self._control.drop_slow()
            flush_log()
            kill_strangers(self._own_children())

    def _tell(self) -> None:
        """Tell agent and heartbeat of the slots, when they have changed."""
        rules = [slot.rules for slot in self._slots.values()]
        if not (self._dirty or self._desk.take_changed() or rules != self._told):
            return
        self._dirty = False
        self._told = rules
        accepting = self._desk.accepting and self._stop_mode is None
        view = Slots([slot.view() for slot in self._slots.values()], list(self._queue), accepting)
        self._agent.send(view)
        self._heartbeat.send(view)

    def _own_children(self) -> set[int]:
        own = {keeper.child.pid for keeper in (self._agent, self._heartbeat) if keeper.child}
        return own | {slot.child.pid for slot in self._slots.values() if slot.child}

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

    def _hear_agent(self) -> None:
        for message in self._receive(self._agent):
            self._guarded(self._agent, self._take_from_agent, message)

    def _take_from_agent(self, message: FromAgent) -> None:
        match message:
            case Recovered():
                self._recovered = message.started
                self._begin()
            case JobReady() if self._slot_of(message.ticket.job_id) is None:
                self._queue[message.ticket.job_id] = message.ticket
                self._dirty = True
            case JobUpdate():
                if self._index.update(message):
                    self._heartbeat.send(JobDone(message.code))
            case CancelJob():
                self._cancel(message.job_id, message.why, message.detail)
            case Deliveries():
                self._desk.deliveries = message
                self._heartbeat.send(NodeView(message.pending, message.error))

    def _guarded(self, keeper: Keeper[Any], take: Callable[[M], None], message: M) -> None:
        """Take a message. Whatever is wrong with it costs the child that sent it, and never this process."""
        try:
            take(message)
        except Exception:  # noqa: BLE001  # a defect; it is told, and the node goes on
            self._log.error("message not taken", child=keeper.name, exc_info=True)
            if keeper.child:
                keeper.child.kill()

    def _receive(self, keeper: Keeper[M]) -> list[M]:
        return keeper.child.receive() if keeper.child else []

    def _child_gone(self, keeper: Keeper[FromAgent] | Keeper[FromHeartbeat]) -> None:
        how = keeper.died()
        if self._told_to_stop:
            keeper.stop()
            return
        self._log.error("child died", child=keeper.name, how=how, deaths=keeper.deaths)
        self._desk.note_death(keeper.name, f"{how}; {keeper.deaths} deaths so far")
        if keeper is self._agent:
            # The next agent reads the records and says again what is ready.
            self._queue.clear()

    # --- slots ---------------------------------------------------------------------------------------------

    def _begin(self) -> None:
        """Lay out the slots when the GPUs and the unfinished jobs are known; later, settle what was found."""
        if self._inventory is None or self._recovered is None or self._stop_mode is not None:
            return
        if not self._slots:
            outcomes = Outcomes(self._settle, self._ended, self._agent.send, self._stepped)
            self._slots.update(
                {slot.spec.name: slot for slot in self._make_slots(self._inventory.gpus, outcomes)}
            )
        for job in self._recovered:
            self._take_up(job)
        self._recovered = []
        for slot in self._slots.values():
            slot.feed(Begin())
        self._dirty = True

    def _take_up(self, job: FoundJob) -> None:
        """Decide what becomes of a job that was started and has no outcome."""
        workers = {slot.child.pid for slot in self._slots.values() if slot.child}
        if self._slot_of(job.job_id) is not None or job.worker_pid in workers:
            # It is running, or was when the agent looked and has ended since, of which the agent was told.
            return
        pid, start = job.worker_pid, job.worker_start
        if pid and start and self._book.knows(job.slot, pid, start):
            slot = self._slots.get(job.slot or "")
            idle = slot is not None and slot.rules.state is SlotState.STOPPED
            if slot and idle and slot.adopt(pid, start):
                slot.feed(Adopt(job.job_id, job.state))
                self._index.step(job.job_id, job.state, slot.spec.name)
                self._log.info("job adopted", job_id=job.job_id, slot=slot.spec.name)
                return
            end_worker(pid, start)
        self._settle(job.job_id, "the miner was restarted and found no worker with the job")

    def _slot_of(self, job_id: str) -> RunningSlot | None:
        return next((slot for slot in self._slots.values() if slot.rules.job_id == job_id), None)

    def _place(self) -> None:
        if not self._queue or self._stop_mode is not None:
            return
        free = [slot.offer for slot in self._slots.values() if slot.free]
        for ticket, offer in place(list(self._queue.values()), free):
            del self._queue[ticket.job_id]
            self._slots[offer.name].feed(Assign(ticket.job_id))

    def _stepped(self, step: JobStep, slot: str) -> None:
        self._index.step(step.job_id, step.state, slot)

    def _ended(self, ended: JobEnded) -> None:
        self._index.ended(ended)
        self._heartbeat.send(JobDone(ended.code, ended.timings))

    def _settle(self, job_id: str, why: str) -> None:
        self._index.settled(job_id)
        self._agent.send(JobSettled(job_id, why))

    def _cancel(self, job_id: str, why: EndReason, detail: str) -> bool:
        """End a job in a slot, waiting for one, or being taken in; False when it is none of these."""
        slot = self._slot_of(job_id)
        if slot is not None:
            slot.feed(Cancel(why, detail))
            return True
        row = self._index.get(job_id)
        coming = row is not None and row.state in {State.PULLED, State.ACKED}
        if self._queue.pop(job_id, None) is None and not coming:
            return False
        self._agent.send(CancelJob(job_id, why, detail))
        self._dirty = True
        return True

    # --- signals and stopping ------------------------------------------------------------------------------

    def _listen(self) -> None:
        # The handler does nothing: the number arrives in the pipe, and the loop deals with it.
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, lambda *_: None)
        signal.set_wakeup_fd(self._wake, warn_on_full_buffer=False)

    def _take_signals(self) -> None:
        for number in os.read(self._signals, 64):
            if number == signal.SIGHUP:
                self._log.info(
                    "reload", note="allowlists are read anew for each job; all else needs a restart"
                )
            else:
                self._order_stop("kill" if self._stop_mode else self._config.shutdown.mode)

    def _order_stop(self, mode: str) -> None:
        self._log.info("stopping", mode=mode)
        self._notifier.say("STOPPING=1")
        self._stop_mode = mode
        self._desk.stopping = True
        self._stop_at = clock.now() + (self._config.shutdown.grace_s if mode == "drain" else 0.0)
        self._dirty = True
        if mode == "kill":
            self._cancel_all()

    def _cancel_all(self) -> None:
        for slot in self._slots.values():
            slot.feed(Cancel("shutdown", "the miner stops"))

    def _stop_in_order(self) -> None:
        """Let go of the slots as the mode says, then of the agent once the last reports are out."""
        if self._stop_mode is None or self._told_to_stop:
            return
        now = clock.now()
        holding = [slot for slot in self._slots.values() if slot.rules.state in HOLDING]
        if holding and self._stop_mode == "drain" and now >= self._stop_at:
            self._log.warning("grace is over", jobs=[slot.rules.job_id for slot in holding])
            self._order_stop("kill")
        if holding and self._stop_mode != "handover":
            self._stop_at = max(self._stop_at, now)
            return
        # The agent's own number is as old as its last word, and may not count a job that has just ended.
        pending = self._desk.deliveries.pending or self._index.unreported
        reporting = pending and self._stop_mode != "handover"
        if reporting and now < self._stop_at + LAST_REPORTS_S and self._agent.child:
            return
        self._told_to_stop = True
        self._stop_at = now
        for slot in self._slots.values():
            slot.stop()
        for keeper in (self._agent, self._heartbeat):
            keeper.send(Stop())

    def _finished(self) -> bool:
        if not self._told_to_stop:
            return False
        if clock.now() > self._stop_at + LAST_REPORTS_S:
            self._kill_the_rest()
        idle = all(slot.child is None or slot.rules.state in HOLDING for slot in self._slots.values())
        return idle and self._agent.child is None and self._heartbeat.child is None

    def _kill_the_rest(self) -> None:
        for keeper in (self._agent, self._heartbeat):
            if keeper.child:
                keeper.child.kill()
        for slot in self._slots.values():
            if slot.child and slot.rules.state not in HOLDING:
                slot.child.kill()


def _sources_of(child: Child[M], hear: Callable[[], None], gone: Callable[[], None]) -> dict[int, Source]:
    """Say what a child is waited for with: its words, as long as it is listened to, and its end."""
    sources: dict[int, Source] = {child.pidfd: (gone, select.POLLIN)}
    if child.heard:
        room = select.POLLOUT if child.channel.has_unsent else 0
        sources[child.channel.fileno()] = (hear, select.POLLIN | room)
    return sources
