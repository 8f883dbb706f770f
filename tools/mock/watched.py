"""The state of a mock coordinator: behind a lock, with a list of requests, and a method to wait."""

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Self, TypeVar

from aitbc_miner.util.clock import now
from tools.mock.bootstrap.records import Call

T = TypeVar("T")


class Watched:
    """The state of a coordinator. Any thread may call any method."""

    def __init__(self) -> None:
        self._lock = threading.Condition(threading.RLock())
        self._calls: deque[Call] = deque(maxlen=100_000)

    def calls(self, endpoint: str | None = None) -> list[Call]:
        """Return the requests of an endpoint, or all requests, the oldest first."""
        with self._lock:
            return [call for call in self._calls if endpoint in {None, call.endpoint}]

    def note_call(self, call: Call) -> None:
        """Record a request."""
        with self._change():
            self._calls.append(call)

    def wait(self, predicate: Callable[[Self], T], timeout: float) -> T:
        """Wait until the predicate is true and return its value; it must make no calls, the lock is held.

        Raises:
            TimeoutError: the predicate stayed false for `timeout` seconds; the message has each job's state.
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
        """Describe the state of each job."""
        raise NotImplementedError

    def _expire(self) -> None:
        """Apply the time-outs that are due."""

    def _expiries(self) -> list[float]:
        """Give the seconds until the next time-out."""
        return []
