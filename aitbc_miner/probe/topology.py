"""What the machine gives to slots: CPUs by core and NUMA node, memory, and what the kernel caps.

Only files that answer at once. Source: Documentation/ABI/stable/sysfs-devices-system-cpu and -node, proc(5).
"""

import os
import re
from collections.abc import Iterable
from pathlib import Path

from msgspec import Struct

from aitbc_miner.config.units import parse_cpus


class NumaNode(Struct, frozen=True):
    """CPUs (online ones) and memory (bytes; none in a node of CPUs only) that are near to each other."""

    id: int
    cpus: tuple[int, ...]
    memory_bytes: int


class MachineFacts(Struct, frozen=True):
    """What slots can be made of. Beyond the first two, what is empty or None is unknown and not checked.

    cpus: those that slots may use; offline: those that are there but off; barred: those that are on, but
    that this process may not use. cores: the threads of each core, together. gpu_ids: each GPU by all the
    names it has (index, UUID) as text; gpu_nodes: the NUMA node near to a GPU, by each of its names;
    gpu_parts: the MIG instances of a GPU that is divided, by each of its names. nr_open: the most file
    descriptors that RLIMIT_NOFILE may allow. sysfs: where the disks are looked up. quota: how many CPUs' time
    the group that we are in may use. `memory_bytes` is what such a group may use, too.
    """

    cpus: tuple[int, ...]
    memory_bytes: int
    gpu_ids: list[tuple[str, ...]] = []
    offline: tuple[int, ...] = ()
    barred: tuple[int, ...] = ()
    cores: tuple[tuple[int, ...], ...] = ()
    nodes: tuple[NumaNode, ...] = ()
    gpu_nodes: dict[str, int] = {}
    gpu_parts: dict[str, tuple[str, ...]] = {}
    swap_bytes: int | None = None
    pid_max: int | None = None
    nr_open: int | None = None
    sysfs: Path | None = None
    quota: int | None = None

    @property
    def threads(self) -> int:
        """How many CPUs' time there is."""
        return min(len(self.cpus), self.quota or len(self.cpus))


def read_machine(
    group: Path | None = None,
    *,
    sysfs: Path = Path("/sys"),
    proc: Path = Path("/proc"),
    allowed: Iterable[int] | None = None,
) -> MachineFacts:
    """Look at everything but the GPUs.

    Args:
        group: the cgroup that the slots are made in, whose limits hold them; None: that which we are in.
        sysfs: where sysfs is mounted.
        proc: where procfs is mounted.
        allowed: the CPUs that this process may use; None: ask the kernel.
    """
    cpu_dir = sysfs / "devices/system/cpu"
    permitted = set(os.sched_getaffinity(0) if allowed is None else allowed)
    # A container may hide sysfs; then what we may use is all that is known.
    online = set(_cpus(cpu_dir / "online")) or permitted
    cpuset = online & set(_cpuset(group)) or online
    # A service may keep its own processes to other CPUs than its slots.
    usable = cpuset & permitted or cpuset
    memory = _meminfo(proc / "meminfo")
    held = _own_groups(proc, group)
    quotas = [quota for step in held if (quota := _quota(step)) is not None]
    return MachineFacts(
        cpus=tuple(sorted(usable)),
        memory_bytes=min([memory.get("MemTotal", 0), *filter(None, map(_memory_max, held))]),
        offline=tuple(sorted(set(_cpus(cpu_dir / "present")) - online)),
        barred=tuple(sorted(online - usable)),
        cores=_cores(cpu_dir),
        nodes=_nodes(sysfs / "devices/system/node"),
        swap_bytes=memory.get("SwapTotal"),
        pid_max=_number(proc / "sys/kernel/pid_max"),
        nr_open=_number(proc / "sys/fs/nr_open"),
        sysfs=sysfs,
        quota=max(1, int(min(quotas))) if quotas else None,
    )


def _own_groups(proc: Path, group: Path | None) -> list[Path]:
    """Name the groups whose limits hold us, of both versions, each with those above it.

    Source: proc(5), mountinfo; cgroups(7). `group` stands for ours of version 2.
    """
    own: dict[str, str] = {}
    for line in _text(proc / "self/cgroup").splitlines():
        _, names, place = line.split(":", 2)
        own |= dict.fromkeys(names.split(","), place)
    found = [group, *group.parents] if group else []
    for line in _text(proc / "self/mountinfo").splitlines():
        fields, _, kind = line.partition(" - ")
        root, mount = map(Path, fields.split()[3:5])
        controllers = kind.split()[2].split(",") if kind.startswith("cgroup ") else [""]
        path = next((own[name] for name in controllers if name in own), None)
        if path is None or not kind.startswith("cgroup") or (group and kind.startswith("cgroup2 ")):
            continue
        below = Path(path).relative_to(root) if Path(path).is_relative_to(root) else Path()
        found += [mount / step for step in (below, *below.parents)]
    return found


def _memory_max(group: Path) -> int | None:
    return _number(group / "memory.max") or _number(group / "memory.limit_in_bytes")


def _quota(group: Path) -> float | None:
    """Give how many CPUs' time a group may use."""
    quota, _, period = _text(group / "cpu.max").partition(" ")
    if not period:
        quota, period = (_text(group / f"cpu.cfs_{name}_us") for name in ("quota", "period"))
    return int(quota) / int(period) if quota.isdecimal() and period.isdecimal() and int(period) else None


def _text(file: Path) -> str:
    """Return the text of a file of the kernel, empty where this kernel or machine does not have it."""
    try:
        return file.read_text("utf-8", "replace").strip()
    except OSError:
        return ""


def _cpus(file: Path) -> tuple[int, ...]:
    text = _text(file)
    return parse_cpus(text) if text else ()


def _number(file: Path) -> int | None:
    text = _text(file)
    return int(text) if text.isdecimal() else None


def _cpuset(group: Path | None) -> tuple[int, ...]:
    """Return the CPUs of a cgroup: where it has no cpuset of its own, those of the nearest one above."""
    above = (group, *group.parents) if group else ()
    return next((cpus for step in above if (cpus := _cpus(step / "cpuset.cpus.effective"))), ())


def _meminfo(file: Path) -> dict[str, int]:
    """Return sizes in bytes by name; the lines of a node's file begin with "Node N"."""
    fields = re.findall(r"(\w+):\s+(\d+) kB$", _text(file), re.MULTILINE)
    return {name: int(kib) << 10 for name, kib in fields}


def _cores(cpu_dir: Path) -> tuple[tuple[int, ...], ...]:
    files = cpu_dir.glob("cpu[0-9]*/topology/thread_siblings_list")
    return tuple(sorted({_cpus(file) for file in files} - {()}))


def _nodes(directory: Path) -> tuple[NumaNode, ...]:
    nodes = [
        NumaNode(
            int(node.name.removeprefix("node")),
            _cpus(node / "cpulist"),
            _meminfo(node / "meminfo").get("MemTotal", 0),
        )
        for node in directory.glob("node[0-9]*")
    ]
    return tuple(sorted(nodes, key=lambda node: node.id))
