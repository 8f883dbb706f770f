import os
import subprocess
import sys
from pathlib import Path

import msgspec
import psutil
import pytest

from aitbc_miner.gpu import reader as gpu
from aitbc_miner.gpu.devices import mig_capabilities, minor_of
from aitbc_miner.gpu.reader import GpuReader, MigInstance
from aitbc_miner.telemetry.sampling import inventory
from aitbc_miner.util import clock
from tests.support.nvml_stub import NvmlStub, no_library
from tools.lib.local_node import wait_until

# How much longer than its deadline a call may take on a busy machine before that counts as "not in time".
GRACE_S = 10.0
LONG_S = 20.0


def child_pid(reader: GpuReader) -> int:
    assert reader._child is not None
    return reader._child.pid


def ended(reader: GpuReader) -> "subprocess.Popen[bytes]":
    assert reader._ended is not None
    return reader._ended


def wait_until_gone(pid: int) -> None:
    """Wait for the end of a killed process; nobody may have reaped it yet."""
    deadline = clock.now() + LONG_S
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert clock.now() < deadline, f"process {pid} is still alive"
        os.sched_yield()


def test_describes_a_gpu(tmp_path: Path) -> None:
    stub = NvmlStub(tmp_path, gpus=2, names="NVIDIA L4|NVIDIA T4")
    node = tmp_path / "bus/pci/devices/0000:41:00.0/numa_node"
    node.parent.mkdir(parents=True)
    node.write_text("1\n")
    with GpuReader(environ=stub.environ, sysfs=tmp_path) as reader:
        found = reader.list(LONG_S)
    assert (found.error, found.missing) == (None, False)
    assert found.gpus[0] == gpu.GpuInfo(
        index=0,
        vendor="nvidia",
        name="NVIDIA L4",
        uuid="GPU-00000000-0000-0000-0000-000000000000",
        vram_mb=16384,
        driver="545.23.06",
        cuda="12.3",
        compute_capability="8.9",
        pci_bus_id="0000:40:00.0",
        minor=0,
    )
    assert (found.gpus[1].name, found.gpus[1].numa_node) == ("NVIDIA T4", 1)


def test_the_nodes_of_a_mig_instance_are_told_by_the_driver(tmp_path: Path) -> None:
    instance = tmp_path / "gpu1" / "mig" / "gi2"
    (instance / "ci0").mkdir(parents=True)
    (instance / "access").write_text("DeviceFileMinor: 21\nDeviceFileMode: 292\n")
    (instance / "ci0" / "access").write_text("DeviceFileMinor: 22\nDeviceFileMode: 292\n")
    assert mig_capabilities(tmp_path, 1, 2, 0) == (21, 22)
    assert mig_capabilities(tmp_path, 1, 2, 1) == (21,)
    (instance / "access").write_text("something else")
    assert mig_capabilities(tmp_path, 1, 2, None) == ()


def test_a_numa_node_that_the_firmware_does_not_know_is_none(tmp_path: Path) -> None:
    node = tmp_path / "bus/pci/devices/0000:40:00.0/numa_node"
    node.parent.mkdir(parents=True)
    node.write_text("-1\n")
    with GpuReader(environ=NvmlStub(tmp_path).environ, sysfs=tmp_path) as reader:
        assert reader.list(LONG_S).gpus[0].numa_node is None


def test_tells_the_usage(tmp_path: Path) -> None:
    with GpuReader(environ=NvmlStub(tmp_path, gpus=2).environ) as reader:
        first, second = reader.usage(LONG_S)
    assert first == gpu.GpuUsage("GPU-00000000-0000-0000-0000-000000000000", 512, 16384, 50, 60, 250.5)
    assert (second.vram_used_mb, second.utilisation_pct, second.temperature_c) == (513, 51, 61)


def test_eight_gpus_from_one_child(tmp_path: Path) -> None:
    with GpuReader(environ=NvmlStub(tmp_path, gpus=8).environ) as reader:
        found = reader.list(LONG_S)
        pid = child_pid(reader)
        usage = reader.usage(LONG_S)
        assert child_pid(reader) == pid
    assert [info.index for info in found.gpus] == list(range(8))
    assert [info.uuid for info in found.gpus] == [entry.uuid for entry in usage]
    assert len({info.uuid for info in found.gpus}) == 8
    wait_until_gone(pid)


