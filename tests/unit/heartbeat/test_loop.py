import logging
import socket
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from unittest.mock import Mock

import pytest
import requests

from aitbc_miner.config import settings
from aitbc_miner.coordinator.interface import Unreachable
from aitbc_miner.errors import ErrorCode
from aitbc_miner.heartbeat.loop import HeartbeatTiming
from aitbc_miner.heartbeat.registration import Registration
from aitbc_miner.identity.credentials import digest
from aitbc_miner.ipc.messages import (
    Beaten,
    BeatWanted,
    CoordinatorView,
    Counted,
    Inventory,
    JobDone,
    NodeToken,
    NodeView,
    TokenWanted,
    Troubles,
)
from aitbc_miner.slots.state import SlotState
from aitbc_miner.telemetry.counters import FILE
from aitbc_miner.util import clock
from tests.support.heartbeat_node import (
    BASE,
    LONG_S,
    OPERATOR,
    Answer,
    FakeCoordinator,
    Node,
    attrs,
    make_node,
    slot,
    slots,
)
from tests.support.nvml_stub import NvmlStub, no_library
from tools.mock.aitbc.coordinator import MockAitbc


@pytest.fixture
def coordinator() -> Iterator[FakeCoordinator]:
    fake = FakeCoordinator()
    with fake.stub:
        yield fake


# --- the good way ------------------------------------------------------------------------------------------


