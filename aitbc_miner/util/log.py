"""Writes log lines, as JSON for journald and tools or as text on a terminal, and masks secrets in them."""

import contextlib
import json
import logging
import math
import os
import select
import socket
import stat
import sys
from collections import deque
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, TextIO

from aitbc_miner.util import clock

MASK = "****"
# Masking a shorter secret would also mask ordinary words.
MIN_SECRET = 4
MAX_SECRETS = 8
BACKLOG_BYTES = 256 << 10
"""The bound on unread log lines; beyond it the handler drops the oldest lines."""


class EventLog(logging.LoggerAdapter[logging.Logger]):
    """A logger for events: the message is the event's name, the keywords are the event's attributes."""

    def __init__(self, logger: logging.Logger, **context: str | None) -> None:
        super().__init__(logger, {key: value for key, value in context.items() if value is not None})

    def process(self, msg: object, kwargs: Any) -> tuple[object, Any]:
        """Move the keywords into the record's `attrs`."""
        passed = {key: kwargs.pop(key) for key in ("exc_info", "stack_info") if key in kwargs}
        context = dict(self.extra or {})
        attrs = {key: value for key, value in {**context, **kwargs}.items() if value is not None}
        return msg, {**passed, "extra": {"attrs": attrs}}


def events(part: str, **context: str | None) -> EventLog:
    """Give the logger of one part of the node (`supervisor`, `agent`, …)."""
    return EventLog(logging.getLogger(f"aitbc_miner.{part}"), **context)


class Formatter(logging.Formatter):
    """Makes one line of an event: `ts level node_id job_id slot event attrs`, as JSON or as text."""

    FIRST: ClassVar[tuple[str, ...]] = ("job_id", "slot")

    def __init__(self, node_id: str, *, as_json: bool, secrets: Iterable[str] = ()) -> None:
        super().__init__()
        self._node_id = node_id
        self._as_json = as_json
        self._secrets: list[str] = []
        self._masked_forms: list[str] = []
        for secret in secrets:
            self.add_secret(secret)

    def add_secret(self, secret: str) -> None:
        """Mask this value from now on: the first secret for good, of later secrets the newest few."""
        if len(secret) < MIN_SECRET or secret in self._secrets:
            return
        # The first secret is the operator's token; the coordinator replaces node tokens again and again.
        first, later = self._secrets[:1], self._secrets[1:]
        self._secrets = [*first, *[*later, secret][1 - MAX_SECRETS :]] if first else [secret]
        # The longest form first, because a secret may begin with a shorter secret.
        forms = {form for known in self._secrets for form in _forms(known)}
        self._masked_forms = sorted(forms, key=len, reverse=True)

    def format(self, record: logging.LogRecord) -> str:
        """Make the line; a traceback becomes an attribute, so that the record stays on one line."""
        attrs = dict(getattr(record, "attrs", {}))
        if record.exc_info:
            attrs["traceback"] = self.formatException(record.exc_info)
        part = record.name.removeprefix("aitbc_miner.")
        first = {key: attrs.pop(key) for key in self.FIRST if key in attrs}
        head = {"ts": clock.wall(), "level": record.levelname.lower(), "node_id": self._node_id}
        rest = {"part": part, "event": record.getMessage(), "attrs": attrs}
        if self._as_json:
            # Masked before the encoding, so that no secret can break the JSON.
            line = head | first | rest
            return json.dumps({key: _plain(value, self._mask) for key, value in line.items()})
        return self._mask(_text(head, first, rest))

    def _mask(self, text: str) -> str:
        for form in self._masked_forms:
            text = text.replace(form, MASK)
        return text


def _forms(secret: str) -> set[str]:
    """Give the forms of a secret in a line: plain, as in a traceback, and each of both inside JSON."""
    plain = {secret, repr(secret)[1:-1]}
    shown = plain | {_printable(form) for form in plain}
    return shown | {json.dumps(form)[1:-1] for form in shown}


def _text(head: dict[str, str], first: dict[str, Any], rest: dict[str, Any]) -> str:
    where = " ".join(str(value) for value in first.values())
    attrs = " ".join(f"{key}={value}" for key, value in rest["attrs"].items())
    begin = f"{head['ts'][11:]} {head['level'].upper():<7} {rest['part']:<10} {where:<12}"
    return _printable(f"{begin} {rest['event']} {attrs}".rstrip())


