"""Divides CPUs among slots: whole cores, and each slot within one NUMA node if a node is large enough.

The functions are pure: equal wants on an equal machine give an equal division, so a restart moves no job.
"""

from collections.abc import Iterable, Sequence
from typing import TypeAlias

from msgspec import Struct

from aitbc_miner.probe.topology import MachineFacts

Core: TypeAlias = tuple[int, ...]
"""The free threads of a core."""

BINDABLE = 0.9
"""The part of a NUMA node's memory that slots may be bound to; the system needs the rest."""


class Want(Struct, frozen=True):
    """A slot's wish: the number of CPUs (None: an equal share of the rest), and the preferred NUMA node."""

    cpus: int | None = None
    node: int | None = None


def divide(wants: Sequence[Want], cpus: Iterable[int], machine: MachineFacts) -> list[tuple[int, ...]]:
    """Divide CPUs among wants.

    A core is split only if there are more wants than cores. A want gets its CPUs from one NUMA node, unless
    every node is smaller than the want. If the nodes are too full, the want gets fewer CPUs.

    Returns:
        The CPUs of each want, no CPU twice. If wants outnumber the CPUs, the last wants get none.
    """
    cores = _enough(cores_of(cpus, machine), len(wants))
    served = range(min(len(wants), len(cores)))
    division = _Division(cores, machine, len(served))
    fixed = [(index, wants[index].cpus or 0) for index in served if wants[index].cpus is not None]
    # Wants with a NUMA node choose first, then the largest wants, as long as there is room.
    for index, size in sorted(fixed, key=lambda item: (wants[item[0]].node is None, -item[1])):
        division.give(index, size, wants[index].node)
    sharers = [index for index in served if wants[index].cpus is None]
    division.share(sorted(sharers, key=lambda index: wants[index].node is None), wants)
    return [tuple(sorted(division.given.get(index, ()))) for index in range(len(wants))]


def cores_of(cpus: Iterable[int], machine: MachineFacts) -> list[Core]:
    """Group CPUs by core, in order; a CPU whose core is unknown counts as a core."""
    left = set(cpus)
    cores = []
    for core in [*machine.cores, *((cpu,) for cpu in sorted(left))]:
        if threads := tuple(sorted(left.intersection(core))):
            cores.append(threads)
            left.difference_update(threads)
    return sorted(cores)


def _enough(cores: Sequence[Core], count: int) -> list[Core]:
    """Split as few cores as possible into `count` pieces."""
    lacking = count - len(cores)
    pieces: list[Core] = []
    for core in cores:
        split = lacking > 0
        pieces += [(cpu,) for cpu in core] if split else [core]
        lacking -= len(core) - 1 if split else 0
    return pieces


def memory_nodes(
    slots: Sequence[tuple[Sequence[int], int | None]], machine: MachineFacts
) -> list[tuple[int, ...] | None]:
    """Choose the NUMA node for the memory of each slot; None: any node, the nearest first.

    A slot is bound to its node only if the node surely has the memory. Otherwise the kernel would kill a job
    for want of memory while another node has plenty.

    Args:
        slots: CPUs and memory limit (bytes) of each slot.
        machine: the machine's CPUs, cores and nodes.
    """
    if len(machine.nodes) < 2:
        return [None] * len(slots)
    homes: list[int | None] = [None] * len(slots)
    for node in machine.nodes:
        near = [i for i, (cpus, most) in enumerate(slots) if cpus and most and set(cpus) <= set(node.cpus)]
        if sum(slots[i][1] or 0 for i in near) <= node.memory_bytes * BINDABLE:
            for i in near:
                homes[i] = node.id
    return [None if home is None else (home,) for home in homes]


class _Division:
    """The free cores by node, and the CPUs `given` so far; `waiting` counts the wants still without a CPU."""

    def __init__(self, cores: Sequence[Core], machine: MachineFacts, waiting: int) -> None:
        node_of = {cpu: node.id for node in machine.nodes for cpu in node.cpus}
        self.free: dict[int, list[Core]] = {}
        for core in cores:
            self.free.setdefault(node_of.get(core[0], 0), []).append(core)
        self.given: dict[int, list[int]] = {}
        self._largest = max(map(_count, self.free.values()), default=0)
        self._waiting = waiting

    def give(self, index: int, size: int, near: int | None) -> None:
        """Give a want `size` CPUs, or as many as are free, but leave a core for each waiting want."""
        self._waiting -= 1
        given = self.given.setdefault(index, [])
        if size > self._largest:
            nodes = sorted(self.free, key=lambda node: (-_count(self.free[node]), node))
        else:
            nodes = [self._home(size, near)]
        for node in nodes:
            cores = self.free[node]
            while cores and len(given) < size and sum(map(len, self.free.values())) > self._waiting:
                given += cores.pop(0)

    def _home(self, size: int, near: int | None) -> int:
        """Choose the near node, else a node with exactly `size` free CPUs, else the node with most room."""
        if near is not None and self.free.get(near):
            return near
        room = {node: _count(cores) for node, cores in self.free.items()}
        return max(room, key=lambda node: (room[node] == size, room[node], -node))

    def share(self, sharers: Sequence[int], wants: Sequence[Want]) -> None:
        """Give all free CPUs to the sharers, in equal parts as far as cores and nodes allow."""
        room = {node: _count(cores) for node, cores in self.free.items()}
        if not sharers:
            return
        if sum(room.values()) > max(room.values()) * len(sharers):
            # A share is larger than every node.
            self._split([core for node in sorted(self.free) for core in self.free[node]], sorted(sharers))
            return
        members: dict[int, list[int]] = {node: [] for node in self.free}
        for index in sharers:
            open_nodes = [node for node in room if len(members[node]) < len(self.free[node])]
            near = wants[index].node
            parts = {node: len(members[node]) + 1 for node in open_nodes}
            roomiest = max(open_nodes, key=lambda node: (room[node] / parts[node], -parts[node], -node))
            members[near if near in open_nodes else roomiest].append(index)
        for node, indices in members.items():
            self._split(self.free[node], sorted(indices))

    def _split(self, cores: Sequence[Core], indices: Sequence[int]) -> None:
        """Cut a row of cores into a piece for each index, about equal in CPUs, none empty."""
        total, start, done = _count(cores), 0, 0
        for part, index in enumerate(indices, 1):
            goal, last = total * part / len(indices), len(cores) - (len(indices) - part)
            end = start + 1
            done += len(cores[start])
            while end < last and done + len(cores[end]) <= goal:
                done += len(cores[end])
                end += 1
            self.given[index] = [cpu for core in cores[start:end] for cpu in core]
            start = end


def _count(cores: Iterable[Core]) -> int:
    return sum(map(len, cores))
