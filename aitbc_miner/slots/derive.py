"""Chooses CPUs and NUMA nodes, or the whole layout, if slots.d leaves the choice to the node."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from aitbc_miner.config.document import Fault
from aitbc_miner.config.units import AUTO, format_cpus
from aitbc_miner.probe.topology import MachineFacts
from aitbc_miner.slots.cpu_layout import Want, cores_of, divide, memory_nodes
from aitbc_miner.slots.reader import check_slots, fault_at, read_slots
from aitbc_miner.slots.spec import MIB, SlotSpec


def lay_out(
    specs: Sequence[SlotSpec], machine: MachineFacts, faults: list[Fault], directory: Path | None = None
) -> list[SlotSpec]:
    """Choose CPUs for the slots with `cpus: auto`, from the CPUs that no slot names, and `mems` for all.

    A slot for which no CPU is left stays unchanged and gets a fault in `faults`. If the slots come from
    slots.d, `directory` is its path; then the fault names file and line.
    """
    auto = [spec for spec in specs if spec.cpus == AUTO]
    named = {cpu for spec in specs for cpu in spec.cpus or ()}
    wants = [
        Want(math.ceil(spec.cpu_max / 100) if spec.cpu_max else None, machine.gpu_nodes.get(str(spec.gpu)))
        for spec in auto
    ]
    divided = divide(wants, {*machine.cpus} - named, machine)
    chosen = dict(zip((spec.name for spec in auto), divided, strict=True))
    for spec in auto:
        if not chosen[spec.name]:
            used = format_cpus(named.intersection(machine.cpus)) or "none"
            message = (
                f"no CPU is left for this slot: of CPUs {format_cpus(machine.cpus)}, slots name {used}, and"
                f" {len(auto)} slots with `cpus: auto` share the rest; name fewer CPUs, or remove a slot"
            )
            faults.append(fault_at(directory, spec.name, ["cpus"], message))
    laid = [replace(spec, cpus=chosen.get(spec.name, spec.cpus)) for spec in specs]
    return _bind_memory(laid, machine)


def _bind_memory(specs: Sequence[SlotSpec], machine: MachineFacts) -> list[SlotSpec]:
    homes = memory_nodes([(spec.cpus or (), spec.memory_max) for spec in specs], machine)
    return [replace(spec, mems=mems) for spec, mems in zip(specs, homes, strict=True)]


def derive_slots(facts: MachineFacts) -> list[SlotSpec]:
    """Lay out the machine: a slot for each GPU, and a CPU slot for about 4 of the remaining CPUs each.

    The CPUs are divided equally among the GPU slots and, as one part more, the CPU slots. 80 % of the memory
    is divided equally among all slots; the rest is for the system and the miner.
    """
    # A CPU quota of our cgroup may allow less time than the CPUs have.
    cpus = facts.cpus[: facts.threads]
    share = max(1, len(cpus) // (len(facts.gpu_ids) + 1))
    wants = [Want(share, facts.gpu_nodes.get(ids[0])) for ids in facts.gpu_ids]
    # If GPUs outnumber the CPUs, GPU slots share CPUs.
    groups = [group or (cpus[i % len(cpus)],) for i, group in enumerate(divide(wants, cpus, facts))]
    rest = set(cpus).difference(*groups)
    # Two small slots keep a small machine busier than a single slot: a job rarely uses its whole slot.
    count = min(len(cores_of(rest, facts)), max(2, len(rest) // 4))
    memory = facts.memory_bytes * 8 // 10 // (len(groups) + count) // MIB * MIB
    limits: dict[str, Any] = {"memory_max": max(MIB, memory), "pids_max": 1024}
    specs = [
        # The index of a card changes when a card is added or a driver fails; its UUID stays.
        SlotSpec(name=f"gpu{i}", kind="gpu", gpu=min(ids, key=str.isdecimal), cpus=group, **limits)
        for i, (ids, group) in enumerate(zip(facts.gpu_ids, groups, strict=True))
    ]
    specs += [
        SlotSpec(name=f"cpu{i}", kind="cpu", cpus=group, **limits)
        for i, group in enumerate(divide([Want()] * count, rest, facts))
    ]
    return _bind_memory(specs, facts)


def slots_for(directory: Path, facts: MachineFacts) -> tuple[list[SlotSpec], list[Fault]]:
    """Read the slots of a node, and list their faults on this machine.

    A slot whose GPU is missing is no fault: the node starts without the slot, and shows the slot as unusable.
    """
    faults: list[Fault] = []
    specs = read_slots(directory, faults)
    lay_out(specs, facts, faults, directory)
    found, _ = check_slots([spec for spec in specs if spec.gpu is None], facts, directory)
    return specs, [*faults, *found]
