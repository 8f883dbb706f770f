"""File locks that name their holder; only the holder's user can open a lock file.

The kernel releases a lock when its process ends. A child must not inherit a lock.
"""

import contextlib
import fcntl
import hashlib
import os
import stat
import time
from pathlib import Path

from aitbc_miner.errors import MinerError
from aitbc_miner.util import clock, fs

ROOTS = Path("/run/aitbc-miner/locks")
# A killed process may have a child that inherited the lock and is about to close it.
PATIENCE_S = 1.0
MAX_TEXT = 1000


class HeldError(MinerError):
    """Another process has the lock."""


def lock_directory() -> Path:
    """Give the directory of this user's locks."""
    uid = os.geteuid()
    own = Path(f"/run/user/{uid}")
    if uid == 0:
        return ROOTS
    return own / "aitbc-miner" if own.is_dir() else Path(f"/tmp/aitbc-miner-{uid}")  # noqa: S108  # `take` checks its owner


class Locks:
    """All locks of this process; `says` identifies this process to others: pid, start, configuration."""

    def __init__(self, says: str, directory: Path | None = None) -> None:
        self._says = says
        self._directory = directory or lock_directory()
        self._held: dict[str, int] = {}

    def take(self, what: str, remedy: str, patience_s: float = PATIENCE_S) -> None:
        """Take the lock on `what`, a unique name, unless this process has the lock already.

        Raises:
            HeldError: another process has the lock; the message names the process and ends with `remedy`.
            OSError: the lock file cannot be made.
        """
        if what in self._held:
            return
        self._directory.parent.mkdir(mode=0o750, parents=True, exist_ok=True)
        self._directory.mkdir(mode=0o700, exist_ok=True)
        with fs.directory(self._directory) as at:
            found = os.fstat(at)
            if found.st_uid != os.geteuid() or stat.S_IMODE(found.st_mode) & 0o077:
                raise HeldError(
                    f"cannot lock {what}: others may open {self._directory}; remove this directory"
                )
            name = hashlib.sha256(what.encode()).hexdigest()[:32]
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
            file = os.open(name, flags, 0o600, dir_fd=at)
        if not _flock(file, clock.now() + patience_s):
            holder = os.pread(file, MAX_TEXT, 0).decode("utf-8", "replace")
            os.close(file)
            raise HeldError(f"cannot use {what}: another miner uses it ({holder}); {remedy}")
        os.ftruncate(file, 0)
        os.pwrite(file, self._says.encode()[:MAX_TEXT], 0)
        self._held[what] = file

    def close(self) -> None:
        """Release all locks."""
        while self._held:
            os.close(self._held.popitem()[1])


def _flock(file: int, deadline: float) -> bool:
    while True:
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        if clock.now() >= deadline:
            return False
        time.sleep(0.05)
