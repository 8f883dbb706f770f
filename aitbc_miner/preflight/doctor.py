"""`aitbc-miner doctor`: the requirements of a node, whether the machine meets each, and the remedies."""

import grp
import os
import pwd
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from urllib.parse import urlsplit

from msgspec import Struct

from aitbc_miner.config.document import Fault
from aitbc_miner.config.settings import Config, PrivilegesSection
from aitbc_miner.control.server import READERS, WRITERS
from aitbc_miner.gpu.reader import GpuList
from aitbc_miner.preflight.check import machine_facts
from aitbc_miner.preflight.confinement import offered_controllers
from aitbc_miner.preflight.network import NOBODY, look, unused_proxy
from aitbc_miner.probe.machine import NEEDED_CONTROLLERS, Machine
from aitbc_miner.sandbox.bubblewrap import Sandbox, lacking_packages, why_not
from aitbc_miner.sandbox.users import Identity, job_user
from aitbc_miner.slots.derive import derive_slots
from aitbc_miner.slots.reader import read_slots
from aitbc_miner.slots.spec import MIB
from aitbc_miner.telemetry.sampling import inventory


class Finding(Struct, frozen=True):
    """One requirement of a node, whether the machine meets it, and the command or step to meet it."""

    name: str
    there: bool
    detail: str
    remedy: str = ""
    required: bool = True


def diagnose(
    path: Path, config: Config | None, faults: Sequence[Fault], machine: Machine, gpus: GpuList
) -> Iterator[Finding]:
    """Check every requirement of a node; without a configuration, of the packaged configuration."""
    if config:
        yield Finding("config", there=True, detail=str(path))
    elif not path.exists():
        remedy = f"install -D -m 0640 etc/config.yaml {path}; set base_url and auth_token there"
        yield Finding("config", there=False, detail=f"{path} does not exist", remedy=remedy)
    else:
        shown = f"{len(faults)} faults, the first: {faults[0]}" if faults else str(path)
        yield Finding("config", there=False, detail=shown, remedy=f"aitbc-miner check --config {path}")
    yield _root(config)
    yield _users(config)
    yield _groups()
    yield _cgroup2(config, machine)
    yield _sandbox(config)
    if config:
        yield _coordinator(config)
        if unused := unused_proxy(config, os.environ):
            detail, _, remedy = unused.partition(": ")
            yield Finding("proxy", there=False, detail=detail, remedy=remedy, required=False)
    yield _nvidia(config, gpus)
    least = config.workspace.min_free_mb if config else 2048
    detail = f"{machine.disk_free_mb} MiB free for the workspace, {least} MiB wanted"
    yield Finding("disk", machine.disk_free_mb >= least, detail, "free disk space, or move workspace.root")


def _root(config: Config | None) -> Finding:
    is_root = os.geteuid() == 0
    detail = "root" if is_root else "not root; jobs would run as the miner's user"
    return Finding("root", is_root, detail, "sudo aitbc-miner doctor", required=_wants_users(config))


def _wants_users(config: Config | None) -> bool:
    return config is None or config.privileges.mode == "required"


def _users(config: Config | None) -> Finding:
    service = config.privileges.service_user if config else PrivilegesSection().service_user
    specs = read_slots(config.slots_dir, []) if config else []
    names = [service, *(job_user(spec.name) for spec in specs or derive_slots(machine_facts(GpuList())))]
    absent = [name for name in names if not _known(pwd.getpwnam, name)]
    remedy = "; ".join(f"useradd --system --user-group --shell /usr/sbin/nologin {name}" for name in absent)
    detail = f"no such user: {', '.join(absent)}" if absent else ", ".join(names)
    return Finding("users", not absent, detail, remedy, required=_wants_users(config))


def _groups() -> Finding:
    absent = [name for name in (READERS, WRITERS) if not _known(grp.getgrnam, name)]
    remedy = "; ".join(f"groupadd --system {name}" for name in absent)
    detail = f"no such group: {', '.join(absent)}; only root can use aitbc-minerctl" if absent else "present"
    return Finding("groups", not absent, detail, remedy, required=False)


def _known(look_up: Callable[[str], object], name: str) -> bool:
    try:
        look_up(name)
    except KeyError:
        return False
    return True


def _sandbox(config: Config | None) -> Finding:
    # Tried as a user without rights, like jobs: the system may forbid him a sandbox that root may make.
    runs_as = Identity(NOBODY, NOBODY, "nobody") if os.geteuid() == 0 else None
    problem = why_not(Sandbox(runs_as=runs_as, tmp_bytes=MIB, shm_bytes=MIB))
    required = config is None or config.sandbox.mode == "required"
    detail = problem.partition(";")[0] if problem else "bubblewrap can make a sandbox"
    lacking = " ".join(lacking_packages())
    remedy = f"apt-get install {lacking}" if lacking else "sysctl kernel.unprivileged_userns_clone=1"
    return Finding("sandbox", not problem, detail, remedy, required=required)


def _coordinator(config: Config) -> Finding:
    url = config.coordinator.base_url
    if (urlsplit(url).hostname or "").endswith((".example", ".invalid")):
        remedy = "set coordinator.base_url to the address that the coordinator's operator gave you"
        detail = f"{url} is an example, not a real address"
        return Finding("coordinator", there=False, detail=detail, remedy=remedy, required=False)
    said = look(config, os.environ) or ""
    # Errors read `cannot VERB OBJECT: CAUSE; REMEDY`, guesses `CAUSE: REMEDY`.
    wrong, _, remedy = said.partition("; " if said.startswith("cannot ") else ": ")
    remedy = remedy or "check coordinator.base_url and this machine's network"
    return Finding("coordinator", not wrong, wrong or f"{url} answers", remedy, required=False)


def _cgroup2(config: Config | None, machine: Machine) -> Finding:
    absent = [name for name in NEEDED_CONTROLLERS if name not in offered_controllers()]
    place = machine.cgroup.mount
    detail = f"at {place}" if place else "no cgroup2 mount"
    if absent:
        detail += f", without the controllers {', '.join(absent)}: no limit holds for a whole slot"
    option = "systemd.unified_cgroup_hierarchy=1"
    remedy = f"add {option} to GRUB_CMDLINE_LINUX in /etc/default/grub; update-grub; reboot"
    required = config is None or config.cgroup.mode == "required"
    return Finding("cgroup2", not absent, detail, remedy, required=required)


def _nvidia(config: Config | None, gpus: GpuList) -> Finding:
    wanted = any(spec.gpu is not None for spec in read_slots(config.slots_dir, [])) if config else False
    error = inventory(gpus).error or (gpus.error if gpus.missing else None)
    if error:
        remedy = "apt-get install nvidia-driver" if gpus.missing else "nvidia-smi"
        detail = f"{error.partition(';')[0].partition(': GPU slots')[0]}; only GPU slots need the driver"
        return Finding("nvidia", there=False, detail=detail, remedy=remedy, required=wanted)
    names = ", ".join(gpu.name for gpu in gpus.gpus) or "the driver works; no GPU"
    return Finding("nvidia", there=True, detail=names, required=wanted)
