"""Why a job ended, judged by evidence alone: our own record, the kernel's counters, the disk, the exit.

Nothing here is guessed. That a program exits with 137, for one, tells nothing about memory: only the kernel's
count of those that it killed does.
"""

import signal
from collections.abc import Callable, Mapping

from msgspec import Struct

from aitbc_miner.errors import ErrorCode
from aitbc_miner.jobs import ExitStatus, Usage
from aitbc_miner.runners.interface import Verdict, printable
from aitbc_miner.util import fs

MIB = 1 << 20


class Evidence(Struct, frozen=True):
    """What is known once nothing of the job runs any more. Bytes and seconds; None or empty: nobody counted.

    memory_events, pids_events: the files of the job's cgroup. file_at_limit: a file of the job that has
    `file_max` bytes. excess: what it had too much of on disk. disk_free: what the job's user could still have
    written.
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
        """Whether the program came to no good end."""
        return self.exit.status != 0


def cause_of(evidence: Evidence) -> Verdict | None:
    """Say why the job ended; None when it ended by itself, and what came of it is its runner's to say."""
    if evidence.exit.killed_for is not None:
        verdict = _ended_by_us(evidence.exit.killed_for, evidence)
        noted = "".join(f"; {note}" for note in (_killings(evidence), _refusals(evidence)) if note)
        return Verdict(verdict.code, verdict.message + noted)
    return next((found for cause in CAUSES if (found := cause(evidence))), None)


def _ended_by_us(why: str, evidence: Evidence) -> Verdict:
    match why:
        case "timeout":
            limit = "" if evidence.time_max_s is None else f" of {evidence.time_max_s:g} s"
            after = f"{evidence.usage.wall_s:.1f} s"
            return Verdict(ErrorCode.E_TIMEOUT, f"the job was ended after {after}: its time{limit} was over")
        case "expired":
            after = f"{evidence.usage.wall_s:.1f} s"
            return Verdict(
                ErrorCode.E_TIMEOUT,
                f"the job was ended after {after}: {evidence.cancel_detail or 'it is too late'}",
            )
        case "disk":
            return Verdict(ErrorCode.E_DISK, "the job was ended: the disk of the workspace is full")
        case "output":
            return Verdict(ErrorCode.E_OUTPUT, f"the job was ended: {evidence.excess}")
        case "sandbox":
            said = f": {evidence.last_line}" if evidence.last_line else ""
            return Verdict(ErrorCode.E_SANDBOX, f"the job was not started: there was no sandbox for it{said}")
        case "shutdown":
            return Verdict(ErrorCode.E_LOST, "the job was ended: the miner was told to stop at once")
        case _:
            detail = f": {evidence.cancel_detail}" if evidence.cancel_detail else ""
            return Verdict(ErrorCode.E_CANCELLED, f"the job was cancelled{detail}")


# --- what ends a job without us, each from evidence of its own ---------------------------------------------


def _out_of_memory(evidence: Evidence) -> Verdict | None:
    if not _killings(evidence):
        return None
    numbers = f"peak {_size(evidence.usage.peak_memory_bytes)}, limit {_size(evidence.memory_max)}"
    if evidence.memory_events.get("oom", 0) > 0:
        return Verdict(ErrorCode.E_OOM, f"the job was out of memory: {numbers}")
    # The kernel counts `oom` where the limit is that was hit, which was not the job's.
    return Verdict(
        ErrorCode.E_OOM, f"the whole machine was out of memory and the job was killed for it: {numbers}"
    )


def _too_large_a_file(evidence: Evidence) -> Verdict | None:
    # Whoever ignores the signal, as Python does, gets an error instead, and cannot write past the limit.
    if evidence.exit.signal != signal.SIGXFSZ and not (evidence.failed and evidence.file_at_limit):
        return None
    limit = "" if evidence.file_max is None else f": {_size(evidence.file_max)}"
    which = f", reached by {printable(evidence.file_at_limit, 300)}" if evidence.file_at_limit else ""
    return Verdict(ErrorCode.E_OUTPUT, f"the job wrote a file larger than it may{limit}{which}")


def _too_many_processes(evidence: Evidence) -> Verdict | None:
    # Many a program tries again with fewer; only one that failed has failed for it.
    if not evidence.failed or not (refusals := _refusals(evidence)):
        return None
    return Verdict(ErrorCode.E_PIDS, f"the job failed, and {refusals}")


def _disk_full(evidence: Evidence) -> Verdict | None:
    # SIGBUS is how a program hears of it that has mapped the file that it writes.
    if evidence.exit.status in {None, 0} and evidence.exit.signal != signal.SIGBUS:
        return None
    if (room := evidence.disk_free) is None or room.covers(fs.NO_ROOM):
        return None
    no_bytes = room.size < fs.NO_ROOM.size
    what = f"is full: {room.size:.0f} bytes free" if no_bytes else "can hold no more files"
    return Verdict(ErrorCode.E_DISK, f"the job failed, and the disk of the workspace {what}")


def _cpu_time_over(evidence: Evidence) -> Verdict | None:
    # rlimits.cpu of the slot: at the hard limit the kernel sends SIGKILL and counts it nowhere.
    used = (evidence.usage.user_s or 0.0) + (evidence.usage.system_s or 0.0)
    limit = evidence.cpu_max_s
    if evidence.exit.signal not in {signal.SIGKILL, signal.SIGXCPU} or limit is None or used < limit:
        return None
    return Verdict(ErrorCode.E_TIMEOUT, f"the job used {used:.1f} s of CPU time, and may use {limit:g} s")


# The first that finds something is believed. What the kernel did to the job comes before what the job merely
# met on its way: it can fail for another reason after it was refused a process, or on a disk that is full.
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
    limit = "" if evidence.pids_max is None else f"; it may have {evidence.pids_max}"
    return f"the kernel refused it a new process {count} times{limit}" if count else ""


def _size(count: int | None) -> str:
    return "unknown" if count is None else f"{count} bytes ({count / MIB:.1f} MiB)"
