"""Finds the means to confine jobs on this machine: the cgroups that the node may use, and the sandbox.

Under systemd, the jobs' unit is separate from the miner's, so that jobs outlive a restart or an upgrade of
the miner: `aitbc-miner.service` looks for the cgroup of `aitbc-miner-slots.service` next to its own.
"""

import os
from pathlib import Path

from msgspec import Struct

from aitbc_miner.cgroup.delegation import LEAF, delegate
from aitbc_miner.cgroup.group import CgroupError, Group, Mount, find_mount, own_group
from aitbc_miner.config.settings import Config
from aitbc_miner.errors import MinerError
from aitbc_miner.probe.machine import NEEDED_CONTROLLERS
from aitbc_miner.sandbox.bubblewrap import slot_sandbox, why_not
from aitbc_miner.sandbox.users import Identity
from aitbc_miner.slots.spec import SlotSpec

CONTAINER_MARKS = ("/run/systemd/container", "/.dockerenv", "/run/.containerenv")
UNIT, SLOTS_UNIT = ".service", "-slots.service"


class ConfinementError(MinerError):
    """The machine lacks a cgroup controller or sandbox that the configuration requires."""


class Cgroups(Struct, frozen=True):
    """The cgroup `parent` for the slots' cgroups; None if none can be made. `missing` are the consequences.

    `home` is the cgroup that must hand down the controllers: `parent` itself, or its parent.
    """

    parent: Path | None
    controllers: tuple[str, ...]
    missing: list[str]
    home: Path | None = None


class _Place(Struct, frozen=True):
    """A cgroup for the slots' cgroups, or the cause why the machine has none, and the remedy."""

    home: Path | None
    parent: Path | None = None
    cause: str = ""
    remedy: str = ""
    note: str = ""


def find_cgroups(config: Config) -> Cgroups:
    """Find the cgroup in which the slots' cgroups can be made.

    Raises:
        ConfinementError: `cgroup.mode` is `required`, and cpu, memory and pids cannot be limited.
    """
    if config.cgroup.mode == "off":
        return Cgroups(None, (), ["cgroup.mode is off: only limits of single processes apply"])
    mount = find_mount()
    place = _find_place(mount, f"aitbc-miner-{config.node_id}")
    controllers = Group(place.home).controllers() if place.home else ()
    cause, remedy = place.cause, place.remedy
    if not cause and (lacking := [name for name in NEEDED_CONTROLLERS if name not in controllers]):
        cause, remedy = f"no controller for {', '.join(lacking)} in {place.home}", _remedy(mount)
    if cause and config.cgroup.mode == "required":
        raise ConfinementError(f"cannot limit jobs: {cause}; {remedy}, or set cgroup.mode: auto")
    if place.parent is None:
        return Cgroups(None, (), [f"{cause}: only limits of single processes apply"])
    missing = [f"{cause}: limits of single processes apply where possible"] if cause else []
    if place.note:
        missing.append(place.note)
    return Cgroups(place.parent, controllers, missing, place.home)


def _find_place(mount: Mount | None, name: str) -> _Place:
    if mount is None:
        return _Place(None, cause="the machine has no cgroup2 mount", remedy=_remedy(None))
    try:
        own = own_group(mount)
    except CgroupError as error:
        return _Place(None, cause=str(error), remedy=_remedy(mount))
    if not mount.writable:
        return _Place(None, cause=f"the miner may not write in {own}", remedy=_remedy(mount))
    if own.name == LEAF and os.access(own.parent, os.W_OK | os.X_OK):
        # `delegate` of an earlier start has moved this process into the leaf.
        own = own.parent
    if own.name.endswith(UNIT):
        slots = own.with_name(own.name.removesuffix(UNIT) + SLOTS_UNIT)
        if slots.is_dir() and os.access(slots, os.W_OK | os.X_OK):
            return _Place(slots, slots)
        cause = f"no unit {slots.name} runs beside {own.name}: a restart of the miner ends the running jobs"
        note = f"{cause}; `systemctl start {slots.name}`, then restart the miner"
        return _Place(own, own / name, note=note)
    return _Place(own, own / name)


def in_container() -> bool:
    """Whether this system runs in a container: systemd-nspawn, LXC, Docker, Podman."""
    return any(Path(mark).exists() for mark in CONTAINER_MARKS)


def _remedy(mount: Mount | None) -> str:
    if in_container():
        return (
            "let the container write its cgroups (Docker: --privileged --cgroupns=private; "
            "LXC: a container with nesting), or run the miner on the host"
        )
    if mount is None or mount.hybrid:
        return "boot with systemd.unified_cgroup_hierarchy=1, so that cgroup2 has the controllers"
    return "start the miner as systemd's service aitbc-miner (see `aitbc-miner doctor`)"


def take_cgroups(config: Config, found: Cgroups) -> Cgroups:
    """Enable the found controllers for the slots' cgroups; may move this process into a leaf.

    Raises:
        ConfinementError: `cgroup.mode` is `required`, and a needed controller cannot be enabled.
    """
    if found.home is None or not found.controllers:
        return found
    try:
        refused = delegate(found.home)
    except CgroupError as error:
        refused = dict.fromkeys(found.controllers, str(error))
    needed = [reason for name, reason in refused.items() if name in NEEDED_CONTROLLERS]
    if needed and config.cgroup.mode == "required":
        remedy = "start the miner as systemd's service aitbc-miner, or set cgroup.mode: auto"
        raise ConfinementError(f"cannot limit jobs: {needed[0]}; {remedy}")
    controllers = tuple(name for name in found.controllers if name not in refused)
    reasons = dict.fromkeys(refused.values())
    told = [f"{reason}: limits of single processes apply where possible" for reason in reasons]
    return Cgroups(found.parent, controllers, [*found.missing, *told], found.home)


def offered_controllers() -> set[str]:
    """Give the cgroup2 controllers of the whole machine."""
    mount = find_mount()
    return set(mount.controllers) if mount else set()


def find_sandbox(config: Config, runs_as: Identity | None) -> tuple[bool, list[str]]:
    """Try whether `runs_as` (None: our user) can have a sandbox; gives also the consequences if not.

    Raises:
        ConfinementError: `sandbox.mode` is `required`, and no sandbox can be made.
    """
    if config.sandbox.mode == "off":
        return False, ["sandbox.mode is off: jobs see all files that their slots' users may read"]
    probe = slot_sandbox(config, SlotSpec(name="probe", kind="cpu"), runs_as)
    problem = why_not(probe)
    if problem is None:
        return True, []
    if config.sandbox.mode == "required":
        raise ConfinementError(f"cannot sandbox jobs: {problem}; or set sandbox.mode: auto")
    return False, [f"no sandbox: {problem}; jobs see all files that their slots' users may read"]
