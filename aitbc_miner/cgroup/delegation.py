"""Making a control group hand its controllers on to the groups of the slots below it.

Only a group without processes may do that, and a service manager starts us in the very group it gives us.
Source: "No Internal Process Constraint" in Documentation/admin-guide/cgroup-v2.rst of the kernel.
"""

from pathlib import Path

from aitbc_miner.cgroup.group import LIMITS, CgroupError, Group, enable

LEAF = "_leaf"
"""Where the processes of the group move to. No slot can have a name like this."""
MOVES = 5


def delegate(own: Path) -> dict[str, str]:
    """Make the group hand its controllers on to the groups below it.

    A group that does so may hold no processes, so all that are in it move into a leaf of their own.

    Returns:
        The controllers that cannot be handed on, each with the reason.

    Raises:
        CgroupError: the processes cannot be moved.
    """
    group, leaf = Group(own), Group(own / LEAF)
    # The root of all groups alone may do both, and only it has no type.
    if group.has("cgroup.type"):
        # More than once, for what forks meanwhile leaves its child behind.
        for _ in range(MOVES):
            for pid in group.get_content("procs") or ():
                leaf.create()
                _move(pid, leaf)
    refused: dict[str, str] = {}
    for name in LIMITS:
        # One by one: a single one that is refused (cpu beside real-time processes) costs the others nothing.
        if name in group.controllers():
            try:
                enable(group, [name])
            except CgroupError as error:
                refused[name] = str(error)
    return refused


def _move(pid: int, group: Group) -> None:
    try:
        group.write("cgroup.procs", pid)
    except CgroupError as error:
        if not isinstance(error.__cause__, ProcessLookupError):
            raise
