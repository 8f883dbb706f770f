"""A slot of a running node: its rules (slots/state.py), its worker process, and its limits."""

import contextlib
import os
import signal
from collections.abc import Callable

from msgspec import Struct

from aitbc_miner.cgroup.group import CgroupError, Group
from aitbc_miner.config.units import format_cpus
from aitbc_miner.errors import ErrorCode
from aitbc_miner.ipc.messages import (
    END_SIGNALS,
    CancelJob,
    FromAgent,
    FromHeartbeat,
    FromWorker,
    JobDone,
    JobEnded,
    JobOnDisk,
    JobProgress,
    JobSettled,
    JobStep,
    JobTrouble,
    Retune,
    Retuned,
    SlotView,
    StartJob,
    Stop,
    ToWorker,
    WorkerReady,
    WorkerRefused,
)
from aitbc_miner.jobs import State
from aitbc_miner.slots.state import (
    Action,
    BeginJob,
    Died,
    Ended,
    EndJob,
    Event,
    JobStepped,
    KillAdopted,
    KillJob,
    KillWorker,
    Ready,
    Retire,
    RetryNow,
    Settle,
    Slot,
    SlotState,
    SpawnWorker,
    TerminateAdopted,
    Unusable,
    step,
)
from aitbc_miner.supervisor.children import Child, Keeper, OneShots
from aitbc_miner.supervisor.job_index import JobIndex
from aitbc_miner.supervisor.job_use import Said
from aitbc_miner.supervisor.node_plan import SlotPlan
from aitbc_miner.util import clock, fs
from aitbc_miner.util.log import events
from aitbc_miner.util.system import process_start


class Outcomes(Struct, frozen=True):
    """The receivers of a slot's news, and the children for its slow work."""

    index: JobIndex
    agent: Keeper[FromAgent]
    heartbeat: Keeper[FromHeartbeat]
    one_shots: OneShots

    def ended(self, said: JobEnded) -> None:
        """Note that a worker has written the outcome of its job."""
        self.index.ended(said)
        self.heartbeat.send(JobDone(said.code, said.timings))

    def settle(self, job_id: str, why: str, code: ErrorCode | None = None) -> None:
        """Have the agent report a job on which no process works any more; with a code, the job never ran."""
        self.index.settled(job_id)
        self.agent.send(JobSettled(job_id, why, code))

    def aside(
        self, name: str, work: Callable[[], Retuned | None], done: Callable[[Retuned | str], None]
    ) -> None:
        """Run `work` in a child; `done` gets its result, or a text that describes the child's failure."""
        try:
            self.one_shots.start(name, work, Retuned, done)
        except OSError as error:
            done(f"could not be started: {error.strerror}")


