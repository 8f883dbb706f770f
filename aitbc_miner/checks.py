"""Whether a node could run here with its configuration; but for `take_cgroups`, nothing is changed."""

import grp
import os
import pwd
import stat
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import psutil
from msgspec import Struct

from aitbc_miner.allowlist import load_allowlist
from aitbc_miner.cgroup import CgroupError, Group, find_mount, own_group
from aitbc_miner.config import Config
from aitbc_miner.control import READERS, WRITERS
from aitbc_miner.credentials import CredentialError, read_credential
from aitbc_miner.delegation import SUPERVISOR, prepare
from aitbc_miner.errors import MinerError
from aitbc_miner.gpu import GpuList
from aitbc_miner.privileges import Identities, Identity, PrivilegeError, job_user, resolve
from aitbc_miner.probe import NEEDED_CONTROLLERS, Machine, SlotCapability
from aitbc_miner.sampling import inventory
from aitbc_miner.slotspec import MIB, MachineFacts, SlotSpec, check_slots, derive_slots, read_slots
from aitbc_miner.util.trust import distrust
from aitbc_miner.util.units import format_cpus
from aitbc_miner.util.yamldoc import ENV_PREFIX, Fault
from aitbc_miner.util.yamltext import line_of


class ConfinementError(MinerError):
    """What the configuration requires for confining jobs is not to be had."""


class Cgroups(Struct, frozen=True):
    """Where the slots' groups are to be made; None where they cannot be. `missing` says what that means."""

    parent: Path | None
    controllers: tuple[str, ...]
    missing: list[str]


def find_cgroups(config: Config) -> Cgroups:
    """Find where the slots' groups can be made.

    Raises:
        ConfinementError: `cgroup.mode` is `required` and cpu, memory and pids cannot be limited.
    """
    if config.cgroup.mode == "off":
        return Cgroups(None, (), ["cgroup.mode is off: jobs are held by process limits only"])
    own, controllers, cause = _own_group()
    lacking = [name for name in NEEDED_CONTROLLERS if name not in controllers]
    if lacking and not cause:
        cause = f"no controller for {', '.join(lacking)} in {own}"
    if cause and config.cgroup.mode == "required":
        remedy = "start the miner with systemd (Delegate=yes), or set cgroup.mode: auto"
        raise ConfinementError(f"cannot limit jobs: {cause}; {remedy}")
    if own is None:
        return Cgroups(None, (), [f"{cause}: jobs are held by process limits only"])
    missing = [f"{cause}: process limits serve where they can"] if cause else []
    return Cgroups(own / f"aitbc-miner-{config.node_id}", controllers, missing)


def _own_group() -> tuple[Path | None, tuple[str, ...], str]:
    """Give our group if we can make others in it, its controllers, and why not."""
    mount = find_mount()
    if mount is None:
        return None, (), "there is no cgroup2 mount"
    try:
        own = own_group(mount)
    except CgroupError as error:
        return None, (), str(error)
    if own.name == SUPERVISOR and os.access(own.parent, os.W_OK | os.X_OK):
        # Where `prepare` has put whoever started us, or where systemd (DelegateSubgroup=) starts us.
        own = own.parent
    if not mount.writable:
        return None, (), f"no right to write in {own}"
    return own, Group(own).controllers(), ""


def take_cgroups(config: Config, found: Cgroups) -> Cgroups:
    """Make the controllers that were found usable for the slots' groups, which moves this process.

    Raises:
        ConfinementError: `cgroup.mode` is `required` and it cannot be done.
    """
    if found.parent is None or not found.controllers:
        return found
    try:
        prepare(found.parent.parent)
    except CgroupError as error:
        if config.cgroup.mode == "required":
            remedy = "start the miner with systemd (Delegate=yes), or set cgroup.mode: auto"
            raise ConfinementError(f"cannot limit jobs: {error}; {remedy}") from error
        return Cgroups(found.parent, (), [*found.missing, f"{error}: process limits serve where they can"])
    return found


