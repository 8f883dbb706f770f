"""Requests of `aitbc-minerctl` that need the disk: history, allow, reload. A child answers each.

`slow_answers.py` has the child's work. This module limits the number of children, kills a child that takes
too long, and passes on its answer or the reason why the child gave none.
"""

import os
from collections.abc import Callable
from functools import partial
from typing import Any

from msgspec import Struct

from aitbc_miner.control.protocol import LATER_S, Answer, Done, History, Judged, Later, Refusal, Request
from aitbc_miner.errors import EXIT_CONFIG, MinerError
from aitbc_miner.supervisor.children import OneShots
from aitbc_miner.supervisor.node_plan import Layout, NodePlan
from aitbc_miner.supervisor.shutdown import NodeShutdown
from aitbc_miner.supervisor.slot_pool import SlotPool
from aitbc_miner.util import clock
from aitbc_miner.util.log import events

MAX_AT_ONCE = 4


class SlowVerb(Struct, frozen=True):
    """The rules of a verb: the type of its answer, its most children at once, and their time limit.

    A refusal consists of `cannot` and then `reader`, the name of the failed process, or `busy`.
    """

    says: Any
    cannot: str
    reader: str
    busy: str
    at_once: int = MAX_AT_ONCE
    limit_s: float = LATER_S


VERB_RULES = {
    "history": SlowVerb(
        says=History | Refusal,
        cannot="cannot show the history",
        reader="the process that reads it",
        busy=f"{MAX_AT_ONCE} other requests are running; try again in a moment",
    ),
    "allow": SlowVerb(
        says=Judged,
        cannot="cannot judge a command",
        reader="the process that reads the allowlist",
        busy=f"{MAX_AT_ONCE} other requests are running; try again in a moment",
    ),
    "reload": SlowVerb(
        says=Layout,
        cannot="cannot reload",
        reader="the process that reads the configuration",
        busy="another reload is running; try again in a moment",
        at_once=1,
        limit_s=30.0,
    ),
}


class SlowRequests:
    """Has children answer requests, and changes `slots` after a reload."""

    def __init__(self, node: NodePlan, one_shots: OneShots, slots: SlotPool, shutdown: NodeShutdown) -> None:
        self._node = node
        self._one_shots = one_shots
        self._slots = slots
        self._shutdown = shutdown
        self._log = events("supervisor")

    def ask(self, request: Request, later: Later) -> None:
        """Have a child answer; `later` gets the answer, or at once a refusal."""
        verb = VERB_RULES[request.verb]
        children = [child for child in self._one_shots.under_way() if child.name == request.verb]
        for child in children:
            # A disk hangs; the child is killed so that the next request can start another.
            if clock.now() - child.started > verb.limit_s:
                child.kill()
        if request.verb == "allow" and not request.command:
            later(Refusal("cannot judge a command: the request has none; give a command with its arguments"))
        elif len(children) >= verb.at_once:
            later(Refusal(f"{verb.cannot}: {verb.busy}"))
        else:
            self._start(request, verb, later)

    def _start(self, request: Request, verb: SlowVerb, later: Later) -> None:
        files: list[int] = []
        try:
            if request.verb == "history":
                # The child writes into this memory file; the client gets the file unread.
                files.append(os.memfd_create("history"))
            work, done = self._work(request, *files), partial(self._done, verb, files, later)
            self._one_shots.start(request.verb, work, verb.says, done, keep=files)
        except OSError as error:
            _close(files)
            later(Refusal(f"{verb.cannot}: {error.strerror}; try again in a moment"))

    def _work(self, request: Request, memory: int = -1) -> Callable[[], Answer | Layout]:
        match request.verb:
            case "history":
                return partial(self._node.read_history, request, memory)
            case "allow":
                return partial(self._node.judge, request)
        return self._node.read_layout

    def _done(self, verb: SlowVerb, files: list[int], later: Later, said: Answer | Layout | str) -> None:
        if isinstance(said, History):
            later((said, files))
            return
        _close(files)
        if isinstance(said, str):
            later(Refusal(f"{verb.cannot}: {verb.reader} {said}; see `journalctl -u aitbc-miner`"))
        else:
            later(self._follow(said) if isinstance(said, Layout) else said)

    def _follow(self, layout: Layout) -> Answer:
        """Change the slots as the operator wants, and describe the changes."""
        if layout.faults:
            self._log.error("reload refused", faults=layout.faults)
            lines = "\n".join(layout.faults)
            return Refusal(f"cannot reload; nothing was changed:\n{lines}", EXIT_CONFIG)
        if self._shutdown.mode is not None or not self._slots.slots:
            changes = "no change, because the node is starting or stopping; reload again when it runs"
        else:
            try:
                changes = self._slots.follow(layout)
            except MinerError as error:
                return Refusal(f"cannot reload; nothing was changed: {error}", EXIT_CONFIG)
        self._log.info("reloaded", changes=changes, restart=layout.restart)
        keys = ", ".join(layout.restart)
        restart = f"; restart the miner to apply {keys}: running jobs go on" if keys else ""
        return Done(f"reloaded: {changes}{restart}")


def _close(files: list[int]) -> None:
    for file in files:
        os.close(file)
