"""What a process carries itself, and what is said to enforce each limit."""

import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from aitbc_miner.errors import MinerError
from aitbc_miner.slots.limits import FALLBACK_IONICE, asked, plan_limits
from aitbc_miner.slots.spec import IoNice, SlotSpec
from aitbc_miner.util.limits import ProcessLimits, apply, disk_of, rlimit_name

MIB = 1 << 20
FULL = SlotSpec(
    name="cpu0",
    kind="cpu",
    cpus=(0,),
    cpu_max=150,
    memory_max=64 * MIB,
    pids_max=20,
    io_weight=50,
    nice=5,
    ionice=IoNice("best-effort", 6),
    rlimits={"nofile": 64},
)


def plain(**fields: object) -> SlotSpec:
    return SlotSpec(name="cpu0", kind="cpu", **fields)  # type: ignore[arg-type]


def test_asked_leaves_out_what_the_slot_does_not_limit() -> None:
    assert asked(plain()) == frozenset()
    assert asked(plain(cpu_weight=1)) == {"cpu"}
    assert asked(plain(swap_max=0)) == {"memory"}
    assert asked(plain(io_max={"/": {"rbps": 1}})) == {"io"}
    assert asked(FULL) == {"cpu", "cpuset", "memory", "pids", "io"}


def test_nothing_is_left_to_the_process_when_the_cgroup_holds_it_all() -> None:
    limits, enforced = plan_limits(FULL, dict.fromkeys(asked(FULL), "cgroup"), own_user=True)
    assert enforced == dict.fromkeys(("cpu", "cpuset", "memory", "pids", "io"), "cgroup")
    # What the operator wrote for the process itself holds beside the cgroup.
    assert limits == ProcessLimits(
        rlimits={resource.RLIMIT_CORE: 0, resource.RLIMIT_NOFILE: 64}, nice=5, ionice=(2, 6), cpus=None
    )


def test_without_a_cgroup_each_limit_has_its_stand_in() -> None:
    limits, enforced = plan_limits(FULL, {}, own_user=True)
    assert enforced == {
        "cpu": "nice",
        "cpuset": "affinity",
        "memory": "rlimit",
        "pids": "rlimit",
        "io": "ionice",
    }
    assert limits.rlimits[resource.RLIMIT_DATA] == 64 * MIB
    assert limits.rlimits[resource.RLIMIT_NPROC] == 20
    assert resource.RLIMIT_AS not in limits.rlimits
    assert limits.cpus == (0,)


def test_what_nothing_can_hold_is_reported_as_none() -> None:
    spec = plain(pids_max=20, memory_high=MIB, cpu_max=50, nice=0)
    limits, enforced = plan_limits(spec, {}, own_user=False)
    assert enforced == {"pids": "none", "memory": "none", "cpu": "none"}
    assert limits.rlimits == {resource.RLIMIT_CORE: 0}


def test_a_mixture_of_cgroup_and_stand_ins() -> None:
    _, enforced = plan_limits(FULL, {"memory": "cgroup", "pids": "cgroup"}, own_user=False)
    assert enforced == {
        "cpu": "nice",
        "cpuset": "affinity",
        "memory": "cgroup",
        "pids": "cgroup",
        "io": "ionice",
    }


def test_the_stricter_of_two_limits_on_one_thing_wins() -> None:
    strict, _ = plan_limits(plain(memory_max=8 * MIB, rlimits={"data": 4 * MIB}), {}, own_user=True)
    loose, _ = plan_limits(plain(memory_max=8 * MIB, rlimits={"data": 16 * MIB}), {}, own_user=True)
    assert strict.rlimits[resource.RLIMIT_DATA] == 4 * MIB
    assert loose.rlimits[resource.RLIMIT_DATA] == 8 * MIB


def test_io_priority_without_and_with_a_wish_for_it() -> None:
    assert plan_limits(plain(io_weight=10), {}, own_user=True)[0].ionice == FALLBACK_IONICE
    assert plan_limits(plain(), {}, own_user=True)[0].ionice is None
    # The idle class has no levels, and the kernel refuses one.
    assert plan_limits(plain(ionice=IoNice("idle", 4)), {}, own_user=True)[0].ionice == (3, 0)


def test_a_core_file_is_written_only_on_request() -> None:
    assert plan_limits(plain(), {}, own_user=True)[0].rlimits == {resource.RLIMIT_CORE: 0}
    assert plan_limits(plain(rlimits={"core": MIB}), {}, own_user=True)[0].rlimits == {
        resource.RLIMIT_CORE: MIB
    }


