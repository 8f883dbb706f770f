"""Asking the coordinator for jobs, when there is room for them."""

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
"""Results that the coordinator has not taken yet, with which no more work is begun."""
PAUSE_TOLD_S = 30.0
"""A pause of more than this is told."""
GROWTH = 1.5
"""Of the pause between two pulls, with each that comes back empty."""


class Puller:
    """Pulls one job at a time, as long as there is a free slot."""

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
        """Since when each pull has come back empty; None while there is work."""
        config = context.config
        self._backoff = Backoff(config.coordinator.poll_interval_s, config.heartbeat.backoff.max_s)

    def next_due(self) -> float | None:
        """When to pull next; None as long as nothing may be pulled."""
        if self._jobs.ends != self._ends_seen:
            self._ends_seen = self._jobs.ends
            self.hurry()
        return max(self._at, self._closed_until, self._not_before()) if self._may_pull() else None

    def hurry(self) -> None:
        """Pull now, or when the coordinator lets us: there may be work."""
        self._at = clock.now()
        self._stretch = 1.0

    def _not_before(self) -> float:
        """Say from when on to pull: what the coordinator takes for ours already comes first."""
        troubled_until = self._admission.troubled_until
        if self._reconciler.asked and not self._context.homeless:
            return troubled_until
        return max(troubled_until, clock.now() + 60.0)

    def start_due(self) -> None:
        """Pull, if it is time; say so where something else than that keeps us from it."""
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
            return f"the coordinator has not taken {MAX_UNREPORTED} results or more yet"
        if self._closed_s > PAUSE_TOLD_S and clock.now() < self._closed_until:
            return f"the coordinator wants to be left alone for {self._closed_s:.0f} s"
        if self._not_before() > clock.now() + PAUSE_TOLD_S and not self._pulling:
            return "jobs cannot be taken in here, or what the coordinator takes for ours is not known yet"
        return ""

    def _close(self, seconds: float) -> None:
        self._closed_s, self._closed_until = seconds, clock.now() + seconds

    def _may_pull(self) -> bool:
        if self._pulling or not self._context.token or self._context.pending >= MAX_UNREPORTED:
            return False
        return bool(self._jobs.room())

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
        """Give the pause after a pull that came back empty, and make the next one longer."""
        pause_s = self._stretch * self._context.config.coordinator.poll_interval_s
        self._stretch = min(self._stretch * GROWTH, self._context.coordinator.slowest)
        return pause_s
