"""The machine's facts: as data for the coordinator, and as a page for people.

This module uses only files and system calls that answer at once. `gpu`, which may wait for a driver, reads
GPUs.
"""

import os
import platform
import re
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import psutil
from msgspec import Struct

from aitbc_miner import __version__
from aitbc_miner.cgroup.group import CgroupError, find_mount, own_group
from aitbc_miner.config.units import format_cpus
from aitbc_miner.gpu.reader import GpuInfo, GpuList
from aitbc_miner.probe.topology import NumaNode, read_machine, read_text
from aitbc_miner.util.terminal import wrap

TOOLS = ("bwrap", "nft", "systemd-run", "nvidia-smi", "ffmpeg", "python3")
NEEDED_CONTROLLERS = ("cpu", "memory", "pids")
LABEL_WIDTH = 11
_TOOLKIT = re.compile(r'"cuda"\s*:\s*\{[^}]*"version"\s*:\s*"([\d.]+)"|CUDA Version ([\d.]+)')


class CgroupFacts(Struct, frozen=True):
    """The machine's cgroups (mode `v2`, `hybrid`, `v1` or `none`), and the group of our process.

    controllers: the controllers of our group. delegated: the controllers that our group hands on to the
    groups below. writable: our process may make groups below.
    """

    mode: str
    mount: str | None = None
    controllers: tuple[str, ...] = ()
    delegated: tuple[str, ...] = ()
    writable: bool = False


class Machine(Struct, frozen=True):
    """The machine without its GPUs. Memory and disk in MiB.

    cpus: the CPUs that our process may use. threads: the number of CPUs online. siblings: the threads of each
    core. os_ids: the distribution and its ancestors. tools: the path of each installed tool.
    """

    model: str
    arch: str
    cores: int
    threads: int
    cpus: tuple[int, ...]
    siblings: tuple[tuple[int, ...], ...]
    numa: tuple[NumaNode, ...]
    memory_mb: int
    memory_available_mb: int
    disk_total_mb: int
    disk_free_mb: int
    os: str
    os_ids: tuple[str, ...]
    kernel: str
    python: str
    tools: dict[str, str]
    sandbox: str | None
    nft: str | None
    cgroup: CgroupFacts


class SlotCapability(Struct, frozen=True, omit_defaults=True):
    """The description of a slot for the coordinator.

    enforced: the control that holds each limit. offers: whether the slot takes jobs, now or later.
    """

    name: str
    kind: str
    cpus: str
    memory_mb: int
    enforced: dict[str, str]
    gpu: str | None = None
    runners: list[str] = []
    offers: bool = True


def probe_machine(workspace: Path, *, sysfs: Path = Path("/sys"), proc: Path = Path("/proc")) -> Machine:
    """Read all facts but the GPUs. The disk is the disk of `workspace`, which need not exist yet."""
    facts = read_machine(sysfs=sysfs, proc=proc)
    online = min(len(facts.cpus) + len(facts.barred), facts.quota or len(facts.cpus) + len(facts.barred))
    memory = psutil.virtual_memory()
    # A container may have less memory than its machine.
    most = facts.memory_bytes or memory.total
    disk = shutil.disk_usage(_nearest_existing(workspace))
    os_name, os_ids = _distribution()
    # nft is in /usr/sbin, and the PATH of an ordinary user lacks this directory.
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])
    tools = {name: found for name in TOOLS if (found := shutil.which(name, path=path))}
    return Machine(
        model=_cpu_model(proc / "cpuinfo"),
        arch=platform.machine(),
        cores=min(online, len(facts.cores) or psutil.cpu_count(logical=False) or online),
        threads=online,
        cpus=facts.cpus,
        siblings=facts.cores,
        numa=facts.nodes,
        memory_mb=min(memory.total, most) >> 20,
        memory_available_mb=min(memory.available, most) >> 20,
        disk_total_mb=disk.total >> 20,
        disk_free_mb=disk.free >> 20,
        os=os_name,
        os_ids=os_ids,
        kernel=platform.release(),
        python=platform.python_version(),
        tools=tools,
        sandbox=tools.get("bwrap"),
        nft=tools.get("nft"),
        cgroup=cgroup_facts(proc),
    )


