"""The messages between the node's processes.

Every message is a tagged struct. Each direction has a union type, below its messages; the supervisor ends a
child that sends any other message. Times are seconds of the boot-time clock, except in names with `_wall`.
A docstring begins with the sender ("agent:") or the receiver ("to agent:").
"""

import signal
from typing import Annotated, Literal

from msgspec import Meta, Struct

from aitbc_miner.errors import ErrorCode
from aitbc_miner.gpu.facts import GpuFact
from aitbc_miner.ipc.channel import MAX_WAITING
from aitbc_miner.jobs import EndReason, JobId, Short, State
from aitbc_miner.slots.placement import Offer, Ticket
from aitbc_miner.slots.spec import SlotSpec

# The supervisor sends these signals instead of `CancelJob` (key: `why`) to a worker without a channel.
# Systemd also sends SIGTERM to stop the slots: the job is then lost, but nobody has cancelled the job.
END_SIGNALS = {"shutdown": signal.SIGTERM, "cancel": signal.SIGUSR1, "expired": signal.SIGUSR2}

CounterName = Literal["broken_records", "retries", "deliveries", "rate_limited", "receipts", "units", "price"]


class Message(Struct, frozen=True, tag=True):
    """The base of all messages: a frozen struct, tagged with the name of its class."""


class SlotView(Struct, frozen=True):
    """A slot, for the processes that are not its worker. `offers`: the slot takes jobs, now or later."""

    offer: Offer
    state: str
    free: bool
    offers: bool = True
    job_id: str | None = None
    job_state: State | None = None
    since: float = 0.0
    reason: str | None = None
    enforced: dict[str, str] = {}
    cgroup: str | None = None
    job_pid: int | None = None
    worker_pid: int | None = None
    gpu: str | None = None
    cpus: str | None = None


class FoundJob(Struct, frozen=True):
    """A job whose record on disk shows a start and no end."""

    job_id: JobId
    state: State
    slot: Short | None
    worker_pid: int | None
    worker_start: int | None
    deadline: float | None = None


# --- to the supervisor -------------------------------------------------------------------------------------


class Inventory(Message, frozen=True):
    """heartbeat: the GPUs of this machine; `error`: the reason why GPUs are missing or incomplete."""

    gpus: list[GpuFact]
    error: str | None = None


class CoordinatorView(Message, frozen=True):
    """heartbeat: whether the coordinator answers, since when, and its last error."""

    reachable: bool
    since_wall: str
    registered: bool = False
    error: str | None = None
    remedy: str | None = None


class Troubles(Message, frozen=True):
    """heartbeat: further faults of the node now, each with cause and remedy."""

    texts: Annotated[list[Annotated[str, Meta(max_length=2000)]], Meta(max_length=10)] = []


class Recovered(Message, frozen=True):
    """agent: the records are read; the jobs in `started` have no outcome yet."""

    started: Annotated[list[FoundJob], Meta(max_length=MAX_WAITING)]


class JobReady(Message, frozen=True):
    """agent: the job is recorded and acknowledged, its inputs are in place, and it needs a slot."""

    ticket: Ticket


class JobUpdate(Message, frozen=True):
    """agent: a job that is in no slot, for the command `jobs`."""

    job_id: JobId
    state: State
    runner: Short = ""
    code: ErrorCode | None = None
    message: str = ""
    slot: Short | None = None
    since_wall: Short = ""
    wall_s: float | None = None
    artifacts: int = 0


class CancelJob(Message, frozen=True):
    """agent to supervisor to worker: end the job; `why` is `cancel`, `expired` or `shutdown`.

    supervisor to agent: the job that waited for a slot will get none.
    """

    job_id: JobId
    why: EndReason
    detail: str = ""


class Deliveries(Message, frozen=True):
    """agent: the number of reports not yet accepted, the last error, the number refused for good.

    paused: the reason why the agent pulls no jobs although slots are free.
    """

    pending: int
    error: str | None = None
    refused: int = 0
    paused: Annotated[str, Meta(max_length=500)] = ""


class Starved(Message, frozen=True):
    """agent: all pulls since `since` came back empty, with possible causes; None: a pull brought a job."""

    since: float | None = None
    causes: list[str] = []


class Sweepable(Message, frozen=True):
    """agent: the supervisor may remove the directories of these settled jobs, the oldest first.

    early: their time to be kept is not over, so the supervisor stops once the disk has enough space.
    """

    job_ids: Annotated[list[JobId], Meta(max_length=1000)]
    early: bool = False


class Retried(Message, frozen=True):
    """agent: the result of `RetryJob`, as a sentence for the operator."""

    job_id: JobId
    message: str
    done: bool = True


class Counted(Message, frozen=True):
    """agent to supervisor to heartbeat: add `n` to a counter; `label` is a code or the end of a delivery."""

    name: CounterName
    label: Annotated[str, Meta(pattern=r"^\w{0,32}\Z")] = ""
    n: Annotated[int, Meta(ge=1, le=2**53)] = 1


