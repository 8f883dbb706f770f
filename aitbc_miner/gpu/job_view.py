"""The table of paths through which a job reaches its GPU. CUDA needs all of them; more would show other GPUs.

Device nodes: "Device Nodes and Capabilities" of NVIDIA's MIG user guide. Nobody has tried the table on a
card.
"""

from pathlib import Path

from aitbc_miner.gpu.facts import GpuFact

VIEW = {
    "/dev/nvidia{minor}": "the card",
    "/dev/nvidiactl": "the driver",
    "/dev/nvidia-uvm": "memory shared by card and program; CUDA needs it to start",
    "/dev/nvidia-uvm-tools": "the same, for debuggers and profilers",
    "/dev/nvidia-caps/nvidia-cap{capability}": "a MIG instance",
    "/proc/driver/nvidia/version": "the driver's version, which its libraries compare with theirs",
    "/proc/driver/nvidia/params": "which program makes device nodes; without the file, the libraries try",
    "/proc/driver/nvidia/gpus/{pci}": "the card's name and number",
    "/proc/driver/nvidia/capabilities/gpu{minor}": "the device nodes of each MIG instance",
    "/sys/bus/pci/devices/{pci}": "where the card is; a link to the card alone, of all of /sys/devices",
    "/sys/module/nvidia": "the presence of the driver; without these paths cuInit fails with 304",
    "/sys/module/nvidia_uvm": "the same",
    "/sys/module/nvidia_drm": "the same",
    "/sys/module/nvidia_modeset": "the same",
}
"""Paths and their purposes. A path with a {word} for which the card has no value is left out."""


def gpu_view(gpu: GpuFact | None) -> tuple[Path, ...]:
    """List the paths through which a job reaches its own GPU and no other."""
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
    """Give the environment variables that show CUDA the job's own GPU, or no GPU."""
    uuid = next((name for name in gpu.ids if not name.isdecimal()), gpu.ids[0]) if gpu else ""
    return {
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        "CUDA_VISIBLE_DEVICES": uuid,
        "NVIDIA_VISIBLE_DEVICES": uuid or "void",
    }


def devices_of(view: tuple[Path, ...]) -> list[Path]:
    """List the device nodes of a view."""
    return [path for path in view if path.is_relative_to("/dev")]