def cgroup_facts(proc: Path = Path("/proc")) -> CgroupFacts:
    """Read the rights of our process on cgroups. Source: cgroups(7), /proc/self/{mountinfo,cgroup}."""
    mountinfo = proc / "self/mountinfo"
    mount = find_mount(str(mountinfo))
    if mount is None:
        return CgroupFacts("v1" if " - cgroup " in read_text(mountinfo) else "none")
    mode = "hybrid" if mount.hybrid else "v2"
    try:
        own = own_group(mount, str(proc / "self/cgroup"))
    except CgroupError:
        return CgroupFacts(mode, mount.path)
    return CgroupFacts(
        mode,
        mount.path,
        controllers=tuple(read_text(own / "cgroup.controllers").split()),
        delegated=tuple(read_text(own / "cgroup.subtree_control").split()),
        writable=os.access(own, os.W_OK | os.X_OK),
    )


def cuda_toolkits(roots: Sequence[Path] = (Path("/usr/local"), Path("/usr/lib"))) -> tuple[str, ...]:
    """Return the versions of the installed CUDA toolkits, such as "12.4.1"; the driver may support others."""
    found: set[str] = set()
    for root in roots:
        for toolkit in root.glob("cuda*"):
            text = read_text(toolkit / "version.json") or read_text(toolkit / "version.txt")
            # version.json has the version of each part; version.txt is a line "CUDA Version 10.2.89".
            if match := _TOOLKIT.search(text):
                found.add(match[1] or match[2])
    return tuple(sorted(found))


def _cpu_model(cpuinfo: Path) -> str:
    lines = read_text(cpuinfo).splitlines()
    fields = [[part.strip() for part in line.split(":", 1)] for line in lines if ":" in line]
    names = {name: value for name, value in reversed(fields) if value}
    # Arm has no "model name"; some Arm boards have their name in "Model".
    return names.get("model name") or names.get("Model") or "unknown"


def _nearest_existing(path: Path) -> Path:
    path = path.absolute()
    while not os.access(path, os.F_OK):
        path = path.parent
    return path


def _distribution() -> tuple[str, tuple[str, ...]]:
    try:
        release = platform.freedesktop_os_release()
    except OSError:
        return platform.system(), ()
    return release["PRETTY_NAME"], (release["ID"], *release.get("ID_LIKE", "").split())


def capabilities(
    node_id: str,
    machine: Machine,
    gpus: GpuList,
    slots: Sequence[SlotCapability],
    runners: Sequence[str],
    tags: Iterable[str] = (),
    tasks: Sequence[dict[str, Any]] = (),
) -> dict[str, Any]:
    """Return the capability payload, ready for JSON. A GPU with an error is not offered.

    `tasks` are the Python tasks, with the JSON schemas of their arguments (`catalogue.told`). The key
    "machine" has all other facts; the payloads of other miners lack it.
    """
    working = [gpu for gpu in gpus.gpus if not gpu.error]
    derived = [*(["debian"] if "debian" in machine.os_ids else []), *(["cuda"] if working else []), "cpu"]
    return {
        "node_id": node_id,
        "version": __version__,
        "cpu": {"cores": machine.cores, "arch": machine.arch},
        "memory_mb": machine.memory_mb,
        "disk_free_mb": machine.disk_free_mb,
        "gpu": [_told_of(gpu) for gpu in working],
        "runners": list(runners),
        "tags": list(dict.fromkeys([*derived, *tags])),
        "slots": [msgspec.to_builtins(slot) for slot in slots],
        "tasks": list(tasks),
        "machine": {
            **msgspec.to_builtins(machine),
            "gpus": msgspec.to_builtins(gpus.gpus),
            "gpu_error": gpus.error,
        },
    }


def _told_of(gpu: GpuInfo) -> dict[str, Any]:
    return {
        "vendor": gpu.vendor,
        "name": gpu.name,
        "uuid": gpu.uuid,
        **({} if gpu.vram_mb is None else {"vram_mb": gpu.vram_mb}),
        "cuda": {"version": gpu.cuda, "driver": gpu.driver},
    }


