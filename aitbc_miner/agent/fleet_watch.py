"""The agent's clock for its fleet: leases are renewed in time, and free slots look for jobs to take over."""

from collections.abc import Callable
from concurrent.futures import Future
from functools import partial

from aitbc_miner.agent.context import Workbench
from aitbc_miner.agent.fleet import Fleet, Seen
from aitbc_miner.ipc.messages import Offer
from aitbc_miner.queue.interface import QueueError
from aitbc_miner.util import clock

# How often a lease is renewed while it lasts, so that one or two that fail are no loss.
RENEWALS = 4


class FleetWatch:
    """`lost` is told of a job that another node has taken over, `seen` of what was found for us."""

    def __init__(
        self,
        bench: Workbench,
        fleet: Fleet,
        room: Callable[[], list[Offer]],
        lost: Callable[[str], None],
        seen: Callable[[Seen], None],
    ) -> None:
        self._bench = bench
        self._fleet = fleet
        self._room = room
        self._lost = lost
        self._seen = seen
        self._every_s = bench.config.queue.lease_s / RENEWALS
        self._due = 0.0
        self._busy = False
        self._down = False

    def next_due(self) -> float | None:
        """When to ask the queue next."""
        return None if self._busy else self._due

    def start_due(self) -> None:
        """Ask the queue, if it is time."""
        if self._busy or clock.now() < self._due:
            return
        self._busy = True
        self._bench.start("fleet", partial(self._ask, self._room()), self._asked)

    def _ask(self, offers: list[Offer]) -> tuple[list[str], Seen, Exception | None]:
        """Renew and look; runs in a thread. What was found before an error is dealt with all the same."""
        lost: list[str] = []
        seen = Seen([], [])
        try:
            self._fleet.renew(lost)
            if offers and self._bench.token:
                self._fleet.seek(self._bench.records, offers, self._bench.accounts.knows, seen)
            self._fleet.examine()
        except Exception as error:  # noqa: BLE001  # one odd task must not end the agent, again and again
            return lost, seen, error
        return lost, seen, None

    def _asked(self, future: Future[tuple[list[str], Seen, Exception | None]]) -> None:
        self._busy = False
        lost, seen, error = future.result()
        self._due = clock.now() + min(self._every_s, self._bench.config.coordinator.poll_interval_s)
        if error is not None:
            # However long a lease is, a queue that is back is not left waiting.
            most = self._bench.config.heartbeat.backoff.max_s
            self._due = clock.now() + min(self._every_s, most)
            self._failed(error)
        elif self._down:
            self._bench.log.info("queue of the fleet is back")
            self._tell(None)
            self._down = False
        for job_id in lost:
            self._lost(job_id)
        self._seen(seen)

    def _failed(self, error: Exception) -> None:
        # Once, not at every try; what we hold goes on.
        if not (self._down and isinstance(error, QueueError)):
            self._bench.warn("queue of the fleet out of reach", error)
        self._down = True
        self._tell(str(error))

    def _tell(self, error: str | None) -> None:
        self._bench.queue_error = error
        self._bench.tell()
