"""From the coordinator's hand to a job that is ready for a slot: record → check → acknowledge → inputs.

Each step is recorded before the next begins, so a restart goes on where this one stopped.
"""

import hashlib
import shutil
import threading
from collections.abc import Callable, Sequence

from msgspec import Struct

from aitbc_miner.config import Config
from aitbc_miner.coordinator import (
    Busy,
    Coordinator,
    CoordinatorError,
    Gone,
    PulledJob,
    Refused,
    Unauthorized,
)
from aitbc_miner.errors import ErrorCode, JobError
from aitbc_miner.inputs import InputLimits, fetch_inputs
from aitbc_miner.jobs import Manifest, Outcome, State
from aitbc_miner.messages import Offer, Ticket
from aitbc_miner.placing import refuse_hopeless
from aitbc_miner.records import BUILDING, JobDir, Records
from aitbc_miner.util import clock
from aitbc_miner.util.backoff import Backoff
from aitbc_miner.util.log import events

MB = 1_000_000
# A transfer that has brought nothing for this long is broken off and resumed.
STALL_S = 30.0
INPUTS_TIMEOUT_S = 3600.0


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


class Intake:
    """Takes pulled jobs in. Its methods run in threads, several at a time, each for another job."""

    def __init__(
        self,
        config: Config,
        records: Records,
        coordinator: Coordinator,
        stopping: threading.Event,
        unauthorized: Callable[[], None],
    ) -> None:
        self._config = config
        self._records = records
        self._coordinator = coordinator
        self._stopping = stopping
        self._unauthorized = unauthorized

    def take(self, pulled: PulledJob, job_id: str, offers: Sequence[Offer]) -> Taken:
        """Take a job that was just pulled."""
        self._records.create(job_id, pulled.raw or b"{}\n")
        if pulled.error is not None:
            return self._refuse(job_id, JobError(ErrorCode.E_MANIFEST, str(pulled.error)))
        return self.resume(job_id, offers)

    def resume(self, job_id: str, offers: Sequence[Offer]) -> Taken:
        """Go on with a job from the step that its record names."""
        with self._records.open(job_id) as job:
            if job.state().state not in {State.PULLED, State.ACKED} or job.has_outcome():
                # It was in a slot already, and has come further since the agent read the records.
                return Taken(job_id, report=job.has_outcome())
            manifest = job.manifest()
            ticket = Ticket(job_id, manifest.runner, manifest.requirements, manifest.priority, clock.now())
            try:
                if job.state().state is State.PULLED:
                    refuse_hopeless(ticket, offers)
                    self._acknowledge(job)
                self._fetch(job, manifest)
            except JobError as error:
                return self._refuse(job_id, error)
            except Gone:
                self._forget(job)
                return Taken(job_id, gone=True)
            except Refused as error:
                # Never acknowledged: it must not run, and there is nobody to tell.
                job.move(State.FAILED, delivery="superseded", note=str(error))
                return Taken(job_id, gone=True)
        return Taken(job_id, ticket)

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

    def _acknowledge(self, job: JobDir) -> None:
        backoff = Backoff(0.5, self._config.heartbeat.backoff.max_s)
        while True:
            try:
                self._coordinator.ack(job.job_id)
            except CoordinatorError as error:
                if not error.retryable:
                    raise
                if isinstance(error, Unauthorized):
                    self._unauthorized()
                asked = error.retry_after if isinstance(error, Busy) else None
                if self._stopping.wait(max(backoff.next(), asked or 0.0)):
                    raise Stopping from error
            else:
                job.move(State.ACKED)
                return

    def _forget(self, job: JobDir) -> None:
        """Drop a job that is not ours and was never started: it may be handed to this node once more."""
        # Renamed first: what a crash leaves half removed must not be taken for a job.
        gone = self._records.root / f"{BUILDING}{job.job_id}"
        shutil.rmtree(gone, ignore_errors=True)
        job.path.rename(gone)
        shutil.rmtree(gone)

    def _fetch(self, job: JobDir, manifest: Manifest) -> None:
        into = job.path / "input"
        # Of an attempt that was broken off by a restart.
        shutil.rmtree(into)
        into.mkdir(mode=0o755)
        into.chmod(0o755)
        most = self._config.coordinator.max_input_mb * MB
        fetch_inputs(
            manifest,
            into,
            limits=InputLimits(int(most), int(most), INPUTS_TIMEOUT_S, STALL_S),
            cancelled=self._stopping.is_set,
            allow_private=self._config.coordinator.allow_private_inputs,
        )

    def _refuse(self, job_id: str, error: JobError) -> Taken:
        if error.code is ErrorCode.E_CANCELLED and self._stopping.is_set():
            raise Stopping from error
        with self._records.open(job_id) as job:
            job.write_outcome(
                Outcome(job_id=job_id, code=error.code, message=error.message, finished_wall=clock.wall())
            )
            job.move(State.UPLOADING)
        return Taken(job_id, report=True)
