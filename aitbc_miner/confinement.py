"""Whether and where this node can confine jobs: the control groups it may use, and the sandbox."""

import os
from pathlib import Path

from msgspec import Struct

from aitbc_miner.cgroup import CgroupError, Group, find_mount, own_group
from aitbc_miner.config import Config
from aitbc_miner.delegation import SUPERVISOR, prepare
from aitbc_miner.errors import MinerError
from aitbc_miner.probe import NEEDED_CONTROLLERS


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
