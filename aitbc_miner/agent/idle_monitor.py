"""Tells the operator that no job has come for long, with the probable causes."""

from concurrent.futures import Future

from aitbc_miner.agent.context import AgentContext
from aitbc_miner.agent.pull import Puller
from aitbc_miner.coordinator.interface import Standing
from aitbc_miner.errors import ErrorCode
from aitbc_miner.ipc.messages import Starved
from aitbc_miner.store.ledger import OK
from aitbc_miner.util import clock

STARVED_S = 300.0
LOOK_S = 60.0


class IdleMonitor:
    """Looks for causes at intervals, as long as each pull comes back empty."""

    def __init__(self, context: AgentContext, puller: Puller, *, starved_s: float = STARVED_S) -> None:
        self._context = context
        self._puller = puller
        self._starved_s = starved_s
        self._told = Starved()
        self._asking = False
        self._at = 0.0

    def next_due(self) -> float | None:
        """When to look for causes next."""
        since = self._puller.idle_since
        if since is None:
            return None if self._told.since is None else clock.now()
        return None if self._asking else max(self._at, since + self._starved_s)

    def start_due(self) -> None:
        """Look for causes, if due; note at once that jobs come again."""
        due = self.next_due()
        if due is None or clock.now() < due:
            return
        if self._puller.idle_since is None:
            self._tell(Starved())
            return
        self._asking = True
        self._context.start("queue", self._why, self._found)

    def _why(self) -> list[str]:
        counts = self._context.ledger.finished_counts()
        # A cancelled job costs no reputation: nobody reports it.
        failed = sum(jobs for code, jobs in counts.items() if code not in {OK, ErrorCode.E_CANCELLED})
        return self._context.coordinator.why_idle(Standing(counts.get(OK, 0), failed))

    def _found(self, future: Future[list[str]]) -> None:
        self._asking = False
        self._at = clock.now() + LOOK_S
        since = self._puller.idle_since
        try:
            causes = future.result()
        except Exception as error:  # noqa: BLE001  # the causes are only a help to the operator
            self._context.warn("cannot find cause of missing jobs", error)
            return
        if since is not None and causes:
            self._tell(Starved(since, causes))

    def _tell(self, said: Starved) -> None:
        if said != self._told:
            if said.since is None:
                self._context.log.info("jobs come again")
            elif said.since != self._told.since:
                idle_s = round(clock.now() - said.since)
                self._context.log.warning("no job has come for long", idle_s=idle_s, perhaps=said.causes)
            self._told = said
            self._context.channel.send(said)
