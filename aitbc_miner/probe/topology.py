"""The machine's resources for slots: CPUs by core and NUMA node, memory, limits of the kernel.

Reads only files that answer at once. Source: proc(5), Documentation/ABI/stable/sysfs-devices-system-cpu and
sysfs-devices-node.
"""

import os
import re
from collections.abc import Iterable
from pathlib import Path

from msgspec import Struct

from aitbc_miner.config.units import parse_cpus


class NumaNode(Struct, frozen=True):
    """The online CPUs and the memory (bytes; 0 in a node of CPUs only) of a NUMA node."""

    id: int
    cpus: tuple[int, ...]
    memory_bytes: int


class MachineFacts(Struct, frozen=True):
    """The resources for slots. After the first two, an empty value or None is unknown and not checked.

    cpus: the CPUs that slots may use. memory_bytes: the memory that our group may use. offline: CPUs that are
    switched off. barred: CPUs online that our process may not use. cores: the threads of each core. gpu_ids:
    all names (index, UUID) of each GPU. gpu_nodes: the NUMA node near a GPU, by each name of it. gpu_parts:
    the MIG instances of a divided GPU, by each name of the GPU. nr_open: the highest RLIMIT_NOFILE. sysfs:
    the directory in which to look up disks. quota: the number of CPUs whose time our group may use.
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
        """The number of CPUs whose time slots may use."""
        return min(len(self.cpus), self.quota or len(self.cpus))


def read_machine(
    group: Path | None = None,
    *,
    sysfs: Path = Path("/sys"),
    proc: Path = Path("/proc"),
    allowed: Iterable[int] | None = None,
) -> MachineFacts:
    """Read all resources but the GPUs.

    Args:
        group: the parent cgroup of the slots, whose limits hold for all slots; None: our own cgroup.
        sysfs: the mount point of sysfs.
        proc: the mount point of procfs.
        allowed: the CPUs that our process may use; None: ask the kernel.
    """
    cpu_dir = sysfs / "devices/system/cpu"
    permitted = set(os.sched_getaffinity(0) if allowed is None else allowed)
    # A container may hide sysfs; then only the permitted CPUs are known.
    online = set(_cpus(cpu_dir / "online")) or permitted
    cpuset = online & set(_cpuset(group)) or online
    # The service may have other CPUs than the group of the slots.
    usable = cpuset & permitted or cpuset
    memory = _meminfo(proc / "meminfo")
    held = _own_groups(proc, group)
    quotas = [quota for step in held if (quota := _quota(step)) is not None]
    most = (_number(place / "memory.max") or _number(place / "memory.limit_in_bytes") for place in held)
    return MachineFacts(
        cpus=tuple(sorted(usable)),
        memory_bytes=min([memory.get("MemTotal", 0), *filter(None, most)]),
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
    """List our groups of both versions and all groups above, because the limits of each hold for us.

    `group` replaces our own group of version 2. Source: proc(5), mountinfo; cgroups(7).
    """
    own: dict[str, str] = {}
    for line in read_text(proc / "self/cgroup").splitlines():
        _, names, place = line.split(":", 2)
        own |= dict.fromkeys(names.split(","), place)
    found = [group, *group.parents] if group else []
    for line in read_text(proc / "self/mountinfo").splitlines():
        fields, _, kind = line.partition(" - ")
        root, mount = map(Path, fields.split()[3:5])
        controllers = kind.split()[2].split(",") if kind.startswith("cgroup ") else [""]
        path = next((own[name] for name in controllers if name in own), None)
        if path is None or not kind.startswith("cgroup") or (group and kind.startswith("cgroup2 ")):
            continue
        below = Path(path).relative_to(root) if Path(path).is_relative_to(root) else Path()
        found += [mount / step for step in (below, *below.parents)]
    return found


def _quota(group: Path) -> float | None:
    """Give the number of CPUs whose time a group may use."""
    quota, _, period = read_text(group / "cpu.max").partition(" ")
    if not period:
        quota, period = (read_text(group / f"cpu.cfs_{name}_us") for name in ("quota", "period"))
    return int(quota) / int(period) if quota.isdecimal() and period.isdecimal() and int(period) else None


def read_text(file: Path) -> str:
    """Return the text of a kernel's file without blanks at its ends; "" if the file cannot be read."""
    try:
        return file.read_text("utf-8", "replace").strip()
    except OSError:
        return ""


def _cpus(file: Path) -> tuple[int, ...]:
    text = read_text(file)
    return parse_cpus(text) if text else ()


def _number(file: Path) -> int | None:
    text = read_text(file)
    return int(text) if text.isdecimal() else None


def _cpuset(group: Path | None) -> tuple[int, ...]:
    """Return the CPUs of a cgroup; a cgroup without a cpuset has the CPUs of the nearest cgroup above."""
    above = (group, *group.parents) if group else ()
    return next((cpus for step in above if (cpus := _cpus(step / "cpuset.cpus.effective"))), ())


def _meminfo(file: Path) -> dict[str, int]:
    """Return sizes in bytes by name; in a NUMA node's file the lines begin with "Node N"."""
    fields = re.findall(r"(\w+):\s+(\d+) kB$", read_text(file), re.MULTILINE)
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
