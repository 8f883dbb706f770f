"""The supervisor's loop: slots, kills, the control socket. One thread, no network, no waiting for a disk.

The loop waits for events and passes each event to the slot or child that the event concerns. Each tick also
compares the wanted state with the present state, so that a missed event does no lasting harm.
"""

import os
import select
import signal
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

from aitbc_miner.control.protocol import Answer, FullAnswer, Problem, Request
from aitbc_miner.control.server import ControlServer, PollSource
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
    JobReady,
    JobUpdate,
    NodeView,
    Recovered,
    Retried,
    Starved,
    Sweepable,
    Troubles,
)
from aitbc_miner.supervisor.adoption import kill_strangers
from aitbc_miner.supervisor.children import Keeper, OneShots
from aitbc_miner.supervisor.control_api import ControlApi
from aitbc_miner.supervisor.disk_watch import DiskWatch
from aitbc_miner.supervisor.job_index import JobIndex
from aitbc_miner.supervisor.node_plan import NodePlan
from aitbc_miner.supervisor.running_slot import Outcomes
from aitbc_miner.supervisor.shutdown import NodeShutdown
from aitbc_miner.supervisor.slot_pool import SlotPool
from aitbc_miner.supervisor.slow_requests import SlowRequests
from aitbc_miner.util import clock
from aitbc_miner.util.log import events
from aitbc_miner.util.log import flush as flush_log
from aitbc_miner.util.notify import Notifier

M = TypeVar("M")

TICK_S = 1.0


