"""Writes the limits of a slot into the files of its cgroups (version 2).

A limit that the slot does not set is written as unlimited, because an adopted group may carry older limits.
"""

from collections.abc import Sequence

from aitbc_miner.cgroup.group import CgroupError, Group
from aitbc_miner.config.units import format_cpus
from aitbc_miner.slots.spec import IO_RATES, SlotSpec
from aitbc_miner.util.limits import disk_of

IO_WEIGHTS = {"io.weight": 10_000, "io.bfq.weight": 1000}
"""The weight files of io.cost and of the BFQ scheduler, each with its highest weight."""
PERIOD_US = 100_000
"""The period of a CPU quota, in microseconds; the kernel's default."""


def limit_slot(group: Group, name: str, spec: SlotSpec) -> bool:
    """Write the slot's share of one controller (weight, CPUs); False if the kernel does not hold all of it.

    Raises:
        CgroupError: the kernel refuses a value.
    """
    match name:
        case "cpu":
            group.cpu_weight = spec.cpu_weight or 100
        case "cpuset":
            _choose(group, "cpus", spec.cpus or ())
            _choose(group, "mems", spec.mems or ())
        case "io":
            # A machine may have both files, each for some of its disks.
            for file, most in IO_WEIGHTS.items():
                if group.has(file):
                    group.write(file, f"default {min(spec.io_weight or 100, most)}")
            return spec.io_weight is None or _weighs_io(group)
    return True


def _choose(group: Group, kind: str, wanted: Sequence[int]) -> None:
    if (group.get_content(f"cpuset_{kind}") or set()) == set(wanted):
        return  # do not write without need: the kernel moves the memory of a running job
    # The kernel refuses to empty the set of a group that has processes, so write the parent's whole set.
    every = group.path.parent / f"cpuset.{kind}.effective"
    group.write(f"cpuset.{kind}", format_cpus(wanted) or every.read_text("ascii").strip())


def _weighs_io(group: Group) -> bool:
    """Whether a scheduler here heeds io.weight; a kernel with io.cost takes the weight in any case."""
    if group.has("io.bfq.weight"):
        return True  # the file exists only where BFQ runs
    # io.cost is switched on disk by disk in the root cgroup, the only cgroup without cgroup.type.
    root = next(path for path in group.path.parents if not (path / "cgroup.type").exists())
    switch = root / "io.cost.qos"
    return switch.exists() and "enable=1" in switch.read_text("ascii")


def limit_job(group: Group, name: str, spec: SlotSpec) -> None:
    """Write the job's hard limits of one controller (quota, memory, pids, io).

    Raises:
        CgroupError: the kernel refuses a value, or a path in io_max is on no disk.
    """
    match name:
        case "cpu":
            quota = "max" if spec.cpu_max is None else str(spec.cpu_max * PERIOD_US // 100)
            group.cpu_max = f"{quota} {PERIOD_US}"
        case "memory":
            group.write("memory.high", _or_max(spec.memory_high))
            group.write("memory.max", _or_max(spec.memory_max))
            if group.has("memory.swap.max"):
                group.write("memory.swap.max", _or_max(spec.swap_max))
        case "pids":
            group.write("pids.max", _or_max(spec.pids_max))
        case "io":
            _limit_io(group, spec)


def _limit_io(group: Group, spec: SlotSpec) -> None:
    wanted = {}
    for path, rates in spec.io_max.items():
        try:
            wanted[disk_of(path)] = rates
        except OSError as error:
            raise CgroupError(f"cannot limit io of {path}: {error.strerror}") from error
    lines = (group.get_content("io_max") or "").splitlines()
    for disk in {*wanted, *(line.split()[0] for line in lines)}:
        of_disk = wanted.get(disk, {})
        group.io_max = " ".join([disk, *(f"{key}={of_disk.get(key, 'max')}" for key in IO_RATES)])


def _or_max(value: int | None) -> str:
    return "max" if value is None else str(value)
