"""Runs slow calls in threads, beside a main loop that must not block."""

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
    """Runs slow calls in a pool of threads, and a callback for each finished call in the main thread.

    The main loop waits on the descriptor `woken`; then it calls `clear` and `finish`.
    """

    def __init__(self) -> None:
        self._done: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self.woken, self._wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)

    def start(
        self, pool: ThreadPoolExecutor, call: Callable[[], T], done: Callable[[Future[T]], None]
    ) -> None:
        """Run `call` in the pool; after that `finish` runs `done` with the call's future."""
        pool.submit(call).add_done_callback(lambda future: self.post(partial(done, future)))

    def post(self, callback: Callable[[], None]) -> None:
        """Queue a function for the next `finish`. Any thread may call this method."""
        self._done.put(callback)
        # If the pipe is full, the main thread wakes up anyway; and each of its turns calls `finish`.
        with suppress(OSError):
            fs.tried_again(partial(os.write, self._wake, b"."))

    def finish(self) -> None:
        """Run the queued callbacks."""
        while not self._done.empty():
            self._done.get()()

    def clear(self) -> None:
        """Empty the pipe, so that the main loop can wait on `woken` again."""
        os.read(self.woken, 4096)
