"""Measures the CPU, memory and GPU use of each slot, from its cgroup or its processes, and from NVML."""

import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TypeVar

import psutil
from msgspec import Struct

from aitbc_miner.cgroup.group import Group
from aitbc_miner.gpu.facts import GpuFact
from aitbc_miner.gpu.reader import GpuList, GpuReader, GpuUsage
from aitbc_miner.ipc.messages import Inventory, SlotView
from aitbc_miner.util import clock

T = TypeVar("T")


class Use(Struct, frozen=True):
    """The use of a slot's job: CPU in percent of one core (400: four cores), memory in bytes; None: unknown.

    Without a memory controller, `memory_bytes` is the sum of the processes' resident sets, and so counts
    shared memory several times.
    """

    cpu_pct: float | None = None
    memory_bytes: int | None = None


class _Reading(Struct, frozen=True):
    """The CPU seconds of a cgroup or process tree; with a new `counter`, counting restarted at zero."""

    counter: str
    cpu_s: float | None
    memory_bytes: int | None


class Sampler:
    """Turns CPU seconds into rates: each call covers the time since the previous call."""

    def __init__(self, now: Callable[[], float] = clock.now) -> None:
        self._now = now
        self._before: dict[str, tuple[float, _Reading]] = {}

    def sample(self, slots: Sequence[SlotView]) -> dict[str, Use]:
        """Give the use of each slot by its name. A slot's first sample has no CPU rate.

        If a process or group vanishes meanwhile, its values are None; the method raises nothing.
        """
        at = self._now()
        readings = {view.offer.name: (at, _read(view)) for view in slots}
        uses = {
            name: Use(_rate(self._before.get(name), at, reading), reading.memory_bytes)
            for name, (_, reading) in readings.items()
        }
        self._before = readings
        return uses


def _rate(before: tuple[float, _Reading] | None, at: float, reading: _Reading) -> float | None:
    if before is None or reading.cpu_s is None or at <= before[0]:
        return None
    # A new job came between the two samples, and its counter began at zero.
    same = before[1].counter == reading.counter
    base = (before[1].cpu_s or 0.0) if same else 0.0
    return round(max(0.0, reading.cpu_s - base) / (at - before[0]) * 100, 1)


def _read(view: SlotView) -> _Reading:
    if view.cgroup is not None:
        return _read_group(Path(view.cgroup, "job"))
    if view.job_pid is None:
        return _Reading("idle", 0.0, 0)
    try:
        root = psutil.Process(view.job_pid)
        processes = [root, *root.children(recursive=True)]
    except (psutil.Error, OSError):
        return _Reading(f"pid {view.job_pid}", None, None)
    memory_bytes = int(_total(lambda process: process.memory_info().rss, processes))
    return _Reading(f"pid {view.job_pid}", _total(_cpu_seconds, processes), memory_bytes)


def _read_group(path: Path) -> _Reading:
    group = Group(path)
    try:
        # The groups of successive jobs have the same name and differ only in their inode.
        counter = f"group {path.stat().st_ino}"
        usage, memory = group.cpu_usage(), group.memory_current()
        if memory is None:
            memory = int(_total(lambda pid: psutil.Process(pid).memory_info().rss, group.pids()))
    except OSError:
        # Between two jobs the group does not exist for a moment.
        return _Reading("gone", None, None)
    return _Reading(counter, usage.total_s if usage else None, memory)


def _cpu_seconds(process: psutil.Process) -> float:
    """Give the CPU time of a process and of its ended children, which the kernel adds to the parent's."""
    times = process.cpu_times()
    return float(times.user + times.system + times.children_user + times.children_system)


def _total(measure: Callable[[T], float], processes: Iterable[T]) -> float:
    """Sum a measure over processes; skip the processes that have ended."""
    total = 0.0
    for process in processes:
        with suppress(psutil.Error, OSError):
            total += measure(process)
    return total


class GpuWatch:
    """A thread that samples the GPUs by NVML, so that a hanging driver delays nobody.

    The thread replaces `found` and `uses` (by UUID) as a whole; other threads may read both at any time.
    """

    def __init__(self, reader: GpuReader, interval_s: float) -> None:
        self.found: GpuList = reader.list()
        self.uses: dict[str, GpuUsage] = {}
        self._reader = reader
        self._interval_s = interval_s
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="gpus", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread and NVML's child; wait three seconds at most for a hanging driver."""
        self._stopping.set()
        self._thread.join(3.0)
        if not self._thread.is_alive():
            self._reader.close()

    def _run(self) -> None:
        while not self.found.missing and not self._stopping.wait(self._interval_s):
            if self.found.error:
                # The driver may be loaded later; the reader spaces the attempts.
                self.found = self._reader.list()
            elif self.found.gpus:
                self.uses = {use.uuid: use for use in self._reader.usage()}

    def use_of(self, name: str | None) -> GpuUsage | None:
        """Give the use of a GPU (`name`: UUID or index) or MIG instance (UUID)."""
        uuid = next((gpu.uuid for gpu in self.found.gpus if name == str(gpu.index)), name)
        return self.uses.get(uuid or name or "")


def inventory(found: GpuList) -> Inventory:
    """Give the GPUs and MIG instances for slots, by UUID; a whole GPU also by its index.

    A machine without NVIDIA's library has no GPUs, and the inventory reports no error.
    """
    facts: list[GpuFact] = []
    for gpu in found.gpus:
        fact = partial(GpuFact, numa_node=gpu.numa_node, minor=gpu.minor, pci_bus_id=gpu.pci_bus_id)
        if gpu.mig_enabled:
            # With MIG, jobs run on the GPU's instances only.
            facts += [
                fact((part.uuid,), part.vram_mb or 0, capabilities=part.capabilities) for part in gpu.mig
            ]
        elif not gpu.error:
            ids = tuple(filter(None, (gpu.uuid, str(gpu.index))))
            facts.append(fact(ids, gpu.vram_mb or 0, unified=gpu.unified))
    errors = [None if found.missing else found.error, *(gpu.error for gpu in found.gpus)]
    errors += [f"GPU {gpu.index}: the driver gives no {', '.join(gpu.odd)}" for gpu in found.gpus if gpu.odd]
    return Inventory(facts, "; ".join(filter(None, errors)) or None)
