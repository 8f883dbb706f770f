"""The control groups of a slot.

There are two leaves, because a group that hands controllers on may hold no processes:

    <slot>/          what the slot competes with: its CPUs, its weights
        worker/      our process that looks after the job, with some memory that nobody can take
        job/         the job and nothing else, with what it may not exceed: quota, memory, pids, io

At what it may not exceed a job is stopped, slowed or killed, and none of that must ever happen to the worker,
which has to read the job's log, keep its deadline and write its outcome.
"""

from pathlib import Path
from typing import Self

from aitbc_miner.cgroup.group import LIMITS, CgroupError, Group, enable
from aitbc_miner.config.units import format_size
from aitbc_miner.slots.cgroup_limits import limit_job, limit_slot
from aitbc_miner.slots.limits import asked
from aitbc_miner.slots.spec import SlotSpec

WORKER_MEMORY = 32 << 20
"""What the worker keeps of memory while the machine is short of it; about its size."""


class SlotGroup:
    """The group of a slot with its leaves; as a context manager it is set up and torn down."""

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
        """Make the groups, or adopt those that an earlier run has left."""
        for group in (self.slot, self.worker, self.job):
            group.create()

    def empty(self, timeout_s: float = 2.0) -> None:
        """End all that is left in the slot from before, and make its groups anew.

        Not only emptied: the kernel kills what is born (clone3) from a group that was once killed into one
        that was not, for it takes the one's kill for having come in the middle of the birth.

        Raises:
            CgroupError: something survives being killed; the message names it.
        """
        self.slot.kill()
        if not self.slot.wait_empty(timeout_s):
            pids = ", ".join(map(str, self.slot.pids()[:5]))
            raise CgroupError(f"cannot empty {self.slot.path}: process {pids} cannot be killed")
        self.slot.remove(timeout_s)
        self.setup()

    def teardown(self, timeout_s: float = 2.0) -> None:
        """Kill whatever is in the slot and remove its groups.

        Raises:
            CgroupError: something survives being killed (it hangs in the kernel).
        """
        self.slot.kill()
        self.slot.remove(timeout_s)

    def renew_job(self, timeout_s: float = 2.0) -> None:
        """Remove `job/` and make it again with its limits: its counters begin at zero for the next job.

        Raises:
            CgroupError: something of the last job is still alive.
        """
        self.job.kill()
        self.job.remove(timeout_s)
        self.job.create()
        self._limit_job()

    def enforce(
        self, spec: SlotSpec, available: tuple[str, ...], *, required: frozenset[str] = frozenset()
    ) -> dict[str, str]:
        """Write the slot's limits where the controllers for them are there; may be called again.

        Args:
            spec: the limits of the slot.
            available: the controllers to use, of which those are taken that the parent has.
            required: the limits that, if asked for, nothing but the cgroup may hold.

        Returns:
            "cgroup" for each of cpu, cpuset, memory, pids and io that is asked for and now held.

        Raises:
            CgroupError: a controller is there and cannot be used, the kernel refuses a value, or what is
                required cannot be held.
        """
        self._names = self._usable(available)
        for group in (self.parent, self.slot) if self._names else ():
            # The leaves get them too: the job's own limits, and to count it apart from the worker.
            enable(group, self._names)
        held = {name for name in self._names if limit_slot(self.slot, name, spec)}
        self.held = dict.fromkeys(sorted(held & asked(spec)), "cgroup")
        if "memory" in self._names:
            for group in (self.slot, self.worker):
                group.memory_min = WORKER_MEMORY
        self._spec = spec
        self._limit_job()
        if lacking := sorted((required & asked(spec)) - held):
            raise CgroupError(
                f"cannot limit {', '.join(lacking)} in {self.slot.path}: its parent has no such controller; "
                f"start the miner with systemd, or set cgroup.mode: auto"
            )
        return self.held

    def adjust(self, spec: SlotSpec, available: tuple[str, ...]) -> str:
        """Give a running job other limits; what would kill it waits for the next job, and is returned.

        Raises:
            CgroupError: the kernel refuses a value.
        """
        self._names = self._usable(available)
        used = self.job.memory_current() or 0
        waits = spec.memory_max is not None and spec.memory_max <= used
        held = {name for name in self._names if limit_slot(self.slot, name, spec)}
        self.held = dict.fromkeys(sorted(held & asked(spec)), "cgroup")
        for name in self._names:
            if not (name == "memory" and waits):
                limit_job(self.job, name, spec)
        self._spec = spec
        if not waits or spec.memory_max is None:
            return ""
        return (
            f"its job uses {used >> 20}M: memory_max {format_size(spec.memory_max)} holds from the next one"
        )

    def _usable(self, available: tuple[str, ...]) -> list[str]:
        usable = set(available) & set(self.parent.controllers())
        return [name for name in LIMITS if name in usable]

    def _limit_job(self) -> None:
        if self._spec is not None:
            for name in self._names:
                limit_job(self.job, name, self._spec)
        # Half a job that lost one process to the OOM killer would hang, or deliver nonsense.
        if self.job.has("memory.oom.group"):
            self.job.memory_oom_group = True


def slot_groups(parent: Path) -> list[Path]:
    """Give the groups of slots; those of others (a service manager's) begin with a dot or an underscore."""
    return [path for path in sorted(parent.iterdir()) if path.is_dir() and path.name[0] not in "._"]
