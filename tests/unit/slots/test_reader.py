"""slots.d: reading, comparing with the machine, and the derived layout."""

import os
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from aitbc_miner.config.document import Fault, decode_text
from aitbc_miner.config.settings import load_config
from aitbc_miner.config.units import AUTO
from aitbc_miner.gpu.reader import GpuList
from aitbc_miner.preflight.check import Checker
from aitbc_miner.probe.topology import MachineFacts, NumaNode
from aitbc_miner.slots.derive import derive_slots, lay_out
from aitbc_miner.slots.reader import SlotFile, SlotKeys, check_slots, read_slots, to_yaml
from aitbc_miner.slots.spec import IoNice, SlotSpec

G = 1 << 30
SAMPLE = Path(__file__).parents[3] / "etc" / "slots.d" / "slots.yaml.sample"


def read(text: str) -> tuple[list[SlotSpec] | None, list[str]]:
    faults: list[Fault] = []
    file = decode_text(text, SlotFile, faults, file="s.yaml")
    specs = [keys.plain() for keys in file.slots] if file else None
    return specs, [str(fault).removeprefix("s.yaml") for fault in faults]


def one(**keys: Any) -> tuple[list[SlotSpec] | None, list[str]]:
    return read(msgspec.yaml.encode({"slots": [{"name": "a", "kind": "cpu"} | keys]}).decode())


def test_the_sample_shows_every_key() -> None:
    specs, faults = read(SAMPLE.read_text())
    assert faults == []
    assert specs == [
        SlotSpec(
            name="cpu0",
            kind="cpu",
            cpus=(0, 1, 2, 3),
            cpu_max=400,
            cpu_weight=100,
            memory_max=16 * G,
            memory_high=14 * G,
            swap_max=0,
            pids_max=1024,
            io_weight=50,
            io_max={"/var/lib/aitbc": {"rbps": 400 << 20, "wbps": 200 << 20, "riops": 8000, "wiops": 4000}},
            nice=10,
            ionice=IoNice("best-effort", 6),
            rlimits={"nofile": 4096, "fsize": 20 * G, "core": 0},
            max_runtime_s=7200.0,
        )
    ]
    for field in msgspec.structs.fields(SlotKeys):
        assert f" {field.name}:" in SAMPLE.read_text()


def test_bytes_without_their_unit_are_refused_with_what_was_meant(tmp_path: Path) -> None:
    limits = "swap_max: 2, rlimits: {fsize: 20480, nofile: 64, core: 0}, io_max: {/: {wbps: 200, wiops: 200}}"
    (tmp_path / "a.yaml").write_text(f"slots:\n- {{name: a, kind: cpu, {limits}}}\n")
    faults: list[Fault] = []
    read_slots(tmp_path, faults)
    assert [str(fault).removeprefix(f"{tmp_path}/a.yaml:2: slots[0].") for fault in faults] == [
        f"{key}: is {size} bytes; must be 0, or at least 64K: did you mean {size}G or {size}M?"
        for key, size in (("swap_max", 2), ("rlimits.fsize", 20480), ("io_max['/'].wbps", 200))
    ]


def test_defaults() -> None:
    specs, faults = one()
    assert faults == []
    assert specs == [SlotSpec(name="a", kind="cpu")]
    assert (specs[0].nice, specs[0].max_runtime_s, specs[0].egress) == (10, 86_400, "none")
    assert (specs[0].runners, specs[0].env) == (["cli", "python"], [])


