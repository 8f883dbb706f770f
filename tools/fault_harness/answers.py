"""Tests odd answers of a coordinator: each status and body at each call, once or for long, heard or not.

A node's real agent and heartbeat run in threads of this process against a double; a stub of the supervisor
ends the jobs. All delays are short. No job may be lost, done twice, killed or end as E_UPLOAD, because the
coordinator always works again in the end.
"""

import itertools
import shutil
import socket
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import msgspec

from aitbc_miner.agent import admission, delivery_queue, reconcile
from aitbc_miner.agent.loop import Agent
from aitbc_miner.config import settings as config
from aitbc_miner.coordinator import rate_limits
from aitbc_miner.coordinator.aitbc import LIMITS
from aitbc_miner.coordinator.connect import connect
from aitbc_miner.errors import ErrorCode
from aitbc_miner.heartbeat.loop import HeartbeatTiming, run_heartbeat
from aitbc_miner.ipc import messages
from aitbc_miner.ipc.channel import Channel, ChannelError
from aitbc_miner.jobs import Outcome, State
from aitbc_miner.slots.placement import Offer
from aitbc_miner.store.records import Records
from tools.mock.aitbc.coordinator import KEY, MockAitbc
from tools.mock.bootstrap.coordinator import MockCoordinator
from tools.mock.bootstrap.records import FINAL, Verdict
from tools.mock.faults import SAID

STATUSES = (200, 201, 204, 302, 400, 401, 403, 404, 409, 413, 422, 429, 500, 502, 503)
BODIES = ("error", *SAID)
ENDPOINTS = {
    "bootstrap": ("register", "heartbeat", "pull", "ack", "progress", "result", "fail"),
    "aitbc-v1": ("register", "heartbeat", "poll", "jobs", "result", "fail"),
}
LONG = 6
PATIENCE_S = 120.0
RUNNING_MEANWHILE = frozenset({"register", "heartbeat", "progress", "jobs"})
"""Calls that are made while a job runs; it is let end when they have gone wrong."""


class Case(NamedTuple):
    """An odd answer; `heard`: the coordinator carries out the call before it answers."""

    dialect: str
    endpoint: str
    status: int
    body: str
    times: int
    heard: bool

    @property
    def fault(self) -> str:
        """The fault in the notation of the double."""
        return f"{'after:' if self.heard else ''}says:{self.status}:{self.body}"

    def __str__(self) -> str:
        return f"{self.dialect} {self.endpoint} {self.fault} {self.times} times"


class Shown(NamedTuple):
    """The number of cases and the findings."""

    cases: int
    found: Counter[str]
    examples: list[str]


def every(dialect: str) -> list[Case]:
    """Give all odd answers of a dialect, without acceptances, final refusals and false answers."""
    product = itertools.product([dialect], ENDPOINTS[dialect], STATUSES, BODIES, [1, LONG], [False, True])
    return [case for case in itertools.starmap(Case, product) if not _is_meant(case)]


def _is_meant(case: Case) -> bool:
    yes = {"ok"} if case.dialect == "aitbc-v1" else {"empty", "object", "ok"}
    if case.status == 200 and case.body in yes:
        return True
    own = case.body == "error"
    # A refusal of what was done; and a final one, which nothing can follow.
    return own and (case.status == 409 or (case.heard and case.status in {401, 404, 422, 429}))


def pairwise(cases: list[Case]) -> list[Case]:
    """Choose cases so that each possible pair of values of two factors occurs in a case."""
    pairs = {case: set(itertools.combinations(enumerate(case), 2)) for case in cases}
    left = set().union(*pairs.values())
    chosen: list[Case] = []
    while left:
        best = max(pairs, key=lambda case: len(pairs[case] & left))
        chosen.append(best)
        left -= pairs.pop(best)
    return chosen


def run(dialect: str, cases: list[Case]) -> Shown:
    """Run cases one after the other on one node."""
    found: Counter[str] = Counter()
    examples: list[str] = []
    with _shrunk(), _node(dialect) as node:
        for number, case in enumerate(cases):
            if wrong := node.suffer(case, f"job-{number:05}"):
                found[wrong] += 1
                examples.append(f"{wrong}: {case}")
    return Shown(len(cases), found, examples)


