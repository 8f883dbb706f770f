"""The limits that a job's process carries itself, where no cgroup holds it.

A process's own limits are weaker than a cgroup's: most count per process and not per job, and some the job
may lift again. So each one is reported by the name of what enforces it, and never as if it were the cgroup.
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
    """What `apply` sets. rlimits: RLIMIT_* number to value (soft and hard alike); ionice: class and level."""

    rlimits: dict[int, int] = {}
    nice: int | None = None
    ionice: tuple[int, int] | None = None
    cpus: tuple[int, ...] | None = None


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