class WorkerReady(Message, frozen=True):
    """worker: the slot is set up and empty; `enforced` names the mechanism that enforces each limit."""

    enforced: dict[str, str]


class Retuned(Message, frozen=True):
    """worker: the mechanisms that now enforce the slot's limits; `note` names the limits not in force yet.

    done: False if the old limits stay.
    """

    enforced: dict[str, str]
    note: str = ""
    done: bool = True


class WorkerRefused(Message, frozen=True):
    """worker: the slot cannot be used, and the worker ends."""

    reason: str


class JobStep(Message, frozen=True):
    """worker: the job has reached this state; the worker ends the job at `deadline` (None: never)."""

    job_id: str
    state: State
    pid: int | None = None
    deadline: float | None = None


class JobTrouble(Message, frozen=True):
    """worker: `what` blocks the worker's job; an empty `what`: nothing blocks the job any more."""

    job_id: str
    what: str


class JobProgress(Message, frozen=True):
    """worker to supervisor to agent: the progress that the task reports."""

    job_id: str
    pct: float | None
    note: str = ""


class JobOnDisk(Message, frozen=True):
    """worker: the job's use of the disk, in bytes."""

    job_id: str
    bytes: int


class JobEnded(Message, frozen=True):
    """worker: the outcome is on disk. `clean` is False if processes survive; `remains` names them."""

    job_id: str
    code: ErrorCode | None
    message: str = ""
    timings: dict[str, float] = {}
    clean: bool = True
    remains: str = ""


# --- from the supervisor -----------------------------------------------------------------------------------


class Slots(Message, frozen=True):
    """to agent and heartbeat: all slots, the jobs waiting for a slot, whether the agent may pull more."""

    slots: list[SlotView]
    queued: list[str]
    accepting: bool


class JobSettled(Message, frozen=True):
    """to agent: no process works on the job any more; its outcome is on disk, or the job is lost.

    With a code: the job never ran and cannot run here, and `why` is the whole message.
    """

    job_id: str
    why: str = ""
    code: ErrorCode | None = None


class JobDone(Message, frozen=True):
    """to heartbeat: a job has ended, for the metrics."""

    code: ErrorCode | None
    timings: dict[str, float] = {}


class NodeView(Message, frozen=True):
    """to heartbeat: further values for /healthz and /metrics."""

    pending_deliveries: int = 0
    agent_error: str | None = None


class Swept(Message, frozen=True):
    """to agent: the directories of these jobs are gone."""

    job_ids: list[str]
    freed_bytes: int = 0


class SpaceWanted(Message, frozen=True):
    """to agent: the disk lacks space; name the directories that the supervisor may remove early."""


class RetryJob(Message, frozen=True):
    """to agent: the operator asks to run the job again, or to send its report again, now."""

    job_id: str


class StartJob(Message, frozen=True):
    """to worker: run the job in the directory with this id."""

    job_id: str


class Retune(Message, frozen=True):
    """to worker: change the slot's limits, as far as possible also for the running job."""

    spec: SlotSpec
    gpu_env: dict[str, str] = {}
    devices: tuple[str, ...] = ()


class Stop(Message, frozen=True):
    """to all: end in good order. A worker finishes its running job first.

    leave: no job of this node goes on, so the heartbeat signs the node off at the coordinator.
    """

    leave: bool = False


FromAgent = (
    Recovered | JobReady | JobUpdate | CancelJob | Deliveries | Counted | Starved | Sweepable | Retried
)
FromHeartbeat = Inventory | CoordinatorView | Troubles
FromWorker = WorkerReady | Retuned | WorkerRefused | JobStep | JobTrouble | JobProgress | JobOnDisk | JobEnded
ToAgent = Slots | JobSettled | JobProgress | CancelJob | Swept | SpaceWanted | RetryJob | Stop
ToHeartbeat = Slots | JobDone | NodeView | Counted | Starved | Stop
ToWorker = StartJob | CancelJob | Retune | Stop


# --- between heartbeat and agent, past the supervisor ------------------------------------------------------


class TokenWanted(Message, frozen=True):
    """agent: send the node token; `refused` is the digest of a token that the coordinator rejected."""

    refused: str | None = None


class NodeToken(Message, frozen=True):
    """heartbeat: the token of a registration; `forgotten`: the coordinator had forgotten the node."""

    token: str
    forgotten: bool = False

    def __repr__(self) -> str:
        """Keep the token out of tracebacks and logs."""
        return "NodeToken(****)"


class Load(Message, frozen=True):
    """agent: the number of this node's unfinished jobs, in slots or not."""

    inflight: Annotated[int, Meta(ge=0)]


class BeatWanted(Message, frozen=True):
    """agent: send a heartbeat now."""


class Beaten(Message, frozen=True):
    """heartbeat: the coordinator has accepted a heartbeat since `BeatWanted`."""


PrivateLine = TokenWanted | NodeToken | Load | BeatWanted | Beaten
