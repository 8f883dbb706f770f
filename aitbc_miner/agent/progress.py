"""Sends the progress of jobs to the coordinator.

The coordinator's reply also says whether the job is cancelled. So the agent reports each acknowledged job at
intervals, even if the job shows no progress.
"""

from collections.abc import Iterator
from concurrent.futures import Future
from functools import partial

from aitbc_miner.agent.admission_queue import AdmissionQueue, by_coordinator
from aitbc_miner.agent.context import AgentContext
from aitbc_miner.agent.job_table import ProgressNote
from aitbc_miner.coordinator.interface import CoordinatorError, Unauthorized
from aitbc_miner.ipc.messages import JobProgress
from aitbc_miner.util import clock

PAUSE_S = 1.0
"""The shortest time between new progress of a job and its report: a task may report without a limit."""


class ProgressReports:
    """Reports the progress of the acknowledged jobs of the table."""

    def __init__(self, context: AgentContext, admission: AdmissionQueue) -> None:
        self._context = context
        self._jobs = context.jobs
        self._admission = admission

    def note(self, said: JobProgress) -> None:
        """Note new progress of a job, and report it within `PAUSE_S`."""
        self._jobs.acknowledge(said.job_id)
        entry = self._jobs.get(said.job_id)
        if entry is not None and (progress := entry.progress) is not None:
            progress.pct, progress.note = said.pct or 0.0, said.note
            progress.due = min(progress.due, clock.now() + PAUSE_S)

    def next_due(self) -> float | None:
        """When the next report is due."""
        # Without a token the agent can send nothing, and a due report would make the loop spin.
        if not self._context.token:
            return None
        return min((progress.due for _, progress in self._waiting()), default=None)

    def start_due(self) -> None:
        """Send the reports that are due."""
        if not self._context.token:
            return
        now = clock.now()
        for job_id, progress in [each for each in self._waiting() if each[1].due <= now]:
            progress.sending = True
            call = partial(self._context.coordinator.progress, job_id, progress.pct, progress.note)
            self._context.start("progress", call, partial(self._sent, job_id, progress))

    def _waiting(self) -> Iterator[tuple[str, ProgressNote]]:
        for job_id in self._jobs.ours():
            entry = self._jobs.get(job_id)
            if entry is not None and entry.progress is not None and not entry.progress.sending:
                yield job_id, entry.progress

    def _sent(self, job_id: str, progress: ProgressNote, future: Future[bool]) -> None:
        # A lost report does not matter: the next report says the same and more.
        progress.sending = False
        progress.due = clock.now() + self._context.config.heartbeat.interval_s
        try:
            wants_end = future.result()
        except Exception as error:  # noqa: BLE001  # one odd reply must not end the agent, again and again
            # Of the coordinator's errors, only a refused token needs an action.
            if isinstance(error, Unauthorized):
                self._context.token.refused()
            if not isinstance(error, CoordinatorError):
                self._context.warn("progress not accepted", error, job_id=job_id)
            return
        if wants_end:
            self._admission.cancel(by_coordinator(job_id))