def offered_controllers() -> set[str]:
    """Give the cgroup2 controllers of the machine, wherever on it we are."""
    mount = find_mount()
    return set(mount.controllers) if mount else set()


def refuse_unmet_sandbox(config: Config) -> None:
    """Refuse what this version cannot give.

    Raises:
        ConfinementError: a sandbox is required.
    """
    if config.sandbox.mode == "required":
        raise ConfinementError(
            "cannot sandbox jobs: this version has no sandbox yet; to run jobs confined by users, cgroups "
            "and limits only, set sandbox.mode: auto"
        )


def machine_facts(gpus: GpuList) -> MachineFacts:
    """Say what slots can be made of here."""
    ids = [gpu.ids for gpu in inventory(gpus).gpus]
    return MachineFacts(tuple(sorted(os.sched_getaffinity(0))), psutil.virtual_memory().total, ids)


def told_of(specs: Sequence[SlotSpec], facts: MachineFacts) -> list[SlotCapability]:
    """Describe slots as the coordinator is told of them, except for what enforces the limits."""
    return [
        SlotCapability(
            name=spec.name,
            kind=spec.kind,
            cpus=format_cpus(spec.cpus or facts.cpus),
            memory_mb=min(spec.memory_max or facts.memory_bytes, facts.memory_bytes) // MIB,
            enforced={},
            gpu=None if spec.gpu is None else str(spec.gpu),
            runners=list(spec.runners),
        )
        for spec in specs
    ]


