"""Compares each key of slots.d with the machine."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from aitbc_miner.config.units import format_cpus, format_size
from aitbc_miner.probe.topology import MachineFacts
from aitbc_miner.slots.spec import MIB, SlotSpec
from aitbc_miner.util.limits import disk_of

LEFT_TO_SYSTEM = 512 * MIB
"""Bytes. With less (5 % on a smaller machine) the system and the miner may run short of memory."""


class SlotMisfit(NamedTuple):
    """A key that does not fit: the slot's name, the path to the key, and whether the slot can run anyway."""

    slot: str
    key: tuple[str, ...]
    message: str
    possible: bool = False


def misfits(specs: Sequence[SlotSpec], machine: MachineFacts) -> Iterator[SlotMisfit]:
    """Yield the misfits of each slot, then the misfits of all slots together."""
    for spec in specs:
        yield from _cpus(spec, machine)
        yield from _kernel_caps(spec, machine)
        yield from _disks(spec, machine)
    yield from _gpus(specs, machine)
    yield from _memory(specs, machine)


def shared_cpus(specs: Sequence[SlotSpec]) -> Iterator[str]:
    """Yield a warning for each set of slots with CPUs in common."""
    sharers: dict[int, list[str]] = defaultdict(list)
    for spec in specs:
        for cpu in spec.cpus or ():
            sharers[cpu].append(spec.name)
    together: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for cpu, names in sorted(sharers.items()):
        if len(names) > 1:
            together[tuple(names)].append(cpu)
    for slots, cpus in together.items():
        yield f"slots {', '.join(slots)} share the CPUs {format_cpus(cpus)}; their jobs slow each other down"


def _cpus(spec: SlotSpec, machine: MachineFacts) -> Iterator[SlotMisfit]:
    asked = set(spec.cpus or ())
    offline, barred = asked.intersection(machine.offline), asked.intersection(machine.barred)
    key, usable = (spec.name, ("cpus",)), format_cpus(machine.cpus)
    if absent := asked.difference(machine.cpus, offline, barred):
        here = format_cpus([*machine.cpus, *machine.offline, *machine.barred])
        yield SlotMisfit(*key, f"there is no CPU {format_cpus(absent)}; this machine has {here}")
    if offline:
        remedy = f"chcpu -e {format_cpus(offline)}, or use some of {usable}"
        yield SlotMisfit(*key, f"CPU {format_cpus(offline)} is offline; {remedy}")
    if barred:
        remedy = f"use some of {usable}, or widen AllowedCPUs= of the service or the cpuset of the container"
        yield SlotMisfit(*key, f"the miner may not use CPU {format_cpus(barred)}; {remedy}")
    cpus = len(spec.cpus or machine.cpus)
    if spec.cpu_max and spec.cpu_max > cpus * 100:
        message = f"no job reaches {spec.cpu_max}%: the slot has {cpus} CPUs; lower cpu_max to {cpus * 100}%"
        yield SlotMisfit(spec.name, ("cpu_max",), message, possible=True)


def _kernel_caps(spec: SlotSpec, machine: MachineFacts) -> Iterator[SlotMisfit]:
    swap, nofile = machine.swap_bytes, spec.rlimits.get("nofile", 0)
    if swap is not None and (spec.swap_max or 0) > swap:
        message = f"{format_size(spec.swap_max or 0)} is more than the {swap // MIB}M of swap of this machine"
        yield SlotMisfit(spec.name, ("swap_max",), f"{message}; lower swap_max, or add swap", possible=True)
    if machine.pid_max is not None and (spec.pids_max or 0) > machine.pid_max:
        message = f"{spec.pids_max} is more than the kernel allows on this machine ({machine.pid_max})"
        remedy = "lower pids_max, or raise the sysctl kernel.pid_max"
        yield SlotMisfit(spec.name, ("pids_max",), f"{message}; {remedy}", possible=True)
    if machine.nr_open is not None and nofile > machine.nr_open:
        message = f"{nofile} is more than the kernel allows ({machine.nr_open})"
        remedy = "lower nofile, or raise the sysctl fs.nr_open"
        yield SlotMisfit(spec.name, ("rlimits", "nofile"), f"{message}; {remedy}")


def _disks(spec: SlotSpec, machine: MachineFacts) -> Iterator[SlotMisfit]:
    if machine.sysfs is None:
        return
    paths: dict[str, str] = {}
    for path in spec.io_max:
        try:
            other = paths.setdefault(disk_of(path, machine.sysfs), path)
        except OSError as error:
            message = f"cannot find the disk of {path}: {error.strerror}"
            remedy = "name an existing directory or device on a single disk"
            yield SlotMisfit(spec.name, ("io_max", path), f"{message}; {remedy}")
            continue
        if other != path:
            message = f"{path} is on the same disk as {other}; limit that disk once"
            yield SlotMisfit(spec.name, ("io_max", path), message)


def _gpus(specs: Sequence[SlotSpec], machine: MachineFacts) -> Iterator[SlotMisfit]:
    users: dict[tuple[str, ...], str] = {}
    for spec in specs:
        if spec.gpu is None:
            continue
        ids = next((ids for ids in machine.gpu_ids if str(spec.gpu) in ids), None)
        if ids in users:
            message = f"GPU {spec.gpu} belongs to slot {users[ids]} already; give each GPU a single slot"
            yield SlotMisfit(spec.name, ("gpu",), message)
        elif ids is not None:
            users[ids] = spec.name
        elif (parts := machine.gpu_parts.get(str(spec.gpu))) is not None:
            message = f"is divided into MIG instances; name an instance: {', '.join(parts)}"
            none = "has no MIG instance yet; make one with `nvidia-smi mig`, and name the instance"
            yield SlotMisfit(spec.name, ("gpu",), f"GPU {spec.gpu} {message if parts else none}")
        else:
            here = ", ".join(" or ".join(ids) for ids in machine.gpu_ids) or "none"
            yield SlotMisfit(spec.name, ("gpu",), f"there is no GPU {spec.gpu}; GPUs of this machine: {here}")


def _memory(specs: Sequence[SlotSpec], machine: MachineFacts) -> Iterator[SlotMisfit]:
    total, here = sum(spec.memory_max or 0 for spec in specs), machine.memory_bytes
    system = min(here // 20, LEFT_TO_SYSTEM)
    if total > here - system:
        most = max(specs, key=lambda spec: spec.memory_max or 0)
        shown = f"all slots together may use {total // MIB}M of this machine's {here // MIB}M of memory"
        fits = total <= here
        message = f"{shown}, and the system needs {system // MIB}M" if fits else shown
        yield SlotMisfit(most.name, ("memory_max",), f"{message}; lower memory_max of slots", possible=fits)
