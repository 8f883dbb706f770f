"""The supervisor's view of the node: the slots to run, and the work of its children."""

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from msgspec import Struct

from aitbc_miner.config.settings import Config
from aitbc_miner.control.protocol import History, Judged, Refusal, Request
from aitbc_miner.gpu.facts import GpuFact
from aitbc_miner.ipc.messages import FromAgent, FromHeartbeat, FromWorker, Retuned
from aitbc_miner.sandbox.users import Identity
from aitbc_miner.slots.placement import Offer
from aitbc_miner.slots.spec import SlotSpec
from aitbc_miner.supervisor.adoption import WorkerBook
from aitbc_miner.supervisor.children import Child, Keeper


class Layout(Struct, frozen=True):
    """The slots that the operator wants, or the `faults` in their files.

    Without `specs` the slots are derived from the machine. `users` run the jobs, by slot; empty: not looked
    up yet. `restart` are the changed keys that take effect after a restart only.
    """

    specs: list[SlotSpec]
    users: dict[str, Identity] = {}
    faults: list[str] = []
    restart: list[str] = []


class SlotPlan(Struct, frozen=True):
    """The wanted state of a slot, and how to start its worker; `problem`: why the slot cannot be used.

    `adjust`, run in a child, changes the limits of the slot's cgroups behind an adopted worker.
    """

    spec: SlotSpec
    offer: Offer
    group: Path | None
    spawn: Callable[[], Child[FromWorker]]
    adjust: Callable[[], Retuned]
    gpu_env: dict[str, str] = {}
    problem: str | None = None
    devices: tuple[Path, ...] = ()


class NodePlan(Protocol):
    """The part of `aitbc_miner.node.Node` that the supervisor uses.

    `layout` holds the slots at the start. Methods marked "for a child" may be slow.
    """

    config: Config
    agent: Keeper[FromAgent]
    heartbeat: Keeper[FromHeartbeat]
    layout: Layout
    book: WorkerBook
    notices: list[str]

    def plan(self, layout: Layout, gpus: list[GpuFact]) -> list[SlotPlan]:
        """Plan each slot.

        Raises:
            MinerError: the layout does not fit this machine.
        """
        ...

    def plan_stray(self, name: str) -> SlotPlan:
        """Plan a removed slot in which a worker of an earlier run still has a job."""
        ...

    def end_others(self, names: set[str]) -> None:
        """Kill the processes in the cgroups of all slots except `names`; for a child."""
        ...

    def read_layout(self) -> Layout:
        """Read the configuration again; for a child."""
        ...

    def read_history(self, request: Request, memory: int) -> History | Refusal:
        """Write the requested history into the memory file `memory`; for a child."""
        ...

    def judge(self, request: Request) -> Judged:
        """Say whether a job may run a command; for a child."""
        ...
