"""What is kept of jobs that are done: which directories may go, and which rows of the books.

Chosen here, by when a report was settled; removed by a process that is root (`sweeping.py`), which looks
again.
"""

from concurrent.futures import Future
from functools import partial

from aitbc_miner.database import DatabaseError
from aitbc_miner.messages import SpaceWanted, Sweepable, Swept
from aitbc_miner.util import clock
from aitbc_miner.workbench import Workbench

EVERY_S = 60.0
AT_ONCE = 200


class Pruning:
    """Names what may go, now and then and when space is short."""

    def __init__(self, bench: Workbench) -> None:
        self._bench = bench
        self._due = clock.now()

    def next_due(self) -> float:
        """When to look next."""
        return self._due

    def start_due(self) -> None:
        """Name the directories that were kept for their time, and forget old rows."""
        if clock.now() < self._due:
            return
        self._due = clock.now() + EVERY_S
        kept = self._bench.config.workspace
        self._name(partial(self._bench.accounts.expired, kept.keep_success, kept.keep_failed, AT_ONCE))
        self._bench.start("queue", self._bench.accounts.prune, self._done)

    def obey(self, said: Swept | SpaceWanted) -> None:
        """Take note of what is gone, or name what may go before its time."""
        if isinstance(said, SpaceWanted):
            self._name(partial(self._bench.accounts.oldest_delivered, AT_ONCE))
            return
        self._bench.start("queue", partial(self._bench.accounts.mark_swept, said.job_ids), self._done)
        if len(said.job_ids) >= AT_ONCE:
            self._due = clock.now()  # there may be more

    def _name(self, choose: "partial[list[str]]") -> None:
        try:
            job_ids = choose()
        except DatabaseError as error:
            self._bench.warn("cannot say what may go", error)
            return
        if job_ids:
            self._bench.channel.send(Sweepable(job_ids))

    def _done(self, future: Future[object]) -> None:
        if isinstance(error := future.exception(), Exception):
            self._bench.warn("books not kept", error)
