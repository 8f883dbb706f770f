"""Groups: against plain directories where only files count, and against the kernel where it must act."""

import contextlib
import itertools
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from aitbc_miner.cgroup import delegation
from aitbc_miner.cgroup.delegation import LEAF, delegate
from aitbc_miner.cgroup.group import CgroupError, CpuUsage, Group, Mount, find_mount, own_group
from aitbc_miner.slots import limits
from aitbc_miner.slots.cgroups import WORKER_MEMORY, SlotGroup
from aitbc_miner.slots.spec import SlotSpec

HYBRID = """\
31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
35 31 0:32 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory
41 31 0:38 / {mount} rw,relatime - cgroup2 cgroup2 rw
"""
UNIFIED = "30 23 0:27 / {mount} rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"


def written(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def test_a_pure_version_2_mount(tmp_path: Path) -> None:
    written(tmp_path / "cgroup.controllers", "cpuset cpu io memory pids\n")
    found = find_mount(written(tmp_path / "mountinfo", UNIFIED.format(mount=tmp_path)))
    assert found
    assert (found.path, found.hybrid) == (str(tmp_path), False)
    assert found.controllers == ("cpuset", "cpu", "io", "memory", "pids")


def test_a_hybrid_mount_without_controllers(tmp_path: Path) -> None:
    mount = tmp_path / "a place"
    mount.mkdir()
    escaped = str(mount).replace(" ", r"\040")
    found = find_mount(written(tmp_path / "mountinfo", HYBRID.format(mount=escaped)))
    assert found
    assert (found.path, found.hybrid, found.controllers) == (str(mount), True, ())


def test_no_version_2_at_all(tmp_path: Path) -> None:
    assert find_mount(written(tmp_path / "mountinfo", HYBRID.splitlines()[1])) is None


def test_a_read_only_mount_is_not_writable(tmp_path: Path) -> None:
    text = UNIFIED.format(mount=tmp_path).replace(" rw,nosuid", " ro,nosuid")
    found = find_mount(written(tmp_path / "mountinfo", text))
    assert found
    assert not found.writable


def test_own_group_is_below_the_mount(tmp_path: Path) -> None:
    mount = Mount("/m", (), hybrid=True, writable=True)
    of = written(tmp_path / "cgroup", "4:memory:/x\n0::/system.slice/a.service\n")
    assert own_group(mount, of) == Path("/m/system.slice/a.service")
    inside = Mount("/m", (), hybrid=False, writable=True, root="/system.slice")
    assert own_group(inside, of) == Path("/m/a.service")


@pytest.mark.parametrize("line", ["4:memory:/x\n", "0::/../outside\n", "0::/elsewhere\n"])
def test_a_group_that_the_mount_does_not_show(tmp_path: Path, line: str) -> None:
    mount = Mount("/m", (), hybrid=False, writable=True, root="/machine")
    with pytest.raises(CgroupError, match="cannot find our own cgroup"):
        own_group(mount, written(tmp_path / "cgroup", line))


def test_counters_of_a_group(tmp_path: Path) -> None:
    group = Group(tmp_path)
    written(tmp_path / "cpu.stat", "usage_usec 3500000\nuser_usec 2500000\nsystem_usec 1000000\n")
    written(tmp_path / "memory.current", "4096\n")
    written(tmp_path / "memory.peak", "8192\n")
    written(tmp_path / "memory.events", "low 0\noom 2\noom_kill 1\n")
    written(tmp_path / "io.stat", "8:0 rbytes=10 wbytes=20 rios=1\n254:0 rbytes=5 wbytes=7 rios=1\n")
    assert group.cpu_usage() == CpuUsage(2.5, 1.0, 3.5)
    assert (group.memory_current(), group.memory_peak()) == (4096, 8192)
    assert group.events("memory.events")["oom_kill"] == 1
    assert group.io_bytes() == (15, 27)


def test_a_group_without_controllers_counts_nothing(tmp_path: Path) -> None:
    group = Group(tmp_path)
    assert group.cpu_usage() is None
    assert (group.memory_current(), group.memory_peak(), group.io_bytes()) == (None, None, None)
    assert group.events("memory.events") == {}
    assert group.controllers() == ()
    assert group.pids() == []
    assert not group.populated()


def test_a_refused_write_names_file_and_value(tmp_path: Path) -> None:
    with pytest.raises(CgroupError) as caught:
        Group(tmp_path).write("memory.max", "lots")
    expected = f"cannot write 'lots' to {tmp_path / 'memory.max'}: No such file or directory"
    assert str(caught.value) == expected
    with pytest.raises(CgroupError, match=r"cannot make cgroup .*/missing/below"):
        Group(tmp_path / "missing/below").create()


LIMIT_FILES = (
    "cpu.max",
    "cpu.weight",
    "cpuset.cpus",
    "cpuset.mems",
    "memory.high",
    "memory.max",
    "memory.swap.max",
    "pids.max",
    "io.weight",
    "io.max",
)
FILES = ("cgroup.subtree_control", "memory.oom.group", "memory.min", *LIMIT_FILES)
ALL = ("cpuset", "cpu", "io", "memory", "pids")


def fake_slot(tmp_path: Path, controllers: tuple[str, ...] = ALL) -> SlotGroup:
    """Lay out plain files as the kernel would; each keeps the last value written, in full or overwritten."""
    slot = SlotGroup(tmp_path, "cpu0")
    slot.setup()
    for group in (slot.parent, slot.slot, slot.job, slot.worker):
        written(group.path / "cgroup.controllers", " ".join(controllers))
        for name in FILES:
            written(group.path / name, "")
    written(tmp_path / "io.cost.qos", "8:0 enable=1 ctrl=auto")
    return slot


SLOT_FILES = ("cpu.weight", "cpuset.cpus", "cpuset.mems", "io.weight")


def limits_of(slot: SlotGroup) -> dict[str, str]:
    """Read each limit where it belongs, having seen that the other group has none of it."""
    values = {}
    for name in LIMIT_FILES:
        holder, other = (slot.slot, slot.job) if name in SLOT_FILES else (slot.job, slot.slot)
        assert (slot.worker.path / name).read_text() == ""
        assert (other.path / name).read_text() == ""
        values[name] = (holder.path / name).read_text().strip()
    return values


def test_enforce_writes_each_limit_on_slot_or_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aitbc_miner.slots.cgroup_limits.disk_of", lambda path: "8:0")
    slot = fake_slot(tmp_path)
    spec = SlotSpec(
        name="cpu0",
        kind="cpu",
        cpus=(0, 1, 2, 5),
        mems=(0, 1),
        cpu_max=250,
        cpu_weight=50,
        memory_max=1 << 30,
        memory_high=1 << 29,
        swap_max=0,
        pids_max=99,
        io_weight=10,
        io_max={"/data": {"wbps": 1000, "riops": 5}},
    )
    assert slot.enforce(spec, ALL) == dict.fromkeys(ALL, "cgroup")
    assert limits_of(slot) == {
        "cpu.max": "250000 100000",
        "cpu.weight": "50",
        "cpuset.cpus": "0-2,5",
        "cpuset.mems": "0-1",
        "memory.high": str(1 << 29),
        "memory.max": str(1 << 30),
        "memory.swap.max": "0",
        "pids.max": "99",
        "io.weight": "default 10",
        "io.max": "8:0 rbps=max wbps=1000 riops=5 wiops=max",
    }
    for group in (slot.parent, slot.slot):
        enabled = (group.path / "cgroup.subtree_control").read_text()
        assert enabled == "+cpu +cpuset +memory +pids +io"
    assert (slot.job.path / "memory.oom.group").read_text() == "1"
    for group in (slot.slot, slot.worker):
        assert (group.path / "memory.min").read_text() == str(WORKER_MEMORY)


def test_a_running_job_gets_other_limits_but_none_that_would_kill_it(tmp_path: Path) -> None:
    slot = fake_slot(tmp_path)
    slot.enforce(SlotSpec(name="cpu0", kind="cpu", memory_max=1 << 30, pids_max=99), ALL)
    written(slot.job.path / "memory.current", str(300 << 20))
    smaller = SlotSpec(name="cpu0", kind="cpu", memory_max=200 << 20, pids_max=88, cpu_weight=777)
    assert slot.adjust(smaller, ALL) == (
        "the running job uses 300M, so memory_max 200M applies from the next job on"
    )
    limits = limits_of(slot)
    assert (limits["memory.max"], limits["pids.max"], limits["cpu.weight"]) == (str(1 << 30), "88", "777")
    assert slot.adjust(SlotSpec(name="cpu0", kind="cpu", memory_max=1 << 31), ALL) == ""
    assert limits_of(slot)["memory.max"] == str(1 << 31)
    assert limits_of(slot)["pids.max"] == "max"


def test_an_io_limit_that_is_gone_is_lifted(tmp_path: Path) -> None:
    slot = fake_slot(tmp_path)
    written(slot.job.path / "io.max", "8:0 rbps=1 wbps=max riops=max wiops=max")
    slot.enforce(SlotSpec(name="cpu0", kind="cpu"), ALL)
    assert limits_of(slot)["io.max"] == "8:0 rbps=max wbps=max riops=max wiops=max"


def test_cpus_that_are_named_no_more_are_all_that_the_parent_has(tmp_path: Path) -> None:
    slot = fake_slot(tmp_path)
    slot.enforce(SlotSpec(name="cpu0", kind="cpu", cpus=(1,)), ALL)
    # The kernel refuses an empty set for a group in which something runs.
    written(slot.parent.path / "cpuset.cpus.effective", "0-3\n")
    slot.adjust(SlotSpec(name="cpu0", kind="cpu"), ALL)
    assert limits_of(slot)["cpuset.cpus"] == "0-3"


def test_enforce_lifts_what_an_older_layout_had_set(tmp_path: Path) -> None:
    slot = fake_slot(tmp_path)
    assert slot.enforce(SlotSpec(name="cpu0", kind="cpu"), ALL) == {}
    assert limits_of(slot) == {
        "cpu.max": "max 100000",
        "cpu.weight": "100",
        "cpuset.cpus": "",
        "cpuset.mems": "",
        "memory.high": "max",
        "memory.max": "max",
        "memory.swap.max": "max",
        "pids.max": "max",
        "io.weight": "default 100",
        "io.max": "",
    }


def test_enforce_takes_only_controllers_that_are_there(tmp_path: Path) -> None:
    spec = SlotSpec(name="cpu0", kind="cpu", cpu_max=100, memory_max=1 << 30, pids_max=9)
    assert fake_slot(tmp_path, ("pids", "hugetlb")).enforce(spec, ALL) == {"pids": "cgroup"}
    assert fake_slot(tmp_path, ALL).enforce(spec, ("memory",)) == {"memory": "cgroup"}
    assert fake_slot(tmp_path, ()).enforce(spec, ALL) == {}


def test_an_io_weight_that_nothing_heeds_is_not_claimed(tmp_path: Path) -> None:
    slot = fake_slot(tmp_path)
    spec = SlotSpec(name="cpu0", kind="cpu", io_weight=5000)
    assert slot.enforce(spec, ALL) == {"io": "cgroup"}
    for off in ("8:0 enable=0 ctrl=auto", ""):
        written(tmp_path / "io.cost.qos", off)
        assert slot.enforce(spec, ALL) == {}
    (tmp_path / "io.cost.qos").unlink()
    assert slot.enforce(spec, ALL) == {}
    # Written all the same, for it can be switched on at any time.
    assert (slot.slot.path / "io.weight").read_text() == "default 5000"
    written(slot.slot.path / "io.bfq.weight", "")
    assert slot.enforce(spec, ALL) == {"io": "cgroup"}
    assert (slot.slot.path / "io.bfq.weight").read_text() == "default 1000"


def test_an_io_limit_on_no_disk_is_an_error_of_the_slot(tmp_path: Path) -> None:
    spec = SlotSpec(name="cpu0", kind="cpu", io_max={"/proc": {"wbps": 1}})
    with pytest.raises(CgroupError, match=r"cannot limit io of /proc: .*not on one disk"):
        fake_slot(tmp_path).enforce(spec, ALL)


def test_each_job_has_the_limits_that_go_with_its_group(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slot = fake_slot(tmp_path)
    spec = SlotSpec(name="cpu0", kind="cpu", memory_max=1 << 30, pids_max=99)
    slot.enforce(spec, ALL)

    def remove(group: Group, timeout_s: float) -> None:
        for name in FILES:
            written(group.path / name, "")

    monkeypatch.setattr(Group, "kill", lambda group: None)
    monkeypatch.setattr(Group, "remove", remove)
    slot.renew_job()
    assert limits_of(slot)["memory.max"] == str(1 << 30)
    assert limits_of(slot)["pids.max"] == "99"
    assert (slot.job.path / "memory.oom.group").read_text() == "1"


def test_what_is_required_is_held_by_the_group_or_refused(tmp_path: Path) -> None:
    required = frozenset({"cpu", "memory", "pids"})
    spec = SlotSpec(name="cpu0", kind="cpu", cpus=(0,), memory_max=1 << 30, pids_max=9)
    whole = fake_slot(tmp_path, ("cpu", "memory", "pids"))
    assert whole.enforce(spec, ALL, required=required) == {"memory": "cgroup", "pids": "cgroup"}
    # Without a quota nothing of cpu is asked for.
    assert fake_slot(tmp_path, ("memory", "pids")).enforce(spec, ALL, required=required)
    message = r"^cannot limit memory, pids in .*/cpu0: the parent cgroup lacks the controllers; start"
    with pytest.raises(CgroupError, match=message):
        fake_slot(tmp_path, ()).enforce(spec, ALL, required=required)


class Kernel:
    """As much of the kernel as `delegate` meets: processes move; a group that has any hands nothing on."""

    def __init__(self, own: Path, monkeypatch: pytest.MonkeyPatch, pids: list[int]) -> None:
        self.own = own
        self.refused: set[object] = set()
        self.enabled: list[object] = []
        self.born: list[int] = []
        self.dead: set[int] = set()
        own.mkdir()
        written(own / "cgroup.type", "domain\n")
        written(own / "cgroup.controllers", "cpu memory pids rdma\n")
        self.has(own, pids)

        def write(group: Group, name: str, value: object) -> None:
            self.write(group, name, value)

        monkeypatch.setattr(Group, "write", write)

    def has(self, path: Path, pids: list[int]) -> None:
        written(path / "cgroup.procs", "".join(f"{pid}\n" for pid in pids))

    def pids(self, path: Path) -> list[int]:
        procs = path / "cgroup.procs"
        return [int(pid) for pid in procs.read_text().split()] if procs.exists() else []

    def write(self, group: Group, name: str, value: object) -> None:
        if name == "cgroup.procs":
            left = [pid for pid in self.pids(self.own) if pid != value]
            self.has(self.own, left + self.born)
            self.born = []
            if value in self.dead:
                raise CgroupError("no such process") from ProcessLookupError()
            self.has(group.path, [*self.pids(group.path), int(str(value))])
        elif self.pids(group.path):
            raise CgroupError(f"cannot write to {group.path}: Device or resource busy")
        elif value in self.refused:
            raise CgroupError(f"cannot write {value!r}: Invalid argument")
        else:
            self.enabled.append(value)


def test_all_processes_make_room_before_controllers_are_handed_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = Kernel(tmp_path / "own", monkeypatch, [10, 11, 12])
    kernel.born = [13]
    kernel.dead = {11}
    for _ in range(2):
        kernel.enabled.clear()
        assert delegate(kernel.own) == {}
        assert kernel.pids(kernel.own) == []
        assert kernel.pids(kernel.own / LEAF) == [10, 12, 13]
        assert kernel.enabled == ["+cpu", "+memory", "+pids"]


def test_the_root_of_all_groups_keeps_its_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Kernel(tmp_path / "own", monkeypatch, [])
    (kernel.own / "cgroup.type").unlink()
    delegate(kernel.own)
    assert not (kernel.own / LEAF).exists()
    assert kernel.enabled == ["+cpu", "+memory", "+pids"]


def test_a_group_that_keeps_its_processes_hands_nothing_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = Kernel(tmp_path / "own", monkeypatch, [10])
    monkeypatch.setattr(delegation, "_move", lambda pid, group: None)
    refused = delegate(kernel.own)
    assert refused.keys() == {"cpu", "memory", "pids"}
    assert refused["cpu"].endswith("Device or resource busy")


def test_a_controller_that_is_refused_costs_the_others_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = Kernel(tmp_path / "own", monkeypatch, [])
    kernel.refused = {"+cpu"}
    assert delegate(kernel.own) == {"cpu": "cannot write '+cpu': Invalid argument"}
    assert kernel.enabled == ["+memory", "+pids"]
    assert not (kernel.own / LEAF).exists()


def test_the_limits_of_the_two_modules_have_the_same_names() -> None:
    spec = SlotSpec(
        name="cpu0", kind="cpu", cpus=(0,), cpu_max=1, memory_max=1 << 20, pids_max=1, io_weight=1
    )
    assert limits.asked(spec) == set(ALL)


# From here on the kernel is asked. A user who may make no groups is told so, and that is then the test.

_numbers = itertools.count()


@pytest.fixture
def parent() -> Iterator[Path | None]:
    """Yield a group of our own to make others in; None where this user may make none."""
    mount = find_mount()
    if mount is None or not mount.writable:
        with pytest.raises(CgroupError, match="cannot make cgroup"):
            Group(Path(mount.path if mount else "/sys/fs/cgroup") / f"aitbc-test-{os.getpid()}").create()
        yield None
        return
    group = Group(own_group(mount) / f"aitbc-test-{os.getpid()}-{next(_numbers)}")
    group.create()
    try:
        yield group.path
    finally:
        group.kill()
        group.remove()
    assert not group.path.exists()


@contextlib.contextmanager
def member(group: Group) -> Iterator[subprocess.Popen[str]]:
    """Run a process in the group that answers SIGTERM with status 42."""
    code = (
        "import signal, sys\nsignal.signal(signal.SIGTERM, lambda *_: sys.exit(42))\n"
        "print('ready', flush=True)\nsignal.pause()"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        try:
            assert process.stdout.readline() == "ready\n"
            group.write("cgroup.procs", process.pid)
            yield process
        finally:
            process.kill()


def test_a_slot_has_two_leaves_and_is_adopted_when_it_is_there(parent: Path | None) -> None:
    if parent is None:
        return
    with SlotGroup(parent, "cpu0") as slot:
        slot.setup()
        assert sorted(path.name for path in slot.slot.path.iterdir() if path.is_dir()) == ["job", "worker"]
    assert not slot.slot.path.exists()


def test_killing_a_group_empties_it(parent: Path | None) -> None:
    if parent is None:
        return
    group = Group(parent / "kill")
    group.create()
    with member(group) as process:
        assert group.pids() == [process.pid]
        assert group.populated()
        assert not group.wait_empty(0)
        with pytest.raises(CgroupError, match=r"cannot remove cgroup .*busy"):
            group.remove(0)
        group.kill()
        assert group.wait_empty(10)
        assert process.wait(10) == -signal.SIGKILL
    group.remove()
    # All of it answers for a group that is gone, too.
    assert group.wait_empty(0)
    assert group.pids() == []
    group.kill()
    group.remove()


def test_killing_without_the_kernels_help(parent: Path | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if parent is None:
        return
    monkeypatch.setattr(Group, "has", lambda self, name: name != "cgroup.kill")
    group = Group(parent / "old")
    group.create()
    with member(group) as one, member(group) as two:
        group.kill()
        assert group.wait_empty(10)
        assert {one.wait(10), two.wait(10)} == {-signal.SIGKILL}
    assert (group.path / "cgroup.freeze").read_text() == "0\n"


def test_a_signal_reaches_groups_below_and_waiting_ends_with_the_last_exit(parent: Path | None) -> None:
    if parent is None:
        return
    group, below = Group(parent / "top"), Group(parent / "top/below")
    group.create()
    below.create()
    with member(below) as process:
        group.signal(signal.SIGTERM)
        assert group.wait_empty(10)
        assert process.wait(10) == 42
    group.remove()
    assert not below.path.exists()


def test_a_new_job_starts_with_counters_at_zero(parent: Path | None) -> None:
    if parent is None:
        return
    with SlotGroup(parent, "cpu0") as slot:
        with member(slot.job):
            slot.renew_job()
        usage = slot.job.cpu_usage()
        assert usage
        assert usage.total_s == 0


def test_without_controllers_nothing_is_claimed(parent: Path | None) -> None:
    if parent is None:
        return
    with SlotGroup(parent, "cpu0") as slot:
        assert slot.enforce(SlotSpec(name="cpu0", kind="cpu", memory_max=1 << 30), ()) == {}
