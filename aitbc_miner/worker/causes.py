"""Finds the cause of a job's end by evidence: our record, the kernel's counters, the disk, the exit.

No cause is guessed. For example, exit status 137 proves no lack of memory; only the kernel's count of killed
processes does.
"""

import signal
from collections.abc import Callable, Mapping

from msgspec import Struct

from aitbc_miner.errors import ErrorCode
from aitbc_miner.jobs import ExitStatus, Usage
from aitbc_miner.runners.interface import Verdict, printable
from aitbc_miner.slots.spec import MIB
from aitbc_miner.util import fs


class Evidence(Struct, frozen=True):
    """The facts after the end of all processes of a job. Bytes and seconds; None or empty: nobody counted.

    memory_events, pids_events: files of the job's cgroup. file_at_limit: a file of the job with `file_max`
    bytes. excess: the text about too much on disk. disk_free: the room that the job's user had left.
    """

    exit: ExitStatus
    usage: Usage = Usage()
    cancel_detail: str = ""
    last_line: str = ""
    time_max_s: float | None = None
    cpu_max_s: float | None = None
    memory_events: Mapping[str, int] = {}
    memory_max: int | None = None
    pids_events: Mapping[str, int] = {}
    pids_max: int | None = None
    file_max: int | None = None
    file_at_limit: str | None = None
    excess: str = ""
    disk_free: fs.Room | None = None

    @property
    def failed(self) -> bool:
        """Whether the program ended without status 0."""
        return self.exit.status != 0


def cause_of(evidence: Evidence) -> Verdict | None:
    """Find the cause of the job's end; None: the program ended by itself, and its runner judges."""
    if evidence.exit.killed_for is not None:
        verdict = _ended_by_us(evidence.exit.killed_for, evidence)
        noted = "".join(f"; {note}" for note in (_killings(evidence), _refusals(evidence)) if note)
        return Verdict(verdict.code, verdict.message + noted)
    return next((found for cause in CAUSES if (found := cause(evidence))), None)


def _ended_by_us(why: str, evidence: Evidence) -> Verdict:
    after = f"{evidence.usage.wall_s:.1f} s"
    match why:
        case "timeout":
            limit = "" if evidence.time_max_s is None else f" of {evidence.time_max_s:g} s"
            cause = f"its time limit{limit} was reached"
            return Verdict(ErrorCode.E_TIMEOUT, f"the job was ended after {after}: {cause}")
        case "expired":
            cause = evidence.cancel_detail or "its deadline has passed"
            return Verdict(ErrorCode.E_TIMEOUT, f"the job was ended after {after}: {cause}")
        case "disk":
            return Verdict(ErrorCode.E_DISK, "the job was ended: the disk of the workspace is full")
        case "output":
            return Verdict(ErrorCode.E_OUTPUT, f"the job was ended: {evidence.excess}")
        case "sandbox":
            said = f": {evidence.last_line}" if evidence.last_line else ""
            return Verdict(ErrorCode.E_SANDBOX, f"the job was not started: making its sandbox failed{said}")
        case "shutdown":
            return Verdict(ErrorCode.E_LOST, "the job was ended: the miner was told to stop at once")
        case _:
            detail = f": {evidence.cancel_detail}" if evidence.cancel_detail else ""
            return Verdict(ErrorCode.E_CANCELLED, f"the job was cancelled{detail}")


# --- causes other than the worker, each with its own evidence ----------------------------------------------


def _out_of_memory(evidence: Evidence) -> Verdict | None:
    if not _killings(evidence):
        return None
    numbers = f"peak {_size(evidence.usage.peak_memory_bytes)}, limit {_size(evidence.memory_max)}"
    # The kernel counts `oom` in the cgroup whose limit was hit.
    own = evidence.memory_events.get("oom", 0) > 0
    cause = "the job was" if own else "the kernel killed the job, because the whole machine was"
    return Verdict(ErrorCode.E_OOM, f"{cause} out of memory: {numbers}")


def _too_large_a_file(evidence: Evidence) -> Verdict | None:
    # A program that ignores SIGXFSZ, as Python does, gets an error instead, and a file of the limit's size.
    if evidence.exit.signal != signal.SIGXFSZ and not (evidence.failed and evidence.file_at_limit):
        return None
    limit = "" if evidence.file_max is None else f" of {_size(evidence.file_max)}"
    which = f"the file {printable(evidence.file_at_limit, 300)}" if evidence.file_at_limit else "a file"
    keys = "rlimits.fsize of the slot or max_output_mb of the allowlist entry"
    return Verdict(ErrorCode.E_OUTPUT, f"{which} of the job reached the size limit{limit}, set by {keys}")


def _too_many_processes(evidence: Evidence) -> Verdict | None:
    # Many programs go on with fewer processes; only a failed program has failed for want of a process.
    if not evidence.failed or not (refusals := _refusals(evidence)):
        return None
    return Verdict(ErrorCode.E_PIDS, f"the job failed, and {refusals}")


def _disk_full(evidence: Evidence) -> Verdict | None:
    # A program that writes through a mapping gets SIGBUS on a full disk.
    if evidence.exit.status in {None, 0} and evidence.exit.signal != signal.SIGBUS:
        return None
    if (room := evidence.disk_free) is None or room.covers(fs.NO_ROOM):
        return None
    no_bytes = room.size < fs.NO_ROOM.size
    what = f"is full: {room.size:.0f} bytes free" if no_bytes else "can hold no more files"
    return Verdict(ErrorCode.E_DISK, f"the job failed, and the disk of the workspace {what}")


def _cpu_time_over(evidence: Evidence) -> Verdict | None:
    # rlimits.cpu of the slot: at the hard limit the kernel sends SIGKILL, without a counter.
    used = (evidence.usage.user_s or 0.0) + (evidence.usage.system_s or 0.0)
    limit = evidence.cpu_max_s
    if evidence.exit.signal not in {signal.SIGKILL, signal.SIGXCPU} or limit is None or used < limit:
        return None
    return Verdict(ErrorCode.E_TIMEOUT, f"the job used {used:.1f} s of CPU time; rlimits.cpu is {limit:g} s")


# The first finding counts. Kills by the kernel come first: a job that was refused a process, or that met a
# full disk, may have failed for another reason.
CAUSES: tuple[Callable[[Evidence], Verdict | None], ...] = (
    _out_of_memory,
    _too_large_a_file,
    _cpu_time_over,
    _too_many_processes,
    _disk_full,
)


def _killings(evidence: Evidence) -> str:
    count = evidence.memory_events.get("oom_kill", 0)
    return f"the kernel killed {count} of its processes for want of memory" if count else ""


def _refusals(evidence: Evidence) -> str:
    count = evidence.pids_events.get("max", 0)
    limit = "" if evidence.pids_max is None else f"; the limit is {evidence.pids_max} processes and threads"
    return f"the kernel refused the job a new process {count} times{limit}" if count else ""


def _size(count: int | None) -> str:
    return "unknown" if count is None else f"{count} bytes ({count / MIB:.1f} MiB)"
