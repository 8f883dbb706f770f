"""The requirements of `run` besides users and confinement, also for `check`. Makes and changes nothing.

Each function in NEEDS yields the faults of one key, with their remedies.
"""

import os
import resource
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

from msgspec import Struct
from msgspec.structs import replace

from aitbc_miner.config.settings import MACHINE_ID, Config, derive_node_id, is_machine_id, read_machine_id
from aitbc_miner.errors import MinerError
from aitbc_miner.sandbox.users import Identities
from aitbc_miner.util.trust import distrust_place

ROOM_BYTES, ROOM_INODES = 1 << 20, 64
"""The space for a directory and the first records."""
LINKS = 40
FILES, FILES_PER_SLOT = 64, 8


class RequirementError(MinerError):
    """The machine does not meet a requirement of `run`."""


class NodePlace(Struct, frozen=True):
    """The node whose requirements are checked. `identities`: None if the users are not known."""

    config: Config
    identities: Identities | None
    slots: int


def unmet(place: NodePlace) -> Iterator[tuple[str, str]]:
    """Give the key and the fault of each requirement that this machine does not meet."""
    for key, look in NEEDS:
        yield from ((key, fault) for fault in look(place))


def require(place: NodePlace) -> None:
    """Refuse a start if the machine does not meet all requirements.

    Raises:
        RequirementError: the message lists each fault with its key.
    """
    if faults := [f"{key}: {fault}" for key, fault in unmet(place)]:
        raise RequirementError("; ".join(faults))


def resolved(config: Config) -> Config:
    """Give the configuration with the links in its paths resolved, if root or we own the links.

    Raises:
        RequirementError: another user owns a link, and could change its target later.
    """
    return replace(
        config,
        workspace=replace(config.workspace, root=_resolved("workspace.root", config.workspace.root)),
        queue=replace(config.queue, path=_resolved("queue.path", config.queue.path)),
        control=replace(config.control, socket=_resolved("control.socket", config.control.socket)),
        logging=replace(
            config.logging, path=config.logging.path and _resolved("logging.path", config.logging.path)
        ),
    )


def _resolved(key: str, path: Path) -> Path:
    for _ in range(LINKS):
        link = next((step for step in [*reversed(path.parents), path] if step.is_symlink()), None)
        if link is None:
            return path
        if (owner := link.lstat().st_uid) not in {0, os.geteuid()}:
            raise RequirementError(
                f"{key}: root does not follow the link {link} of user id {owner}; set {key} to its target"
            )
        path = Path(os.path.normpath(link.parent / link.readlink() / path.relative_to(link)))
    raise RequirementError(f"{key}: {path} leads through more than {LINKS} links; set {key} to the target")


def _identity(place: NodePlace) -> Iterator[str]:
    said = read_machine_id()
    if not is_machine_id(said) and place.config.node_id == derive_node_id():
        shown = f"{said[:40]!r}, like on many machines" if said else "missing or empty"
        yield f"{MACHINE_ID} is {shown}; run `systemd-machine-id-setup`, or set node_id to a unique name"


def _workspace(place: NodePlace) -> Iterator[str]:
    root = place.config.workspace.root
    faults = list(_directory(root))
    yield from faults
    there = _existing(root)
    passers = place.identities is not None and bool(place.identities.jobs) and not faults
    for step in [there, *there.parents] if passers else ():
        # The miner itself opens `root` to all users.
        if step != root and not step.stat().st_mode & stat.S_IXOTH:
            yield f"the slots' users cannot pass through {step}; chmod o+x {step}, or name another directory"


def _state(place: NodePlace) -> Iterator[str]:
    path = place.config.queue.path
    yield from _directory(path.parent)
    if path.is_dir():
        yield f"{path} is a directory; name a file in its own directory"
    service = place.identities.service if place.identities else None
    if fault := foreign(path.parent, service.uid if service else None, service.gid if service else None):
        yield fault


def foreign(directory: Path, uid: int | None, gid: int | None) -> str:
    """Give the fault of a directory with files that the service does not own; else an empty text."""
    if uid is None or not directory.is_dir() or directory.stat().st_uid == uid:
        return ""
    if not any(directory.iterdir()):
        return ""
    return (
        f"{directory} has files, and another user owns it; set queue.path to a file in an empty directory, "
        f"or, if the files are the miner's: `chown -R {uid}:{gid} {directory}`"
    )


def _log(place: NodePlace) -> Iterator[str]:
    path = place.config.logging.path
    if path is None:
        return
    yield from _guarded(path)
    if path.is_dir():
        yield f"{path} is a directory; name a file"
    elif not path.parent.is_dir():
        yield f"the directory {path.parent} does not exist; `mkdir -p {path.parent}`, or name another file"
    elif not os.access(path if path.exists() else path.parent, os.W_OK):
        yield f"cannot write {path}; start as another user, or name another file"
    elif not path.exists() and _full(path.parent):
        yield f"the disk of {path} is full; free space there, or name another file"


def _guarded(path: Path) -> Iterator[str]:
    """Yield a fault if another user could replace a file that root reads or writes at this path."""
    try:
        problem = distrust_place(path)
    except OSError as error:
        problem = error.strerror or str(error)
    if problem:
        remedy = "name a path in a directory that only root can change, such as /run/aitbc-miner"
        yield f"cannot trust {path}: {problem}; {remedy}"


def _control(place: NodePlace) -> Iterator[str]:
    path = place.config.control.socket
    yield from _guarded(path)
    yield from _directory(path.parent)
    if path.exists() and not path.is_socket():
        yield f"{path} is not a socket; remove the file, or name another path"


def _files(place: NodePlace) -> Iterator[str]:
    wanted = FILES + FILES_PER_SLOT * place.slots
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if most != resource.RLIM_INFINITY and most < wanted and os.geteuid() != 0:
        yield f"{place.slots} slots need {wanted} open files, but the limit is {most}; raise `ulimit -n`"


NEEDS: tuple[tuple[str, Callable[[NodePlace], Iterator[str]]], ...] = (
    ("node_id", _identity),
    ("workspace.root", _workspace),
    ("queue.path", _state),
    ("logging.path", _log),
    ("control.socket", _control),
    ("slots_dir", _files),
)


def full_disks(config: Config) -> Iterator[tuple[str, str]]:
    """Give key and fault of each full disk. A full disk ends no running node: the node waits for space."""
    for key, path in (("workspace.root", config.workspace.root), ("queue.path", config.queue.path)):
        if _full(there := _existing(path)):
            yield key, f"the disk of {there} is full: the node cannot record jobs; free space or inodes there"


def _directory(path: Path) -> Iterator[str]:
    """Yield the fault of a directory that cannot be used or made."""
    there = _existing(path)
    if not there.is_dir():
        yield f"{there} is not a directory; name another path"
    elif not os.access(there, os.W_OK | os.X_OK):
        yield f"cannot write in {there}; start as another user, or name another path"
    elif there != path and _full(there):
        yield f"cannot make {path}: the disk of {there} is full; free space there, or name another path"


def _existing(path: Path) -> Path:
    return next(step for step in [path, *path.parents] if os.path.lexists(step))


def _full(path: Path) -> bool:
    try:
        disk = os.statvfs(path)
    except OSError:
        return False
    return disk.f_bavail * disk.f_frsize < ROOM_BYTES or (disk.f_files > 0 and disk.f_favail < ROOM_INODES)