class Checker:
    """Goes through all that a node needs. `faults` are what is wrong, `warnings` what may be meant so."""

    def __init__(self, path: Path, config: Config, environ: Mapping[str, str], gpus: GpuList) -> None:
        self._path = path
        self._config = config
        self._environ = environ
        self._gpus = gpus
        self.faults: list[Fault] = []
        self.warnings: list[str] = []
        self.slots: list[SlotSpec] = []
        self.commands: list[str] = []

    def check(self) -> None:
        """Check everything, however much of it is wrong."""
        self._check_slots()
        identities = self._check_privileges()
        self._check_confinement()
        self._check_runners()
        self._check_credential(identities.service if identities else None)
        self._check_workspace(passers=bool(identities and identities.jobs))

    def _fault(self, key: str, message: str) -> None:
        """Note what is wrong with a key, where it was set: in the file or by a variable."""
        variable = ENV_PREFIX + key.replace(".", "__").upper()
        if variable in self._environ:
            self.faults.append(Fault(variable, None, key, message))
        else:
            line = line_of(self._path, key.split("."))
            self.faults.append(Fault(str(self._path), line, key, message))

    def _check_slots(self) -> None:
        directory = self._config.slots_dir
        facts = machine_facts(self._gpus)
        before = len(self.faults)
        self.slots = read_slots(directory, self.faults)
        found, warnings = check_slots(self.slots, facts, directory)
        self.faults += found
        self.warnings += warnings
        if error := inventory(self._gpus).error:
            self.warnings.append(error)
        if not self.slots and len(self.faults) == before:
            self.slots = derive_slots(facts)

    def _check_privileges(self) -> Identities | None:
        privileges = self._config.privileges
        try:
            found = resolve(privileges.mode, privileges.service_user, [spec.name for spec in self.slots])
        except PrivilegeError as error:
            self._fault("privileges.mode", str(error))
            return None
        self.warnings += found.missing
        return found

    def _check_confinement(self) -> None:
        try:
            self.warnings += find_cgroups(self._config).missing
        except ConfinementError as error:
            if os.geteuid() == 0 and offered_controllers() >= set(NEEDED_CONTROLLERS):
                # A shell is in another group than the service, which is given what the machine has.
                self.warnings.append(f"{error} (this concerns this shell; the packaged service has them)")
            else:
                self._fault("cgroup.mode", str(error))
        try:
            refuse_unmet_sandbox(self._config)
        except ConfinementError as error:
            self._fault("sandbox.mode", str(error))

    def _check_runners(self) -> None:
        runners = self._config.runners
        if runners.cli.enable:
            warnings: list[Fault] = []
            allowlist = load_allowlist(runners.cli.allowlist_dirs, self.faults, warnings)
            self.warnings += map(str, warnings)
            self.commands = sorted(allowlist.entries)
        if runners.python.enable:
            for directory in runners.python.task_paths:
                self._check_task_path(directory)
        if not (runners.cli.enable or runners.python.enable):
            self.warnings.append("no runner is enabled: this node can take no job")

    def _check_task_path(self, directory: Path) -> None:
        key = "runners.python.task_paths"
        try:
            for path in [directory, *sorted(directory.glob("*.py"))]:
                if problem := distrust(path):
                    self._fault(key, f"cannot trust {path}: {problem}; mend that with chown or chmod")
            if not directory.is_dir():
                self._fault(key, f"{directory} is no directory; name one that holds tasks")
        except FileNotFoundError:
            self.warnings.append(f"{key}: {directory} is not there; it offers no tasks")
        except OSError as error:
            self._fault(key, f"cannot look at {directory}: {error.strerror}")

    def _check_credential(self, service: Identity | None) -> None:
        source = self._config.coordinator.auth_token
        if source.startswith("credential:") and "CREDENTIALS_DIRECTORY" not in self._environ:
            self.warnings.append(f"{source} cannot be checked here: systemd shows it to the service alone")
            return
        try:
            read_credential(source, self._environ)
        except CredentialError as error:
            self._fault("coordinator.auth_token", str(error))
            return
        kind, _, path = source.partition(":")
        # Root may read anything, but it is the service's user who will.
        if kind == "file" and service and not may_read(path, service):
            remedy = f"chown {service.name} {path}"
            self._fault("coordinator.auth_token", f"the user {service.name} cannot read {path}; {remedy}")

    def _check_workspace(self, *, passers: bool) -> None:
        root = self._config.workspace.root
        there = next(step for step in [root, *root.parents] if os.access(step, os.F_OK))
        if not there.is_dir():
            self._fault("workspace.root", f"{there} is no directory; name another place")
        elif not os.access(there, os.W_OK | os.X_OK):
            self._fault(
                "workspace.root", f"cannot write in {there}; start as another user, or name another place"
            )
        for step in [there, *there.parents] if passers else ():
            # The miner itself opens the last step to all.
            if step != root and not step.stat().st_mode & stat.S_IXOTH:
                remedy = f"chmod o+x {step}, or name another place"
                self._fault("workspace.root", f"the slots' users cannot pass through {step}; {remedy}")


def may_read(path: str, user: Identity) -> bool:
    """Whether a user may read a file, as the kernel sees it. For root only."""
    command = ["/usr/bin/test", "-r", path]
    done = subprocess.run(command, user=user.uid, group=user.gid, extra_groups=[], check=False)
    return done.returncode == 0


# --- doctor ------------------------------------------------------------------------------------------------


class Finding(Struct, frozen=True):
    """One thing that a node needs, whether it is there, and the command or step that mends it."""

    name: str
    there: bool
    detail: str
    remedy: str = ""
    required: bool = True