def test_it_registers_and_beats(
    coordinator: FakeCoordinator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secrets: list[str] = []
    monkeypatch.setattr("aitbc_miner.util.log.mask", secrets.append)
    with make_node(tmp_path) as node:
        assert node.until(node.supervisor, Inventory) == Inventory([], None)
        node.supervisor.send(
            slots(slot("cpu0"), slot("gpu0", kind="gpu"), slot("gpu1", kind="gpu", free=False))
        )
        assert node.until(node.agent, NodeToken).token == "node-token-1"
        view = node.view(registered=True)
        assert (view.reachable, view.error) == (True, None)
        beats = coordinator.wait("heartbeat", 5)
    registered = coordinator.of("register")
    assert len(registered) == 1
    assert registered[0][2] == f"Bearer {OPERATOR}"
    payload = registered[0][3]
    assert payload["node_id"] == "node-1"
    assert payload["runners"] == ["cli"]
    assert [told["name"] for told in payload["slots"]] == ["cpu0", "gpu0", "gpu1"]
    assert payload["slots"][0]["enforced"] == {"memory": "cgroup"}
    assert {beat[2] for beat in beats} == {"Bearer node-token-1"}
    report = beats[-1][3]
    assert report["node_id"] == "node-1"
    assert report["load"] >= 0
    assert report["free_mb"] > 0
    assert report["gpu_free"] == 1
    assert report["slots"][0] == {
        "name": "cpu0", "state": "IDLE", "job_id": None, "cpu_pct": 0.0, "memory_mb": 0
    }  # fmt: skip
    assert {OPERATOR, "node-token-1"} <= set(secrets)


def test_a_gpu_slots_use_is_reported(coordinator: FakeCoordinator, tmp_path: Path) -> None:
    stub = NvmlStub(tmp_path, gpus=1)
    with make_node(tmp_path, {**stub.environ, "MINER_AUTH": OPERATOR}) as node:
        inventory = node.until(node.supervisor, Inventory)
        assert len(inventory.gpus) == 1
        node.supervisor.send(slots(slot("gpu0", kind="gpu", gpu=inventory.gpus[0].ids[0])))
        count = 1
        while "vram_mb" not in coordinator.wait("heartbeat", count)[-1][3]["slots"][0]:
            count += 1
            assert count < 200
        assert "gpu_util" in coordinator.of("heartbeat")[-1][3]["slots"][0]


def test_registering_waits_for_the_slots_to_be_set_up(coordinator: FakeCoordinator, tmp_path: Path) -> None:
    with make_node(tmp_path) as node:
        node.supervisor.send(slots(slot(state=SlotState.STARTING, enforced={})))
        node.until(node.supervisor, Inventory)
        node.agent.send(TokenWanted())
        assert coordinator.calls == []
        node.supervisor.send(slots())
        coordinator.wait("heartbeat", 3)
    assert [call[3]["slots"][0]["enforced"] for call in coordinator.of("register")] == [{"memory": "cgroup"}]


def test_without_slots_it_registers_after_a_while(coordinator: FakeCoordinator, tmp_path: Path) -> None:
    with make_node(tmp_path, slots_wait=0.3) as node:
        started = clock.now()
        registered = coordinator.wait("register", 1)[0]
        assert registered[1] - started >= 0.25
        assert registered[3]["slots"] == []
        node.supervisor.send(slots())
        assert coordinator.wait("register", 2)[1][3]["slots"] != []


def test_a_change_of_the_slots_is_told_by_registering_again(
    coordinator: FakeCoordinator, tmp_path: Path
) -> None:
    with make_node(tmp_path) as node:
        node.supervisor.send(slots())
        coordinator.wait("heartbeat", 1)
        node.supervisor.send(slots(slot(state=SlotState.BUSY, free=False, job_id="j1")))
        coordinator.wait("heartbeat", len(coordinator.of("heartbeat")) + 3)
        assert len(coordinator.of("register")) == 1
        node.supervisor.send(slots(slot(enforced={"memory": "rlimit"})))
        again = coordinator.wait("register", 2)[1]
        assert again[3]["slots"][0]["enforced"] == {"memory": "rlimit"}
        assert node.until(node.agent, NodeToken, lambda word: word.token == "node-token-2")


# --- the token for the agent -------------------------------------------------------------------------------


def test_the_agent_gets_the_token_when_it_asks(coordinator: FakeCoordinator, tmp_path: Path) -> None:
    with make_node(tmp_path) as node:
        node.supervisor.send(slots())
        node.until(node.agent, NodeToken)
        node.agent.send(TokenWanted())
        assert node.until(node.agent, NodeToken).token == "node-token-1"
        node.agent.send(TokenWanted(refused=digest("an older one")))
        assert node.until(node.agent, NodeToken).token == "node-token-1"
    assert len(coordinator.of("register")) == 1


def test_a_token_that_the_agent_was_refused_is_renewed(coordinator: FakeCoordinator, tmp_path: Path) -> None:
    with make_node(tmp_path) as node:
        node.supervisor.send(slots())
        token = node.until(node.agent, NodeToken).token
        node.agent.send(TokenWanted(refused=digest(token)))
        assert node.until(node.agent, NodeToken).token == "node-token-2"
    first, second = coordinator.of("register")[:2]
    assert second[1] - first[1] >= 0.02


# --- what goes wrong ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [401, 404])
def test_a_void_token_means_registering_again_at_once(
    coordinator: FakeCoordinator, tmp_path: Path, status: int
) -> None:
    coordinator.beating = [(200, {}, "{}"), (status, {}, "{}")]
    with make_node(tmp_path) as node:
        node.supervisor.send(slots())
        coordinator.wait("heartbeat", 4)
        assert node.until(node.agent, NodeToken, lambda word: word.token == "node-token-2")
    assert [call[0] for call in coordinator.calls][:5] == [
        "register", "heartbeat", "heartbeat", "register", "heartbeat"
    ]  # fmt: skip
    assert coordinator.of("heartbeat")[2][2] == "Bearer node-token-2"


def test_a_coordinator_that_takes_no_token_is_asked_ever_more_slowly(
    coordinator: FakeCoordinator, tmp_path: Path
) -> None:
    coordinator.beating = [(401, {}, "{}")] * 1000
    with make_node(tmp_path) as node:
        node.supervisor.send(slots())
        view = node.view(registered=False)
        assert view.reachable
        assert view.error
        assert "401" in view.error
        calls = coordinator.wait("register", 6)
    pauses = [later[1] - before[1] for before, later in pairwise(calls)]
    assert all(pause >= 0.019 for pause in pauses)


@pytest.mark.parametrize(
    ("status", "told", "key"),
    [
        (401, "env:MINER_AUTH", "coordinator.auth_token"),
        (403, "env:MINER_AUTH", "coordinator.auth_token"),
        (404, "404", "check coordinator.base_url"),
        (422, "422", "check coordinator.base_url with"),
    ],
)
def test_a_refused_registration_is_the_operators_to_mend(
    coordinator: FakeCoordinator,
    tmp_path: Path,
    status: int,
    told: str,
    key: str,
    log: list[logging.LogRecord],
) -> None:
    coordinator.registering = [(status, {}, '{"error": {"message": "who are you"}}')] * 2
    with make_node(tmp_path) as node:
        node.supervisor.send(slots())
        view = node.view(registered=False)
        assert view.reachable
        assert view.error
        assert told in view.error
        assert view.remedy
        assert key in view.remedy
        assert node.view(registered=True).error is None
    first, second, third = coordinator.of("register")[:3]
    assert second[1] - first[1] >= 0.1
    assert third[1] - second[1] >= 0.1
    assert OPERATOR not in str([vars(record) for record in log])


def test_a_coordinator_of_the_other_dialect_is_recognised(tmp_path: Path) -> None:
    with MockAitbc() as mock, make_node(tmp_path, base=mock.url) as node:
        node.supervisor.send(slots())
        view = node.view(registered=False)
        assert view.error
        assert view.remedy
        assert view.remedy.startswith("an AITBC coordinator answers there: set coordinator.dialect: aitbc-v1")


def test_it_is_looked_at_once_for_each_error_and_not_once_it_has_worked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    guesses = Mock(side_effect=["guess 1", "guess 2"])
    monkeypatch.setattr("aitbc_miner.heartbeat.registration.likely_cause", guesses)
    registration = Registration(Mock(**{"coordinator.auth_token": "env:MINER_AUTH"}), {}, Mock())
    first, second = Unreachable("cannot register: a"), Unreachable("cannot register: b")
    said = [registration.guess(error) for error in (first, first, second)]
    assert said == ["guess 1", "guess 1", "guess 2"]
    registration.at = 1.0
    assert registration.guess(first) is None


def test_a_token_file_that_is_replaced_is_used_at_once(coordinator: FakeCoordinator, tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text("expired")
    file.chmod(0o600)
    coordinator.registering = [(401, {}, "{}")]
    with make_node(tmp_path, source=f"file:{file}", backoff=(LONG_S, LONG_S)) as node:
        node.supervisor.send(slots())
        assert node.view(registered=False).error
        new = tmp_path / "new"
        new.write_text("another")
        new.chmod(0o600)
        new.rename(file)
        assert node.view(registered=True).error is None
        # And one that is replaced before the old one has run out.
        file.write_text("a-third-one")
        coordinator.wait("register", 3)
    assert [call[2] for call in coordinator.of("register")][:3] == [
        "Bearer expired", "Bearer another", "Bearer a-third-one"
    ]  # fmt: skip


def test_a_wish_of_the_agent_ends_the_wait_after_a_failure(
    coordinator: FakeCoordinator, tmp_path: Path
) -> None:
    """The coordinator has just answered it, and may not know us any more."""
    coordinator.beating = [(200, {}, "{}"), requests.ConnectionError("away"), (404, {}, "{}")]
    with make_node(tmp_path, backoff=(LONG_S, LONG_S)) as node:
        node.supervisor.send(slots())
        assert node.until(
            node.supervisor, CoordinatorView, lambda view: not view.reachable and view.registered
        )
        node.agent.send(BeatWanted())
        assert node.until(node.agent, NodeToken, lambda word: word.forgotten)
        assert node.until(node.agent, Beaten)


def test_a_missing_credential_is_named(coordinator: FakeCoordinator, tmp_path: Path) -> None:
    with make_node(tmp_path, no_library(tmp_path)) as node:
        node.supervisor.send(slots())
        view = node.view(reachable=False)
        assert view.error
        assert view.error.startswith("not asked yet: cannot read the credential env:MINER_AUTH")
        assert view.remedy
    assert coordinator.calls == []


def test_slots_that_cannot_be_told_do_not_stop_the_heartbeat(
    coordinator: FakeCoordinator, tmp_path: Path
) -> None:
    with make_node(tmp_path) as node:
        node.supervisor.send(slots())
        coordinator.wait("heartbeat", 1)
        coordinator.registering = [(401, {}, "{}")] * 1000
        node.supervisor.send(slots(slot("other")))
        coordinator.wait("register", 2)
        coordinator.wait("heartbeat", len(coordinator.of("heartbeat")) + 3)
        assert len(coordinator.of("register")) == 2
        node.agent.send(TokenWanted())
        assert node.until(node.agent, NodeToken).token == "node-token-1"


def test_a_wish_to_wait_is_obeyed(coordinator: FakeCoordinator, tmp_path: Path) -> None:
    coordinator.beating = [(200, {}, "{}"), (429, {"Retry-After": "1"}, "{}")]
    with make_node(tmp_path) as node:
        node.supervisor.send(slots())
        view = node.view(reachable=True, registered=True, error=None)
        view = node.until(node.supervisor, CoordinatorView, lambda view: view.error is not None)
        assert view.registered
        beats = coordinator.wait("heartbeat", 3)
        assert beats[2][1] - beats[1][1] >= 1.0
        node.view(reachable=True, registered=True, error=None)


def test_a_wish_to_wait_for_an_hour_silences_no_heartbeat(
    coordinator: FakeCoordinator, tmp_path: Path
) -> None:
    coordinator.beating = [(200, {}, "{}"), (503, {"Retry-After": "3600"}, "{}")]
    with make_node(tmp_path) as node:
        node.supervisor.send(slots())
        coordinator.wait("heartbeat", 4)
        node.view(reachable=True, registered=True, error=None)


@pytest.mark.parametrize(
    ("answer", "reachable"),
    [
        ((500, {}, "oops"), True),
        ((400, {}, "{}"), True),
        ((200, {}, "<html>log in first</html>"), False),
        ((302, {"Location": "http://elsewhere.test/"}, ""), False),
        (requests.ConnectionError(ConnectionRefusedError("refused")), False),
    ],
    ids=["500", "400", "garbage", "redirect", "refused"],
)
def test_a_failed_heartbeat_is_told_and_tried_again(
    coordinator: FakeCoordinator, tmp_path: Path, answer: Answer, reachable: bool
) -> None:
    coordinator.beating = [(200, {}, "{}"), answer]
    with make_node(tmp_path) as node:
        node.supervisor.send(slots())
        well = node.view(error=None)
        ill = node.until(node.supervisor, CoordinatorView, lambda view: view.error is not None)
        assert (ill.reachable, ill.registered) == (reachable, True)
        assert ill.remedy
        assert node.view(error=None).reachable
        assert (ill.since_wall == well.since_wall) == reachable
    assert len(coordinator.of("register")) == 1


@pytest.mark.parametrize(
    "answer", [(500, {}, "oops"), (200, {}, "garbage"), (200, {}, "{}"), (200, {}, '{"node_token": "a b"}')]
)
def test_a_failed_registration_is_tried_again(
    coordinator: FakeCoordinator, tmp_path: Path, answer: Answer
) -> None:
    coordinator.registering = [answer] * 3
    with make_node(tmp_path) as node:
        node.supervisor.send(slots())
        assert node.view(registered=False).error
        assert node.view(registered=True).error is None
    assert len(coordinator.of("register")) == 4


def test_a_view_is_sent_on_change_only(coordinator: FakeCoordinator, tmp_path: Path) -> None:
    with make_node(tmp_path) as node:
        node.supervisor.send(slots())
        node.view(registered=True)
        coordinator.wait("heartbeat", 6)
        node.stop()
        # What was sent is all there, so one read gets it.
        node.received += node.supervisor.receive()
    assert node.received == []


# --- its end -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["supervisor", "agent"])
def test_it_ends_when_another_process_is_gone(coordinator: FakeCoordinator, tmp_path: Path, end: str) -> None:
    with make_node(tmp_path) as node:
        node.until(node.supervisor, Inventory)
        getattr(node, end).close()
        node.thread.join(LONG_S)
        assert not node.thread.is_alive()


def test_it_ends_when_it_is_sent_nonsense(coordinator: FakeCoordinator, tmp_path: Path) -> None:
    with make_node(tmp_path) as node:
        node.until(node.supervisor, Inventory)
        node.supervisor.send({"type": "Nonsense"})
        node.thread.join(LONG_S)
        assert not node.thread.is_alive()


# --- telemetry ---------------------------------------------------------------------------------------------


def test_what_comes_in_is_seen_over_http(
    coordinator: FakeCoordinator, tmp_path: Path, log: list[logging.LogRecord]
) -> None:
    coordinator.stub.add_passthru("http://127.0.0.1")
    with make_node(tmp_path) as node, requests.Session() as session:
        session.trust_env = False
        node.supervisor.send(slots(queued=("j1", "j2")))
        node.supervisor.send(JobDone(None, {"run": 1.0}))
        node.supervisor.send(JobDone(ErrorCode.E_EXIT))
        node.supervisor.send(Counted("retries", "E_DISK", 2))
        node.supervisor.send(NodeView(7, "cannot deliver"))
        node.view(registered=True)
        coordinator.wait("heartbeat", 2)
        root = f"http://{attrs(log, 'telemetry served')['address']}"
        health = session.get(f"{root}/healthz", timeout=LONG_S)
        metrics = session.get(f"{root}/metrics", timeout=LONG_S).text
        page = session.get(f"{root}/", timeout=LONG_S).text
    assert health.status_code == 503
    assert [problem["problem"] for problem in health.json()["problems"]] == ["cannot deliver"]
    assert 'aitbc_miner_jobs_total{code="OK"} 1.0' in metrics
    assert 'aitbc_miner_jobs_total{code="E_EXIT"} 1.0' in metrics
    assert 'aitbc_miner_retries_total{code="E_DISK"} 2.0' in metrics
    assert "aitbc_miner_queue_jobs 2.0" in metrics
    assert "aitbc_miner_pending_deliveries 7.0" in metrics
    assert "aitbc_miner_coordinator_up 1.0" in metrics
    for text in (health.text, metrics, page):
        assert OPERATOR not in text
        assert "node-token" not in text


@pytest.mark.parametrize("listen", ["taken", ""])
def test_without_telemetry_the_heartbeat_goes_on(
    coordinator: FakeCoordinator, tmp_path: Path, log: list[logging.LogRecord], listen: str
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}" if listen else ""
        config = settings.Config(
            coordinator=settings.CoordinatorSection(BASE, "env:MINER_AUTH", allow_http=True),
            telemetry=settings.TelemetrySection(address),
            workspace=settings.WorkspaceSection(root=tmp_path),
            queue=settings.QueueSection(path=tmp_path / "queue.db"),
        )
        with Node(config, {**no_library(tmp_path), "MINER_AUTH": OPERATOR}, HeartbeatTiming()) as node:
            node.supervisor.send(slots())
            assert node.view(registered=True)
    if listen:
        assert address in attrs(log, "telemetry not served")["error"]
    assert not any(record.msg == "telemetry served" for record in log)


def test_a_telemetry_port_that_is_taken_is_told_and_tried_again(
    coordinator: FakeCoordinator, tmp_path: Path, log: list[logging.LogRecord]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        config = settings.Config(
            coordinator=settings.CoordinatorSection(BASE, "env:MINER_AUTH", allow_http=True),
            telemetry=settings.TelemetrySection(f"127.0.0.1:{port}"),
            workspace=settings.WorkspaceSection(root=tmp_path),
            queue=settings.QueueSection(path=tmp_path / "queue.db"),
        )
        environ = {**no_library(tmp_path), "MINER_AUTH": OPERATOR}
        with Node(config, environ, HeartbeatTiming(sample=0.1)) as node:
            (trouble,) = node.until(node.supervisor, Troubles).texts
            assert f"127.0.0.1:{port}" in trouble
            assert trouble.endswith(
                "; set telemetry.listen to a free address of this machine; the node retries by itself"
            )
            taken.close()
            assert node.until(node.supervisor, Troubles) == Troubles()
    assert sum(record.msg == "telemetry not served" for record in log) == 1, "not at each try"
    assert any(record.msg == "telemetry served" for record in log)


def test_what_was_counted_is_kept_for_the_next_one(coordinator: FakeCoordinator, tmp_path: Path) -> None:
    textfile = tmp_path / "node.prom"
    for done in (1, 2):
        with make_node(tmp_path, sample=LONG_S) as node:
            node.until(node.supervisor, Inventory)
            node.supervisor.send(JobDone(None, {"run": 1.0}))
        # Neither a scrape nor a tick came after it: this was written at the end.
        text = textfile.read_text()
        assert f'aitbc_miner_jobs_total{{code="OK"}} {done}.0' in text
        assert f'aitbc_miner_step_duration_seconds_bucket{{le="1.0",step="run"}} {done}.0' in text


def test_it_is_kept_while_the_process_lives(coordinator: FakeCoordinator, tmp_path: Path) -> None:
    with make_node(tmp_path) as node:
        node.until(node.supervisor, Inventory)
        node.supervisor.send(JobDone(ErrorCode.E_OOM))
        deadline = clock.now() + LONG_S
        for file in (tmp_path / FILE, tmp_path / "node.prom"):
            while not (file.exists() and "E_OOM" in file.read_text()):
                assert clock.now() < deadline
                coordinator.wait("heartbeat", 0)


def test_without_a_place_for_its_counts_the_heartbeat_goes_on(
    coordinator: FakeCoordinator, tmp_path: Path, log: list[logging.LogRecord]
) -> None:
    (tmp_path / FILE).mkdir()
    (tmp_path / f"{FILE}.broken").write_text("in the way")
    with make_node(tmp_path) as node:
        node.supervisor.send(slots())
        assert node.view(registered=True)
        coordinator.wait("heartbeat", 5)
    assert [record.msg for record in log].count("metrics not saved") == 1
    assert str(tmp_path / FILE) in attrs(log, "metrics not saved")["error"]


# --- when the agent wants it -------------------------------------------------------------------------------


def test_a_beat_that_is_wanted_comes_at_once_and_is_told(
    coordinator: FakeCoordinator, tmp_path: Path
) -> None:
    with make_node(tmp_path, between_beats=0.0) as node:
        node.supervisor.send(slots())
        node.until(node.agent, NodeToken)
        coordinator.wait("heartbeat", 1)
        node.agent.send(BeatWanted())
        node.until(node.agent, Beaten)
        assert len(coordinator.of("heartbeat")) >= 2


def test_a_beat_that_fails_is_not_told(coordinator: FakeCoordinator, tmp_path: Path) -> None:
    with make_node(tmp_path, between_beats=0.0) as node:
        node.supervisor.send(slots())
        node.until(node.agent, NodeToken)
        coordinator.beating += [(500, {}, "{}")] * 3
        node.agent.send(BeatWanted())
        node.until(node.agent, Beaten)
        assert coordinator.beating == []
