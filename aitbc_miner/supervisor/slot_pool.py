"""The slots of a running node: which there are, which job goes where, what becomes of jobs that are found."""

from collections.abc import Iterator, Sequence
from functools import partial

from aitbc_miner.cgroup.group import CgroupError, Group
from aitbc_miner.errors import JobError
from aitbc_miner.gpu.facts import GpuFact
from aitbc_miner.ipc.channel import MAX_WAITING, ExcessError
from aitbc_miner.ipc.messages import CancelJob, FoundJob, Retuned, Slots, Stop
from aitbc_miner.jobs import EndReason, State
from aitbc_miner.slots.placement import Ticket, place, refuse_hopeless
from aitbc_miner.slots.state import (
    Adopt,
    Assign,
    Begin,
    Cancel,
    Event,
    Retire,
    SlotState,
    Tick,
    Unretire,
)
from aitbc_miner.supervisor.adoption import end_worker, works_in
from aitbc_miner.supervisor.node_plan import Layout, NodePlan, SlotPlan
from aitbc_miner.supervisor.running_slot import Outcomes, RunningSlot
from aitbc_miner.util.log import events

COMING = frozenset({State.PULLED, State.ACKED, State.RETRY_WAIT})
HOLDING = frozenset({SlotState.BUSY, SlotState.CANCELLING, SlotState.ADOPTED})


class Changes:
    """What a new layout means for the slots, for the operator."""

    def __init__(self) -> None:
        self.said: dict[str, list[str]] = {}

    def note(self, kind: str, slot: str) -> None:
        """Add a slot to those of one kind of change."""
        self.said.setdefault(kind, []).append(slot)

    def __str__(self) -> str:
        return "; ".join(f"{kind}: {', '.join(names)}" for kind, names in self.said.items()) or "no change"


