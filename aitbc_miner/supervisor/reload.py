"""Reading the configuration anew while the node runs: a child reads, for that may take its time."""

from collections.abc import Callable
from functools import partial
from typing import Any

from aitbc_miner.control.protocol import Done, Later, Refusal
from aitbc_miner.errors import EXIT_CONFIG, MinerError
from aitbc_miner.supervisor.children import Child, Errands, Main
from aitbc_miner.supervisor.running_slot import Layout
from aitbc_miner.util import clock
from aitbc_miner.util.log import events

READ_S = 30.0
"""How long reading may take; a further try ends one that takes longer (a file system that hangs)."""


class Reloader:
    """One reload at a time. `read` is the child's main function, `follow` acts on it and says how."""

    def __init__(self, errands: Errands, read: Main, follow: Callable[[Layout], str]) -> None:
        self._errands = errands
        self._read = read
        self._follow = follow
        self._reader: Child[Any] | None = None
        self._log = events("supervisor")

    def reload(self, tell: Later) -> None:
        """Begin to reload; `tell` gets the answer, at once or later."""
        if self._reader is not None:
            if clock.now() - self._reader.started > READ_S:
                self._reader.kill()
            tell(Refusal("cannot reload: another reload is under way; try again in a moment"))
            return
        try:
            self._reader = self._errands.start("reload", self._read, Layout, partial(self._done, tell))
        except OSError as error:
            tell(Refusal(f"cannot reload: {error.strerror}; try again in a moment"))

    def _done(self, tell: Later, said: Layout | str) -> None:
        self._reader = None
        if isinstance(said, str):
            tell(Refusal(f"cannot reload: what was to read the configuration {said}; see the journal"))
            return
        if said.faults:
            self._log.error("not reloaded", faults=said.faults)
            lines = "\n".join(said.faults)
            tell(Refusal(f"cannot reload, nothing was changed:\n{lines}", EXIT_CONFIG))
            return
        try:
            changes = self._follow(said)
        except MinerError as error:
            tell(Refusal(f"cannot reload, nothing was changed: {error}", EXIT_CONFIG))
            return
        self._log.info("reloaded", changes=changes, restart=said.restart)
        restart = f"; for {', '.join(said.restart)} restart the miner: jobs go on" if said.restart else ""
        tell(Done(f"reloaded: {changes}{restart}"))
