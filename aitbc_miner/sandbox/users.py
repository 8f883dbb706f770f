"""Which user runs what: the network's readers as `service_user`, each slot's jobs as a user of its own.

As root, `required` wants those users to exist; `auto` takes numeric ids that belong to nobody instead. As an
ordinary user everything runs as that user (`auto`), or nothing does (`required`).
"""

import grp
import hashlib
import os
import pwd
from collections.abc import Callable, Mapping, Sequence

from msgspec import Struct

from aitbc_miner.errors import MinerError

# systemd's table of ids lists 60578 to 61183 as unused by anybody.
UNALLOCATED = 60600
UNALLOCATED_END = 61183


def is_unallocated(uid: int) -> bool:
    """Whether an id is one that a miner takes where there are no users for it."""
    return UNALLOCATED <= uid < UNALLOCATED_END


class PrivilegeError(MinerError):
    """The users that the configuration asks for are not to be had."""


class Identity(Struct, frozen=True):
    """A user to become; `name` is for people."""

    uid: int
    gid: int
    name: str


class Identities(Struct, frozen=True):
    """Who is who on this node. None: no change of user. `missing` says what is not as it should be."""

    service: Identity | None
    jobs: dict[str, Identity]
    missing: list[str]

    @property
    def probe(self) -> Identity | None:
        """As whom to try out what jobs may do; the slots' own may be known only when the GPUs are."""
        return next(iter(self.jobs.values()), self.service)


def resolve(mode: str, service_user: str, slots: Sequence[str], euid: int | None = None) -> Identities:
    """Find the service's user and each slot's (`aitbc-job-<slot>`).

    Raises:
        PrivilegeError: `mode` is `required` and something is missing; the message has the remedy.
    """
    euid = os.geteuid() if euid is None else euid
    if euid != 0:
        missing = ["not root: jobs run as the same user as the miner and can read what it can"]
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
            f"cannot separate privileges: no such user: {', '.join(absent)}; run tools/install again, "
            f"which makes them, or `useradd --system --user-group NAME`, or set privileges.mode: auto"
        )
    ids = {name: identity for name, identity in found.items() if identity is not None}
    _refuse_shared(ids)
    taken: set[int] = set()
    # Those that have a user keep their number as well, or to create one could shift another's.
    for name in wanted if absent else ():
        spare = _unallocated(name, taken)
        taken.add(spare.uid)
        ids.setdefault(name, spare)
    missing = [f"no user {name}: it runs as the unallocated id {ids[name].uid}" for name in absent]
    jobs = {slot: ids[job_user(slot)] for slot in slots}
    return Identities(service=ids[service_user], jobs=jobs, missing=missing)


def _refuse_shared(ids: Mapping[str, Identity]) -> None:
    """Refuse users that are root or each other: what a slot's user runs is killed between jobs."""
    for name, identity in ids.items():
        if identity.uid == 0 or [other.uid for other in ids.values()].count(identity.uid) > 1:
            whose = "root's" if identity.uid == 0 else "another user's"
            raise PrivilegeError(
                f"cannot separate privileges: the id {identity.uid} of {name} is {whose} as well; "
                f"remove that user, and create it with `useradd --system --user-group {name}`"
            )


def job_user(slot: str) -> str:
    """Name the user that runs a slot's jobs."""
    return f"aitbc-job-{slot}"


def group_of(identity: Identity) -> str:
    """Name a user's group for a command line: by its number where there is none of that name."""
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
    """Give a name an id by its hash: files that it owns stay its own when users or slots come and go."""
    count = UNALLOCATED_END - UNALLOCATED
    start = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]) % count
    for step in range(count):
        number = UNALLOCATED + (start + step) % count
        # As the number of a group it must be nobody's either.
        if number not in taken and not _taken(pwd.getpwuid, number) and not _taken(grp.getgrgid, number):
            return Identity(number, number, name)
    raise PrivilegeError("cannot find an unallocated user id: all are taken; create the users instead")


def _taken(look_up: Callable[[int], object], number: int) -> bool:
    try:
        look_up(number)
    except KeyError:
        return False
    return True
