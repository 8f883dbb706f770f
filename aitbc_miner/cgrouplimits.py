"""The limits of a slot, written into the files of a cgroup of version 2.

What is not asked for is written as unlimited, for a group that was adopted may carry older limits.
"""

import errno
from typing import TYPE_CHECKING

from aitbc_miner.util.limits import disk_of

if TYPE_CHECKING:
    from aitbc_miner.cgroup import Group

    # Only its attributes matter here; reading slots.d is far above this layer.
    from aitbc_miner.slotspec import SlotSpec


def write_limit(group: "Group", name: str, spec: "SlotSpec") -> bool:
    """Write one limit; False when the kernel can hold only a part of it.

    Raises:
        CgroupError: the kernel refuses a value.
        OSError: a disk to limit is none.
    """
    match name:
        case "cpu":
            quota = "max" if spec.cpu_max is None else str(spec.cpu_max * 1000)
            group.write("cpu.max", f"{quota} 100000")
            group.write("cpu.weight", str(spec.cpu_weight or 100))
        case "cpuset":
            group.cpuset_cpus = set(spec.cpus or ())
        case "memory":
            group.write("memory.high", _or_max(spec.memory_high))
            group.write("memory.max", _or_max(spec.memory_max))
            if group.has("memory.swap.max"):
                group.write("memory.swap.max", _or_max(spec.swap_max))
        case "pids":
            group.write("pids.max", _or_max(spec.pids_max))
        case "io":
            return _write_io(group, spec)
    return True


def _write_io(group: "Group", spec: "SlotSpec") -> bool:
    # With the BFQ scheduler the weight has a name of its own, and without either there is no weight.
    weight = next((name for name in ("io.weight", "io.bfq.weight") if group.has(name)), None)
    if weight:
        most = 1000 if weight == "io.bfq.weight" else 10_000
        group.write(weight, f"default {min(spec.io_weight or 100, most)}")
    for line in (group.get_content("io_max") or "").splitlines():
        group.write("io.max", f"{line.split()[0]} rbps=max wbps=max riops=max wiops=max")
    for path, rates in spec.io_max.items():
        try:
            disk = disk_of(path)
        except OSError as error:
            raise OSError(error.errno or errno.ENODEV, f"io of {path}: {error.strerror}") from error
        group.write("io.max", " ".join([disk, *(f"{key}={rate}" for key, rate in rates.items())]))
    return weight is not None or spec.io_weight is None


def _or_max(value: int | None) -> str:
    return "max" if value is None else str(value)
