import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from aitbc_miner.gpu.facts import GpuFact
from aitbc_miner.gpu.reader import GpuInfo, GpuList, GpuReader, MigInstance
from aitbc_miner.ipc.messages import SlotView
from aitbc_miner.slots.placement import Offer
from aitbc_miner.telemetry.sampling import GpuWatch, Sampler, Use, inventory
from aitbc_miner.util import clock
from tests.support.nvml_stub import NvmlStub, no_library

LONG_S = 20.0
SPIN = "print('ready', flush=True)\nwhile True: pass"


class Clock:
    def __init__(self) -> None:
        self.time = 100.0

    def __call__(self) -> float:
        return self.time


def slot(name: str = "cpu0", **more: Any) -> SlotView:
    return SlotView(Offer(name, "cpu", 2, 1024), state="BUSY", free=False, **more)


def write_group(path: Path, cpu_s: float, **files: object) -> None:
    job = path / "job"
    job.mkdir(parents=True, exist_ok=True)
    usec = int(cpu_s * 1e6)
    (job / "cpu.stat").write_text(f"usage_usec {usec}\nuser_usec {usec}\nsystem_usec 0\n")
    (job / "cgroup.procs").write_text("")
    for name, value in files.items():
        (job / name.replace("_", ".")).write_text(f"{value}\n")


def until(ready: Callable[[], bool]) -> None:
    deadline = clock.now() + LONG_S
    while not ready():
        assert clock.now() < deadline, "it did not come to it in time"
        os.sched_yield()


def test_a_group_tells_its_rate_and_memory(tmp_path: Path) -> None:
    now = Clock()
    sampler = Sampler(now)
    view = slot(cgroup=str(tmp_path))
    write_group(tmp_path, 10.0, memory_current=4096)
    assert sampler.sample([view]) == {"cpu0": Use(None, 4096)}
    write_group(tmp_path, 13.0, memory_current=8192)
    now.time += 2
    assert sampler.sample([view]) == {"cpu0": Use(150.0, 8192)}
    now.time += 2
    assert sampler.sample([view]) == {"cpu0": Use(0.0, 8192)}


def test_two_samples_at_one_moment_have_no_rate(tmp_path: Path) -> None:
    sampler = Sampler(Clock())
    write_group(tmp_path, 10.0, memory_current=1)
    sampler.sample([slot(cgroup=str(tmp_path))])
    assert sampler.sample([slot(cgroup=str(tmp_path))]) == {"cpu0": Use(None, 1)}


def test_the_next_jobs_group_counts_from_zero(tmp_path: Path) -> None:
    now = Clock()
    sampler = Sampler(now)
    view = slot(cgroup=str(tmp_path))
    write_group(tmp_path, 1.0, memory_current=1)
    sampler.sample([view])
    (tmp_path / "job").rename(tmp_path / "gone")
    write_group(tmp_path, 4.0, memory_current=1)
    now.time += 4
    assert sampler.sample([view])["cpu0"].cpu_pct == 100.0


def test_a_group_that_is_away_is_no_error(tmp_path: Path) -> None:
    now = Clock()
    sampler = Sampler(now)
    view = slot(cgroup=str(tmp_path / "none"))
    assert sampler.sample([view]) == {"cpu0": Use(None, None)}
    now.time += 1
    assert sampler.sample([view]) == {"cpu0": Use(None, None)}


def test_without_a_memory_controller_the_processes_are_summed(tmp_path: Path) -> None:
    write_group(tmp_path, 1.0)
    (tmp_path / "job/cgroup.procs").write_text(f"{os.getpid()}\n{2**22 + 1}\n")
    memory = Sampler().sample([slot(cgroup=str(tmp_path))])["cpu0"].memory_bytes
    assert memory is not None
    assert 0.5 < memory / psutil.Process().memory_info().rss < 2


def test_a_process_tree_is_measured_without_a_group() -> None:
    now = Clock()
    sampler = Sampler(now)
    nested = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {SPIN!r}])"
    with subprocess.Popen([sys.executable, "-c", nested], stdout=subprocess.PIPE, text=True) as job:
        assert job.stdout
        job.stdout.readline()
        spinning = psutil.Process(job.pid).children()[0]
        first = sampler.sample([slot(job_pid=job.pid)])["cpu0"]
        before = spinning.cpu_times().user
        until(lambda: spinning.cpu_times().user >= before + 0.1)
        now.time += 1
        second = sampler.sample([slot(job_pid=job.pid)])["cpu0"]
        spinning.kill()
        job.wait(LONG_S)
    assert first.cpu_pct is None
    assert first.memory_bytes
    assert second.cpu_pct
    assert second.cpu_pct >= 9
    now.time += 1
    assert sampler.sample([slot(job_pid=job.pid)]) == {"cpu0": Use(None, None)}


def test_an_idle_slot_uses_nothing() -> None:
    now = Clock()
    sampler = Sampler(now)
    sampler.sample([slot()])
    now.time += 1
    assert sampler.sample([slot()]) == {"cpu0": Use(0.0, 0)}


def test_only_present_slots_are_told(tmp_path: Path) -> None:
    sampler = Sampler()
    sampler.sample([slot("a"), slot("b")])
    assert set(sampler.sample([slot("b")])) == {"b"}


def test_the_inventory_has_whole_gpus_and_instances_but_nothing_broken() -> None:
    whole = GpuInfo(0, uuid="GPU-a", vram_mb=16000)
    split = GpuInfo(1, uuid="GPU-b", mig_enabled=True, mig=[MigInstance("MIG-1", "1g.5gb", 4864)])
    broken = GpuInfo(2, error="cannot read GPU 2: lost")
    told = inventory(GpuList([whole, split, broken]))
    assert told.gpus == [GpuFact(("GPU-a", "0"), 16000), GpuFact(("MIG-1",), 4864)]
    assert told.error == "cannot read GPU 2: lost"
    assert inventory(GpuList(error="cannot start NVML")).error == "cannot start NVML"
    assert inventory(GpuList(error="no library", missing=True)).error is None
    assert inventory(GpuList()).error is None


def test_the_use_of_a_gpu_is_found_by_uuid_and_index(tmp_path: Path) -> None:
    stub = NvmlStub(tmp_path, gpus=2)
    watch = GpuWatch(GpuReader(environ=stub.environ), 0.01)
    try:
        until(lambda: len(watch.uses) == 2)
        uuid = watch.found.gpus[1].uuid
        use = watch.use_of("1")
        assert use
        assert use.uuid == uuid
        assert watch.use_of(uuid)
        assert watch.use_of(None) is None
        assert watch.use_of("GPU-other") is None
    finally:
        watch.stop()


def test_a_driver_that_comes_late_is_found(tmp_path: Path) -> None:
    talk = tmp_path / "nvml"
    talk.write_text("import sys\nsys.exit(1)\n")
    reader = GpuReader(command=[sys.executable, str(talk)], pause_s=0.01, max_pause_s=0.01)
    watch = GpuWatch(reader, 0.01)
    try:
        assert watch.found.error
        talk.write_text(
            "import sys\n"
            """for line in sys.stdin: print('{"gpus": [{"index": 0, "uuid": "GPU-a"}]}', flush=True)\n"""
        )
        until(lambda: bool(watch.found.gpus))
        assert inventory(watch.found).gpus == [GpuFact(("GPU-a", "0"), 0)]
    finally:
        watch.stop()


def test_without_a_library_nobody_asks_again(tmp_path: Path) -> None:
    watch = GpuWatch(GpuReader(environ=no_library(tmp_path)), 0.01)
    assert watch.found.missing
    watch.stop()
    assert not watch._thread.is_alive()
