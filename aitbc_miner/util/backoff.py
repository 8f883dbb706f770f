"""When to try again and when the next beat is due, so that many nodes never knock at the same moment."""

import math
import random


class Backoff:
    """Growing delays with full jitter: each drawn between `min_s` and a ceiling that doubles up to `max_s`.

    The jitter is what keeps a thousand nodes apart after the coordinator was down for all of them at once.
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
        """Begin again with short delays: it worked."""
        self.failures = 0


def jittered(interval: float, pct: float, rng: random.Random) -> float:
    """Give `interval`, more or less by up to `pct` percent."""
    return interval * (1 + rng.uniform(-pct, pct) / 100)


class BeatSchedule:
    """When the next beat is due (`due`): on a fixed grid with jitter, or after a backoff when one failed.

    Being late moves nothing, so lateness does not add up; what was missed, as in a suspend, is left out.
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
        """Plan the next one, for the next point of the grid, give or take the jitter."""
        if self._failing:
            self._grid = now
        self._failing = False
        self._backoff.reset()
        # One sent early by its jitter leaves its own point of the grid ahead; that one is done all the same.
        missed = max(0, math.floor((now - self._grid) / self._interval_s))
        self._grid += (missed + 1) * self._interval_s
        self.due = self._grid - self._interval_s + jittered(self._interval_s, self._jitter_pct, self._rng)

    def failed(self, now: float, at_least_s: float = 0.0) -> None:
        """Plan to try again, not before as long as asked, nor at the same moment as all the others."""
        self._failing = True
        self._asked = now + at_least_s * (1 + self._rng.uniform(0, self._jitter_pct) / 100)
        self.due = max(self._asked, now + self._backoff.next())

    def hurry(self, at: float, *, answered: bool = False) -> None:
        """Make the next one due at this time if it was due later, unless we wait after a failure.

        `answered`: the other side has just answered something else; then we wait for what it asked alone.
        """
        if self._failing and answered:
            self.due = min(self.due, max(at, self._asked))
        elif not self._failing and at < self.due:
            self.due = self._grid = at

    def again(self, now: float) -> None:
        """Make the next one due now, whatever there was: it is another one."""
        self.due = self._grid = now
