"""A slot as plain data: which limits it has, and what it lets its jobs use.

`reader` reads it from slots.d; `derive` makes it from what the machine has. No file is read here, so every
process may import it.
"""

from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta, Struct


class IoNice(Struct, frozen=True):
    """The job's I/O priority as ionice(1) has it; `realtime` is not for strangers' jobs."""

    io_class: Literal["idle", "best-effort"] = msgspec.field(name="class")
    level: Annotated[int, Meta(ge=0, le=7)] = 4


class SlotSpec(Struct, frozen=True):
    """One slot: bytes, seconds, percent of one CPU; None is "not limited".

    The keys are those of slots.d (`reader.SlotKeys`), and `mems`: the NUMA nodes to take memory from, which
    follow from the machine. `cpus` is `units.AUTO` until `derive.lay_out` has chosen them.
    """

    name: str
    kind: Literal["cpu", "gpu"]
    gpu: str | int | None = None
    cpus: tuple[int, ...] | None = None
    cpu_max: int | None = None
    cpu_weight: int | None = None
    memory_max: int | None = None
    memory_high: int | None = None
    swap_max: int | None = None
    pids_max: int | None = None
    io_weight: int | None = None
    io_max: dict[str, dict[str, int]] = {}
    nice: int = 10
    ionice: IoNice | None = None
    rlimits: dict[str, int] = {}
    max_runtime_s: float | None = 86_400.0
    egress: Literal["none", "open"] = "none"
    runners: list[Literal["cli", "python"]] = msgspec.field(default_factory=lambda: ["cli", "python"])
    env: list[str] = []
    binds: list[Path] = []
    io_uring: bool = False
    mems: tuple[int, ...] | None = None
