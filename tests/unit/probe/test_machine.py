import json
import os
import platform
import shutil
from pathlib import Path

import msgspec
import pytest

from aitbc_miner import __version__
from aitbc_miner.gpu.reader import NO_LIBRARY, GpuInfo, GpuList, GpuReader, MigInstance
from aitbc_miner.probe.machine import (
    CgroupFacts,
    Machine,
    SlotCapability,
    capabilities,
    cgroup_facts,
    cuda_toolkits,
    probe_machine,
    render_page,
)
from aitbc_miner.probe.topology import NumaNode
from tests.support.nvml_stub import NvmlStub

L4 = GpuInfo(
    index=0,
    name="NVIDIA L4",
    uuid="GPU-8c1f2d3e-0000-4000-8000-123456789abc",
    vram_mb=23034,
    driver="545.23.06",
    cuda="12.3",
    compute_capability="8.9",
    pci_bus_id="0000:01:00.0",
    numa_node=1,
)


def machine(**changes: object) -> Machine:
    """A large machine on which nothing is missing."""
    full = Machine(
        model="AMD EPYC 9654 96-Core Processor",
        arch="x86_64",
        cores=2,
        threads=4,
        cpus=(0, 1, 2, 3),
        siblings=((0, 2), (1, 3)),
        numa=(NumaNode(0, (0, 2), 64000 << 20), NumaNode(1, (1, 3), 64000 << 20)),
        memory_mb=128000,
        memory_available_mb=900,
        disk_total_mb=4_000_000,
        disk_free_mb=250_000,
        os="Debian GNU/Linux 13 (trixie)",
        os_ids=("debian",),
        kernel="6.12.41+deb13-amd64",
        python="3.13.5",
        tools={"bwrap": "/usr/bin/bwrap", "nft": "/usr/sbin/nft"},
        sandbox="/usr/bin/bwrap",
        nft="/usr/sbin/nft",
        cgroup=CgroupFacts("v2", "/sys/fs/cgroup", ("cpu", "memory", "pids"), ("memory",), writable=True),
    )
    return msgspec.structs.replace(full, **changes)


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


# ---- the real machine and small trees ----------------------------------------------------------------------


def test_this_machine(tmp_path: Path) -> None:
    found = probe_machine(tmp_path / "not" / "yet" / "there")
    assert found.arch == platform.machine()
    assert found.kernel == platform.release()
    assert set(found.cpus) == os.sched_getaffinity(0)
    assert 1 <= found.cores <= found.threads
    assert sorted(cpu for core in found.siblings for cpu in core) == sorted(
        {cpu for core in found.siblings for cpu in core}
    )
    assert 0 < found.memory_available_mb <= found.memory_mb
    assert found.memory_mb == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") >> 20
    assert found.disk_total_mb == shutil.disk_usage(tmp_path).total >> 20
    assert 0 < found.disk_free_mb <= found.disk_total_mb
    assert found.os
    assert all(Path(path).is_file() for path in found.tools.values())
    assert found.cgroup == cgroup_facts()


def test_numa_and_smt(tmp_path: Path) -> None:
    sysfs = write(
        tmp_path,
        {
            "devices/system/cpu/online": "0-3,8\n",
            "devices/system/cpu/cpu0/topology/thread_siblings_list": "0,2\n",
            "devices/system/cpu/cpu1/topology/thread_siblings_list": "1,3\n",
            "devices/system/cpu/cpu2/topology/thread_siblings_list": "0,2\n",
            "devices/system/cpu/cpu3/topology/thread_siblings_list": "1,3\n",
            "devices/system/cpu/cpu8/topology/thread_siblings_list": "8\n",
            "devices/system/cpu/cpufreq/boost": "1\n",
            "devices/system/node/node0/cpulist": "0-3\n",
            "devices/system/node/node0/meminfo": "Node 0 MemTotal:       2097152 kB\nNode 0 MemFree: 5 kB\n",
            "devices/system/node/node10/cpulist": "\n",
            "devices/system/node/node10/meminfo": "Node 10 MemTotal:       1024 kB\n",
            "devices/system/node/node2/cpulist": "8\n",
        },
    )
    found = probe_machine(tmp_path, sysfs=sysfs)
    assert (found.cores, found.threads) == (3, 5)
    assert found.siblings == ((0, 2), (1, 3), (8,))
    assert found.numa == (
        NumaNode(0, (0, 1, 2, 3), 2 << 30),
        NumaNode(2, (8,), 0),
        NumaNode(10, (), 1 << 20),
    )


