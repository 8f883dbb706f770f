"""The data of a job: the manifest from its author, and the node's records of its state and outcome.

All structs are plain data with their rules; store/records.py writes them to disk.
"""

import re
from enum import StrEnum
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from aitbc_miner.errors import ErrorCode, MinerError, brief
from aitbc_miner.util import forgiving

JOB_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
"""A job id becomes the name of a directory, so other characters are refused; see `directory_of`."""
BROKEN = ".broken"
"""The directory, beside the jobs' directories, of records that cannot be read."""
NEXT = ".next"
"""The directory of the directories that are made ahead for the next jobs, see `workspace.make_ahead`."""
OURS = frozenset({BROKEN, NEXT})
NAMED = "+job"
"""Prefix for the directory of a job whose id is one of OURS. No job id has a `+`."""

Count = Annotated[int, Meta(ge=0, le=2**31)]
MegaBytes = Annotated[float, Meta(ge=0, le=2**31)]
Text = Annotated[str, Meta(max_length=4096)]
Short = Annotated[str, Meta(max_length=256)]
# The supervisor, which is root, checks the ids in messages of other processes again.
JobId = Annotated[str, Meta(pattern=f"^{JOB_ID.pattern}\\Z")]
EndReason = Literal["cancel", "shutdown", "timeout", "expired"]


def valid_job_id(job_id: object) -> bool:
    """Whether a value is a valid job id."""
    return isinstance(job_id, str) and bool(JOB_ID.fullmatch(job_id)) and job_id not in {".", ".."}


def directory_of(job_id: str) -> str:
    """Give the name of a job's directory: the id, with a prefix if the id is one of OURS."""
    return f"{NAMED}{job_id}" if job_id in OURS else job_id


def job_in(directory: str) -> str | None:
    """Give the id of the job in a directory of this name; None if the directory is not a job's."""
    job_id = directory.removeprefix(NAMED)
    return job_id if valid_job_id(job_id) and directory_of(job_id) == directory else None


class ManifestError(MinerError):
    """A manifest is malformed. `job_id` is its id, if readable; its job fails with `code`."""

    def __init__(
        self, message: str, job_id: str | None = None, code: ErrorCode = ErrorCode.E_MANIFEST
    ) -> None:
        super().__init__(message)
        self.job_id = job_id
        self.code = code


class Requirements(Struct, frozen=True, forbid_unknown_fields=False):
    """The job's needs of a slot; memory in MiB, video memory in MB as NVML counts."""

    gpu: bool = False
    vram_mb: Count = 0
    cpu_threads: Count = 0
    memory_mb: Count = 0


class InputUrl(Struct, frozen=True):
    """An input to fetch; the default of its name is the last part of the URL's path."""

    url: Text
    name: str | None = None
    sha256: Annotated[str, Meta(pattern="^[0-9a-fA-F]{64}$")] | None = None
    max_mb: MegaBytes | None = None


class Inputs(Struct, frozen=True):
    """The files that the node puts into the job's directory before the start."""

    urls: Annotated[list[Text | InputUrl], Meta(max_length=1000)] = []
    inline: Annotated[dict[str, str], Meta(max_length=1000)] = {}


class ArtifactSpec(Struct, frozen=True):
    """A file that the job promises to write, relative to its `work/` or `output/` directory."""

    path: Text
    type: Annotated[str, Meta(max_length=255)] = "application/octet-stream"
    max_mb: MegaBytes | None = None


class RetryPolicy(Struct, frozen=True):
    """The most starts of a job's program, and the codes that allow a retry; see agent/retry_policy.py.

    Without `on`, a retry is allowed after each code that is not final.
    """

    max_attempts: Annotated[int, Meta(ge=1, le=100)] = 1
    on: Annotated[list[ErrorCode], Meta(max_length=100)] = []