def test_mig_instances_are_listed_and_measured(tmp_path: Path) -> None:
    with GpuReader(environ=NvmlStub(tmp_path, gpus=2, mig=2).environ) as reader:
        cut, plain = reader.list(LONG_S).gpus
        usage = reader.usage(LONG_S)
    uuids = [f"MIG-00000000-0000-0000-0000-00000000000{number}" for number in (1, 2)]
    assert cut.mig_enabled
    assert cut.mig == [MigInstance(uuid, "NVIDIA Stub MIG 1g.10gb", 2048) for uuid in uuids]
    assert (plain.mig_enabled, plain.mig) == (False, [])
    assert [entry.uuid for entry in usage] == [cut.uuid, *uuids, plain.uuid]
    assert (usage[0].utilisation_pct, usage[0].error) == (None, None)
    assert (usage[1].vram_total_mb, usage[1].power_w) == (2048, None)


def test_a_lost_gpu_does_not_hide_the_others(tmp_path: Path) -> None:
    with GpuReader(environ=NvmlStub(tmp_path, gpus=3, lost=1).environ) as reader:
        found = reader.list(LONG_S)
        usage = reader.usage(LONG_S)
    assert found.error is None
    assert [info.error is None for info in found.gpus] == [True, False, True]
    assert found.gpus[1].index == 1
    assert "cannot read GPU 1: GPU is lost" in str(found.gpus[1].error)
    assert [entry.error is None for entry in usage] == [True, False, True]


def test_what_a_gpu_cannot_tell_is_none_but_a_real_error_is_told(tmp_path: Path) -> None:
    stub = NvmlStub(tmp_path, fail="nvmlDeviceGetPowerUsage:3")
    with GpuReader(environ=stub.environ) as reader:
        (entry,) = reader.usage(LONG_S)
    assert (entry.power_w, entry.temperature_c, entry.error) == (None, 60, None)
    stub.set(fail="nvmlDeviceGetPowerUsage:16")
    with GpuReader(environ=stub.environ) as reader:
        (entry,) = reader.usage(LONG_S)
    assert entry.uuid.startswith("GPU-")
    assert "GPU requires restart" in str(entry.error)


def test_a_name_that_is_no_text_is_absent(tmp_path: Path) -> None:
    stub = NvmlStub(tmp_path)
    with (tmp_path / "nvml_stub.conf").open("wb") as settings:
        settings.write(b"NVML_STUB_GPUS=2\nNVML_STUB_NAMES=\xff\xfe|good\n")
    with GpuReader(environ=stub.environ) as reader:
        bad, good = reader.list(LONG_S).gpus
    assert (bad.name, bad.error, bad.vram_mb) == ("", None, 16384)
    assert [text.split(" (")[0] for text in bad.odd] == ["name"]
    assert (good.name, good.error, good.odd) == ("good", None, [])


FIELDS = {
    "nvmlDeviceGetName": "name",
    "nvmlDeviceGetUUID": "uuid",
    "nvmlDeviceGetMemoryInfo": "vram_mb",
    "nvmlDeviceGetPciInfo_v3": "pci_bus_id",
    "nvmlDeviceGetMinorNumber": "minor",
    "nvmlDeviceGetCudaComputeCapability": "compute_capability",
    "nvmlDeviceGetMigMode": "mig_enabled",
}


