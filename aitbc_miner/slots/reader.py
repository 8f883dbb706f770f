"""Reads, checks and writes the files of slots.d."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import msgspec
import yaml
from msgspec import Meta, Struct

from aitbc_miner.config.document import BadField, Fault, Parse, read_document
from aitbc_miner.config.dropins import drop_ins
from aitbc_miner.config.settings import SLOTS_DIR
from aitbc_miner.config.units import CpuList, MemorySize, Percent, Size, format_cpus, format_size
from aitbc_miner.config.yaml_text import line_of
from aitbc_miner.probe.topology import MachineFacts
from aitbc_miner.slots.fit import misfits, shared_cpus
from aitbc_miner.slots.spec import IO_RATES, IoNice, SlotSpec
from aitbc_miner.util.trust import parse_bind

_BYTES = ("swap_max", "rbps", "wbps", "as", "core", "data", "fsize", "memlock", "msgqueue", "stack")
"""The rates and limits in bytes; all others are counts or seconds."""
_LEAST_BYTES = 64 << 10
_RLIMITS = ("as", "core", "cpu", "data", "fsize", "memlock", "msgqueue", "nofile", "nproc", "stack")


def _one_of(names: Sequence[str]) -> Parse:
    def parse(value: object) -> object:
        if value not in names:
            raise ValueError(f"must be one of {', '.join(names)}")
        return value

    return Parse(parse)


Weight = Annotated[int, Meta(ge=1, le=10_000)]
# `\Z`, because `$` would accept a line break at the end. At most 22 letters, because the slot's user is
# aitbc-job-<slot>, and a user's name has at most 32.
SlotName = Annotated[
    str,
    Meta(
        pattern=r"^[a-z0-9][a-z0-9_-]{0,21}\Z",
        description="1 to 22 of a-z 0-9 _ -, not beginning with _ or -",
    ),
]
EnvName = Annotated[
    str,
    Meta(
        pattern=r"^[A-Za-z_][A-Za-z0-9_]{0,254}\Z",
        description="the name of a variable, such as OMP_NUM_THREADS",
    ),
]
GpuName = Annotated[
    str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:/-]{0,127}\Z", description="the UUID of a GPU")
]
Bind = Annotated[Path, Parse(parse_bind)]


class SlotKeys(Struct, frozen=True):
    """A slot in slots.d. Units: bytes, seconds, percent of a CPU; None means "not limited".

    Keys and defaults are those of `SlotSpec`; the types accept the notation of people, such as "16G".
    """

    name: SlotName
    kind: Literal["cpu", "gpu"]
    gpu: GpuName | Annotated[int, Meta(ge=0, le=255)] | None = None
    cpus: CpuList | None = None
    cpu_max: Percent | None = None
    cpu_weight: Weight | None = None
    memory_max: MemorySize | None = None
    memory_high: MemorySize | None = None
    swap_max: Size | None = None
    pids_max: Annotated[int, Meta(ge=1, le=4_194_304)] | None = None
    io_weight: Weight | None = None
    io_max: dict[str, dict[Annotated[str, _one_of(IO_RATES)], Size]] = {}
    nice: Annotated[int, Meta(ge=-20, le=19)] = 10
    ionice: IoNice | None = None
    rlimits: dict[Annotated[str, _one_of(_RLIMITS)], Size] = {}
    max_runtime_s: Annotated[float, Meta(gt=0, le=31_536_000)] | None = 86_400.0
    egress: Literal["none", "open"] = "none"
    runners: Annotated[list[Literal["cli", "python"]], Meta(min_length=1)] = msgspec.field(
        default_factory=lambda: ["cli", "python"]
    )
    env: list[EnvName] = []
    binds: list[Bind] = []
    io_uring: bool = False

    def __post_init__(self) -> None:
        if self.kind == "gpu" and self.gpu is None:
            raise BadField("gpu", "this key is missing; a slot of kind gpu needs a UUID or an index")
        if self.kind == "cpu" and self.gpu is not None:
            raise BadField("gpu", "a slot of kind cpu has no GPU; remove the key or use kind: gpu")
        if self.memory_high and self.memory_max and self.memory_high > self.memory_max:
            shown = f"{format_size(self.memory_high)} is above memory_max ({format_size(self.memory_max)})"
            raise BadField("memory_high", f"{shown}, so the kernel kills before slowing; lower memory_high")
        for path in self.io_max:
            if not path.startswith("/"):
                raise BadField("io_max", f"{path[:80]!r} is no absolute path; name a directory on the disk")

    def plain(self) -> SlotSpec:
        """Give the slot as plain data."""
        return SlotSpec(**msgspec.structs.asdict(self) | {"binds": list(map(str, self.binds))})


_SIZES = frozenset(
    name
    for name, kind in get_type_hints(SlotKeys, include_extras=True).items()
    if get_origin(kind) is not dict and {MemorySize, Size} & set(get_args(kind))
)
"""The keys that people write as sizes."""


class SlotFile(Struct, frozen=True):
    """The content of a file in slots.d: slots, or `derive: true` to have the node derive the slots."""

    slots: list[SlotKeys] = []
    derive: bool = False

    def __post_init__(self) -> None:
        if self.derive and self.slots:
            raise BadField("derive", "is true, but the file has `slots`; remove `derive` or `slots`")
        if not (self.derive or self.slots):
            raise BadField("slots", f"the file has no slot; describe a slot, or {DERIVE}")


DERIVE = "write `derive: true` instead of `slots` to have all of the machine rented out"


def read_slots(directory: Path, faults: list[Fault], warnings: list[Fault] | None = None) -> list[SlotSpec]:
    """Read all of slots.d and append its faults to `faults`.

    No slots and no faults: the node derives its slots. A file asks for derived slots with `derive: true`, and
    so does a default directory that is missing or empty.
    """
    places: dict[str, Path] = {}
    specs: list[SlotSpec] = []
    derived: list[Path] = []
    for path, file in _read_files(directory, faults, warnings):
        derived += [path] if file.derive else []
        for index, spec in enumerate(file.slots):
            if spec.name in places:
                other = f"is also the name of a slot in {places[spec.name]}; rename one of the slots"
                faults.append(_at(path, index, ["name"], f"{spec.name!r} {other}"))
                continue
            places[spec.name] = path
            for steps, message in _without_unit(spec):
                faults.append(_at(path, index, steps, message))
            specs.append(spec.plain())
    for path in derived if specs else ():
        message = f"is true, but {next(iter(places.values()))} has slots; remove `derive` or the slots"
        faults.append(Fault(str(path), line_of(path, ["derive"]), "derive", message))
    return specs


def _without_unit(spec: SlotKeys) -> Iterator[tuple[list[str], str]]:
    """Yield path and remedy of each size that lacks its unit: nobody means so few bytes."""
    sizes = [(["swap_max"], spec.swap_max or 0)]
    sizes += [(["rlimits", name], n) for name, n in spec.rlimits.items()]
    sizes += [(["io_max", path, name], n) for path, rates in spec.io_max.items() for name, n in rates.items()]
    for steps, size in sizes:
        if steps[-1] in _BYTES and 0 < size < _LEAST_BYTES:
            yield steps, f"is {size} bytes; must be 0, or at least 64K: did you mean {size}G or {size}M?"


def _read_files(
    directory: Path, faults: list[Fault], warnings: list[Fault] | None = None
) -> Iterator[tuple[Path, SlotFile]]:
    before = len(faults)
    found = drop_ins(directory, faults)
    if found and warnings is not None:
        warnings += found.warnings()
    if not (found and found.files) and len(faults) == before:
        missing = "the directory does not exist" if found is None else "no file here ends in .yaml"
        if directory != SLOTS_DIR or not (found is None or found.empty):
            remedy = "add a *.yaml file with slots, or with `derive: true` to rent out all of the machine"
            if found and found.strange:
                missing += f", only {', '.join(path.name for path in found.strange)}"
                remedy = f"rename a file to *.yaml, or {remedy}"
            faults.append(Fault(str(directory), None, "", f"{missing}, so the node has no slot; {remedy}"))
    for path in found.files if found else ():
        if file := read_document(path, SlotFile, faults):
            yield path, file


def check_slots(
    specs: Sequence[SlotSpec], machine: MachineFacts, directory: Path | None = None
) -> tuple[list[Fault], list[str]]:
    """Compare slots with the machine; if the slots come from slots.d, `directory` is its path.

    Returns:
        Faults of slots that cannot run, and warnings about slots that can, but are probably not meant so.
    """
    faults: list[Fault] = []
    warnings: list[str] = []
    for misfit in misfits(specs, machine):
        fault = fault_at(directory, misfit.slot, misfit.key, misfit.message)
        if misfit.possible:
            warnings.append(str(fault))
        else:
            faults.append(fault)
    return faults, [*warnings, *shared_cpus(specs)]


def fault_at(directory: Path | None, slot: str, steps: Sequence[str], message: str) -> Fault:
    """Make the fault of a slot's key, with file and line if the slot comes from slots.d."""
    for path, file in _read_files(directory, []) if directory else ():
        for index, other in enumerate(file.slots):
            if other.name == slot:
                return _at(path, index, steps, message)
    return Fault(f"slot {slot}", None, _key(steps), message)


