"""One job in its slot, in one direction: prepare → run → judge → collect → outcome on disk."""

import itertools
import os
import platform
import resource
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TypeVar

import aitbc_miner
from aitbc_miner.errors import ErrorCode, JobError, MinerError
from aitbc_miner.ipc.messages import JobStep
from aitbc_miner.jobs import Artifact, ExitStatus, LeftOut, LogInfo, Manifest, Outcome, State, Usage
from aitbc_miner.runners.interface import JobPaths, Launch, Runner, Verdict, last_line, shortest
from aitbc_miner.runners.registry import RunnerSet
from aitbc_miner.sandbox.bubblewrap import HOME
from aitbc_miner.sandbox.spawn import Job
from aitbc_miner.slots.spec import SlotSpec
from aitbc_miner.store import reserve
from aitbc_miner.store.records import JobDir, pretty
from aitbc_miner.util import clock, fs
from aitbc_miner.util.log import events
from aitbc_miner.util.system import process_start
from aitbc_miner.worker import workspace
from aitbc_miner.worker.artifacts import LOG, Caps, Collector, log_artifact
from aitbc_miner.worker.causes import Evidence, cause_of
from aitbc_miner.worker.cleanup import clear_user, named
from aitbc_miner.worker.context import SlotContext
from aitbc_miner.worker.disk_use import DiskUse
from aitbc_miner.worker.job_log import JobLog
from aitbc_miner.worker.launch import Started, limits_for, start
from aitbc_miner.worker.link import FULL_TRIES, SupervisorLink, is_full
from aitbc_miner.worker.monitor import Ending, JobMonitor
from aitbc_miner.worker.prewarm import Warm, Warmer

T = TypeVar("T")

MIB = 1 << 20


