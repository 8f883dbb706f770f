"""The slots of a running node: which there are, which job goes where, what becomes of jobs that are found."""

from collections.abc import Callable, Iterator, Sequence

from aitbc_miner.cgroup.group import CgroupError, Group
from aitbc_miner.errors import JobError
from aitbc_miner.ipc.channel import MAX_WAITING, ExcessError
from aitbc_miner.ipc.messages import FoundJob, Stop
from aitbc_miner.slots.placement import Ticket, place, refuse_hopeless
from aitbc_miner.slots.state import (
    Adopt,
    Assign,
    Begin,
    Cancel,
    Event,
    Retire,
    Slot,
    SlotState,
    Tick,
    Unretire,
)
from aitbc_miner.supervisor.adoption import WorkerBook, end_worker, works_in
from aitbc_miner.supervisor.running_slot import Outcomes, RunningSlot, SlotPlan
from aitbc_miner.util.log import events

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


class SlotSet:
    """All slots by their names, and the jobs that wait for one.

    `stray` plans a slot that is not wanted any more, and in which a worker of an earlier run has a job.
    """

    def __init__(self, book: WorkerBook, stray: Callable[[str], SlotPlan], outcomes: Outcomes) -> None:
        self._book = book
        self._stray = stray
        self._outcomes = outcomes
        self._log = events("supervisor")
        self.slots: dict[str, RunningSlot] = {}
        self.queue: dict[str, Ticket] = {}
        # Whether there are jobs in the queue that perhaps no slot will ever take.
        self.unjudged = False

    def __iter__(self) -> Iterator[RunningSlot]:
        return iter(list(self.slots.values()))

    @property
    def rules(self) -> list[Slot]:
        """The state of each slot."""
        return [slot.rules for slot in self]

    @property
    def holding(self) -> list[RunningSlot]:
        """The slots that have a job."""
        return [slot for slot in self if slot.rules.state in HOLDING]

    @property
    def workers(self) -> set[int]:
        """The pids of our own workers."""
        return {slot.child.pid for slot in self if slot.child}

    def of(self, job_id: str) -> RunningSlot | None:
        """Give the slot that has a job."""
        return next((slot for slot in self if slot.rules.job_id == job_id), None)

    def feed(self, event: Event) -> None:
        """Tell all slots of something."""
        for slot in self:
            slot.feed(event)

    # --- the layout ----------------------------------------------------------------------------------------

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

    def begin(self) -> None:
        """Start the slots that have not been."""
        self.feed(Begin())

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

    def enqueue(self, ticket: Ticket) -> bool:
        """Take in a job that wants a slot; False when it has one.

        Raises:
            ExcessError: more jobs wait than can be.
        """
        if self.of(ticket.job_id) is not None:
            return False
        self.queue[ticket.job_id] = ticket
        self.unjudged = True
        if len(self.queue) > MAX_WAITING:
            raise ExcessError(f"it had more than {MAX_WAITING} jobs wait for a slot")
        return True

    def refuse_hopeless(self) -> list[tuple[str, JobError]]:
        """Take waiting jobs that no slot will ever take out of the queue, and give each with the reason."""
        self.unjudged = False
        offers = [slot.plan.offer for slot in self if slot.offers]
        refused: list[tuple[str, JobError]] = []
        for ticket in list(self.queue.values()):
            try:
                refuse_hopeless(ticket, offers)
            except JobError as error:
                del self.queue[ticket.job_id]
                refused.append((ticket.job_id, error))
        return refused

    def place(self) -> None:
        """Give waiting jobs to free slots that fit."""
        if not self.queue:
            return
        free = [slot.plan.offer for slot in self if slot.free]
        if not free:
            return
        for ticket, offer in place(list(self.queue.values()), free):
            del self.queue[ticket.job_id]
            self.slots[offer.name].feed(Assign(ticket.job_id))

    def take_up(self, job: FoundJob, adopted: Callable[[FoundJob, str], None]) -> None:
        """Decide what becomes of a job that was started and has no outcome; `adopted` if its worker lives."""
        if self.of(job.job_id) is not None:
            return
        if job.worker_pid in self.workers:
            # It has ended since the agent looked. That was told, but perhaps to an agent that died.
            self._outcomes.settle(job.job_id, "its worker ended it without an outcome")
            return
        pid, start = job.worker_pid, job.worker_start
        if pid and start and self._book.knows(job.slot, pid, start):
            name = job.slot or ""
            wanted = name in self.slots
            slot = self.slots[name] if wanted else RunningSlot(self._stray(name), self._outcomes)
            ours = works_in(slot.plan.group, pid)
            if ours and slot.rules.state is SlotState.STOPPED and slot.adopt(pid, start):
                self.slots[name] = slot
                slot.feed(Adopt(job.job_id, job.state, job.deadline))
                adopted(job, name)
                if not wanted:
                    slot.feed(Retire())
                return
            if ours:
                end_worker(pid, start)
        self._outcomes.settle(job.job_id, "the miner was restarted and found no worker with the job")

    def cancel(self, job_id: str, event: Cancel) -> bool:
        """End a job that is in a slot; False when it is in none."""
        slot = self.of(job_id)
        if slot is not None:
            slot.feed(event)
        return slot is not None
