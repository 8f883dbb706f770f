"""Reads a GPU's place and device nodes from files of the kernel and the driver, and makes the nodes."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

DRIVER = Path("/proc/driver/nvidia")
CAPABILITIES, CARDS = DRIVER / "capabilities", DRIVER / "gpus"
MODPROBE = Path("/usr/bin/nvidia-modprobe")
MAKE_S = 10.0
"""Seconds for a run of nvidia-modprobe, which may have to load the driver."""
_ABANDONED: list[subprocess.Popen[bytes]] = []


def mig_capabilities(place: Path, minor: int | None, own: int | None, compute: int | None) -> tuple[int, ...]:
    """Give the minor numbers of a MIG instance's device nodes; empty if the driver does not tell them.

    Source: "Device Nodes and Capabilities" of NVIDIA's MIG user guide.
    """
    instance = place / f"gpu{minor}" / "mig" / f"gi{own}"
    files = (instance / "access", instance / f"ci{compute}" / "access")
    return tuple(number for file in files if (number := _number_in(file, "DeviceFileMinor")) is not None)


def minor_of(place: Path, pci_bus_id: str) -> int | None:
    """Give the number of a card's node /dev/nvidia<minor>, for drivers whose NVML does not."""
    return _number_in(place / pci_bus_id / "information", "Device Minor")


def _number_in(file: Path, name: str) -> int | None:
    """Give the number in the line "name: number" of a driver's file; None without such a line."""
    try:
        lines = file.read_text().splitlines()
        return int(next(line.split(":")[1] for line in lines if line.startswith(f"{name}:")))
    except (OSError, ValueError, StopIteration):
        return None


def numa_node_of(sysfs: Path, pci_bus_id: str) -> int | None:
    """Give the NUMA node of a PCI device; None if the firmware does not say."""
    try:
        node = int((sysfs / "bus/pci/devices" / pci_bus_id / "numa_node").read_text())
    except (OSError, ValueError):
        return None
    return node if node >= 0 else None


def make_nodes(program: Path = MODPROBE, driver: Path = DRIVER) -> list[str]:
    """Have nvidia-modprobe make the device nodes of all cards; needs root. Returns the failures.

    A boot does not make all nodes. A job cannot make nodes, because nvidia-modprobe could not become root
    there.
    """
    if not program.exists():
        return []
    failed: list[str] = []
    try:
        for words in _needed(driver):
            child = subprocess.Popen([program, *words], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
            if status := child.wait(MAKE_S):
                failed.append(f"{program} {' '.join(words)}: exit status {status}")
    except OSError as error:
        failed.append(f"{program}: {error.strerror}")
    except subprocess.TimeoutExpired:
        # The program hangs in the driver: a kill would make the driver's state worse.
        _ABANDONED.append(child)
        failed.append(f"{program} {' '.join(words)}: no end after {MAKE_S:g} s")
    return failed


def _needed(driver: Path) -> Iterator[list[str]]:
    # The first run loads the driver; only then the driver lists its cards.
    yield from (["-u", "-c", "0"], ["-m"])
    for card in sorted((driver / "gpus").glob("*")):
        minor = minor_of(driver / "gpus", card.name)
        if minor is not None:
            yield ["-u", "-c", str(minor)]
    for access in sorted((driver / "capabilities").glob("gpu*/mig/**/access")):
        yield ["-f", str(access)]


if __name__ == "__main__":
    # The systemd unit runs this file with all rights of root; the miner has fewer.
    sys.exit("\n".join(make_nodes()) or 0)
