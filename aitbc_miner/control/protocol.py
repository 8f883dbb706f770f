"""Requests and answers on the control socket.

One request a connection: a frame with a `Request`, answered by a frame with an answer, which may carry open
files (SCM_RIGHTS), so that the supervisor never reads a log itself.
"""

from collections.abc import Callable

from msgspec import Struct

from aitbc_miner.errors import EXIT_FAILURE, ErrorCode
from aitbc_miner.ipc.messages import CoordinatorView, SlotView
from aitbc_miner.jobs import JobUse, State

READ_VERBS = frozenset({"status", "slots", "jobs", "job", "logs", "history", "allow"})
WRITE_VERBS = frozenset({"drain", "resume", "cancel", "retry", "reload"})
SLOW_VERBS = frozenset({"history", "allow", "reload"})
"""Those that a child answers: clients wait `LATER_S` for it."""
MAX_REQUEST = 256 * 1024
# For an answer that has to wait for something.
LATER_S = 60.0


class Request(Struct, frozen=True):
    """What a client wants; of the history the last `since_s` seconds, or all, and with `each` every job.

    `command` is a program with its arguments, `inputs` the files that its job has: None means any.
    """

    verb: str
    job_id: str | None = None
    state: State | None = None
    since_s: float | None = None
    each: bool = False
    command: list[str] = []
    inputs: list[str] | None = None


class Refusal(Struct, frozen=True, tag="refusal"):
    """No: why, and the exit status that the command should end with."""

    message: str
    exit_code: int = EXIT_FAILURE


class Done(Struct, frozen=True, tag="done"):
    """It was done."""

    message: str


class JobRow(Struct, frozen=True):
    """A job in one line."""

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
    """The jobs that this node holds, the newest last."""

    jobs: list[JobRow]


class Files(Struct, frozen=True, tag="files"):
    """A job, and the files that come along with this answer, in this order."""

    job: JobRow
    names: list[str]


class History(Struct, frozen=True, tag="history"):
    """What jobs have come to. With it comes one file, as `supervisor/slow_answers.py` describes it."""


class Judged(Struct, frozen=True, tag="judged"):
    """Whether a job may run a command: by which file and rule, at which argument (from 1), what fits there.

    `message` is what the job would be told, or of one that is permitted what would be started.
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
    """A slot and how long, in seconds, it has been in its state."""

    slot: SlotView
    for_s: float
    use: JobUse | None = None


class Problem(Struct, frozen=True):
    """Something the operator should know, and what to do about it."""

    what: str
    remedy: str = ""


class Status(Struct, frozen=True, tag="status"):
    """The node on one screen. `accepting`: jobs are pulled; if not, `paused` says why."""

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
"""An answer, and the descriptors that go with it; the server closes them."""


Later = Callable[[Answer | FullAnswer], None]
"""How to answer when the answer is not known yet; it may be used after the client has gone."""