def _at(path: Path, index: int, steps: Sequence[str], message: str) -> Fault:
    line = line_of(path, ["slots", index, *steps])
    return Fault(str(path), line, f"slots[{index}].{_key(steps)}", message)


def _key(steps: Sequence[str]) -> str:
    return steps[0] + "".join(f".{step}" if step.isidentifier() else f"[{step!r}]" for step in steps[1:])


def to_yaml(specs: Sequence[SlotSpec]) -> str:
    """Write slots as a file for slots.d, without default values; reading the file gives equal slots."""
    return yaml.safe_dump({"slots": [_plain(spec) for spec in specs]}, sort_keys=False, allow_unicode=True)


def _plain(spec: SlotSpec) -> dict[str, Any]:
    defaults = SlotSpec(name="", kind="cpu")
    plain = {
        name: value
        for name, value in msgspec.to_builtins(spec).items()
        if name in {"name", "kind"} or (name != "mems" and value != getattr(defaults, name))
    }
    if spec.cpus is not None:
        plain["cpus"] = format_cpus(spec.cpus) or "auto"
    if spec.cpu_max is not None:
        plain["cpu_max"] = f"{spec.cpu_max}%"
    for name in plain.keys() & _SIZES:
        plain[name] = format_size(plain[name]) if plain[name] else 0
    return plain
