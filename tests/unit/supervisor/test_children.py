"""Children of the supervisor: what becomes of them and of attempts to start them."""

import errno
import os
import signal
import sys
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import msgspec
import pytest

from aitbc_miner.errors import MinerError
from aitbc_miner.gpu.facts import GpuFact
from aitbc_miner.ipc.channel import Channel
from aitbc_miner.ipc.messages import CancelJob, FromAgent, FromWorker, Inventory, JobReady, NodeView, Starved
from aitbc_miner.supervisor.children import LAST_WORDS, Child, Keeper
from aitbc_miner.util import clock
from aitbc_miner.util.signals import signal_name
from tools.lib.local_node import wait_until


def sleep(_pipe: "Connection[Any, Any]") -> None:
    signal.pause()


def ignored(pid: int) -> int:
    return int(Path(f"/proc/{pid}/status").read_text().partition("SigIgn:")[2].split()[0], 16)


def keeper() -> Keeper[FromAgent]:
    return Keeper("agent", sleep, FromAgent, [], pause_min=0.5, pause_max=30.0)


def test_a_fork_that_fails_is_tried_again_later(monkeypatch: pytest.MonkeyPatch) -> None:
    def full() -> int:
        raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")

    now = clock.now()
    kept = keeper()
    with monkeypatch.context() as patched:
        patched.setattr(os, "fork", full)
        assert not kept.start_if_due()
        assert not kept.start_if_due()
        assert not kept.start_if_due(), "the pause has begun to grow"
    assert kept.child is None
    with monkeypatch.context() as patched:
        patched.setattr(clock, "now", lambda: now + 60)
        assert kept.start_if_due()
    assert kept.child
    kept.child.kill()
    wait_until(lambda: os.waitid(os.P_PID, kept.child.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT), 10)
    assert kept.died() == "was killed by SIGKILL"


def test_of_news_that_a_child_does_not_read_only_the_latest_wait() -> None:
    kept: Keeper[FromAgent] = Keeper("heartbeat", sleep, FromAgent, [], pause_min=0.5, pause_max=30.0)
    kept.tell(NodeView(0, "before there was a child"))
    assert kept.start_if_due()
    assert kept.child
    for n in range(100):
        kept.tell(NodeView(n, "x" * (1 << 20)))
        kept.tell(Starved(float(n), ["y" * (1 << 20)]))
    assert kept.child.channel.has_unsent
    kept.child.kill()
    assert kept.died() == "was killed by SIGKILL", "a child that is stopped is not ended for what others say"


def test_a_new_child_is_told_the_latest() -> None:
    def echo(pipe: "Connection[Any, Any]") -> None:
        raise MinerError(str(Channel[Any](pipe, NodeView).wait(10)))

    kept: Keeper[FromAgent] = Keeper("heartbeat", echo, FromAgent, [], pause_min=0.0, pause_max=0.0)
    kept.tell(NodeView(6, "old"))
    kept.tell(NodeView(7, "latest"))
    for _ in range(2):
        assert kept.start_if_due()
        kept.tell_waiting()
        assert kept.died() == f"ended with exit status 1: {[NodeView(7, 'latest')]}"


def test_a_child_that_can_say_nothing_ends_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_pipe: "Connection[Any, Any]") -> None:
        raise ValueError("a defect")

    monkeypatch.setattr(sys, "stderr", None)
    child: Child[FromWorker] = Child("worker", fail, FromWorker)
    assert child.reap() == "ended with exit status 1: ValueError"


def test_why_a_child_gave_up_is_told() -> None:
    def fail(_pipe: "Connection[Any, Any]") -> None:
        raise MinerError("cannot open queue.db: database or disk is full; free space")

    child: Child[FromWorker] = Child("agent", fail, FromWorker)
    assert child.reap() == (
        "ended with exit status 1: cannot open queue.db: database or disk is full; free space"
    )


def test_a_child_can_say_no_more_at_its_end_than_there_is_room_for() -> None:
    def fail(_pipe: "Connection[Any, Any]") -> None:
        for entry in Path("/proc/self/fd").iterdir():
            if "last-words" in os.path.realpath(entry):
                with pytest.raises(PermissionError):
                    os.ftruncate(int(entry.name), 1 << 20)
                raise MinerError("x" * 10_000)

    child: Child[FromWorker] = Child("agent", fail, FromWorker)
    assert child.reap() == f"ended with exit status 1: {'x' * LAST_WORDS}"


def test_a_child_ended_by_a_signal_without_a_name_is_told_by_number() -> None:
    child: Child[FromWorker] = Child("worker", sleep, FromWorker)
    signal.pidfd_send_signal(child.pidfd, 40)
    assert child.reap() == "was killed by signal 40"
    assert signal_name(signal.SIGTERM) == "SIGTERM"


def test_who_killed_a_child_is_told_right_although_it_was_sent_more() -> None:
    child: Child[FromAgent] = Child("agent", sleep, FromAgent)
    os.kill(child.pid, signal.SIGKILL)
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    child.send(NodeView(1, None))
    assert child.reap() == "was killed by SIGKILL"
    reader: Child[FromAgent] = Child("agent", sleep, FromAgent)
    while not reader._fault:
        reader.send(NodeView(1, "x" * 100_000))
    assert reader.reap().startswith("was ended by the supervisor: cannot send: the peer left ")


def test_the_end_of_a_terminal_is_nothing_to_a_child() -> None:
    child: Child[FromWorker] = Child("worker", sleep, FromWorker)
    try:
        for number in (signal.SIGHUP, signal.SIGINT):
            signal.pidfd_send_signal(child.pidfd, number)
        wanted = (1 << (signal.SIGHUP - 1)) | (1 << (signal.SIGINT - 1))
        # Sent before the child had got so far, they waited: it is not ended by them in any case.
        wait_until(lambda: ignored(child.pid) & wanted == wanted, 10)
    finally:
        child.kill()
        assert child.reap() == "was killed by SIGKILL"


@pytest.mark.parametrize(
    "said",
    [
        {"type": "CancelJob", "job_id": "j", "why": "zzz"},
        {"type": "CancelJob", "job_id": "../j", "why": "cancel"},
        {"type": "JobReady", "ticket": {"job_id": "a/b", "runner": "cli"}},
        {"type": "JobUpdate", "job_id": "j\n", "state": "DONE"},
        {"type": "Recovered", "started": [{"job_id": "", "state": "PREP", "slot": None}]},
        {"type": "Slots", "slots": [], "queued": [], "accepting": True},
    ],
)
def test_what_an_agent_may_not_say_is_no_message(said: dict[str, Any]) -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert(said, FromAgent)


def test_what_it_may_say_is_one() -> None:
    ready = {"type": "JobReady", "ticket": {"job_id": "a-b.c", "runner": "cli"}}
    assert isinstance(msgspec.convert(ready, FromAgent), JobReady)
    cancel = {"type": "CancelJob", "job_id": "j", "why": "cancel"}
    assert isinstance(msgspec.convert(cancel, FromAgent), CancelJob)


def test_a_gpu_has_a_name() -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert({"type": "Inventory", "gpus": [{"ids": [], "vram_mb": 1}]}, Inventory)
    assert GpuFact(("0",), 1).ids == ("0",)
