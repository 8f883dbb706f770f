"""What a worker knows of its slot: what it is given, and what it finds out when it sets the slot up."""

from pathlib import Path

from msgspec import Struct

from aitbc_miner.config.settings import Config
from aitbc_miner.runners.interpreter import Interpreter
from aitbc_miner.sandbox.bubblewrap import Sandbox, slot_sandbox
from aitbc_miner.sandbox.users import Identity
from aitbc_miner.slots.cgroups import SlotGroup
from aitbc_miner.slots.spec import SlotSpec
from aitbc_miner.util.limits import ProcessLimits


class Delays(Struct, frozen=True):
    """Seconds: from SIGTERM to SIGKILL; how long killing and reading the rest of the output may take.

    notice: how long a program may be seen dead of SIGTERM before we are told that it should end.
    """

    term_grace: float = 5.0
    kill: float = 10.0
    drain: float = 2.0
    notice: float = 2.0


class SlotContext(Struct, frozen=True):
    """What each job of the slot gets; a new one takes its place when the slot gets other limits.

    Args:
        group_parent: where the slot's cgroup is made; None: there is no cgroup2 to use.
        controllers: of cgroup2, those to use.
        runs_as: the user of the slot's jobs; None: our own.
        service: the user of the agent, who may read what is delivered.
        gpu_env: the variables that show a job its GPU.
        sandboxed: whether jobs get a sandbox; without one they see the machine as it is.
        interpreter: of Python tasks; None: our own.
        devices: of the GPU, see `gpu_view`.
        group: the slot's cgroup, once it is made.
        limits: those that a job's process carries itself.
        enforced: what holds each limit that is asked for.
    """

    config: Config
    spec: SlotSpec
    group_parent: Path | None
    controllers: tuple[str, ...]
    runs_as: Identity | None
    service: Identity | None
    gpu_env: dict[str, str]
    sandboxed: bool = False
    interpreter: Interpreter | None = None
    devices: tuple[Path, ...] = ()
    delays: Delays = Delays()
    group: SlotGroup | None = None
    limits: ProcessLimits = ProcessLimits()
    enforced: dict[str, str] = {}

    @property
    def sandbox(self) -> Sandbox | None:
        """Give the sandbox of the slot's jobs, if they get one."""
        return slot_sandbox(self.config, self.spec, self.runs_as, self.devices) if self.sandboxed else None
