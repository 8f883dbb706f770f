"""Starts a job's program with its pipes, sandbox and limits."""

import os
import resource
import stat
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

from msgspec import Struct
from msgspec.structs import replace

from aitbc_miner.errors import ErrorCode, JobError, MinerError
from aitbc_miner.runners.interface import Launch
from aitbc_miner.sandbox.bubblewrap import Enclosed, Sandbox, enclose, in_memory
from aitbc_miner.sandbox.spawn import REPORT_FD, Job, spawn
from aitbc_miner.sandbox.users import Identity
from aitbc_miner.util.limits import ProcessLimits
from aitbc_miner.worker.context import SlotContext


class Started(Struct, frozen=True):
    """A running program, and the reading ends of its pipes: output, and reports if it makes any."""

    job: Job
    log: int
    reports: int | None


def start_program(
    launch: Launch, directory: Path, slot: SlotContext, stack: ExitStack, stdin: int | None = None
) -> Started:
    """Start a program in its slot; `stack` closes its pipes, and ends no process.

    The program reads the descriptor `stdin`, or else `launch.stdin`.

    Raises:
        JobError: E_SANDBOX, the program was not started.
        OSError: no descriptor or memory is left.
    """
    with ExitStack() as ours:
        # Only the job may hold the writing ends: otherwise the worker never reads end of file.
        log, log_end = _pipe(stack, ours)
        reports, reports_end = _pipe(stack, ours) if launch.reports else (None, None)
        fds = {0: _stdin(launch.stdin, ours) if stdin is None else stdin, 1: log_end, 2: log_end}
        if reports_end is not None:
            fds[REPORT_FD] = reports_end
        enclosed = _enclose(launch, directory, slot.sandbox, fds, stack)
        runs_as = slot.runs_as
        give_pipes(fds, runs_as)
        job = spawn(
            enclosed.argv if enclosed else launch.argv,
            cwd=directory / "work",
            env=launch.env,
            fds=fds | (enclosed.fds if enclosed else {}),
            limits=limits_for(launch, slot.limits),
            group=slot.group.job if slot.group else None,
            uid=runs_as.uid if runs_as else None,
            gid=runs_as.gid if runs_as else None,
            enclosed=enclosed,
        )
    return Started(stack.enter_context(job), log, reports)


def _enclose(
    launch: Launch, directory: Path, sandbox: Sandbox | None, fds: Mapping[int, int], stack: ExitStack
) -> Enclosed | None:
    if sandbox is None:
        return None
    try:
        return enclose(sandbox, directory, launch.argv, launch.binds, fds, stack)
    except MinerError as error:
        raise JobError(ErrorCode.E_SANDBOX, f"cannot start {launch.argv[0]}: {error}") from error


def _pipe(reading: ExitStack, writing: ExitStack) -> tuple[int, int]:
    ends = os.pipe2(os.O_CLOEXEC)
    # The program can read its pipe, too, after poll told us of data: our read must not block then.
    os.set_blocking(ends[0], False)
    reading.callback(os.close, ends[0])
    writing.callback(os.close, ends[1])
    return ends


def give_pipes(fds: Mapping[int, int], user: Identity | None) -> None:
    """Make the program's user the owner of the pipes: many programs open /dev/stdout by name."""
    for number, fd in fds.items():
        if user is not None and number != 0 and stat.S_ISFIFO(os.fstat(fd).st_mode):
            os.fchown(fd, user.uid, user.gid)


def _stdin(content: bytes, stack: ExitStack) -> int:
    if content:
        return in_memory(content, stack)
    fd = os.open(os.devnull, os.O_RDONLY)
    stack.callback(os.close, fd)
    return fd


def limits_for(launch: Launch, limits: ProcessLimits) -> ProcessLimits:
    """Give the slot's process limits, with RLIMIT_FSIZE lowered to the program's `max_output_bytes`."""
    if launch.max_output_bytes is None:
        return limits
    # A single file must not exceed the limit of the whole output; the collector checks the sum.
    most = min(launch.max_output_bytes, limits.rlimits.get(resource.RLIMIT_FSIZE, launch.max_output_bytes))
    return replace(limits, rlimits={**limits.rlimits, resource.RLIMIT_FSIZE: most})
