"""Retries calls that failed because of a local fault (such as a full disk), until they succeed."""

from collections.abc import Callable

from aitbc_miner.util import clock
from aitbc_miner.util.backoff import Backoff
from aitbc_miner.util.log import events

MIN_S, MAX_S = 0.2, 30.0


class Persisting:
    """Retries calls in the agent's main thread; calls `tell` if `trouble`, shown by `status`, may change."""

    def __init__(self, tell: Callable[[], None]) -> None:
        self._tell = tell
        self._left: dict[str, tuple[float, Callable[[], object], Backoff, str]] = {}

    @property
    def trouble(self) -> str | None:
        """The error of the first call that waits for a retry; None without such a call."""
        return next((error for *_, error in self._left.values()), None)

    def do(self, what: str, call: Callable[[], object]) -> None:
        """Run `call` now, and retry after an OSError. `what` names action and object ("settle job j-1")."""
        backoff = self._left[what][2] if what in self._left else Backoff(MIN_S, MAX_S)
        try:
            call()
        except OSError as error:
            said = f"cannot {what}: {error}"
            self._left[what] = (clock.now() + backoff.next(), call, backoff, said)
            events("agent").warning("action postponed", error=said)
            self._tell()
            return
        if self._left.pop(what, None):
            self._tell()

    def next_due(self) -> float | None:
        """Give the time of the next retry; None without a waiting call."""
        return min((due for due, *_ in self._left.values()), default=None)

    def start_due(self) -> None:
        """Retry the calls that are due."""
        for what, (due, call, *_) in list(self._left.items()):
            # An earlier call in this loop may have done this call's work too.
            if due <= clock.now() and what in self._left:
                self.do(what, call)
