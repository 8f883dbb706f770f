"""A node's part in a fleet: leases on its own jobs, and jobs that it takes over from other nodes or hands on.

Before a job starts here that other nodes may have to take over, this node enters it in the shared queue. The
job is ours as long as we renew our lease. A node without the lease reports nothing about the job: the new
holder of the lease reports it.
"""

import secrets
from collections.abc import Callable

import msgspec
from msgspec import Raw, Struct
from msgspec.structs import replace

from aitbc_miner.agent.retry_policy import outlives_its_node
from aitbc_miner.coordinator.interface import Coordinator, CoordinatorError, Gone, Refused
from aitbc_miner.jobs import Manifest, ManifestError, Outcome, StateRecord, decode_manifest
from aitbc_miner.queue.interface import Kind, QueueError, RetryQueue, Task
from aitbc_miner.slots.placement import Offer, fits, ticket_for
from aitbc_miner.store.records import JobDir, RecordError, Records
from aitbc_miner.util import clock
from aitbc_miner.util.log import events

LOOKED_AT = 200
# If no other node takes a job for this time, the node that handed the job on reports the failure.
GIVE_UP_S = 900.0
# The delay after a failed take-over, so that other nodes may claim the job.
PASS_ON_S = 5.0


class Handover(Struct, frozen=True):
    """A job for another node: its manifest as it came, and whether its program may have run."""

    manifest: Raw
    started: bool


class FleetFinds(Struct, frozen=True):
    """Jobs from the shared queue: `taken` are recorded here now, `returned` are ours and nobody took them."""

    taken: list[str]
    returned: list[str]


