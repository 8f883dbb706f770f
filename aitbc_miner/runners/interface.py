"""The interface of runners, and helpers that all runners share.

A runner makes a Launch from a manifest (`plan`), and a Verdict from the end of the program (`verdict`). It
starts nothing itself: the worker applies the limits, the sandbox and the deadline to every runner alike.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from msgspec import Struct

from aitbc_miner.errors import ErrorCode, JobError
from aitbc_miner.jobs import ExitStatus, Manifest
from aitbc_miner.slots.spec import SlotSpec
from aitbc_miner.task import Report
from aitbc_miner.util.signals import signal_name
from aitbc_miner.util.trust import may_be_set


class Launch(Struct, frozen=True):
    """The program that the worker starts in work/, without a shell; `env` is its whole environment.

    With `reports`, the program has the writing end of a pipe as `spawn.REPORT_FD`, and the worker reads the
    other end. `stdin` is the program's whole input; if empty, stdin is /dev/null. A limit of None does not
    apply. `binds` are the paths outside /usr that the sandbox shows to the program. With `may_wait`, the
    worker may send `stdin` to a process of `waiting` instead of starting the program.
    """

    argv: list[str]
    env: dict[str, str]
    max_runtime_s: float | None
    max_output_bytes: int | None
    reports: bool = False
    stdin: bytes = b""
    binds: tuple[Path, ...] = ()
    may_wait: bool = False


class JobPaths(Struct, frozen=True):
    """The directories of one job."""

    root: Path

    @property
    def input(self) -> Path:
        """Fetched inputs."""
        return self.root / "input"

    @property
    def work(self) -> Path:
        """The program's current directory, with its inputs."""
        return self.root / "work"

    @property
    def output(self) -> Path:
        """Files to deliver to the coordinator."""
        return self.root / "output"

    @property
    def logs(self) -> Path:
        """The directory of exec.log, which only the miner writes."""
        return self.root / "logs"

    @property
    def tmp(self) -> Path:
        """The job's TMPDIR."""
        return self.root / "tmp"


class Verdict(Struct, frozen=True):
    """How a job that ended by itself ended; `code` is None if the job succeeded."""

    code: ErrorCode | None
    message: str = ""
    result: Any = None


class Runner(Protocol):
    """One kind of work."""

    name: str

    def plan(self, manifest: Manifest, paths: JobPaths, slot: SlotSpec, gpu_env: Mapping[str, str]) -> Launch:
        """Make the Launch of a job.

        Raises:
            JobError: this node does not run the command or task of the job.
        """

    def verdict(self, exit: ExitStatus, reports: list[Report], log_tail: str) -> Verdict:  # noqa: A002
        """Judge a job that ended by itself; not called for a job that the node ended."""


def job_env(
    manifest: Manifest,
    paths: JobPaths,
    slot: SlotSpec,
    gpu_env: Mapping[str, str],
    allowed: list[str],
) -> dict[str, str]:
    """Build a job's environment: the variables that every job gets, and those of the job's in `allowed`.

    Raises:
        JobError: E_DENY, the job sets another variable.
    """
    for name in manifest.env:
        if not may_be_set(name):
            raise JobError(ErrorCode.E_DENY, f"cannot set {name[:60]!r}: no job may set this variable")
        if name not in allowed:
            cause = "`env` of the slot or of the allowlist entry lacks the variable; add the variable to both"
            raise JobError(ErrorCode.E_DENY, f"cannot set {name[:60]!r} in slot {slot.name}: {cause}")
    return {
        **manifest.env,
        **gpu_env,
        "PATH": "/usr/local/bin:/usr/bin:/bin",
        "HOME": str(paths.work),
        "TMPDIR": str(paths.tmp),
        "LANG": "C.UTF-8",
        "AITBC_JOB_ID": manifest.job_id,
        "AITBC_SLOT": slot.name,
        "AITBC_WORK_DIR": str(paths.work),
        "AITBC_OUTPUT_DIR": str(paths.output),
    }


def shortest(*limits: float | None) -> float | None:
    """Return the smallest limit; None if all are None."""
    return min((limit for limit in limits if limit is not None), default=None)


def ended_badly(exit: ExitStatus, log_tail: str) -> Verdict | None:  # noqa: A002
    """Judge a job by its exit status alone; None for exit status 0."""
    line = last_line(log_tail)
    printed = f"; last line: {line}" if line else "; it printed nothing"
    if exit.signal is not None:
        ended = f"the program was ended by {signal_name(exit.signal)}, which this node did not send"
        return Verdict(ErrorCode.E_SIGNAL, ended + printed)
    if exit.status != 0:
        return Verdict(ErrorCode.E_EXIT, f"the program ended with exit status {exit.status}{printed}")
    return None


def printable(text: str, limit: int) -> str:
    """Make a job's text fit for a message: at most `limit` characters, on one line, without control codes."""
    return "".join(char if char.isprintable() else "?" for char in text[:limit])


def last_line(log_tail: str) -> str:
    """Give the last line of a job's output with text in it, fit for a message; "" if there is none."""
    lines = [line.strip() for line in log_tail.splitlines() if line.strip()]
    return printable(lines[-1], 300) if lines else ""
