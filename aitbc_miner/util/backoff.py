"""Delays before retries and heartbeats, with jitter, so that many nodes never call at the same moment."""

import math
import random


class Backoff:
    """Growing delays with full jitter: each is random from `min_s` to a ceiling that doubles up to `max_s`.

    Without jitter, all nodes would call at the same moment after an outage of the coordinator.
    """

    def __init__(
        self, min_s: float, max_s: float, rng: random.Random | None = None, *, failures: int = 0
    ) -> None:
        self._min_s = min_s
        self._max_s = max(min_s, max_s)
        self._rng = rng or random.Random()  # noqa: S311  # spreads load, protects nothing
        self.failures = failures

    def next(self) -> float:
        """Give the next delay in seconds."""
        self.failures += 1
        ceiling_s = min(self._max_s, self._min_s * 2.0 ** min(self.failures, 64))
        return self._rng.uniform(self._min_s, ceiling_s)

    def reset(self) -> None:
        """Begin again with short delays, after a success."""
        self.failures = 0


def jittered(interval: float, pct: float, rng: random.Random) -> float:
    """Change `interval` at random by up to `pct` percent."""
    return interval * (1 + rng.uniform(-pct, pct) / 100)


class BeatSchedule:
    """Plans the next heartbeat (`due`): on a fixed grid with jitter, or, after a failure, by a backoff.

    A late heartbeat does not move the grid, so delays do not add up. Points missed in a suspend are skipped.
    """

    def __init__(
        self, interval_s: float, jitter_pct: float, backoff: Backoff, rng: random.Random, now: float
    ) -> None:
        self._interval_s = interval_s
        self._jitter_pct = jitter_pct
        self._backoff = backoff
        self._rng = rng
        self._grid = now
        self._failing = False
        self._asked = now
        self.due = now

    def succeeded(self, now: float) -> None:
        """Plan the next heartbeat for the next point of the grid, with jitter."""
        if self._failing:
            self._grid = now
        self._failing = False
        self._backoff.reset()
        # Jitter may send a heartbeat before its point of the grid; the next heartbeat takes the next point.
        missed = max(0, math.floor((now - self._grid) / self._interval_s))
        self._grid += (missed + 1) * self._interval_s
        self.due = self._grid - self._interval_s + jittered(self._interval_s, self._jitter_pct, self._rng)

    def failed(self, now: float, at_least_s: float = 0.0) -> None:
        """Plan a retry after at least `at_least_s`, with jitter against retries of all nodes at once."""
        self._failing = True
        self._asked = now + at_least_s * (1 + self._rng.uniform(0, self._jitter_pct) / 100)
        self.due = max(self._asked, now + self._backoff.next())

    def hurry(self, at: float, *, answered: bool = False) -> None:
        """Move the next heartbeat forward to `at`, except during the backoff after a failure.

        answered: the coordinator has just answered another call, so that only the pause that the coordinator
        asked for still holds, not the backoff.
        """
        if self._failing and answered:
            self.due = min(self.due, max(at, self._asked))
        elif not self._failing and at < self.due:
            self.due = self._grid = at

    def again(self, now: float) -> None:
        """Make the next heartbeat due now, also during a backoff."""
        self.due = self._grid = now