@pytest.mark.parametrize("how", ["fail", "ones"])
@pytest.mark.parametrize(("function", "field"), FIELDS.items())
def test_one_bad_answer_takes_that_field_alone(tmp_path: Path, how: str, function: str, field: str) -> None:
    """An unknown error, or every bit set: 17,592,186,044,415 MB of video memory were offered."""
    stub = NvmlStub(tmp_path, gpus=2)
    with GpuReader(environ=stub.environ) as reader:
        good = reader.list(LONG_S).gpus
    stub.set(gpus=2, only=0, **{how: function + (":999" if how == "fail" else "")})
    with GpuReader(environ=stub.environ) as reader:
        found = reader.list(LONG_S)
        usage = reader.usage(LONG_S)
    assert found.error is None
    assert found.gpus[1] == good[1]
    bad = found.gpus[0]
    assert len(bad.odd) == 1, bad
    assert not getattr(bad, field)
    assert bad == msgspec.structs.replace(good[0], **{field: getattr(bad, field)}, odd=bad.odd)
    (fact, other) = inventory(found).gpus
    assert str(bad.index) in fact.ids
    assert fact.vram_mb == (0 if field == "vram_mb" else 16384)
    assert other.vram_mb == 16384
    assert "GPU 0: the driver gives no " in str(inventory(found).error)
    assert [entry.error for entry in usage] == [None, None]
    assert usage[0].vram_total_mb == (None if field == "vram_mb" else 16384)


@pytest.mark.parametrize(
    ("function", "field"),
    [
        ("nvmlDeviceGetPowerUsage", "power_w"),
        ("nvmlDeviceGetTemperature", "temperature_c"),
        ("nvmlDeviceGetUtilizationRates", "utilisation_pct"),
    ],
)
def test_a_figure_that_makes_no_sense_is_absent(tmp_path: Path, function: str, field: str) -> None:
    stub = NvmlStub(tmp_path)
    for setting in ({"ones": function}, {"fail": f"{function}:999"}):
        stub.set(**setting)
        with GpuReader(environ=stub.environ) as reader:
            (entry,) = reader.usage(LONG_S)
        assert getattr(entry, field) is None
        assert (entry.error, entry.vram_used_mb) == (None, 512)


def test_what_the_driver_does_not_tell_of_itself_takes_no_card(tmp_path: Path) -> None:
    stub = NvmlStub(
        tmp_path, gpus=2, fail="nvmlSystemGetDriverVersion:999,nvmlSystemGetCudaDriverVersion_v2:999"
    )
    with GpuReader(environ=stub.environ) as reader:
        found = reader.list(LONG_S)
    assert [(info.driver, info.cuda, info.vram_mb) for info in found.gpus] == [("", "", 16384)] * 2


def test_a_number_of_gpus_that_makes_no_sense(tmp_path: Path) -> None:
    with GpuReader(environ=NvmlStub(tmp_path, ones="nvmlDeviceGetCount_v2").environ) as reader:
        assert "cannot find the GPUs: 4294967295 is out of range" in str(reader.list(LONG_S).error)


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({"ones": "nvmlDeviceGetMaxMigDeviceCount"}, 2),
        ({"fail": "nvmlDeviceGetMaxMigDeviceCount:999"}, 2),
        ({"fail": "nvmlDeviceGetMigDeviceHandleByIndex:999"}, 0),
        ({"ones": "nvmlDeviceGetGpuInstanceId,nvmlDeviceGetComputeInstanceId"}, 2),
    ],
)
def test_mig_instances_stand_by_themselves(tmp_path: Path, settings: dict[str, str], parts: int) -> None:
    with GpuReader(environ=NvmlStub(tmp_path, gpus=2, mig=2, **settings).environ) as reader:
        found = reader.list(LONG_S)
        usage = reader.usage(LONG_S)
    assert (found.error, [info.error for info in found.gpus]) == (None, [None, None])
    assert [len(info.mig) for info in found.gpus] == [parts, 0]
    assert found.gpus[1].vram_mb == 16384
    assert len(usage) == parts + 2


def test_unified_memory_is_the_machines(tmp_path: Path) -> None:
    """NVML has no memory to tell of on Grace and Jetson: the card uses the machine's."""
    with GpuReader(environ=NvmlStub(tmp_path, fail="nvmlDeviceGetMemoryInfo:3").environ) as reader:
        (info,) = reader.list(LONG_S).gpus
        (use,) = reader.usage(LONG_S)
    whole = psutil.virtual_memory().total >> 20
    assert (info.vram_mb, info.unified, info.odd) == (whole, True, [])
    assert use.vram_total_mb == whole
    assert 0 < (use.vram_used_mb or 0) <= whole
    assert inventory(gpu.GpuList([info])).gpus[0].unified


