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

    group_parent: None where there is no cgroup2 to use. runs_as: None: jobs run as our own user. service: the
    agent's user. sandboxed: whether jobs get a sandbox; without one they see the machine as it is.
    interpreter: of Python tasks; None: our own. devices: of the GPU (`gpu_view`). From `group` on it is what
    the set-up found: the cgroup, the limits that a job's process carries itself, what holds each limit.
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
