"""The error codes of failed jobs, the root of our exceptions, and the exit statuses of our commands.

The code of a failed job is public: the coordinator, the metrics and the operator's screen show the code. Each
code says where a retry may succeed: on this node, on another node, or nowhere.
"""

from enum import StrEnum

from msgspec import Struct


class MinerError(Exception):
    """Root of our exceptions. The message reads "cannot X: cause; remedy"."""


class IllegalMove(Exception):  # noqa: N818  # a defect of the miner, not a condition to handle
    """A slot or a job was to change to a state that may not follow its present state."""


class LocalError(MinerError):
    """A fault of this machine that may pass: the caller tries again, and the job is not judged by it."""


def brief(error: object, most: int = 400) -> str:
    """Give an error's text in printable characters, without its middle if the text is longer than `most`."""
    text = str(error)
    half = most // 2
    short = text if len(text) <= most else f"{text[:half]} … {text[-half:]}"
    return "".join(char if char.isprintable() else "?" for char in short)


class Retry(StrEnum):
    """The nodes on which a failed job may be retried."""

    HERE = "here"
    ELSEWHERE = "elsewhere"
    FINAL = "final"


class ErrorCode(StrEnum):
    """The code of a failed job. A test compares docs/errors.md with this table."""

    E_MANIFEST = "E_MANIFEST"
    E_DENY = "E_DENY"
    E_INPUT = "E_INPUT"
    E_NOGPU = "E_NOGPU"
    E_NOSLOT = "E_NOSLOT"
    E_TIMEOUT = "E_TIMEOUT"
    E_OOM = "E_OOM"
    E_VRAM = "E_VRAM"
    E_PIDS = "E_PIDS"
    E_DISK = "E_DISK"
    E_OUTPUT = "E_OUTPUT"
    E_ARTIFACT = "E_ARTIFACT"
    E_EXIT = "E_EXIT"
    E_SIGNAL = "E_SIGNAL"
    E_SANDBOX = "E_SANDBOX"
    E_SECRET = "E_SECRET"  # noqa: S105  # the name of a code, not a password
    E_EGRESS = "E_EGRESS"
    E_TASK = "E_TASK"
    E_CANCELLED = "E_CANCELLED"
    E_LOST = "E_LOST"
    E_UPLOAD = "E_UPLOAD"
    E_INTERNAL = "E_INTERNAL"


class CodeInfo(Struct, frozen=True):
    """The meaning of a code, the nodes for a retry, and the advice to the operator."""

    retry: Retry
    meaning: str
    advice: str


