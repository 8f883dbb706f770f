"""From the coordinator's hand to a job that is ready for a slot: record → check → acknowledge → inputs.

Each step is recorded before the next begins, so a restart goes on where this one stopped.
"""

import hashlib
import shutil
import threading
from collections.abc import Sequence
from functools import partial

import msgspec
from msgspec import Struct

from aitbc_miner.agent.context import AgentContext
from aitbc_miner.agent.fleet import Fleet
from aitbc_miner.agent.outcomes import conclude
from aitbc_miner.coordinator.interface import (
    Busy,
    CoordinatorError,
    Gone,
    PulledJob,
    Refused,
    Unauthorized,
    Unreachable,
)
from aitbc_miner.errors import ErrorCode, JobError
from aitbc_miner.inputs.fetch import InputLimits, fetch_inputs
from aitbc_miner.jobs import Manifest, ManifestError, Outcome, State, StateRecord, decode_manifest
from aitbc_miner.slots.placement import Offer, Ticket, refuse_hopeless, ticket_for
from aitbc_miner.store.records import BUILDING, JobDir, RecordError
from aitbc_miner.store.reserve import disk_error
from aitbc_miner.util import clock
from aitbc_miner.util.backoff import Backoff
from aitbc_miner.util.log import events

MB = 1_000_000
RESUMABLE = frozenset({State.PULLED, State.ACKED, State.RETRY_WAIT})
# A transfer that has brought nothing for this long is broken off and resumed.
STALL_S = 30.0
INPUTS_TIMEOUT_S = 3600.0
# A coordinator that is there and for so long has not let itself be told of a job will not have it taken.
ACK_GIVE_UP_S = 600.0
ACK_RETRY_MIN_S = 0.5


class Taken(Struct, frozen=True):
    """What became of a pulled job: a ticket for a slot, a report to send, or it is gone (not ours).

    None of these: it is in a slot already.
    """

    job_id: str
    ticket: Ticket | None = None
    report: bool = False
    gone: bool = False


class Stopping(Exception):  # noqa: N818  # says what happened
    """The node is stopping; the job's record says where to go on."""


class _TakenOver(Exception):  # noqa: N818  # says what happened
    """Another node of the fleet has the job."""


class _NeverOurs(Exception):  # noqa: N818  # says what happened
    """The coordinator is there, and has not taken our word for this job in a long time."""


