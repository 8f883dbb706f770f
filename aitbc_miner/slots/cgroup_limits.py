"""The limits of a slot, written into the files of its cgroups of version 2.

What is not asked for is written as unlimited, for a group that was adopted may carry older limits.
"""

from collections.abc import Sequence

from aitbc_miner.cgroup.group import CgroupError, Group
from aitbc_miner.config.units import format_cpus
from aitbc_miner.slots.spec import SlotSpec
from aitbc_miner.util.limits import disk_of

IO_RATES = ("rbps", "wbps", "riops", "wiops")
IO_WEIGHTS = {"io.weight": 10_000, "io.bfq.weight": 1000}
"""The files of io.cost and of the BFQ scheduler, with the most that each takes."""
PERIOD_US = 100_000
"""Over which a quota of CPU time is counted; the kernel's own default."""


def limit_slot(group: Group, name: str, spec: SlotSpec) -> bool:
    """Write what a controller lets the slot compete with; False when the kernel can hold only a part of it.

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
            # A machine may have both, each for some of its disks.
            for file, most in IO_WEIGHTS.items():
                if group.has(file):
                    group.write(file, f"default {min(spec.io_weight or 100, most)}")
            return spec.io_weight is None or _weighs_io(group)
    return True


def _choose(group: Group, kind: str, wanted: Sequence[int]) -> None:
    if (group.get_content(f"cpuset_{kind}") or set()) == set(wanted):
        return  # not without need: the memory of a job that runs is moved
    # A group in which something runs may not be given back to "whatever there is": then it gets all there is.
    every = group.path.parent / f"cpuset.{kind}.effective"
    group.write(f"cpuset.{kind}", format_cpus(wanted) or every.read_text("ascii").strip())


def _weighs_io(group: Group) -> bool:
    """Whether anything on this machine heeds the weight, which every kernel with io.cost lets us write."""
    if group.has("io.bfq.weight"):
        return True  # it is there when the scheduler is
    # Its switch, disk by disk, is in the root of all groups, which alone has no type.
    root = next(path for path in group.path.parents if not (path / "cgroup.type").exists())
    switch = root / "io.cost.qos"
    return switch.exists() and "enable=1" in switch.read_text("ascii")


def limit_job(group: Group, name: str, spec: SlotSpec) -> None:
    """Write what a controller must not let the job exceed.

    Raises:
        CgroupError: the kernel refuses a value, or a disk to limit is none.
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