def in_child(code: str) -> subprocess.CompletedProcess[str]:
    """Run code that changes the limits of its own process, which no test may do to the test run."""
    prelude = (
        "import os, resource, psutil\nfrom aitbc_miner.util.limits import *\n"
        "from aitbc_miner.errors import MinerError\n"
    )
    root = Path(__file__).parents[3]
    return subprocess.run(
        [sys.executable, "-c", prelude + code],
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


def test_apply_sets_everything() -> None:
    done = in_child(
        "apply(ProcessLimits(rlimits={resource.RLIMIT_NOFILE: 64, resource.RLIMIT_CORE: 0},"
        " nice=19, ionice=(2, 6), cpus=(min(os.sched_getaffinity(0)),)))\n"
        "print(resource.getrlimit(resource.RLIMIT_NOFILE), resource.getrlimit(resource.RLIMIT_CORE),"
        " os.getpriority(os.PRIO_PROCESS, 0), tuple(map(int, psutil.Process().ionice())),"
        " len(os.sched_getaffinity(0)))"
    )
    assert (done.stdout, done.stderr) == ("(64, 64) (0, 0) 19 (2, 6) 1\n", "")


@pytest.mark.parametrize(
    ("limits", "named"),
    [
        (ProcessLimits(cpus=(4095,)), "cannot limit cpuset to (4095,)"),
        (ProcessLimits(ionice=(2, 99)), "cannot limit ionice to (2, 99)"),
        (ProcessLimits(rlimits={resource.RLIMIT_FSIZE: 2**70}), f"cannot limit fsize to {2**70}"),
        (ProcessLimits(rlimits={999: 1}), "cannot limit 999 to 1"),
    ],
)
def test_a_limit_that_cannot_be_set_is_named(limits: ProcessLimits, named: str) -> None:
    with pytest.raises(MinerError) as caught:
        apply(limits)
    assert str(caught.value).startswith(named)


DROP = "if os.geteuid() == 0:\n    os.setgid(65534); os.setuid(65534)\n"


def test_an_ordinary_user_keeps_to_the_hard_limit_it_was_given() -> None:
    done = in_child(
        "resource.setrlimit(resource.RLIMIT_NOFILE, (100, 100))\n"
        + DROP
        + "apply(ProcessLimits(rlimits={resource.RLIMIT_NOFILE: 5000}))\n"
        "print(resource.getrlimit(resource.RLIMIT_NOFILE))"
    )
    assert (done.stdout, done.stderr) == ("(100, 100)\n", "")


def test_an_ordinary_user_started_under_nice_stays_there() -> None:
    done = in_child("os.nice(7)\n" + DROP + "apply(ProcessLimits(nice=3))\nprint(os.nice(0) >= 7)")
    assert (done.stdout, done.stderr) == ("True\n", "")


def test_rlimit_names_are_those_of_slots_d() -> None:
    assert rlimit_name(resource.RLIMIT_NOFILE) == "nofile"
    assert rlimit_name(999) == "999"


def fake_disk(sysfs: Path, path: Path, *, partition: bool) -> None:
    number = path.stat().st_dev
    disk = sysfs / "devices/sda"
    device = disk / "sda1" if partition else disk
    device.mkdir(parents=True)
    (disk / "dev").write_text("8:0\n")
    if partition:
        (device / "partition").write_text("1\n")
        (device / "dev").write_text("8:1\n")
    (sysfs / "dev/block").mkdir(parents=True)
    (sysfs / "dev/block" / f"{os.major(number)}:{os.minor(number)}").symlink_to(device)


@pytest.mark.parametrize("partition", [True, False])
def test_io_limits_name_the_whole_disk(tmp_path: Path, partition: bool) -> None:
    fake_disk(tmp_path / "sys", tmp_path, partition=partition)
    assert disk_of(str(tmp_path), tmp_path / "sys") == "8:0"


def test_a_path_that_is_on_no_disk_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="not on one disk"):
        disk_of("/proc", tmp_path)
    with pytest.raises(FileNotFoundError):
        disk_of(str(tmp_path / "missing"))


# Held by the process itself, or no limit of what the job uses.
NOT_OF_THE_CGROUP = {
    *("name", "kind", "gpu", "mems", "nice", "ionice", "rlimits", "max_runtime_s"),
    *("egress", "runners", "env", "binds", "io_uring"),
}
SAMPLES: dict[str, Any] = {"cpus": (0,), "io_max": {"/": {"rbps": 1 << 20}}}


@pytest.mark.parametrize("name", [field.name for field in msgspec.structs.fields(SlotSpec)])
def test_each_limit_of_a_slot_belongs_to_a_controller(name: str) -> None:
    spec = SlotSpec(
        **(
            {"name": "cpu0", "kind": "cpu"}
            | ({} if name in NOT_OF_THE_CGROUP else {name: SAMPLES.get(name, 1)})
        )
    )
    assert bool(asked(spec)) == (name not in NOT_OF_THE_CGROUP)