def _plain(value: object, mask: Callable[[str], str]) -> object:
    """Turn any value into a value for JSON, so that an odd value never costs the line; `mask` its texts."""
    if isinstance(value, dict):
        return {mask(str(key)): _plain(item, mask) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item, mask) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, int | float | None) else mask(str(value))


def _printable(text: str) -> str:
    """Escape characters that would end the line, move the cursor, or cannot be encoded."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


class PatientHandler(logging.Handler):
    """Writes to a pipe or socket without waiting for its reader; keeps unsent lines, then drops the oldest.

    send: writes a part of the given bytes and gives the number, or raises BlockingIOError.
    close: closes `fd`, which the handler owns.
    """

    def __init__(self, fd: int, send: Callable[[bytes], int], close: Callable[[], None]) -> None:
        super().__init__()
        self.fd = fd
        self._send = send
        self._close = close
        self._pid = os.getpid()
        # Each line with the number of lines lost if it is dropped. The first line may be partly written.
        self._waiting: deque[tuple[bytes, int]] = deque()
        self._size = 0
        self._begun = False
        self._dropped = 0

    def emit(self, record: logging.LogRecord) -> None:
        """Write the line, or keep the line for later."""
        try:
            if self._pid != os.getpid():
                # After a fork the parent writes the lines that waited at the fork.
                self._pid = os.getpid()
                self._forget()
            line = self._encode(record)
            self._waiting.append((line, 1))
            self._size += len(line)
            while self._size > BACKLOG_BYTES and len(self._waiting) > self._begun:
                self._drop()
            self._drain()
        except Exception:  # noqa: BLE001  # as every handler does: a failing log must not end the process
            self.handleError(record)

    def flush(self) -> None:
        """Write the waiting lines as far as the pipe has room."""
        if self._pid == os.getpid():
            try:
                self._drain()
            except OSError:
                return  # the reader is gone

    def close(self) -> None:
        """Close the descriptor and lose the waiting lines."""
        super().close()
        self._close()

    def _encode(self, record: logging.LogRecord) -> bytes:
        return f"{self.format(record)}\n".encode("utf-8", "backslashreplace")

    def _drop(self) -> None:
        # The rest of a partly written line must follow, else two lines would become one.
        line, stands_for = self._waiting[self._begun]
        del self._waiting[self._begun]
        self._size -= len(line)
        self._dropped += stands_for

    def _drain(self) -> None:
        while self._waiting:
            if self._dropped and not self._begun:
                self._confess()
            line, stands_for = self._waiting[0]
            try:
                sent = self._send(line[: select.PIPE_BUF])
            except BlockingIOError:
                return
            except OSError:
                self._forget()
                raise
            self._size -= sent
            self._begun = sent < len(line)
            if self._begun:
                self._waiting[0] = (line[sent:], stands_for)
            else:
                self._waiting.popleft()

    def _confess(self) -> None:
        """Put a notice about the dropped lines before the next line; both are written or dropped together."""
        record = logging.makeLogRecord(
            {
                "name": "aitbc_miner.log",
                "levelname": "WARNING",
                "msg": f"{self._dropped} log lines were dropped",
                "attrs": {"reason": "the reader of the log is too slow"},
            }
        )
        notice = self._encode(record)
        line, stands_for = self._waiting[0]
        self._waiting[0] = (notice + line, stands_for + self._dropped)
        self._size += len(notice)
        self._dropped = 0

    def _forget(self) -> None:
        self._waiting.clear()
        self._size = self._dropped = 0
        self._begun = False


class FileHandler(logging.FileHandler):
    """Writes to a file; if the file is renamed or removed, opens a new file of the same name.

    A child that became another user may not open the file, and gets the file from its parent over a socket.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path, encoding="utf-8", errors="backslashreplace")
        self.inbox: socket.socket | None = None
        self.heirs: list[socket.socket] = []
        self._uid = os.geteuid()
        self._fd: int = self.stream.fileno()  # type: ignore[union-attr]  # without `delay` the file is open

    def emit(self, record: logging.LogRecord) -> None:
        """Write the line into the file that has the name at present."""
        self.flush()
        super().emit(record)

    def flush(self) -> None:
        """Change to the file that has the name at present; if opening it fails, keep the old file."""
        with contextlib.suppress(OSError):
            if self.stream is None:
                return
            if self.inbox is not None:
                # If this process has no descriptor left, the message arrives without a descriptor.
                with contextlib.suppress(BlockingIOError, IndexError):
                    self._take(socket.recv_fds(self.inbox, 1, 1)[1][0])
            if os.geteuid() == self._uid and not self._is_there():
                flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
                self._take(os.open(self.baseFilename, flags, 0o644))
        super().flush()

    def close(self) -> None:
        """Close the file and the sockets to children."""
        super().close()
        while self.heirs:
            self.heirs.pop().close()

    def _is_there(self) -> bool:
        try:
            return os.path.samestat(os.lstat(self.baseFilename), os.fstat(self._fd))
        except FileNotFoundError:
            return False

    def _take(self, fd: int) -> None:
        os.dup2(fd, self._fd, inheritable=False)
        os.close(fd)
        for heir in list(self.heirs):
            try:
                socket.send_fds(heir, [b"."], [self._fd])
            except OSError:  # the child has ended
                self.heirs.remove(heir)
                heir.close()


