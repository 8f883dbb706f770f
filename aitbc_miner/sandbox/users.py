"""Finds the users: `service_user` for the processes that read the network, and a user for each slot's jobs.

If the miner starts as root, the mode `required` needs all users to exist; `auto` replaces a missing user by
an unallocated id. If an ordinary user starts the miner, `auto` runs all processes as this user; `required`
refuses.
"""

import grp
import hashlib
import os
import pwd
from collections.abc import Callable, Mapping, Sequence

from msgspec import Struct

from aitbc_miner.errors import MinerError

# systemd's table of ids lists 60578 to 61183 as unused.
UNALLOCATED = 60600
UNALLOCATED_END = 61183


def is_unallocated(uid: int) -> bool:
    """Whether an id is in the range from which the miner replaces missing users."""
    return UNALLOCATED <= uid < UNALLOCATED_END


class PrivilegeError(MinerError):
    """The users of the configuration are missing or cannot be used."""


class Identity(Struct, frozen=True):
    """A user for a process; `name` is for people."""

    uid: int
    gid: int
    name: str


class Identities(Struct, frozen=True):
    """The users of the node; None: no change of user. `missing` has a message for each missing user."""

    service: Identity | None
    jobs: dict[str, Identity]
    missing: list[str]

    @property
    def probe(self) -> Identity | None:
        """A user for trying out the rights of jobs; slots' users may be unknown until the GPUs are known."""
        return next(iter(self.jobs.values()), self.service)


def resolve(mode: str, service_user: str, slots: Sequence[str], euid: int | None = None) -> Identities:
    """Find the service's user and the user of each slot (`aitbc-job-<slot>`).

    Raises:
        PrivilegeError: `mode` is `required` and root or a user is missing, or two names share an id.
    """
    euid = os.geteuid() if euid is None else euid
    if euid != 0:
        missing = ["not root: jobs run as the miner's user and can read all files of the miner"]
        if mode == "required":
            raise PrivilegeError(
                "cannot separate privileges: not started as root; start as root, or set privileges.mode: auto"
            )
        return Identities(service=None, jobs={}, missing=missing)
    wanted = [service_user, *(job_user(slot) for slot in slots)]
    found = {name: _lookup(name) for name in wanted}
    absent = [name for name, identity in found.items() if identity is None]
    if absent and mode == "required":
        raise PrivilegeError(
            f"cannot separate privileges: missing users: {', '.join(absent)}; create them with tools/install "
            f"or `useradd --system --user-group NAME`, or set privileges.mode: auto"
        )
    ids = {name: identity for name, identity in found.items() if identity is not None}
    _refuse_shared(ids)
    taken: set[int] = set()
    # Existing users take a number as well: otherwise a new user would shift the numbers of the others.
    for name in wanted if absent else ():
        spare = _unallocated(name, taken)
        taken.add(spare.uid)
        ids.setdefault(name, spare)
    missing = [f"no user {name}: its processes run as the unallocated id {ids[name].uid}" for name in absent]
    jobs = {slot: ids[job_user(slot)] for slot in slots}
    return Identities(service=ids[service_user], jobs=jobs, missing=missing)


def _refuse_shared(ids: Mapping[str, Identity]) -> None:
    """Refuse root and shared ids: between jobs, the worker kills all processes of its slot's user."""
    for name, identity in ids.items():
        if identity.uid == 0 or [other.uid for other in ids.values()].count(identity.uid) > 1:
            whose = "root's" if identity.uid == 0 else "another user's"
            raise PrivilegeError(
                f"cannot separate privileges: the id {identity.uid} of {name} is {whose} as well; "
                f"remove {name}, and create a new user with `useradd --system --user-group {name}`"
            )


def job_user(slot: str) -> str:
    """Give the name of the user of a slot's jobs."""
    return f"aitbc-job-{slot}"


def group_of(identity: Identity) -> str:
    """Give a user's group for a command line: its name, or its number if the group has no name."""
    try:
        return grp.getgrgid(identity.gid).gr_name
    except KeyError:
        return str(identity.gid)


def _lookup(name: str) -> Identity | None:
    try:
        entry = pwd.getpwnam(name)
    except KeyError:
        return None
    return Identity(entry.pw_uid, entry.pw_gid, name)


def _unallocated(name: str, taken: set[int]) -> Identity:
    """Choose an id by the name's hash: the name keeps its id, and its files, when other slots come and go."""
    count = UNALLOCATED_END - UNALLOCATED
    start = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]) % count
    for step in range(count):
        number = UNALLOCATED + (start + step) % count
        # The number must be free for a user and for a group.
        if number not in taken and not _taken(pwd.getpwuid, number) and not _taken(grp.getgrgid, number):
            return Identity(number, number, name)
    raise PrivilegeError("cannot find an unallocated user id: all are taken; create the users instead")


def _taken(look_up: Callable[[int], object], number: int) -> bool:
    try:
        look_up(number)
    except KeyError:
        return False
    return True
