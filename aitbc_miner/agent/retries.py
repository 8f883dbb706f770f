"""What becomes of a job that has failed: its report, another attempt here, or another node's."""

import random
from collections.abc import Callable
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
from aitbc_miner.jobs import MOVES, Outcome, RetryPolicy, State
from aitbc_miner.queue.interface import Kind, QueueError, Task
from aitbc_miner.store.ledger import account_of
from aitbc_miner.store.records import JobDir, RecordError
from aitbc_miner.util import clock

LOOK_AGAIN_S = 0.1


class Retries:
    """Decides about jobs whose attempt is over, and keeps those that wait for their next attempt here.

    When to try next is kept in memory, and noted in the queue for after a restart.
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
        """Have the jobs taken in once more whose next attempt is due.

        A job that the supervisor last showed in a slot waits until a later word of it: the end of the attempt
        may be known here before that word comes.
        """
        now, in_slots = clock.now(), self._jobs.in_slots()
        for entry in self._jobs.among(Stage.RETRY_WAIT):
            if entry.due > now:
                continue
            if entry.job_id in in_slots:
                entry.due = now + LOOK_AGAIN_S
                continue
            self._jobs.move(entry.job_id, Stage.RESUMING)
            self._note(partial(self._context.queue.remove, Kind.RUN, entry.job_id))

    def recovered(self, job_ids: list[str]) -> None:
        """Wait on for those that an earlier run of the node has left waiting."""
        left: dict[str, float] = {}
        try:
            waiting = self._context.queue.waiting(Kind.RUN, self._context.config.node_id)
            left = {task.job_id: max(0.0, due_s) for task, due_s in waiting}
        except QueueError as error:
            self._context.warn("times of retries not read", error)
        for job_id in job_ids:
            self._jobs.move(job_id, Stage.RETRY_WAIT).due = clock.now() + left.get(job_id, 0.0)
            # The coordinator counts it as ours, and may cancel it while it waits.
            self._jobs.acknowledge(job_id)
            self._context.show(job_id, State.RETRY_WAIT)

    # --- the end of an attempt -----------------------------------------------------------------------------

    def settle(self, said: JobSettled | CancelJob) -> None:
        """Nobody works on the job any more: what it left is its outcome, or it is lost or cancelled."""
        job_id = said.job_id
        stage = self._jobs.stage(job_id)
        if stage in CONCLUDED:
            return
        if isinstance(said, JobSettled) and said.code is None and stage in WAITING and self._waits(job_id):
            # Of an attempt whose outcome was found on the disk before its worker's end was heard of.
            return
        if stage is not Stage.SETTLING:
            self._jobs.move(job_id, Stage.SETTLING)
        self._context.persisting.do(f"settle job {job_id}", partial(self._settle, said))

    def _waits(self, job_id: str) -> bool:
        """Whether a job waits for a slot by its record, too, which a worker writes."""
        try:
            with self._context.records.open(job_id) as job:
                return job.state().state in RESUMABLE
        except (MinerError, OSError):
            return False

    def _settle(self, said: JobSettled | CancelJob) -> None:
        if settle(self._context.records, said):
            self.conclude(said.job_id)
        else:
            self._jobs.move(said.job_id, Stage.GONE)

    def conclude(self, job_id: str) -> None:
        """Have a job that has an outcome reported or tried again."""
        self._jobs.move(job_id, Stage.ENDED)
        self._context.persisting.do(f"decide about job {job_id}", partial(self._decide, job_id))

    def _decide(self, job_id: str) -> None:
        """Decide about a job whose attempt is over; its outcome is on disk. Raises OSError: not now."""
        self._jobs.ends += 1
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
            outcome, where = None, None
        if where is Where.ELSEWHERE and outcome is not None and self._fleet is not None:
            self._jobs.move(job_id, Stage.HANDING_ON)
            call = partial(self._hand_on, self._fleet, job_id, outcome, most)
            self._context.start("queue", call, partial(self._handed_on, job_id, outcome))
        else:
            self._delivery.add(job_id, outcome)

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
        self._jobs.move(job.job_id, Stage.RETRY_WAIT).due = clock.now() + pause
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
            self._delivery.add(job_id)
            return
        self._jobs.move(job_id, Stage.GONE)
        context.log.info("job left to the fleet", job_id=job_id, code=outcome.code, how=how)
        context.show(job_id, State.FAILED, outcome=outcome)


class RetryOnDemand:
    """Tells the supervisor, for each job that an operator wants tried once more, what comes of it."""

    def __init__(self, context: AgentContext, fleet: Fleet | None, delivery: DeliveryQueue) -> None:
        self._context = context
        self._fleet = fleet
        self._delivery = delivery

    def retry(self, job_id: str) -> None:
        """Have a job tried, or its report sent, once more."""
        entry = self._context.jobs.get(job_id)
        if entry is not None and entry.stage is Stage.RETRY_WAIT:
            entry.due = clock.now()
            self._tell(Retried(job_id, f"job {job_id} is tried again now"))
        elif entry is not None and entry.stage is Stage.REPORTING:
            self._delivery.hurry()
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
            if self._delivery.take_back(job_id):
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