def test_a_uuid_that_two_cards_tell_names_neither(tmp_path: Path) -> None:
    with GpuReader(environ=NvmlStub(tmp_path, gpus=2, same=1).environ) as reader:
        found = reader.list(LONG_S)
    assert [fact.ids for fact in inventory(found).gpus] == [("0",), ("1",)]
    assert "another card has the same" in str(inventory(found).error)


def test_the_minor_number_of_a_card_is_also_in_a_file(tmp_path: Path) -> None:
    place = tmp_path / "0000:40:00.0"
    place.mkdir()
    (place / "information").write_text("Model: \t\t NVIDIA L4\nDevice Minor: \t 7\n")
    assert minor_of(tmp_path, "0000:40:00.0") == 7
    assert minor_of(tmp_path, "") is None


def test_output_of_the_library_does_not_disturb(tmp_path: Path) -> None:
    with GpuReader(environ=NvmlStub(tmp_path, noise=1).environ) as reader:
        assert reader.list(LONG_S).error is None


def test_hang_at_start_ends_the_child_in_time(tmp_path: Path) -> None:
    stub = NvmlStub(tmp_path, hang="nvmlInitWithFlags")
    with GpuReader(environ=stub.environ, pause_s=0) as reader:
        began = clock.now()
        found = reader.list(1.0)
        took = clock.now() - began
        pid = ended(reader).pid
        assert "no answer in time" in str(found.error)
        assert not found.missing
        assert 1.0 <= took < 1.0 + GRACE_S
        wait_until_gone(pid)
        stub.set()
        assert reader.list(LONG_S).error is None, "it did not recover"
        assert not psutil.pid_exists(pid), "the killed child was not reaped"


def test_hang_in_a_call_marks_the_known_gpus(tmp_path: Path) -> None:
    stub = NvmlStub(tmp_path, gpus=2, mig=1, hang="nvmlDeviceGetUtilizationRates")
    with GpuReader(environ=stub.environ) as reader:
        found = reader.list(LONG_S)
        pid = child_pid(reader)
        began = clock.now()
        usage = reader.usage(0.3)
        assert clock.now() - began < 0.3 + GRACE_S
        wait_until_gone(pid)
    assert [entry.uuid for entry in usage] == [
        found.gpus[0].uuid,
        found.gpus[0].mig[0].uuid,
        found.gpus[1].uuid,
    ]
    assert all("no answer in time" in str(entry.error) for entry in usage)


def test_a_child_that_cannot_be_killed_is_abandoned_and_stays_the_only_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stub = NvmlStub(tmp_path, hang="nvmlDeviceGetName")
    with GpuReader(environ=stub.environ, pause_s=0) as reader:
        with monkeypatch.context() as patch:
            patch.setattr("subprocess.Popen.kill", lambda child: None)
            reader.list(0.5)
            stuck = psutil.Process(ended(reader).pid)
            began = clock.now()
            assert f"process {stuck.pid} still hangs in the driver" in str(reader.list(LONG_S).error)
            assert clock.now() - began < GRACE_S
            assert stuck.is_running()
        stuck.kill()
        wait_until_gone(stuck.pid)
        stub.set()
        assert reader.list(LONG_S).error is None


@pytest.mark.parametrize("printed", ["no json", '{"gpus": 3}', '{"gpus": [{"index": "x"}]}', "[]", "\\xff"])
def test_garbage_is_an_error_and_ends_the_child(printed: str) -> None:
    script = f"import sys, signal; print('{printed}', flush=True); signal.pause()"
    with GpuReader(command=[sys.executable, "-I", "-c", script]) as reader:
        found = reader.list(LONG_S)
        wait_until_gone(ended(reader).pid)
    assert "cannot ask NVML: the NVML process answered" in str(found.error)
    assert found.gpus == []


def test_endless_output_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "MAX_REPLY_BYTES", 1000)
    script = "import sys\nwhile True: sys.stdout.write('x' * 1000)"
    with GpuReader(command=[sys.executable, "-I", "-c", script]) as reader:
        assert "more than 1000 bytes" in str(reader.list(LONG_S).error)


