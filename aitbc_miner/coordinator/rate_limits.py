"""Keeps the node below a coordinator's limits: how many calls of each kind it has made in the last minute.

A window that slides, as the coordinator's own does, and no bucket that drips: with a bucket that drips, the
most that is safe is either no burst at all or half the rate. The calls are noted in a small file, which all
processes of the node share and a restart does not empty. It is a help and no record: one that is lost or
broken costs a refusal, which is counted nowhere.
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
"""A little more than the coordinator's minute, for calls do not all take equally long to arrive."""
SPARE = 1
"""Calls of each kind that are left out."""
PAUSES_S = (1.0, 2.0, 4.0, 8.0, 10.0)
"""After a refusal, and after each further one. Trying is free: calls that are refused are not counted."""
SIZE = 32 * 1024


class Window(Struct):
    """The calls of one kind. Mutable: it is only ever had under the lock."""

    calls: list[float] = field(default_factory=list)
    until: float = 0.0
    refusals: int = 0


class _Book(Struct):
    boot: str = ""
    windows: dict[str, Window] = field(default_factory=dict)


class Limits:
    """For all threads and processes that name the same file.

    `most` is how many calls of each kind a minute has, `share` the part of it that is ours where other nodes
    call from the same address.
    """

    def __init__(self, path: Path, most: Mapping[str, int], share: float = 1.0) -> None:
        self._path = path
        self._most = {name: max(1, int((limit - SPARE) * share)) for name, limit in most.items()}
        self._lock = threading.Lock()
        # Where the file cannot be used, this process is on its own.
        self._kept = _Book(boot_id())

    def take(self, name: str) -> None:
        """Note a call that is about to be made.

        Raises:
            Paced: it must wait, and is not noted.
        """
        now = clock.now()
        with self._window(name) as window:
            wait_s = window.until - now
            if len(window.calls) >= self._most[name]:
                wait_s = max(wait_s, window.calls[-self._most[name]] + WINDOW_S - now)
            if wait_s <= 0:
                window.calls.append(now)
                if window.refusals:
                    # One at a time, until one is not refused.
                    window.until = now + PAUSES_S[0]
        if wait_s > 0:
            raise Paced(f"cannot call {name} now: the limit of calls a minute is reached", wait_s)

    def refused(self, name: str) -> float:
        """Note that the call was refused, as one too many; gives the seconds for which it rests now."""
        with self._window(name) as window:
            window.refusals += 1
            if window.calls:
                window.calls.pop()
            pause_s = PAUSES_S[min(window.refusals, len(PAUSES_S)) - 1]
            window.until = clock.now() + pause_s
        return pause_s

    def answered(self, name: str) -> None:
        """Note that a call was not refused."""
        if self._resting(name):
            with self._window(name) as window:
                window.refusals, window.until = 0, 0.0

    def resting(self) -> list[str]:
        """Name the kinds of calls that were refused when they were last made."""
        with self._lock:
            return [name for name in self._most if self._look(name).refusals]

    def _resting(self, name: str) -> bool:
        with self._lock:
            return bool(self._look(name).refusals)

    def _look(self, name: str) -> Window:
        return self._kept.windows.get(name) or Window()

    @contextmanager
    def _window(self, name: str) -> Iterator[Window]:
        """Give the calls of one kind to look at and to change, as all processes know them."""
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
            # Who could read it could lock it, and keep us from the coordinator.
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