def run_all(*, full: bool) -> list[tuple[str, Shown]]:
    """Run both dialects, each in several processes."""
    parts: list[tuple[str, list[Case]]] = []
    for dialect in ENDPOINTS:
        cases = every(dialect) if full else pairwise(every(dialect))
        parts += [(dialect, cases[start::2]) for start in range(2)]
    with ProcessPoolExecutor(len(parts), get_context("spawn")) as pool:
        futures = [(dialect, pool.submit(run, dialect, cases)) for dialect, cases in parts]
        return [(dialect, future.result()) for dialect, future in futures]


# --- a node without slots ----------------------------------------------------------------------------------


class _Node:
    """Two threads with the node's code, and a thread that ends the jobs."""

    def __init__(self, dialect: str, mock: "MockCoordinator | MockAitbc", directory: Path) -> None:
        self.dialect, self.mock, self.directory = dialect, mock, directory
        self.held = threading.Event()
        self.runs: Counter[str] = Counter()
        self.cancelled: set[str] = set()
        self.pending = 0
        self._stopping = False
        (agent, self._agent), (beat, self._beat), (left, right) = (socket.socketpair() for _ in range(3))
        self._sockets = [agent, self._agent, beat, self._beat, left, right]
        settings = _settings(dialect, mock.url, directory)
        self._records = Records(settings.workspace.root)
        environ = {"MINER_AUTH": KEY if dialect == "aitbc-v1" else "demo-token"}
        self._to_agent: Channel[messages.FromAgent] = Channel(self._agent, messages.FromAgent)
        self._to_beat: Channel[messages.FromHeartbeat] = Channel(self._beat, messages.FromHeartbeat)
        line: Channel[messages.PrivateLine] = Channel(left, messages.PrivateLine)
        made = Agent(Channel(agent, messages.ToAgent), line, settings, connect(settings, None))
        there: Channel[messages.ToHeartbeat] = Channel(beat, messages.ToHeartbeat)
        other: Channel[messages.PrivateLine] = Channel(right, messages.PrivateLine)
        timing = HeartbeatTiming(settle=0.01, between_beats=0.02)
        beating = partial(run_heartbeat, there, other, settings, environ, timing=timing)
        self._threads = [
            threading.Thread(target=_until_closed, args=(target,), daemon=True)
            for target in (made.run, beating, self._serve)
        ]
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        # Its own thread says it to the others: no channel is for two.
        self._stopping = True
        for thread in self._threads:
            thread.join(PATIENCE_S)
        for each in self._sockets:
            each.close()

    def suffer(self, case: Case, job_id: str) -> str:
        """Run a job while the coordinator answers oddly; give the finding, or an empty text."""
        if case.endpoint == "register":
            self.mock.fault("heartbeat", "status:401", 1)
        if case.endpoint in RUNNING_MEANWHILE:
            self.held.clear()
        self.mock.fault(case.endpoint, case.fault, case.times)
        name = f"bad-{job_id}" if case.endpoint == "fail" else job_id
        name = self._submit(name)
        try:
            # What was heard, and counted, need not be said again.
            self._wait(lambda: not self.mock.faults.as_list() or (self._ended(name) and not self.pending))
            self.held.set()
            self._wait(lambda: self._ended(name) and not self.pending)
        except TimeoutError:
            return "lost"
        finally:
            self.held.set()
            self.mock.clear_faults()
        return self._judge(name)

    def _submit(self, job_id: str) -> str:
        if isinstance(self.mock, MockAitbc):
            return self.mock.submit({"type": "script", "line": job_id})
        return self.mock.submit({"job_id": job_id, "runner": "cli", "command": "true"})

    def _ended(self, job_id: str) -> bool:
        if isinstance(self.mock, MockAitbc):
            return self.mock.job(job_id).state in {"COMPLETED", "FAILED"}
        return self.mock.job(job_id).state in FINAL

    def _judge(self, job_id: str) -> str:
        if isinstance(self.mock, MockAitbc):
            there = self.mock.job(job_id)
            count = len(there.results) + len(there.fails)
            upload = "E_UPLOAD" in (there.error or "")
        else:
            job = self.mock.job(job_id)
            count = sum(report.verdict is Verdict.ACCEPTED for report in job.reports)
            upload = job.error_code == "E_UPLOAD"
        if job_id in self.cancelled:
            return "killed"
        if upload:
            return "E_UPLOAD"
        if count != 1 or self.runs[job_id] != 1:
            return "doubled"
        return ""

    @staticmethod
    def _wait(done: Callable[[], object]) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not done():
            if time.monotonic() > deadline:
                raise TimeoutError
            time.sleep(0.002)

    # What stands for the supervisor.

    def _serve(self) -> None:
        running: list[str] = []
        self._tell(running)
        while not self._stopping:
            for channel in (self._to_agent, self._to_beat):
                for message in channel.wait(0.005):
                    match message:
                        case messages.JobReady():
                            running.append(message.ticket.job_id)
                            self.runs[message.ticket.job_id] += 1
                            self._tell(running)
                        case messages.CancelJob():
                            self.cancelled.add(message.job_id)
                        case messages.Deliveries():
                            self.pending = message.pending
            if running and self.held.is_set():
                for job_id in running:
                    self._end(job_id)
                running = []
                self._tell(running)
        for channel in (self._to_agent, self._to_beat):
            channel.send(messages.Stop())

    def _tell(self, running: list[str]) -> None:
        offer = Offer("cpu0", "cpu", 4, 4096, 0, ("cli",))
        job_id = running[0] if running else None
        view = messages.SlotView(offer, "busy" if running else "idle", free=not running, job_id=job_id)
        for channel in (self._to_agent, self._to_beat):
            channel.send(messages.Slots([view], [], accepting=True))

    def _end(self, job_id: str) -> None:
        with self._records.open(job_id) as job:
            job.move(State.PREP, slot="cpu0", started=True)
            raw = msgspec.json.encode(job.manifest())
            code = ErrorCode.E_EXIT if b"bad-" in raw else None
            job.write_outcome(Outcome(job_id=job_id, code=code, message="as asked for", slot="cpu0"))
        self._to_agent.send(messages.JobSettled(job_id))


