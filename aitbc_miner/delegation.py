"""Making the control group that we were started in hand its controllers on, for the limits of the slots.

Only a group without processes may do that, and a service manager starts us in the very group it gives us.
Source: "No Internal Process Constraint" in Documentation/admin-guide/cgroup-v2.rst of the kernel.
"""

from pathlib import Path

from aitbc_miner.cgroup import LIMITS, CgroupError, Group, enable

SUPERVISOR = "supervisor"
"""The leaf that the processes of our own group move into."""
MOVES = 5


def prepare(own: Path) -> None:
    """Make the group that we were started in hand its controllers on to the groups below it.

    A group that does so may hold no processes, so all that are in it move into a leaf of their own.

    Raises:
        CgroupError: they cannot be moved, or the kernel refuses.
    """
    group, leaf = Group(own), Group(own / SUPERVISOR)
    # The root of all groups alone may do both, and only it has no type.
    if group.has("cgroup.type"):
        leaf.create()
        # More than once, for what forks meanwhile leaves its child behind.
        for _ in range(MOVES):
            for pid in group.get_content("procs") or ():
                _move(pid, leaf)
    enable(group, [name for name in LIMITS if name in group.controllers()])


def _move(pid: int, group: Group) -> None:
    try:
        group.write("cgroup.procs", pid)
    except CgroupError as error:
        if not isinstance(error.__cause__, ProcessLookupError):
            raise
