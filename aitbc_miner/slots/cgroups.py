"""The control groups of a slot.

A group that hands controllers on may hold no processes, so the slot's group has two leaves:

    <slot>/          the slot's share of the machine: its CPUs and weights
        worker/      the worker process, with a little guaranteed memory
        job/         the job alone, with its hard limits: quota, memory, pids, io

A hard limit stops, slows or kills the job. No hard limit applies to the worker, because the worker must still
read the job's log, keep the job's deadline and write the outcome.
"""

from pathlib import Path
from typing import Self

from aitbc_miner.cgroup.group import LIMITS, CgroupError, Group, enable
from aitbc_miner.config.units import format_size
from aitbc_miner.slots.cgroup_limits import limit_job, limit_slot
from aitbc_miner.slots.limits import asked
from aitbc_miner.slots.spec import SlotSpec

WORKER_MEMORY = 32 << 20
"""Bytes that the kernel leaves to the worker when the machine is short of memory; about the worker's size."""


class SlotGroup:
    """The group of a slot with its leaves; the context manager sets the groups up and tears them down."""

    def __init__(self, parent: Path, name: str) -> None:
        self.parent = Group(parent)
        self.slot = Group(parent / name)
        self.worker = Group(parent / name / "worker")
        self.job = Group(parent / name / "job")
        self.held: dict[str, str] = {}
        self._names: list[str] = []
        self._spec: SlotSpec | None = None

    def __enter__(self) -> Self:
        self.setup()
        return self

    def __exit__(self, *_: object) -> None:
        self.teardown()

    def setup(self) -> None:
        """Make the groups, or adopt the groups of an earlier run."""
        for group in (self.slot, self.worker, self.job):
            group.create()

    def empty(self, timeout_s: float = 2.0) -> None:
        """Kill all processes of the slot, and make its groups anew.

        Emptying the groups is not enough. If a process in a group that was once killed forks into a fresh
        group (clone3), the kernel takes the old kill for one during the fork, and kills the new process.

        Raises:
            CgroupError: a process survives SIGKILL; the message names its pid.
        """
        self.slot.kill()
        if not self.slot.wait_empty(timeout_s):
            pids = ", ".join(map(str, self.slot.pids()[:5]))
            raise CgroupError(f"cannot empty {self.slot.path}: process {pids} cannot be killed")
        self.slot.remove(timeout_s)
        self.setup()

    def teardown(self, timeout_s: float = 2.0) -> None:
        """Kill all processes of the slot and remove its groups.

        Raises:
            CgroupError: a process survives SIGKILL (hangs in the kernel).
        """
        self.slot.kill()
        self.slot.remove(timeout_s)

    def renew_job(self, timeout_s: float = 2.0) -> None:
        """Remove `job/` and make it anew with its limits: the counters of the next job begin at zero.

        Raises:
            CgroupError: a process of the last job is still alive.
        """
        self.job.kill()
        self.job.remove(timeout_s)
        self.job.create()
        self._limit_job()

    def enforce(
        self, spec: SlotSpec, available: tuple[str, ...], *, required: frozenset[str] = frozenset()
    ) -> dict[str, str]:
        """Write the slot's limits, each if its controller is usable. May be called again.

        Args:
            spec: the limits of the slot.
            available: the controllers to use; the slot uses those of them that the parent group has.
            required: the limits that only the cgroup may hold; a slot may leave them unset.

        Returns:
            "cgroup" for each of cpu, cpuset, memory, pids and io that the slot sets and the cgroup holds.

        Raises:
            CgroupError: a present controller cannot be used, the kernel refuses a value, or the cgroup cannot
                hold a required limit.
        """
        self._names = self._usable(available)
        for group in (self.parent, self.slot) if self._names else ():
            # The leaves need the controllers as well: for the job's limits and its own counters.
            enable(group, self._names)
        self._limit_slot(spec)
        self._limit_job()
        if lacking := sorted((required & asked(spec)) - self.held.keys()):
            raise CgroupError(
                f"cannot limit {', '.join(lacking)} in {self.slot.path}: the parent cgroup lacks the "
                f"controllers; start the miner with systemd, or set cgroup.mode: auto"
            )
        return self.held

    def adjust(self, spec: SlotSpec, available: tuple[str, ...]) -> str:
        """Change the limits of a running job.

        A `memory_max` below the job's use would kill the job, so it waits for the next job.

        Returns:
            A text about the `memory_max` that waits, or "".

        Raises:
            CgroupError: the kernel refuses a value.
        """
        self._names = self._usable(available)
        used = self.job.memory_current() or 0
        waits = spec.memory_max is not None and spec.memory_max <= used
        self._limit_slot(spec)
        for name in self._names:
            if not (name == "memory" and waits):
                limit_job(self.job, name, spec)
        if not waits or spec.memory_max is None:
            return ""
        limit = f"memory_max {format_size(spec.memory_max)}"
        return f"the running job uses {used >> 20}M, so {limit} applies from the next job on"

    def _usable(self, available: tuple[str, ...]) -> list[str]:
        usable = set(available) & set(self.parent.controllers())
        return [name for name in LIMITS if name in usable]

    def _limit_slot(self, spec: SlotSpec) -> None:
        held = {name for name in self._names if limit_slot(self.slot, name, spec)}
        self.held = dict.fromkeys(sorted(held & asked(spec)), "cgroup")
        if "memory" in self._names:
            # The kernel keeps memory for a group only within the memory.min of the group above.
            for group in (self.slot, self.worker):
                group.memory_min = WORKER_MEMORY
        self._spec = spec

    def _limit_job(self) -> None:
        if self._spec is not None:
            for name in self._names:
                limit_job(self.job, name, self._spec)
        # A job that loses a single process to the OOM killer would hang, or deliver nonsense: kill it whole.
        if self.job.has("memory.oom.group"):
            self.job.memory_oom_group = True


def slot_groups(parent: Path) -> list[Path]:
    """List the groups of slots; groups of a service manager begin with a dot or an underscore."""
    return [path for path in sorted(parent.iterdir()) if path.is_dir() and path.name[0] not in "._"]
