"""A job as its author wrote it (manifest) and as we keep it (state, outcome).

Everything here is plain data with its rules: store/records.py puts it on disk; nothing here runs anything.
"""

import re
from enum import StrEnum
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from aitbc_miner.errors import ErrorCode, MinerError, brief
from aitbc_miner.util import forgiving

JOB_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
"""A job id becomes the name of a directory, so nothing else may pass; see `directory_of`."""
BROKEN = ".broken"
"""The directory, beside those of the jobs, of records that cannot be read."""
NEXT = ".next"
"""That of the directories which wait for a slot's next job, see `workspace.make_ahead`."""
OURS = frozenset({BROKEN, NEXT})
NAMED = "+job"
"""Before the name of a job's directory, where that alone would be another's. `+` is in no job id."""

Count = Annotated[int, Meta(ge=0, le=2**31)]
MegaBytes = Annotated[float, Meta(ge=0, le=2**31)]
Text = Annotated[str, Meta(max_length=4096)]
Short = Annotated[str, Meta(max_length=256)]
# What comes from a process that is not root is checked again by the one that is.
JobId = Annotated[str, Meta(pattern=f"^{JOB_ID.pattern}\\Z")]
EndReason = Literal["cancel", "shutdown", "timeout", "expired"]


def valid_job_id(job_id: object) -> bool:
    """Whether this may name a job here, on disk and everywhere else."""
    return isinstance(job_id, str) and bool(JOB_ID.fullmatch(job_id)) and job_id not in {".", ".."}


def directory_of(job_id: str) -> str:
    """Say what a job's directory is called: as the job, unless we have a directory of that name ourselves."""
    return f"{NAMED}{job_id}" if job_id in OURS else job_id


def job_in(directory: str) -> str | None:
    """Say which job is in a directory of this name; None: it is no job's."""
    job_id = directory.removeprefix(NAMED)
    return job_id if valid_job_id(job_id) and directory_of(job_id) == directory else None


class ManifestError(MinerError):
    """A manifest is no manifest; `job_id` is the id it gave itself when that much could be read.

    `code` is what its job fails with.
    """

    def __init__(
        self, message: str, job_id: str | None = None, code: ErrorCode = ErrorCode.E_MANIFEST
    ) -> None:
        super().__init__(message)
        self.job_id = job_id
        self.code = code


class Requirements(Struct, frozen=True, forbid_unknown_fields=False):
    """What the job needs of a slot; memory in MiB, video memory in MB as NVML counts it."""

    gpu: bool = False
    vram_mb: Count = 0
    cpu_threads: Count = 0
    memory_mb: Count = 0


class InputUrl(Struct, frozen=True):
    """An input to fetch; without a name it is called by the last part of the URL's path."""

    url: Text
    name: str | None = None
    sha256: Annotated[str, Meta(pattern="^[0-9a-fA-F]{64}$")] | None = None
    max_mb: MegaBytes | None = None


class Inputs(Struct, frozen=True):
    """What is put into the job's directory before it starts."""

    urls: Annotated[list[Text | InputUrl], Meta(max_length=1000)] = []
    inline: Annotated[dict[str, str], Meta(max_length=1000)] = {}


class ArtifactSpec(Struct, frozen=True):
    """A file that the job promises to write, relative to its `work/` or `output/` directory."""

    path: Text
    type: Annotated[str, Meta(max_length=255)] = "application/octet-stream"
    max_mb: MegaBytes | None = None


class RetryPolicy(Struct, frozen=True):
    """How often a job's program may be started in all, and after which failures; see agent/retry_policy.py.

    Without `on`, after each that is not final by its code.
    """

    max_attempts: Annotated[int, Meta(ge=1, le=100)] = 1
    on: Annotated[list[ErrorCode], Meta(max_length=100)] = []


class Manifest(Struct, frozen=True):
    """What the coordinator sent. Unknown fields stay in manifest.json and are ignored."""

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
    needed = {"cli": ("command", manifest.command), "python": ("task", manifest.task)}.get(manifest.runner)
    if needed is None:
        raise ManifestError(
            f"cannot run the job: runner {manifest.runner[:64]!r} is not one of cli, python", manifest.job_id
        )
    if not needed[1]:
        raise ManifestError(
            f"cannot run the job: runner {manifest.runner!r} needs {needed[0]!r}", manifest.job_id
        )
    texts = [
        manifest.command or "",
        manifest.task or "",
        *manifest.args,
        *manifest.env,
        *manifest.env.values(),
    ]
    if any("\0" in text for text in texts):
        raise ManifestError("cannot run the job: command, args and env must not contain NUL", manifest.job_id)


