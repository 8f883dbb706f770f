"""The limits of a job's process itself, for a slot without a cgroup.

A process's own limits are weaker than a cgroup's: most count per process and not per job, and a job may raise
some. So the node reports each limit with the name of its mechanism.
"""

import errno
import os
import resource
import stat
from collections.abc import Callable
from functools import partial
from pathlib import Path

import psutil
from msgspec import Struct

from aitbc_miner.errors import MinerError


class ProcessLimits(Struct, frozen=True):
    """Limits for `apply`. rlimits: RLIMIT_* number to soft and hard limit; ionice: class and level."""

    rlimits: dict[int, int] = {}
    nice: int | None = None
    ionice: tuple[int, int] | None = None
    cpus: tuple[int, ...] | None = None


def apply(limits: ProcessLimits) -> None:
    """Set the limits of the calling process, a child between fork and exec.

    Raises:
        MinerError: the kernel refused a limit, which the message names. Earlier limits are set already, so
            the process must not become the job.
    """
    if limits.cpus is not None:
        _step(f"cpuset to {limits.cpus}", lambda: os.sched_setaffinity(0, limits.cpus or ()))
    if limits.nice is not None:
        nice = limits.nice
        if os.geteuid() != 0:
            # Only root may raise a priority, so a node started under `nice` keeps its own priority.
            nice = max(nice, os.getpriority(os.PRIO_PROCESS, 0))
        _step(f"nice to {nice}", lambda: os.setpriority(os.PRIO_PROCESS, 0, nice))
    if limits.ionice is not None:
        io_class, level = limits.ionice
        _step(f"ionice to {limits.ionice}", lambda: psutil.Process().ionice(io_class, level))
    # Last, because limits of memory and files would also hold for the steps above.
    for number, value in limits.rlimits.items():
        _step(f"{rlimit_name(number)} to {value}", partial(_setrlimit, number, value))


def rlimit_name(number: int) -> str:
    """Give the name of a RLIMIT_* number in the spelling of slots.d, such as "nofile"."""
    names = (name for name in dir(resource) if name.startswith("RLIMIT_"))
    return next((name[7:].lower() for name in names if getattr(resource, name) == number), str(number))


def _setrlimit(number: int, value: int) -> None:
    hard = resource.getrlimit(number)[1]
    if os.geteuid() != 0 and hard != resource.RLIM_INFINITY:
        # Only root may exceed its hard limit; a lower value is as strict as requested.
        value = hard if value == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(number, (value, value))


def _step(what: str, action: Callable[[], object]) -> None:
    try:
        action()
    except (OSError, ValueError, OverflowError, psutil.Error) as error:
        raise MinerError(f"cannot limit {what}: {error}") from error


def disk_of(path: str, sysfs: Path = Path("/sys")) -> str:
    """Give "major:minor" of the whole disk below a path, because the kernel limits no single partition.

    Raises:
        OSError: the path is missing, or its file system (overlay, btrfs, network) is not on a single disk.
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