class Fleet:
    """The leases and take-overs of this node. Any thread may call the methods."""

    def __init__(self, queue: RetryQueue, node_id: str, lease_s: float, coordinator: Coordinator) -> None:
        self._queue = queue
        self._coordinator = coordinator
        self._node_id = node_id
        self._lease_s = lease_s
        self._tokens: dict[str, str] = {}
        self._until: dict[str, float] = {}
        self._done: dict[str, str] = {}
        self._offered: dict[str, float] = {}

    def examine(self) -> None:
        """Raise QueueError if the queue may lose tasks."""
        self._queue.examine()

    # --- leases on jobs ------------------------------------------------------------------------------------

    def recovered(self, leases: dict[str, str]) -> None:
        """Note the leases of an earlier run of the node, which may be lost by now."""
        self._tokens |= leases

    def hold(self, job: JobDir, manifest: Manifest) -> bool:
        """Take or renew the lease on a job before its start; False if another node has the job.

        Needs a lease only if the job may run again after the loss of its node. If the queue fails, a new job
        starts without a lease, and nobody takes the job over if this node dies.

        Raises:
            QueueError: our earlier lease is over, and the queue cannot say who has the job now.
            RecordError, OSError: the node cannot record the token.
        """
        state = job.state()
        if not outlives_its_node(manifest.retry) and state.lease is None:
            return True
        entered = state.lease is not None
        token = state.lease or secrets.token_hex(16)
        if not entered:
            # Recorded before the entry, so that a crash after the entry leaves us the token.
            state = job.write_state(replace(state, lease=token))
        # started=True: the node that finds the lease expired cannot know whether the program started here.
        task = self._task(job, state, manifest.retry.max_attempts, "its node was lost", started=True)
        began = clock.now()
        try:
            ours = self._queue.hold(task, token, self._lease_s)
        except QueueError as error:
            if entered:
                if clock.now() < self._until.get(job.job_id, 0.0):
                    return True
                raise
            events("agent").warning("job not shared with the fleet", job_id=job.job_id, error=str(error))
            job.write_state(replace(state, lease=None))
            self._done[job.job_id] = token
            return True
        if ours:
            self._tokens[job.job_id], self._until[job.job_id] = token, began + self._lease_s
        return ours

    def is_ours(self, state: StateRecord) -> bool:
        """Whether this node may report a job: it still has its lease, or never needed a lease.

        Raises:
            QueueError: the queue fails, and our lease is over by our clock.
            CoordinatorError: the queue does not know our lease, and the coordinator gives no answer.
        """
        if state.lease is None:
            return True
        began = clock.now()
        try:
            ours = self._queue.renew(Kind.RUN, state.job_id, state.lease, self._lease_s)
        except QueueError:
            if clock.now() < self._until.get(state.job_id, 0.0):
                return True
            raise
        if ours:
            self._tokens[state.job_id], self._until[state.job_id] = state.lease, began + self._lease_s
            return True
        # Another node may have the job or have finished it, or the queue has lost its data.
        return self._belongs(state.job_id)

    def _belongs(self, job_id: str) -> bool:
        """Ask the coordinator whether an acknowledged job is still ours."""
        try:
            self._coordinator.ack(job_id)
        except Gone:
            return False
        except Refused:
            pass  # a refused question says nothing about the job; the coordinator will answer the report
        return True

    def renew(self, lost: list[str]) -> None:
        """Renew all our leases; appends the jobs that other nodes have by now to `lost`.

        Raises:
            QueueError: the queue fails; the entries in `lost` so far are valid.
        """
        for job_id, token in list(self._done.items()):
            self._queue.remove(Kind.RUN, job_id, token)
            self._done.pop(job_id, None)
        for job_id, token in list(self._tokens.items()):
            began = clock.now()
            if self._queue.renew(Kind.RUN, job_id, token, self._lease_s):
                self._until[job_id] = began + self._lease_s
                continue
            try:
                ours = self._belongs(job_id)
            except CoordinatorError:
                continue  # the job runs on, as long as nobody says that another node has it
            if self._tokens.pop(job_id, None) is not None and not ours:
                lost.append(job_id)

    def done(self, state: StateRecord) -> None:
        """Give up the lease on a job that is reported or never was ours; later if the queue fails now."""
        self._tokens.pop(state.job_id, None)
        if state.lease is None:
            return
        try:
            self._queue.remove(Kind.RUN, state.job_id, state.lease)
        except QueueError:
            self._done[state.job_id] = state.lease

    def requeue(self, job_id: str) -> bool:
        """Make a job of the shared queue due for any node; False if the queue does not have the job."""
        return self._queue.requeue(Kind.RUN, job_id) is not None

    # --- between nodes -------------------------------------------------------------------------------------

    def hand_on(self, job: JobDir, outcome: Outcome, most: int) -> bool:
        """Offer a job to the other nodes; False if another node has the job already.

        Raises:
            QueueError: the queue fails.
            RecordError, OSError: the record is unreadable.
        """
        state = job.state()
        task = self._task(job, state, most, outcome.message, started=state.started)
        given = self._queue.put(task, 0.0, state.lease)
        self._tokens.pop(job.job_id, None)
        self._offered[job.job_id] = clock.now()
        return given

    def seek(
        self, records: Records, offers: list[Offer], knows: Callable[[str], bool], seen: FleetFinds
    ) -> None:
        """Take over due jobs that fit the free slots `offers`, but no job that was on this node before.

        Raises:
            QueueError: the queue fails; the jobs in `seen` so far are ours.
        """
        free = list(offers)
        for task in self._queue.due(self._node_id, LOOKED_AT):
            if task.kind is not Kind.RUN:
                continue
            if records.known(task.job_id) or knows(task.job_id):
                if self._nobody_came(task) and self._take_back(records, task):
                    seen.returned.append(task.job_id)
                continue
            handover = _read(task)
            ticket = handover and ticket_for(handover[1])
            offer = next((offer for offer in free if ticket and fits(ticket, offer)), None)
            if handover and offer and self._take(records, task, handover[0]):
                free.remove(offer)
                seen.taken.append(task.job_id)

    def _take(self, records: Records, task: Task, handover: Handover) -> bool:
        began = clock.now()
        claim = self._queue.claim(Kind.RUN, task.job_id, self._node_id, self._lease_s)
        if claim is None:
            return False
        try:
            records.create(
                task.job_id,
                bytes(handover.manifest),
                lease=claim.token,
                origin=task.node,
                attempt=claim.task.attempts,
                started=handover.started,
            )
        except (RecordError, OSError) as error:
            events("agent").warning("cannot take job over", job_id=task.job_id, error=str(error))
            self._queue.put(task, PASS_ON_S, claim.token)
            return False
        self._tokens[task.job_id], self._until[task.job_id] = claim.token, began + self._lease_s
        events("agent").info("job taken over", job_id=task.job_id, node=task.node, reason=task.reason)
        return True

    def _nobody_came(self, task: Task) -> bool:
        since = self._offered.setdefault(task.job_id, clock.now())
        return task.node == self._node_id and clock.now() - since > GIVE_UP_S

    def _take_back(self, records: Records, task: Task) -> bool:
        try:
            with records.open(task.job_id) as job:
                state = job.state()
                claim = self._queue.claim(Kind.RUN, task.job_id, self._node_id, self._lease_s)
                if claim is None:
                    return False
                job.write_state(replace(state, lease=claim.token))
        except (RecordError, OSError) as error:
            events("agent").warning("cannot take job back", job_id=task.job_id, error=str(error))
            return False
        self._tokens[task.job_id] = claim.token
        return True

    def _task(self, job: JobDir, state: StateRecord, most: int, reason: str, *, started: bool) -> Task:
        handover = Handover(Raw(job.raw_manifest()), started)
        return Task(
            Kind.RUN,
            job.job_id,
            state.origin or self._node_id,
            attempts=state.attempt,
            max_attempts=most,
            reason=reason,
            payload=msgspec.json.encode(handover),
        )


def _read(task: Task) -> tuple[Handover, Manifest] | None:
    """Read a job that another node entered, and check the manifest like a manifest from a coordinator."""
    try:
        handover = msgspec.json.decode(task.payload, type=Handover)
        manifest = decode_manifest(msgspec.json.decode(handover.manifest))
    except (msgspec.DecodeError, ManifestError, UnicodeDecodeError, RecursionError) as error:
        events("agent").debug("fleet task not read", job_id=task.job_id, error=str(error))
        return None
    return (handover, manifest) if manifest.job_id == task.job_id else None
