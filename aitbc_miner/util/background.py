"""Calls that may take long, beside a loop that must not wait for them."""

import os
import queue
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import TypeVar

from aitbc_miner.util import fs

T = TypeVar("T")


class Background:
    """Calls that may take long, in threads; what comes of each is handed to a callback in the main thread."""

    def __init__(self) -> None:
        self._done: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self.woken, self._wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)

    def start(
        self, pool: ThreadPoolExecutor, call: Callable[[], T], done: Callable[[Future[T]], None]
    ) -> None:
        """Run `call` in the pool, then `done` with its future where `finish` is called."""

        def hand_over(future: Future[T]) -> None:
            self.post(partial(done, future))

        pool.submit(call).add_done_callback(hand_over)

    def post(self, callback: Callable[[], None]) -> None:
        """Have a function run where `finish` is called. May be called from any thread."""
        self._done.put(callback)
        self._end_wait()

    def _end_wait(self) -> None:
        # If it is full, the main thread wakes up anyway; and what waits is looked at in each of its turns.
        with suppress(OSError):
            fs.tried_again(partial(os.write, self._wake, b"."))

    def finish(self) -> None:
        """Run the callbacks of all calls that have ended, and what was posted."""
        while not self._done.empty():
            self._done.get()()

    def clear(self) -> None:
        """Forget that the wait was ended."""
        os.read(self.woken, 4096)