def test_without_sysfs_and_procfs_the_rest_is_still_told(tmp_path: Path) -> None:
    (tmp_path / "self").mkdir()
    (tmp_path / "self/mountinfo").write_text("")
    found = probe_machine(tmp_path, sysfs=tmp_path, proc=tmp_path)
    assert found.cores >= 1
    assert found.threads >= 1
    assert (found.model, found.numa, found.siblings, found.cgroup) == ("unknown", (), (), CgroupFacts("none"))


@pytest.mark.parametrize(
    ("cpuinfo", "model"),
    [
        (
            "processor\t: 0\nmodel\t\t: 1\nmodel name\t: Core X\n\nprocessor\t: 1\nmodel name\t: Core Y\n",
            "Core X",
        ),
        (
            "processor\t: 0\nCPU part\t: 0xd0b\n\nModel\t\t: Raspberry Pi 5 Model B\n",
            "Raspberry Pi 5 Model B",
        ),
        ("processor\t: 0\nmodel name\t:\n", "unknown"),
    ],
)
def test_cpu_model(tmp_path: Path, cpuinfo: str, model: str) -> None:
    write(tmp_path, {"cpuinfo": cpuinfo, "self/mountinfo": ""})
    assert probe_machine(tmp_path, proc=tmp_path).model == model


def test_tools_are_found_beside_the_path_of_an_ordinary_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("bwrap", "nft"):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    found = probe_machine(tmp_path)
    assert found.sandbox == found.tools["bwrap"] == str(tmp_path / "bwrap")
    assert found.nft == str(tmp_path / "nft")
    assert "ffmpeg" not in found.tools


