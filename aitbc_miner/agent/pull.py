"""Asks the coordinator for jobs, if slots are free."""

from concurrent.futures import Future
from functools import partial

import msgspec

from aitbc_miner.agent.admission_queue import AdmissionQueue
from aitbc_miner.agent.context import AgentContext
from aitbc_miner.agent.reconcile import Reconciler
from aitbc_miner.coordinator.interface import Paced, PulledJob, PullFilters, Unreachable
from aitbc_miner.ipc.channel import ChannelError
from aitbc_miner.util import clock
from aitbc_miner.util.backoff import Backoff

MAX_KNOWN = 1000
MAX_UNREPORTED = 100
"""With so many unaccepted reports, the node pulls no jobs."""
PAUSE_TOLD_S = 30.0
"""`status` shows longer pauses."""
GROWTH = 1.5
"""The factor by which the pause grows after each empty pull."""


class Puller:
    """Pulls one job at a time, as long as a slot is free."""

    def __init__(self, context: AgentContext, admission: AdmissionQueue, reconciler: Reconciler) -> None:
        self._context = context
        self._jobs = context.jobs
        self._admission = admission
        self._reconciler = reconciler
        self._ends_seen = 0
        self._pulling = False
        self._at = 0.0
        self._closed_s = self._closed_until = 0.0
        self._stretch = 1.0
        self.idle_since: float | None = None
        """The time of the first of the last empty pulls; None while jobs come."""
        config = context.config
        self._backoff = Backoff(config.coordinator.poll_interval_s, config.heartbeat.backoff.max_s)

    def next_due(self) -> float | None:
        """When to pull next; None as long as the node may not pull."""
        if self._jobs.ends != self._ends_seen:
            self._ends_seen = self._jobs.ends
            self.hurry()
        return max(self._at, self._closed_until, self._not_before()) if self._may_pull() else None

    def hurry(self) -> None:
        """Pull now, or as soon as the coordinator permits: a job may be available."""
        self._at = clock.now()
        self._stretch = 1.0

    def _not_before(self) -> float:
        """Give the earliest time of a pull: the jobs that the coordinator counts as ours come first."""
        troubled_until = self._admission.troubled_until
        if self._reconciler.asked and not self._context.homeless:
            return troubled_until
        return max(troubled_until, clock.now() + 60.0)

    def start_due(self) -> None:
        """Pull, if due; tell the supervisor if the reason for a pause has changed."""
        paused = self._why_paused()
        if paused != self._context.paused:
            self._context.paused = paused
            self._context.tell()
        due = self.next_due()
        if due is None or clock.now() < due:
            return
        self._pulling = True
        offers = [msgspec.to_builtins(offer) for offer in self._jobs.room()]
        filters = PullFilters(offers, self._jobs.names()[:MAX_KNOWN])
        self._context.start("pull", partial(self._context.coordinator.pull, filters), self._pulled)

    def _why_paused(self) -> str:
        if self._context.pending >= MAX_UNREPORTED:
            return f"{MAX_UNREPORTED} or more reports wait for the coordinator to accept them"
        if self._closed_s > PAUSE_TOLD_S and clock.now() < self._closed_until:
            return f"the coordinator asked for a pause of {self._closed_s:.0f} s"
        if self._not_before() > clock.now() + PAUSE_TOLD_S and not self._pulling:
            if not self._reconciler.asked:
                return "the coordinator has not yet said which jobs this node has"
            return "this node could not admit the last job; see the event `cannot admit job` in the log"
        return ""

    def _close(self, seconds: float) -> None:
        self._closed_s, self._closed_until = seconds, clock.now() + seconds

    def _may_pull(self) -> bool:
        blocked = self._pulling or not self._context.token or self._context.pending >= MAX_UNREPORTED
        return not blocked and bool(self._jobs.room())

    def _pulled(self, future: Future[PulledJob | None]) -> None:
        self._pulling = False
        try:
            job = future.result()
            is_new = job is not None and self._admission.accept(job)
        except ChannelError:
            raise
        except Paced as error:
            self._close(error.wait_s)
            return
        except Exception as error:  # noqa: BLE001  # one odd reply must not end the agent, again and again
            wanted = self._context.failed(error)
            self._context.call_failed("pull", "pull failed", error)
            self._at = clock.now() + self._backoff.next()
            self._close(wanted or 0.0)
            if isinstance(error, Unreachable):
                self._reconciler.hurry()
            return
        self._backoff.reset()
        self._context.worked()
        self._context.answered("pull")
        self._at = clock.now() + (0.0 if is_new else self._pause())
        if is_new:
            self._stretch = 1.0
            self.idle_since = None
        elif self.idle_since is None:
            self.idle_since = clock.now()

    def _pause(self) -> float:
        """Give the pause after an empty pull, and make the next pause longer."""
        pause_s = self._stretch * self._context.config.coordinator.poll_interval_s
        self._stretch = min(self._stretch * GROWTH, self._context.coordinator.slowest)
        return pause_s
