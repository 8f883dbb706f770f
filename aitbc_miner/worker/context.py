"""The worker's knowledge of its slot: the configuration, and the results of the set-up."""

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
    """Delays in seconds.

    term_grace: from SIGTERM to SIGKILL. kill: for a kill to succeed. drain: for reading the rest of the
    output. notice: for the order to end a job to arrive after the program's death of SIGTERM.
    """

    term_grace: float = 5.0
    kill: float = 10.0
    drain: float = 2.0
    notice: float = 2.0


class SlotContext(Struct, frozen=True):
    """The settings for each job of the slot; new limits replace the whole struct.

    group_parent: the slots' parent cgroup; None: no usable cgroup2. runs_as: the jobs' user; None: the
    worker's user. service: the agent's user. sandboxed: whether jobs get a sandbox; otherwise they see the
    whole machine. interpreter: the Python of tasks; None: the miner's Python. devices: paths of the GPU
    (`gpu_view`). The set-up fills in group: the slot's cgroup; limits: the limits that a job's process
    carries itself; enforced: the control that holds each limit.
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
        """Give the sandbox of the slot's jobs, if any."""
        return slot_sandbox(self.config, self.spec, self.runs_as, self.devices) if self.sandboxed else None
