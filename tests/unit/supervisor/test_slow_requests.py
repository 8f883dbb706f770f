"""Requests that a child of the supervisor answers: the answer comes, or a word why there is none."""

import contextlib
import os
import select
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from aitbc_miner.control.protocol import (
    LATER_S,
    SLOW_VERBS,
    Answer,
    Done,
    FullAnswer,
    History,
    Judged,
    Refusal,
    Request,
)
from aitbc_miner.errors import EXIT_CONFIG, MinerError
from aitbc_miner.supervisor import children
from aitbc_miner.supervisor.children import OneShots
from aitbc_miner.supervisor.node_plan import Layout
from aitbc_miner.supervisor.slow_requests import VERB_RULES, SlowRequests
from aitbc_miner.util import clock

DEADLINE_S = 20.0
COMMANDS = {verb: ["a", "b"] if verb == "allow" else [] for verb in VERB_RULES}


def test_each_slow_verb_has_its_rules() -> None:
    assert VERB_RULES.keys() == SLOW_VERBS
    assert all(verb.limit_s <= LATER_S for verb in VERB_RULES.values())


class Node:
    """A node whose children do as they are told, and its slots."""

    def __init__(self, do: Callable[[], Any]) -> None:
        self.do = do
        self.text = b""
        self.slots: dict[str, None] = {"cpu0": None}
        self.mode: str | None = None
        self.follow: Callable[[Layout], str] = lambda layout: f"added: {len(layout.specs)}"

    def read_history(self, _: Request, memory: int) -> Any:
        os.write(memory, self.text)
        return self.do()

    def judge(self, _: Request) -> Any:
        return self.do()

    def read_layout(self) -> Any:
        return self.do()


class Site:
    """Requests to such a node, and what was answered."""

    def __init__(self, do: Callable[[], Any]) -> None:
        self.one_shots = OneShots()
        self.answers: list[Answer | FullAnswer] = []
        self.node = Node(do)
        one: Any = self.node
        self.requests = SlowRequests(one, self.one_shots, one, one)

    def ask(self, verb: str) -> None:
        self.requests.ask(Request(verb, command=COMMANDS[verb]), self.answers.append)

    def turn_until(self, done: Callable[[], bool]) -> None:
        deadline = clock.now() + DEADLINE_S
        while not done():
            assert clock.now() < deadline
            sources = self.one_shots.sources()
            poller = select.poll()
            for fd, (_, wanted) in sources.items():
                poller.register(fd, wanted)
            for fd, _ in poller.poll(100):
                sources[fd][0]()

    def answer_to(self, verb: str) -> Answer | FullAnswer:
        self.ask(verb)
        self.turn_until(lambda: bool(self.answers))
        return self.answers[-1]

    def refusal(self) -> str:
        answer = self.answers[-1]
        assert isinstance(answer, Refusal)
        return answer.message


def hang() -> None:
    threading.Event().wait()


def memories() -> int:
    """Count those that are open; of what is not ours anything may be closed meanwhile."""
    found = 0
    for fd in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # the listing's own
            found += str(fd.readlink()).startswith("/memfd:history")
    return found


def test_what_the_child_wrote_goes_to_the_client_as_a_file() -> None:
    site = Site(History)
    site.node.text = b"written"
    answer = site.answer_to("history")
    assert isinstance(answer, tuple)
    assert answer[0] == History()
    (memory,) = answer[1]
    assert os.pread(memory, 100, 0) == b"written"
    os.close(memory)
    assert memories() == 0


def test_where_there_is_no_history_nothing_stays_open() -> None:
    site = Site(lambda: Refusal("cannot show it: a cause; a remedy"))
    assert site.answer_to("history") == Refusal("cannot show it: a cause; a remedy")
    assert memories() == 0


def test_the_childs_judgement_goes_to_the_client() -> None:
    judged = Judged(permitted=True, message="a b")
    assert Site(lambda: judged).answer_to("allow") == judged