def render_page(machine: Machine, gpus: GpuList, runners: Sequence[str]) -> str:
    """Return the capabilities as a page for people, with the missing parts and the consequences."""
    facts = [
        ("System", f"{machine.os}, Linux {machine.kernel}, Python {machine.python}"),
        ("Processor", f"{machine.model} ({machine.arch})"),
        (
            "CPUs",
            f"{machine.cores} cores, {machine.threads} threads; usable here: {format_cpus(machine.cpus)}",
        ),
        *(
            (f"NUMA {node.id}", f"CPUs {format_cpus(node.cpus) or 'none'}, {_size(node.memory_bytes >> 20)}")
            for node in machine.numa
        ),
        ("Memory", f"{_size(machine.memory_mb)}, {_size(machine.memory_available_mb)} available"),
        ("Disk", f"{_size(machine.disk_total_mb)}, {_size(machine.disk_free_mb)} free for the workspace"),
        *(fact for gpu in gpus.gpus for fact in _gpu_facts(gpu)),
        *([] if gpus.gpus else [("GPUs", "none" if gpus.missing or not gpus.error else "unknown")]),
        ("Runners", ", ".join(runners) or "none"),
        ("Tools", ", ".join(machine.tools) or "none"),
        ("Sandbox", machine.sandbox or "none"),
        ("Firewall", machine.nft or "none"),
        ("Cgroups", _cgroup_text(machine.cgroup)),
    ]
    lines = [line for label, text in facts for line in wrap(f"{label:{LABEL_WIDTH}}", text)]
    if faults := _faults(machine, gpus, runners):
        lines += ["", "Missing", *(line for fault in faults for line in wrap("  * ", fault))]
    return "\n".join(lines) + "\n"


def _size(mebibytes: int | None) -> str:
    if mebibytes is None:
        return "memory unknown"
    for unit, factor in (("TiB", 1 << 20), ("GiB", 1 << 10)):
        if mebibytes >= factor:
            return f"{mebibytes / factor:.1f} {unit}"
    return f"{mebibytes} MiB"


def _gpu_facts(gpu: GpuInfo) -> list[tuple[str, str]]:
    label = f"GPU {gpu.index}"
    if gpu.error:
        return [(label, "broken")]
    facts = [
        gpu.name,
        _size(gpu.vram_mb) + (" of the machine's memory" if gpu.unified else ""),
        gpu.uuid,
        f"compute capability {gpu.compute_capability}" if gpu.compute_capability else "",
        f"driver {gpu.driver}" if gpu.driver else "",
        f"CUDA {gpu.cuda}" if gpu.cuda else "",
        f"PCI {gpu.pci_bus_id}" if gpu.pci_bus_id else "",
        f"NUMA node {gpu.numa_node}" if gpu.numa_node is not None else "",
        "MIG on" if gpu.mig_enabled else "",
    ]
    parts = [
        (f"  MIG {number}", f"{part.name}, {_size(part.vram_mb)}, {part.uuid}")
        for number, part in enumerate(gpu.mig)
    ]
    return [(label, ", ".join(fact for fact in facts if fact)), *parts]


def _cgroup_text(cgroup: CgroupFacts) -> str:
    if cgroup.mount is None:
        return "version 1 only" if cgroup.mode == "v1" else "none"
    kind = "version 2" if cgroup.mode == "v2" else "hybrid (version 2 beside version 1)"
    return (
        f"{kind} at {cgroup.mount}, {'writable' if cgroup.writable else 'not writable'} here; "
        f"controllers here: {', '.join(cgroup.controllers) or 'none'}; "
        f"enabled for groups below: {', '.join(cgroup.delegated) or 'none'}"
    )


def _faults(machine: Machine, gpus: GpuList, runners: Sequence[str]) -> list[str]:
    """Return a message for each missing part: the part, the consequence, the remedy."""
    cgroup = machine.cgroup
    absent = [name for name in NEEDED_CONTROLLERS if name not in cgroup.controllers]
    so = "the miner does not start, or, with cgroup.mode: auto, limits only single processes"
    unified = "boot with systemd.unified_cgroup_hierarchy=1"
    faults = [gpus.error or "", *(gpu.error or "" for gpu in gpus.gpus)]
    faults += [f"GPU {gpu.index}: the driver gives no {', '.join(gpu.odd)}" for gpu in gpus.gpus if gpu.odd]
    if not gpus.gpus and not gpus.error:
        faults.append("no NVIDIA GPU: GPU slots are not possible")
    if not runners:
        faults.append("no runner: no job can be run; enable one in the configuration")
    if not machine.sandbox:
        no = "the miner does not start, or, with sandbox.mode: auto, jobs have no sandbox"
        faults.append(f"no bwrap: {no}; apt-get install bubblewrap")
    if cgroup.mount is None:
        faults.append(f"no cgroup version 2: {so}; {unified}")
    elif absent:
        remedy = unified if cgroup.mode == "hybrid" else "run the miner as the packaged service"
        lacking = f"no cgroup controller {', '.join(absent)} here"
        faults.append(f"{lacking}: {so}; {remedy}")
    if cgroup.mount and not cgroup.writable:
        faults.append(f"cgroup not writable: {so}; run as root or as the packaged service")
    return [fault for fault in faults if fault]
