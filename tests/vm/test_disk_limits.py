"""Limits of the disk bite: the rates of a slot, and its weight where another slot wants the disk too."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from aitbc_miner.util.limits import disk_of
from tests.vm.disks import mounted
from tests.vm.machine import STATE, WAIT_S, Machine
from tests.vm.measuring import (
    MIB,
    WINDOW_S,
    finish,
    job_group,
    let_pass,
    log_of,
    note,
    occupy,
    program,
    start,
)
from tools.lib.local_node import wait_until
from tools.mock.bootstrap.records import State

pytestmark = pytest.mark.own_kernel("limits need controllers and a disk")

WRITTEN = 24 * MIB
# Writes the same file again and again, past the page cache, and says when it has been there once.
WRITER = """\
import mmap, os, pathlib, sys
block = mmap.mmap(-1, 1 << 16)
file = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT | os.O_DIRECT, 0o600)
while not pathlib.Path(sys.argv[2]).exists():
    for at in range(0, 4 << 20, len(block)):
        os.pwrite(file, block, at)
    print("written", flush=True)
"""


def copied_mib_s(log: str) -> list[float]:
    """Read what dd says of its speed: bytes by seconds, not its own rounded figure."""
    found = re.findall(r"^(\d+) bytes .* copied, (\S+) s,", log, re.M)
    return [round(int(count) / float(seconds) / MIB, 3) for count, seconds in found]


@pytest.fixture
def scratch(machine: Machine) -> Iterator[Path]:
    """Give a directory on a disk of its own, below what the unit lets jobs write in."""
    with mounted(machine, STATE.parent / "scratch", size="400M") as at:
        at.chmod(0o777)
        yield at


@pytest.mark.one_release("13", "both kernels do the same with io.max")
def test_rates_of_a_disk(scratch: Path, machine: Machine, reports: Path) -> None:
    limits = {"wbps": "2M", "rbps": "3M"}
    start(machine, {"name": "slow", "io_max": {str(scratch): limits}}, {"name": "free"})
    write = f"dd if=/dev/zero of={scratch}/$$ bs=64K count={WRITTEN // (64 << 10)} oflag=direct"
    jobs = occupy(machine, f"{write} && dd if={scratch}/$$ of=/dev/null bs=64K iflag=direct")
    assert {job.state for job in finish(machine, jobs).values()} == {State.DONE}
    rates = {name: copied_mib_s(log_of(machine, jobs[name])) for name in jobs}
    note(reports, "io_max wbps 2M, rbps 3M: MiB/s", rates)
    assert rates["slow"] == pytest.approx([2, 3], rel=0.25)
    assert rates["free"][0] > 2 * rates["slow"][0]
    assert rates["free"][1] > 2 * rates["slow"][1]
    assert "io" not in machine.slot("free").enforced
    assert machine.slot("slow").enforced["io"] == "cgroup"


@pytest.fixture
def weighed(scratch: Path) -> Iterator[Callable[[], None]]:
    """Give a function that has the kernel weigh who uses the scratch disk, and take it for a slow one."""
    number = disk_of(str(scratch))
    cost = {name: Path("/sys/fs/cgroup", f"io.cost.{name}") for name in ("model", "qos")}
    rates = " ".join(f"{way}bps={10 * MIB} {way}seqiops=1000 {way}randiops=1000" for way in "rw")

    def switch() -> None:
        cost["model"].write_text(f"{number} ctrl=user model=linear {rates}")
        # All the time at the speed that the model says.
        cost["qos"].write_text(f"{number} enable=1 ctrl=user min=100 max=100")

    yield switch
    cost["qos"].write_text(f"{number} enable=0")


def test_a_weight_where_a_disk_is_contended(
    scratch: Path, weighed: Callable[[], None], machine: Machine, reports: Path
) -> None:
    start(machine, {"name": "heavy", "io_weight": 300}, {"name": "light", "io_weight": 100})
    # Debian's kernel lets a weight be written that nothing heeds.
    assert (machine.slot_group("heavy") / "io.weight").read_text() == "default 300\n"
    assert machine.slot("heavy").enforced == {"io": "ionice"}
    weighed()
    machine.restart()
    assert machine.slot("heavy").enforced == {"io": "cgroup"}
    stop = machine.marks / "stop"
    jobs = occupy(machine, f"{program(machine, 'writer.py', WRITER)} {scratch}/$$ {stop}")

    def written() -> list[int]:
        return [(job_group(machine, name).io_bytes() or (0, 0))[1] for name in ("heavy", "light")]

    # Not while the files are still being made.
    wait_until(lambda: all("written" in log_of(machine, job_id) for job_id in jobs.values()), WAIT_S, 0.2)
    before = written()
    let_pass(WINDOW_S)
    heavy, light = (end - begin for begin, end in zip(before, written(), strict=True))
    stop.touch()
    note(
        reports,
        "io_weight 300:100",
        {"heavy": heavy / MIB, "light": light / MIB, "ratio": round(heavy / light, 3)},
    )
    assert {job.state for job in finish(machine, jobs).values()} == {State.DONE}
    assert heavy / light == pytest.approx(3, rel=0.25)
