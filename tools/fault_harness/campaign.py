"""Kills one node again and again while it works, then checks that no job was lost or done twice."""

import threading
import time
from collections import Counter
from collections.abc import Callable
from collections.abc import Set as AbstractSet
from contextlib import ExitStack, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeVar

import msgspec
from msgspec import Struct

from aitbc_miner.errors import ErrorCode
from aitbc_miner.jobs import Outcome, StateRecord
from aitbc_miner.jobs import State as JobState
from aitbc_miner.store.records import OUTCOME, STATE
from aitbc_miner.util import clock
from tools.fault_harness.checks import Fates, Finding, check
from tools.fault_harness.jobs import Jobs
from tools.fault_harness.node import FaultNode
from tools.fault_harness.plan import LOSING, Boundary, Fault, Side, Whom, faults
from tools.fault_harness.redis import FaultRedis
from tools.fault_harness.steps import Gate, Moment, StepServer, Trap
from tools.lib.local_node import wait_until
from tools.mock.bootstrap.coordinator import MockCoordinator
from tools.mock.bootstrap.records import FINAL, State

T = TypeVar("T")

# Until a boundary is come to; a slot or a child may be making a pause.
REACH_S = 15.0
PROVOKE_S = 2.0
# A quarantined slot comes back after a minute.
SETTLE_S = 150.0
STOP_S = 30.0
WAITING = frozenset({JobState.PULLED, JobState.ACKED, JobState.RETRY_WAIT})
IDENTIFY_S = 10.0
WAITING_JOBS = 6

OF_WORKERS = frozenset({"PREP", "RUNNING", "COLLECTING", "ended"})
"""The steps that only a worker takes."""


class Settings(Struct, frozen=True):
    """The settings of a campaign; `drop` and `disk`: the shares of lost answers and of failed writes.

    `redis`: the node's queue is in its own Redis, which the campaign kills and starts too.
    """

    seed: str
    slots: int = 4
    drop: float = 0.0
    disk: float = 0.0
    redis: bool = False
    settle_s: float = SETTLE_S


class Tally(Struct):
    """The faults and findings of a campaign."""

    kills: Counter[str] = msgspec.field(default_factory=Counter)
    hits: Counter[Boundary] = msgspec.field(default_factory=Counter)
    passed: Counter[Boundary] = msgspec.field(default_factory=Counter)
    missed: list[str] = []
    jobs: int = 0
    endings: Counter[str] = msgspec.field(default_factory=Counter)
    dropped: int = 0
    disk: Counter[str] = msgspec.field(default_factory=Counter)
    findings: list[Finding] = []
    directory: str = ""