@pytest.mark.parametrize(
    ("keys", "fault"),
    [
        ({"name": "Upper"}, "name: is 'Upper'; must be 1 to 22 of a-z 0-9 _ -, not beginning with _ or -"),
        ({"name": ".."}, "name: is '..'; must be 1 to 22 of a-z 0-9 _ -, not beginning with _ or -"),
        ({"name": "a\n"}, "name: is 'a\\n'; must be 1 to 22 of a-z 0-9 _ -, not beginning with _ or -"),
        ({"kind": "tpu"}, "kind: is 'tpu'; must be one of cpu, gpu"),
        ({"kind": "gpu"}, "gpu: this key is missing; a slot of kind gpu needs a UUID or an index"),
        ({"gpu": 0}, "gpu: a slot of kind cpu has no GPU; remove the key or use kind: gpu"),
        (
            {"cpus": "3-1"},
            (
                "cpus: is '3-1'; must be a list of CPU numbers up to 9999 and ranges of them, such as "
                '"0-3,5"; or auto, so that the node chooses'
            ),
        ),
        (
            {"cpu_max": 4},
            "cpu_max: is 4; must be a percentage of one CPU from 1%, such as 400% for four CPUs",
        ),
        (
            {"cpu_weight": 0},
            "cpu_weight: is 0; must be a whole number of at least 1 and at most 10000 or null",
        ),
        ({"memory_max": 16}, "memory_max: is 16; must be at least 1M; add a unit: did you mean 16G or 16M?"),
        (
            {"memory_max": "1G", "memory_high": "2G"},
            "memory_high: 2G is above memory_max (1G), so the kernel kills before slowing; lower memory_high",
        ),
        ({"pids_max": 0}, "pids_max: is 0; must be a whole number of at least 1 and at most 4194304 or null"),
        (
            {"io_max": {"/x": {"bps": 1}}},
            "io_max['/x'].bps: is 'bps'; must be one of rbps, wbps, riops, wiops",
        ),
        ({"io_max": {"x": {}}}, "io_max: 'x' is no absolute path; name a directory on the disk"),
        ({"nice": 20}, "nice: is 20; must be a whole number of at least -20 and at most 19"),
        ({"ionice": {"class": "realtime"}}, "ionice.class: is 'realtime'; must be one of idle, best-effort"),
        (
            {"ionice": {"class": "idle", "level": 8}},
            "ionice.level: is 8; must be a whole number of at least 0 and at most 7",
        ),
        (
            {"rlimits": {"no_file": 1}},
            (
                "rlimits.no_file: is 'no_file'; "
                "must be one of as, core, cpu, data, fsize, memlock, msgqueue, nofile, nproc, stack"
            ),
        ),
        ({"max_runtime_s": 0}, "max_runtime_s: is 0; must be a number above 0 and at most 31536000 or null"),
        ({"runners": []}, "runners: has 0 entries; must be of length at least 1"),
        ({"runners": ["docker"]}, "runners[0]: is 'docker'; must be one of cli, python"),
        ({"env": ["A=B"]}, "env[0]: is 'A=B'; must be the name of a variable, such as OMP_NUM_THREADS"),
        ({"memory": "1G"}, "memory: unknown key; did you mean memory_max?"),
    ],
)
def test_bad_slots(keys: dict[str, Any], fault: str) -> None:
    specs, faults = one(**keys)
    assert specs is None
    assert [shown.split(": slots[0].")[1] for shown in faults] == [fault]


def test_memory_nodes_are_no_key() -> None:
    specs, faults = one(mems=0)
    assert specs is None
    assert "mems: unknown key" in faults[0]


def test_a_directory(tmp_path: Path) -> None:
    (tmp_path / "b.yaml").write_text("slots: [{name: two, kind: cpu}]")
    (tmp_path / "a.yaml").write_text("slots: [{name: one, kind: cpu}]")
    (tmp_path / "c.yaml.sample").write_text("not: read")
    faults: list[Fault] = []
    assert [spec.name for spec in read_slots(tmp_path, faults)] == ["one", "two"]
    assert faults == []


