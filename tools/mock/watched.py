"""What every mock coordinator's state is: behind one lock, with each request noted, and to be waited for."""

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Self, TypeVar

from aitbc_miner.util.clock import now
from tools.mock.bootstrap.records import Call

T = TypeVar("T")


class Watched:
    """The state of a coordinator. Every method may be called from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Condition(threading.RLock())
        self._calls: deque[Call] = deque(maxlen=100_000)

    def calls(self, endpoint: str | None = None) -> list[Call]:
        """Return the requests, of one endpoint or of all, oldest first."""
        with self._lock:
            return [call for call in self._calls if endpoint in {None, call.endpoint}]

    def note_call(self, call: Call) -> None:
        """Enter a request."""
        with self._change():
            self._calls.append(call)

    def wait(self, predicate: Callable[[Self], T], timeout: float) -> T:
        """Return what the predicate returns as soon as that is true; it must make no calls, the lock is held.

        Raises:
            TimeoutError: it did not become true in `timeout` seconds, with where each job is.
        """
        deadline = now() + timeout
        with self._lock:
            while True:
                self._expire()
                if value := predicate(self):
                    return value
                left = deadline - now()
                if left <= 0:
                    raise TimeoutError(f"cannot wait longer than {timeout} s; jobs: {self._where()}")
                self._lock.wait(min([left, *self._expiries()]))

    @contextmanager
    def _now(self) -> Iterator[None]:
        with self._lock:
            self._expire()
            yield

    @contextmanager
    def _change(self) -> Iterator[None]:
        with self._now():
            try:
                yield
            finally:
                self._lock.notify_all()

    def _where(self) -> dict[str, str]:
        """Where each job is, for people."""
        raise NotImplementedError

    def _expire(self) -> None:
        """Do what has become due by the time alone."""

    def _expiries(self) -> list[float]:
        """In how many seconds something will be due."""
        return []
