"""The description of a GPU in messages between the node's processes."""

from typing import Annotated

from msgspec import Meta, Struct


class GpuFact(Struct, frozen=True):
    """A GPU or MIG instance for a slot: all its names, MB of memory (0 if unknown), its NUMA node.

    minor: the number of /dev/nvidia<minor>. capabilities: the numbers of its nodes in /dev/nvidia-caps.
    pci_bus_id: the card's PCI address as in sysfs, or "".
    """

    ids: Annotated[tuple[str, ...], Meta(min_length=1)]
    vram_mb: int
    numa_node: int | None = None
    minor: int | None = None
    capabilities: tuple[int, ...] = ()
    unified: bool = False
    pci_bus_id: str = ""
