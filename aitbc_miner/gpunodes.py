"""What files of the kernel and of NVIDIA's driver say of a GPU: where it is, by which nodes it is reached."""

import contextlib
from pathlib import Path

CAPABILITIES = Path("/proc/driver/nvidia/capabilities")
CARDS = Path("/proc/driver/nvidia/gpus")


def mig_capabilities(place: Path, minor: int | None, own: int | None, compute: int | None) -> tuple[int, ...]:
    """Give the numbers of the nodes through which a MIG instance is reached; empty where they are not told.

    Source: "Device Nodes and Capabilities" of NVIDIA's MIG user guide.
    """
    instance = place / f"gpu{minor}" / "mig" / f"gi{own}"
    numbers = []
    for file in (instance / "access", instance / f"ci{compute}" / "access"):
        with contextlib.suppress(OSError, ValueError, KeyError):
            fields = dict(line.split(": ") for line in file.read_text().splitlines())
            numbers.append(int(fields["DeviceFileMinor"]))
    return tuple(numbers)


def minor_of(place: Path, pci_bus_id: str) -> int | None:
    """Give the number of the node /dev/nvidia<minor> of a card, where NVML does not."""
    try:
        lines = (place / pci_bus_id / "information").read_text().splitlines()
        return int(next(line.split(":")[1] for line in lines if line.startswith("Device Minor:")))
    except (OSError, ValueError, StopIteration):
        return None


def numa_node_of(sysfs: Path, pci_bus_id: str) -> int | None:
    """Give the NUMA node of a PCI device; None where the firmware does not say."""
    try:
        node = int((sysfs / "bus/pci/devices" / pci_bus_id / "numa_node").read_text())
    except (OSError, ValueError):
        return None
    return node if node >= 0 else None
