"""Decides about failed jobs: report the job, try again here, or hand the job on to another node."""

import random
from concurrent.futures import Future
from functools import partial

from aitbc_miner.agent.admission import RESUMABLE
from aitbc_miner.agent.context import AgentContext
from aitbc_miner.agent.delivery_queue import DeliveryQueue
from aitbc_miner.agent.fleet import Fleet
from aitbc_miner.agent.job_table import CONCLUDED, WAITING, Stage
from aitbc_miner.agent.outcomes import settle
from aitbc_miner.agent.retry_policy import Where, next_attempt, pause_before
from aitbc_miner.errors import MinerError
from aitbc_miner.ipc.messages import CancelJob, JobSettled, Retried
from aitbc_miner.jobs import MOVES, Outcome, RetryPolicy, State, StateRecord
from aitbc_miner.queue.interface import Kind, QueueError, Task
from aitbc_miner.store.ledger import account_of
from aitbc_miner.store.records import JobDir, RecordError
from aitbc_miner.util import clock

LOOK_AGAIN_S = 0.1
NOT_NOTED = "retry time not noted"


class Retries:
    """Decides about jobs after an attempt, and keeps the jobs that wait for their next attempt here.

    The times of the next attempts are in memory, and in the retry queue for the next start.
    """

    def __init__(self, context: AgentContext, fleet: Fleet | None, delivery: DeliveryQueue) -> None:
        self._context = context
        self._jobs = context.jobs
        self._fleet = fleet
        self._delivery = delivery
        self._rng = random.Random()  # noqa: S311  # spreads load, protects nothing

    def next_due(self) -> float | None:
        """When the next attempt is due."""
        return min((entry.due for entry in self._jobs.among(Stage.RETRY_WAIT)), default=None)

    def start_due(self) -> None:
        """Resume the jobs whose next attempt is due.

        A job that the supervisor last showed in a slot waits for a later message: the agent may learn of the
        attempt's end before the supervisor shows the slot as free.
        """
        now, in_slots = clock.now(), self._jobs.in_slots()
        for entry in self._jobs.among(Stage.RETRY_WAIT):
            if entry.due > now:
                continue
            if entry.job_id in in_slots:
                entry.due = now + LOOK_AGAIN_S
                continue
            self._jobs.move(entry.job_id, Stage.RESUMING)
            self._context.note(partial(self._context.queue.remove, Kind.RUN, entry.job_id), NOT_NOTED)

    def recovered(self, job_ids: list[str]) -> None:
        """Keep the jobs waiting that waited in an earlier run of the node."""
        left: dict[str, float] = {}
        try:
            waiting = self._context.queue.waiting(Kind.RUN, self._context.config.node_id)
            left = {task.job_id: max(0.0, due_s) for task, due_s in waiting}
        except QueueError as error:
            self._context.warn("retry times not read", error)
        for job_id in job_ids:
            self._jobs.move(job_id, Stage.RETRY_WAIT).due = clock.now() + left.get(job_id, 0.0)
            # The coordinator counts the waiting job as ours, and may cancel the job.
            self._jobs.acknowledge(job_id)
            self._context.show(job_id, State.RETRY_WAIT)

    # --- the end of an attempt -----------------------------------------------------------------------------

    def settle(self, said: JobSettled | CancelJob) -> None:
        """Settle a job without a worker: use its outcome, or write that the job is lost or cancelled."""
        job_id = said.job_id
        stage = self._jobs.stage(job_id)
        if stage in CONCLUDED:
            return
        if isinstance(said, JobSettled) and said.code is None and stage in WAITING and self._waits(job_id):
            # The message is late: the agent has already found the attempt's outcome on the disk.
            return
        if stage is Stage.GONE and self._context.records.absent(job_id):
            return  # the message crossed the news that the job is not ours
        if stage is not Stage.SETTLING:
            self._jobs.move(job_id, Stage.SETTLING)
        self._context.persisting.do(f"settle job {job_id}", partial(self._settle, said))

    def _waits(self, job_id: str) -> bool:
        """Whether a job waits for a slot also by its record, which a worker may have changed."""
        record = self._context.records.state_of(job_id)
        return isinstance(record, StateRecord) and record.state in RESUMABLE

    def _settle(self, said: JobSettled | CancelJob) -> None:
        if settle(self._context.records, said):
            self.conclude(said.job_id)
        else:
            self._jobs.move(said.job_id, Stage.GONE)

    def conclude(self, job_id: str) -> None:
        """Report a job with an outcome, or try the job again."""
        self._jobs.move(job_id, Stage.ENDED)
        self._context.persisting.do(f"decide on a retry of job {job_id}", partial(self._decide, job_id))

    def _decide(self, job_id: str) -> None:
        """Decide on a retry of a job; its outcome is on disk. Raises OSError: a temporary fault."""
        self._jobs.ends += 1
        try:
            with self._context.records.open(job_id) as job:
                outcome = job.outcome()
                where, most = self._judge(job, outcome)
                if outcome is not None and where is Where.HERE:
                    self._again(job, outcome, most)
                    return
        except RecordError as error:
            # With a broken record, an attempt to report the job is never wrong.
            self._context.warn("cannot decide on retry", error, job_id=job_id)
            outcome, where = None, None
        if where is Where.ELSEWHERE and outcome is not None and self._fleet is not None:
            self._jobs.move(job_id, Stage.HANDING_ON)
            call = partial(self._hand_on, self._fleet, job_id, outcome, most)
            self._context.start("queue", call, partial(self._handed_on, job_id, outcome))
        else:
            self._delivery.add(job_id, outcome)

    def _judge(self, job: JobDir, outcome: Outcome | None) -> tuple[Where | None, int]:
        """Give the place of the next attempt, and the limit of attempts."""
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
            # RETRY_WAIT is on disk. The next attempt sets the old outcome aside when it begins.
        pause = pause_before(state.attempt, bounds.min_s, bounds.max_s, self._rng)
        self._jobs.move(job.job_id, Stage.RETRY_WAIT).due = clock.now() + pause
        # max_attempts=0: the queue only keeps the time, and the agent itself has counted the attempts.
        task = Task(Kind.RUN, job.job_id, context.config.node_id, 1, 0, outcome.message)
        context.note(partial(context.queue.put, task, pause), NOT_NOTED)
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

    # --- to another node -----------------------------------------------------------------------------------

    def _hand_on(self, fleet: Fleet, job_id: str, outcome: Outcome, most: int) -> str:
        """Offer the job to the other nodes, and end the job here; runs in a thread."""
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
            # Report the job instead of waiting for the fleet: the coordinator may have another node for it.
            context.warn("job not handed on", error, job_id=job_id)
            self._delivery.add(job_id)
            return
        self._jobs.move(job_id, Stage.GONE)
        context.log.info("job left to the fleet", job_id=job_id, code=outcome.code, how=how)
        context.show(job_id, State.FAILED, outcome=outcome)


