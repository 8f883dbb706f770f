"""What only the kernel can tell or do: which boot this is, which process has a pid, giving up root."""

import ctypes
import os
from pathlib import Path

from aitbc_miner.errors import MinerError
from aitbc_miner.util import fs

# <linux/prctl.h>
PR_SET_PDEATHSIG = 1
PR_SET_DUMPABLE = 4
PR_SET_CHILD_SUBREAPER = 36
PR_SET_NO_NEW_PRIVS = 38

_LIBC = ctypes.CDLL(None, use_errno=True)


def boot_id() -> str:
    """Give the id of this boot; boot times that were recorded under another one mean nothing now."""
    return fs.tried_again(Path("/proc/sys/kernel/random/boot_id").read_text).strip()


def process_start(pid: int) -> int | None:
    """Give when the process started, in clock ticks since boot; None when there is no such process.

    A pid alone may by now belong to somebody else; the pid with its start is a process's name for this boot.
    """
    try:
        stat = fs.tried_again(Path(f"/proc/{pid}/stat").read_bytes)
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The second field is the name in parentheses, and a process may put spaces and `)` into its name.
    after_name = stat[stat.rindex(b")") + 2 :].split()
    return int(after_name[22 - 3])


def drop_privileges(uid: int, gid: int) -> None:
    """Become this user for good: no other groups, no way back, no gain by exec, closed to debuggers.

    For a process of one thread. The caller must be root.

    Raises:
        MinerError: it could not be done, or could be undone; the process must not go on.
    """
    if uid == 0 or gid == 0:
        raise MinerError(f"cannot drop privileges: uid {uid}, gid {gid} is root; name an ordinary user")
    try:
        os.setgroups([])
        os.setresgid(gid, gid, gid)
        os.setresuid(uid, uid, uid)
    except OSError as error:
        raise MinerError(f"cannot drop privileges to uid {uid}, gid {gid}: {error.strerror}") from error
    try:
        os.setuid(0)
    except PermissionError:
        pass
    else:
        raise MinerError(f"cannot drop privileges to uid {uid}: the kernel let us become root again")
    if (os.getresuid(), os.getresgid(), os.getgroups()) != ((uid,) * 3, (gid,) * 3, []):
        raise MinerError(f"cannot drop privileges: uids {os.getresuid()}, gids {os.getresgid()} are left")
    prctl(PR_SET_NO_NEW_PRIVS, 1)
    # After the change of user, because that change sets it anew.
    prctl(PR_SET_DUMPABLE, 0)


def prctl(option: int, value: int) -> None:
    """Set an option of this process. The manual page prctl.2 lists them.

    Raises:
        OSError: the kernel refuses it.
    """
    zero = ctypes.c_ulong(0)
    # prctl is variadic and reads unsigned longs; a plain int would leave the upper half to chance.
    if _LIBC.prctl(option, ctypes.c_ulong(value), zero, zero, zero) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
