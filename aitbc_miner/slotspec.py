"""What the operator wants each slot to be: slots.d read and checked, or a layout derived from the machine."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import yaml
from msgspec import Meta, Struct

from aitbc_miner.util.units import CpuList, Percent, Size, format_cpus, format_size, parse_size
from aitbc_miner.util.yamldoc import BadField, Fault, Parse, read_document
from aitbc_miner.util.yamltext import line_of

MIB = 1 << 20
_RATES = ("rbps", "wbps", "riops", "wiops")
_RLIMITS = ("as", "core", "cpu", "data", "fsize", "memlock", "msgqueue", "nofile", "nproc", "stack")


def _parse_memory(value: object) -> int:
    size = parse_size(value)
    if size < MIB:
        raise ValueError("must be at least 1M; add a unit, such as 16G")
    return size


def _one_of(names: Sequence[str]) -> Parse:
    def parse(value: object) -> object:
        if value not in names:
            raise ValueError(f"must be one of {', '.join(names)}")
        return value

    return Parse(parse)


Memory = Annotated[int, Parse(_parse_memory)]
Weight = Annotated[int, Meta(ge=1, le=10_000)]
# Not `$`, which would also accept a line break at the end.
SlotName = Annotated[
    str,
    Meta(
        pattern=r"^[a-z0-9][a-z0-9_-]{0,31}\Z",
        description="1 to 32 of a-z 0-9 _ -, not beginning with _ or -",
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


class IoNice(Struct, frozen=True):
    """The job's I/O priority as ionice(1) has it; `realtime` is not for strangers' jobs."""

    io_class: Literal["idle", "best-effort"] = msgspec.field(name="class")
    level: Annotated[int, Meta(ge=0, le=7)] = 4


class SlotSpec(Struct, frozen=True):
    """One slot as slots.d describes it: bytes, seconds, percent of one CPU; None is "not limited"."""

    name: SlotName
    kind: Literal["cpu", "gpu"]
    gpu: GpuName | Annotated[int, Meta(ge=0, le=255)] | None = None
    cpus: CpuList | None = None
    cpu_max: Percent | None = None
    cpu_weight: Weight | None = None
    memory_max: Memory | None = None
    memory_high: Memory | None = None
    swap_max: Size | None = None
    pids_max: Annotated[int, Meta(ge=1, le=4_194_304)] | None = None
    io_weight: Weight | None = None
    io_max: dict[str, dict[Annotated[str, _one_of(_RATES)], Size]] = {}
    nice: Annotated[int, Meta(ge=-20, le=19)] = 10
    ionice: IoNice | None = None
    rlimits: dict[Annotated[str, _one_of(_RLIMITS)], Size] = {}
    max_runtime_s: Annotated[float, Meta(gt=0, le=31_536_000)] | None = 86_400.0
    egress: SlotName = "none"
    runners: Annotated[list[Literal["cli", "python"]], Meta(min_length=1)] = msgspec.field(
        default_factory=lambda: ["cli", "python"]
    )
    env: list[EnvName] = []

    def __post_init__(self) -> None:
        if self.kind == "gpu" and self.gpu is None:
            raise BadField("gpu", "this key is missing; a slot of kind gpu needs a UUID or an index")
        if self.kind == "cpu" and self.gpu is not None:
            raise BadField("gpu", "a slot of kind cpu has no GPU; remove this key or use kind: gpu")
        if self.memory_high and self.memory_max and self.memory_high > self.memory_max:
            shown = f"{format_size(self.memory_high)} is above memory_max ({format_size(self.memory_max)})"
            raise BadField("memory_high", f"{shown}; it must not be, or the job dies before it is slowed")
        for path in self.io_max:
            if not path.startswith("/"):
                raise BadField("io_max", f"{path[:80]!r} is no absolute path; name a directory on the disk")


class SlotFile(Struct, frozen=True):
    """The content of one file of slots.d."""

    slots: list[SlotSpec]


class MachineFacts(Struct, frozen=True):
    """What slots can be made of; each GPU by all the names it has (index, UUID) as text."""

    cpus: tuple[int, ...]
    memory_bytes: int
    gpu_ids: list[tuple[str, ...]] = []


def read_slots(directory: Path, faults: list[Fault]) -> list[SlotSpec]:
    """Read all of slots.d and append what is wrong to `faults`. Without the directory there are none."""
    places: dict[str, Path] = {}
    specs: list[SlotSpec] = []
    for path, file in _read_files(directory, faults):
        for index, spec in enumerate(file.slots):
            if spec.name in places:
                line = line_of(path, ["slots", index, "name"])
                message = (
                    f"{spec.name!r} is also the name of a slot in {places[spec.name]}; rename one of them"
                )
                faults.append(Fault(str(path), line, f"slots[{index}].name", message))
                continue
            places[spec.name] = path
            specs.append(spec)
    return specs


def _read_files(directory: Path, faults: list[Fault]) -> Iterator[tuple[Path, SlotFile]]:
    try:
        paths = sorted(path for path in directory.iterdir() if path.suffix == ".yaml")
    except FileNotFoundError:
        return
    except OSError as error:
        faults.append(Fault(str(directory), None, "", f"cannot read this directory: {error.strerror}"))
        return
    for path in paths:
        if file := read_document(path, SlotFile, faults):
            yield path, file


def check_slots(
    specs: Sequence[SlotSpec], machine: MachineFacts, directory: Path | None = None
) -> tuple[list[Fault], list[str]]:
    """Compare slots with the machine they are to run on.

    Args:
        specs: all slots of the node.
        machine: what there is.
        directory: slots.d, if that is where the slots are from, so that the faults name file and line.

    Returns:
        What is impossible, and warnings about what is possible but probably not meant.
    """
    faults: list[Fault] = []
    for spec in specs:
        if missing := set(spec.cpus or ()) - set(machine.cpus):
            here = f"this machine has {format_cpus(machine.cpus)}"
            faults.append(_fault(directory, spec, "cpus", f"there is no CPU {format_cpus(missing)}; {here}"))
    _check_gpus(specs, machine, directory, faults)
    total = sum(spec.memory_max or 0 for spec in specs)
    if total > machine.memory_bytes:
        most = max(specs, key=lambda spec: spec.memory_max or 0)
        message = (
            f"the slots together may use {total // MIB}M, but this machine has {machine.memory_bytes // MIB}M"
        )
        faults.append(_fault(directory, most, "memory_max", f"{message}; lower memory_max"))
    return faults, list(_shared_cpus(specs))


def _check_gpus(
    specs: Sequence[SlotSpec], machine: MachineFacts, directory: Path | None, faults: list[Fault]
) -> None:
    users: dict[tuple[str, ...], str] = {}
    for spec in specs:
        if spec.gpu is None:
            continue
        ids = next((ids for ids in machine.gpu_ids if str(spec.gpu) in ids), None)
        if ids is None:
            here = ", ".join(" or ".join(ids) for ids in machine.gpu_ids) or "none"
            faults.append(
                _fault(directory, spec, "gpu", f"there is no GPU {spec.gpu}; this machine has {here}")
            )
        elif ids in users:
            message = f"GPU {spec.gpu} is already that of slot {users[ids]}; each GPU can have one slot"
            faults.append(_fault(directory, spec, "gpu", message))
        else:
            users[ids] = spec.name


def _shared_cpus(specs: Sequence[SlotSpec]) -> Iterator[str]:
    sharers: dict[int, list[str]] = defaultdict(list)
    for spec in specs:
        for cpu in spec.cpus or ():
            sharers[cpu].append(spec.name)
    together: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for cpu, names in sorted(sharers.items()):
        if len(names) > 1:
            together[tuple(names)].append(cpu)
    for slots, cpus in together.items():
        yield f"slots {', '.join(slots)} share the CPUs {format_cpus(cpus)}; their jobs slow each other down"


def _fault(directory: Path | None, spec: SlotSpec, field: str, message: str) -> Fault:
    for path, file in _read_files(directory, []) if directory else ():
        for index, other in enumerate(file.slots):
            if other.name == spec.name:
                line = line_of(path, ["slots", index, field])
                return Fault(str(path), line, f"slots[{index}].{field}", message)
    return Fault(f"slot {spec.name}", None, field, message)


def derive_slots(facts: MachineFacts) -> list[SlotSpec]:
    """Lay out the machine: a slot for each GPU with its share of the CPUs, about one for each 4 CPUs left.

    A share is an equal part of the CPUs, one part being kept for CPU slots. 80 % of the memory is divided
    equally; the rest is for the system and this program.
    """
    cpus, gpus = list(facts.cpus), len(facts.gpu_ids)
    share = max(1, len(cpus) // (gpus + 1))
    groups = [cpus[i * share : (i + 1) * share] or [cpus[i % len(cpus)]] for i in range(gpus)]
    rest = cpus[gpus * share :]
    # Two small slots keep a small machine busier than one: a job rarely uses all that it is given.
    count = max(min(len(rest), 2), len(rest) // 4)
    bounds = [len(rest) * i // count for i in range(count + 1)] if count else [0]
    groups += [rest[low:high] for low, high in pairwise(bounds)]
    memory = facts.memory_bytes * 8 // 10 // len(groups) // MIB * MIB
    return [
        SlotSpec(
            name=f"gpu{i}" if i < gpus else f"cpu{i - gpus}",
            kind="gpu" if i < gpus else "cpu",
            gpu=_best_id(facts.gpu_ids[i]) if i < gpus else None,
            cpus=tuple(group),
            memory_max=max(MIB, memory),
            pids_max=1024,
        )
        for i, group in enumerate(groups)
    ]


def _best_id(ids: tuple[str, ...]) -> str:
    # Indices change when a card is added or its driver fails; a UUID stays.
    return next((name for name in ids if not name.isdecimal()), ids[0])


def to_yaml(specs: Sequence[SlotSpec]) -> str:
    """Write slots as a file for slots.d that reads back as the same; what is at its default is left out."""
    return yaml.safe_dump({"slots": [_plain(spec) for spec in specs]}, sort_keys=False, allow_unicode=True)


def _plain(spec: SlotSpec) -> dict[str, Any]:
    defaults = SlotSpec(name="", kind="cpu")
    plain = {
        name: value
        for name, value in msgspec.to_builtins(spec).items()
        if name in {"name", "kind"} or value != getattr(defaults, name)
    }
    if spec.cpus is not None:
        plain["cpus"] = format_cpus(spec.cpus)
    if spec.cpu_max is not None:
        plain["cpu_max"] = f"{spec.cpu_max}%"
    for name in plain.keys() & {"memory_max", "memory_high", "swap_max"}:
        plain[name] = format_size(plain[name]) if plain[name] else 0
    return plain
