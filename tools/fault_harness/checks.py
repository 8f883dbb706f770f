"""Checks after a campaign: the coordinator's ledger, the node's records and the machine."""

from collections.abc import Iterator
from pathlib import Path

from msgspec import Struct

from aitbc_miner.errors import ErrorCode
from aitbc_miner.jobs import BROKEN, FINAL, State, StateRecord
from aitbc_miner.store.records import RecordError, Records
from tools.fault_harness.jobs import Kind
from tools.fault_harness.node import FaultNode
from tools.mock.bootstrap import records as mock_records
from tools.mock.bootstrap.coordinator import MockCoordinator
from tools.mock.bootstrap.records import Job, Verdict

KINDS = ("lost", "doubled", "run twice", "wrong", "orphans", "broken", "defects")
# Said by the node of itself, in its log; nothing that a kill may bring about.
DEFECTS = ("Traceback", "message not taken", "IllegalMove", "job failed without an outcome")
# With a disk that fails, these too are honest endings.
OF_THE_DISK = frozenset({ErrorCode.E_DISK, ErrorCode.E_INTERNAL})


class Finding(Struct, frozen=True):
    """A failed check."""

    kind: str
    what: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.what}"


class Fates(Struct):
    """The jobs that kills affected.

    at_risk: jobs of killed workers, which may be lost. doomed: jobs that must be lost.
    """

    at_risk: set[str]
    doomed: set[str]


def check(
    mock: MockCoordinator, node: FaultNode, kinds: dict[str, Kind], fates: Fates, *, disk: bool
) -> list[Finding]:
    """Make all checks, after the node has stopped and all jobs had time to end."""
    findings: list[Finding] = []
    for job_id, kind in kinds.items():
        job = mock.job(job_id)
        findings += check_job(job, kind, len(node.runs(job_id)), fates, disk=disk)
    strays = {report.job_id for report in mock.ledger.strays()}
    findings += [Finding("wrong", f"{job_id} was reported, and is no job") for job_id in sorted(strays)]
    findings += check_records(node.jobs, mock)
    findings += [Finding("orphans", left) for left in node.remains()]
    findings += check_log(node.log)
    return findings


def check_job(job: Job, kind: Kind, runs: int, fates: Fates, *, disk: bool = False) -> Iterator[Finding]:
    """Compare a job's end with its permitted ends."""
    name = job.job_id
    accepted = [report for report in job.reports if report.verdict is Verdict.ACCEPTED]
    others = [report for report in job.reports if report.verdict not in {Verdict.ACCEPTED, Verdict.DUPLICATE}]
    if runs > kind.attempts:
        yield Finding("run twice", f"{name} was run {runs} times")
    if not accepted:
        yield Finding("lost", f"{name} is {job.state} at the coordinator, acknowledged {job.acks} times")
        return
    if len(accepted) > 1:
        yield Finding("doubled", f"{name} has {len(accepted)} accepted reports")
    for report in others:
        yield Finding("doubled", f"{name}: a second {report.kind} was {report.verdict}: {report.complaint}")
    code = ErrorCode(job.error_code) if job.error_code else None
    if code is None and runs == 0:
        yield Finding("wrong", f"{name} has a result and was never run")
    allowed = kind.endings | (OF_THE_DISK if disk else set())
    if kind.attempts > 1 and (disk or name in fates.at_risk):
        # A kill, or a disk that does not take the decision, may cost it an attempt that was due to it.
        allowed |= {ErrorCode.E_EXIT}
    if code is ErrorCode.E_LOST:
        if name not in fates.at_risk:
            yield Finding("wrong", f"{name} is E_LOST, and nobody killed its worker")
    elif name in fates.doomed and not job.cancelled:
        yield Finding("wrong", f"{name} ended with {code or 'OK'}, and its worker was killed in the middle")
    elif code not in allowed:
        said = accepted[0].body.get("error_msg")
        yield Finding("wrong", f"{name} ended with {code or 'OK'}: {said}")


def check_records(root: Path, mock: MockCoordinator) -> Iterator[Finding]:
    """Check that every record of the node is readable."""
    broken = root / BROKEN
    for entry in sorted(broken.iterdir()) if broken.exists() else ():
        yield Finding("broken", f"set aside: {entry.name}")
    records = Records(root)
    for job_id in records.ids():
        found = records.state_of(job_id)
        if not isinstance(found, StateRecord):
            yield Finding("broken", str(found))
            continue
        job = mock.job(job_id)
        superseded = found.delivery == "superseded"
        if found.state not in FINAL:
            yield Finding("lost", f"{job_id} is {found.state} in its record, {job.state} at the coordinator")
        elif not superseded and (found.state is State.DONE) != (job.state is mock_records.State.DONE):
            yield Finding("wrong", f"{job_id} is {found.state} in its record, {job.state} at the coordinator")
        try:
            with records.open(job_id) as directory:
                directory.manifest()
                directory.outcome()
        except RecordError as error:
            yield Finding("broken", str(error))


def check_log(path: Path) -> Iterator[Finding]:
    """Find the defects that the node has logged."""
    with path.open(errors="replace") as lines:
        for number, line in enumerate(lines, 1):
            if "broken record" in line:
                yield Finding("broken", f"{path}:{number}: {line.strip()[:300]}")
            elif any(sign in line for sign in DEFECTS):
                yield Finding("defects", f"{path}:{number}: {line.strip()[:300]}")