class RetryOnDemand:
    """Tries a job again when the operator asks, and tells the supervisor the result."""

    def __init__(self, context: AgentContext, fleet: Fleet | None, delivery: DeliveryQueue) -> None:
        self._context = context
        self._fleet = fleet
        self._delivery = delivery

    def retry(self, job_id: str) -> None:
        """Try a job again, or send its report again."""
        entry = self._context.jobs.get(job_id)
        if entry is not None and entry.stage is Stage.RETRY_WAIT:
            entry.due = clock.now()
            self._tell(Retried(job_id, f"the node tries job {job_id} again now"))
        elif entry is not None and entry.stage is Stage.REPORTING:
            self._delivery.hurry()
            self._tell(Retried(job_id, f"the node sends the report of job {job_id} again now"))
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
            if self._delivery.take_back(job_id):
                return Retried(job_id, f"the node sends the refused report of job {job_id} again now")
            with context.records.open(job_id) as job:
                state = job.state().state
        except (MinerError, OSError) as error:
            return Retried(job_id, f"cannot retry job {job_id}: {error}", done=False)
        why = f"its state is {state}; only a job in RETRY_WAIT or a report can be retried"
        return Retried(job_id, f"cannot retry job {job_id}: {why}", done=False)

    def _requeued(self, job_id: str, future: Future[bool]) -> None:
        try:
            found = future.result()
        except MinerError as error:
            self._tell(Retried(job_id, f"cannot retry job {job_id}: {error}", done=False))
            return
        if found:
            self._tell(Retried(job_id, f"any node of the fleet may run job {job_id} again now"))
        else:
            why = "neither this node nor the fleet's queue has the job"
            self._tell(Retried(job_id, f"cannot retry job {job_id}: {why}", done=False))
