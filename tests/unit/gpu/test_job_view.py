"""What a job sees of its card, and who makes the nodes for that."""

import os
from pathlib import Path

import pytest

import aitbc_miner
from aitbc_miner.gpu import devices
from aitbc_miner.gpu.devices import make_nodes
from aitbc_miner.gpu.facts import GpuFact
from aitbc_miner.gpu.job_view import VIEW, devices_of, gpu_view
from aitbc_miner.gpu.reader import GpuReader
from aitbc_miner.sandbox.bubblewrap import ETC, ETC_OF_NETWORK
from aitbc_miner.telemetry.sampling import inventory
from tests.attacks import ATTACKS
from tests.support.nvml_stub import NvmlStub


def test_a_slot_gives_its_job_its_own_card_and_no_other() -> None:
    assert gpu_view(None) == ()
    whole = gpu_view(GpuFact(("GPU-1", "0"), 16000, minor=3, pci_bus_id="0000:01:00.0"))
    assert [path.name for path in devices_of(whole)] == [
        *("nvidia3", "nvidiactl", "nvidia-uvm", "nvidia-uvm-tools"),
    ]
    assert Path("/sys/bus/pci/devices/0000:01:00.0") in whole
    assert Path("/proc/driver/nvidia/gpus/0000:01:00.0") in whole
    part = gpu_view(GpuFact(("MIG-1",), 4864, minor=0, capabilities=(21, 22)))
    assert Path("/dev/nvidia-caps/nvidia-cap22") in part
    assert Path("/dev/nvidia0") in part


def test_each_slot_is_shown_the_card_that_nvml_names(tmp_path: Path) -> None:
    stub = NvmlStub(tmp_path, gpus=2)
    with GpuReader(environ=stub.environ, sysfs=tmp_path) as reader:
        first, second = inventory(reader.list(60.0)).gpus
    places = [Path("/sys/bus/pci/devices/0000:40:00.0"), Path("/sys/bus/pci/devices/0000:41:00.0")]
    assert [place for place in places if place in gpu_view(first)] == places[:1]
    assert [place for place in places if place in gpu_view(second)] == places[1:]


def test_what_a_card_does_not_tell_is_left_out() -> None:
    bare = gpu_view(GpuFact(("GPU-1",), 16000))
    assert not [path for path in bare if "{" in str(path) or "pci" in str(path)]
    assert len(bare) == len([path for path in VIEW if "{" not in path])


# What of the machine tells of others: never shown as a whole.
WHOLE = (
    "/sys",
    "/sys/bus",
    "/sys/bus/pci",
    "/sys/bus/pci/devices",
    "/sys/devices",
    "/dev",
    "/proc/driver/nvidia",
)


def test_nothing_is_shown_that_others_are_in() -> None:
    view = gpu_view(GpuFact(("GPU-1",), 16000, minor=0, capabilities=(1,), pci_bus_id="0000:01:00.0"))
    assert not {str(path) for path in view} & {*WHOLE, "/proc/driver/nvidia/gpus"}


@pytest.fixture
def modprobe(tmp_path: Path) -> Path:
    """Give a program that notes what it is asked for."""
    program = tmp_path / "nvidia-modprobe"
    program.write_text(f'#!/bin/sh\necho "$*" >>{tmp_path}/asked\n[ "$1" != -f ]\n')
    program.chmod(0o755)
    return program


def test_the_nodes_of_all_cards_are_made(modprobe: Path, tmp_path: Path) -> None:
    driver = tmp_path / "driver"
    for minor, place in enumerate(("0000:01:00.0", "0000:82:00.0")):
        (driver / "gpus" / place).mkdir(parents=True)
        text = f"Model: \t\t NVIDIA L4\nDevice Minor: \t {minor}\n"
        (driver / "gpus" / place / "information").write_text(text)
    access = driver / "capabilities/gpu1/mig/gi3/access"
    access.parent.mkdir(parents=True)
    access.touch()
    failed = make_nodes(modprobe, driver)
    assert (tmp_path / "asked").read_text().splitlines() == [
        *("-u -c 0", "-m", "-u -c 0", "-u -c 1", f"-f {access}"),
    ]
    assert failed == [f"{modprobe} -f {access}: exit status 1"]


def test_without_the_program_there_is_nothing_to_make(tmp_path: Path) -> None:
    assert make_nodes(tmp_path / "none", tmp_path) == []
    (tmp_path / "broken").touch()
    assert make_nodes(tmp_path / "broken", tmp_path) == [f"{tmp_path}/broken: Permission denied"]


def test_a_driver_that_hangs_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, modprobe: Path
) -> None:
    hung = tmp_path / "hung"
    os.mkfifo(hung)
    modprobe.write_text(f"#!/bin/sh\nread x <{hung}\n")
    monkeypatch.setattr(devices, "MAKE_S", 0.05)
    assert make_nodes(modprobe, tmp_path) == [f"{modprobe} -u -c 0: no end after 0.05 s"]
    # Left alone, it ends when its wait does.
    hung.write_text("on\n")
    assert devices._ABANDONED.pop().wait(30) == 0


def test_the_documents_have_what_jobs_see_as_it_is() -> None:
    text = (Path(aitbc_miner.__file__).parents[1] / "docs" / "security.md").read_text()
    etc = [(f"`{'` `'.join(names.split())}`", why) for names, why in ETC.items()]
    etc.append((f"`{'` `'.join(ETC_OF_NETWORK.split())}`", "the network, where the slot has one"))
    card = [(f"`{path}`", why) for path, why in VIEW.items()]
    for begin, rows in (("/etc", etc), ("the card", card)):
        lines = ["", "| what | for |", "| --- | --- |", *(f"| {what} | {why} |" for what, why in rows), ""]
        _, _, rest = text.partition(f"<!-- begin of {begin} -->")
        assert rest.partition(f"<!-- end of {begin} -->")[0] == "\n".join(lines)
    for mark, number in (("attacks", len(ATTACKS)), ("biting", sum(each.bites for each in ATTACKS))):
        assert f"<!-- {mark} -->{number}<!-- /{mark} -->" in text
