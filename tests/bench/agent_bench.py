"""What the agent's parts work with, for tests: real records, a real database, and a coordinator by script."""

import select
import socket
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from msgspec.structs import replace

from aitbc_miner.agent.admission_queue import AdmissionQueue
from aitbc_miner.agent.anchor import Anchor
from aitbc_miner.agent.context import AgentContext
from aitbc_miner.agent.delivery_queue import DeliveryQueue
from aitbc_miner.agent.fleet import Fleet
from aitbc_miner.agent.job_table import Stage
from aitbc_miner.agent.node_token import TokenLine
from aitbc_miner.agent.retries import Retries
from aitbc_miner.config.settings import Config, GiveUp, QueueSection, WorkspaceSection
from aitbc_miner.coordinator.interface import PulledJob, PullFilters, Told
from aitbc_miner.errors import ErrorCode
from aitbc_miner.ipc.channel import Channel
from aitbc_miner.ipc.messages import FromAgent, JobUpdate, NodeToken, PrivateLine, Slots, SlotView, ToAgent
from aitbc_miner.jobs import Artifact, Outcome, State
from aitbc_miner.queue.interface import Claim, Kind, QueueError, Task
from aitbc_miner.queue.sqlite import SqliteQueue
from aitbc_miner.slots.placement import Offer
from aitbc_miner.slots.state import SlotState
from aitbc_miner.store.database import Database
from aitbc_miner.store.ledger import Ledger
from tests.support.mute_coordinator import MuteCoordinator
from tests.support.pulled_jobs import CONFIG, pulled

TOKEN = "node-t0ken"
NODE = "node-a"
OFFER = Offer("cpu0", "cpu", 4, 4096, 0, ("cli",))
FREE = Slots([SlotView(OFFER, SlotState.IDLE, free=True)], [], accepting=True)


def in_slot(job_id: str) -> Slots:
    """Give the word of a supervisor whose only slot has a job."""
    return Slots([SlotView(OFFER, SlotState.BUSY, free=False, job_id=job_id)], [], accepting=True)


LARGE = Artifact("a", "artifacts/0000", 50_000_000, "0" * 64)
PATIENCE_S = 20.0


class ScriptedCoordinator(MuteCoordinator):
    """Hands out what is in `jobs`. A call raises what is in `answers` for it, and else is accepted.

    A call about a job that has a gate waits for that. `told` are the calls, in order.
    """

    def __init__(self) -> None:
        self.jobs: list[PulledJob] = []
        self.asked: list[PullFilters] = []
        self.answers: dict[str, list[Exception]] = {}
        self.gates: dict[str, threading.Event] = {}
        self.told: list[tuple[str, str]] = []
        self.keys: list[str] = []
        self.token = ""
        self.wants_end = False

    def _tell(self, call: str, job_id: str) -> None:
        self.told.append((call, job_id))
        if gate := self.gates.get(job_id):
            assert gate.wait(PATIENCE_S)
        if answers := self.answers.get(call):
            raise answers.pop(0)

    def use_token(self, token: str) -> None:
        self.token = token

    def pull(self, filters: PullFilters) -> PulledJob | None:
        self.asked.append(filters)
        if answers := self.answers.get("pull"):
            raise answers.pop(0)
        return self.jobs.pop(0) if self.jobs else None

    def ack(self, job_id: str, holder: str | None = None) -> None:
        self._tell("ack", job_id)

    def progress(self, job_id: str, pct: float, note: str) -> bool:
        self._tell("progress", job_id)
        return self.wants_end

    def result(self, job_id: str, outcome: Outcome, root: Path, key: str, *, again: bool = False) -> Told:
        self.keys.append(key)
        self._tell("result", job_id)
        return Told()

    def fail(self, job_id: str, outcome: Outcome, key: str, *, again: bool = False) -> Told:
        self.keys.append(key)
        self._tell("fail", job_id)
        return Told()


class Around:
    """The other ends of an agent's channels, and its coordinator."""

    context: AgentContext

    def __init__(self) -> None:
        self.ends = [*socket.socketpair(), *socket.socketpair()]
        self.channel: Channel[ToAgent] = Channel(self.ends[0], ToAgent)
        self.line: Channel[PrivateLine] = Channel(self.ends[2], PrivateLine)
        self.supervisor: Channel[FromAgent] = Channel(self.ends[1], FromAgent)
        self.heartbeat: Channel[PrivateLine] = Channel(self.ends[3], PrivateLine)
        self.coordinator = ScriptedCoordinator()

    def said(self) -> list[FromAgent]:
        """Give what the supervisor was told since the last time."""
        try:
            return self.supervisor.receive()
        except BlockingIOError:
            return []

    def shown(self) -> list[State]:
        """Give the states that the supervisor was told since the last time."""
        return [each.state for each in self.said() if isinstance(each, JobUpdate)]

    def register(self) -> None:
        """Have the heartbeat hand over a token."""
        self.heartbeat.send(NodeToken(TOKEN))
        assert self.context.token.receive()

    def turn_until(self, done: Callable[[], object]) -> None:
        """Do what has come back to the main thread until something is so."""
        deadline = time.monotonic() + PATIENCE_S
        poller = select.poll()
        poller.register(self.context.background.woken, select.POLLIN)
        while not done():
            assert time.monotonic() < deadline, "it never came"
            if poller.poll(20):
                self.context.background.clear()
            self.context.background.finish()

    def note_all(self) -> None:
        """Wait until all that was said to the queues so far is there."""
        noted = threading.Event()
        # By its callback: then those of all that came before have been run, too.
        self.context.start("queue", lambda: None, lambda _: noted.set())
        self.turn_until(noted.is_set)

    def close(self) -> None:
        """End all threads and close all descriptors."""
        for gate in self.coordinator.gates.values():
            gate.set()
        for pool in self.context._pools.values():
            pool.shutdown()
        for end in self.ends:
            end.close()


