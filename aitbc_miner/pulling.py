"""Asking the coordinator for jobs, when there is room for them."""

from collections.abc import Callable
from concurrent.futures import Future
from functools import partial

import msgspec

from aitbc_miner.channel import ChannelError
from aitbc_miner.coordinator import PulledJob, PullFilters
from aitbc_miner.messages import Offer
from aitbc_miner.util import clock
from aitbc_miner.util.backoff import Backoff
from aitbc_miner.workbench import Workbench

MAX_KNOWN = 1000


class Puller:
    """Pulls one job at a time. `room` gives the free slots, `known` the jobs that we have.

    `accept` takes a job and says whether it was a new one. Nothing is pulled before the time `not_before`.
    """

    def __init__(
        self,
        bench: Workbench,
        room: Callable[[], list[Offer]],
        known: Callable[[], list[str]],
        accept: Callable[[PulledJob], bool],
        not_before: Callable[[], float],
    ) -> None:
        self._bench = bench
        self._room = room
        self._known = known
        self._accept = accept
        self._not_before = not_before
        self._pulling = False
        self._at = 0.0
        config = bench.config
        self._backoff = Backoff(config.coordinator.poll_interval_s, config.heartbeat.backoff.max_s)

    def next_due(self) -> float | None:
        """When to pull next; None as long as nothing may be pulled."""
        return max(self._at, self._not_before()) if self._may_pull() else None

    def hurry(self) -> None:
        """Pull now."""
        self._at = clock.now()

    def start_due(self) -> None:
        """Pull, if it is time."""
        due = self.next_due()
        if due is None or clock.now() < due:
            return
        self._pulling = True
        offers = [msgspec.to_builtins(offer) for offer in self._room()]
        filters = PullFilters(offers, list(dict.fromkeys(self._known()))[:MAX_KNOWN])
        self._bench.start("pull", partial(self._bench.coordinator.pull, filters), self._pulled)

    def _may_pull(self) -> bool:
        return not self._pulling and bool(self._bench.token) and bool(self._room())

    def _pulled(self, future: Future[PulledJob | None]) -> None:
        self._pulling = False
        try:
            job = future.result()
            is_new = job is not None and self._accept(job)
        except ChannelError:
            raise
        except Exception as error:  # noqa: BLE001  # one odd reply must not end the agent, again and again
            wanted = self._bench.failed(error)
            self._bench.warn("pull failed", error)
            self._at = clock.now() + max(self._backoff.next(), wanted or 0.0)
            return
        self._backoff.reset()
        self._bench.worked()
        self._at = clock.now() + (0.0 if is_new else self._bench.config.coordinator.poll_interval_s)
