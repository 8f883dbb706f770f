"""Takes a job through its slot: prepare → run → judge → collect → outcome on disk."""

import itertools
import os
import platform
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TypeVar

import aitbc_miner
from aitbc_miner.errors import ErrorCode, JobError, MinerError
from aitbc_miner.ipc.messages import JobStep
from aitbc_miner.jobs import Artifact, ExitStatus, LeftOut, Manifest, Outcome, State
from aitbc_miner.runners.interface import JobPaths, Runner, Verdict, last_line, shortest
from aitbc_miner.runners.registry import RunnerSet
from aitbc_miner.sandbox.bubblewrap import HOME
from aitbc_miner.slots.spec import MIB, SlotSpec
from aitbc_miner.store import reserve
from aitbc_miner.store.records import JobDir, pretty
from aitbc_miner.util import clock, fs
from aitbc_miner.util.log import events
from aitbc_miner.util.system import process_start
from aitbc_miner.worker import workspace
from aitbc_miner.worker.artifacts import LOG, Caps, Collector, log_artifact
from aitbc_miner.worker.causes import Evidence, cause_of
from aitbc_miner.worker.context import SlotContext
from aitbc_miner.worker.hold import JobHold
from aitbc_miner.worker.launch import Started, limits_for
from aitbc_miner.worker.link import FULL_TRIES, SupervisorLink, is_full
from aitbc_miner.worker.monitor import JobMonitor
from aitbc_miner.worker.prewarm import Warmer
from aitbc_miner.worker.steps import STEPS

T = TypeVar("T")


