"""Has the history of jobs read for the operator, by a child (supervisor/history.py): that may take its time.

What that finds goes into memory which the supervisor has made for it, and hands on to the client unread.
"""

import os
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

from msgspec import Struct

from aitbc_miner.control.protocol import LATER_S, History, Later, Refusal, Request
from aitbc_miner.supervisor.children import Child, Errands
from aitbc_miner.util import clock

MAX_AT_ONCE = 4


class Wrote(Struct, frozen=True):
    """What the child says at its end: nothing, or why there is no history."""

    fault: str = ""


class Historian:
    """Has the history read. `read` is the child's main function, given what is asked and where to write."""

    def __init__(
        self, errands: Errands, read: "Callable[[Request, int, Connection[Any, Any]], None]"
    ) -> None:
        self._errands = errands
        self._read = read
        self._readers: dict[int, Child[Any]] = {}

    def show(self, request: Request, tell: Later) -> None:
        """Begin to read; `tell` gets the answer later, or at once that there will be none."""
        for reader in self._readers.values():
            # Its client has gone: a disk hangs.
            if clock.now() - reader.started > LATER_S:
                reader.kill()
        if len(self._readers) >= MAX_AT_ONCE:
            tell(Refusal(f"cannot show the history: {MAX_AT_ONCE} others are asking for it; try again"))
            return
        memory = -1
        try:
            memory = os.memfd_create("history")
            main = partial(self._read, request, memory)
            done = partial(self._done, memory, tell)
            self._readers[memory] = self._errands.start("history", main, Wrote, done, keep=[memory])
        except OSError as error:
            if memory >= 0:
                os.close(memory)
            tell(Refusal(f"cannot show the history: {error.strerror}; try again in a moment"))

    def _done(self, memory: int, tell: Later, said: Wrote | str) -> None:
        del self._readers[memory]
        if isinstance(said, str):
            fault = f"cannot show the history: what was to read it {said}; see the journal"
        else:
            fault = said.fault
        if fault:
            os.close(memory)
            tell(Refusal(fault))
        else:
            tell((History(), [memory]))