def diagnose(
    path: Path, config: Config | None, faults: Sequence[Fault], machine: Machine, gpus: GpuList
) -> Iterator[Finding]:
    """Look for everything that a node needs; without a configuration, that the packaged one needs."""
    if config:
        yield Finding("config", there=True, detail=str(path))
    elif not path.exists():
        remedy = f"install -D -m 0640 etc/config.yaml {path}; set base_url and auth_token there"
        yield Finding("config", there=False, detail=f"there is no {path}", remedy=remedy)
    else:
        shown = f"{len(faults)} faulty: {faults[0]}" if faults else str(path)
        yield Finding("config", there=False, detail=shown, remedy=f"aitbc-miner check --config {path}")
    yield _root(config)
    yield _users(config)
    yield _groups(config)
    yield _cgroup2(config, machine)
    for tool, package, purpose in (
        ("bwrap", "bubblewrap", "jobs cannot be kept in a sandbox"),
        ("nft", "nftables", "the network of a slot cannot be restricted"),
    ):
        found = machine.tools.get(tool)
        remedy = f"apt-get install {package}"
        yield Finding(tool, bool(found), found or f"not here; {purpose}", remedy, required=False)
    yield _nvidia(config, gpus)
    least = config.workspace.min_free_mb if config else 2048
    detail = f"{machine.disk_free_mb} MiB free for the workspace, {least} MiB wanted"
    yield Finding("disk", machine.disk_free_mb >= least, detail, "free space there, or move workspace.root")


def _root(config: Config | None) -> Finding:
    is_root = os.geteuid() == 0
    detail = "root" if is_root else "not root; jobs would run as the same user as the miner"
    return Finding("root", is_root, detail, "sudo aitbc-miner doctor", required=_wants_users(config))


def _wants_users(config: Config | None) -> bool:
    return config is None or config.privileges.mode == "required"


def _users(config: Config | None) -> Finding:
    service = config.privileges.service_user if config else READERS
    specs = read_slots(config.slots_dir, []) if config else []
    names = [service, *(job_user(spec.name) for spec in specs or derive_slots(machine_facts(GpuList())))]
    absent = [name for name in names if not _known(pwd.getpwnam, name)]
    remedy = "; ".join(f"useradd --system --user-group --shell /usr/sbin/nologin {name}" for name in absent)
    detail = f"no such user: {', '.join(absent)}" if absent else ", ".join(names)
    return Finding("users", not absent, detail, remedy, required=_wants_users(config))


def _groups(config: Config | None) -> Finding:
    # The service's own group comes with its user.
    service = config.privileges.service_user if config else READERS
    absent = [name for name in (READERS, WRITERS) if name != service and not _known(grp.getgrnam, name)]
    remedy = "; ".join(f"groupadd --system {name}" for name in absent)
    detail = f"no such group: {', '.join(absent)}; only root can steer the miner" if absent else "there"
    return Finding("groups", not absent, detail, remedy, required=False)


def _known(look_up: Callable[[str], object], name: str) -> bool:
    try:
        look_up(name)
    except KeyError:
        return False
    return True


def _cgroup2(config: Config | None, machine: Machine) -> Finding:
    absent = [name for name in NEEDED_CONTROLLERS if name not in offered_controllers()]
    place = machine.cgroup.mount
    detail = f"at {place}" if place else "no cgroup2 mount"
    if absent:
        detail += f", without the controllers {', '.join(absent)}: limits are those of single processes"
    option = "systemd.unified_cgroup_hierarchy=1"
    remedy = f"add {option} to GRUB_CMDLINE_LINUX in /etc/default/grub; update-grub; reboot"
    required = config is None or config.cgroup.mode == "required"
    return Finding("cgroup2", not absent, detail, remedy, required=required)


def _nvidia(config: Config | None, gpus: GpuList) -> Finding:
    wanted = any(spec.gpu is not None for spec in read_slots(config.slots_dir, [])) if config else False
    error = inventory(gpus).error or (gpus.error if gpus.missing else None)
    if error:
        remedy = "apt-get install nvidia-driver" if gpus.missing else "nvidia-smi"
        detail = f"{error.partition(';')[0]}; needed for GPU slots only"
        return Finding("nvidia", there=False, detail=detail, remedy=remedy, required=wanted)
    names = ", ".join(gpu.name for gpu in gpus.gpus) or "the driver works; no GPU"
    return Finding("nvidia", there=True, detail=names, required=wanted)
