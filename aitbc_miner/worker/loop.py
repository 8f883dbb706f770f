"""The worker process of a slot: it prepares, starts, watches and collects one job at a time.

If the node is root, the worker is root, to change to the job's user; the worker reads nothing from the
network. The job's directory names the worker. If the supervisor ends, the worker finishes its job.
"""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from aitbc_miner.cgroup.group import CgroupError
from aitbc_miner.errors import ErrorCode, MinerError
from aitbc_miner.gpu.devices import make_nodes
from aitbc_miner.gpu.job_view import devices_of
from aitbc_miner.ipc.channel import Channel
from aitbc_miner.ipc.messages import JobEnded, Retune, Retuned, StartJob, ToWorker, WorkerReady, WorkerRefused
from aitbc_miner.jobs import State
from aitbc_miner.probe.machine import NEEDED_CONTROLLERS
from aitbc_miner.runners.registry import RunnerSet
from aitbc_miner.sandbox.spawn import become_subreaper
from aitbc_miner.slots.cgroups import SlotGroup
from aitbc_miner.slots.limits import plan_limits
from aitbc_miner.slots.spec import SlotSpec
from aitbc_miner.store.records import JobDir, Records
from aitbc_miner.util.log import events
from aitbc_miner.worker.cleanup import clear_user, named
from aitbc_miner.worker.context import SlotContext
from aitbc_miner.worker.job_run import JobRun
from aitbc_miner.worker.link import SupervisorLink
from aitbc_miner.worker.prewarm import Warmer

STARTABLE = frozenset({State.ACKED, State.RETRY_WAIT})


class Worker:
    """A slot's worker, from its start until a stop or the end of its supervisor."""

    def __init__(self, slot: SlotContext, channel: Channel[ToWorker], runners: RunnerSet) -> None:
        self._slot = slot
        self._link = SupervisorLink(channel)
        self._runners = runners
        self._records = Records(slot.config.workspace.root)
        self._warmer = Warmer(runners, slot.spec.name)
        self._log = events("worker", slot=slot.spec.name)

    def run(self) -> None:
        """Set the slot up, then run jobs until told to stop."""
        become_subreaper()
        link = self._link
        link.listen_for_signals()
        try:
            self._set_up()
        except MinerError as error:
            self._log.error("slot unusable", reason=str(error))
            link.send(WorkerRefused(str(error)))
            return
        link.retune = self._retune
        link.send(WorkerReady(self._slot.enforced))
        try:
            self._serve()
        finally:
            self._warmer.end()

    def _serve(self) -> None:
        link, warmer = self._link, self._warmer
        while link.connected and not link.stopping and not link.terminated:
            pause = warmer.tend(self._slot)
            for message in link.wait(pause, warmer.sources):
                if isinstance(message, StartJob):
                    link.send(self._run_job(message.job_id))
                    warmer.rest()

    def _set_up(self) -> None:
        slot = self._slot
        group = None
        by_cgroup: dict[str, str] = {}
        if slot.group_parent is not None:
            group = SlotGroup(slot.group_parent, slot.spec.name)
            # Kill the processes of an earlier worker; if a process survives, the slot is unusable.
            group.empty()
            group.worker.write("cgroup.procs", str(os.getpid()))
            group.renew_job()
            must = frozenset(NEEDED_CONTROLLERS if slot.config.cgroup.mode == "required" else ())
            by_cgroup = group.enforce(slot.spec, slot.controllers, required=must)
        user = slot.runs_as
        if user is not None and (pids := clear_user(user.uid, slot.delays.kill)):
            raise MinerError(f"cannot use the slot: user {user.name} still owns {named(pids)}")
        self._have_nodes()
        limits, enforced = plan_limits(slot.spec, by_cgroup, own_user=user is not None)
        self._slot = replace(slot, group=group, limits=limits, enforced=enforced)

    def _have_nodes(self) -> None:
        """Have the nodes of the slot's GPU made; under systemd, the unit has done so already."""
        nodes = devices_of(self._slot.devices)
        if all(node.exists() for node in nodes):
            return
        failed = make_nodes()
        if lacking := [str(node) for node in nodes if not node.exists()]:
            remedy = "install nvidia-modprobe, then `systemctl restart aitbc-miner`"
            self._log.warning("device nodes missing", nodes=lacking, reason=failed, remedy=remedy)

    def _retune(self, wanted: Retune) -> None:
        """Change the slot's limits: limits of its cgroups now, limits of processes from the next job on."""
        slot, spec = self._slot, wanted.spec
        said = adjusted(slot.group, spec, slot.controllers)
        if said.done:
            limits, enforced = plan_limits(spec, said.enforced, own_user=slot.runs_as is not None)
            devices = tuple(map(Path, wanted.devices))
            slot = self._slot = replace(
                slot, spec=spec, limits=limits, enforced=enforced, gpu_env=wanted.gpu_env, devices=devices
            )
        self._link.send(replace(said, enforced=slot.enforced))

    def _run_job(self, job_id: str) -> JobEnded:
        """Run a job and give its end. Raises nothing: the worker's death would cost the slot."""
        try:
            with ExitStack() as stack:
                # Each try opens the record anew: a failed try keeps no descriptor.
                run = self._link.patiently(
                    job_id, "read the job's record", lambda: stack.enter_context(self._begun(job_id))
                )
                ended = run if isinstance(run, JobEnded) else self._run(job_id, run)
        except Exception as error:  # noqa: BLE001  # without an outcome the agent declares the job lost
            self._log.exception("job failed without an outcome", job_id=job_id)
            ended = JobEnded(job_id, ErrorCode.E_INTERNAL, f"cannot run the job: {error!a:.300}")
        self._link.cancelled.clear()
        self._log.info("job ended", job_id=job_id, code=ended.code or "OK", message=ended.message)
        return ended

    @contextmanager
    def _begun(self, job_id: str) -> Iterator[JobRun | JobEnded]:
        """Open the job's record; yield the job's run, or its end if it must not be started."""
        with self._records.open(job_id) as job:
            yield _refuse(job) or JobRun(job, self._slot, self._link, self._runners, self._warmer)

    def _run(self, job_id: str, run: JobRun) -> JobEnded:
        hold = run.hold
        try:
            outcome = run.run()
        except OSError as error:
            message = f"cannot write the outcome of job {job_id}: {error}"
            self._log.error("outcome not written", job_id=job_id, error=str(error))
            return JobEnded(job_id, ErrorCode.E_INTERNAL, message, clean=hold.clean, remains=hold.remains)
        return JobEnded(job_id, outcome.code, outcome.message, outcome.timings, hold.clean, hold.remains)


