"""Keeps the node below a coordinator's limits by counting the calls of each kind in the last minute.

The window slides, as the coordinator's own does. A leaky bucket would be safe only without bursts or at half
the rate. A small file has the calls; all processes of the node share the file, and it survives a restart. If
the file is lost or broken, the coordinator refuses a call, which has no further effect.
"""

import fcntl
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import msgspec
from msgspec import Struct, field

from aitbc_miner.coordinator.interface import Paced
from aitbc_miner.util import clock
from aitbc_miner.util.system import boot_id

WINDOW_S = 60.5
"""A little more than the coordinator's minute, since some calls take longer to arrive than others."""
SPARE = 1
"""Calls of each kind that the node leaves unused."""
PAUSES_S = (1.0, 2.0, 4.0, 8.0, 10.0)
"""Pauses after the first and each further refusal. The coordinator does not count calls that it refuses."""
SIZE = 32 * 1024


class Window(Struct):
    """The calls of one kind. Mutable, because only the holder of the lock uses a window."""

    calls: list[float] = field(default_factory=list)
    until: float = 0.0
    refusals: int = 0


class _Book(Struct):
    boot: str = ""
    windows: dict[str, Window] = field(default_factory=dict)


class Limits:
    """The limits for all threads and processes that use the same file.

    `most` has the calls a minute of each kind. `share` is this node's part of the calls, 0 to 1, if other
    nodes call from the same address.
    """

    def __init__(self, path: Path, most: Mapping[str, int], share: float = 1.0) -> None:
        self._path = path
        self._most = {name: max(1, int((limit - SPARE) * share)) for name, limit in most.items()}
        self._lock = threading.Lock()
        # If the file cannot be used, this process counts alone.
        self._kept = _Book(boot_id())

    def take(self, name: str) -> None:
        """Count a call before the caller makes it.

        Raises:
            Paced: the call must wait, and was not counted.
        """
        now = clock.now()
        with self._window(name) as window:
            wait_s = window.until - now
            if len(window.calls) >= self._most[name]:
                wait_s = max(wait_s, window.calls[-self._most[name]] + WINDOW_S - now)
            if wait_s <= 0:
                window.calls.append(now)
                if window.refusals:
                    # One call per pause, until the coordinator accepts one.
                    window.until = now + PAUSES_S[0]
        if wait_s > 0:
            raise Paced(f"cannot call {name} now: the node has used up its calls for this minute", wait_s)

    def refused(self, name: str) -> float:
        """Record that the coordinator refused a call as one too many; give the pause in seconds."""
        with self._window(name) as window:
            window.refusals += 1
            if window.calls:
                window.calls.pop()
            pause_s = PAUSES_S[min(window.refusals, len(PAUSES_S)) - 1]
            window.until = clock.now() + pause_s
        return pause_s

    def answered(self, name: str) -> None:
        """Record that the coordinator did not refuse a call."""
        if name in self.resting():
            with self._window(name) as window:
                window.refusals, window.until = 0, 0.0

    def resting(self) -> list[str]:
        """Name the kinds of calls of which the coordinator refused the latest."""
        with self._lock:
            return [name for name, window in self._kept.windows.items() if window.refusals]

    @contextmanager
    def _window(self, name: str) -> Iterator[Window]:
        """Lock and read the calls of one kind; write them back after the caller has changed them."""
        with self._lock, self._file() as file:
            book = _read(file) if file is not None else None
            if book is None or book.boot != self._kept.boot:
                book = _Book(self._kept.boot) if file is not None else self._kept
            self._kept = book
            window = book.windows.setdefault(name, Window())
            oldest = clock.now() - WINDOW_S
            window.calls = [at for at in window.calls if at > oldest]
            yield window
            if file is not None:
                with suppress(OSError):
                    os.pwrite(file, msgspec.json.encode(book).ljust(SIZE), 0)

    @contextmanager
    def _file(self) -> Iterator[int | None]:
        try:
            # A user who can read the file can lock it and so stop all calls of the node.
            file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError:
            yield None
            return
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield file
        finally:
            os.close(file)


def _read(file: int) -> _Book | None:
    try:
        return msgspec.json.decode(os.pread(file, SIZE * 2, 0), type=_Book)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError):
        return None
