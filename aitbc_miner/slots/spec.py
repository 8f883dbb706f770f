"""A slot as plain data: its limits, and the resources that its jobs may use.

`reader` reads slots from slots.d; `derive` makes slots from the machine. This module reads no file, so every
process may import it.
"""

from typing import Annotated, Literal

import msgspec
from msgspec import Meta, Struct

MIB = 1 << 20
IO_RATES = ("rbps", "wbps", "riops", "wiops")
"""The rates of a disk that a slot may limit; the names are those of io.max."""


class IoNice(Struct, frozen=True):
    """The job's I/O priority as in ionice(1). A stranger's job must not have the class `realtime`."""

    io_class: Literal["idle", "best-effort"] = msgspec.field(name="class")
    level: Annotated[int, Meta(ge=0, le=7)] = 4


class SlotSpec(Struct, frozen=True):
    """A slot. Units: bytes, seconds, percent of a CPU; None means "not limited".

    The keys are the keys of slots.d (`reader.SlotKeys`), and `mems`: the NUMA nodes for the slot's memory,
    chosen by `derive`. `cpus` is `units.AUTO` until `derive.lay_out` chooses the CPUs.
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
    binds: list[str] = []
    io_uring: bool = False
    mems: tuple[int, ...] | None = None
