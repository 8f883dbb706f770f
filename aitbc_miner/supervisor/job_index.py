"""The supervisor's bounded list of jobs, for `jobs` and `job`. The records on disk are the truth."""

from collections import Counter, OrderedDict

from msgspec.structs import replace

from aitbc_miner.control.protocol import JobRow
from aitbc_miner.ipc.channel import MAX_LINE, MAX_UNFINISHED, ExcessError
from aitbc_miner.ipc.messages import JobEnded, JobUpdate
from aitbc_miner.jobs import FINAL, State

KEPT = 2000


class JobIndex:
    """The jobs of this node by id, oldest first, with at most the last `KEPT` finished jobs."""

    def __init__(self) -> None:
        self._rows: OrderedDict[str, JobRow] = OrderedDict()
        self._final: OrderedDict[str, None] = OrderedDict()
        self.finished: Counter[str] = Counter()
        self.unreported: set[str] = set()

    def get(self, job_id: str) -> JobRow | None:
        """Give a job's row; None for a job that is not in the list."""
        return self._rows.get(job_id)

    def rows(self, state: State | None) -> list[JobRow]:
        """Give the rows of all jobs, or of the jobs in one state."""
        return [row for row in self._rows.values() if state in {None, row.state}]

    def update(self, said: JobUpdate) -> bool:
        """Enter a change that the agent reports; True when a job has ended outside a slot.

        Raises:
            ExcessError: the agent names more unfinished jobs than can exist.
        """
        old = self._rows.get(said.job_id, JobRow(said.job_id, said.state))
        # The old row may hold the code of an earlier attempt, which the end of the job overwrites.
        ends = said.state in FINAL | {State.UPLOADING}
        row = JobRow(
            said.job_id,
            said.state,
            said.runner or old.runner,
            said.slot or old.slot,
            said.code if ends else said.code or old.code,
            said.message if ends else said.message or old.message,
            said.since_wall,
            said.wall_s if said.wall_s is not None else old.wall_s,
            said.artifacts or old.artifacts,
        )
        self._put(row)
        # A job in RETRY_WAIT has no report yet, so the node's stop does not wait for one.
        if said.state in FINAL | {State.RETRY_WAIT}:
            self.unreported.discard(said.job_id)
        ended = said.state is State.UPLOADING and old.state not in FINAL | {State.UPLOADING}
        if ended:
            self.finished[said.code or "OK"] += 1
        return ended

    def step(self, job_id: str, state: State, slot: str) -> None:
        """Note that a job has reached a step in a slot."""
        old = self._rows.get(job_id, JobRow(job_id, state))
        self._put(replace(old, state=state, slot=slot))

    def ended(self, said: JobEnded) -> None:
        """Note how a job ended; the agent reports the job next."""
        self.finished[said.code or "OK"] += 1
        old = self._rows.get(said.job_id, JobRow(said.job_id, State.UPLOADING))
        self._put(replace(old, state=State.UPLOADING, code=said.code, message=said.message))

    def settled(self, job_id: str) -> None:
        """Note that no process works on a job any more, so that the agent must report the job."""
        old = self._rows.get(job_id)
        if (old is None or old.state not in FINAL) and len(self.unreported) < MAX_UNFINISHED:
            self.unreported.add(job_id)

    def _put(self, row: JobRow) -> None:
        self._rows[row.job_id] = replace(row, message=row.message[:MAX_LINE])
        if row.state in FINAL:
            self._final[row.job_id] = None
        else:
            self._final.pop(row.job_id, None)
        if self._final and len(self._rows) > KEPT:
            del self._rows[self._final.popitem(last=False)[0]]
        if len(self._rows) > KEPT + MAX_UNFINISHED:
            # The next agent names the existing jobs again.
            self._rows = OrderedDict((job_id, self._rows[job_id]) for job_id in self._final)
            raise ExcessError(f"the agent named more than {MAX_UNFINISHED} unfinished jobs")