@pytest.mark.parametrize(
    "command", [["/bin/false"], ["/nonexistent/python"], [sys.executable, "-c", "print(end='{')"]]
)
def test_a_child_that_ends_or_never_starts_is_an_error(command: list[str]) -> None:
    with GpuReader(command=command) as reader:
        found = reader.list(LONG_S)
    assert str(found.error).startswith("cannot ask NVML: ")
    assert not found.missing


def test_a_crash_of_the_library_is_an_error(tmp_path: Path) -> None:
    with GpuReader(environ=NvmlStub(tmp_path, crash="nvmlDeviceGetUUID").environ) as reader:
        assert "the NVML process ended" in str(reader.list(LONG_S).error)


@pytest.mark.parametrize(
    ("fail", "told"),
    [
        ("nvmlInitWithFlags:9", "cannot start NVML: Driver Not Loaded"),
        ("nvmlInitWithFlags:77", "cannot start NVML: an error of the stub"),
        ("nvmlDeviceGetCount_v2:18", "cannot find the GPUs: RM has detected an NVML/RM version mismatch"),
    ],
)
def test_a_broken_driver_is_told(tmp_path: Path, fail: str, told: str) -> None:
    with GpuReader(environ=NvmlStub(tmp_path, fail=fail).environ) as reader:
        found = reader.list(LONG_S)
    assert told in str(found.error)
    assert not found.missing


def test_a_missing_library_is_no_fault_and_not_asked_for_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    time = [1000.0]
    with GpuReader(environ=no_library(tmp_path)) as reader, monkeypatch.context() as patch:
        patch.setattr(clock, "now", lambda: time[0])
        found = reader.list(LONG_S)
        assert found == gpu.GpuList(error=gpu.NO_LIBRARY, missing=True)
        assert reader.usage(LONG_S) == []
        NvmlStub(tmp_path)
        time[0] += 299
        assert reader.list(LONG_S) == found
        assert reader._child is None
        time[0] += 2
        ended(reader).wait(LONG_S)
        assert len(reader.list(LONG_S).gpus) == 1


def test_a_child_that_has_ended_is_reaped_long_before_the_next(tmp_path: Path) -> None:
    with GpuReader(environ=no_library(tmp_path)) as reader:
        reader.list(LONG_S)
        pid = ended(reader).pid
        wait_until(lambda: reader.usage(LONG_S) == [] and not psutil.pid_exists(pid), LONG_S)


def test_the_pause_grows_to_its_limit_and_ends_with_a_success(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    time = [1000.0]
    monkeypatch.setattr(clock, "now", lambda: time[0])
    stub = NvmlStub(tmp_path, fail="nvmlInitWithFlags:9")
    pauses = []
    with GpuReader(environ=stub.environ, pause_s=5, max_pause_s=30) as reader:
        for _ in range(5):
            reader.list(LONG_S)
            pauses.append(reader._not_before - time[0])
            assert reader._child is None
            ended(reader).wait(LONG_S)
            time[0] = reader._not_before
        assert pauses == [5, 10, 20, 30, 30]
        stub.set()
        assert reader.list(LONG_S).error is None
        stub.set(fail="nvmlDeviceGetCount_v2:9")
        reader.close()
        reader.list(LONG_S)
        assert reader._not_before - time[0] == 5


def test_the_child_gets_no_secrets(tmp_path: Path) -> None:
    environ = {**NvmlStub(tmp_path).environ, "MINER_AUTH": "a secret", "PYTHONPATH": "/nonexistent"}
    with GpuReader(environ=environ) as reader:
        assert reader.list(LONG_S).error is None
        seen = psutil.Process(child_pid(reader)).environ()
    # The C locale is coerced by the interpreter itself.
    assert set(seen) - {"LC_CTYPE"} == {"PATH", "LD_LIBRARY_PATH"}


def test_asking_never_loads_nvml_into_this_process(tmp_path: Path) -> None:
    with GpuReader(environ=NvmlStub(tmp_path).environ) as reader:
        assert len(reader.list(LONG_S).gpus) == 1
    assert "pynvml" not in sys.modules
    assert "libnvidia-ml" not in Path("/proc/self/maps").read_text()