def run_worker(slot: SlotContext, pipe: "Connection[Any, Any]") -> None:
    """Be a slot's worker, after the fork."""
    # Neither the worker nor its jobs may see the operator's secrets.
    for secret in slot.config.sources():
        source, _, name = secret.partition(":")
        if source == "env":
            os.environ.pop(name, None)
    channel: Channel[ToWorker] = Channel(pipe, ToWorker)
    Worker(slot, channel, RunnerSet(slot.config.runners, slot.interpreter)).run()


def adjust_slot(slot: SlotContext) -> Retuned:
    """Change the limits of a slot's cgroups, in a child: its adopted worker takes no messages."""
    group = SlotGroup(slot.group_parent, slot.spec.name) if slot.group_parent else None
    return adjusted(group, slot.spec, slot.controllers)


def adjusted(group: SlotGroup | None, spec: SlotSpec, controllers: tuple[str, ...]) -> Retuned:
    """Change the limits of a slot's cgroups; the worker itself changes the limits of processes."""
    try:
        note = group.adjust(spec, controllers) if group is not None else ""
    except CgroupError as error:
        failed = f"cannot change the limits of slot {spec.name}: {error}; the old limits stay"
        return Retuned({}, failed, done=False)
    return Retuned(group.held if group is not None else {}, note)


def _refuse(job: JobDir) -> JobEnded | None:
    """Give the end of a job that must not be started, because it has run before; None: start the job."""
    outcome = job.outcome()
    if outcome is not None:
        return JobEnded(job.job_id, outcome.code, outcome.message, outcome.timings)
    state = job.state().state
    if state in STARTABLE:
        return None
    return JobEnded(job.job_id, ErrorCode.E_INTERNAL, f"cannot start job {job.job_id}: its state is {state}")