class State(StrEnum):
    """Where a job is on its way; `MOVES` says which step may follow which."""

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

# Every state may also turn to UPLOADING: whatever happens to a job, its report is what ends it.
MOVES: dict[State, frozenset[State]] = {
    State.PULLED: frozenset({State.ACKED, State.UPLOADING, State.FAILED}),
    State.ACKED: frozenset({State.PREP, State.UPLOADING, State.FAILED, State.RETRY_WAIT}),
    State.PREP: frozenset({State.RUNNING, State.COLLECTING, State.UPLOADING, State.RETRY_WAIT}),
    State.RUNNING: frozenset({State.COLLECTING, State.UPLOADING, State.RETRY_WAIT}),
    State.COLLECTING: frozenset({State.UPLOADING, State.RETRY_WAIT}),
    State.UPLOADING: frozenset({State.DONE, State.FAILED, State.UPLOADING}),
    # Again, when its worker died before it had written anything of the attempt.
    State.RETRY_WAIT: frozenset({State.PREP, State.UPLOADING, State.FAILED, State.RETRY_WAIT}),
    State.DONE: frozenset(),
    # The operator has a report that was refused sent once more.
    State.FAILED: frozenset({State.UPLOADING}),
}


class Refusals(Struct, frozen=True):
    """How often a job's report was refused, over how many seconds; `at` is the boot time of the last one."""

    times: int = 0
    over_s: float = 0.0
    at: float = 0.0
    boot_id: str = ""

    def another(self, now: float, boot_id: str) -> "Refusals":
        """Count one more. The time between two of them counts where one boot has seen both."""
        between_s = now - self.at if self.boot_id == boot_id else 0.0
        return Refusals(self.times + 1, self.over_s + max(0.0, between_s), now, boot_id)


class StateRecord(Struct, frozen=True):
    """state.json: where the job is now. Boot times are seconds of the boot-time clock, with the boot's id.

    `attempt` is the one under way or to come. `started`: the program was, in this or an earlier attempt.
    `lease` is the token of our hold on it where a fleet shares its jobs, see agent/fleet.py, and `origin` the
    node that it was taken over from. `delivery` is what became of its report, `refusals` how it fared before.
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
    """How the program ended, as data: an exit status or a signal, and why we ended it if we did."""

    status: int | None = None
    signal: int | None = None
    killed_for: str | None = None


class Usage(Struct, frozen=True):
    """What the job used. Seconds and bytes; None where this machine cannot tell."""

    wall_s: float = 0.0
    user_s: float | None = None
    system_s: float | None = None
    peak_memory_bytes: int | None = None
    read_bytes: int | None = None
    written_bytes: int | None = None
    gpu_s: float | None = None
    peak_vram_bytes: int | None = None


class Artifact(Struct, frozen=True):
    """A file for the coordinator: `path` is its name there, `file` its place in the job's directory."""

    path: str
    file: str
    bytes: int
    sha256: str
    type: str = "application/octet-stream"


class LeftOut(Struct, frozen=True):
    """Something in output/ that nobody declared and that cannot be delivered, and why."""

    path: str
    why: str


class LogInfo(Struct, frozen=True):
    """logs/exec.log: bytes kept, bytes dropped over the cap, and its last 4 KiB as text."""

    bytes: int = 0
    dropped: int = 0
    tail: str = ""


class Outcome(Struct, frozen=True):
    """outcome.json: what came of the job. On disk before anybody is told of it."""

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
        """Whether the job did what it was asked to."""
        return self.code is None

    def count_artifacts(self, *, log_too: bool) -> int:
        """Count what the client gets; not every coordinator takes the log."""
        return sum(log_too or artifact.file != "logs/exec.log" for artifact in self.artifacts)


class JobUse(Struct, frozen=True):
    """What a job that runs has used, and may: seconds, percent of one CPU since it began, bytes.

    None where it cannot be told, or where there is no limit. `pct` and `note` are the task's own word.
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