class SlotPool:
    """All slots by their names, and the jobs that wait for one."""

    def __init__(self, node: NodePlan, outcomes: Outcomes) -> None:
        self._node = node
        self._outcomes = outcomes
        self._gpus: list[GpuFact] = []
        self._log = events("supervisor")
        self.slots: dict[str, RunningSlot] = {}
        self.queue: dict[str, Ticket] = {}
        # Whether there are jobs in the queue that perhaps no slot will ever take.
        self.unjudged = False

    def __iter__(self) -> Iterator[RunningSlot]:
        return iter(list(self.slots.values()))

    @property
    def holding(self) -> list[RunningSlot]:
        """The slots that have a job."""
        return [slot for slot in self if slot.rules.state in HOLDING]

    @property
    def workers(self) -> set[int]:
        """The pids of our own workers."""
        return {slot.child.pid for slot in self if slot.child}

    def view(self, *, accepting: bool) -> Slots:
        """Describe the slots and what waits for one to the other processes."""
        return Slots([slot.view() for slot in self], list(self.queue), accepting)

    def of(self, job_id: str) -> RunningSlot | None:
        """Give the slot that has a job."""
        return next((slot for slot in self if slot.rules.job_id == job_id), None)

    def feed(self, event: Event) -> None:
        """Tell all slots of something."""
        for slot in self:
            slot.feed(event)

    # --- the layout ----------------------------------------------------------------------------------------

    def begin(self, gpus: list[GpuFact], found: Sequence[FoundJob]) -> None:
        """Lay out the slots and settle what was found; later, settle what a further agent has found."""
        first = not self.slots
        if first:
            self._gpus = gpus
            self.lay_out(self._node.plan(self._node.layout, gpus))
        for job in found:
            self.take_up(job)
        if first:
            # It may have to wait for what dies slowly.
            end_others = partial(self._node.end_others, set(self.slots))
            self._outcomes.aside("old slots", end_others, self._others_ended)
        self.feed(Begin())

    def _others_ended(self, how: Retuned | str) -> None:
        self._log.debug("done", what="old slots", how=how)

    def follow(self, layout: Layout) -> str:
        """Make the slots what a reload wants them to be, and say what that changes."""
        changes = str(self.lay_out(self._node.plan(layout, self._gpus)))
        self.refuse_hopeless()
        self.feed(Begin())
        return changes

    def lay_out(self, plans: Sequence[SlotPlan]) -> Changes:
        """Make the slots what the operator wants, without touching a job."""
        changes = Changes()
        for plan in plans:
            name = plan.spec.name
            slot = self.slots.get(name)
            if slot is None:
                self.slots[name] = RunningSlot(plan, self._outcomes)
                changes.note("added", name)
            elif slot.change(plan):
                changes.note("changed", name)
            if slot is not None and slot.rules.retiring:
                slot.feed(Unretire())
                changes.note("kept after all", name)
        for name in self.slots.keys() - {plan.spec.name for plan in plans}:
            slot = self.slots[name]
            if not slot.rules.retiring:
                changes.note("removed after its job" if slot.rules.job_id else "removed", name)
                # Its worker is told to end only when it has no job: until then the slot may be wanted again.
                slot.feed(Retire())
        return changes

    def tick(self) -> None:
        """Let time pass for each slot; those that are to go and are empty, go."""
        self.feed(Tick())
        for name, slot in list(self.slots.items()):
            if not slot.rules.retiring or slot.rules.state is not SlotState.STOPPED:
                continue
            if slot.child:
                slot.child.send(Stop())
            else:
                self._remove(name, slot)

    def _remove(self, name: str, slot: RunningSlot) -> None:
        try:
            if slot.plan.group:
                Group(slot.plan.group).remove(timeout_s=0)
        except (CgroupError, OSError) as error:
            # Something dies slowly; there is a next tick.
            self._log.debug("group of a removed slot stays", error=str(error))
            return
        del self.slots[name]
        self._log.info("slot removed", slot=name)

    # --- jobs ----------------------------------------------------------------------------------------------

    def enqueue(self, ticket: Ticket) -> None:
        """Take in a job that wants a slot, unless it has one.

        Raises:
            ExcessError: more jobs wait than can be.
        """
        if self.of(ticket.job_id) is not None:
            return
        self.queue[ticket.job_id] = ticket
        self.unjudged = True
        if len(self.queue) > MAX_WAITING:
            raise ExcessError(f"it had more than {MAX_WAITING} jobs wait for a slot")

    def refuse_hopeless(self) -> None:
        """Have the agent report waiting jobs that no slot will ever take, though one would have before."""
        self.unjudged = False
        offers = [slot.plan.offer for slot in self if slot.offers]
        for ticket in list(self.queue.values()):
            try:
                refuse_hopeless(ticket, offers)
            except JobError as error:
                del self.queue[ticket.job_id]
                self._outcomes.settle(ticket.job_id, error.message, error.code)

    def place(self) -> None:
        """Give waiting jobs to free slots that fit."""
        # Once for all that have come, for each goes through all that wait.
        if self.unjudged:
            self.refuse_hopeless()
        if not self.queue:
            return
        free = [slot.plan.offer for slot in self if slot.free]
        if not free:
            return
        for ticket, offer in place(list(self.queue.values()), free):
            del self.queue[ticket.job_id]
            self.slots[offer.name].feed(Assign(ticket.job_id))

    def take_up(self, job: FoundJob) -> None:
        """Settle a job that was started and has no outcome, unless its worker lives."""
        if self.of(job.job_id) is not None:
            return
        if job.worker_pid in self.workers:
            # It has ended since the agent looked. That was told, but perhaps to an agent that died.
            self._outcomes.settle(job.job_id, "its worker ended it without an outcome")
            return
        pid, start = job.worker_pid, job.worker_start
        if pid and start and self._node.book.knows(job.slot, pid, start):
            name = job.slot or ""
            wanted = name in self.slots
            slot = self.slots[name] if wanted else RunningSlot(self._node.plan_stray(name), self._outcomes)
            ours = works_in(slot.plan.group, pid)
            if ours and slot.rules.state is SlotState.STOPPED and slot.adopt(pid, start):
                self.slots[name] = slot
                slot.feed(Adopt(job.job_id, job.state, job.deadline))
                self._outcomes.index.step(job.job_id, job.state, name)
                self._log.info("job adopted", job_id=job.job_id, slot=name)
                if not wanted:
                    slot.feed(Retire())
                return
            if ours:
                end_worker(pid, start)
        self._outcomes.settle(job.job_id, "the miner was restarted and found no worker with the job")

    def cancel(self, job_id: str, why: EndReason, detail: str) -> bool:
        """End a job in a slot, waiting for one, or being taken in; False when it is none of these."""
        if slot := self.of(job_id):
            slot.feed(Cancel(why, detail))
            return True
        row = self._outcomes.index.get(job_id)
        coming = row is not None and row.state in COMING
        if self.queue.pop(job_id, None) is None and not coming:
            return False
        self._outcomes.agent.send(CancelJob(job_id, why, detail))
        return True
