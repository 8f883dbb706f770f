"""logs/exec.log: what a job prints, on disk as it comes, up to a cap; what is cut is marked and counted."""

import os
from collections import deque

from aitbc_miner.jobs import LogInfo

TAIL = 4096
LOG_NAME = "exec.log"


class JobLog:
    """The writing end. Never raises for a full disk: the job's outcome must not depend on its chatter."""

    def __init__(self, logs_fd: int, cap: int) -> None:
        # Appending: a log that is there already belongs to an earlier attempt and stays.
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        self._fd = os.open(LOG_NAME, flags, 0o640, dir_fd=logs_fd)
        self._cap = cap
        self._kept = 0
        self._dropped = 0
        self._cut = False
        self._tail: deque[bytes] = deque()
        self._tail_bytes = 0
        self.disk_full = False

    @property
    def fd(self) -> int:
        """The file's descriptor, to set its owner."""
        return self._fd

    def write(self, data: bytes) -> None:
        """Keep what fits under the cap, count the rest, remember the end."""
        self._remember(data)
        room = max(0, self._cap - self._kept)
        written = self._put(data[:room]) if room else 0
        self._kept += written
        self._dropped += len(data) - written
        if len(data) > room and not self._cut:
            self._cut = True
            self._put(f"\n[log cut here: the cap of {self._cap} bytes is reached]\n".encode())

    def close(self) -> LogInfo:
        """Make the log durable and say what became of it."""
        if self._dropped:
            self._put(f"[{self._dropped} bytes were dropped]\n".encode())
        try:
            os.fsync(self._fd)
        except OSError:
            self.disk_full = True
        size = os.fstat(self._fd).st_size
        os.close(self._fd)
        tail = b"".join(self._tail)[-TAIL:]
        return LogInfo(bytes=size, dropped=self._dropped, tail=tail.decode("utf-8", "replace"))

    def _put(self, data: bytes) -> int:
        try:
            return os.write(self._fd, data)
        except OSError:
            self.disk_full = True
            return 0

    def _remember(self, data: bytes) -> None:
        self._tail.append(data[-TAIL:])
        self._tail_bytes += len(self._tail[-1])
        while self._tail_bytes - len(self._tail[0]) >= TAIL:
            self._tail_bytes -= len(self._tail.popleft())
