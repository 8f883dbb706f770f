"""What becomes of a job that has failed: its report, another attempt here, or another node's."""

import random
from collections.abc import Callable, Container
from concurrent.futures import Future
from functools import partial

from aitbc_miner.agent.context import AgentContext
from aitbc_miner.agent.delivery_queue import DeliveryQueue
from aitbc_miner.agent.fleet import Fleet
from aitbc_miner.agent.retry_policy import Where, next_attempt, pause_before
from aitbc_miner.errors import MinerError
from aitbc_miner.ipc.messages import Retried
from aitbc_miner.jobs import MOVES, Outcome, RetryPolicy, State
from aitbc_miner.queue.interface import Kind, QueueError, Task
from aitbc_miner.store.ledger import account_of
from aitbc_miner.store.records import JobDir, RecordError
from aitbc_miner.util import clock

LOOK_AGAIN_S = 0.1


class Retries:
    """Decides, and keeps the jobs that wait for their next attempt on this node.

    `report` is told of jobs whose report ends them. When to try next is kept in memory, and noted in the
    queue for after a restart.
    """

    def __init__(self, context: AgentContext, fleet: Fleet | None, report: Callable[[str], None]) -> None:
        self._context = context
        self._fleet = fleet
        self._report = report
        self._due: dict[str, float] = {}
        self._rng = random.Random()  # noqa: S311  # spreads load, protects nothing

    def __contains__(self, job_id: str) -> bool:
        return job_id in self._due

    def ids(self) -> list[str]:
        """Name the jobs that wait."""
        return list(self._due)

    def next_due(self) -> float | None:
        """When the next one is due."""
        return min(self._due.values(), default=None)

    def take_due(self, in_slots: Container[str]) -> list[str]:
        """Take what is due.

        A job that the supervisor last showed in a slot waits until a later word of it: the end of the attempt
        may be known here before that word comes.
        """
        now = clock.now()
        due = [job_id for job_id, at in self._due.items() if at <= now]
        for job_id in due:
            if job_id in in_slots:
                self._due[job_id] = now + LOOK_AGAIN_S
            else:
                del self._due[job_id]
        return [job_id for job_id in due if job_id not in in_slots]

    def hurry(self, job_id: str) -> None:
        """Have a job tried now."""
        self._due[job_id] = clock.now()

    def drop(self, job_id: str) -> None:
        """Forget a job."""
        self._due.pop(job_id, None)

    def recovered(self, job_ids: list[str]) -> None:
        """Wait on for those that an earlier run of the node has left waiting."""
        left: dict[str, float] = {}
        try:
            waiting = self._context.queue.waiting(Kind.RUN, self._context.config.node_id)
            left = {task.job_id: max(0.0, due_s) for task, due_s in waiting}
        except QueueError as error:
            self._context.warn("times of retries not read", error)
        for job_id in job_ids:
            self._due[job_id] = clock.now() + left.get(job_id, 0.0)
            self._context.show(job_id, State.RETRY_WAIT)

    def settle(self, job_id: str) -> None:
        """Decide about a job whose attempt is over; its outcome is on disk. Raises OSError: not now."""
        try:
            with self._context.records.open(job_id) as job:
                outcome = job.outcome()
                where, most = self._judge(job, outcome)
                if outcome is not None and where is Where.HERE:
                    self._again(job, outcome, most)
                    return
        except RecordError as error:
            # Whatever it is, to try to report it is never wrong.
            self._context.warn("cannot decide about job", error, job_id=job_id)
            where = None
        if where is Where.ELSEWHERE and outcome is not None and self._fleet is not None:
            call = partial(self._hand_on, self._fleet, job_id, outcome, most)
            self._context.start("queue", call, partial(self._handed_on, job_id, outcome))
        else:
            self._report(job_id)

    def _judge(self, job: JobDir, outcome: Outcome | None) -> tuple[Where | None, int]:
        """Say where the job goes next, and how many attempts it has in all."""
        state = job.state()
        try:
            policy = job.manifest().retry
        except RecordError:
            policy = RetryPolicy()
        most = self._context.config.queue.max_attempts
        where = next_attempt(
            outcome.code if outcome else None,
            started=state.started,
            attempt=state.attempt,
            policy=policy,
            most=most,
            shared=self._fleet is not None,
        )
        if where is Where.HERE and State.RETRY_WAIT not in MOVES[state.state]:
            where = None
        return where, policy.max_attempts if state.started else most

    def _again(self, job: JobDir, outcome: Outcome, most: int) -> None:
        context, bounds = self._context, self._context.config.heartbeat.backoff
        try:
            state = job.try_again(note=outcome.message)
        except OSError:
            state = job.state()
            if state.state is not State.RETRY_WAIT:
                raise
            # It stands that there is a next attempt; the old outcome is set aside when that begins.
        pause = pause_before(state.attempt, bounds.min_s, bounds.max_s, self._rng)
        self._due[job.job_id] = clock.now() + pause
        # What is noted is the attempt that has failed: the next one may always be made.
        task = Task(Kind.RUN, job.job_id, context.config.node_id, 1, 0, outcome.message)
        self._note(partial(context.queue.put, task, pause))
        context.count("retries", str(outcome.code))
        context.log.info(
            "job is tried again",
            job_id=job.job_id,
            code=outcome.code,
            attempt=state.attempt,
            of=most,
            in_s=round(pause, 1),
        )
        context.show(job.job_id, State.RETRY_WAIT, outcome=outcome)

    def begun(self, job_id: str) -> None:
        """Forget what was noted of a job that waited."""
        self._note(partial(self._context.queue.remove, Kind.RUN, job_id))

    def _note(self, call: Callable[[], object]) -> None:
        self._context.start("queue", call, self._noted)

    def _noted(self, future: Future[object]) -> None:
        if isinstance(error := future.exception(), Exception):
            # After a restart the job is tried at once then, which loses nothing.
            self._context.warn("time of a retry not noted", error)

    # --- another node's ------------------------------------------------------------------------------------

    def _hand_on(self, fleet: Fleet, job_id: str, outcome: Outcome, most: int) -> str:
        """Give the job to the fleet and end it here; runs in a thread."""
        context = self._context
        with context.records.open(job_id) as job:
            how = "handed_on" if fleet.hand_on(job, outcome, most) else "lost"
            job.move(State.UPLOADING)
            state = job.move(State.FAILED, delivery=how)
        context.book(account_of(outcome, state, state.runner, how, log_too=context.log_too))
        return how

    def _handed_on(self, job_id: str, outcome: Outcome, future: Future[str]) -> None:
        context = self._context
        try:
            how = future.result()
        except (MinerError, OSError) as error:
            # The coordinator may have another node for it; to be asked is better than to wait for the fleet.
            context.warn("job not handed on", error, job_id=job_id)
            self._report(job_id)
            return
        context.log.info("job left to the fleet", job_id=job_id, code=outcome.code, how=how)
        context.show(job_id, State.FAILED, outcome=outcome)


class RetryOnDemand:
    """Tells the supervisor, for each job that it is asked about, what comes of it."""

    def __init__(self, context: AgentContext, fleet: Fleet | None, reruns: Retries, reporter: DeliveryQueue) -> None:
        self._context = context
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
        elif self._fleet is not None and not self._context.records.known(job_id):
            call = partial(self._fleet.requeue, job_id)
            self._context.start("queue", call, partial(self._requeued, job_id))
        else:
            self._tell(self._retry_dead(job_id))

    def _tell(self, said: Retried) -> None:
        self._context.channel.send(said)

    def _retry_dead(self, job_id: str) -> Retried:
        context = self._context
        try:
            if self._reporter.take_back(job_id):
                return Retried(job_id, f"the report of job {job_id}, which was refused, is sent once more")
            with context.records.open(job_id) as job:
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