class JobRun:
    """A run of a job; the attributes have the results so far, and `_outcome` makes the record of them."""

    def __init__(
        self, job: JobDir, slot: SlotContext, link: SupervisorLink, runners: RunnerSet, warmer: Warmer
    ) -> None:
        self.hold = JobHold(job, slot, link)
        self.hold.give(warmer)
        self._job = job
        self._slot = slot
        self._runners = runners
        self._began = clock.now()
        self._timings: dict[str, float] = {}
        self._verdict = Verdict(ErrorCode.E_INTERNAL, "internal error: the job ended without a verdict")
        # The beginning of a message: the step that fails.
        self._at = ""
        self._events = events("worker", slot=slot.spec.name, job_id=job.job_id)
        self._artifacts: list[Artifact] = []
        self._left_out: list[LeftOut] = []
        self._attempt = job.state().attempt

    def run(self) -> Outcome:
        """Take the job from its record to its outcome.

        If the disk does not take the outcome, the worker waits for the disk, to keep the job's work.

        Raises:
            OSError: the outcome cannot be written, and the miner stops at once or the directory is gone.
        """
        with self._recording_failure():
            runner = self._execute()
            self._judge(runner)
            self._collect()
        return self._finish()

    @contextmanager
    def _recording_failure(self) -> Iterator[None]:
        """Turn every error into the job's verdict."""
        try:
            yield
        except JobError as error:
            code = ErrorCode.E_DISK if is_full(error.__cause__) else error.code
            self._verdict = self._why_ended(error.__cause__) or Verdict(code, error.message)
        except OSError as error:
            code = ErrorCode.E_DISK if is_full(error) else ErrorCode.E_INTERNAL
            self._verdict = self._why_ended(error) or Verdict(code, f"cannot run the job: {self._at}{error}")
        except MinerError as error:
            self._verdict = self._why_ended(error.__cause__) or Verdict(ErrorCode.E_INTERNAL, str(error))
        except Exception as error:  # noqa: BLE001  # a defect of the miner costs the job, not the slot
            self._events.exception("job failed unexpectedly")
            self._verdict = Verdict(ErrorCode.E_INTERNAL, f"cannot run the job: {self._at}{error!a:.300}")

    @contextmanager
    def _phase(self, name: str, state: State, deadline: float | None = None) -> Iterator[None]:
        """Record the job's new state, tell the supervisor, and take the time."""
        began = clock.now()
        self._record(state, deadline)
        try:
            yield
        finally:
            self._timings[name] = round(clock.now() - began, 6)

    def _why_ended(self, trouble: BaseException | None) -> Verdict | None:
        """Give the verdict of a job that was told to end while the worker waited for trouble to pass."""
        why = self.hold.link.why_end(self._job.job_id)
        if why is None or not fs.may_pass(trouble):
            return None
        return cause_of(Evidence(ExitStatus(killed_for=why), cancel_detail=self._cancel_detail()))

    def _cancel_detail(self) -> str:
        cancel = self.hold.link.cancelled.get(self._job.job_id)
        return cancel.detail if cancel else ""

    def _patiently(self, doing: str, call: Callable[[], T], *, over: bool = False) -> T:
        return self.hold.link.patiently(self._job.job_id, doing, call, over=over)

    def _record(self, state: State, deadline: float | None) -> None:
        own, slot = os.getpid(), self._slot.spec.name
        over = state is State.COLLECTING
        start = self._patiently("read the worker's start time", lambda: process_start(own), over=over)
        changes = {"slot": slot, "worker_pid": own, "worker_start": start, "deadline": deadline}
        if state is State.RUNNING:
            # Written before the program starts: from now on, only the job's policy allows another run.
            changes["started"] = True
        # Make the new state only once: a failed write may have written it already, and no state follows
        # itself.
        after = self._patiently("read the job's state", lambda: self._job.after(state, **changes), over=over)
        self._patiently("write the job's state", lambda: self._job.write_state(after), over=over)
        self.hold.link.send(JobStep(self._job.job_id, state))

    # --- the phases of a job, in order ---------------------------------------------------------------------

    def _execute(self) -> Runner:
        with self.hold.stack:
            with self._phase("prepare", State.PREP):
                runner = self._plan()
                self._take_steps(State.PREP)
            limit = self._time_limit()
            deadline = None if limit is None else clock.now() + limit
            # Leave the steps within the phase, so that the phase's time includes their end.
            with self._phase("run", State.RUNNING, deadline), self.hold.stack:
                self._take_steps(State.RUNNING)
                self._watch(limit)
        return runner

    def _plan(self) -> Runner:
        hold, slot = self.hold, self._slot
        manifest = hold.manifest = self._patiently("read the manifest", self._job.manifest)
        runner = self._patiently("read the allowlist and tasks", self._runners.current).get(manifest.runner)
        if runner is None or manifest.runner not in slot.spec.runners:
            raise JobError(
                ErrorCode.E_DENY,
                f"cannot run the job: slot {slot.spec.name} offers no runner {manifest.runner!r}",
            )
        _refuse_unmet(manifest, slot.spec)
        # The paths that the job sees.
        paths = JobPaths(HOME if slot.sandbox else self._job.path)
        plan = partial(runner.plan, manifest, paths, slot.spec, slot.gpu_env)
        hold.launch = self._patiently("check whether the job may run", plan)
        return runner

    def _take_steps(self, state: State) -> None:
        for step in STEPS:
            if step.state is state:
                self._at = f"cannot {step.doing}: "
                self._patiently(step.doing, partial(self.hold.enter, step.enter))
        self._at = ""

    def _watch(self, limit: float | None) -> None:
        hold, job = self.hold, self.hold[Started].job
        # The program gets its full time, however long its start took.
        deadline = None if limit is None else clock.now() + limit
        hold.link.send(JobStep(self._job.job_id, State.RUNNING, job.pid, deadline))
        hold.ending = JobMonitor(hold, deadline).run()
        hold.usage = job.usage()

    def _time_limit(self) -> float | None:
        hold = self.hold
        return shortest(hold.manifest.timeout_s, self._slot.spec.max_runtime_s, hold.launch.max_runtime_s)

    def _judge(self, runner: Runner) -> None:
        """Find the cause of the job's end: by our record of kills, the kernel's counters, then its exit."""
        ending = self.hold.ending
        evidence = self._patiently("find the cause of the job's end", self._evidence, over=True)
        self._verdict = cause_of(evidence) or runner.verdict(ending.exit, ending.reports, self.hold.log.tail)
        if self._verdict.code is not None:
            raise JobError(self._verdict.code, self._verdict.message)

    def _evidence(self) -> Evidence:
        hold, ended = self.hold, self.hold.ending.exit
        group = self._slot.group.job if self._slot.group else None
        rlimits = limits_for(hold.launch, self._slot.limits).rlimits
        file_max = rlimits.get(resource.RLIMIT_FSIZE)
        # Look for a file at its limit only if the job failed, because a job may leave very many files.
        suspect = file_max if ended.status != 0 and ended.killed_for is None else None
        kept = self._slot.config.workspace
        free = workspace.room_left(self._job.fd, reserve.spent(kept.root, kept.reserve_mb))
        return Evidence(
            exit=ended,
            usage=hold.usage,
            cancel_detail=self._cancel_detail(),
            last_line=last_line(hold.log.tail),
            time_max_s=self._time_limit(),
            cpu_max_s=rlimits.get(resource.RLIMIT_CPU),
            memory_events=group.events("memory.events") if group else {},
            memory_max=group.limit("memory.max") if group else None,
            pids_events=group.events("pids.events") if group else {},
            pids_max=group.limit("pids.max") if group else None,
            file_max=file_max,
            excess=hold.ending.excess,
            file_at_limit=workspace.file_of_size(self._job.fd, suspect) if suspect else None,
            disk_free=free,
        )

    def _collect(self) -> None:
        hold = self.hold
        if not hold.ending.clean:
            # A living process could change a file during the collection, and after. (Other processes of the
            # job's user were killed and hang in the kernel: they change nothing, and cost only the slot.)
            raise JobError(ErrorCode.E_ARTIFACT, f"cannot collect the output: {hold.remains}")
        with self._phase("collect", State.COLLECTING):
            own = self._slot.config.workspace
            caps = Caps(own.max_artifacts, own.max_artifacts_mb * MIB, hold.launch.max_output_bytes)
            service = self._slot.service
            owner = (service.uid, service.gid) if service else None

            def collect() -> list[Artifact]:
                try:
                    group = self._slot.group.job if self._slot.group else None
                    collector = Collector(self._job.fd, caps, owner, group, own.root)
                    found = [*log_artifact(self._job.fd, LOG), *collector.collect(hold.manifest.artifacts)]
                except OSError as error:
                    if is_full(error):
                        workspace.make_room(self._job.fd, ("tmp",))
                    raise
                self._left_out = collector.left_out
                return found

            self._artifacts = self._patiently("collect the output", collect, over=True)

    def _finish(self) -> Outcome:
        self._timings["total"] = round(clock.now() - self._began, 6)
        outcome = self._outcome()
        try:
            pretty(outcome)
        except Exception as error:  # noqa: BLE001  # the job's result may be no JSON
            self._events.exception("outcome not encoded")
            self._verdict = Verdict(
                ErrorCode.E_INTERNAL, f"cannot record the outcome: {type(error).__name__}"
            )
            outcome = self._outcome()
        self._write(outcome)
        return outcome

    def _write(self, outcome: Outcome) -> None:
        """Write the outcome as soon as the disk takes it."""
        refusals = itertools.count(1)

        def write() -> None:
            try:
                self._job.write_outcome(outcome)
            except OSError as error:
                if is_full(error) and next(refusals) == FULL_TRIES:
                    # The job's own files may fill the disk, and nobody gets them any more.
                    workspace.make_room(self._job.fd)
                raise

        self._patiently("write the job's outcome", write, over=True)

    def _outcome(self) -> Outcome:
        ok = self._verdict.code is None
        return Outcome(
            job_id=self._job.job_id,
            attempt=self._attempt,
            code=self._verdict.code,
            message=self._verdict.message,
            slot=self._slot.spec.name,
            exit=self.hold.ending.exit,
            usage=self.hold.usage,
            timings=self._timings,
            artifacts=self._artifacts if ok else [],
            left_out=self._left_out if ok else [],
            result=self._verdict.result,
            log=self.hold.log,
            enforced=self._slot.enforced,
            versions={"aitbc_miner": aitbc_miner.__version__, "python": platform.python_version()},
            finished_wall=clock.wall(),
        )


def _refuse_unmet(manifest: Manifest, spec: SlotSpec) -> None:
    """Refuse secrets and network policies that the slot cannot give: a run without them would mislead."""
    if manifest.secrets:
        raise JobError(ErrorCode.E_SECRET, "cannot open the job's secrets: the node has no key")
    if manifest.egress not in {None, "none", spec.egress}:
        raise JobError(
            ErrorCode.E_EGRESS,
            f"cannot grant egress {manifest.egress!r:.80}: slot {spec.name} has {spec.egress!r}",
        )