class RunningSlot:
    """One slot: passes events to the slot's rules and carries out the actions that the rules return."""

    def __init__(self, plan: SlotPlan, outcomes: Outcomes) -> None:
        self.plan = plan
        self.name = plan.spec.name
        self.rules = Slot(self.name, since=clock.now())
        self.child: Child[FromWorker] | None = None
        self.adopted: int | None = None
        self.enforced: dict[str, str] = {}
        self.note = ""
        self.trouble = ""
        self.said: Said | None = None
        # False when the worker could not apply the plan, so that the next reload sends the plan again.
        self._tuned = True
        self._outcomes = outcomes
        self._log = events("supervisor", slot=self.name)

    @property
    def free(self) -> bool:
        """Whether the slot can take a job now."""
        return self.rules.state is SlotState.IDLE

    @property
    def offers(self) -> bool:
        """Whether the slot takes jobs, now or later."""
        return not (self.rules.retiring or self.plan.problem)

    def view(self) -> SlotView:
        """Describe the slot to the other processes and to the operator."""
        rules = self.rules
        leaving = "will be removed when its job ends" if rules.retiring and rules.job_id is not None else None
        return SlotView(
            offer=self.plan.offer,
            state=rules.state,
            free=self.free,
            offers=self.offers,
            job_id=rules.job_id,
            job_state=rules.job_state,
            since=rules.since,
            reason=rules.reason or self.trouble or self.note or leaving,
            enforced=self.enforced,
            cgroup=str(self.plan.group) if self.plan.group else None,
            job_pid=rules.job_pid,
            worker_pid=self.child.pid if self.child else None,
            gpu=None if self.plan.spec.gpu is None else str(self.plan.spec.gpu),
            cpus=None if self.plan.spec.cpus is None else format_cpus(self.plan.spec.cpus),
        )

    def feed(self, event: Event) -> bool:
        """Pass an event to the rules and carry out their actions; True when the slot has changed."""
        before = self.rules
        self.rules, actions = step(self.rules, event, clock.now())
        if self.rules.state is not before.state:
            rules = self.rules
            self._log.info("slot changed", state=rules.state, reason=rules.reason, job_id=rules.job_id)
        for action in actions:
            self._do(action)
        return self.rules is not before

    def _do(self, action: Action) -> None:
        match action:
            case SpawnWorker():
                self._start_worker()
            case KillWorker():
                if self.child:
                    self.child.kill()
            case KillJob():
                self._kill_job()
            case BeginJob():
                self._say(StartJob(action.job_id))
            case EndJob():
                self._say(CancelJob(action.job_id, action.why, action.detail))
            case TerminateAdopted():
                self._signal_adopted(END_SIGNALS[action.why])
            case KillAdopted():
                self._signal_adopted(signal.SIGKILL)
            case Settle():
                self._outcomes.settle(action.job_id, action.why)

    def _say(self, message: ToWorker) -> None:
        if self.child:
            self.child.send(message)

    def _signal_adopted(self, number: int) -> None:
        if self.adopted is not None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self.adopted, number)

    def _start_worker(self) -> None:
        if self.plan.problem is not None:
            self.feed(Unusable(self.plan.problem))
            return
        if self.child is not None:
            # The old worker was told to end and still lives; its death is the event that starts the next.
            self.child.kill()
            return
        try:
            self.child = self.plan.spawn()
        except OSError as error:
            self._log.error("cannot start worker", error=str(error))
            self.feed(Died(f"could not be started: {error.strerror}"))

    def _kill_job(self) -> None:
        if self.plan.group is None:
            return  # the kernel kills the program with its worker; the supervisor kills the orphans
        try:
            Group(self.plan.group / "job").kill()
        except (CgroupError, OSError) as error:
            # The slot's next worker kills the job before it sends WorkerReady.
            self._log.error("cannot kill job", error=str(error))

    def hear(self) -> None:
        """Read the worker's messages."""
        for message in self.child.receive() if self.child else ():
            self._take(message)

    def _take(self, message: FromWorker) -> None:
        match message:
            case WorkerReady():
                self.enforced = message.enforced
                self._tuned = True
                self.feed(Ready())
            case Retuned():
                self._retuned(message)
            case WorkerRefused():
                self.feed(Unusable(message.reason))
            case JobStep():
                self.feed(JobStepped(message.job_id, message.state, message.pid, message.deadline))
                running = message.state is State.RUNNING
                self.said = Said(clock.now(), message.deadline) if running else None
                self._outcomes.index.step(message.job_id, message.state, self.name)
            case JobTrouble():
                self.trouble = message.what
            case JobProgress():
                if self.said:
                    self.said.pct, self.said.note = message.pct, message.note
                self._outcomes.agent.send(message)
            case JobOnDisk():
                if self.said:
                    self.said.disk_bytes = message.bytes
            case JobEnded() if message.job_id == self.rules.job_id:
                self.said = None
                self._outcomes.ended(message)
                self.note = self.note if not self._tuned else ""
                self.feed(Ended(message.job_id, message.clean, message.remains))

    def worker_gone(self) -> None:
        """Handle the end of the worker's process."""
        if self.child is None:
            return
        # The pipe may still hold the worker's last messages, such as the end of its job.
        self.hear()
        how = self.child.reap()
        self.child = None
        self.trouble = ""
        self._log.debug("worker gone", how=how)
        self.feed(Died(how))

    def adopt(self, pid: int, start: int | None) -> bool:
        """Watch a worker of an earlier run of the node; False when the worker has ended."""
        try:
            fd = fs.tried_again(lambda: os.pidfd_open(pid))
        except ProcessLookupError:
            return False
        # Checked while the pidfd is open: the kernel may have given the pid to another process.
        if start is None or process_start(pid) != start:
            os.close(fd)
            return False
        self.adopted = fd
        return True

    def adopted_gone(self) -> None:
        """Handle the end of an adopted worker: its job has an outcome now, or is lost."""
        if self.adopted is not None:
            os.close(self.adopted)
            self.adopted = None
            self.note = ""
            self.feed(Died("ended"))

    def change(self, plan: SlotPlan) -> bool:
        """Apply a new plan; False when the plan changes nothing. A running job goes on."""
        if self._tuned and _wanted(plan) == _wanted(self.plan):
            return False
        self.plan = plan
        if self.child:
            devices = tuple(map(str, plan.devices))
            self.child.send(Retune(plan.spec, plan.gpu_env, devices))
        elif self.adopted is not None:
            self._outcomes.aside(f"limits of {self.name}", plan.adjust, self._retuned)
        self.feed(RetryNow())
        return True

    def _retuned(self, said: Retuned | str) -> None:
        if isinstance(said, str):
            note = f"cannot change the limits of {self.name}: the helper process {said}; the old limits stay"
            said = Retuned(self.enforced, note, done=False)
        self.enforced = said.enforced
        self.note = said.note
        self._tuned = said.done
        if self.note:
            self._log.warning(
                "limits not changed" if not said.done else "limits changed in part", note=self.note
            )

    def stop(self) -> None:
        """Let the worker end; a running job is finished first."""
        self.feed(Retire())
        if self.child:
            self.child.send(Stop())


def _wanted(plan: SlotPlan) -> tuple[object, ...]:
    """Give the parts of a plan that the operator can change."""
    return plan.spec, plan.offer, plan.gpu_env, plan.devices, plan.problem
