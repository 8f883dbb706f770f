"""The heartbeat process in a thread, with a coordinator that answers as told."""

import json
import logging
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self, TypeVar

import requests
import responses
from msgspec.structs import replace

from aitbc_miner.config import settings
from aitbc_miner.heartbeat.loop import HeartbeatTiming, run_heartbeat
from aitbc_miner.ipc.channel import Channel
from aitbc_miner.ipc.messages import (
    CoordinatorView,
    FromHeartbeat,
    PrivateLine,
    Slots,
    SlotView,
    Stop,
    ToHeartbeat,
)
from aitbc_miner.slots.placement import Offer
from aitbc_miner.slots.state import SlotState
from aitbc_miner.util import clock
from tests.support.nvml_stub import no_library

LONG_S = 20.0
BASE = "http://coordinator.test/api/v1"
OPERATOR = "operator-secret"
M = TypeVar("M")

Answer = tuple[int, dict[str, str], str] | Exception


class FakeCoordinator:
    """Answers each call with the next of its answers, or with success when there is none left."""

    def __init__(self) -> None:
        self.registering: list[Answer] = []
        self.beating: list[Answer] = []
        self.calls: list[tuple[str, float, str, dict[str, Any]]] = []
        self.changed = threading.Condition()
        self.stub = responses.RequestsMock(assert_all_requests_are_fired=False)
        self.stub.add_callback("POST", f"{BASE}/nodes/register", self._register)
        self.stub.add_callback("POST", f"{BASE}/nodes/heartbeat", self._heartbeat)

    def _register(self, request: requests.PreparedRequest) -> Any:
        number = self._note("register", request)
        return self._next(self.registering, json.dumps({"node_token": f"node-token-{number}"}))

    def _heartbeat(self, request: requests.PreparedRequest) -> Any:
        self._note("heartbeat", request)
        return self._next(self.beating, "{}")

    def _note(self, what: str, request: requests.PreparedRequest) -> int:
        with self.changed:
            body = json.loads(request.body or "null")
            self.calls.append((what, clock.now(), str(request.headers["Authorization"]), body))
            self.changed.notify_all()
            return sum(call[0] == what for call in self.calls)

    def _next(self, answers: list[Answer], otherwise: str) -> Any:
        return answers.pop(0) if answers else (200, {}, otherwise)

    def of(self, what: str) -> list[tuple[str, float, str, dict[str, Any]]]:
        return [call for call in self.calls if call[0] == what]

    def wait(self, what: str, count: int) -> list[tuple[str, float, str, dict[str, Any]]]:
        with self.changed:
            came = self.changed.wait_for(lambda: len(self.of(what)) >= count, LONG_S)
        assert came, f"only {len(self.of(what))} of {count} calls to {what} came"
        return self.of(what)


class Node:
    """The heartbeat process in a thread, with the other ends of its channels."""

    def __init__(self, config: settings.Config, environ: dict[str, str], timing: HeartbeatTiming) -> None:
        ours, theirs = socket.socketpair()
        our_line, their_line = socket.socketpair()
        self.supervisor: Channel[FromHeartbeat] = Channel(ours, FromHeartbeat)
        self.agent: Channel[PrivateLine] = Channel(our_line, PrivateLine)
        self.received: list[Any] = []
        self._theirs = (theirs, their_line)
        channel: Channel[ToHeartbeat] = Channel(theirs, ToHeartbeat)
        line: Channel[PrivateLine] = Channel(their_line, PrivateLine)
        arguments = (channel, line, replace(config, node_id="node-1"), environ)
        self.thread = threading.Thread(target=run_heartbeat, args=arguments, kwargs={"timing": timing})

    def __enter__(self) -> Self:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.thread.is_alive():
            self.stop()
        for end in (self.supervisor, self.agent, *self._theirs):
            end.close()

    def stop(self) -> None:
        self.supervisor.send(Stop())
        self.thread.join(LONG_S)
        assert not self.thread.is_alive()

    def until(self, channel: Channel[Any], kind: type[M], fits: Callable[[M], bool] = lambda _: True) -> M:
        """Receive until a message of this kind comes that fits."""
        deadline = clock.now() + LONG_S
        while True:
            for number, message in enumerate(self.received):
                if isinstance(message, kind) and fits(message):
                    del self.received[: number + 1]
                    return message
            assert clock.now() < deadline, f"no {kind.__name__} that fits; received: {self.received}"
            self.received += channel.wait(deadline - clock.now())

    def view(self, **wanted: Any) -> CoordinatorView:
        return self.until(
            self.supervisor,
            CoordinatorView,
            lambda view: all(getattr(view, name) == value for name, value in wanted.items()),
        )


def attrs(log: list[logging.LogRecord], event: str) -> dict[str, Any]:
    found: dict[str, Any] = next(getattr(record, "attrs", {}) for record in log if record.msg == event)
    return found


def slot(name: str = "cpu0", **more: Any) -> SlotView:
    offer = Offer(name, more.pop("kind", "cpu"), 2, 1024, 0, ("cli",))
    standard = {"state": SlotState.IDLE, "free": True, "enforced": {"memory": "cgroup"}, "cpus": "0-1"}
    return SlotView(offer, **{**standard, **more})


def slots(*views: SlotView, queued: tuple[str, ...] = ()) -> Slots:
    return Slots(list(views or (slot(),)), list(queued), accepting=True)


def make_node(
    tmp_path: Path,
    environ: dict[str, str] | None = None,
    *,
    source: str = "env:MINER_AUTH",
    backoff: tuple[float, float] = (0.02, 0.1),
    base: str = BASE,
    **timing: float,
) -> Node:
    beat = settings.HeartbeatSection(
        interval_s=0.05, jitter_pct=10, backoff=settings.BackoffSection(*backoff)
    )
    config = settings.Config(
        coordinator=settings.CoordinatorSection(base, source, allow_http=True, timeout_s=2),
        heartbeat=beat,
        workspace=settings.WorkspaceSection(root=tmp_path),
        queue=settings.QueueSection(path=tmp_path / "queue.db"),
        telemetry=settings.TelemetrySection("127.0.0.1:0", tmp_path / "node.prom"),
    )
    delays = HeartbeatTiming(**{"slots_wait": LONG_S, "settle": 0.01, "sample": 0.02, **timing})
    if environ is None:
        environ = {**no_library(tmp_path), "MINER_AUTH": OPERATOR}
    return Node(config, environ, delays)