CODES: dict[ErrorCode, CodeInfo] = {
    ErrorCode.E_MANIFEST: CodeInfo(
        Retry.FINAL,
        "the job's manifest cannot be read, is too large, or contradicts itself",
        "no action needed on this node; the job's author must mend the manifest",
    ),
    ErrorCode.E_DENY: CodeInfo(
        Retry.FINAL,
        "the allowlist does not permit the command or its arguments, or the task is not trusted",
        "to offer the command or task, add it to allowlist.d or task_paths; the next job can use it",
    ),
    ErrorCode.E_INPUT: CodeInfo(
        Retry.ELSEWHERE,
        "an input has a bad name, cannot be fetched, is too large, or its sha256 differs",
        "check the address in the message; if many jobs fail like this, check this node's network",
    ),
    ErrorCode.E_NOGPU: CodeInfo(
        Retry.ELSEWHERE,
        "no slot of this node has the GPU or the video memory that the job needs",
        "if this machine has a GPU, run `aitbc-miner probe` and `aitbc-miner doctor`",
    ),
    ErrorCode.E_NOSLOT: CodeInfo(
        Retry.ELSEWHERE,
        "no slot of this node is large enough for the job, or no slot offers its runner",
        "compare the job's requirements with slots.d",
    ),
    ErrorCode.E_TIMEOUT: CodeInfo(
        Retry.FINAL,
        "the job reached a time limit: timeout_s, max_runtime_s, rlimits.cpu or the coordinator's deadline",
        "if the limit is max_runtime_s or rlimits.cpu, raise the key to let longer jobs finish",
    ),
    ErrorCode.E_OOM: CodeInfo(
        Retry.ELSEWHERE,
        "the job, or the whole machine, ran out of memory",
        "raise memory_max of the slot; if the whole machine ran out of memory, lower memory_max of the slots",
    ),
    ErrorCode.E_VRAM: CodeInfo(
        Retry.ELSEWHERE,
        "the job needed more video memory than its GPU has",
        "check with `nvidia-smi` that no other program uses the GPU",
    ),
    ErrorCode.E_PIDS: CodeInfo(
        Retry.FINAL,
        "the job started more processes than its slot allows",
        "to accept jobs with more processes, raise pids_max of the slot",
    ),
    ErrorCode.E_DISK: CodeInfo(
        Retry.ELSEWHERE,
        "the disk of the workspace was full",
        "free space on the disk of workspace.root, or move workspace.root to a larger disk",
    ),
    ErrorCode.E_OUTPUT: CodeInfo(
        Retry.FINAL,
        "the job wrote more than its limit",
        "to accept more output, raise the key that the message names",
    ),
    ErrorCode.E_ARTIFACT: CodeInfo(
        Retry.FINAL,
        "an artifact is missing, too large, not a plain file of the job, or still in use",
        "no action needed on this node; `aitbc-minerctl logs ID` shows the output of the job",
    ),
    ErrorCode.E_EXIT: CodeInfo(
        Retry.FINAL,
        "the program ended by itself with a non-zero exit status",
        "no action needed on this node; `aitbc-minerctl logs ID` shows the output of the job",
    ),
    ErrorCode.E_SIGNAL: CodeInfo(
        Retry.HERE,
        "the program was ended by a signal that this node did not send",
        "look for a crash with `aitbc-minerctl logs ID`, or for a program or person that kills jobs",
    ),
    ErrorCode.E_SANDBOX: CodeInfo(
        Retry.ELSEWHERE,
        "the node could not start the job within its limits",
        "run `aitbc-miner doctor`; the message names the step that failed",
    ),
    ErrorCode.E_SECRET: CodeInfo(
        Retry.ELSEWHERE,
        "the job has secrets, and this node cannot open them",
        "no action needed: this version of the miner takes no jobs with secrets",
    ),
    ErrorCode.E_EGRESS: CodeInfo(
        Retry.ELSEWHERE,
        "the job asks for network access that its slot does not grant",
        "to grant the access, change `egress` of the slot",
    ),
    ErrorCode.E_TASK: CodeInfo(
        Retry.FINAL,
        "the Python task rejected its parameters, or raised an error",
        "no action needed on this node; the message and `aitbc-minerctl logs ID` show the error",
    ),
    ErrorCode.E_CANCELLED: CodeInfo(
        Retry.FINAL,
        "the coordinator or an operator cancelled the job",
        "no action needed",
    ),
    ErrorCode.E_LOST: CodeInfo(
        Retry.HERE,
        "the machine or the slot's worker stopped while the job was running",
        "see `journalctl -u aitbc-miner` for the cause",
    ),
    ErrorCode.E_UPLOAD: CodeInfo(
        Retry.HERE,
        "the coordinator did not accept the result",
        "see the message for the cause; the node retries once a day, `aitbc-minerctl retry ID` retries now",
    ),
    ErrorCode.E_INTERNAL: CodeInfo(
        Retry.HERE,
        "the miner itself failed; this is a defect",
        "report the defect with the journal of that minute",
    ),
}


class CommandError(MinerError):
    """Ends a command of the operator with this message and exit status."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class JobError(MinerError):
    """A job cannot go on, because of `code`. The process that records the job catches this error."""

    def __init__(self, code: ErrorCode, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


# Exit statuses of our commands (sysexits.h where it has one).
EXIT_OK = 0
EXIT_FAILURE = 1
EXIT_USAGE = 2
EXIT_UNREACHABLE = 69
EXIT_NOT_PERMITTED = 77
EXIT_CONFIG = 78
