"""What each slot uses of processor, memory and GPU: told by its cgroup, else its processes, and by NVML."""

import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import psutil
from msgspec import Struct

from aitbc_miner.cgroup.group import Group
from aitbc_miner.gpu.facts import GpuFact
from aitbc_miner.gpu.reader import GpuList, GpuReader, GpuUsage
from aitbc_miner.ipc.messages import Inventory, SlotView
from aitbc_miner.util import clock


class Use(Struct, frozen=True):
    """What a slot's job uses: percent of one core (400: four cores) and bytes; None where it cannot be told.

    Without a memory controller the bytes are the sum of the processes' resident sets, in which memory that
    they share counts several times.
    """

    cpu_pct: float | None = None
    memory_bytes: int | None = None


class _Reading(Struct, frozen=True):
    """CPU seconds so far of one thing that counts them; `counter` differs when the counting began anew."""

    counter: str
    cpu_s: float | None
    memory_bytes: int | None


class Sampler:
    """Turns counters into rates: each call tells of the time since the one before."""

    def __init__(self, now: Callable[[], float] = clock.now) -> None:
        self._now = now
        self._before: dict[str, tuple[float, _Reading]] = {}

    def sample(self, slots: Sequence[SlotView]) -> dict[str, Use]:
        """Give the use of each slot by its name. A slot's first sample has no CPU rate yet.

        Processes and groups may vanish meanwhile; what cannot be read is None, and nothing is raised.
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
    # Another counter began at zero somewhere between the two samples: a new job has come.
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
    return _Reading(f"pid {view.job_pid}", _cpu_seconds(processes), _resident_bytes(processes))


def _read_group(path: Path) -> _Reading:
    group = Group(path)
    try:
        # Each job has a group of its own by the same name; only the inode tells them apart.
        counter = f"group {path.stat().st_ino}"
        usage, memory = group.cpu_usage(), group.memory_current()
        if memory is None:
            memory = _resident_bytes(_existing(group.pids()))
    except OSError:
        # Between two jobs the group is away for a moment.
        return _Reading("gone", None, None)
    return _Reading(counter, usage.total_s if usage else None, memory)


def _existing(pids: Iterable[int]) -> Iterable[psutil.Process]:
    for pid in pids:
        try:
            yield psutil.Process(pid)
        except (psutil.Error, OSError):
            continue


def _cpu_seconds(processes: Iterable[psutil.Process]) -> float:
    """Sum the CPU time of the processes and of their ended children, for which the parents account."""
    total = 0.0
    for process in processes:
        try:
            times = process.cpu_times()
        except (psutil.Error, OSError):
            continue
        total += times.user + times.system + times.children_user + times.children_system
    return total


def _resident_bytes(processes: Iterable[psutil.Process]) -> int:
    total = 0
    for process in processes:
        try:
            total += process.memory_info().rss
        except (psutil.Error, OSError):
            continue
    return total


class GpuWatch:
    """Keeps asking NVML from a thread of its own, so that a driver that hangs delays nobody.

    `found` and `uses` (by UUID) are replaced whole and may be read at any time.
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
        """End the thread and NVML's child; a hanging driver is waited for a moment only."""
        self._stopping.set()
        self._thread.join(3.0)
        if not self._thread.is_alive():
            self._reader.close()

    def _run(self) -> None:
        while not self.found.missing and not self._stopping.wait(self._interval_s):
            if self.found.error:
                # The driver may be loaded late; the reader paces the attempts.
                self.found = self._reader.list()
            elif self.found.gpus:
                self.uses = {use.uuid: use for use in self._reader.usage()}

    def use_of(self, name: str | None) -> GpuUsage | None:
        """Give the use of a GPU or MIG instance by its UUID, or of a GPU by its index."""
        uuid = next((gpu.uuid for gpu in self.found.gpus if name == str(gpu.index)), name)
        return self.uses.get(uuid or name or "")


def inventory(found: GpuList) -> Inventory:
    """Say which GPUs and MIG instances a slot can be given, by UUID and, for whole GPUs, index.

    A machine without NVIDIA's library has none, and that is no error.
    """
    facts = []
    for gpu in found.gpus:
        if gpu.mig_enabled:
            # The GPU itself runs nothing then, only its instances do.
            facts += [
                GpuFact(
                    (part.uuid,),
                    part.vram_mb or 0,
                    gpu.numa_node,
                    gpu.minor,
                    part.capabilities,
                    pci_bus_id=gpu.pci_bus_id,
                )
                for part in gpu.mig
            ]
        elif not gpu.error:
            ids = tuple(filter(None, (gpu.uuid, str(gpu.index))))
            facts.append(
                GpuFact(
                    ids,
                    gpu.vram_mb or 0,
                    gpu.numa_node,
                    gpu.minor,
                    unified=gpu.unified,
                    pci_bus_id=gpu.pci_bus_id,
                )
            )
    errors = [None if found.missing else found.error, *(gpu.error for gpu in found.gpus)]
    errors += [f"GPU {gpu.index} does not tell its {', '.join(gpu.odd)}" for gpu in found.gpus if gpu.odd]
    return Inventory(facts, "; ".join(filter(None, errors)) or None)
