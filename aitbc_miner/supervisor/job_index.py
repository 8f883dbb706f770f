"""What the supervisor remembers of jobs, for `jobs` and `job`: bounded, and the disk is the truth."""

from collections import Counter, OrderedDict

from msgspec.structs import replace

from aitbc_miner.control.protocol import JobRow
from aitbc_miner.ipc.channel import MAX_LINE, MAX_UNFINISHED, ExcessError
from aitbc_miner.ipc.messages import JobEnded, JobUpdate
from aitbc_miner.jobs import FINAL, State

KEPT = 2000


class JobIndex:
    """The jobs of this node by id, oldest first. Of the finished ones only the last `KEPT` are remembered."""

    def __init__(self) -> None:
        self._rows: OrderedDict[str, JobRow] = OrderedDict()
        self._final: OrderedDict[str, None] = OrderedDict()
        self.finished: Counter[str] = Counter()
        self.unreported: set[str] = set()

    def get(self, job_id: str) -> JobRow | None:
        """Give a job's row, if it is remembered."""
        return self._rows.get(job_id)

    def rows(self, state: State | None) -> list[JobRow]:
        """Give all rows, or those in one state."""
        return [row for row in self._rows.values() if state in {None, row.state}]

    def update(self, said: JobUpdate) -> bool:
        """Take in what the agent says; True when it is the end of a job that was in no slot to the end.

        Raises:
            ExcessError: it knows more jobs without an end than there can be.
        """
        old = self._rows.get(said.job_id, JobRow(said.job_id, said.state))
        # An earlier attempt of a job that was tried again may have failed.
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
        # One that waits for its next attempt has no report yet, and waits over a stop as well.
        if said.state in FINAL | {State.RETRY_WAIT}:
            self.unreported.discard(said.job_id)
        ended = said.state is State.UPLOADING and old.state not in FINAL | {State.UPLOADING}
        if ended:
            self.finished[said.code or "OK"] += 1
        return ended

    def step(self, job_id: str, state: State, slot: str) -> None:
        """Note that a job has come to a step in a slot."""
        old = self._rows.get(job_id, JobRow(job_id, state))
        self._put(replace(old, state=state, slot=slot))

    def ended(self, said: JobEnded) -> None:
        """Note how a job ended; its report is next."""
        self.finished[said.code or "OK"] += 1
        old = self._rows.get(said.job_id, JobRow(said.job_id, State.UPLOADING))
        self._put(replace(old, state=State.UPLOADING, code=said.code, message=said.message))

    def settled(self, job_id: str) -> None:
        """Note that nobody works on a job any more: its report is next, whether the agent knows it or not."""
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
            # The next agent tells of those that there are.
            self._rows = OrderedDict((job_id, self._rows[job_id]) for job_id in self._final)
            raise ExcessError(f"it told of more than {MAX_UNFINISHED} jobs without an end")
