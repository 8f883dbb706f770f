"""Everything that can go wrong with a job, and the root of our own exceptions.

The code of a failed job is public: it goes to the coordinator, into the metrics and onto the operator's
screen. Each one says what may be done about it: try again on this node, on another one, or not at all.
"""

from enum import StrEnum

from msgspec import Struct


class MinerError(Exception):
    """Root of our exceptions. The message reads "cannot X: cause; remedy"."""


class IllegalMove(Exception):  # noqa: N818  # it is a defect of ours, not a condition to handle
    """A slot or a job was to go from one state to another that may not follow."""


class LocalError(MinerError):
    """This machine's own trouble, which may pass: it says nothing of what was tried, and is tried again."""


def brief(error: object, most: int = 400) -> str:
    """Give an error's text, which may quote a stranger: printable, and without its middle if it is long."""
    text = str(error)
    half = most // 2
    short = text if len(text) <= most else f"{text[:half]} … {text[-half:]}"
    return "".join(char if char.isprintable() else "?" for char in short)


class Retry(StrEnum):
    """Where a job that failed with a code may be tried again."""

    HERE = "here"
    ELSEWHERE = "elsewhere"
    FINAL = "final"


class ErrorCode(StrEnum):
    """Why a job failed. See docs/errors.md, which is checked against this table."""

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
    """What a code means, where a job that failed with it may run again, and what the operator can do."""

    retry: Retry
    meaning: str
    advice: str


CODES: dict[ErrorCode, CodeInfo] = {
    ErrorCode.E_MANIFEST: CodeInfo(
        Retry.FINAL,
        "the job's manifest cannot be read, is too large, or contradicts itself",
        "nothing on this node; the job's author must mend the manifest",
    ),
    ErrorCode.E_DENY: CodeInfo(
        Retry.FINAL,
        "the allowlist does not permit this command or these arguments, or the task is not a trusted one",
        "if you do want to offer it, add to allowlist.d or task_paths what it needs; the next job sees it",
    ),
    ErrorCode.E_INPUT: CodeInfo(
        Retry.ELSEWHERE,
        "an input has a bad name, cannot be fetched, is too large, or its sha256 differs",
        "look at the address in the message; if many jobs fail so, check this node's network",
    ),
    ErrorCode.E_NOGPU: CodeInfo(
        Retry.ELSEWHERE,
        "no slot of this node has the GPU or the video memory that the job needs",
        "check `aitbc-miner probe` if you expected a GPU here",
    ),
    ErrorCode.E_NOSLOT: CodeInfo(
        Retry.ELSEWHERE,
        "no slot of this node is large enough for the job, or none offers its runner",
        "compare the job's requirements with slots.d",
    ),
    ErrorCode.E_TIMEOUT: CodeInfo(
        Retry.FINAL,
        "the job ran longer than its own or the slot's time limit and was ended",
        "raise max_runtime_s of the slot or of the allowlist entry if such jobs should finish here",
    ),
    ErrorCode.E_OOM: CodeInfo(
        Retry.ELSEWHERE,
        "the job needed more memory than its slot has",
        "raise memory_max of the slot, or let the coordinator send smaller jobs",
    ),
    ErrorCode.E_VRAM: CodeInfo(
        Retry.ELSEWHERE,
        "the job needed more video memory than its GPU has",
        "check that nothing else uses the GPU",
    ),
    ErrorCode.E_PIDS: CodeInfo(
        Retry.FINAL,
        "the job started more processes than its slot allows",
        "raise pids_max of the slot if such jobs are wanted",
    ),
    ErrorCode.E_DISK: CodeInfo(
        Retry.ELSEWHERE,
        "the disk of the workspace was full",
        "free space on the disk of workspace.root, or move workspace.root to a larger one",
    ),
    ErrorCode.E_OUTPUT: CodeInfo(
        Retry.FINAL,
        "the job wrote more than it was allowed to",
        "raise max_output_mb of the allowlist entry, or what the message names, if such output is wanted",
    ),
    ErrorCode.E_ARTIFACT: CodeInfo(
        Retry.FINAL,
        "what is to be delivered is missing, too large, not a plain file of the job's own, or still in use",
        "nothing on this node; see logs/exec.log of the job for why it did not write it",
    ),
    ErrorCode.E_EXIT: CodeInfo(
        Retry.FINAL,
        "the program ended by itself with a non-zero exit status",
        "nothing on this node; see logs/exec.log of the job",
    ),
    ErrorCode.E_SIGNAL: CodeInfo(
        Retry.HERE,
        "the program was ended by a signal that this node did not send",
        "look for a crash in logs/exec.log, or for another program or person that kills jobs",
    ),
    ErrorCode.E_SANDBOX: CodeInfo(
        Retry.ELSEWHERE,
        "the job could not be started within its limits",
        "run `aitbc-miner doctor`; the message names the step that failed",
    ),
    ErrorCode.E_SECRET: CodeInfo(
        Retry.ELSEWHERE,
        "a secret of the job could not be opened on this node",
        "check the node's key",
    ),
    ErrorCode.E_EGRESS: CodeInfo(
        Retry.ELSEWHERE,
        "the job asks for network access that its slot does not grant",
        "change the slot's egress policy if you want to grant it",
    ),
    ErrorCode.E_TASK: CodeInfo(
        Retry.FINAL,
        "the Python task rejected its parameters, or raised an error",
        "nothing on this node; the message and logs/exec.log have the error",
    ),
    ErrorCode.E_CANCELLED: CodeInfo(
        Retry.FINAL,
        "the job was cancelled by the coordinator or by an operator",
        "nothing",
    ),
    ErrorCode.E_LOST: CodeInfo(
        Retry.HERE,
        "the machine or the slot's worker stopped while the job was running",
        "look at the journal for what stopped them",
    ),
    ErrorCode.E_UPLOAD: CodeInfo(
        Retry.HERE,
        "the result could not be handed to the coordinator",
        "see the message for why; `aitbc-minerctl retry ID` sends it once more, and the node once a day",
    ),
    ErrorCode.E_INTERNAL: CodeInfo(
        Retry.HERE,
        "the miner itself failed; this is a defect",
        "please report it with the journal of that minute",
    ),
}


class JobError(MinerError):
    """A job cannot go on; the code says why. Raised anywhere in a job's way, caught where it is recorded."""

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