def config_in(directory: Path) -> Config:
    """Give a configuration whose files are all below a directory."""
    root = directory / "jobs"
    root.mkdir(exist_ok=True)
    coordinator = replace(CONFIG.coordinator, give_up=GiveUp(refusals=1, over_s=0.0))
    return replace(
        CONFIG,
        coordinator=coordinator,
        node_id=NODE,
        workspace=WorkspaceSection(root),
        queue=QueueSection(path=directory / "queue.db"),
    )


class Desk(Around):
    """A workbench for one part of the agent."""

    def __init__(self, directory: Path) -> None:
        super().__init__()
        config = config_in(directory)
        database = Database(config.queue.path)
        token = TokenLine(self.line, self.coordinator)
        self.context = context = AgentContext(
            config, self.channel, self.coordinator, token, Ledger(database), SqliteQueue(database)
        )
        self.jobs = context.jobs
        self.stopping = threading.Event()
        self.fleet = self.make_fleet()
        self.anchor = Anchor(context, database)
        self.delivery = DeliveryQueue(context, self.fleet)
        self.retries = Retries(context, self.fleet, self.delivery)
        self.admission = AdmissionQueue(
            context, self.fleet, self.anchor, self.retries, self.delivery, self.stopping
        )

    def make_fleet(self) -> Fleet | None:
        """Give the node's part in a fleet; a test that has one says here which."""
        return None

    def among(self, *stages: Stage) -> list[str]:
        """Name the jobs in some stages."""
        return [entry.job_id for entry in self.jobs.among(*stages)]

    def close(self) -> None:
        """End all threads and close all descriptors."""
        self.stopping.set()
        super().close()

    def record(self, job_id: str = "j1", *steps: State, **more: object) -> None:
        """Record a job, and how far it has come; `more` is for its manifest."""
        self.context.records.create(job_id, pulled(job_id=job_id, **more).raw)
        with self.context.records.open(job_id) as job:
            for step in steps:
                job.move(step, **({"started": True} if step is State.RUNNING else {}))

    def conclude(
        self, job_id: str = "j1", code: ErrorCode | None = None, artifacts: Sequence[Artifact] = ()
    ) -> Outcome:
        """Write a job's outcome."""
        with self.context.records.open(job_id) as job:
            attempt = job.state().attempt
            outcome = Outcome(
                job_id, attempt=attempt, code=code, message=str(code or ""), artifacts=list(artifacts)
            )
            job.write_outcome(outcome)
        return outcome

    def state(self, job_id: str = "j1") -> tuple[State, str | None]:
        """Give where a job is, and what became of its report."""
        with self.context.records.open(job_id) as job:
            record = job.state()
            return record.state, record.delivery


class FlakyQueue(SqliteQueue):
    """A queue that is out of reach while `down`, and whose calls are written down."""

    shared = True

    def __init__(self, database: Database) -> None:
        self.down = False
        self.fails_at: str | None = None
        self.calls: list[str] = []
        super().__init__(database)

    def _reach(self, call: str) -> None:
        self.calls.append(call)
        if self.down or self.fails_at == call:
            raise QueueError("cannot reach the queue: it is down; start it")

    def hold(self, task: Task, token: str, lease_s: float) -> bool:
        self._reach("hold")
        return super().hold(task, token, lease_s)

    def put(self, task: Task, delay_s: float, token: str | None = None) -> bool:
        self._reach("put")
        return super().put(task, delay_s, token)

    def due(self, node: str, limit: int) -> list[Task]:
        self._reach("due")
        return super().due(node, limit)

    def claim(self, kind: Kind, job_id: str, node: str, lease_s: float) -> Claim | None:
        self._reach("claim")
        return super().claim(kind, job_id, node, lease_s)

    def renew(self, kind: Kind, job_id: str, token: str, lease_s: float) -> bool:
        self._reach("renew")
        return super().renew(kind, job_id, token, lease_s)

    def remove(self, kind: Kind, job_id: str, token: str | None = None) -> bool:
        self._reach("remove")
        return super().remove(kind, job_id, token)
