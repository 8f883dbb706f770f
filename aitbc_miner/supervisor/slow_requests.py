"""Requests of `aitbc-minerctl` that a child answers, for disks may take their time: history, allow, reload.

The child does what slow_answers.py has for it. What is here starts few children at once, ends those that take
too long, and passes on the answer, or says why there is none.
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
    """What the child of a verb may say, how many there are at once, and after how long one may be ended.

    A refusal says what we `cannot` do, and then who of us failed (`reader`), or that it is `busy`.
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
        reader="what was to read it",
        busy=f"{MAX_AT_ONCE} others are asking for it; try again",
    ),
    "allow": SlowVerb(
        says=Judged,
        cannot="cannot judge a command",
        reader="what was to read the allowlist",
        busy=f"{MAX_AT_ONCE} others are asking; try again",
    ),
    "reload": SlowVerb(
        says=Layout,
        cannot="cannot reload",
        reader="what was to read the configuration",
        busy="another reload is under way; try again in a moment",
        at_once=1,
        limit_s=30.0,
    ),
}


class SlowRequests:
    """Has children answer requests; `slots` follow the layout that one has read."""

    def __init__(self, node: NodePlan, one_shots: OneShots, slots: SlotPool, shutdown: NodeShutdown) -> None:
        self._node = node
        self._one_shots = one_shots
        self._slots = slots
        self._shutdown = shutdown
        self._log = events("supervisor")

    def ask(self, request: Request, later: Later) -> None:
        """Have a child answer; `later` gets the answer then, or at once that there will be none."""
        verb = VERB_RULES[request.verb]
        children = [child for child in self._one_shots.under_way() if child.name == request.verb]
        for child in children:
            # A disk hangs; it is ended so that a further try can begin.
            if clock.now() - child.started > verb.limit_s:
                child.kill()
        if request.verb == "allow" and not request.command:
            later(Refusal("cannot judge: there is no command; give one with its arguments"))
        elif len(children) >= verb.at_once:
            later(Refusal(f"{verb.cannot}: {verb.busy}"))
        else:
            self._start(request, verb, later)

    def _start(self, request: Request, verb: SlowVerb, later: Later) -> None:
        files: list[int] = []
        try:
            if request.verb == "history":
                # The child writes into memory of ours, which goes to the client unread.
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
            later(Refusal(f"{verb.cannot}: {verb.reader} {said}; see the journal"))
        else:
            later(self._follow(said) if isinstance(said, Layout) else said)

    def _follow(self, layout: Layout) -> Answer:
        """Make the slots what the operator wants them to be now, and say what that changes."""
        if layout.faults:
            self._log.error("not reloaded", faults=layout.faults)
            lines = "\n".join(layout.faults)
            return Refusal(f"cannot reload, nothing was changed:\n{lines}", EXIT_CONFIG)
        if self._shutdown.mode is not None or not self._slots.slots:
            changes = "nothing, for the node is starting or stopping; reload again when it is up"
        else:
            try:
                changes = self._slots.follow(layout)
            except MinerError as error:
                return Refusal(f"cannot reload, nothing was changed: {error}", EXIT_CONFIG)
        self._log.info("reloaded", changes=changes, restart=layout.restart)
        restart = f"; for {', '.join(layout.restart)} restart the miner: jobs go on" if layout.restart else ""
        return Done(f"reloaded: {changes}{restart}")


def _close(files: list[int]) -> None:
    for file in files:
        os.close(file)
