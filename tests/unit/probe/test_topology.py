"""What the machine gives to slots, and how CPUs are divided along cores and NUMA nodes."""

import os
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from aitbc_miner.config.units import format_cpus, parse_cpus
from aitbc_miner.gpu.reader import GpuInfo, GpuList, MigInstance
from aitbc_miner.preflight.check import machine_facts
from aitbc_miner.probe.topology import MachineFacts, NumaNode, read_machine
from aitbc_miner.slots.cpu_layout import Want, cores_of, divide, memory_nodes
from aitbc_miner.slots.derive import derive_slots

G = 1 << 30


class FakeMachine:
    """A sysfs and a procfs with what the kernel of such a machine would show."""

    def __init__(self, root: Path) -> None:
        self.sysfs, self.proc = root / "sys", root / "proc"

    def file(self, path: str, text: object) -> None:
        (self.sysfs.parent / path).parent.mkdir(parents=True, exist_ok=True)
        (self.sysfs.parent / path).write_text(f"{text}\n")

    def cpus(self, cores: Sequence[str], *, offline: Sequence[int] = ()) -> None:
        threads = {cpu: set(parse_cpus(core)) for core in cores for cpu in parse_cpus(core)}
        online = threads.keys() - set(offline)
        self.file("sys/devices/system/cpu/present", format_cpus(threads))
        self.file("sys/devices/system/cpu/online", format_cpus(online))
        for cpu in online:
            siblings = format_cpus(threads[cpu] & online)
            self.file(f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list", siblings)

    def node(self, number: int, cpus: str, kib: int) -> None:
        self.file(f"sys/devices/system/node/node{number}/cpulist", cpus)
        self.file(f"sys/devices/system/node/node{number}/meminfo", f"Node {number} MemTotal:  {kib} kB")

    def read(self, allowed: Sequence[int], group: Path | None = None) -> MachineFacts:
        return read_machine(group, sysfs=self.sysfs, proc=self.proc, allowed=allowed)


@pytest.fixture
def fake(tmp_path: Path) -> FakeMachine:
    return FakeMachine(tmp_path)


def test_two_sockets_with_one_cpu_off(fake: FakeMachine) -> None:
    fake.cpus(["0,4", "1,5", "2,6", "3,7"], offline=[7])
    fake.node(1, "2-3,6", 2048)
    fake.node(0, "0-1,4-5", 1024)
    fake.file("proc/meminfo", "MemTotal:  3072 kB\nHugePages_Total:  0\nSwapTotal:  512 kB")
    fake.file("proc/sys/kernel/pid_max", 32768)
    fake.file("proc/sys/fs/nr_open", 1048576)
    assert fake.read(range(6)) == MachineFacts(
        cpus=(0, 1, 2, 3, 4, 5),
        memory_bytes=3072 << 10,
        offline=(7,),
        barred=(6,),
        cores=((0, 4), (1, 5), (2, 6), (3,)),
        nodes=(NumaNode(0, (0, 1, 4, 5), 1024 << 10), NumaNode(1, (2, 3, 6), 2048 << 10)),
        swap_bytes=512 << 10,
        pid_max=32768,
        nr_open=1048576,
        sysfs=fake.sysfs,
    )


def test_the_cpuset_of_the_slots_group_or_of_the_nearest_above(fake: FakeMachine, tmp_path: Path) -> None:
    fake.cpus(["0", "1", "2", "3"])
    group = tmp_path / "cgroup" / "slots.service" / "node"
    group.mkdir(parents=True)
    (group.parent / "cpuset.cpus.effective").write_text("1-2\n")
    (group.parent.parent / "cpuset.cpus.effective").write_text("0-3\n")
    facts = fake.read([0, 1, 3], group)
    assert (facts.cpus, facts.barred) == ((1,), (0, 2, 3))
    assert fake.read([0, 3], group).cpus == (1, 2)


def test_what_the_driver_says_of_the_gpus() -> None:
    parts = [MigInstance("MIG-1", "1g.5gb", 4864), MigInstance("MIG-2", "1g.5gb", 4864)]
    divided = GpuInfo(0, uuid="GPU-m", mig=parts, mig_enabled=True, numa_node=1)
    facts = machine_facts(GpuList([divided, GpuInfo(1, uuid="GPU-w")]))
    assert facts.gpu_ids == [("MIG-1",), ("MIG-2",), ("GPU-w", "1")]
    assert facts.gpu_nodes == {"GPU-m": 1, "0": 1, "MIG-1": 1, "MIG-2": 1}
    assert facts.gpu_parts == {"GPU-m": ("MIG-1", "MIG-2"), "0": ("MIG-1", "MIG-2")}


def test_nothing_to_read(fake: FakeMachine) -> None:
    facts = fake.read([3, 1])
    assert facts == MachineFacts(cpus=(1, 3), memory_bytes=0, sysfs=fake.sysfs)


def test_this_machine() -> None:
    facts = read_machine()
    assert set(facts.cpus) == os.sched_getaffinity(0)
    assert facts.memory_bytes > G // 8
    assert set(facts.cpus) <= {cpu for core in cores_of(facts.cpus, facts) for cpu in core}
    assert facts.pid_max
    assert facts.nr_open


# --- dividing ----------------------------------------------------------------------------------------------


def machine(
    cores: Sequence[Sequence[int]], nodes: Sequence[Sequence[int]] = (), cpus: Sequence[int] | None = None
) -> MachineFacts:
    numbered = tuple(NumaNode(i, tuple(node), 16 * G) for i, node in enumerate(nodes))
    everything = sorted(cpu for core in cores for cpu in core)
    return MachineFacts(
        cpus=tuple(everything if cpus is None else cpus),
        memory_bytes=32 * G,
        cores=tuple(map(tuple, cores)),
        nodes=numbered,
    )


def shown(wants: Sequence[Want], facts: MachineFacts, free: Sequence[int] | None = None) -> list[str]:
    return [format_cpus(cpus) for cpus in divide(wants, facts.cpus if free is None else free, facts)]


PLAIN = machine([(0,), (1,)])
SMT = machine([(i, i + 4) for i in range(4)])
SOCKETS = machine(
    [(i, i + 16) for i in range(16)],
    [[*range(8), *range(16, 24)], [*range(8, 16), *range(24, 32)]],
)
HYBRID = machine([(0, 1), (2, 3), (4,), (5,), (6,), (7,)])
ANY = Want()


@pytest.mark.parametrize(
    ("facts", "wants", "cpus"),
    [
        (PLAIN, [], []),
        (PLAIN, [ANY], ["0-1"]),
        (PLAIN, [ANY, ANY], ["0", "1"]),
        (PLAIN, [ANY, ANY, ANY], ["0", "1", ""]),
        (PLAIN, [Want(1)], ["0"]),
        (PLAIN, [Want(9), ANY], ["0", "1"]),
        (SMT, [ANY, ANY], ["0-1,4-5", "2-3,6-7"]),
        (SMT, [ANY] * 4, ["0,4", "1,5", "2,6", "3,7"]),
        (SMT, [ANY] * 5, ["0", "4", "1,5", "2,6", "3,7"]),
        (SMT, [Want(3), ANY], ["0-1,4-5", "2-3,6-7"]),
        (SMT, [ANY, Want(1)], ["1-3,5-7", "0,4"]),
        (HYBRID, [ANY] * 4, ["0-1", "2-3", "4-5", "6-7"]),
        (HYBRID, [ANY, ANY], ["0-3", "4-7"]),
        (SOCKETS, [ANY], ["0-31"]),
        (SOCKETS, [ANY, ANY], ["0-7,16-23", "8-15,24-31"]),
        (SOCKETS, [ANY] * 3, ["0-3,16-19", "8-15,24-31", "4-7,20-23"]),
        (SOCKETS, [Want(4), Want(16), ANY], ["8-9,24-25", "0-7,16-23", "10-15,26-31"]),
        (SOCKETS, [Want(20), Want(4)], ["0-9,16-25", "10-11,26-27"]),
        (SOCKETS, [Want(32), ANY], ["0-14,16-30", "15,31"]),
        (SOCKETS, [Want(4, node=1), Want(8)], ["8-9,24-25", "0-3,16-19"]),
        (SOCKETS, [ANY, Want(node=0), Want(node=0)], ["8-15,24-31", "0-3,16-19", "4-7,20-23"]),
        (SOCKETS, [Want(2, node=7)], ["0,16"]),
    ],
)
def test_divisions(facts: MachineFacts, wants: list[Want], cpus: list[str]) -> None:
    assert shown(wants, facts) == cpus


def test_a_want_is_cut_down_rather_than_spread_over_nodes() -> None:
    facts = machine([(i,) for i in range(6)], [[0, 1, 2], [3, 4, 5]])
    assert shown([Want(2)] * 3, facts) == ["0-1", "3-4", "2"]


def test_a_container_that_may_use_three_odd_cpus() -> None:
    facts = machine(SMT.cores, cpus=[1, 5, 6])
    assert shown([ANY, ANY], facts) == ["1,5", "6"]
    assert shown([ANY], facts) == ["1,5-6"]


def test_a_core_of_which_another_slot_has_a_part() -> None:
    assert shown([ANY, ANY], SMT, free=[1, 2, 5, 6, 7]) == ["1,5", "2,6-7"]


@st.composite
def machines(draw: st.DrawFn) -> MachineFacts:
    """A machine whose cores have one or two threads, on up to three nodes, of which some CPUs are usable."""
    sizes = draw(st.lists(st.lists(st.integers(1, 2), min_size=1, max_size=6), min_size=1, max_size=3))
    numbers = iter(draw(st.permutations(range(sum(map(sum, sizes))))))
    nodes = [[tuple(sorted(next(numbers) for _ in range(size))) for size in node] for node in sizes]
    cores = [core for node in nodes for core in node]
    everything = sorted(cpu for core in cores for cpu in core)
    cpus = draw(st.lists(st.sampled_from(everything), unique=True))
    return machine(cores, [sorted(cpu for core in node for cpu in core) for node in nodes], sorted(cpus))


WANTS = st.lists(st.builds(Want, st.none() | st.integers(1, 20), st.none() | st.integers(0, 3)), max_size=8)


@given(machines(), WANTS)
@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_what_holds_for_every_division(facts: MachineFacts, wants: list[Want]) -> None:
    parts = divide(wants, facts.cpus, facts)
    taken = [cpu for part in parts for cpu in part]
    assert divide(wants, reversed(facts.cpus), facts) == parts
    assert len(taken) == len(set(taken))
    assert set(taken) <= set(facts.cpus)
    assert [bool(part) for part in parts] == [i < len(facts.cpus) for i in range(len(wants))]
    cores = cores_of(facts.cpus, facts)
    if len(wants) <= len(cores):
        for core in cores:
            assert sum(bool({*core} & {*part}) for part in parts) <= 1
            assert all({*core} <= {*part} or not {*core} & {*part} for part in parts)
    room = [len({*node.cpus} & {*facts.cpus}) for node in facts.nodes]
    sharers = sum(want.cpus is None for want in wants)
    for want, part in zip(wants, parts, strict=True):
        spans = sum(bool({*node.cpus} & {*part}) for node in facts.nodes) > 1
        assert not (spans and want.cpus is not None and want.cpus <= max(room))
        if want.cpus is not None:
            assert len(part) <= want.cpus + 1
        elif spans and sharers == len(wants):
            assert sum(room) > max(room) * min(len(wants), len(cores) if len(wants) <= len(cores) else 99)


# --- memory ------------------------------------------------------------------------------------------------


def test_memory_comes_from_the_node_of_the_cpus() -> None:
    facts = machine([(i,) for i in range(4)], [[0, 1], [2, 3]])
    slots = [((0, 1), 8 * G), ((2,), 8 * G), ((3,), 8 * G), ((1, 2), G), ((0,), None), ((), G)]
    # Two of 8 GiB are all that the second node has, and the system is there as well.
    assert memory_nodes(slots, facts) == [(0,), None, None, None, None, None]
    assert memory_nodes(slots[:2], facts) == [(0,), (1,)]


def test_one_node_binds_nobody() -> None:
    assert memory_nodes([((0,), G)], machine([(0,), (1,)], [[0, 1]])) == [None]


def test_a_node_without_memory_binds_nobody() -> None:
    nodes = (NumaNode(0, (0,), 16 * G), NumaNode(1, (1,), 0))
    facts = MachineFacts((0, 1), 16 * G, nodes=nodes)
    assert memory_nodes([((0,), G), ((1,), G)], facts) == [(0,), None]


# --- limits of the group that we are in --------------------------------------------------------------------


def held(fake: FakeMachine, mounts: str, groups: str) -> MachineFacts:
    root = fake.sysfs.parent
    fake.cpus(["0", "1", "2", "3", "4", "5", "6", "7"])
    fake.file("proc/meminfo", f"MemTotal:  {16 << 20} kB")
    fake.file("proc/self/mountinfo", mounts.replace("TOP", str(root)))
    fake.file("proc/self/cgroup", groups)
    return fake.read(range(8))


V2 = "30 24 0:26 / TOP/cg rw,nosuid shared:9 - cgroup2 cgroup2 rw"
V1 = (
    "31 24 0:27 / TOP/cg/memory rw - cgroup cgroup rw,memory\n"
    "32 24 0:28 / TOP/cg/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n"
    "33 24 0:29 / TOP/cg/unified rw - cgroup2 cgroup2 rw"
)


def test_the_tightest_limit_up_the_tree_holds(fake: FakeMachine) -> None:
    fake.file("cg/a/memory.max", 4 * G)
    fake.file("cg/a/b/memory.max", "max")
    fake.file("cg/a/b/c/memory.max", 8 * G)
    fake.file("cg/a/cpu.max", "max 100000")
    fake.file("cg/a/b/cpu.max", "250000 100000")
    fake.file("cg/a/b/c/cpu.max", "400000 100000")
    facts = held(fake, V2, "0::/a/b/c")
    assert (facts.memory_bytes, facts.quota, facts.threads) == (4 * G, 2, 2)
    slots = derive_slots(facts)
    assert sum(slot.memory_max or 0 for slot in slots) <= 4 * G
    assert {cpu for slot in slots for cpu in slot.cpus or ()} == {0, 1}


def test_the_group_of_the_slots_holds_them_and_not_ours(fake: FakeMachine) -> None:
    fake.file("cg/ours/memory.max", 1 * G)
    fake.file("cg/slots/memory.max", 3 * G)
    held(fake, V2, "0::/ours")
    assert fake.read(range(8), fake.sysfs.parent / "cg" / "slots").memory_bytes == 3 * G


def test_limits_of_version_1(fake: FakeMachine) -> None:
    fake.file("cg/memory/box/memory.limit_in_bytes", 2 * G)
    fake.file("cg/memory/box/inner/memory.limit_in_bytes", 9223372036854771712)
    fake.file("cg/cpu,cpuacct/box/cpu.cfs_quota_us", 50_000)
    fake.file("cg/cpu,cpuacct/box/cpu.cfs_period_us", 100_000)
    facts = held(fake, V1, "5:memory:/box/inner\n4:cpu,cpuacct:/box\n0::/")
    assert (facts.memory_bytes, facts.threads) == (2 * G, 1)


def test_a_container_sees_its_own_group_as_the_root(fake: FakeMachine) -> None:
    fake.file("cg/memory.max", 1 * G)
    assert held(fake, V2.replace(" / TOP", " /docker/x TOP"), "0::/docker/x").memory_bytes == 1 * G
    assert held(fake, V2.replace(" / TOP", " /../../x TOP"), "0::/").memory_bytes == 1 * G


def test_without_limits_there_is_the_whole_machine(fake: FakeMachine) -> None:
    fake.file("cg/a/memory.max", "max")
    fake.file("cg/cpu.max", "max 100000")
    facts = held(fake, V2, "0::/a")
    assert (facts.memory_bytes, facts.quota, facts.threads) == (16 * G, None, 8)
