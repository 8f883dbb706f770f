"""What the machine gives to slots: CPUs by core and NUMA node, memory, and what the kernel caps.

Only files that answer at once. Source: Documentation/ABI/stable/sysfs-devices-system-cpu and -node, proc(5).
"""

import os
import re
from collections.abc import Iterable
from pathlib import Path

from msgspec import Struct

from aitbc_miner.util.units import parse_cpus


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
    descriptors that RLIMIT_NOFILE may allow. sysfs: where the disks are looked up.
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


def read_machine(
    group: Path | None = None,
    *,
    sysfs: Path = Path("/sys"),
    proc: Path = Path("/proc"),
    allowed: Iterable[int] | None = None,
) -> MachineFacts:
    """Look at everything but the GPUs.

    Args:
        group: the cgroup that the slots are made in, whose cpuset holds them; None where there is none.
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
    return MachineFacts(
        cpus=tuple(sorted(usable)),
        memory_bytes=memory.get("MemTotal", 0),
        offline=tuple(sorted(set(_cpus(cpu_dir / "present")) - online)),
        barred=tuple(sorted(online - usable)),
        cores=_cores(cpu_dir),
        nodes=_nodes(sysfs / "devices/system/node"),
        swap_bytes=memory.get("SwapTotal"),
        pid_max=_number(proc / "sys/kernel/pid_max"),
        nr_open=_number(proc / "sys/fs/nr_open"),
        sysfs=sysfs,
    )


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
