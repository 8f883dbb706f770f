"""Chooses what slots.d leaves to the node: CPUs, NUMA nodes, or the whole layout."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from aitbc_miner.config.document import Fault
from aitbc_miner.config.units import AUTO, format_cpus
from aitbc_miner.probe.topology import MachineFacts
from aitbc_miner.slots.cpu_layout import Want, cores_of, divide, memory_nodes
from aitbc_miner.slots.reader import MIB, check_slots, fault_at, read_slots
from aitbc_miner.slots.spec import SlotSpec


def lay_out(
    specs: Sequence[SlotSpec], machine: MachineFacts, faults: list[Fault], directory: Path | None = None
) -> list[SlotSpec]:
    """Choose the CPUs of the slots with `cpus: auto`, among those that no slot names, and all slots' `mems`.

    A slot that nothing is left for is appended to `faults`, and stays as it was.

    Args:
        specs: all slots of the node.
        machine: what there is.
        faults: where faults go.
        directory: slots.d, if that is where the slots are from, so that the faults name file and line.
    """
    auto = [spec for spec in specs if spec.cpus == AUTO]
    named = {cpu for spec in specs for cpu in spec.cpus or ()}
    wants = [
        Want(math.ceil(spec.cpu_max / 100) if spec.cpu_max else None, machine.gpu_nodes.get(str(spec.gpu)))
        for spec in auto
    ]
    chosen = dict(
        zip((spec.name for spec in auto), divide(wants, {*machine.cpus} - named, machine), strict=True)
    )
    for spec in auto:
        if not chosen[spec.name]:
            used = format_cpus(named.intersection(machine.cpus)) or "none"
            message = (
                f"no CPU is left for auto: this node may use {format_cpus(machine.cpus)}, slots name {used}, "
                f"and {len(auto)} slots are auto; name fewer CPUs, or remove a slot"
            )
            faults.append(fault_at(directory, spec.name, ["cpus"], message))
    laid = [replace(spec, cpus=chosen.get(spec.name, spec.cpus)) for spec in specs]
    return _bind_memory(laid, machine)


def _bind_memory(specs: Sequence[SlotSpec], machine: MachineFacts) -> list[SlotSpec]:
    homes = memory_nodes([(spec.cpus or (), spec.memory_max) for spec in specs], machine)
    return [replace(spec, mems=mems) for spec, mems in zip(specs, homes, strict=True)]


def derive_slots(facts: MachineFacts) -> list[SlotSpec]:
    """Lay out the machine: a slot for each GPU with its share of the CPUs, about one for each 4 CPUs left.

    A share is an equal part of the CPUs, one part being kept for CPU slots. 80 % of the memory is divided
    equally; the rest is for the system and this program.
    """
    # All of them only if there is the time of all of them.
    cpus = facts.cpus[: facts.threads]
    share = max(1, len(cpus) // (len(facts.gpu_ids) + 1))
    wants = [Want(share, facts.gpu_nodes.get(ids[0])) for ids in facts.gpu_ids]
    # More GPUs than CPUs have to share them.
    groups = [group or (cpus[i % len(cpus)],) for i, group in enumerate(divide(wants, cpus, facts))]
    rest = set(cpus).difference(*groups)
    # Two small slots keep a small machine busier than one: a job rarely uses all that it is given.
    count = min(len(cores_of(rest, facts)), max(2, len(rest) // 4))
    memory = facts.memory_bytes * 8 // 10 // (len(groups) + count) // MIB * MIB
    limits: dict[str, Any] = {"memory_max": max(MIB, memory), "pids_max": 1024}
    specs = [
        SlotSpec(name=f"gpu{i}", kind="gpu", gpu=_best_id(facts.gpu_ids[i]), cpus=group, **limits)
        for i, group in enumerate(groups)
    ]
    specs += [
        SlotSpec(name=f"cpu{i}", kind="cpu", cpus=group, **limits)
        for i, group in enumerate(divide([Want()] * count, rest, facts))
    ]
    return _bind_memory(specs, facts)


def _best_id(ids: tuple[str, ...]) -> str:
    # Indices change when a card is added or its driver fails; a UUID stays.
    return next((name for name in ids if not name.isdecimal()), ids[0])


def slots_for(directory: Path, facts: MachineFacts) -> tuple[list[SlotSpec], list[Fault]]:
    """Read the slots of a node and what is wrong with them on this machine.

    A slot whose GPU is not there is no fault: the node starts without it, and it is shown as unusable.
    """
    faults: list[Fault] = []
    specs = read_slots(directory, faults)
    lay_out(specs, facts, faults, directory)
    found, _ = check_slots([spec for spec in specs if spec.gpu is None], facts, directory)
    return specs, [*faults, *found]