class JobRun:
    """One run of one job; what is known so far is in its attributes, and `_outcome` makes a record of it."""

    def __init__(
        self,
        job: JobDir,
        slot: SlotContext,
        runners: RunnerSet,
        link: SupervisorLink,
        warmer: Warmer,
    ) -> None:
        self._job = job
        self._warmer = warmer
        self._warm: Warm | None = None
        self._slot = slot
        self._runners = runners
        self._link = link
        self._began = clock.now()
        self._timings: dict[str, float] = {}
        self._verdict = Verdict(ErrorCode.E_INTERNAL, "cannot run the job: it came to no end")
        self._ending = Ending(ExitStatus(), clean=True, reports=[])
        self._remains = ""
        self._usage = Usage()
        self._log = LogInfo()
        self._events = events("worker", slot=slot.spec.name, job_id=job.job_id)
        self._artifacts: list[Artifact] = []
        self._left_out: list[LeftOut] = []
        self._attempt = job.state().attempt

    def run(self) -> tuple[Outcome, bool]:
        """Take the job from its record to its outcome; False with it when something of it is still alive.

        A disk that does not take the outcome is waited for: what the job has done is not thrown away.

        Raises:
            OSError: the outcome cannot be written, and the miner stops at once or the directory is gone.
        """
        with self._recording_failure():
            try:
                manifest, runner, launch = self._prepare()
                self._execute(manifest, launch)
            finally:
                # Unless it has run the job.
                if self._warm is not None:
                    self._warm.end()
            self._judge(manifest, runner, launch)
            self._collect(manifest, launch)
        return self._finish()

    @property
    def clean(self) -> bool:
        """Whether the slot's next job finds nothing of this one alive."""
        return self._ending.clean and not self._remains

    @property
    def remains(self) -> str:
        """What is still alive, as a sentence; empty when the slot is clean."""
        return self._remains

    @contextmanager
    def _recording_failure(self) -> Iterator[None]:
        """Turn whatever goes wrong into the job's verdict."""
        try:
            yield
        except JobError as error:
            code = ErrorCode.E_DISK if is_full(error.__cause__) else error.code
            self._verdict = self._why_ended(error.__cause__) or Verdict(code, error.message)
        except OSError as error:
            code = ErrorCode.E_DISK if is_full(error) else ErrorCode.E_INTERNAL
            self._verdict = self._why_ended(error) or Verdict(code, f"cannot run the job: {error}")
        except MinerError as error:
            self._verdict = self._why_ended(error.__cause__) or Verdict(ErrorCode.E_INTERNAL, str(error))
        except Exception as error:  # noqa: BLE001  # a defect that the job has found costs the job, not the slot
            self._events.exception("job failed unexpectedly")
            self._verdict = Verdict(ErrorCode.E_INTERNAL, f"cannot run the job: {error!a:.300}")

    @contextmanager
    def _step(self, name: str, state: State, deadline: float | None = None) -> Iterator[None]:
        """Record that the job has come to this step, tell the supervisor, and take its time."""
        began = clock.now()
        self._record(state, deadline)
        try:
            yield
        finally:
            self._timings[name] = round(clock.now() - began, 6)

    def _why_ended(self, trouble: BaseException | None) -> Verdict | None:
        """Say why trouble that may pass is waited for no longer, where somebody wants the job to end."""
        why = self._link.why_end(self._job.job_id)
        if why is None or not fs.may_pass(trouble):
            return None
        return cause_of(Evidence(ExitStatus(killed_for=why), cancel_detail=self._cancel_detail()))

    def _cancel_detail(self) -> str:
        cancel = self._link.cancelled.get(self._job.job_id)
        return cancel.detail if cancel else ""

    def _patiently(self, doing: str, call: Callable[[], T], *, over: bool = False) -> T:
        return self._link.patiently(self._job.job_id, doing, call, over=over)

    def _record(self, state: State, deadline: float | None) -> None:
        own = os.getpid()
        slot = self._slot.spec.name
        over = state is State.COLLECTING
        start = self._patiently("look at our own process", lambda: process_start(own), over=over)
        changes = {"slot": slot, "worker_pid": own, "worker_start": start, "deadline": deadline}
        if state is State.RUNNING:
            # Written before the program starts: from here on only its own policy lets the job run again.
            changes["started"] = True
        # Made once: a write may fail when the new state stands already, which cannot follow itself.
        after = self._patiently("read the job's state", lambda: self._job.after(state, **changes), over=over)
        self._patiently("write the job's state", lambda: self._job.write_state(after), over=over)
        self._link.send(JobStep(self._job.job_id, state))

    # --- the steps, in their order -------------------------------------------------------------------------

    def _prepare(self) -> tuple[Manifest, Runner, Launch]:
        with self._step("prepare", State.PREP):
            manifest = self._patiently("read the manifest", self._job.manifest)
            runner = self._patiently("read what may run", self._runners.current).get(manifest.runner)
            if runner is None or manifest.runner not in self._slot.spec.runners:
                raise JobError(
                    ErrorCode.E_DENY,
                    f"cannot run the job: slot {self._slot.spec.name} offers no runner {manifest.runner!r}",
                )
            _refuse_unmet(manifest, self._slot.spec)
            # As the job sees them.
            paths = JobPaths(HOME if self._slot.sandbox else self._job.path)
            plan = partial(runner.plan, manifest, paths, self._slot.spec, self._slot.gpu_env)
            launch = self._patiently("see whether the job may run", plan)
            self._warm = self._warmer.take(launch, self._slot)
            self._patiently("make the job's directories", self._make_directories)
            users = self._slot.runs_as, self._slot.service
            self._patiently("take the inputs", lambda: workspace.hand_over(self._job, *users))
        return manifest, runner, launch

    def _make_directories(self) -> None:
        slot, warm, self._warm = self._slot, self._warm, None
        try:
            workspace.prepare(self._job, slot.runs_as, slot.service, slot.spec.name if warm else None)
        except OSError:
            # What it was to have may be half moved by now; the next try goes without.
            if warm is not None:
                warm.end()
            raise
        if slot.group is not None and warm is None:
            slot.group.renew_job()
        self._warm = warm

    def _execute(self, manifest: Manifest, launch: Launch) -> None:
        limit = self._time_limit(manifest, launch)
        deadline = None if limit is None else clock.now() + limit
        with self._step("run", State.RUNNING, deadline), ExitStack() as stack:
            log = self._patiently("make the job's log", self._open_log)
            try:
                disk = stack.enter_context(self._disk_use())
                started = self._patiently("start the job", lambda: self._start(launch, stack))
                with self._leaving_nothing(started.job):
                    pid = started.job.pid
                    # Its time is its own: however long it has taken to start it.
                    deadline = None if limit is None else clock.now() + limit
                    self._link.send(JobStep(self._job.job_id, State.RUNNING, pid, deadline))
                    monitor = JobMonitor(
                        started.job,
                        self._job.job_id,
                        self._link,
                        log,
                        deadline=deadline,
                        delays=self._slot.delays,
                        disk=disk,
                    )
                    self._ending = monitor.run(started.log, started.reports)
                    self._usage = started.job.usage()
            finally:
                self._log = log.close()

    def _open_log(self) -> JobLog:
        service = self._slot.service
        cap = self._slot.config.workspace.max_log_mb * MIB
        with fs.directory("logs", at=self._job.fd) as logs:
            return JobLog(logs, cap, service.gid if service else None)

    def _start(self, launch: Launch, stack: ExitStack) -> Started:
        warm, self._warm = self._warm, None
        with ExitStack() as ours:
            if warm is None:
                started = start(launch, self._job.path, self._slot, ours)
            else:
                try:
                    started = warm.give(launch, ours)
                except OSError:
                    warm.end()
                    if self._slot.group is not None:
                        self._slot.group.renew_job()
                    raise
            stack.push(ours.pop_all())
        return started

    def _disk_use(self) -> DiskUse:
        kept = self._slot.config.workspace
        most_bytes = None if kept.max_job_mb is None else kept.max_job_mb * MIB
        return DiskUse(self._job.fd, workspace.OF_JOB, most_bytes, kept.max_job_files)

    @contextmanager
    def _leaving_nothing(self, job: Job) -> Iterator[None]:
        """Kill what runs when we fail; the slot is not clean unless all of it is seen to be gone."""
        try:
            yield
        except BaseException:
            self._ending = Ending(ExitStatus(), clean=False, reports=[])
            clean = job.kill_all(self._slot.delays.kill)
            self._ending = Ending(job.poll() or ExitStatus(), clean, reports=[])
            raise
        finally:
            self._remains = f"what job {self._job.job_id} has left behind is not known"
            look = partial(self._left_behind, job)
            self._remains = self._patiently("see what the job has left behind", look, over=True)

    def _left_behind(self, job: Job) -> str:
        runs_as, most = self._slot.runs_as, self._slot.delays.kill
        if not self._ending.clean:
            # Between the last look and this one it may have ended after all.
            left = named(job.survivors()) or "something"
            return f"{left} of job {self._job.job_id} could not be killed within {most:g} s"
        # Not started by the job, but for it: by cron, at, or a service manager of the user.
        if runs_as and (owned := clear_user(runs_as.uid, most)):
            return f"user {runs_as.name} still owns {named(owned)}"
        return ""

    def _time_limit(self, manifest: Manifest, launch: Launch) -> float | None:
        return shortest(manifest.timeout_s, self._slot.spec.max_runtime_s, launch.max_runtime_s)

    def _judge(self, manifest: Manifest, runner: Runner, launch: Launch) -> None:
        """Say why it ended: by our own record of kills, then the kernel's counters, then its exit."""
        evidence = self._patiently(
            "see why the job ended", lambda: self._evidence(manifest, launch), over=True
        )
        self._verdict = cause_of(evidence) or runner.verdict(
            self._ending.exit, self._ending.reports, self._log.tail
        )
        if self._verdict.code is not None:
            raise JobError(self._verdict.code, self._verdict.message)

    def _evidence(self, manifest: Manifest, launch: Launch) -> Evidence:
        ended = self._ending.exit
        group = self._slot.group.job if self._slot.group else None
        rlimits = limits_for(launch, self._slot.limits).rlimits
        file_max = rlimits.get(resource.RLIMIT_FSIZE)
        # Looked for only where it can matter, for the job may have left very many files.
        suspect = file_max if ended.status != 0 and ended.killed_for is None else None
        kept = self._slot.config.workspace
        free = workspace.room_left(self._job.fd, reserve.spent(kept.root, kept.reserve_mb))
        return Evidence(
            exit=ended,
            usage=self._usage,
            cancel_detail=self._cancel_detail(),
            last_line=last_line(self._log.tail),
            time_max_s=self._time_limit(manifest, launch),
            cpu_max_s=rlimits.get(resource.RLIMIT_CPU),
            memory_events=group.events("memory.events") if group else {},
            memory_max=group.limit("memory.max") if group else None,
            pids_events=group.events("pids.events") if group else {},
            pids_max=group.limit("pids.max") if group else None,
            file_max=file_max,
            excess=self._ending.excess,
            file_at_limit=workspace.file_of_size(self._job.fd, suspect) if suspect else None,
            disk_free=free,
        )

    def _collect(self, manifest: Manifest, launch: Launch) -> None:
        if not self._ending.clean:
            # What is alive could change a file while it is read, and after. (Others of its user have been
            # killed and hang in the kernel: they do nothing more of their own, and cost the slot alone.)
            raise JobError(ErrorCode.E_ARTIFACT, f"cannot collect the output: {self._remains}")
        with self._step("collect", State.COLLECTING):
            own = self._slot.config.workspace
            caps = Caps(own.max_artifacts, own.max_artifacts_mb * MIB, launch.max_output_bytes)
            service = self._slot.service
            owner = (service.uid, service.gid) if service else None

            def collect() -> list[Artifact]:
                try:
                    group = self._slot.group.job if self._slot.group else None
                    collector = Collector(self._job.fd, caps, owner, group, own.root)
                    found = [*log_artifact(self._job.fd, LOG), *collector.collect(manifest.artifacts)]
                except OSError as error:
                    if is_full(error):
                        workspace.make_room(self._job.fd, ("tmp",))
                    raise
                self._left_out = collector.left_out
                return found

            self._artifacts = self._patiently("collect the output", collect, over=True)

    def _finish(self) -> tuple[Outcome, bool]:
        self._timings["total"] = round(clock.now() - self._began, 6)
        outcome = self._outcome()
        try:
            pretty(outcome)
        except Exception as error:  # noqa: BLE001  # what the job reported may be no JSON
            self._events.exception("outcome cannot be written as JSON")
            self._verdict = Verdict(
                ErrorCode.E_INTERNAL, f"cannot record the outcome: {type(error).__name__}"
            )
            outcome = self._outcome()
        self._write(outcome)
        return outcome, self.clean

    def _write(self, outcome: Outcome) -> None:
        """Write the outcome, when the disk takes it."""
        refusals = itertools.count(1)

        def write() -> None:
            try:
                self._job.write_outcome(outcome)
            except OSError as error:
                if is_full(error) and next(refusals) == FULL_TRIES:
                    # Perhaps it is full of what the job itself has left, which nobody gets any more.
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
            exit=self._ending.exit,
            usage=self._usage,
            timings=self._timings,
            artifacts=self._artifacts if ok else [],
            left_out=self._left_out if ok else [],
            result=self._verdict.result,
            log=self._log,
            enforced=self._slot.enforced,
            versions={"aitbc_miner": aitbc_miner.__version__, "python": platform.python_version()},
            finished_wall=clock.wall(),
        )


def _refuse_unmet(manifest: Manifest, spec: SlotSpec) -> None:
    """Refuse what this version cannot give: to run the job without it would be to run another job."""
    if manifest.secrets:
        raise JobError(ErrorCode.E_SECRET, "cannot open the job's secrets: this node has no key for any")
    if manifest.egress not in {None, "none", spec.egress}:
        raise JobError(
            ErrorCode.E_EGRESS,
            f"cannot grant egress {manifest.egress!r:.80}: slot {spec.name} has {spec.egress!r}",
        )
