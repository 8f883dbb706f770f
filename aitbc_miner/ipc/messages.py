"""What the processes of the node say to each other.

Every message is a struct with a tag; each direction has a union type at the end of this file, and a process
that sends anything else is ended. Times are seconds of the boot-time clock unless the name says otherwise.
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

# How a worker is told what `CancelJob.why` says when there is no channel to it. SIGTERM is also what systemd
# sends to stop the slots: then the job is lost, and nobody has said that it is not wanted any more.
END_SIGNALS = {"shutdown": signal.SIGTERM, "cancel": signal.SIGUSR1, "expired": signal.SIGUSR2}

CounterName = Literal["broken_records", "retries", "deliveries", "rate_limited", "receipts", "units", "price"]


class Message(Struct, frozen=True, tag=True):
    """The root of all messages: a frozen struct, tagged with the name of its class."""


class SlotView(Struct, frozen=True):
    """A slot as the others see it. `offers`: whether it takes jobs, now or later."""

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
    """A job that the agent found started but not ended on disk."""

    job_id: JobId
    state: State
    slot: Short | None
    worker_pid: int | None
    worker_start: int | None
    deadline: float | None = None


# --- to the supervisor -------------------------------------------------------------------------------------


class Inventory(Message, frozen=True):
    """heartbeat: the GPUs of this machine, or why they cannot be told."""

    gpus: list[GpuFact]
    error: str | None = None


class CoordinatorView(Message, frozen=True):
    """heartbeat: whether the coordinator answers, since when, and what it last said wrong."""

    reachable: bool
    since_wall: str
    registered: bool = False
    error: str | None = None
    remedy: str | None = None


class Troubles(Message, frozen=True):
    """heartbeat: what else is wrong now, each with its cause and what to do."""

    texts: Annotated[list[Annotated[str, Meta(max_length=2000)]], Meta(max_length=10)] = []


class Recovered(Message, frozen=True):
    """agent: it has read the records; these jobs were started and have no outcome yet."""

    started: Annotated[list[FoundJob], Meta(max_length=MAX_WAITING)]


class JobReady(Message, frozen=True):
    """agent: recorded, acknowledged, inputs in place; wants a slot."""

    ticket: Ticket


class JobUpdate(Message, frozen=True):
    """agent: what `jobs` shows of a job that is not in a slot."""

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

    supervisor to agent: a job that waited for a slot will get none.
    """

    job_id: JobId
    why: EndReason
    detail: str = ""


class Deliveries(Message, frozen=True):
    """agent: reports that are not accepted yet, the last reason, and how many were refused for good.

    paused: why nothing is pulled although slots are free.
    """

    pending: int
    error: str | None = None
    refused: int = 0
    paused: Annotated[str, Meta(max_length=500)] = ""


class Starved(Message, frozen=True):
    """agent: each pull has come back empty since then, and what may be the causes; without, it is over."""

    since: float | None = None
    causes: list[str] = []


class Sweepable(Message, frozen=True):
    """agent: the directories of these jobs may go; they are delivered, the oldest first.

    early: before their time, so only as many of them as it takes until there is space enough.
    """

    job_ids: Annotated[list[JobId], Meta(max_length=1000)]
    early: bool = False


class Retried(Message, frozen=True):
    """agent: what became of `RetryJob`, as a sentence for the operator."""

    job_id: JobId
    message: str
    done: bool = True


class Counted(Message, frozen=True):
    """agent to supervisor to heartbeat: for the metrics; `label` is the code, or how a delivery ended."""

    name: CounterName
    label: Annotated[str, Meta(pattern=r"^\w{0,32}\Z")] = ""
    n: Annotated[int, Meta(ge=1, le=2**53)] = 1


class WorkerReady(Message, frozen=True):
    """worker: its slot is set up and empty; what enforces each of its limits."""

    enforced: dict[str, str]