def test_a_system_without_os_release(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> dict[str, str]:
        raise OSError

    monkeypatch.setattr(platform, "freedesktop_os_release", refuse)
    found = probe_machine(tmp_path)
    assert (found.os, found.os_ids) == ("Linux", ())


# ---- cgroups -----------------------------------------------------------------------------------------------

V1_LINE = "32 31 0:29 / /sys/fs/cgroup/cpu rw,relatime - cgroup cgroup rw,cpu\n"


def proc_tree(root: Path, mount: Path, *, v1: bool = False, own: str = "/miner.service") -> Path:
    v2_line = f"41 31 0:38 / {mount} rw,relatime - cgroup2 cgroup2 rw\n"
    cgroups = ("1:cpu:/\n" if v1 else "") + f"0::{own}\n"
    mountinfo = (V1_LINE if v1 else "") + v2_line
    return write(root / "proc", {"self/mountinfo": mountinfo, "self/cgroup": cgroups})


@pytest.mark.parametrize(("v1", "mode"), [(False, "v2"), (True, "hybrid")])
def test_the_group_of_this_process(tmp_path: Path, v1: bool, mode: str) -> None:
    mount = write(
        tmp_path / "cgroup",
        {
            "cgroup.controllers": "cpuset cpu io memory pids\n",
            "miner.service/cgroup.controllers": "cpu memory pids\n",
            "miner.service/cgroup.subtree_control": "memory pids\n",
        },
    )
    facts = cgroup_facts(proc_tree(tmp_path, mount, v1=v1))
    assert facts == CgroupFacts(
        mode, str(mount), ("cpu", "memory", "pids"), ("memory", "pids"), writable=True
    )


def test_a_group_outside_of_the_mount_is_not_ours(tmp_path: Path) -> None:
    mount = write(tmp_path / "cgroup", {"cgroup.controllers": "cpu\n"})
    facts = cgroup_facts(proc_tree(tmp_path, mount, own="/../other"))
    assert facts == CgroupFacts("v2", str(mount))


def test_a_group_that_is_not_there_is_not_writable(tmp_path: Path) -> None:
    mount = write(tmp_path / "cgroup", {"cgroup.controllers": "cpu\n"})
    assert not cgroup_facts(proc_tree(tmp_path, mount, own="/gone")).writable


def test_version_1_only(tmp_path: Path) -> None:
    assert cgroup_facts(write(tmp_path, {"self/mountinfo": V1_LINE})) == CgroupFacts("v1")


# ---- the capability payload --------------------------------------------------------------------------------


TASKS = [{"name": "pi", "params": {}}]


def test_payload_is_that_of_the_dialect() -> None:
    slot = SlotCapability("cpu0", "cpu", "0-3", 8192, {"memory": "cgroup", "cpu": "cgroup", "pids": "cgroup"})
    kinds, tags = ["cli", "python"], ["eu", "cpu"]
    payload = capabilities("node-1", machine(), GpuList([L4]), [slot], kinds, tags, TASKS)
    ours = payload.pop("machine")
    assert payload == {
        "node_id": "node-1",
        "version": __version__,
        "cpu": {"cores": 2, "arch": "x86_64"},
        "memory_mb": 128000,
        "disk_free_mb": 250000,
        "gpu": [
            {
                "vendor": "nvidia",
                "name": "NVIDIA L4",
                "uuid": L4.uuid,
                "vram_mb": 23034,
                "cuda": {"version": "12.3", "driver": "545.23.06"},
            }
        ],
        "runners": ["cli", "python"],
        "tags": ["debian", "cuda", "cpu", "eu"],
        "slots": [
            {
                "name": "cpu0",
                "kind": "cpu",
                "cpus": "0-3",
                "memory_mb": 8192,
                "enforced": {"memory": "cgroup", "cpu": "cgroup", "pids": "cgroup"},
            }
        ],
        "tasks": [{"name": "pi", "params": {}}],
    }
    assert {"model", "threads", "numa", "os", "kernel", "tools", "cgroup"} <= set(ours)
    assert json.loads(json.dumps(ours))["gpus"][0]["compute_capability"] == "8.9"


def test_a_gpu_slot_names_its_gpu_and_runners() -> None:
    slot = SlotCapability("gpu0", "gpu", "0-1", 1, {}, gpu=L4.uuid, runners=["cli"])
    (entry,) = capabilities("n", machine(), GpuList(), [slot], [])["slots"]
    assert (entry["gpu"], entry["runners"]) == (L4.uuid, ["cli"])


def test_a_broken_gpu_is_not_offered() -> None:
    broken = GpuInfo(index=1, error="cannot read GPU 1: GPU is lost")
    payload = capabilities("n", machine(os_ids=("fedora",)), GpuList([broken]), [], [])
    assert (payload["gpu"], payload["tags"]) == ([], ["cpu"])
    assert payload["machine"]["gpus"][0]["error"] == broken.error


def test_why_the_gpus_are_not_known_goes_along() -> None:
    payload = capabilities("n", machine(), GpuList(error="cannot ask NVML: no answer in time"), [], [])
    assert payload["machine"]["gpu_error"] == "cannot ask NVML: no answer in time"


# ---- the page ----------------------------------------------------------------------------------------------


def rows(page: str) -> dict[str, str]:
    """The facts of the page by their labels, with wrapped lines joined again."""
    found: dict[str, str] = {}
    label = ""
    for line in page.partition("\n\n")[0].splitlines():
        label = line[:11].strip() or label
        found[label] = f"{found.get(label, '')} {line[11:]}".strip()
    return found


def test_page_of_a_complete_machine() -> None:
    page = render_page(machine(), GpuList([L4]), ["cli", "python"])
    assert "Missing" not in page
    shown = rows(page)
    assert shown["Processor"] == "AMD EPYC 9654 96-Core Processor (x86_64)"
    assert shown["CPUs"] == "2 cores, 4 threads; usable here: 0-3"
    assert shown["NUMA 1"] == "CPUs 1,3, 62.5 GiB"
    assert shown["Memory"] == "125.0 GiB, 900 MiB available"
    assert shown["Disk"].startswith("3.8 TiB, 244.1 GiB free")
    assert shown["GPU 0"] == (
        f"NVIDIA L4, 22.5 GiB, {L4.uuid}, compute capability 8.9, driver 545.23.06, CUDA 12.3, "
        "PCI 0000:01:00.0, NUMA node 1"
    )
    assert shown["Runners"] == "cli, python"
    assert shown["Sandbox"] == "/usr/bin/bwrap"


def test_page_fits_80_columns_and_its_texts_are_aligned() -> None:
    long = machine(model="x y" * 60, cpus=tuple(range(0, 512, 2)), os="Long " * 30)
    mig = [
        MigInstance(f"MIG-8c1f2d3e-0000-4000-8000-12345678900{n}", "NVIDIA H100 MIG 1g.10gb", 9856)
        for n in range(7)
    ]
    gpus = GpuList(
        [msgspec.structs.replace(L4, mig=mig, mig_enabled=True), GpuInfo(index=1, error="cannot " * 30)]
    )
    page = render_page(long, gpus, [])
    assert max(len(line) for line in page.splitlines()) <= 80
    facts = page.partition("\n\n")[0].splitlines()
    assert all(line[10] == " " and line[11] != " " for line in facts)
    assert all(instance.uuid in page for instance in mig)
    assert rows(page)["GPU 1"] == "broken"


WITHOUT = "the miner does not start, or, with cgroup.mode: auto, limits only single processes"


@pytest.mark.parametrize(
    ("changes", "gpus", "said"),
    [
        ({}, GpuList(error=NO_LIBRARY, missing=True), "GPU slots are not possible; install nvidia-driver"),
        ({}, GpuList(error="cannot ask NVML: no answer in time"), "cannot ask NVML: no answer in time"),
        ({}, GpuList([GpuInfo(1, error="cannot read GPU 1: lost")]), "cannot read GPU 1: lost"),
        ({}, GpuList(), "no NVIDIA GPU"),
        ({"sandbox": None}, GpuList([L4]), "install bubblewrap"),
        ({"cgroup": CgroupFacts("v1")}, GpuList([L4]), "no cgroup version 2"),
        ({"cgroup": CgroupFacts("none")}, GpuList([L4]), "systemd.unified_cgroup_hierarchy=1"),
        (
            {"cgroup": CgroupFacts("hybrid", "/sys/fs/cgroup/unified", ("hugetlb",), writable=True)},
            GpuList([L4]),
            f"no cgroup controller cpu, memory, pids here: {WITHOUT}; b",
        ),
        (
            {"cgroup": CgroupFacts("v2", "/sys/fs/cgroup", ("cpu", "pids"), writable=True)},
            GpuList([L4]),
            f"no cgroup controller memory here: {WITHOUT}; run the miner as",
        ),
        (
            {"cgroup": CgroupFacts("v2", "/sys/fs/cgroup", ("cpu", "memory", "pids"))},
            GpuList([L4]),
            "cgroup not writable",
        ),
    ],
)
def test_page_says_what_is_missing_and_nothing_else(
    changes: dict[str, object], gpus: GpuList, said: str
) -> None:
    page = render_page(machine(**changes), gpus, ["cli"])
    _, _, missing = page.partition("\nMissing\n")
    assert said in " ".join(missing.split())
    assert missing.count("  * ") == 1


def test_page_without_runners() -> None:
    assert "no job can be run" in render_page(machine(), GpuList([L4]), [])


def test_page_of_gpus_read_through_nvml(tmp_path: Path) -> None:
    with GpuReader(environ=NvmlStub(tmp_path, gpus=8, mig=3, lost=5).environ) as reader:
        page = render_page(machine(), reader.list(20.0), ["cli"])
    shown = rows(page)
    assert [f"GPU {index}" in shown for index in range(9)] == [True] * 8 + [False]
    assert shown["MIG 2"].startswith("NVIDIA Stub MIG 1g.10gb, 2.0 GiB, MIG-")
    assert "cannot read GPU 5: GPU is lost" in page


@pytest.mark.parametrize(
    ("files", "found"),
    [
        ({}, ()),
        (
            {"local/cuda-12.4/version.json": '{"cuda": {"name": "CUDA SDK", "version": "12.4.1"}}'},
            ("12.4.1",),
        ),
        (
            {
                "local/cuda/version.json": '{"cuda" : {\n "name" : "CUDA SDK",\n "version" : "12.4.1"\n}}',
                "local/cuda-12.4/version.json": '{"cuda": {"version": "12.4.1"}}',
                "local/cuda-10.2/version.txt": "CUDA Version 10.2.89\n",
                "lib/cuda/version.txt": "CUDA Version 11.8.0",
            },
            ("10.2.89", "11.8.0", "12.4.1"),
        ),
        ({"local/cuda/version.json": "{", "local/cuda-9/version.txt": "CUDA"}, ()),
    ],
)
def test_the_toolkits_that_are_installed(
    files: dict[str, str], found: tuple[str, ...], tmp_path: Path
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert cuda_toolkits([tmp_path / "local", tmp_path / "lib", tmp_path / "nowhere"]) == found