def test_every_fault_of_a_directory(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("slots:\n- {name: one, kind: cpu}\n- {name: one, kind: cpu}\n")
    (tmp_path / "b.yaml").write_text("slots:\n- {name: x, kind: y}\n")
    (tmp_path / "c.yaml").write_text("slots:\n- kind: cpu\n  name: one\n")
    faults: list[Fault] = []
    assert [spec.name for spec in read_slots(tmp_path, faults)] == ["one"]
    also = f"'one' is also the name of a slot in {tmp_path}/a.yaml; rename one of the slots"
    assert list(map(str, faults)) == [
        f"{tmp_path}/a.yaml:3: slots[1].name: {also}",
        f"{tmp_path}/b.yaml:2: slots[0].kind: is 'y'; must be one of cpu, gpu",
        f"{tmp_path}/c.yaml:3: slots[0].name: {also}",
    ]


@pytest.mark.parametrize(
    ("files", "fault"),
    [
        (None, "the directory does not exist, so the node has no slot"),
        ({}, "no file here ends in .yaml, so the node has no slot"),
        (
            {"slots.yml": "slots: [{name: a, kind: cpu}]"},
            "no file here ends in .yaml, only slots.yml, so the node has no slot; rename a file to *.yaml",
        ),
        ({"s.yaml~": "", ".s.yaml.swp": "", "s.yaml.sample": ""}, "no file here ends in .yaml"),
        (
            {"s.yaml": "slots: []"},
            "s.yaml:1: slots: the file has no slot; describe a slot, or write `derive: true`",
        ),
        ({"s.yaml": ""}, "s.yaml:1: slots: the file has no slot"),
        (
            {"s.yaml": "derive: true\nslots: [{name: a, kind: cpu}]"},
            "s.yaml:1: derive: is true, but the file has `slots`",
        ),
        (
            {"a.yaml": "slots: [{name: a, kind: cpu}]", "b.yaml": "derive: true"},
            "b.yaml:1: derive: is true, but ",
        ),
        (
            {"s.yaml": "slots: [{name: a, kind: cpu, egress: lan}]"},
            "egress: is 'lan'; must be one of none, open",
        ),
    ],
)
def test_no_machine_is_rented_out_by_mistake(
    tmp_path: Path, files: dict[str, str] | None, fault: str
) -> None:
    directory = tmp_path / "slots.d"
    for name, text in (files or {}).items():
        directory.mkdir(exist_ok=True)
        (directory / name).write_text(text)
    if files == {}:
        directory.mkdir()
    faults: list[Fault] = []
    read_slots(directory, faults)
    assert [fault in str(found) for found in faults] == [True], faults


def test_the_machine_is_derived_where_nothing_was_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aitbc_miner.slots.reader.SLOTS_DIR", tmp_path / "slots.d")
    faults: list[Fault] = []
    assert read_slots(tmp_path / "slots.d", faults) == []
    (tmp_path / "slots.d").mkdir()
    (tmp_path / "slots.d" / "slots.yaml.sample").write_text("not: read")
    assert read_slots(tmp_path / "slots.d", faults) == []
    assert faults == []
    (tmp_path / "slots.d" / "slots.yaml.off").write_text("slots: [{name: a, kind: cpu}]")
    assert read_slots(tmp_path / "slots.d", faults) == []
    assert len(faults) == 1


def test_a_file_where_a_directory_should_be(tmp_path: Path) -> None:
    faults: list[Fault] = []
    (tmp_path / "file").touch()
    assert read_slots(tmp_path / "file", faults) == []
    assert list(map(str, faults)) == [f"{tmp_path}/file: cannot read this directory: Not a directory"]


MACHINE = MachineFacts(cpus=(0, 1, 2, 3), memory_bytes=16 * G, gpu_ids=[("0", "GPU-a"), ("1", "GPU-b")])


def test_slots_that_fit_the_machine() -> None:
    specs = [
        SlotSpec(name="g", kind="gpu", gpu="GPU-a", cpus=(0, 1), memory_max=8 * G),
        SlotSpec(name="h", kind="gpu", gpu=1, cpus=(2,), memory_max=7 * G),
        SlotSpec(name="c", kind="cpu", cpus=(3,)),
    ]
    assert check_slots(specs, MACHINE) == ([], [])


def test_slots_that_do_not() -> None:
    specs = [
        SlotSpec(name="a", kind="gpu", gpu="GPU-a", cpus=(0, 1), memory_max=8 * G),
        SlotSpec(name="b", kind="gpu", gpu=0, cpus=(1, 2, 7, 8), memory_max=9 * G),
        SlotSpec(name="c", kind="gpu", gpu="GPU-c", cpus=(0, 1)),
    ]
    faults, warnings = check_slots(specs, MACHINE)
    assert list(map(str, faults)) == [
        "slot b: cpus: there is no CPU 7-8; this machine has 0-3",
        "slot b: gpu: GPU 0 belongs to slot a already; give each GPU a single slot",
        "slot c: gpu: there is no GPU GPU-c; GPUs of this machine: 0 or GPU-a, 1 or GPU-b",
        (
            "slot b: memory_max: all slots together may use 17408M of this machine's 16384M of memory; "
            "lower memory_max of slots"
        ),
    ]
    assert warnings == [
        "slots a, c share the CPUs 0; their jobs slow each other down",
        "slots a, b, c share the CPUs 1; their jobs slow each other down",
    ]


MISFITS: list[tuple[dict[str, Any], str]] = [
    (
        {"kind": "gpu", "gpu": "GPU-n"},
        "gpu: GPU GPU-n has no MIG instance yet; make one with `nvidia-smi mig`, and name the instance",
    ),
    ({"cpus": (0, 4)}, "cpus: CPU 4 is offline; chcpu -e 4, or use some of 0-3"),
    (
        {"cpus": (1, 5)},
        "cpus: the miner may not use CPU 5; use some of 0-3, or widen AllowedCPUs= of the service "
        "or the cpuset of the container",
    ),
    ({"cpus": (6,)}, "cpus: there is no CPU 6; this machine has 0-5"),
    (
        {"rlimits": {"nofile": 2000}},
        "rlimits.nofile: 2000 is more than the kernel allows (1024); lower nofile, or "
        "raise the sysctl fs.nr_open",
    ),
    (
        {"io_max": {"/no/such": {"wbps": 1}}},
        "io_max['/no/such']: cannot find the disk of /no/such: No such file or directory; name an existing "
        "directory or device on a single disk",
    ),
    (
        {"io_max": {"/proc": {"wbps": 1}}},
        "io_max['/proc']: cannot find the disk of /proc: its file system is not on one disk; name the device "
        "instead; name an existing directory or device on a single disk",
    ),
    (
        {"kind": "gpu", "gpu": "GPU-m"},
        "gpu: GPU GPU-m is divided into MIG instances; name an instance: MIG-1, MIG-2",
    ),
]
DOUBTS: list[tuple[dict[str, Any], str]] = [
    (
        {"cpus": (0, 1), "cpu_max": 300},
        "cpu_max: no job reaches 300%: the slot has 2 CPUs; lower cpu_max to 200%",
    ),
    ({"cpu_max": 500}, "cpu_max: no job reaches 500%: the slot has 4 CPUs; lower cpu_max to 400%"),
    (
        {"swap_max": 2 * G},
        "swap_max: 2G is more than the 1024M of swap of this machine; lower swap_max, or add swap",
    ),
    (
        {"pids_max": 40_000},
        "pids_max: 40000 is more than the kernel allows on this machine (32768); lower pids_max, or "
        "raise the sysctl kernel.pid_max",
    ),
    (
        {"memory_max": 16 * G - 1},
        "memory_max: all slots together may use 16383M of this machine's 16384M of memory, and the system "
        "needs 512M; lower memory_max of slots",
    ),
]


@pytest.fixture
def small(tmp_path: Path) -> MachineFacts:
    return MachineFacts(
        cpus=(0, 1, 2, 3),
        memory_bytes=16 * G,
        offline=(4,),
        barred=(5,),
        gpu_parts={"GPU-n": (), "GPU-m": ("MIG-1", "MIG-2")},
        swap_bytes=G,
        pid_max=32768,
        nr_open=1024,
        sysfs=tmp_path,
    )


@pytest.mark.parametrize(("keys", "message"), MISFITS)
def test_what_does_not_fit(small: MachineFacts, keys: dict[str, Any], message: str) -> None:
    faults, warnings = check_slots([SlotSpec(**{"name": "a", "kind": "cpu"} | keys)], small)
    assert list(map(str, faults)) == [f"slot a: {message}"]
    assert warnings == []


@pytest.mark.parametrize(("keys", "message"), DOUBTS)
def test_what_is_possible_but_hardly_meant(small: MachineFacts, keys: dict[str, Any], message: str) -> None:
    assert check_slots([SlotSpec(name="a", kind="cpu", **keys)], small) == ([], [f"slot a: {message}"])


def disk_below(path: Path) -> None:
    number = path.stat().st_dev
    device = path / "dev/block" / f"{os.major(number)}:{os.minor(number)}"
    device.mkdir(parents=True)
    (device / "dev").write_text("8:0\n")


def test_one_disk_by_two_paths(small: MachineFacts, tmp_path: Path) -> None:
    disk_below(tmp_path)
    paths = [str(tmp_path), str(tmp_path / "dev")]
    spec = SlotSpec(name="a", kind="cpu", io_max={path: {"wbps": 1} for path in paths})
    faults, _ = check_slots([spec], small)
    assert [fault.message for fault in faults] == [
        f"{paths[1]} is on the same disk as {paths[0]}; limit that disk once"
    ]


def test_a_slot_whose_runners_are_off(tmp_path: Path) -> None:
    (tmp_path / "slots.d").mkdir()
    (tmp_path / "slots.d" / "a.yaml").write_text(
        "slots:\n- {name: a, kind: cpu, runners: [python]}\n- {name: b, kind: cpu}\n"
    )
    keys = {
        "coordinator": {"base_url": "http://127.0.0.1:9/api", "auth_token": "env:MINER_AUTH"},
        "runners": {"python": {"enable": False}},
        "slots_dir": str(tmp_path / "slots.d"),
        "workspace": {"root": str(tmp_path)},
        **{section: {"mode": "auto"} for section in ("privileges", "sandbox", "cgroup")},
    }
    path = tmp_path / "config.yaml"
    path.write_bytes(msgspec.yaml.encode(keys))
    config, _, _ = load_config(path, {})
    assert config
    checker = Checker(path, config, {}, GpuList(missing=True))
    checker.check()
    assert [warning for warning in checker.warnings if warning.startswith("slot ")] == [
        "slot a takes no jobs: the slot's runners are off; set runners.python.enable: true"
    ]


def test_what_is_just_within_the_limits(small: MachineFacts, tmp_path: Path) -> None:
    disk_below(tmp_path)
    spec = SlotSpec(
        name="a",
        kind="cpu",
        cpus=(0, 1, 2, 3),
        cpu_max=400,
        memory_max=16 * G - (512 << 20),
        swap_max=G,
        pids_max=32768,
        io_max={str(tmp_path): {"wbps": 1}},
        rlimits={"nofile": 1024},
    )
    assert check_slots([spec], small) == ([], [])


def test_what_is_unknown_is_not_checked() -> None:
    spec = SlotSpec(
        name="a",
        kind="cpu",
        swap_max=1 << 60,
        pids_max=4_194_304,
        io_max={"/no/such": {"wbps": 1}},
        rlimits={"nofile": 1 << 40},
    )
    assert check_slots([spec], MACHINE) == ([], [])


def test_faults_point_into_nested_keys(small: MachineFacts, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(
        "slots:\n- name: a\n  kind: cpu\n  rlimits:\n    core: 0\n    nofile: 1025\n"
        "  io_max:\n    /no/such:\n      wbps: 1M\n  pids_max: 32769\n"
    )
    specs = read_slots(tmp_path, [])
    faults, warnings = check_slots(specs, small, tmp_path)
    path = tmp_path / "a.yaml"
    assert [str(fault).partition(" ")[0] for fault in [*faults, *warnings]] == [
        f"{path}:6:",
        f"{path}:9:",
        f"{path}:10:",
    ]


def auto(name: str, **keys: Any) -> SlotSpec:
    return SlotSpec(**{"name": name, "kind": "cpu", "cpus": AUTO} | keys)


def test_auto_is_read_laid_out_and_written() -> None:
    specs, faults = one(cpus="auto")
    assert faults == []
    assert specs == [auto("a")]
    assert read(to_yaml(specs)) == (specs, [])
    assert lay_out(specs, MACHINE, []) == [SlotSpec(name="a", kind="cpu", cpus=(0, 1, 2, 3))]


def test_auto_takes_what_no_slot_names() -> None:
    specs = [
        auto("a", cpu_max=150),
        SlotSpec(name="b", kind="cpu", cpus=(1,)),
        auto("c"),
        SlotSpec(name="d", kind="cpu"),
    ]
    faults: list[Fault] = []
    laid = lay_out(specs, MACHINE, faults)
    assert faults == []
    assert [spec.cpus for spec in laid] == [(0, 2), (1,), (3,), None]
    assert [replace(spec, cpus=old.cpus) for spec, old in zip(laid, specs, strict=True)] == specs


def test_auto_where_nothing_is_left(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(
        "slots:\n- {name: a, kind: cpu, cpus: 0-2}\n- {name: b, kind: cpu, cpus: auto}\n"
        "- name: c\n  kind: cpu\n  cpus: auto\n"
    )
    faults: list[Fault] = []
    laid = lay_out(read_slots(tmp_path, faults), MACHINE, faults, tmp_path)
    assert [spec.cpus for spec in laid] == [(0, 1, 2), (3,), AUTO]
    assert list(map(str, faults)) == [
        f"{path}:6: slots[2].cpus: no CPU is left for this slot: of CPUs 0-3, slots name 0-2, and "
        "2 slots with `cpus: auto` share the rest; name fewer CPUs, or remove a slot"
    ]


TWO_NODES = MachineFacts(
    cpus=tuple(range(8)),
    memory_bytes=32 * G,
    gpu_ids=[("GPU-a", "0"), ("GPU-b", "1")],
    nodes=(NumaNode(0, (0, 1, 2, 3), 16 * G), NumaNode(1, (4, 5, 6, 7), 16 * G)),
    gpu_nodes={"GPU-a": 1, "0": 1, "GPU-b": 0, "1": 0},
)


def test_a_gpu_slot_is_near_its_gpu_and_its_memory() -> None:
    specs = [
        auto("c", memory_max=7 * G),
        auto("g", kind="gpu", gpu=0, cpu_max=200, memory_max=7 * G),
        auto("h", kind="gpu", gpu="GPU-b", memory_max=8 * G),
    ]
    laid = lay_out(specs, TWO_NODES, [])
    assert [spec.cpus for spec in laid] == [(6, 7), (4, 5), (0, 1, 2, 3)]
    assert [spec.mems for spec in laid] == [(1,), (1,), (0,)]
    assert "mems" not in to_yaml(laid)


def test_a_derived_layout_goes_along_the_nodes() -> None:
    specs = derive_slots(TWO_NODES)
    assert [(spec.name, spec.cpus, spec.mems) for spec in specs] == [
        ("gpu0", (4, 5), (1,)),
        ("gpu1", (0, 1), (0,)),
        ("cpu0", (2, 3), (0,)),
        ("cpu1", (6, 7), (1,)),
    ]


def test_a_derived_layout_splits_no_core() -> None:
    cores = tuple((i, i + 4) for i in range(4))
    assert [spec.cpus for spec in derive_slots(MachineFacts(tuple(range(8)), 16 * G, cores=cores))] == [
        (0, 1, 4, 5),
        (2, 3, 6, 7),
    ]


def test_no_gpu_at_all() -> None:
    faults, _ = check_slots([SlotSpec(name="a", kind="gpu", gpu=0)], MachineFacts((0,), G))
    assert [fault.message for fault in faults] == ["there is no GPU 0; GPUs of this machine: none"]


def test_faults_name_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("slots:\n- {name: a, kind: cpu}\n- name: b\n  kind: cpu\n  cpus: 9\n")
    faults: list[Fault] = []
    specs = read_slots(tmp_path, faults)
    faults, _ = check_slots(specs, MACHINE, tmp_path)
    assert list(map(str, faults)) == [f"{path}:5: slots[1].cpus: there is no CPU 9; this machine has 0-3"]


@pytest.mark.parametrize(
    ("cpus", "gpus", "layout"),
    [
        (1, 0, {"cpu0": 1}),
        (2, 0, {"cpu0": 1, "cpu1": 1}),
        (4, 0, {"cpu0": 2, "cpu1": 2}),
        (16, 0, {"cpu0": 4, "cpu1": 4, "cpu2": 4, "cpu3": 4}),
        (1, 2, {"gpu0": 1, "gpu1": 1}),
        (2, 1, {"gpu0": 1, "cpu0": 1}),
        (16, 1, {"gpu0": 8, "cpu0": 4, "cpu1": 4}),
        (16, 2, {"gpu0": 5, "gpu1": 5, "cpu0": 3, "cpu1": 3}),
    ],
)
def test_derived_layouts(cpus: int, gpus: int, layout: dict[str, int]) -> None:
    facts = MachineFacts(tuple(range(cpus)), 16 * G, [(str(i), f"GPU-{i}") for i in range(gpus)])
    assert {spec.name: len(spec.cpus or ()) for spec in derive_slots(facts)} == layout


@settings(deadline=None)
@given(st.sets(st.integers(0, 300), min_size=1), st.integers(0, 10), st.integers(64 << 20, 1 << 43))
def test_a_derived_layout_fits_and_reads_back(cpus: set[int], gpus: int, memory: int) -> None:
    ids: list[tuple[str, ...]] = [(str(i), f"GPU-{i}") for i in range(gpus)]
    facts = MachineFacts(tuple(sorted(cpus)), memory, ids)
    specs = derive_slots(facts)
    faults, warnings = check_slots(specs, facts)
    assert faults == []
    assert not warnings or gpus >= len(cpus)
    assert {cpu for spec in specs for cpu in spec.cpus or ()} == cpus
    assert [spec.gpu for spec in specs if spec.kind == "gpu"] == [names[1] for names in ids]
    assert read(to_yaml(specs)) == (specs, [])


sizes = st.integers(1 << 20, 1 << 50)
SPECS = st.builds(
    SlotSpec,
    name=st.from_regex(r"[a-z0-9][a-z0-9_-]{0,21}", fullmatch=True),
    kind=st.just("gpu"),
    gpu=st.integers(0, 255) | st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._:/-]{0,20}", fullmatch=True),
    cpus=st.none()
    | st.just(AUTO)
    | st.sets(st.integers(0, 99), min_size=1).map(lambda cpus: tuple(sorted(cpus))),
    cpu_max=st.none() | st.integers(1, 9999),
    cpu_weight=st.none() | st.integers(1, 10_000),
    memory_max=st.none() | sizes,
    swap_max=st.none() | st.just(0) | sizes,
    pids_max=st.none() | st.integers(1, 4_194_304),
    io_weight=st.none() | st.integers(1, 10_000),
    io_max=st.dictionaries(st.sampled_from(["/", "/a b", "/off"]), st.just({"wbps": 5})),
    nice=st.integers(-20, 19),
    ionice=st.none() | st.builds(IoNice, st.sampled_from(["idle", "best-effort"]), st.integers(0, 7)),
    rlimits=st.dictionaries(st.sampled_from(["core", "nofile"]), st.integers(0, 1 << 40)),
    max_runtime_s=st.none() | st.integers(1, 9999).map(float),
    egress=st.sampled_from(["none", "open"]),
    runners=st.sampled_from([["cli"], ["python"], ["cli", "python"]]),
    env=st.lists(st.sampled_from(["A", "null", "yes"])),
    binds=st.lists(st.sampled_from(["/opt", "/srv/a b"])),
)


@given(st.lists(SPECS, min_size=1, max_size=3))
def test_what_is_written_reads_back(specs: list[SlotSpec]) -> None:
    assert read(to_yaml(specs)) == (specs, [])


def test_a_slot_has_the_keys_of_slots_d_and_their_defaults() -> None:
    """And the NUMA nodes, which follow from the machine."""
    read, plain = (
        {field.name: field for field in msgspec.structs.fields(kind)} for kind in (SlotKeys, SlotSpec)
    )
    assert plain.keys() - read.keys() == {"mems"}
    for name, field in read.items():
        assert (field.default, name) == (plain[name].default, name)
    assert SlotKeys(name="a", kind="cpu").runners == SlotSpec(name="a", kind="cpu").runners
