"""Hands the controllers of a control group on to the groups of the slots below.

Only a group without processes may hand controllers on, but a service manager starts us in the group itself.
Source: "No Internal Process Constraint" in Documentation/admin-guide/cgroup-v2.rst of the kernel.
"""

from pathlib import Path

from aitbc_miner.cgroup.group import LIMITS, CgroupError, Group, enable

LEAF = "_leaf"
"""The group to which the processes move. The name of a slot cannot begin with an underscore."""
MOVES = 5


def delegate(own: Path) -> dict[str, str]:
    """Hand the group's controllers on to the groups below, after moving its processes into a leaf.

    Returns:
        The controllers that cannot be handed on, each with the reason.

    Raises:
        CgroupError: the processes cannot be moved.
    """
    group, leaf = Group(own), Group(own / LEAF)
    # The root cgroup may have processes and hand controllers on; only the root has no cgroup.type.
    if group.has("cgroup.type"):
        # Several times, because a process that forks meanwhile leaves its child behind.
        for _ in range(MOVES):
            for pid in group.get_content("procs") or ():
                leaf.create()
                _move(pid, leaf)
    refused: dict[str, str] = {}
    for name in LIMITS:
        # One by one: a refused controller (cpu, with real-time processes) must not cost the others.
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
