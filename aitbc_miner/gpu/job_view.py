"""What a job sees of its GPU, in one table: with less CUDA does not start, with more it would see others.

Device nodes: "Device Nodes and Capabilities" of NVIDIA's MIG user guide. None of it has been tried on a card.
"""

from pathlib import Path

from aitbc_miner.gpu.facts import GpuFact

VIEW = {
    "/dev/nvidia{minor}": "the card",
    "/dev/nvidiactl": "the driver",
    "/dev/nvidia-uvm": "memory that card and program share; CUDA does not start without it",
    "/dev/nvidia-uvm-tools": "the same, for debuggers and profilers",
    "/dev/nvidia-caps/nvidia-cap{capability}": "a MIG instance",
    "/proc/driver/nvidia/version": "the driver's version, which its libraries compare with theirs",
    "/proc/driver/nvidia/params": "who makes device nodes; without it the libraries try to",
    "/proc/driver/nvidia/gpus/{pci}": "the card's name and number",
    "/proc/driver/nvidia/capabilities/gpu{minor}": "which node is which MIG instance's",
    "/sys/bus/pci/devices/{pci}": "where the card is; a link to the card alone, of all of /sys/devices",
    "/sys/module/nvidia": "that the driver is there; without these cuInit fails with 304",
    "/sys/module/nvidia_uvm": "the same",
    "/sys/module/nvidia_drm": "the same",
    "/sys/module/nvidia_modeset": "the same",
}
"""Paths, and what each is for. Those whose words a card has no value for are left out."""


def gpu_view(gpu: GpuFact | None) -> tuple[Path, ...]:
    """Name all through which a job reaches its own GPU and no other."""
    if gpu is None:
        return ()
    values: dict[str, list[object]] = {
        "minor": [] if gpu.minor is None else [gpu.minor],
        "capability": list(gpu.capabilities),
        "pci": [gpu.pci_bus_id] if gpu.pci_bus_id else [],
    }
    found: list[str] = []
    for path in VIEW:
        word = next((word for word in values if f"{{{word}}}" in path), None)
        found += [path.format(**{word: value}) for value in values[word]] if word else [path]
    return tuple(map(Path, found))


def gpu_env(gpu: GpuFact | None) -> dict[str, str]:
    """Give the variables that show a job its own GPU, or none at all."""
    uuid = next((name for name in gpu.ids if not name.isdecimal()), gpu.ids[0]) if gpu else ""
    return {
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        "CUDA_VISIBLE_DEVICES": uuid,
        "NVIDIA_VISIBLE_DEVICES": uuid or "void",
    }


def devices_of(view: tuple[Path, ...]) -> list[Path]:
    """Give the device nodes of a view."""
    return [path for path in view if path.is_relative_to("/dev")]
