"""Renews the leases of this node in time, and looks for jobs to take over into free slots."""

from concurrent.futures import Future
from functools import partial

from aitbc_miner.agent.admission_queue import AdmissionQueue
from aitbc_miner.agent.context import AgentContext
from aitbc_miner.agent.delivery_queue import DeliveryQueue
from aitbc_miner.agent.fleet import Fleet, FleetFinds
from aitbc_miner.errors import MinerError
from aitbc_miner.ipc.messages import CancelJob
from aitbc_miner.jobs import State
from aitbc_miner.queue.interface import QueueError
from aitbc_miner.slots.placement import Offer
from aitbc_miner.util import clock

# The number of renewals in `lease_s`: the lease survives one or two failed renewals.
RENEWALS = 4


class FleetWatch:
    """Calls `Fleet` in a thread, at intervals, and acts on the result."""

    def __init__(
        self, context: AgentContext, fleet: Fleet, admission: AdmissionQueue, delivery: DeliveryQueue
    ) -> None:
        self._context = context
        self._fleet = fleet
        self._admission = admission
        self._delivery = delivery
        self._every_s = context.config.queue.lease_s / RENEWALS
        self._due = 0.0
        self._busy = False
        self._down = False

    def next_due(self) -> float | None:
        """When to ask the shared queue next."""
        return None if self._busy else self._due

    def start_due(self) -> None:
        """Ask the shared queue, if due."""
        if self._busy or clock.now() < self._due:
            return
        self._busy = True
        self._context.start("fleet", partial(self._ask, self._context.jobs.room()), self._asked)

    def _ask(self, offers: list[Offer]) -> tuple[list[str], FleetFinds, Exception | None]:
        """Renew leases and look for jobs, in a thread. Gives the results before an error, and the error."""
        lost: list[str] = []
        seen = FleetFinds([], [])
        try:
            self._fleet.renew(lost)
            if offers and self._context.token:
                self._fleet.seek(self._context.records, offers, self._context.ledger.knows, seen)
            self._fleet.examine()
        except Exception as error:  # noqa: BLE001  # one odd task must not end the agent, again and again
            return lost, seen, error
        return lost, seen, None

    def _asked(self, future: Future[tuple[list[str], FleetFinds, Exception | None]]) -> None:
        self._busy = False
        lost, seen, error = future.result()
        self._due = clock.now() + min(self._every_s, self._context.config.coordinator.poll_interval_s)
        if error is not None:
            # With a long lease, too, the node soon notices that the queue works again.
            most = self._context.config.heartbeat.backoff.max_s
            self._due = clock.now() + min(self._every_s, most)
            self._failed(error)
        elif self._down:
            self._context.log.info("fleet queue answers again")
            self._tell(None)
            self._down = False
        for job_id in lost:
            # The job ends here, and this node never reports it (`Fleet.is_ours`).
            self._context.log.warning("job lost to another node", job_id=job_id)
            self._context.channel.send(CancelJob(job_id, "cancel", "another node of the fleet has the job"))
        self._admission.resume(seen.taken)
        for job_id in seen.returned:
            self._report(job_id)

    def _report(self, job_id: str) -> None:
        """Report a job that no node of the fleet has taken."""
        try:
            # The ledger first: the next start does not read the records of settled jobs.
            self._context.ledger.reopen(job_id)
            with self._context.records.open(job_id) as job:
                job.move(State.UPLOADING, delivery=None)
        except (MinerError, OSError) as error:
            self._context.warn("unclaimed job not reported", error, job_id=job_id)
        else:
            self._delivery.add(job_id)

    def _failed(self, error: Exception) -> None:
        # Logged once, not at every attempt. The jobs of this node run on.
        if not (self._down and isinstance(error, QueueError)):
            self._context.warn("fleet queue failed", error)
        self._down = True
        self._tell(str(error))

    def _tell(self, error: str | None) -> None:
        self._context.queue_error = error
        self._context.tell()
