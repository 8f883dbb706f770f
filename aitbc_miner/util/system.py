"""Asks the kernel for the boot id and a process's start, and drops privileges."""

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
    """Give the id of this boot; boot-clock times recorded under another id are meaningless."""
    return fs.tried_again(Path("/proc/sys/kernel/random/boot_id").read_text).strip()


def process_start(pid: int) -> int | None:
    """Give the start of a process in clock ticks since boot; None if no process has the pid.

    The kernel reuses pids; pid and start together identify a process within one boot.
    """
    try:
        stat = fs.tried_again(Path(f"/proc/{pid}/stat").read_bytes)
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The second field is the name in parentheses; a process may put spaces and `)` into its name.
    after_name = stat[stat.rindex(b")") + 2 :].split()
    return int(after_name[22 - 3])


def drop_privileges(uid: int, gid: int) -> None:
    """Become this user for good: no further groups, no return to root, no gain by exec, no debugger.

    The caller must be root and have a single thread.

    Raises:
        MinerError: the change failed or could be undone; the process must not go on.
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
    # After the change of user, because the kernel resets the flag at that change.
    prctl(PR_SET_DUMPABLE, 0)


def prctl(option: int, value: int) -> None:
    """Set an option of this process. The manual page prctl.2 lists the options.

    Raises:
        OSError: the kernel refuses the option or its value.
    """
    zero = ctypes.c_ulong(0)
    # prctl is variadic and reads unsigned longs; a plain int would leave the upper half to chance.
    if _LIBC.prctl(option, ctypes.c_ulong(value), zero, zero, zero) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
