"""A node's part in a fleet: its hold on jobs that may run again, and jobs that others cannot do or have lost.

What another node may have to take over is entered in the shared queue before it starts here, and ours as long
as we renew our lease. Whoever has lost it says nothing of the job any more: the other one does.
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
# What no other node has taken by then is reported by the node that could not do it.
GIVE_UP_S = 900.0
# Of a claim that came to nothing here, so that another node may have it.
PASS_ON_S = 5.0


class Handover(Struct, frozen=True):
    """What another node needs to take a job over: its manifest as it came, and whether it may have begun."""

    manifest: Raw
    started: bool


class FleetFinds(Struct, frozen=True):
    """What the queue had for us: jobs that are recorded here now, and our own that nobody else would take."""

    taken: list[str]
    returned: list[str]


class Fleet:
    """Its methods may be called from any thread."""

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
        """Raise QueueError where the queue may lose what it has."""
        self._queue.examine()

    def __contains__(self, job_id: str) -> bool:
        return job_id in self._tokens

    # --- our hold on a job ---------------------------------------------------------------------------------

    def recovered(self, leases: dict[str, str]) -> None:
        """Take note of the jobs that an earlier run of the node held; it may have lost them since."""
        self._tokens |= leases

    def hold(self, job: JobDir, manifest: Manifest) -> bool:
        """Enter a job that may run again when we are lost, before it starts; False: another node has it.

        Without the queue a new one goes on all the same, but nobody takes it over if this node dies.

        Raises:
            QueueError: it was entered before, our lease is over, and the queue does not say whose it is now.
            RecordError, OSError: the token cannot be recorded.
        """
        state = job.state()
        if not outlives_its_node(manifest.retry) and state.lease is None:
            return True
        entered = state.lease is not None
        token = state.lease or secrets.token_hex(16)
        if not entered:
            # First: a crash right after the entry must not leave us without the token.
            state = job.write_state(replace(state, lease=token))
        # Whoever finds the lease run out cannot know how far it has come here.
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
        """Whether we may still speak for a job: our lease on it was never lost.

        Raises:
            QueueError: the queue does not say, and what it said last holds no more.
            CoordinatorError: the queue does not know our lease, and the coordinator does not say.
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
        # Another node may have it, or have done it; or the queue has lost what it knew.
        return self._belongs(state.job_id)

    def _belongs(self, job_id: str) -> bool:
        """Ask the coordinator whether a job is ours, as it was when it was acknowledged."""
        try:
            self._coordinator.ack(job_id)
        except Gone:
            return False
        except Refused:
            return True  # whatever it has against the question; a report is answered for itself
        return True

    def renew(self, lost: list[str]) -> None:
        """Renew all our leases; the jobs that another node has by now are appended to `lost`.

        Raises:
            QueueError: the queue does not answer; what was found before counts.
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
                continue  # as long as nobody says that it is another's, it goes on
            if self._tokens.pop(job_id, None) is not None and not ours:
                lost.append(job_id)

    def done(self, state: StateRecord) -> None:
        """Let go of a job that is reported, or never was ours; without the queue, when it is back."""
        self._tokens.pop(state.job_id, None)
        if state.lease is None:
            return
        try:
            self._queue.remove(Kind.RUN, state.job_id, state.lease)
        except QueueError:
            self._done[state.job_id] = state.lease

    def requeue(self, job_id: str) -> bool:
        """Have a job whose last attempt was lost with its node tried anew; False when there is none."""
        return self._queue.requeue(Kind.RUN, job_id) is not None

    # --- between nodes -------------------------------------------------------------------------------------

    def hand_on(self, job: JobDir, outcome: Outcome, most: int) -> bool:
        """Let another node try; False when one has the job already.

        Raises:
            QueueError: the queue does not take it.
            RecordError, OSError: the record cannot be read.
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
        """Take over what waits for a node and fits the free slots `offers`; not what was here before.

        Raises:
            QueueError: the queue does not answer; what is in `seen` by then is ours.
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
    """Read what another node has left, and check it like what comes from a coordinator."""
    try:
        handover = msgspec.json.decode(task.payload, type=Handover)
        manifest = decode_manifest(msgspec.json.decode(handover.manifest))
    except (msgspec.DecodeError, ManifestError, UnicodeDecodeError, RecursionError) as error:
        events("agent").debug("task of the fleet not read", job_id=task.job_id, error=str(error))
        return None
    return (handover, manifest) if manifest.job_id == task.job_id else None
