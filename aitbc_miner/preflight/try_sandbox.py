"""`aitbc-minerctl sandbox`: runs a command in a job's surroundings to show a job's view of the machine."""

import os
import select
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from aitbc_miner.cgroup.group import CgroupError, Group, find_mount
from aitbc_miner.config.settings import Config, load_config
from aitbc_miner.errors import EXIT_CONFIG, EXIT_NOT_PERMITTED, EXIT_USAGE, CommandError, MinerError
from aitbc_miner.gpu.facts import GpuFact
from aitbc_miner.gpu.job_view import gpu_env, gpu_view
from aitbc_miner.gpu.reader import GpuReader
from aitbc_miner.jobs import ExitStatus, Manifest
from aitbc_miner.preflight.check import machine_facts
from aitbc_miner.preflight.confinement import find_sandbox
from aitbc_miner.probe.machine import NEEDED_CONTROLLERS
from aitbc_miner.runners.interface import JobPaths, job_env
from aitbc_miner.sandbox.bubblewrap import HOME, Sandbox, enclose, slot_sandbox
from aitbc_miner.sandbox.spawn import Job, become_subreaper, spawn
from aitbc_miner.sandbox.users import Identity, resolve
from aitbc_miner.slots.cgroup_limits import limit_job
from aitbc_miner.slots.derive import derive_slots, slots_for
from aitbc_miner.slots.limits import plan_limits
from aitbc_miner.slots.spec import SlotSpec
from aitbc_miner.telemetry.sampling import inventory
from aitbc_miner.util import fs

SLOTS_GROUP = Path("aitbc.slice", "aitbc-miner-slots.service")
KILL_S = 5.0
BY_SIGNAL = 128


def try_out(
    path: Path, slot: str, command: Sequence[str], environ: Mapping[str, str], note: Callable[[str], None]
) -> int:
    """Run a command like a job of a slot, and give its exit status; 128 + N for signal N.

    The command has our input and output and a temporary directory /job. `note` gets differences to a job.

    Raises:
        CommandError: we are not root, the configuration is faulty, or the slot does not exist.
        MinerError: the sandbox cannot be made, the user does not exist, or the command cannot be started.
    """
    if os.geteuid() != 0:
        raise CommandError("cannot try the sandbox: this needs root; use sudo", EXIT_NOT_PERMITTED)
    config, faults, _ = load_config(path, environ)
    if config is None:
        raise CommandError("cannot try the sandbox: " + "\n".join(map(str, faults)), EXIT_CONFIG)
    spec, gpu = _find_slot(config, slot)
    mode, service = config.privileges.mode, config.privileges.service_user
    runs_as = resolve(mode, service, [slot]).jobs.get(slot)
    sandboxed, missing = find_sandbox(config, runs_as)
    for text in missing:
        note(text)
    box = slot_sandbox(config, spec, runs_as, gpu_view(gpu)) if sandboxed else None
    become_subreaper()
    with ExitStack() as stack:
        group = stack.enter_context(_group(spec, note))
        directory = stack.enter_context(_directory(runs_as))
        paths = JobPaths(HOME if box else directory)
        env = job_env(Manifest(job_id="sandbox", runner="cli"), paths, spec, gpu_env(gpu), [])
        ended = _wait(_start(command, directory, env, spec, box, runs_as, group, stack))
    return ended.status if ended.status is not None else BY_SIGNAL + (ended.signal or 0)


def _start(
    command: Sequence[str],
    directory: Path,
    env: dict[str, str],
    spec: SlotSpec,
    box: Sandbox | None,
    runs_as: Identity | None,
    group: Group | None,
    stack: ExitStack,
) -> Job:
    fds = {0: 0, 1: 1, 2: 2}
    enclosed = enclose(box, directory, command, (), fds, stack) if box else None
    by_cgroup = dict.fromkeys(NEEDED_CONTROLLERS, "cgroup") if group else {}
    job = spawn(
        enclosed.argv if enclosed else command,
        cwd=directory / "work",
        env=env,
        fds=fds | (enclosed.fds if enclosed else {}),
        limits=plan_limits(spec, by_cgroup, own_user=runs_as is not None)[0],
        group=group,
        uid=runs_as.uid if runs_as else None,
        gid=runs_as.gid if runs_as else None,
        enclosed=enclosed,
    )
    return stack.enter_context(job)


def _find_slot(config: Config, name: str) -> tuple[SlotSpec, GpuFact | None]:
    with GpuReader() as reader:
        gpus = reader.list()
    facts = machine_facts(gpus)
    specs, faults = slots_for(config.slots_dir, facts)
    if faults:
        raise CommandError("cannot try the sandbox: " + "\n".join(map(str, faults)), EXIT_CONFIG)
    specs = specs or derive_slots(facts)
    spec = next((spec for spec in specs if spec.name == name), None)
    if spec is None:
        known = ", ".join(spec.name for spec in specs)
        raise CommandError(f"cannot try the sandbox: no slot {name!r:.60}; name a slot: {known}", EXIT_USAGE)
    found = inventory(gpus).gpus
    return spec, next((gpu for gpu in found if spec.gpu is not None and str(spec.gpu) in gpu.ids), None)


@contextmanager
def _directory(runs_as: Identity | None) -> Iterator[Path]:
    directory = Path(tempfile.mkdtemp(prefix="aitbc-sandbox-"))
    try:
        directory.chmod(0o711)
        for name in ("work", "output", "tmp"):
            (directory / name).mkdir(mode=0o700)
            if runs_as is not None:
                os.chown(directory / name, runs_as.uid, runs_as.gid)
        yield directory
    finally:
        with fs.directory(directory.parent) as parent:
            fs.remove_tree(parent, directory.name)


@contextmanager
def _group(spec: SlotSpec, note: Callable[[str], None]) -> Iterator[Group | None]:
    """Make a cgroup with the limits of the slot's jobs, beside theirs; None if the slot has no cgroup."""
    mount = find_mount()
    parent = Path(mount.path) / SLOTS_GROUP / spec.name if mount else None
    if parent is None or not parent.is_dir():
        note(f"slot {spec.name} has no control group now: only process limits hold the command")
        yield None
        return
    group = Group(parent / f"shell-{os.getpid()}")
    group.create()
    try:
        for name in group.controllers():
            limit_job(group, name, spec)
        yield group
    except CgroupError as error:
        raise MinerError(f"cannot try the sandbox: {error}") from error
    finally:
        group.kill()
        group.remove(KILL_S)


def _wait(job: Job) -> ExitStatus:
    try:
        while (ended := job.poll()) is None:
            select.select([job.pidfd], [], [])
    except KeyboardInterrupt:
        job.terminate()
        select.select([job.pidfd], [], [], KILL_S)
        ended = job.poll() or ExitStatus(signal=2)
    job.kill_all(KILL_S)
    return ended
