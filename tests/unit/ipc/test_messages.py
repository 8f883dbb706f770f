"""Messages that carry a slot: each key of it must get through a pipe."""

import msgspec

from aitbc_miner.ipc.messages import Retune
from aitbc_miner.slots.spec import IoNice, SlotSpec
from aitbc_miner.supervisor.node_plan import Layout

FULL = SlotSpec(
    name="gpu0",
    kind="gpu",
    gpu="GPU-1",
    cpus=(0, 1),
    cpu_max=50,
    cpu_weight=200,
    memory_max=1 << 30,
    memory_high=1 << 29,
    swap_max=0,
    pids_max=64,
    io_weight=300,
    io_max={"/": {"rbps": 1 << 20}},
    nice=5,
    ionice=IoNice("idle", 0),
    rlimits={"fsize": 1 << 20},
    max_runtime_s=60.0,
    egress="open",
    runners=["cli"],
    env=["LANG"],
    binds=["/opt/models"],
    io_uring=True,
    mems=(0,),
)


def test_the_slot_here_has_each_key_set() -> None:
    plain = SlotSpec(name="", kind="cpu")
    assert [key for key in FULL.__struct_fields__ if getattr(FULL, key) == getattr(plain, key)] == []


def test_a_slot_gets_through_a_pipe_whole() -> None:
    for message in (Retune(FULL), Layout([FULL])):
        assert msgspec.json.decode(msgspec.json.encode(message), type=type(message)) == message
