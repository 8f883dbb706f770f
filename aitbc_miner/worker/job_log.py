"""logs/exec.log: a job's output, written at once, up to a cap. The log marks the cut and counts the rest."""

import errno
import os
import stat
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from aitbc_miner.jobs import LogInfo
from aitbc_miner.slots.spec import MIB
from aitbc_miner.util import fs
from aitbc_miner.worker.hold import JobHold

TAIL = 4096
LOG_NAME = "exec.log"


class JobLog:
    """Writes the log. A full disk raises no error: the job's outcome must not depend on its output.

    `reader` is the group that may read the file.

    Raises:
        OSError: the file cannot be made, or the existing file is not the worker's own.
    """

    def __init__(self, logs_fd: int, cap: int, reader: int | None = None) -> None:
        # Append: an existing log belongs to an earlier attempt and stays.
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        self._fd = os.open(LOG_NAME, flags, 0o640, dir_fd=logs_fd)
        try:
            _refuse_shared(os.fstat(self._fd))
            os.fchmod(self._fd, 0o640)
            if reader is not None:
                os.fchown(self._fd, -1, reader)
        except OSError:
            os.close(self._fd)
            raise
        self._cap = cap
        self._kept = 0
        self._dropped = 0
        self._cut = False
        self._tail: deque[bytes] = deque()
        self._tail_bytes = 0
        self.disk_full = False

    def write(self, data: bytes) -> None:
        """Write data up to the cap, count the rest, remember the end."""
        self._remember(data)
        room = max(0, self._cap - self._kept)
        written = self._put(data[:room]) if room else 0
        self._kept += written
        self._dropped += len(data) - written
        if len(data) > room and not self._cut:
            self._cut = True
            self._put(f"\n[log cut here: the cap of {self._cap} bytes is reached]\n".encode())

    def close(self) -> LogInfo:
        """Make the log durable and give its size, the dropped bytes and its tail."""
        if self._dropped:
            self._put(f"[{self._dropped} bytes were dropped]\n".encode())
        with suppress(OSError):
            fs.tried_again(lambda: os.fsync(self._fd))
        size = fs.tried_again(lambda: os.fstat(self._fd)).st_size
        os.close(self._fd)
        tail = b"".join(self._tail)[-TAIL:]
        return LogInfo(bytes=size, dropped=self._dropped, tail=tail.decode("utf-8", "replace"))

    def _put(self, data: bytes) -> int:
        try:
            # Try only briefly: the worker must look after the job. The log counts dropped bytes.
            return fs.tried_again(lambda: os.write(self._fd, data))
        except OSError as error:
            self.disk_full = self.disk_full or error.errno in fs.FULL
            return 0

    def _remember(self, data: bytes) -> None:
        self._tail.append(data[-TAIL:])
        self._tail_bytes += len(self._tail[-1])
        while self._tail_bytes - len(self._tail[0]) >= TAIL:
            self._tail_bytes -= len(self._tail.popleft())


@contextmanager
def open_log(hold: JobHold) -> Iterator[JobLog]:
    """Hold the job's log; the close fills in `hold.log`."""
    service = hold.slot.service
    cap = hold.slot.config.workspace.max_log_mb * MIB
    with fs.directory("logs", at=hold.job.fd) as logs:
        log = JobLog(logs, cap, service.gid if service else None)
    try:
        yield log
    finally:
        hold.log = log.close()


def _refuse_shared(info: os.stat_result) -> None:
    # A file with a second name may be any file of the machine; another owner could change the file meanwhile.
    if not stat.S_ISREG(info.st_mode) or info.st_nlink != 1 or info.st_uid != os.geteuid():
        raise OSError(errno.EPERM, "not a plain file owned by the worker", LOG_NAME)