class Admission:
    """Takes pulled jobs in. Its methods run in threads, several at a time, each for another job."""

    def __init__(self, context: AgentContext, fleet: Fleet | None, stopping: threading.Event) -> None:
        self._context = context
        self._config = context.config
        self._records = context.records
        self._coordinator = context.coordinator
        self._fleet = fleet
        self._stopping = stopping

    def take(
        self, pulled: PulledJob, job_id: str, offers: Sequence[Offer], cancelled: threading.Event
    ) -> Taken:
        """Take a job that was just pulled."""
        self._records.create(job_id, pulled.raw or b"{}\n")
        if pulled.error is not None:
            with self._records.open(job_id) as job:
                return self._refuse(job, JobError(pulled.error.code, str(pulled.error)))
        return self.resume(job_id, offers, cancelled)

    def resume(self, job_id: str, offers: Sequence[Offer], cancelled: threading.Event) -> Taken:
        """Go on with a job from the step that its record names; `cancelled` ends it."""
        with self._records.open(job_id) as job:
            if (state := job.state()).state is State.RETRY_WAIT:
                job.drop_stale_outcome(state)
            if state.state not in RESUMABLE or job.has_outcome():
                # It was in a slot already, and has come further since the agent read the records.
                return Taken(job_id, report=job.has_outcome())
            try:
                return Taken(job_id, self._take_in(job, offers, cancelled))
            except JobError as error:
                if error.code is ErrorCode.E_CANCELLED and not cancelled.is_set():
                    raise Stopping from error
                return self._refuse(job, error)
            except (Gone, _NeverOurs):
                self._forget(job)
            except _TakenOver as error:
                # It must not run here, and there is nobody to tell.
                job.move(State.FAILED, delivery="lost", note=str(error))
        return Taken(job_id, gone=True)

    def _take_in(self, job: JobDir, offers: Sequence[Offer], cancelled: threading.Event) -> Ticket:
        """Check, acknowledge, fetch; check also what was acknowledged before: the slots may be others now.

        Raises:
            JobError: it cannot be done here. Gone, _NeverOurs, _TakenOver: it is not ours.
            QueueError, CoordinatorError: nobody says now whether it still is.
        """
        manifest = _read_manifest(job)
        ticket = ticket_for(manifest, clock.now())
        hopeless: JobError | None = None
        try:
            refuse_hopeless(ticket, offers)
        except JobError as error:
            if self._fleet is None:
                raise
            # Another node may do it, if only it is accepted.
            hopeless = error
        state = job.state()
        if state.state is State.PULLED:
            self._acknowledge(job, manifest.runner)
        elif self._fleet is not None and not self._fleet.is_ours(state):
            self._acknowledge_again(state)
        self._context.background.post(partial(self._acknowledged, job.job_id, manifest.runner))
        if self._fleet is not None and not self._fleet.hold(job, manifest):
            raise _TakenOver("another node of the fleet has it")
        if hopeless is not None:
            raise hopeless
        self._fetch(job, manifest, cancelled)
        return ticket

    def refuse_nameless(self, job_id: str, why: str) -> None:
        """Refuse a job whose id may not touch the file system: told once, recorded in the log alone."""
        log = events("agent")
        log.warning("manifest refused", claimed_id=ascii(job_id)[:200], error=why)
        outcome = Outcome(job_id=job_id, code=ErrorCode.E_MANIFEST, message=why)
        key = hashlib.sha256(job_id.encode("utf-8", "replace")).hexdigest()
        try:
            self._coordinator.fail(job_id, outcome, f"fail:{self._config.node_id}:{key}")
        except CoordinatorError as error:
            log.warning("refusal not delivered", error=str(error))
        except Exception as error:
            # Whatever is so odd about it: nothing else depends on this job.
            log.exception("refusal not delivered", error=str(error))

    def _acknowledge_again(self, state: StateRecord) -> None:
        """Have the coordinator say whose a job is that the queue does not know as ours.

        Another node may have it, or have done it and left nothing there; or it was never entered.
        """
        try:
            self._coordinator.ack(*_ack_ids(state))
        except Gone as error:
            raise _TakenOver("another node of the fleet has done it") from error
        except Refused as error:
            # Whatever it has against the question; a report is answered for itself.
            events("agent").warning("question not answered", job_id=state.job_id, error=str(error))

    def _acknowledge(self, job: JobDir, runner: str) -> None:
        backoff = Backoff(ACK_RETRY_MIN_S, self._config.heartbeat.backoff.max_s)
        ids = _ack_ids(job.state())
        since: float | None = None
        refusals, give_up = 0, self._config.coordinator.give_up
        while True:
            try:
                self._coordinator.ack(*ids)
            except Gone:
                raise
            except CoordinatorError as error:
                # Only a coordinator that can be reached says something about the job with its refusal.
                since = None if isinstance(error, Unreachable) else since or clock.now()
                refusals += isinstance(error, Refused)
                for_s = clock.now() - since if since is not None else 0.0
                refused = refusals >= give_up.refusals and for_s >= give_up.over_s
                if refused or for_s > ACK_GIVE_UP_S or (isinstance(error, Refused) and error.status == 404):
                    events("agent").warning("job given up", job_id=job.job_id, error=str(error))
                    raise _NeverOurs from error
                pause_s = backoff.next()
                if isinstance(error, Unauthorized):
                    # Another token may be there at any moment.
                    self._context.background.post(self._context.token.refused)
                    pause_s = min(pause_s, self._config.coordinator.poll_interval_s)
                asked = error.retry_after if isinstance(error, Busy) else None
                if self._stopping.wait(max(pause_s, asked or 0.0)):
                    raise Stopping from error
            else:
                job.move(State.ACKED, runner=runner)
                return

    def _acknowledged(self, job_id: str, runner: str) -> None:
        """Note that a job is ours; in the main thread."""
        self._context.jobs.acknowledge(job_id)
        self._context.show(job_id, State.ACKED, runner=runner)

    def _forget(self, job: JobDir) -> None:
        """Drop a job that is not ours and was never started: it may be handed to this node once more."""
        if self._fleet is not None:
            self._fleet.done(job.state())
        # Renamed first: what a crash leaves half removed must not be taken for a job.
        gone = self._records.root / f"{BUILDING}{job.job_id}"
        shutil.rmtree(gone, ignore_errors=True)
        job.path.rename(gone)
        shutil.rmtree(gone)

    def _fetch(self, job: JobDir, manifest: Manifest, cancelled: threading.Event) -> None:
        into = job.path / "input"
        # Of an attempt that was broken off by a restart, perhaps right after this very line.
        shutil.rmtree(into, ignore_errors=True)
        # No other job's user may read them while this job waits.
        try:
            into.mkdir(mode=0o700)
        except OSError as error:
            raise disk_error(error, job.fd, "take the inputs") from error
        most = self._config.coordinator.max_input_mb * MB
        fetch_inputs(
            manifest,
            into,
            limits=InputLimits(int(most), int(most), INPUTS_TIMEOUT_S, STALL_S),
            cancelled=lambda: cancelled.is_set() or self._stopping.is_set(),
            allow_private=self._config.coordinator.allow_private_inputs,
            proxy=self._context.input_proxy,
        )

    def _refuse(self, job: JobDir, error: JobError) -> Taken:
        conclude(job, error.code, error.message)
        return Taken(job.job_id, report=True)


def _ack_ids(state: StateRecord) -> list[str]:
    """Name the job, and who held it until now, where that was another node of the fleet."""
    return [state.job_id] if state.origin is None else [state.job_id, state.origin]


def _read_manifest(job: JobDir) -> Manifest:
    """Read the manifest from disk and check it like one that has just come. Raises JobError, E_MANIFEST."""
    try:
        return decode_manifest(msgspec.to_builtins(job.manifest()))
    except (RecordError, ManifestError) as error:
        raise JobError(ErrorCode.E_MANIFEST, str(error)) from error
