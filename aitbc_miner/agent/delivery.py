"""Sends one report of a job, and records the coordinator's answer.

The outcome is on disk before the first report, and stays on disk until the coordinator has accepted it.
"""

from collections.abc import Callable

from msgspec import Struct
from msgspec.structs import replace

from aitbc_miner.agent.outcomes import CALLED_FAILED, REFUSED, outcome_of
from aitbc_miner.config.settings import GiveUp
from aitbc_miner.coordinator.interface import Coordinator, Gone, Refused, Told
from aitbc_miner.coordinator.service_result import FileChanged
from aitbc_miner.errors import ErrorCode
from aitbc_miner.identity.receipts import Receipt
from aitbc_miner.ipc.messages import JobSettled
from aitbc_miner.jobs import FINAL, Outcome, State, StateRecord
from aitbc_miner.store.records import JobDir, RecordError, Records, pretty
from aitbc_miner.util import clock
from aitbc_miner.util.log import events
from aitbc_miner.util.system import boot_id

# For these jobs of a fleet, another node sends the report, even if this node gets the job again.
OTHERS = frozenset({"lost", "handed_on"})
GIVE_UP = GiveUp()


class Delivered(Struct, frozen=True):
    """A settled report: `how` is `accepted`, `superseded` or `refused`; or `lost`, without a report.

    `state` is the job's last state. `beat`: the coordinator counts the job as ours until our next heartbeat.
    """

    job_id: str
    outcome: Outcome
    how: str
    state: StateRecord
    receipt: Receipt | None = None
    beat: bool = False


def deliver(
    records: Records,
    coordinator: Coordinator,
    node_id: str,
    job_id: str,
    is_ours: Callable[[StateRecord], bool] = lambda _: True,
    give_up: GiveUp = GIVE_UP,
    outcome: Outcome | None = None,
) -> Delivered:
    """Send one job's report, and record that the coordinator accepted it.

    The key is the same for each attempt to send the same report, so that the coordinator recognises a
    repetition. If `is_ours` denies a job, another node has taken the job over and reports it. `outcome` is
    the job's outcome if the caller has read it already.

    Raises:
        CoordinatorError, QueueError: not accepted now; try again. Also raised for a refusal before `give_up`.
        RecordError, OSError: a record is unreadable or unwritable.
    """
    with records.open(job_id) as job:
        outcome = outcome or outcome_of(job, JobSettled(job_id, "its record has no outcome"))
        state = job.state()
        told = Told()
        if state.state in FINAL and state.delivery in OTHERS:
            how = state.delivery
        elif state.state in FINAL:
            how, told = _send_again(coordinator, node_id, job, outcome)
        elif not is_ours(state):
            how = "lost"
            job.move(State.UPLOADING)
            state = job.move(State.FAILED, delivery=how)
        else:
            outcome, how, told = _send_first(coordinator, node_id, job, state, outcome, give_up)
            state = job.move(State.DONE if outcome.ok else State.FAILED, delivery=how)
    return Delivered(job_id, outcome, how, state, told.receipt, told.beat or how == "superseded")


def _keep(job: JobDir, receipt: Receipt | None) -> None:
    try:
        if receipt is not None:
            job.write_receipt(receipt)
    except (OSError, ValueError, RecordError) as error:
        # The coordinator pays the job without our copy. An error here would send the result once more.
        events("agent").error("receipt not kept", job_id=job.job_id, error=str(error))


def _send_first(
    coordinator: Coordinator, node_id: str, job: JobDir, state: StateRecord, outcome: Outcome, give_up: GiveUp
) -> tuple[Outcome, str, Told]:
    # Written once: on a full disk, each writing uses up a piece of the reserve.
    if not (again := state.state is State.UPLOADING):
        job.move(State.UPLOADING)
    outcome, how, told = _send_or_refuse(coordinator, node_id, job, outcome, give_up, again=again)
    if how == "superseded" and outcome.ok and state.delivery == CALLED_FAILED:
        outcome = _as_failed(job, outcome, "the coordinator keeps the earlier report of a failure")
    return outcome, how, told


def _send_or_refuse(
    coordinator: Coordinator, node_id: str, job: JobDir, outcome: Outcome, give_up: GiveUp, *, again: bool
) -> tuple[Outcome, str, Told]:
    """Send a report. If the coordinator refuses a result for good, report the job as failed (E_UPLOAD)."""
    try:
        return outcome, *_send(coordinator, node_id, job, outcome, again=again)
    except (Refused, FileChanged) as error:
        if isinstance(error, Refused):
            # The count is on disk, so that a node with many restarts gives up, too.
            refusals = job.state().refusals.another(clock.now(), boot_id())
            job.move(State.UPLOADING, refusals=refusals)
            if refusals.times < give_up.refusals or refusals.over_s < give_up.over_s:
                raise
        if not outcome.ok:
            return outcome, "refused", Told()
        failed = _as_failed(job, outcome, str(error))
    try:
        return failed, *_send(coordinator, node_id, job, failed, again=again)
    except Refused:
        return failed, "refused", Told()


def _as_failed(job: JobDir, outcome: Outcome, why: str) -> Outcome:
    """Write an E_UPLOAD as outcome, and keep the refused outcome beside it for a further attempt."""
    job.write(REFUSED, pretty(outcome))
    failed = replace(outcome, code=ErrorCode.E_UPLOAD, message=why)
    job.write_outcome(failed)
    return failed


def _send_again(coordinator: Coordinator, node_id: str, job: JobDir, outcome: Outcome) -> tuple[str, Told]:
    """Send a settled report again for a coordinator that has forgotten it; the record does not change."""
    try:
        return _send(coordinator, node_id, job, outcome, again=True)
    except (Refused, FileChanged):
        return "refused", Told()


def _send(
    coordinator: Coordinator, node_id: str, job: JobDir, outcome: Outcome, *, again: bool
) -> tuple[str, Told]:
    try:
        if outcome.ok:
            key = f"result:{node_id}:{job.job_id}"
            told = coordinator.result(job.job_id, outcome, job.path, key, again=again)
            _keep(job, told.receipt)
            return "accepted", told
        return "accepted", coordinator.fail(job.job_id, outcome, f"fail:{node_id}:{job.job_id}", again=again)
    except Gone:
        # The job is final at the coordinator, or another node has it. No report is needed.
        return "superseded", Told()