def _until_closed(target: Callable[[], None]) -> None:
    with suppress(ChannelError):
        target()


@contextmanager
def _node(dialect: str) -> Iterator[_Node]:
    directory = Path(tempfile.mkdtemp(prefix="aitbc-miner-"))
    mock = MockAitbc(rate_limits=False) if dialect == "aitbc-v1" else MockCoordinator(lease_s=0.4)
    with mock:
        node = _Node(dialect, mock, directory)
        try:
            yield node
        finally:
            node.close()
            shutil.rmtree(directory, ignore_errors=True)


def _settings(dialect: str, url: str, directory: Path) -> config.Config:
    services = directory / "services.d"
    services.mkdir()
    (services / "script.yaml").write_text(
        "service: script\nmatch: {types: [script]}\n"
        "fields: {line: {type: text, required: true, max_bytes: 1000}}\n"
        'run: {command: "true", args: ["{line}"]}\nresult: {}\n'
    )
    services.chmod(0o755)
    there = config.CoordinatorSection(
        url,
        "env:MINER_AUTH",
        dialect="aitbc-v1" if dialect == "aitbc-v1" else "bootstrap",
        auth_scheme="api_key" if dialect == "aitbc-v1" else "bearer",
        poll_interval_s=0.02,
        timeout_s=5.0,
    )
    root = directory / "jobs"
    root.mkdir()
    return config.Config(
        there,
        node_id="node-1",
        heartbeat=config.HeartbeatSection(0.1, 10, config.BackoffSection(0.01, 0.05)),
        services_dir=services,
        workspace=config.WorkspaceSection(root, reserve_mb=0),
        queue=config.QueueSection(path=directory / "queue.db"),
        telemetry=config.TelemetrySection("127.0.0.1:0"),
    )


@contextmanager
def _shrunk() -> Iterator[None]:
    """Shorten the delays without a configuration key, for the rest of this process."""
    delivery_queue.RETRY_MIN_S = admission.ACK_RETRY_MIN_S = 0.01
    reconcile.AGAIN_S = 0.02
    rate_limits.WINDOW_S, rate_limits.PAUSES_S = 0.1, (0.02,) * 5
    for name in LIMITS:
        LIMITS[name] = 10_000
    yield
