"""Stops the node in order: the slots' jobs as the mode says, then the last reports, then the children."""

from typing import Any

from aitbc_miner.ipc.messages import Stop
from aitbc_miner.slots.state import Cancel
from aitbc_miner.supervisor.children import Child, Keeper
from aitbc_miner.supervisor.job_index import JobIndex
from aitbc_miner.supervisor.node_plan import NodePlan
from aitbc_miner.supervisor.slot_pool import HOLDING, SlotPool
from aitbc_miner.util import clock
from aitbc_miner.util.log import events
from aitbc_miner.util.notify import Notifier

# How long the last reports may take after the last slot is empty.
LAST_REPORTS_S = 10.0


class NodeShutdown:
    """`mode` is None until the node is told to stop; `told` is True once the children are told to stop."""

    def __init__(self, node: NodePlan, slots: SlotPool, index: JobIndex, notifier: Notifier) -> None:
        self._grace_s = node.config.shutdown.grace_s
        self._first = node.config.shutdown.mode
        self._slots = slots
        self._index = index
        self._keepers: tuple[Keeper[Any], ...] = (node.agent, node.heartbeat)
        self._notifier = notifier
        self._log = events("supervisor")
        self._at = 0.0
        self.mode: str | None = None
        self.told = False

    def order(self) -> None:
        """Begin to stop as configured; a second call kills the jobs at once."""
        self._order("kill" if self.mode else self._first)

    def _order(self, mode: str) -> None:
        self._log.info("stopping", mode=mode)
        self._notifier.say("STOPPING=1")
        self.mode = mode
        self._at = clock.now() + (self._grace_s if mode == "drain" else 0.0)
        if mode == "kill":
            self._slots.feed(Cancel("shutdown", "the miner stops"))

    def proceed(self, pending: int) -> None:
        """Do the next step of the stop: wait for the slots as the mode says, then for the last reports.

        `pending` is the number of unsent reports in the agent's last message.
        """
        if self.mode is None or self.told:
            return
        now = clock.now()
        holding = self._slots.holding
        if holding and self.mode == "drain" and now >= self._at:
            self._log.warning("grace period ended", jobs=[slot.rules.job_id for slot in holding])
            self._order("kill")
        if holding and self.mode != "handover":
            self._at = max(self._at, now)
            return
        # The agent's last message may not count a job that has just ended.
        reporting = (pending or self._index.unreported) and self.mode != "handover"
        if reporting and now < self._at + LAST_REPORTS_S and self._keepers[0].child:
            return
        self.told = True
        self._at = now
        for slot in self._slots:
            slot.stop()
        for keeper in self._keepers:
            keeper.send(Stop(leave=not holding and not self._slots.queue))

    def finished(self) -> bool:
        """Whether all processes that must end have ended."""
        if not self.told:
            return False
        left: list[Child[Any]] = [keeper.child for keeper in self._keepers if keeper.child]
        left += [slot.child for slot in self._slots if slot.child and slot.rules.state not in HOLDING]
        if clock.now() > self._at + LAST_REPORTS_S:
            for child in left:
                child.kill()
        return not left
