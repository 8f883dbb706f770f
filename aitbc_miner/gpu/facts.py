"""What the node's processes tell each other of a GPU."""

from typing import Annotated

from msgspec import Meta, Struct


class GpuFact(Struct, frozen=True):
    """A GPU or MIG instance that a slot can be given: all its names, MB of memory (or 0), its NUMA node.

    minor: the number of its node /dev/nvidia<minor>. capabilities: those of its nodes in /dev/nvidia-caps.
    pci_bus_id: of the card, as in sysfs; "" where there is none.
    """

    ids: Annotated[tuple[str, ...], Meta(min_length=1)]
    vram_mb: int
    numa_node: int | None = None
    minor: int | None = None
    capabilities: tuple[int, ...] = ()
    unified: bool = False
    pci_bus_id: str = ""
