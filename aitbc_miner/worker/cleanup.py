"""Removes the remains of a job: processes of its user outside its cgroup, and named memory.

A job can have cron, at, or a service manager of its user start processes outside its cgroup. Named memory
(shm_open(3), mq_open(3), the segments, semaphores and queues of sysvipc(7)) outlives all processes of the
job, and then counts against no limit.
"""

import contextlib
import ctypes
import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import psutil

from aitbc_miner.cgroup.group import RETRY_S, find_mount
from aitbc_miner.sandbox.users import is_unallocated
from aitbc_miner.util import fs
from aitbc_miner.util.clock import now
from aitbc_miner.util.log import events

NAMED_AT_MOST = 10
IN_MEMORY = (Path("/dev/shm"), Path("/dev/mqueue"))  # noqa: S108  # cleared, not written to
SYSV = Path("/proc/sysvipc")
IPC_RMID = 0

_LIBC = ctypes.CDLL(None, use_errno=True)
_REMOVERS = {
    "shm": lambda number: _LIBC.shmctl(number, IPC_RMID, None),
    "sem": lambda number: _LIBC.semctl(number, 0, IPC_RMID),
    "msg": lambda number: _LIBC.msgctl(number, IPC_RMID, None),
}


def clear_user(uid: int, timeout_s: float) -> list[int]:
    """Kill the processes of a slot's user and remove the user's named memory; each may take `timeout_s`.

    A failed removal is logged, and tried again the next time. An unallocated id (see `processes_of`) keeps
    its processes and memory.

    Returns:
        The processes that are still alive.
    """
    alive = kill_processes_of(uid, timeout_s)
    if not alive and not is_unallocated(uid):
        remove_memory_of(uid, timeout_s)
    return alive


def processes_of(uid: int) -> list[int]:
    """Find the processes of a slot's user on the whole machine; zombies count, as threads may outlive them.

    An unallocated id gives none: another node of the machine may have given the id to its own jobs.
    """
    if is_unallocated(uid):
        return []
    try:
        # This call fails if the user has no process, and takes only microseconds.
        os.getpriority(os.PRIO_USER, uid)
    except ProcessLookupError:
        return []
    return [pid for pid in psutil.pids() if _owner(pid) == uid]


def kill_processes_of(uid: int, timeout_s: float) -> list[int]:
    """Kill the processes of a slot's user; return the processes still alive after `timeout_s`.

    Jobs of another miner with the same user are spared: the operator must decide between the two miners.
    """
    deadline = now() + timeout_s
    while (found := processes_of(uid)) and now() < deadline:
        ours = [pid for pid in found if not _in_some_slot(pid)]
        if not ours:
            break
        for pid in ours:
            with contextlib.suppress(ProcessLookupError), os.fdopen(os.pidfd_open(pid), "rb", 0) as process:
                # Check again while the pidfd is open: another process may have the number by now.
                if _owner(pid) == uid:
                    signal.pidfd_send_signal(process.fileno(), signal.SIGKILL)
        time.sleep(RETRY_S)
    return found


def remove_memory_of(uid: int, timeout_s: float) -> None:
    """Remove a user's named memory, including all files below the user's directories, whoever owns them.

    The user's files in directories of other users are not found.
    """
    deadline = now() + timeout_s
    failed = [
        *_remove_sysv(uid),
        *(each for place in IN_MEMORY for each in _remove_files(place, uid, deadline)),
    ]
    if failed:
        events("worker").error(
            "cannot remove named memory", uid=uid, number=len(failed), errors=failed[:NAMED_AT_MOST]
        )


def named(pids: Sequence[int]) -> str:
    """Write processes and their states into a sentence: "the processes 12 (disk-sleep), 13 (zombie)"."""
    if not pids:
        return ""
    shown = [f"{pid}{_doing(pid)}" for pid in sorted(pids)[:NAMED_AT_MOST]]
    more = f" and {len(pids) - NAMED_AT_MOST} more" if len(pids) > NAMED_AT_MOST else ""
    return f"the process{'es' if len(pids) > 1 else ''} {', '.join(shown)}{more}"


