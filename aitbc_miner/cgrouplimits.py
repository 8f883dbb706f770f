"""The limits of a slot, written into the files of its cgroups of version 2.

What is not asked for is written as unlimited, for a group that was adopted may carry older limits.
"""

from typing import TYPE_CHECKING

from aitbc_miner.cgroup import CgroupError, Group
from aitbc_miner.util.limits import disk_of

if TYPE_CHECKING:
    # Only its attributes matter here; reading slots.d is far above this layer.
    from aitbc_miner.slotspec import SlotSpec

IO_RATES = ("rbps", "wbps", "riops", "wiops")
PERIOD_US = 100_000
"""Over which a quota of CPU time is counted; the kernel's own default."""


def limit_slot(group: Group, name: str, spec: "SlotSpec") -> bool:
    """Write what a controller lets the slot compete with; False when the kernel can hold only a part of it.

    Raises:
        CgroupError: the kernel refuses a value.
    """
    match name:
        case "cpu":
            group.cpu_weight = spec.cpu_weight or 100
        case "cpuset":
            group.cpuset_cpus = set(spec.cpus or ())
            mems = set(spec.mems or ())
            if (group.get_content("cpuset_mems") or set()) != mems:
                # Not without need: the memory of a job that runs is moved then.
                group.cpuset_mems = mems
        case "io":
            # With the BFQ scheduler the weight has a name of its own, and without either there is no weight.
            weight = next((file for file in ("io.weight", "io.bfq.weight") if group.has(file)), None)
            if weight:
                most = 1000 if weight == "io.bfq.weight" else 10_000
                group.write(weight, f"default {min(spec.io_weight or 100, most)}")
            return weight is not None or spec.io_weight is None
    return True


def limit_job(group: Group, name: str, spec: "SlotSpec") -> None:
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


def _limit_io(group: Group, spec: "SlotSpec") -> None:
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
