"""Decides which directories of settled jobs may go, and prunes old rows of the ledger.

The agent chooses by the time of settlement. The sweep (supervisor/sweep.py), which is root, checks each
directory again and removes it.
"""

from concurrent.futures import Future
from functools import partial
from typing import Any

from aitbc_miner.agent.context import AgentContext
from aitbc_miner.ipc.messages import SpaceWanted, Sweepable, Swept
from aitbc_miner.queue.interface import Kind
from aitbc_miner.store.database import DatabaseError
from aitbc_miner.util import clock

EVERY_S = 60.0
SOON_S = 1.0
AT_ONCE = 200


class Retention:
    """Names removable directories at intervals, and when space is short."""

    def __init__(self, context: AgentContext) -> None:
        self._context = context
        self._due = clock.now()

    def next_due(self) -> float:
        """When to choose next."""
        return self._due

    def start_due(self) -> None:
        """Name the directories that have reached their age, and prune old rows, if due."""
        if clock.now() < self._due:
            return
        self._due = clock.now() + EVERY_S
        kept = self._context.config.workspace
        self._name(partial(self._context.ledger.expired, kept.keep_success, kept.keep_failed, AT_ONCE))
        self._context.start("queue", self._context.book_rest, self._done)
        self._context.start("queue", self._context.ledger.prune, self._done)

    def obey(self, said: Swept | SpaceWanted) -> None:
        """Note removed directories, or name directories that may go early."""
        if isinstance(said, SpaceWanted):
            self._name(partial(self._context.ledger.oldest_delivered, AT_ONCE), early=True)
            return
        self._context.start("queue", partial(self._forget, said.job_ids), self._forgotten)
        if said.job_ids:
            self._due = min(self._due, clock.now() + SOON_S)  # more directories may have reached their age

    def _forget(self, job_ids: list[str]) -> int:
        """Note removed directories in ledger and queue; gives the number of refused reports. In a thread."""
        context = self._context
        context.ledger.mark_swept(job_ids)
        gone = set(job_ids)
        dead = [task.job_id for task in context.queue.dead()]
        for job_id in gone.intersection(dead):
            context.queue.remove(Kind.REPORT, job_id)
        return len(set(dead) - gone)

    def _forgotten(self, future: Future[int]) -> None:
        self._done(future)
        if future.exception() is None and future.result() != self._context.refused:
            self._context.refused = future.result()
            self._context.tell()

    def _name(self, choose: "partial[list[str]]", *, early: bool = False) -> None:
        try:
            job_ids = choose()
        except DatabaseError as error:
            self._context.warn("cannot select expired jobs", error)
            return
        if job_ids:
            self._context.channel.send(Sweepable(job_ids, early))

    def _done(self, future: Future[Any]) -> None:
        if isinstance(error := future.exception(), Exception):
            self._context.warn("ledger not written", error)
