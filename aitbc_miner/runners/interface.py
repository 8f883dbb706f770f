"""The kinds of work a job can ask for, one file each.

A runner turns a manifest into what the worker starts (`plan`) and what came of it into a code and a sentence
(`verdict`). It starts nothing itself: limits, the sandbox and the clock are the same for every kind.
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
    """What the worker starts: no shell, `env` is all there is, the current directory is work/.

    With `reports`, the worker reads a pipe whose writing end the program has as `spawn.REPORT_FD`. `stdin` is
    all that the program reads there; when empty, stdin is /dev/null. Limits that are None do not apply.
    `binds` are what it reads of the machine besides /usr, for its sandbox. With `may_wait`, a process that
    was started ahead of it may run it, which needs no more than `stdin` for that.
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
        """Where inputs arrive."""
        return self.root / "input"

    @property
    def work(self) -> Path:
        """Where the program starts and finds its inputs."""
        return self.root / "work"

    @property
    def output(self) -> Path:
        """All that is left here goes to the coordinator."""
        return self.root / "output"

    @property
    def logs(self) -> Path:
        """Where exec.log is written, by the miner alone."""
        return self.root / "logs"

    @property
    def tmp(self) -> Path:
        """TMPDIR of the job."""
        return self.root / "tmp"


class Verdict(Struct, frozen=True):
    """What came of a job that ended by itself: no code when it did what it was asked to."""

    code: ErrorCode | None
    message: str = ""
    result: Any = None


class Runner(Protocol):
    """One kind of work."""

    name: str

    def plan(self, manifest: Manifest, paths: JobPaths, slot: SlotSpec, gpu_env: Mapping[str, str]) -> Launch:
        """Say what to start.

        Raises:
            JobError: this node does not run that.
        """
        ...

    def verdict(self, exit: ExitStatus, reports: list[Report], log_tail: str) -> Verdict:  # noqa: A002
        """Say what came of it. Only asked when the job ended by itself, not when we ended it."""
        ...


def job_env(
    manifest: Manifest,
    paths: JobPaths,
    slot: SlotSpec,
    gpu_env: Mapping[str, str],
    allowed: list[str],
) -> dict[str, str]:
    """Build the environment of a job from nothing; of the job's own names only those in `allowed`.

    Raises:
        JobError: E_DENY, the job asks for a name that may not be set.
    """
    for name in manifest.env:
        if not may_be_set(name):
            raise JobError(ErrorCode.E_DENY, f"cannot set {name[:60]!r}: no job may choose this variable")
        if name not in allowed:
            remedy = "`env` of the slot and, for a command, of its allowlist entry must both name it"
            raise JobError(ErrorCode.E_DENY, f"cannot set {name[:60]!r} in slot {slot.name}: {remedy}")
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
    """Return the smallest of the limits that are set."""
    return min((limit for limit in limits if limit is not None), default=None)


def ended_badly(exit: ExitStatus, log_tail: str) -> Verdict | None:  # noqa: A002
    """Judge by the exit status alone; None when it is 0."""
    if exit.signal is not None:
        what = f"the program was ended by {signal_name(exit.signal)}, which this node did not send"
        return Verdict(ErrorCode.E_SIGNAL, what + _last_line(log_tail))
    if exit.status != 0:
        what = f"the program ended with exit status {exit.status}"
        return Verdict(ErrorCode.E_EXIT, what + _last_line(log_tail))
    return None


def printable(text: str, limit: int) -> str:
    """Make a job's text fit for a message: short, on one line, and with nothing that a terminal acts on."""
    return "".join(char if char.isprintable() else "?" for char in text[:limit])


def last_line(log_tail: str) -> str:
    """Give the last line of a job's output that is not blank, fit for a message."""
    lines = [line.strip() for line in log_tail.splitlines() if line.strip()]
    return printable(lines[-1], 300) if lines else ""


def _last_line(log_tail: str) -> str:
    line = last_line(log_tail)
    return f"; last line: {line}" if line else "; it printed nothing"