class Manifest(Struct, frozen=True):
    """The job as the coordinator sent it. Unknown fields stay in manifest.json and are ignored."""

    job_id: str
    runner: Annotated[str, Meta(max_length=64)]
    requirements: Requirements = Requirements()
    timeout_s: Annotated[float, Meta(gt=0, le=31_536_000)] | None = None
    priority: Annotated[int, Meta(ge=-(2**31), le=2**31)] = 0
    input: Inputs = Inputs()
    command: Text | None = None
    args: Annotated[list[str], Meta(max_length=10_000)] = []
    task: Annotated[str, Meta(max_length=255)] | None = None
    params: dict[str, Any] = {}
    artifacts: Annotated[list[ArtifactSpec], Meta(max_length=10_000)] = []
    env: Annotated[dict[str, str], Meta(max_length=256)] = {}
    egress: Text | None = None
    secrets: dict[str, Any] = {}
    retry: RetryPolicy = RetryPolicy()


def decode_manifest(raw: object) -> Manifest:
    """Turn one decoded JSON value into a manifest.

    Raises:
        ManifestError: the value is not a manifest; the error names the offending field.
    """
    job_id = raw.get("job_id") if isinstance(raw, dict) else None
    if not valid_job_id(job_id):
        shown = repr(job_id)[:80]
        raise ManifestError(
            f"cannot accept the job: job_id {shown} is not 1 to 128 of A-Z a-z 0-9 . _ -, or is . or ..",
            job_id[:256] if isinstance(job_id, str) else None,
        )
    try:
        manifest = forgiving.convert(raw, Manifest)
    except (msgspec.ValidationError, RecursionError) as error:
        raise ManifestError(f"cannot read the manifest: {brief(error)}", job_id) from error
    _check_runner_fields(manifest)
    return manifest


def _check_runner_fields(manifest: Manifest) -> None:
    runner = manifest.runner
    needed = {"cli": ("command", manifest.command), "python": ("task", manifest.task)}.get(runner)
    texts = [manifest.command or "", manifest.task or "", *manifest.args]
    if needed is None:
        fault = f"runner {runner[:64]!r} is not one of cli, python"
    elif not needed[1]:
        fault = f"runner {runner!r} needs {needed[0]!r}"
    elif any("\0" in text for text in (*texts, *manifest.env, *manifest.env.values())):
        fault = "command, args and env must not contain NUL"
    else:
        return
    raise ManifestError(f"cannot run the job: {fault}", manifest.job_id)


class State(StrEnum):
    """The state of a job; `MOVES` has the allowed next states."""

    PULLED = "PULLED"
    ACKED = "ACKED"
    PREP = "PREP"
    RUNNING = "RUNNING"
    COLLECTING = "COLLECTING"
    UPLOADING = "UPLOADING"
    RETRY_WAIT = "RETRY_WAIT"
    DONE = "DONE"
    FAILED = "FAILED"


FINAL = frozenset({State.DONE, State.FAILED})

# Every state except DONE may turn to UPLOADING: in every case, the report ends the job.
MOVES: dict[State, frozenset[State]] = {
    State.PULLED: frozenset({State.ACKED, State.UPLOADING, State.FAILED}),
    State.ACKED: frozenset({State.PREP, State.UPLOADING, State.FAILED, State.RETRY_WAIT}),
    State.PREP: frozenset({State.RUNNING, State.COLLECTING, State.UPLOADING, State.RETRY_WAIT}),
    State.RUNNING: frozenset({State.COLLECTING, State.UPLOADING, State.RETRY_WAIT}),
    State.COLLECTING: frozenset({State.UPLOADING, State.RETRY_WAIT}),
    State.UPLOADING: frozenset({State.DONE, State.FAILED, State.UPLOADING}),
    # RETRY_WAIT may follow itself: the worker may die before it records the attempt.
    State.RETRY_WAIT: frozenset({State.PREP, State.UPLOADING, State.FAILED, State.RETRY_WAIT}),
    State.DONE: frozenset(),
    # The operator may have a refused report sent again.
    State.FAILED: frozenset({State.UPLOADING}),
}