def line_for_child() -> socket.socket | None:
    """Give the socket over which a child, forked next, receives new log files; None: the log is no file."""
    handler = next(iter(logging.getLogger("aitbc_miner").handlers), None)
    if not isinstance(handler, FileHandler):
        return None
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    # Not MSG_DONTWAIT: send_fds and recv_fds do not pass the flag on.
    for end in (ours, theirs):
        end.setblocking(False)  # noqa: FBT003  # takes no keyword
    handler.heirs.append(ours)
    return theirs


def be_child(line: socket.socket | None) -> None:
    """In the child: receive new log files over this socket from now on."""
    for handler in logging.getLogger("aitbc_miner").handlers:
        if isinstance(handler, FileHandler):
            handler.inbox, handler.heirs = line, []


def _handler(path: Path | None, stream: TextIO) -> logging.Handler:
    """Choose the handler by the kind of the file; never set O_NONBLOCK on a shared descriptor."""
    if path is not None:
        if not path.is_fifo():
            return FileHandler(path)
        # O_RDWR opens a FIFO without a reader, and the FIFO survives its reader.
        return _patient(os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC), os.write)
    try:
        fd = stream.fileno()
        mode = os.fstat(fd).st_mode
    except OSError:
        return logging.StreamHandler(stream)
    if stat.S_ISSOCK(mode):
        end = socket.socket(fileno=os.dup(fd))
        return PatientHandler(end.fileno(), lambda data: end.send(data, socket.MSG_DONTWAIT), end.close)
    if not stat.S_ISFIFO(mode):
        return logging.StreamHandler(stream)
    try:
        # The new descriptor is the same pipe with its own flags.
        own = os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        # Another user's pipe. Two processes that see its last room at the same moment may still wait.
        return _patient(os.dup(fd), _write_if_room)
    return _patient(own, os.write)


def _patient(fd: int, write: Callable[[int, bytes], int]) -> PatientHandler:
    return PatientHandler(fd, partial(write, fd), partial(os.close, fd))


def _write_if_room(fd: int, data: bytes) -> int:
    poller = select.poll()
    poller.register(fd, select.POLLOUT)
    if not poller.poll(0):
        raise BlockingIOError
    return os.write(fd, data)


def descriptors() -> set[int]:
    """Give the descriptors of the log, which a forked child must keep."""
    found: set[int] = set()
    for handler in logging.getLogger("aitbc_miner").handlers:
        if isinstance(handler, PatientHandler):
            found.add(handler.fd)
        elif isinstance(handler, logging.StreamHandler):
            found.add(handler.stream.fileno())
    return found


def flush() -> None:
    """Write the waiting lines as far as the log has room."""
    for handler in logging.getLogger("aitbc_miner").handlers:
        handler.flush()


def mask(secret: str) -> None:
    """Mask a secret in all log lines of this process from now on."""
    for handler in logging.getLogger("aitbc_miner").handlers:
        if isinstance(handler.formatter, Formatter):
            handler.formatter.add_secret(secret)


def configure(
    node_id: str, *, level: str, as_json: bool, path: str | None = None, stream: TextIO | None = None
) -> None:
    """Send all log lines to the file `path`, else to `stream` (default: standard error).

    A stalled reader blocks no process of the node: the handler keeps unread lines, then drops the oldest.

    Raises:
        OSError: the log file cannot be opened.
    """
    handler = _handler(Path(path) if path else None, stream or sys.stderr)
    handler.setFormatter(Formatter(node_id, as_json=as_json))
    # A full disk or a closed pipe must never end the logging process.
    logging.raiseExceptions = False
    root = logging.getLogger("aitbc_miner")
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    root.propagate = False
