"""What the operator wants tried once more: a job that waits, a report that waits or was refused."""

from concurrent.futures import Future
from functools import partial

from aitbc_miner.agent.context import Workbench
from aitbc_miner.agent.delivery_queue import Reporter
from aitbc_miner.agent.fleet import Fleet
from aitbc_miner.agent.retries import Reruns
from aitbc_miner.errors import MinerError
from aitbc_miner.ipc.messages import Retried


class OnDemand:
    """Tells the supervisor, for each job that it is asked about, what comes of it."""

    def __init__(self, bench: Workbench, fleet: Fleet | None, reruns: Reruns, reporter: Reporter) -> None:
        self._bench = bench
        self._fleet = fleet
        self._reruns = reruns
        self._reporter = reporter

    def retry(self, job_id: str) -> None:
        """Have a job tried, or its report sent, once more."""
        if job_id in self._reruns:
            self._reruns.hurry(job_id)
            self._tell(Retried(job_id, f"job {job_id} is tried again now"))
        elif job_id in self._reporter:
            self._reporter.hurry()
            self._tell(Retried(job_id, f"the report of job {job_id} is sent again now"))
        elif self._fleet is not None and not self._bench.records.known(job_id):
            call = partial(self._fleet.requeue, job_id)
            self._bench.start("queue", call, partial(self._requeued, job_id))
        else:
            self._tell(self._retry_dead(job_id))

    def _tell(self, said: Retried) -> None:
        self._bench.channel.send(said)

    def _retry_dead(self, job_id: str) -> Retried:
        bench = self._bench
        try:
            if self._reporter.take_back(job_id):
                return Retried(job_id, f"the report of job {job_id}, which was refused, is sent once more")
            with bench.records.open(job_id) as job:
                state = job.state().state
        except (MinerError, OSError) as error:
            return Retried(job_id, f"cannot retry job {job_id}: {error}", done=False)
        why = "only what waits, or what the coordinator has refused, can be tried again"
        return Retried(job_id, f"cannot retry job {job_id}: it is {state}; {why}", done=False)

    def _requeued(self, job_id: str, future: Future[bool]) -> None:
        try:
            found = future.result()
        except MinerError as error:
            self._tell(Retried(job_id, f"cannot retry job {job_id}: {error}", done=False))
            return
        if found:
            self._tell(Retried(job_id, f"job {job_id} is due again for any node of the fleet"))
        else:
            why = "neither this node nor the fleet's queue has it"
            self._tell(Retried(job_id, f"cannot retry job {job_id}: {why}", done=False))
