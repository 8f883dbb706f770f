"""The resources that a running job uses and may use, read when the operator asks."""

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path

from msgspec import Struct

from aitbc_miner.cgroup.group import CgroupError, Group
from aitbc_miner.ipc.messages import SlotView
from aitbc_miner.jobs import JobUse
from aitbc_miner.store.reserve import MIB
from aitbc_miner.util import clock


class Said(Struct):
    """A worker's messages about its job: start and deadline (boot-time seconds), progress, disk use."""

    since: float
    until: float | None = None
    pct: float | None = None
    note: str = ""
    disk_bytes: int | None = None


def use_of(view: SlotView, said: Said, cpu_max: int | None, disk_max: int | None) -> JobUse:
    """Measure the resources that the job of a slot uses; `said` are the last messages of its worker.

    `cpu_max` is in percent of one CPU (None: the slot's CPUs), `disk_max` in bytes (None: no limit).
    """
    ran = max(0.001, clock.now() - said.since)
    cpu_s, memory = _read(view)
    return JobUse(
        for_s=ran,
        max_s=None if said.until is None else max(0.0, said.until - said.since),
        pct=said.pct,
        note=said.note,
        cpu_pct=None if cpu_s is None else cpu_s / ran * 100,
        cpu_max_pct=cpu_max or view.offer.cpu_threads * 100,
        memory_bytes=memory,
        memory_max_bytes=view.offer.memory_mb * MIB,
        disk_bytes=said.disk_bytes,
        disk_max_bytes=disk_max,
    )


def _read(view: SlotView) -> tuple[float | None, int | None]:
    """Read the job's CPU seconds and bytes of memory from its cgroup; None for an unknown value."""
    with contextlib.suppress(OSError, CgroupError):
        if view.cgroup is None:
            return None, _resident([view.job_pid]) if view.job_pid else None
        group = Group(Path(view.cgroup, "job"))
        usage, memory = group.cpu_usage(), group.memory_current()
        return usage.total_s if usage else None, _resident(group.pids()) if memory is None else memory
    return None, None


def _resident(pids: Iterable[int]) -> int:
    """Sum the resident memory of processes in bytes; shared pages count once for each process."""
    total = 0
    for pid in pids:
        with contextlib.suppress(OSError):
            total += int(Path(f"/proc/{pid}/statm").read_text("ascii").split()[1])
    return total * os.sysconf("SC_PAGE_SIZE")
