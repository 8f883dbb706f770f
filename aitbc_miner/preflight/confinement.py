"""Whether and where this node can confine jobs: the control groups it may use, and the sandbox.

Under systemd jobs live in a unit of their own beside ours, so that they outlive a restart or an upgrade of
the miner: `aitbc-miner.service` looks for the group of `aitbc-miner-slots.service` next to its own.
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
    """What the configuration requires for confining jobs is not to be had."""


class Cgroups(Struct, frozen=True):
    """Where the slots' groups are to be made; None where they cannot be. `missing` says what that means.

    `home` is the group that must hand the controllers on: `parent` itself, or the one above it.
    """

    parent: Path | None
    controllers: tuple[str, ...]
    missing: list[str]
    home: Path | None = None


class _Place(Struct, frozen=True):
    """A group to make the slots' groups in, or why there is none and what to do about it."""

    home: Path | None
    parent: Path | None = None
    cause: str = ""
    remedy: str = ""
    note: str = ""


def find_cgroups(config: Config) -> Cgroups:
    """Find where the slots' groups can be made.

    Raises:
        ConfinementError: `cgroup.mode` is `required` and cpu, memory and pids cannot be limited.
    """
    if config.cgroup.mode == "off":
        return Cgroups(None, (), ["cgroup.mode is off: jobs are held by process limits only"])
    mount = find_mount()
    place = _find_place(mount, f"aitbc-miner-{config.node_id}")
    controllers = Group(place.home).controllers() if place.home else ()
    cause, remedy = place.cause, place.remedy
    if not cause and (lacking := [name for name in NEEDED_CONTROLLERS if name not in controllers]):
        cause, remedy = f"no controller for {', '.join(lacking)} in {place.home}", _remedy(mount)
    if cause and config.cgroup.mode == "required":
        raise ConfinementError(f"cannot limit jobs: {cause}; {remedy}, or set cgroup.mode: auto")
    if place.parent is None:
        return Cgroups(None, (), [f"{cause}: jobs are held by process limits only"])
    missing = [f"{cause}: process limits serve where they can"] if cause else []
    if place.note:
        missing.append(place.note)
    return Cgroups(place.parent, controllers, missing, place.home)


def _find_place(mount: Mount | None, name: str) -> _Place:
    if mount is None:
        return _Place(None, cause="there is no cgroup2 mount", remedy=_remedy(None))
    try:
        own = own_group(mount)
    except CgroupError as error:
        return _Place(None, cause=str(error), remedy=_remedy(mount))
    if not mount.writable:
        return _Place(None, cause=f"no right to write in {own}", remedy=_remedy(mount))
    if own.name == LEAF and os.access(own.parent, os.W_OK | os.X_OK):
        # Where `prepare` has put whoever started us.
        own = own.parent
    if own.name.endswith(UNIT):
        slots = own.with_name(own.name.removesuffix(UNIT) + SLOTS_UNIT)
        if slots.is_dir() and os.access(slots, os.W_OK | os.X_OK):
            return _Place(slots, slots)
        note = f"no unit {slots.name} runs beside {own.name}: a restart of the miner ends its jobs"
        return _Place(own, own / name, note=note)
    return _Place(own, own / name)


def in_container() -> bool:
    """Whether a container manager has started this system: systemd-nspawn, LXC, Docker, Podman."""
    return any(Path(mark).exists() for mark in CONTAINER_MARKS)


def _remedy(mount: Mount | None) -> str:
    if in_container():
        return (
            "let the container write its own cgroups (Docker: --privileged --cgroupns=private; "
            "LXC: a container with nesting), or run the miner on the host"
        )
    if mount is None or mount.hybrid:
        return "boot with systemd.unified_cgroup_hierarchy=1, so that version 2 has the controllers"
    return "start the miner as systemd's service aitbc-miner (see `aitbc-miner doctor`)"


def take_cgroups(config: Config, found: Cgroups) -> Cgroups:
    """Make the controllers that were found usable for the slots' groups, which may move this process.

    Raises:
        ConfinementError: `cgroup.mode` is `required` and it cannot be done.
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
    told = [f"{reason}: process limits serve where they can" for reason in dict.fromkeys(refused.values())]
    return Cgroups(found.parent, controllers, [*found.missing, *told], found.home)


def offered_controllers() -> set[str]:
    """Give the cgroup2 controllers of the machine, wherever on it we are."""
    mount = find_mount()
    return set(mount.controllers) if mount else set()


def find_sandbox(config: Config, runs_as: Identity | None) -> tuple[bool, list[str]]:
    """Find whether jobs can be put into a sandbox, by trying it out; and what it means if they are not.

    Args:
        config: of the node.
        runs_as: the user of some slot's jobs; None: the miner's own.

    Raises:
        ConfinementError: `sandbox.mode` is `required` and there can be none.
    """
    if config.sandbox.mode == "off":
        return False, ["sandbox.mode is off: jobs see the machine as their slots' users do"]
    probe = slot_sandbox(config, SlotSpec(name="probe", kind="cpu"), runs_as)
    problem = why_not(probe)
    if problem is None:
        return True, []
    if config.sandbox.mode == "required":
        raise ConfinementError(f"cannot sandbox jobs: {problem}; or set sandbox.mode: auto")
    return False, [f"no sandbox: {problem}; jobs see the machine as their slots' users do"]