@pytest.mark.parametrize(
    ("verb", "told"),
    [
        ("history", "cannot show the history: the process that reads it"),
        ("allow", "cannot judge a command: the process that reads the allowlist"),
        ("reload", "cannot reload: the process that reads the configuration"),
    ],
)
def test_a_child_that_dies_is_told(verb: str, told: str) -> None:
    site = Site(os.abort)
    site.answer_to(verb)
    assert site.refusal() == f"{told} was killed by SIGABRT; see `journalctl -u aitbc-miner`"
    assert memories() == 0


@pytest.mark.parametrize("verb", VERB_RULES)
def test_an_answer_of_another_kind_is_none(verb: str) -> None:
    site = Site(lambda: Done("done"))
    site.answer_to(verb)
    assert site.refusal().endswith("; see `journalctl -u aitbc-miner`")


def test_a_request_without_a_command_starts_no_child() -> None:
    site = Site(hang)
    site.requests.ask(Request("allow"), site.answers.append)
    assert "the request has none" in site.refusal()
    assert site.one_shots.under_way() == []


@pytest.mark.parametrize("verb", VERB_RULES)
def test_a_child_that_cannot_be_started_is_told(verb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> int:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    site = Site(hang)
    with monkeypatch.context() as patched:
        patched.setattr(children, "Child", full)
        site.ask(verb)
    told = VERB_RULES[verb].cannot
    assert site.refusal() == f"{told}: Resource temporarily unavailable; try again in a moment"
    assert memories() == 0


@pytest.mark.parametrize("verb", VERB_RULES)
def test_children_that_hang_are_few_and_ended_at_last(verb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    site = Site(hang)
    most = {"history": 4, "allow": 4, "reload": 1}[verb]
    for _ in range(most + 1):
        site.ask(verb)
    assert len(site.one_shots.under_way()) == most
    assert "; try again" in site.refusal()
    for other in VERB_RULES.keys() - {verb}:
        site.ask(other)
    assert len(site.one_shots.under_way()) == most + 2, "each verb has its own"
    later = clock.now() + VERB_RULES[verb].limit_s + 1
    with monkeypatch.context() as patched:
        patched.setattr(clock, "now", lambda: later)
        site.ask(verb)
    for child in site.one_shots.under_way():
        if child.name != verb:
            child.kill()
    site.turn_until(lambda: not site.one_shots.under_way())
    assert len(site.answers) == most + 4
    assert (
        sum("was killed by SIGKILL" in getattr(answer, "message", "") for answer in site.answers) == most + 2
    )
    assert memories() == 0


# --- reload ------------------------------------------------------------------------------------------------


def test_the_slots_follow_what_was_read() -> None:
    assert Site(lambda: Layout([])).answer_to("reload") == Done("reloaded: added: 0")
    told = Site(lambda: Layout([], restart=["node_id", "queue.path"])).answer_to("reload")
    restart = "restart the miner to apply node_id, queue.path: running jobs go on"
    assert told == Done(f"reloaded: added: 0; {restart}")


@pytest.mark.parametrize("change", [{"mode": "drain"}, {"slots": {}}])
def test_a_node_that_starts_or_stops_follows_nothing(change: dict[str, Any]) -> None:
    site = Site(lambda: Layout([]))
    vars(site.node).update(change, follow=lambda _: pytest.fail("nothing is to be followed"))
    answer = site.answer_to("reload")
    assert isinstance(answer, Done)
    assert "the node is starting or stopping" in answer.message


def test_faults_change_nothing() -> None:
    site = Site(lambda: Layout([], faults=["a", "b"]))
    site.node.follow = lambda _: pytest.fail("nothing is to be followed")
    assert site.answer_to("reload") == Refusal("cannot reload; nothing was changed:\na\nb", EXIT_CONFIG)


def test_a_layout_that_cannot_be_followed_is_told() -> None:
    def fail(_: Layout) -> str:
        raise MinerError("no room")

    site = Site(lambda: Layout([]))
    site.node.follow = fail
    assert site.answer_to("reload") == Refusal("cannot reload; nothing was changed: no room", EXIT_CONFIG)