class Refusals(Struct, frozen=True):
    """How often the coordinator refused a report, over how many seconds; `at`: boot time of the last."""

    times: int = 0
    over_s: float = 0.0
    at: float = 0.0
    boot_id: str = ""

    def another(self, now: float, boot_id: str) -> "Refusals":
        """Count one more refusal. The time between two refusals counts only within one boot."""
        between_s = now - self.at if self.boot_id == boot_id else 0.0
        return Refusals(self.times + 1, self.over_s + max(0.0, between_s), now, boot_id)


class StateRecord(Struct, frozen=True):
    """state.json: the job's present state. Boot times are seconds of the boot-time clock, with the boot's id.

    `attempt` is the present or the next attempt. `started`: an attempt has started the program. `lease` is
    the token of our lease in a fleet (agent/fleet.py), `origin` the node from which we took the job over.
    `delivery` is the result of the report, `refusals` counts its refusals.
    """

    job_id: str
    state: State
    version: Literal[1] = 1
    boot_id: str = ""
    since: float = 0.0
    since_wall: str = ""
    slot: str | None = None
    worker_pid: int | None = None
    worker_start: int | None = None
    deadline: float | None = None
    attempt: int = 1
    started: bool = False
    lease: str | None = None
    origin: str | None = None
    runner: str = ""
    delivery: str | None = None
    refusals: Refusals = Refusals()
    note: str | None = None


class ExitStatus(Struct, frozen=True):
    """The end of the program: an exit status or a signal, and the reason if the node killed the program."""

    status: int | None = None
    signal: int | None = None
    killed_for: str | None = None


class Usage(Struct, frozen=True):
    """The job's use of resources in seconds and bytes; None if this machine cannot measure a value."""

    wall_s: float = 0.0
    user_s: float | None = None
    system_s: float | None = None
    peak_memory_bytes: int | None = None
    read_bytes: int | None = None
    written_bytes: int | None = None
    gpu_s: float | None = None
    peak_vram_bytes: int | None = None


class Artifact(Struct, frozen=True):
    """A file for the coordinator: `path` is the name to deliver, `file` the path in the job's directory."""

    path: str
    file: str
    bytes: int
    sha256: str
    type: str = "application/octet-stream"


class LeftOut(Struct, frozen=True):
    """An undeclared file in output/ that cannot be delivered, and the reason."""

    path: str
    why: str


class LogInfo(Struct, frozen=True):
    """logs/exec.log: bytes kept, bytes dropped beyond the limit, and the last 4 KiB as text."""

    bytes: int = 0
    dropped: int = 0
    tail: str = ""


class Outcome(Struct, frozen=True):
    """outcome.json: how the job ended. Written to disk before any report."""

    job_id: str
    version: Literal[1] = 1
    attempt: int = 1
    code: ErrorCode | None = None
    message: str = ""
    slot: str | None = None
    exit: ExitStatus = ExitStatus()
    usage: Usage = Usage()
    timings: dict[str, float] = {}
    artifacts: list[Artifact] = []
    left_out: list[LeftOut] = []
    result: Any = None
    log: LogInfo = LogInfo()
    enforced: dict[str, str] = {}
    versions: dict[str, str] = {}
    finished_wall: str = ""

    @property
    def ok(self) -> bool:
        """Whether the job succeeded."""
        return self.code is None

    def count_artifacts(self, *, log_too: bool) -> int:
        """Count the delivered files; `log_too`: the coordinator takes the log as well."""
        return sum(log_too or artifact.file != "logs/exec.log" for artifact in self.artifacts)


class JobUse(Struct, frozen=True):
    """A running job's use and limits: seconds, percent of one CPU since the start, bytes.

    None means an unknown value or no limit. `pct` and `note` come from the task itself.
    """

    for_s: float
    max_s: float | None = None
    pct: float | None = None
    note: str = ""
    cpu_pct: float | None = None
    cpu_max_pct: int | None = None
    memory_bytes: int | None = None
    memory_max_bytes: int | None = None
    disk_bytes: int | None = None
    disk_max_bytes: int | None = None
