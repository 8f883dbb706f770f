"""Mounts a job's private, bounded file systems; bubblewrap then binds them into the sandbox.

bubblewrap bounds neither the pseudo terminals of a devpts (the machine has some 3,000 for all jobs together)
nor the files of a tmpfs. So the process that becomes bubblewrap first enters a new user and mount namespace,
and mounts the file systems there. No other process sees the mounts, and the kernel removes them with the job.
"""

import ctypes
import os
from pathlib import Path

from aitbc_miner.util.system import PR_SET_DUMPABLE, prctl

PLACE = Path("/dev/pts")
"""The mount point in the new namespace. The mount hides only the machine's terminals, and no workspace."""
PTS, TMP, SHM = PLACE / "pts", PLACE / "tmp", PLACE / "shm"
NO_FILE, NO_DIRECTORY = PLACE / "no-file", PLACE / "no-directory"
"""An empty file and an empty directory, bound over the paths that a job must not see."""

MAX_TERMINALS = 64
# Each file with content takes a page at least.
_BYTES_A_FILE, _MIN_FILES = 4096, 256
# <linux/sched.h>, <sys/mount.h>
_CLONE_NEWNS, _CLONE_NEWUSER = 0x20000, 0x10000000
_NOSUID, _NODEV, _NOEXEC = 2, 4, 8

_LIBC = ctypes.CDLL(None, use_errno=True)


def make_mounts(tmp_bytes: int, shm_bytes: int) -> None:
    """Enter the namespaces and mount `PTS`, `TMP` and `SHM`; for a process with a single thread.

    Afterwards the process is root in its own namespace.

    Raises:
        OSError: users may make no namespaces here.
    """
    uid, gid = os.geteuid(), os.getegid()
    # After a change of user, a process that is not dumpable may not write its own uid_map in /proc.
    prctl(PR_SET_DUMPABLE, 1)
    _done(_LIBC.unshare(_CLONE_NEWUSER | _CLONE_NEWNS), "a namespace")
    own = Path("/proc/self")
    (own / "setgroups").write_text("deny")
    (own / "uid_map").write_text(f"0 {uid} 1")
    (own / "gid_map").write_text(f"0 {gid} 1")
    _mount("tmpfs", PLACE, _NOSUID | _NODEV, "mode=755,size=64k,nr_inodes=16")
    for place in (PTS, TMP, SHM, NO_DIRECTORY):
        place.mkdir()
    NO_FILE.touch()
    terminals = f"newinstance,ptmxmode=0666,mode=620,max={MAX_TERMINALS}"
    _mount("devpts", PTS, _NOSUID | _NOEXEC, terminals)
    for place, size in ((TMP, tmp_bytes), (SHM, shm_bytes)):
        files = max(size // _BYTES_A_FILE, _MIN_FILES)
        _mount("tmpfs", place, _NOSUID | _NODEV, f"mode=1777,size={size},nr_inodes={files}")


def _mount(kind: str, place: Path, flags: int, options: str) -> None:
    done = _LIBC.mount(kind.encode(), bytes(place), kind.encode(), ctypes.c_ulong(flags), options.encode())
    _done(done, f"a {kind}")


def _done(result: int, what: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"cannot make {what}: {os.strerror(number)}")