class Supervisor:
    """The node's main loop and its parts."""

    def __init__(self, node: NodePlan, notifier: Notifier) -> None:
        self._node = node
        self._notifier = notifier
        self._agent, self._heartbeat = node.agent, node.heartbeat
        self._keepers: tuple[Keeper[Any], ...] = (node.agent, node.heartbeat)
        self._log = events("supervisor")
        self._inventory: Inventory | None = None
        self._recovered: list[FoundJob] | None = None
        self._told: object = None
        self._one_shots = OneShots()
        self._index = JobIndex()
        outcomes = Outcomes(self._index, self._agent, self._heartbeat, self._one_shots)
        self._slots = SlotPool(node, outcomes)
        self._disk = DiskWatch(node.config.workspace, self._one_shots, self._agent)
        self._shutdown = NodeShutdown(node, self._slots, self._index, notifier)
        self._slow = SlowRequests(node, self._one_shots, self._slots, self._shutdown)
        self._api = ControlApi(node, self._index, self._slots, self._disk, self._slow, self._shutdown)
        self._control = ControlServer(node.config.control.socket, self._api.answer)
        self._signals, self._wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._ticked = clock.now()

    # --- the loop ------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Run until the node is told to stop and all processes have ended."""
        self._listen()
        self._disk.tick()
        self._notifier.say("READY=1")
        while not self._shutdown.finished():
            self._tick()
            self._tell()
            self._turn()
        self._control.close()
        self._log.info("stopped", mode=self._shutdown.mode)

    def _turn(self) -> None:
        """Wait for events, at most one tick, and handle each."""
        sources = self._sources()
        poller = select.poll()
        for fd, (_, wanted) in sources.items():
            poller.register(fd, wanted)
        for fd, _ in poller.poll(TICK_S * 1000):
            sources[fd][0]()

    def _sources(self) -> dict[int, PollSource]:
        sources = self._control.sources()
        sources[self._signals] = (self._take_signals, select.POLLIN)
        if agent := self._agent.child:
            hear = partial(self._hear, self._agent, self._take_from_agent)
            sources |= agent.sources(hear, partial(self._child_gone, self._agent))
        if heartbeat := self._heartbeat.child:
            hear = partial(self._hear, self._heartbeat, self._take_from_heartbeat)
            sources |= heartbeat.sources(hear, partial(self._child_gone, self._heartbeat))
        sources |= self._one_shots.sources()
        for slot in self._slots:
            if slot.child:
                sources |= slot.child.sources(slot.hear, slot.worker_gone)
            if slot.adopted is not None:
                sources[slot.adopted] = (slot.adopted_gone, select.POLLIN)
        return sources

    def _tick(self) -> None:
        """Do the work that is due, and repair the effects of missed events."""
        if self._shutdown.mode is None:
            for keeper in self._keepers:
                keeper.start_if_due()
        if not self._shutdown.told:
            self._slots.tick()
        if self._shutdown.mode is None:
            self._slots.place()
        self._shutdown.proceed(self._api.deliveries.pending)
        if clock.now() - self._ticked >= TICK_S:
            self._ticked = clock.now()
            # Sent from this loop only, so that systemd restarts a supervisor whose loop hangs.
            self._notifier.say("WATCHDOG=1")
            self._control.tend()
            flush_log()
            self._disk.tick()
            self._chore("look for orphans of jobs", lambda: kill_strangers(self._own_children()))
            self._chore("record the workers for the next run", self._node.book.write)

    def _chore(self, what: str, do: Callable[[], object]) -> None:
        """Do a chore; if an OSError prevents the chore, show the problem and let the next tick try again."""
        try:
            do()
        except OSError as error:
            if what not in self._api.troubles:
                self._log.warning("chore postponed", what=what, error=str(error))
            self._api.troubles[what] = Problem(f"cannot {what}: {error}", "the node tries again by itself")
        else:
            self._api.troubles.pop(what, None)

    def _tell(self) -> None:
        """Send the slots to the agent and the heartbeat, if a slot has changed."""
        accepting = self._api.accepting and not self._disk.short and self._shutdown.mode is None
        now = ([(slot.rules, slot.plan) for slot in self._slots], list(self._slots.queue), accepting)
        if now != self._told:
            self._told = now
            for keeper in self._keepers:
                keeper.tell(self._slots.view(accepting=accepting))
        for keeper in self._keepers:
            keeper.tell_waiting()

    def _own_children(self) -> set[int]:
        own = {keeper.child.pid for keeper in self._keepers if keeper.child}
        return own | self._slots.workers | {child.pid for child in self._one_shots.under_way()}

    # --- what the children say -----------------------------------------------------------------------------

    def _take_from_heartbeat(self, message: FromHeartbeat) -> None:
        match message:
            case Inventory():
                self._api.gpu_error = message.error
                if self._inventory is None:
                    self._inventory = message
                    self._begin()
            case CoordinatorView():
                self._api.coordinator = message
            case Troubles():
                self._api.reported = message.texts

    def _take_from_agent(self, message: FromAgent) -> None:
        match message:
            case Recovered():
                self._recovered = message.started
                self._begin()
            case JobReady():
                self._slots.enqueue(message.ticket)
            case JobUpdate():
                if self._index.update(message):
                    self._heartbeat.send(JobDone(message.code))
            case CancelJob():
                self._slots.cancel(message.job_id, message.why, message.detail)
            case Deliveries():
                self._api.deliveries = message
                self._heartbeat.tell(NodeView(message.pending, message.error))
            case Starved():
                self._api.starved = message
                self._heartbeat.tell(message)
            case Sweepable():
                self._disk.sweep(message)
            case Retried():
                self._api.retried(message)
            case Counted():
                self._heartbeat.send(message)

    def _guarded(self, keeper: Keeper[Any], take: Callable[[M], None], message: M) -> None:
        """Handle a message. A bad message ends the child that sent the message, never this process."""
        if keeper.child is None or not keeper.child.heard:
            return
        try:
            take(message)
        except ExcessError as error:
            keeper.child.end(str(error))
        except Exception:  # noqa: BLE001  # a defect; the supervisor logs the defect and goes on
            self._log.error("message not taken", child=keeper.name, exc_info=True)
            if keeper.child:
                keeper.child.kill()

    def _hear(self, keeper: Keeper[M], take: Callable[[M], None]) -> None:
        for message in keeper.child.receive() if keeper.child else ():
            self._guarded(keeper, take, message)

    def _child_gone(self, keeper: Keeper[FromAgent] | Keeper[FromHeartbeat]) -> None:
        how = keeper.died()
        if self._shutdown.told:
            keeper.stop()
            return
        self._log.error("child died", child=keeper.name, how=how, deaths=keeper.deaths)
        self._api.note_death(keeper.name, f"{how}; {keeper.deaths} deaths so far")
        if keeper is self._agent:
            # The next agent reads the records and sends the ready jobs again.
            self._slots.queue.clear()
            self._api.forget_retries()

    def _begin(self) -> None:
        """Make the slots once GPUs and unfinished jobs are known; later, settle the jobs of a new agent."""
        if self._inventory is None or self._recovered is None or self._shutdown.mode is not None:
            return
        self._slots.begin(self._inventory.gpus, self._recovered)
        self._recovered = []

    # --- signals ------------------------------------------------------------------------------

    def _listen(self) -> None:
        # The handler does nothing: Python writes the signal's number into the pipe that the loop reads.
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, lambda *_: None)
        signal.set_wakeup_fd(self._wake, warn_on_full_buffer=False)

    def _take_signals(self) -> None:
        for number in os.read(self._signals, 64):
            if number == signal.SIGHUP:
                self._slow.ask(Request("reload"), self._reloaded)
            else:
                self._shutdown.order()

    def _reloaded(self, said: Answer | FullAnswer) -> None:
        self._log.info("reload answered", answer=getattr(said, "message", ""))