class Campaign:
    """One node and its coordinator. `enough` decides when to stop, `tell` prints a fault."""

    def __init__(self, settings: Settings, enough: Callable[[], bool], tell: Callable[[str], None]) -> None:
        self._settings = settings
        self._enough = enough
        self._say = tell
        self._life = ExitStack()
        self._striking = threading.Lock()
        self._open: set[str] = set()
        self._fates = Fates(set(), set())
        self._feeding = True
        self.tally = Tally()
        folder = Path(self._life.enter_context(TemporaryDirectory(prefix="aitbc-faults-")))
        folder.chmod(0o755)
        self._gate = Gate(settings.seed, lambda: self._node.marks, drop=settings.drop, disk=settings.disk)
        steps = StepServer(folder, self._gate, disk=settings.disk > 0)
        self._life.callback(steps.close)
        # A job whose node has forgotten it is to be handed out again soon.
        mock = MockCoordinator(lease_s=2.0, boundary=self._gate.call)
        self._mock = self._life.enter_context(mock)
        self._redis = self._life.enter_context(FaultRedis(folder)) if settings.redis else None
        self._node = FaultNode(
            mock.url,
            settings.slots,
            steps.environ,
            heartbeat={"interval_s": 0.5, "backoff": {"min_s": 0.1, "max_s": 1}},
            queue=self._redis.settings if self._redis else {},
        )
        self._jobs = Jobs(settings.seed, self._node)

    def run(self) -> Tally:
        """Kill processes until `enough`, let all jobs end, and check the node."""
        tally, node = self.tally, self._node
        tally.directory = str(node.directory)
        try:
            node.launch()
            for fault in faults(self._settings.seed):
                if self._enough():
                    break
                self._carry_out(fault)
            self._gate.calm()
            tally.findings += self._settle()
            kinds = self._jobs.kinds
            tally.findings += check(self._mock, node, kinds, self._fates, disk=self._settings.disk > 0)
        except TimeoutError as error:
            tally.findings.append(Finding("defects", f"the campaign came to a halt: {error}"))
        finally:
            node.clean_up()
            self._count()
            self._life.close()
        return tally

    def _tell(self, text: str) -> None:
        """Print a fault, and log the fault in the node's directory."""
        self._say(text)
        with (self._node.directory / "faults.log").open("a") as log:
            log.write(f"{clock.wall()} {text}\n")

    # --- one fault -----------------------------------------------------------------------------------------

    def _carry_out(self, fault: Fault) -> None:
        if self._redis and (done := self._redis.turn(fault.number)):
            self._tell(done)
        self._pass_time(fault.pause_s)
        if fault.boundary is None:
            self._kill_at_random(fault)
        else:
            self._kill_at(fault, fault.boundary)
        if self._node.process_ended():
            # Its workers, if they live, go on alone for so long.
            until = time.monotonic() + fault.down_s
            wait_until(lambda: time.monotonic() >= until, fault.down_s + 1)

    def _kill_at(self, fault: Fault, boundary: Boundary) -> None:
        trap = Trap(boundary, fault.passes, lambda moment: self._spring(fault, moment))
        self._gate.trap = trap
        until = time.monotonic() + REACH_S
        provoke_at = time.monotonic()
        while not trap.sprung.wait(0.02) and time.monotonic() < until:
            self._tend()
            if time.monotonic() >= provoke_at:
                provoke_at = time.monotonic() + PROVOKE_S
                self._provoke(boundary)
        if not trap.disarm():
            self._miss(fault)
        self._gate.trap = None

    def _kill_at_random(self, fault: Fault) -> None:
        try:
            pid = self._tend_until(lambda: self._node.find(fault.whom, fault.number), IDENTIFY_S)
        except TimeoutError:
            self._miss(fault)
        else:
            self._strike(fault, None, pid)

    def _miss(self, fault: Fault) -> None:
        self.tally.missed.append(str(fault))
        self._tell(f"{fault}: not reached")

    def _spring(self, fault: Fault, moment: Moment) -> None:
        pid = moment.pid
        if fault.whom is Whom.HERE and moment.port is not None:
            pid = self._node.calling_from(moment.port)
        if fault.whom is Whom.SUPERVISOR:
            pid = self._node.supervisor
        if pid is None and fault.whom is not Whom.ALL:
            self._tell(f"{fault}: whoever stood there has gone")
            return
        self._strike(fault, moment, pid)
        self.tally.hits[moment.boundary] += 1

    def _strike(self, fault: Fault, moment: Moment | None, pid: int | None) -> None:
        """Kill processes, and note the jobs that the kill may affect."""
        with self._striking:
            workers = self._node.workers()
            if pid is not None and moment and moment.boundary.step in OF_WORKERS:
                # On a disk that fails, the supervisor's list of its workers may lack this one.
                workers = {**workers, f"pid {pid}": pid}
            role = "all" if fault.whom is Whom.ALL else self._role(pid, workers, fault, moment)
            hit = set(workers.values()) if role == "all" else {pid} & set(workers.values())
            held = self._held_by(hit)
            if role == "all":
                self._node.kill_all()
            elif pid is not None:
                self._node.kill([pid])
            # Once more, for what was given to them in the meantime.
            self._risk(held | self._held_by(hit), hit, moment)
            self.tally.kills[role] += 1
        self._tell(f"{fault}: {role} {pid or ''} {moment.job_id or '' if moment else ''}")

    def _role(self, pid: int | None, workers: dict[str, int], fault: Fault, moment: Moment | None) -> str:
        if pid == self._node.supervisor:
            return "supervisor"
        if pid in workers.values():
            return "worker"
        if moment is None:
            return str(fault.whom)
        return "heartbeat" if moment.boundary.step in {"register", "heartbeat"} else "agent"

    def _held_by(self, workers: AbstractSet[int | None]) -> set[str]:
        """Name the jobs that these workers may have, recorded or not."""
        held: set[str] = set()
        for job_id in list(self._open) if workers else ():
            with suppress(OSError, msgspec.DecodeError):
                text = (self._node.jobs / job_id / STATE).read_bytes()
                record = msgspec.json.decode(text, type=StateRecord)
                if record.state in WAITING or record.worker_pid in workers:
                    held.add(job_id)
        return held

    def _risk(self, held: set[str], workers: AbstractSet[int | None], moment: Moment | None) -> None:
        """Note the jobs of killed workers, which may be lost unless their outcome was on disk."""
        stood = moment.job_id if moment and moment.boundary == Boundary("outcome", Side.AFTER) else None
        self._fates.at_risk |= held - {stood}
        if moment is None or moment.job_id is None or moment.pid not in workers:
            return
        # A program that has begun is the one thing that nobody holds: it may have ended before the kill.
        free = moment.boundary == Boundary("started", Side.AFTER) and self._came_to_an_end(moment.job_id)
        once = self._jobs.kinds[moment.job_id].attempts == 1
        if moment.boundary in LOSING and once and not free:
            self._fates.doomed.add(moment.job_id)

    def _came_to_an_end(self, job_id: str) -> bool:
        try:
            text = (self._node.jobs / job_id / OUTCOME).read_bytes()
        except FileNotFoundError:
            return False
        return msgspec.json.decode(text, type=Outcome).code is not ErrorCode.E_LOST

    # --- what goes on all the time -------------------------------------------------------------------------

    def _pass_time(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        self._tend_until(lambda: time.monotonic() >= until, seconds + STOP_S)

    def _tend_until(self, condition: Callable[[], T], timeout: float) -> T:
        def tended() -> T:
            self._tend()
            return condition()

        value: T = wait_until(tended, timeout)
        return value

    def _tend(self) -> None:
        """Restart the node if necessary, submit jobs, and cancel the jobs to be cancelled."""
        with self._striking:
            if self._node.process_ended():
                self._note_exit()
                self._node.launch()
        for job_id in list(self._open):
            job = self._mock.job(job_id)
            if job.state in FINAL:
                self._open.remove(job_id)
            elif job.state is State.ACKED and self._jobs.kinds[job_id].cancel and not job.cancelled:
                self._mock.cancel(job_id)
        while self._feeding and len(self._open) < self._settings.slots + WAITING_JOBS:
            self._open.add(self._mock.submit(self._jobs.next()))

    def _note_exit(self) -> None:
        process = self._node.process
        if process is not None and process.wait() != -9:
            self.tally.findings.append(
                Finding(
                    "defects", f"the node ended by itself with {process.returncode}; see {self._node.log}"
                )
            )

    def _provoke(self, boundary: Boundary) -> None:
        """Cause the rare steps that do not happen by themselves."""
        if boundary.step == "register":
            self._mock.ledger.revoke_tokens()
        elif boundary.step == "workers" and (pid := self._node.find(Whom.WORKER)):
            self._strike(Fault(0, Whom.WORKER, None, 0, 0.0, 0.0), None, pid)

    # --- the end -------------------------------------------------------------------------------------------

    def _settle(self) -> list[Finding]:
        """Wait until every job has ended and every report is accepted, then stop the node."""
        self._feeding = False
        if self._redis:
            self._redis.revive()
        node = self._node
        try:
            self._tend_until(lambda: not self._open, self._settings.settle_s)
            wait_until(lambda: (now := node.status()) is not None and now.pending_reports == 0, STOP_S)
        except TimeoutError:
            left = ", ".join(sorted(self._open)[:10]) or "reports are pending"
            return [Finding("lost", f"not over after {self._settings.settle_s:g} s: {left}")]
        if status := node.stop(timeout=STOP_S):
            return [Finding("defects", f"the node ended with {status} when told to stop")]
        return []

    def _count(self) -> None:
        tally = self.tally
        tally.jobs = len(self._jobs.kinds)
        tally.passed = self._gate.passed
        tally.dropped, tally.disk = self._gate.dropped, self._gate.failed
        for job_id in self._jobs.kinds:
            job = self._mock.job(job_id)
            tally.endings[job.error_code or ("OK" if job.state is State.DONE else f"still {job.state}")] += 1
