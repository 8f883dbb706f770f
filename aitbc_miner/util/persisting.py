"""What this machine's own trouble has kept the agent from doing, until it is done: never final, and shown."""

from collections.abc import Callable

from aitbc_miner.util import clock
from aitbc_miner.util.backoff import Backoff
from aitbc_miner.util.log import events

MIN_S, MAX_S = 0.2, 30.0


class Persisting:
    """For the agent's main thread. `tell` is called when `trouble`, for `status`, may have changed."""

    def __init__(self, tell: Callable[[], None]) -> None:
        self._tell = tell
        self._left: dict[str, tuple[float, Callable[[], object], Backoff, str]] = {}

    @property
    def trouble(self) -> str | None:
        """What is in the way of the first of them."""
        return next((said for *_, said in self._left.values()), None)

    def do(self, what: str, call: Callable[[], object]) -> None:
        """Do it now, or as soon as it can be done. `what` names it, and the job ("settle job j-1")."""
        backoff = self._left[what][2] if what in self._left else Backoff(MIN_S, MAX_S)
        try:
            call()
        except OSError as error:
            said = f"cannot {what}: {error}"
            self._left[what] = (clock.now() + backoff.next(), call, backoff, said)
            events("agent").warning("tried again", error=said)
            self._tell()
            return
        if self._left.pop(what, None):
            self._tell()

    def next_due(self) -> float | None:
        """When to try the next one again."""
        return min((due for due, *_ in self._left.values()), default=None)

    def start_due(self) -> None:
        """Try again what is due."""
        for what, (due, call, *_) in list(self._left.items()):
            # What an earlier one has brought about is not done twice.
            if due <= clock.now() and what in self._left:
                self.do(what, call)
