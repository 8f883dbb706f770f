"""Admits a pulled job: record → check → acknowledge → fetch the inputs. Then the job is ready for a slot.

Each step is on disk before the next step begins, so the agent can resume after a restart.
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
from aitbc_miner.agent.job_table import JobEntry
from aitbc_miner.agent.outcomes import conclude, declare
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

RESUMABLE = frozenset({State.PULLED, State.ACKED, State.RETRY_WAIT})
# After this time without a byte, the node breaks off a transfer and resumes it.
STALL_S = 30.0
INPUTS_TIMEOUT_S = 3600.0
# If a reachable coordinator has not accepted the acknowledgement for this time, the node gives the job up.
ACK_GIVE_UP_S = 600.0
ACK_RETRY_MIN_S = 0.5
LOOK_S = 1.0
"""The longest time until a stop or a cancellation ends the wait between two acknowledgements."""


class Taken(Struct, frozen=True):
    """The result of an admission: a ticket for a slot, a report to send, or `gone` (the job is not ours).

    With none of the three, the job is in a slot already.
    """

    job_id: str
    ticket: Ticket | None = None
    report: bool = False
    gone: bool = False


class Stopping(Exception):  # noqa: N818  # says what happened
    """The node is stopping; the job's record holds the step to resume at."""


class _TakenOver(Exception):  # noqa: N818  # says what happened
    """Another node of the fleet has the job."""


class _NeverOurs(Exception):  # noqa: N818  # says what happened
    """The reachable coordinator has not accepted our acknowledgement of the job for a long time."""


