"""Requests and answers on the control socket.

Each connection carries one frame with a `Request` and one frame with an answer. An answer may carry open
files (SCM_RIGHTS), so that the supervisor itself never reads a log.
"""

from collections.abc import Callable

from msgspec import Struct

from aitbc_miner.errors import EXIT_FAILURE, ErrorCode
from aitbc_miner.ipc.messages import CoordinatorView, SlotView
from aitbc_miner.jobs import JobUse, State

READ_VERBS = frozenset({"status", "slots", "jobs", "job", "logs", "history", "allow"})
WRITE_VERBS = frozenset({"drain", "resume", "cancel", "retry", "reload"})
SLOW_VERBS = frozenset({"history", "allow", "reload"})
"""The verbs that a child answers: clients wait `LATER_S` for the answer."""
MAX_REQUEST = 256 * 1024
# The time-out in seconds of an answer from a child or from the agent.
LATER_S = 60.0


class Request(Struct, frozen=True):
    """A client's request.

    Of the history: the last `since_s` seconds (None: all), and with `each` every job. `command` is a program
    with its arguments, `inputs` the job's input files; None means any.
    """

    verb: str
    job_id: str | None = None
    state: State | None = None
    since_s: float | None = None
    each: bool = False
    command: list[str] = []
    inputs: list[str] | None = None


class Refusal(Struct, frozen=True, tag="refusal"):
    """The request is refused: the reason, and the exit status for the client's command."""

    message: str
    exit_code: int = EXIT_FAILURE


class Done(Struct, frozen=True, tag="done"):
    """The request was carried out."""

    message: str


class JobRow(Struct, frozen=True):
    """A job in one line of `jobs`."""

    job_id: str
    state: State
    runner: str = ""
    slot: str | None = None
    code: ErrorCode | None = None
    message: str = ""
    since_wall: str = ""
    wall_s: float | None = None
    artifacts: int = 0
    use: JobUse | None = None


class Jobs(Struct, frozen=True, tag="jobs"):
    """The jobs of this node, the newest last."""

    jobs: list[JobRow]


class Files(Struct, frozen=True, tag="files"):
    """A job, and the names of the open files that come with this answer, in the same order."""

    job: JobRow
    names: list[str]


class History(Struct, frozen=True, tag="history"):
    """The history. One open file comes with this answer; `supervisor/slow_answers.py` has its format."""


class Judged(Struct, frozen=True, tag="judged"):
    """Whether a job may run a command: the deciding file and rule, the argument (from 1), the fitting values.

    `message` is the reason that the job would get or, for a permitted command, the command line to start.
    """

    permitted: bool
    message: str
    file: str | None = None
    line: int | None = None
    rule: str = ""
    argument: int | None = None
    fits: list[str] = []
    notes: list[str] = []


class SlotStatus(Struct, frozen=True):
    """A slot, and the seconds since its last change of state."""

    slot: SlotView
    for_s: float
    use: JobUse | None = None


class Problem(Struct, frozen=True):
    """A problem that the operator should know, and its remedy."""

    what: str
    remedy: str = ""


class Status(Struct, frozen=True, tag="status"):
    """The node on one screen. `accepting`: the node pulls jobs; if not, `paused` says why."""

    node_id: str
    version: str
    pid: int
    up_s: float
    accepting: bool
    stopping: bool
    coordinator: CoordinatorView
    base_url: str
    slots: list[SlotStatus]
    queued: list[str]
    pending_reports: int
    finished: dict[str, int]
    problems: list[Problem]
    paused: str = ""


Answer = Refusal | Done | Jobs | Files | History | Judged | Status

FullAnswer = tuple[Answer, list[int]]
"""An answer, and the descriptors to send with it; the server closes them."""

Later = Callable[[Answer | FullAnswer], None]
"""The function that sends a later answer; may be called after the client has gone."""
