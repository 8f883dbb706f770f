"""Which of a slot's limits its cgroup holds, and which the job's process must carry itself."""

import resource
from collections.abc import Mapping

import psutil

from aitbc_miner.slots.spec import SlotSpec
from aitbc_miner.util.limits import ProcessLimits

FALLBACK_IONICE = (int(psutil.IOPRIO_CLASS_BE), 7)
"""For io limits that nothing can hold: last among the ordinary ones. Idle would starve on a busy disk."""


def asked(spec: SlotSpec) -> frozenset[str]:
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
    spec: SlotSpec, by_cgroup: Mapping[str, str], *, own_user: bool
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


def _ionice(spec: SlotSpec) -> tuple[int, int] | None:
    if spec.ionice is None:
        return None
    if spec.ionice.io_class == "idle":
        return int(psutil.IOPRIO_CLASS_IDLE), 0  # has no levels
    return int(psutil.IOPRIO_CLASS_BE), spec.ionice.level