class Admission:
    """Admits pulled jobs. The methods run in several threads at a time, each thread with its own job."""

    def __init__(self, context: AgentContext, fleet: Fleet | None, stopping: threading.Event) -> None:
        self._context = context
        self._config = context.config
        self._records = context.records
        self._coordinator = context.coordinator
        self._fleet = fleet
        self._stopping = stopping

    def take(self, pulled: PulledJob, job_id: str, offers: Sequence[Offer], entry: JobEntry) -> Taken:
        """Admit a job that was just pulled."""
        self._records.create(job_id, pulled.raw or b"{}\n")
        if pulled.error is not None:
            with self._records.open(job_id) as job:
                return self._refuse(job, JobError(pulled.error.code, str(pulled.error)))
        return self.resume(job_id, offers, entry)

    def resume(self, job_id: str, offers: Sequence[Offer], entry: JobEntry) -> Taken:
        """Continue the admission of a job at the step in its record; `entry.cancel` ends the admission."""
        with self._records.open(job_id) as job:
            if (state := job.state()).state is State.RETRY_WAIT:
                job.drop_stale_outcome(state)
            if state.state not in RESUMABLE or job.has_outcome():
                # The job is in a slot already: its worker moved the job on after the agent read the records.
                return Taken(job_id, report=job.has_outcome())
            try:
                return Taken(job_id, self._take_in(job, offers, entry))
            except JobError as error:
                if error.code is not ErrorCode.E_CANCELLED:
                    return self._refuse(job, error)
                if entry.cancel is None:
                    raise Stopping from error
                declare(job, entry.cancel)
                return Taken(job_id, report=True)
            except (Gone, _NeverOurs):
                self._forget(job)
            except _TakenOver as error:
                # The job must not run here, and the coordinator expects no report from this node.
                job.move(State.FAILED, delivery="lost", note=str(error))
        return Taken(job_id, gone=True)

    def _take_in(self, job: JobDir, offers: Sequence[Offer], entry: JobEntry) -> Ticket:
        """Check, acknowledge, fetch. An acknowledged job is checked again: the slots may have changed.

        Raises:
            JobError: the job fails here, by its manifest, its inputs, the slots, the disk or a cancellation.
            Gone, _NeverOurs, _TakenOver: the job is not ours.
            QueueError, CoordinatorError: the call failed, so nobody can say whether the job is still ours.
        """
        manifest = _read_manifest(job)
        ticket = ticket_for(manifest, clock.now())
        hopeless: JobError | None = None
        try:
            refuse_hopeless(ticket, offers)
        except JobError as error:
            if self._fleet is None:
                raise
            # Another node may do the job, but this node must acknowledge it first.
            hopeless = error
        state = job.state()
        if state.state is State.PULLED:
            self._acknowledge(job, manifest.runner, entry)
        elif self._fleet is not None and not self._fleet.is_ours(state):
            self._acknowledge_again(state)
        self._context.background.post(partial(self._acknowledged, job.job_id, manifest.runner))
        if self._fleet is not None and not self._fleet.hold(job, manifest):
            raise _TakenOver("another node of the fleet has the job")
        if hopeless is not None:
            raise hopeless
        self._fetch(job, manifest, entry)
        return ticket

    def refuse_nameless(self, job_id: str, why: str) -> None:
        """Refuse a job whose id must not be a file name: report once, and record the job in the log only."""
        log = events("agent")
        log.warning("manifest refused", claimed_id=ascii(job_id)[:200], error=why)
        outcome = Outcome(job_id=job_id, code=ErrorCode.E_MANIFEST, message=why)
        key = hashlib.sha256(job_id.encode("utf-8", "replace")).hexdigest()
        try:
            self._coordinator.fail(job_id, outcome, f"fail:{self._config.node_id}:{key}")
        except CoordinatorError as error:
            log.warning("refusal not delivered", error=str(error))
        except Exception as error:
            # The id may be arbitrarily odd, and nothing else depends on this job.
            log.exception("refusal not delivered", error=str(error))

    def _acknowledge_again(self, state: StateRecord) -> None:
        """Ask the coordinator whether a job is ours, because the queue does not know our lease.

        Another node may have the job, or may have finished and removed it; or this node never entered it.
        """
        try:
            self._coordinator.ack(*_ack_ids(state))
        except Gone as error:
            raise _TakenOver("another node of the fleet has finished the job") from error
        except Refused as error:
            # A refused question says nothing about the job. The coordinator will answer the report.
            events("agent").warning("ownership of job not confirmed", job_id=state.job_id, error=str(error))

    def _acknowledge(self, job: JobDir, runner: str, entry: JobEntry) -> None:
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
                # Only the refusal of a reachable coordinator counts.
                since = None if isinstance(error, Unreachable) else since or clock.now()
                refusals += isinstance(error, Refused)
                for_s = clock.now() - since if since is not None else 0.0
                refused = refusals >= give_up.refusals and for_s >= give_up.over_s
                if refused or for_s > ACK_GIVE_UP_S or (isinstance(error, Refused) and error.status == 404):
                    events("agent").warning("job given up", job_id=job.job_id, error=str(error))
                    raise _NeverOurs from error
                pause_s = backoff.next()
                if isinstance(error, Unauthorized):
                    # The heartbeat may send a new token at any moment.
                    self._context.background.post(self._context.token.refused)
                    pause_s = min(pause_s, self._config.coordinator.poll_interval_s)
                asked = error.retry_after if isinstance(error, Busy) else None
                left_s = max(pause_s, asked or 0.0)
                while left_s > 0:
                    if self._stopping.wait(min(left_s, LOOK_S)) or entry.cancel:
                        # A cancelled job is reported: the coordinator may have received an acknowledgement.
                        raise JobError(ErrorCode.E_CANCELLED, "the job is not acknowledged") from error
                    left_s -= LOOK_S
            else:
                job.move(State.ACKED, runner=runner)
                return

    def _acknowledged(self, job_id: str, runner: str) -> None:
        """Note that the coordinator counts a job as ours; runs in the main thread."""
        self._context.jobs.acknowledge(job_id)
        self._context.show(job_id, State.ACKED, runner=runner)

    def _forget(self, job: JobDir) -> None:
        """Remove a job that is not ours and never started: the coordinator may hand it to this node again."""
        if self._fleet is not None:
            self._fleet.done(job.state())
        # Renamed first: after a crash, nobody must take a half removed directory for a job.
        gone = self._records.root / f"{BUILDING}{job.job_id}"
        shutil.rmtree(gone, ignore_errors=True)
        job.path.rename(gone)
        shutil.rmtree(gone)

    def _fetch(self, job: JobDir, manifest: Manifest, entry: JobEntry) -> None:
        into = job.path / "input"
        # An earlier fetch, interrupted by a restart, may have left files.
        shutil.rmtree(into, ignore_errors=True)
        # While this job waits, no user of a different job may read the inputs.
        try:
            into.mkdir(mode=0o700)
        except OSError as error:
            raise disk_error(error, job.fd, "make the directory of the inputs") from error
        most = int(self._config.coordinator.max_input_mb * 1_000_000)
        fetch_inputs(
            manifest,
            into,
            limits=InputLimits(most, most, INPUTS_TIMEOUT_S, STALL_S),
            cancelled=lambda: bool(entry.cancel) or self._stopping.is_set(),
            allow_private=self._config.coordinator.allow_private_inputs,
            proxy=self._context.input_proxy,
        )

    def _refuse(self, job: JobDir, error: JobError) -> Taken:
        conclude(job, error.code, error.message)
        return Taken(job.job_id, report=True)


def _ack_ids(state: StateRecord) -> list[str]:
    """Give the job's id, and the id of the fleet's node that held the job before, if any."""
    return [state.job_id] if state.origin is None else [state.job_id, state.origin]


def _read_manifest(job: JobDir) -> Manifest:
    """Read the manifest from disk, and check it like a new manifest. Raises JobError, E_MANIFEST."""
    try:
        return decode_manifest(msgspec.to_builtins(job.manifest()))
    except (RecordError, ManifestError) as error:
        raise JobError(ErrorCode.E_MANIFEST, str(error)) from error