class Retuned(Message, frozen=True):
    """worker: what enforces its slot's limits now; `note` says what of them does not hold yet, and why.

    done: False when the old ones go on.
    """

    enforced: dict[str, str]
    note: str = ""
    done: bool = True


class WorkerRefused(Message, frozen=True):
    """worker: its slot cannot be used; it ends."""

    reason: str


class JobStep(Message, frozen=True):
    """worker: its job has come to this step; `deadline` is when the worker will end it, if it ever will."""

    job_id: str
    state: State
    pid: int | None = None
    deadline: float | None = None


class JobTrouble(Message, frozen=True):
    """worker: what keeps it from going on with its job, until it says so again with nothing in `what`."""

    job_id: str
    what: str


class JobProgress(Message, frozen=True):
    """worker to supervisor to agent: the task's own word on how far it is."""

    job_id: str
    pct: float | None
    note: str = ""


class JobOnDisk(Message, frozen=True):
    """worker: so many bytes its job has on disk."""

    job_id: str
    bytes: int


class JobEnded(Message, frozen=True):
    """worker: the outcome is on disk. `clean` is False when something survives, which `remains` says."""

    job_id: str
    code: ErrorCode | None
    message: str = ""
    timings: dict[str, float] = {}
    clean: bool = True
    remains: str = ""


# --- from the supervisor -----------------------------------------------------------------------------------


class Slots(Message, frozen=True):
    """to agent and heartbeat: all slots, the jobs that wait for one, and whether more may be pulled."""

    slots: list[SlotView]
    queued: list[str]
    accepting: bool


class JobSettled(Message, frozen=True):
    """to agent: no process works on the job any more; its outcome is on disk, or it is lost.

    With a code it has never run, and cannot here: `why` is the whole message then.
    """

    job_id: str
    why: str = ""
    code: ErrorCode | None = None


class JobDone(Message, frozen=True):
    """to heartbeat: for the metrics."""

    code: ErrorCode | None
    timings: dict[str, float] = {}


class NodeView(Message, frozen=True):
    """to heartbeat: what else /healthz and /metrics show."""

    pending_deliveries: int = 0
    agent_error: str | None = None


class Swept(Message, frozen=True):
    """to agent: the directories of these jobs are gone."""

    job_ids: list[str]
    freed_bytes: int = 0


class SpaceWanted(Message, frozen=True):
    """to agent: there is not room enough on the disk; name what may go before its time."""


class RetryJob(Message, frozen=True):
    """to agent: the operator wants a job tried, or its report sent, once more now."""

    job_id: str


class StartJob(Message, frozen=True):
    """to worker: run the job whose directory bears this id."""

    job_id: str


class Retune(Message, frozen=True):
    """to worker: the slot is to have other limits, for the job that runs as far as can be."""

    spec: SlotSpec
    gpu_env: dict[str, str] = {}
    devices: tuple[str, ...] = ()


class Stop(Message, frozen=True):
    """to all: end in good order. A worker finishes the job that it has, if any.

    `leave`: no job of this node goes on meanwhile, so the coordinator may be told that it is gone.
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
    """agent: send the node token; `refused` is the digest of one that the coordinator no longer takes."""

    refused: str | None = None


class NodeToken(Message, frozen=True):
    """heartbeat: the token of a registration; `forgotten`: of one by a coordinator that did not know us."""

    token: str
    forgotten: bool = False

    def __repr__(self) -> str:
        """Keep the token out of tracebacks and logs."""
        return "NodeToken(****)"


class Load(Message, frozen=True):
    """agent: so many jobs are this node's to do now, wherever they are."""

    inflight: Annotated[int, Meta(ge=0)]


class BeatWanted(Message, frozen=True):
    """agent: the coordinator should hear from us now."""


class Beaten(Message, frozen=True):
    """heartbeat: it has, since that was asked for."""


PrivateLine = TokenWanted | NodeToken | Load | BeatWanted | Beaten
