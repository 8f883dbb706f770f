"""What jobs say of themselves, and when to pass it on to the coordinator.

The report is also how the coordinator says that a job is cancelled, so each job makes one now and then, from
the moment it is acknowledged, even if it says nothing.
"""

from msgspec import Struct


class Progress(Struct):
    """A job's word on itself, and when to pass it on. Mutable: this is the agent's own notebook."""

    pct: float = 0.0
    note: str = ""
    due: float = 0.0
    sending: bool = False


class ProgressBook:
    """The acknowledged jobs of this node. Pure: the times are given, in seconds of the boot-time clock."""

    def __init__(self, every_s: float, pause_s: float) -> None:
        self._every_s = every_s
        self._pause_s = pause_s
        self._jobs: dict[str, Progress] = {}

    def __contains__(self, job_id: str) -> bool:
        return job_id in self._jobs

    def ids(self) -> list[str]:
        """Name the jobs."""
        return list(self._jobs)

    def began(self, job_id: str, now: float) -> None:
        """Note that a job is ours now."""
        self._jobs.setdefault(job_id, Progress(due=now + self._every_s))

    def ended(self, job_id: str) -> None:
        """Forget a job."""
        self._jobs.pop(job_id, None)

    def note(self, job_id: str, pct: float, note: str, now: float) -> None:
        """Take what a job says; it is passed on soon, but not at the pace of a chatty task."""
        progress = self._jobs.setdefault(job_id, Progress(due=now))
        progress.pct, progress.note = pct, note
        progress.due = min(progress.due, now + self._pause_s)

    def start_due(self, now: float) -> list[tuple[str, float, str]]:
        """Take what is due and not under way: job, percent, note."""
        due = [(job_id, it) for job_id, it in self._jobs.items() if it.due <= now and not it.sending]
        for _, progress in due:
            progress.sending = True
        return [(job_id, progress.pct, progress.note) for job_id, progress in due]

    def sent(self, job_id: str, now: float) -> None:
        """Note that a report has come through, or failed: the next one says the same and more."""
        if progress := self._jobs.get(job_id):
            progress.sending = False
            progress.due = now + self._every_s

    def next_due(self) -> float | None:
        """When the next report is due."""
        return min((it.due for it in self._jobs.values() if not it.sending), default=None)
