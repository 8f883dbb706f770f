"""What the supervisor is told to run: the slots, how its children begin, and what they do."""

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
    """The slots as a node is to have them, or what is wrong with them.

    Without `specs` they follow from the machine. `users` run their jobs, by slot; empty: not looked up yet.
    `restart` are the keys whose change needs a restart.
    """

    specs: list[SlotSpec]
    users: dict[str, Identity] = {}
    faults: list[str] = []
    restart: list[str] = []


class SlotPlan(Struct, frozen=True):
    """What a slot is to be, and how its worker begins; `problem` says why it cannot be used, if so.

    `adjust` is for a child: it gives the slot's groups their limits behind an adopted worker.
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
    """The node, as far as the supervisor asks: `aitbc_miner.node.Node`.

    `layout` is for the start. A method that is said to be for a child may take its time.
    """

    config: Config
    agent: Keeper[FromAgent]
    heartbeat: Keeper[FromHeartbeat]
    layout: Layout
    book: WorkerBook
    notices: list[str]

    def plan(self, layout: Layout, gpus: list[GpuFact]) -> list[SlotPlan]:
        """Say what each slot is to be.

        Raises:
            MinerError: the layout does not fit this machine.
        """
        ...

    def plan_stray(self, name: str) -> SlotPlan:
        """Plan a slot that is not wanted any more, and in which a worker of an earlier run has a job."""
        ...

    def end_others(self, names: set[str]) -> None:
        """End what runs in the groups of slots that are none of these; for a child."""
        ...

    def read_layout(self) -> Layout:
        """Read the configuration anew; for a child."""
        ...

    def read_history(self, request: Request, memory: int) -> History | Refusal:
        """Write the history that is asked for into `memory`; for a child."""
        ...

    def judge(self, request: Request) -> Judged:
        """Say whether a job may run a command; for a child."""
        ...
