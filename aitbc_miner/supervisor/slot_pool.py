"""The slots of a running node: adds and removes slots, gives jobs to slots, adopts jobs of an earlier run."""

from collections.abc import Iterator, Sequence
from functools import partial

from aitbc_miner.cgroup.group import CgroupError, Group
from aitbc_miner.errors import JobError
from aitbc_miner.gpu.facts import GpuFact
from aitbc_miner.ipc.channel import MAX_WAITING, ExcessError
from aitbc_miner.ipc.messages import CancelJob, FoundJob, Slots, Stop
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
    """The effects of a new layout on the slots, for the operator."""

    def __init__(self) -> None:
        self.said: dict[str, list[str]] = {}

    def note(self, kind: str, slot: str) -> None:
        """Note one kind of change of a slot."""
        self.said.setdefault(kind, []).append(slot)

    def __str__(self) -> str:
        return "; ".join(f"{kind}: {', '.join(names)}" for kind, names in self.said.items()) or "no change"


class SlotPool:
    """All slots by their names, and the jobs that wait for a slot."""

    def __init__(self, node: NodePlan, outcomes: Outcomes) -> None:
        self._node = node
        self._outcomes = outcomes
        self._gpus: list[GpuFact] = []
        self._cleared = False
        self._log = events("supervisor")
        self.slots: dict[str, RunningSlot] = {}
        self.queue: dict[str, Ticket] = {}
        # Whether the queue has jobs that were not yet checked against all slots.
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
        """Describe the slots and the waiting jobs to the other processes."""
        return Slots([slot.view() for slot in self], list(self.queue), accepting)

    def of(self, job_id: str) -> RunningSlot | None:
        """Give the slot that has a job."""
        return next((slot for slot in self if slot.rules.job_id == job_id), None)

    def feed(self, event: Event) -> None:
        """Pass an event to all slots."""
        for slot in self:
            slot.feed(event)

    # --- the layout ----------------------------------------------------------------------------------------

    def begin(self, gpus: list[GpuFact], found: Sequence[FoundJob]) -> None:
        """Make the slots and settle the jobs in `found`; later calls settle the jobs of a new agent."""
        if not self.slots:
            self._gpus = gpus
            self.lay_out(self._node.plan(self._node.layout, gpus))
        for job in found:
            self.take_up(job)
        if not self._cleared:
            self._cleared = True
            # In a child, because some processes die slowly.
            end_others = partial(self._node.end_others, set(self.slots))
            log = self._log
            self._outcomes.aside("old slots", end_others, lambda how: log.debug("old slots removed", how=how))
        self.feed(Begin())

    def follow(self, layout: Layout) -> str:
        """Change the slots as a reload wants, and describe the changes."""
        changes = str(self.lay_out(self._node.plan(layout, self._gpus)))
        self.refuse_hopeless()
        self.feed(Begin())
        return changes

    def lay_out(self, plans: Sequence[SlotPlan]) -> Changes:
        """Add, change and remove slots as the operator wants; running jobs go on."""
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
                changes.note("removal cancelled", name)
        for name in self.slots.keys() - {plan.spec.name for plan in plans}:
            slot = self.slots[name]
            if not slot.rules.retiring:
                kind = "will be removed after the running job" if slot.rules.job_id else "removed"
                changes.note(kind, name)
                # The worker ends only after its job: until then, a reload may want the slot again.
                slot.feed(Retire())
        return changes

    def tick(self) -> None:
        """Give each slot its tick, and remove empty slots that are no longer wanted."""
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
            # A process dies slowly; the next tick tries again.
            self._log.debug("group of a removed slot stays", error=str(error))
            return
        del self.slots[name]
        self._log.info("slot removed", slot=name)

    # --- jobs ----------------------------------------------------------------------------------------------

    def enqueue(self, ticket: Ticket) -> None:
        """Queue a job for a slot, unless a slot has the job already.

        Raises:
            ExcessError: too many jobs wait.
        """
        if self.of(ticket.job_id) is not None:
            return
        self.queue[ticket.job_id] = ticket
        self.unjudged = True
        if len(self.queue) > MAX_WAITING:
            raise ExcessError(f"the agent queued more than {MAX_WAITING} jobs for a slot")

    def refuse_hopeless(self) -> None:
        """Have the agent report waiting jobs that no slot can take, for example after a reload."""
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
        # Once for all new jobs: each check goes through the whole queue.
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
        """Settle a started job without outcome, or adopt its worker if the worker lives."""
        if self.of(job.job_id) is not None:
            return
        if job.worker_pid in self.workers:
            # The job has ended since the agent looked, and an agent that died may have taken the message.
            self._outcomes.settle(job.job_id, "its worker ended the job without an outcome")
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
        self._outcomes.settle(job.job_id, "the miner was restarted and found no worker for the job")

    def cancel(self, job_id: str, why: EndReason, detail: str) -> bool:
        """Cancel a job that is in a slot, waits for a slot, or is being admitted; False for any other job."""
        if slot := self.of(job_id):
            slot.feed(Cancel(why, detail))
            return True
        row = self._outcomes.index.get(job_id)
        coming = row is not None and row.state in COMING
        if self.queue.pop(job_id, None) is None and not coming:
            return False
        self._outcomes.agent.send(CancelJob(job_id, why, detail))
        return True
