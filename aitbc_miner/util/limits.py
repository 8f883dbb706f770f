"""The limits that a job's process carries itself, where no cgroup holds it.

A process's own limits are weaker than a cgroup's: most count per process and not per job, and some the job
may lift again. So each one is reported by the name of what enforces it, and never as if it were the cgroup.
"""

import errno
import os
import resource
import stat
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
from msgspec import Struct

from aitbc_miner.errors import MinerError

if TYPE_CHECKING:
    # Only its attributes matter here; reading slots.d is far above this layer.
    from aitbc_miner.slots.spec import SlotSpec

FALLBACK_IONICE = (int(psutil.IOPRIO_CLASS_BE), 7)
"""For io limits that nothing can hold: last among the ordinary ones. Idle would starve on a busy disk."""


class ProcessLimits(Struct, frozen=True):
    """What `apply` sets. rlimits: RLIMIT_* number to value (soft and hard alike); ionice: class and level."""

    rlimits: dict[int, int] = {}
    nice: int | None = None
    ionice: tuple[int, int] | None = None
    cpus: tuple[int, ...] | None = None


def asked(spec: "SlotSpec") -> frozenset[str]:
    """Which of cpu, cpuset, memory, pids and io the slot wants limited."""
    wanted: dict[str, tuple[object, ...]] = {
        "cpu": (spec.cpu_max, spec.cpu_weight),
        "cpuset": (spec.cpus or None,),
        "memory": (spec.memory_max, spec.memory_high, spec.swap_max),
        "pids": (spec.pids_max,),
        "io": (spec.io_weight, spec.io_max or None),
    }
    return frozenset(name for name, values in wanted.items() if any(value is not None for value in values))


def plan_limits(
    spec: "SlotSpec", by_cgroup: Mapping[str, str], *, own_user: bool
) -> tuple[ProcessLimits, dict[str, str]]:
    """Decide what the process must carry itself, given what its cgroup holds already.

    Args:
        spec: the slot's limits.
        by_cgroup: what `SlotGroup.enforce` returned: limit to "cgroup".
        own_user: whether the job runs as a user that runs nothing else.

    Returns:
        The process limits, and for each limit asked for what enforces it: "cgroup", "rlimit", "affinity",
        "nice", "ionice" or "none".
    """
    left = asked(spec) - by_cgroup.keys()
    rlimits = _own_rlimits(spec.rlimits)
    enforced = dict.fromkeys(asked(spec), "cgroup") | dict.fromkeys(left, "none")
    if "memory" in left and spec.memory_max is not None:
        # Not RLIMIT_AS: CUDA, Go and Java reserve address space by the hundred gigabytes and touch little of
        # it. RLIMIT_DATA counts only private writable memory, which is close to what a job really uses.
        _lower(rlimits, resource.RLIMIT_DATA, spec.memory_max)
        enforced["memory"] = "rlimit"
    if "pids" in left and spec.pids_max is not None and own_user:
        # The kernel counts all processes of the user, so with a shared user it would hit the innocent.
        _lower(rlimits, resource.RLIMIT_NPROC, spec.pids_max)
        enforced["pids"] = "rlimit"
    if "cpuset" in left:
        enforced["cpuset"] = "affinity"
    if "cpu" in left and spec.nice > 0:
        # No quota and no share, but the job yields to everything else.
        enforced["cpu"] = "nice"
    ionice = _ionice(spec)
    if "io" in left:
        ionice = ionice or FALLBACK_IONICE
        enforced["io"] = "ionice"
    cpus = spec.cpus if "cpuset" in left else None
    return ProcessLimits(rlimits=rlimits, nice=spec.nice, ionice=ionice, cpus=cpus), enforced


def _own_rlimits(named: Mapping[str, int]) -> dict[int, int]:
    # A core file of a job is a copy of its memory on the operator's disk, so none unless asked for.
    rlimits = {resource.RLIMIT_CORE: 0}
    return rlimits | {getattr(resource, f"RLIMIT_{name.upper()}"): value for name, value in named.items()}


def _lower(rlimits: dict[int, int], number: int, value: int) -> None:
    rlimits[number] = min(value, rlimits.get(number, value))


def _ionice(spec: "SlotSpec") -> tuple[int, int] | None:
    if spec.ionice is None:
        return None
    if spec.ionice.io_class == "idle":
        return int(psutil.IOPRIO_CLASS_IDLE), 0  # has no levels
    return int(psutil.IOPRIO_CLASS_BE), spec.ionice.level


def apply(limits: ProcessLimits) -> None:
    """Put the limits on the calling process. Meant for the child between fork and exec.

    Raises:
        MinerError: a limit could not be set; the message names it. Those before it in order are set already,
            so the process must not go on to become the job.
    """
    if limits.cpus is not None:
        _step(f"cpuset to {limits.cpus}", lambda: os.sched_setaffinity(0, limits.cpus or ()))
    if limits.nice is not None:
        nice = limits.nice
        if os.geteuid() != 0:
            # Only root may raise a priority: started under `nice`, we keep what we were given.
            nice = max(nice, os.getpriority(os.PRIO_PROCESS, 0))
        _step(f"nice to {nice}", lambda: os.setpriority(os.PRIO_PROCESS, 0, nice))
    if limits.ionice is not None:
        io_class, level = limits.ionice
        _step(f"ionice to {limits.ionice}", lambda: psutil.Process().ionice(io_class, level))
    # Last, because the memory and file limits hold for the steps above as well.
    for number, value in limits.rlimits.items():
        _step(f"{rlimit_name(number)} to {value}", partial(_setrlimit, number, value))


def rlimit_name(number: int) -> str:
    """Return the name of a RLIMIT_* number, in the spelling of slots.d: "nofile"."""
    names = (name for name in dir(resource) if name.startswith("RLIMIT_"))
    return next((name[7:].lower() for name in names if getattr(resource, name) == number), str(number))


def _setrlimit(number: int, value: int) -> None:
    hard = resource.getrlimit(number)[1]
    if os.geteuid() != 0 and hard != resource.RLIM_INFINITY:
        # Only root may go above the hard limit it was given; below it is as strict as was asked for.
        value = hard if value == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(number, (value, value))


def _step(what: str, action: Callable[[], object]) -> None:
    try:
        action()
    except (OSError, ValueError, OverflowError, psutil.Error) as error:
        raise MinerError(f"cannot limit {what}: {error}") from error


def disk_of(path: str, sysfs: Path = Path("/sys")) -> str:
    """Return "major:minor" of the whole disk below a path, because the kernel limits no single partition.

    Raises:
        OSError: the path is missing, or its file system (overlay, btrfs, network) is not on one disk.
    """
    status = Path(path).stat()
    number = status.st_rdev if stat.S_ISBLK(status.st_mode) else status.st_dev
    device = sysfs / "dev/block" / f"{os.major(number)}:{os.minor(number)}"
    if not device.exists():
        raise OSError(errno.ENODEV, "its file system is not on one disk; name the device instead")
    device = device.resolve()
    if (device / "partition").exists():
        device = device.parent
    return (device / "dev").read_text("ascii").strip()
