"""Divides a slot's limits between its cgroup and the job's process."""

import resource
from collections.abc import Mapping

import psutil

from aitbc_miner.slots.spec import SlotSpec
from aitbc_miner.util.limits import ProcessLimits

FALLBACK_IONICE = (int(psutil.IOPRIO_CLASS_BE), 7)
"""For io limits that nothing can hold: the lowest ordinary level. Idle would starve on a busy disk."""


def asked(spec: SlotSpec) -> frozenset[str]:
    """Name the limits (cpu, cpuset, memory, pids, io) that the slot sets."""
    wanted: dict[str, tuple[object, ...]] = {
        "cpu": (spec.cpu_max, spec.cpu_weight),
        "cpuset": (spec.cpus or None,),
        "memory": (spec.memory_max, spec.memory_high, spec.swap_max),
        "pids": (spec.pids_max,),
        "io": (spec.io_weight, spec.io_max or None),
    }
    return frozenset(name for name, values in wanted.items() if any(value is not None for value in values))


def plan_limits(
    spec: SlotSpec, by_cgroup: Mapping[str, str], *, own_user: bool
) -> tuple[ProcessLimits, dict[str, str]]:
    """Give the job's process the limits that its cgroup does not hold.

    Args:
        spec: the slot's limits.
        by_cgroup: the result of `SlotGroup.enforce`: limit to "cgroup".
        own_user: whether the job's user runs only this job.

    Returns:
        The process limits, and the control that holds each limit of the slot: "cgroup", "rlimit", "affinity",
        "nice", "ionice" or "none".
    """
    left = asked(spec) - by_cgroup.keys()
    # A core file is a copy of the job's memory on the operator's disk: no core file unless slots.d allows it.
    rlimits = {resource.RLIMIT_CORE: 0}
    rlimits |= {getattr(resource, f"RLIMIT_{name.upper()}"): value for name, value in spec.rlimits.items()}
    enforced = dict.fromkeys(asked(spec), "cgroup") | dict.fromkeys(left, "none")
    if "memory" in left and spec.memory_max is not None:
        # Not RLIMIT_AS: CUDA, Go and Java reserve hundreds of gigabytes of address space and touch little.
        # RLIMIT_DATA counts private writable memory, which is close to a job's real use.
        _lower(rlimits, resource.RLIMIT_DATA, spec.memory_max)
        enforced["memory"] = "rlimit"
    if "pids" in left and spec.pids_max is not None and own_user:
        # The kernel counts all processes of the user: on a shared user the limit would hit other programs.
        _lower(rlimits, resource.RLIMIT_NPROC, spec.pids_max)
        enforced["pids"] = "rlimit"
    if "cpuset" in left:
        enforced["cpuset"] = "affinity"
    if "cpu" in left and spec.nice > 0:
        # Neither quota nor share: the job yields to all programs with a lower nice value.
        enforced["cpu"] = "nice"
    ionice = _ionice(spec)
    if "io" in left:
        ionice = ionice or FALLBACK_IONICE
        enforced["io"] = "ionice"
    cpus = spec.cpus if "cpuset" in left else None
    return ProcessLimits(rlimits=rlimits, nice=spec.nice, ionice=ionice, cpus=cpus), enforced


def _lower(rlimits: dict[int, int], number: int, value: int) -> None:
    rlimits[number] = min(value, rlimits.get(number, value))


def _ionice(spec: SlotSpec) -> tuple[int, int] | None:
    if spec.ionice is None:
        return None
    if spec.ionice.io_class == "idle":
        return int(psutil.IOPRIO_CLASS_IDLE), 0  # the class idle has no levels
    return int(psutil.IOPRIO_CLASS_BE), spec.ionice.level