def _in_some_slot(pid: int) -> bool:
    """Whether a process is in the group of some slot's job; no job can make one, and ours is empty by now."""
    mount = find_mount()
    try:
        rows = os.fsdecode(Path(f"/proc/{pid}/cgroup").read_bytes()).split("\n")
        line = next(row for row in rows if row.startswith("0::"))
    except (OSError, StopIteration):
        return False
    group = Path(line.removeprefix("0::"))
    return mount is not None and group.name == "job" and Path(f"{mount.path}/{group.parent}/worker").is_dir()


def _sysv_of(uid: int) -> list[tuple[str, int]]:
    """Find kind and number of a user's SysV objects (as owner or creator) in our IPC namespace."""
    found: list[tuple[str, int]] = []
    for kind in _REMOVERS:
        # Some kernels are built without SysV IPC.
        with contextlib.suppress(FileNotFoundError), (SYSV / kind).open() as file:
            columns = file.readline().split()
            owner, creator = columns.index("uid"), columns.index("cuid")
            rows = map(str.split, file)
            found += [(kind, int(row[1])) for row in rows if str(uid) in {row[owner], row[creator]}]
    return found


def _remove_sysv(uid: int) -> list[str]:
    try:
        if not (found := _sysv_of(uid)):
            return []
        # Remove as the owner: other users need CAP_SYS_ADMIN, which the miner may lack.
        pid = os.fork()
        if pid == 0:
            _remove_as(uid, found)
        os.waitpid(pid, 0)
        return [f"{kind} {number} is still there" for kind, number in _sysv_of(uid)]
    except OSError as error:
        return [f"{SYSV}: {error}"]


def _remove_as(uid: int, found: list[tuple[str, int]]) -> NoReturn:
    try:
        # The kernel checks the effective user. The real user stays root, so that the user cannot signal us.
        os.seteuid(uid)
        for kind, number in found:
            _REMOVERS[kind](number)
    finally:
        # In any case, this copy of the worker must not go on as a second worker.
        os._exit(0)


def _remove_files(place: Path, uid: int, deadline: float) -> list[str]:
    failed = []
    try:
        with fs.directory(place) as at, os.scandir(at) as entries:
            for entry in entries:
                try:
                    _remove(at, entry, uid, deadline)
                except FileNotFoundError:
                    continue  # somebody else removed the file
                except TimeoutError:
                    raise
                except OSError as error:
                    failed.append(f"{place}: {error}")
    except FileNotFoundError:
        return []
    except OSError as error:
        failed.append(f"{place}: {error}")
    return failed


def _remove(at: int, entry: "os.DirEntry[str]", uid: int, deadline: float) -> None:
    if entry.stat(follow_symlinks=False).st_uid != uid:
        return
    fs.check_time(deadline)
    if not entry.is_dir(follow_symlinks=False):
        os.unlink(entry.name, dir_fd=at)
        return
    with fs.directory(entry.name, at=at) as top:
        if os.fstat(top).st_uid != uid:
            return
        fs.empty(top, deadline)
    os.rmdir(entry.name, dir_fd=at)


def _owner(pid: int) -> int | None:
    # Read /proc/<pid>/status: the directory itself belongs to root if the process is not dumpable. psutil
    # takes the first "Uid:", which may be in the name of the process. The kernel escapes line breaks in the
    # name, but no other character at which splitlines() splits.
    try:
        lines = Path(f"/proc/{pid}/status").read_bytes().split(b"\n")
    except OSError:
        return None  # the process has ended
    return next((int(line.split()[1]) for line in lines if line.startswith(b"Uid:")), None)


def _doing(pid: int) -> str:
    try:
        return f" ({psutil.Process(pid).status()})"
    except psutil.Error:
        return ""
