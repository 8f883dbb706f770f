import http.client
import json
import logging
import math
import os
import re
import socket
import socketserver
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

from aitbc_miner.errors import ErrorCode, MinerError
from aitbc_miner.gpu.reader import GpuUsage
from aitbc_miner.ipc.messages import Counted, NodeView, SlotView
from aitbc_miner.slots.placement import Offer
from aitbc_miner.slots.state import SLOT_REMEDY, SlotState
from aitbc_miner.telemetry.httpd import MAX_CONNECTIONS, Page, PageServer
from aitbc_miner.telemetry.metrics import COUNTERS, Metrics, Snapshot, Upkeep, health
from aitbc_miner.telemetry.pages import pages
from aitbc_miner.telemetry.sampling import Use
from aitbc_miner.util import clock

LONG_S = 20.0
METRICS_PAGE = Path(__file__).parents[3] / "docs" / "metrics.md"


def slot(name: str, **more: Any) -> SlotView:
    return SlotView(Offer(name, "cpu", 2, 1024), **{"state": SlotState.IDLE, "free": True, **more})


def snapshot(**more: Any) -> Snapshot:
    well = {"reachable": True, "registered": True, "last_heartbeat": clock.now(), "slots": (slot("cpu0"),)}
    return Snapshot("node-1", "https://coordinator.example", 15, **{"started": clock.now(), **well, **more})


def samples(metrics: Metrics) -> dict[tuple[str, ...], float]:
    return {
        (sample.name, *(value for _, value in sorted(sample.labels.items()))): sample.value
        for family in families(metrics)
        for sample in family.samples
    }


def families(metrics: Metrics) -> list[Metric]:
    return list(text_string_to_metric_families(metrics.render().decode()))


class Serving:
    """A server of a node's pages that is asked with plain sockets."""

    def __init__(self, metrics: Metrics, timeout_s: float = LONG_S) -> None:
        self.server = PageServer("127.0.0.1:0", pages(metrics), timeout_s=timeout_s)
        self.server.start()
        self.port = int(self.server.address.rpartition(":")[2])

    def ask(self, method: str, target: str, **more: Any) -> tuple[int, dict[str, str], bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=LONG_S)
        try:
            connection.request(method, target, **more)
            reply = connection.getresponse()
            return reply.status, dict(reply.headers), reply.read()
        finally:
            connection.close()

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=LONG_S)


@pytest.fixture
def metrics(tmp_path: Path) -> Metrics:
    return Metrics(snapshot(), tmp_path)


@pytest.fixture
def serving(metrics: Metrics) -> Iterator[Serving]:
    serving = Serving(metrics)
    yield serving
    serving.server.stop()


def until(ready: Callable[[], bool]) -> None:
    deadline = clock.now() + LONG_S
    while not ready():
        assert clock.now() < deadline, "it did not come to it in time"
        os.sched_yield()


def closed(connection: socket.socket) -> bytes:
    """Read until the server ends the connection; gives what it said."""
    said = b""
    try:
        while data := connection.recv(65536):
            said += data
    except ConnectionResetError:
        pass
    return said


# --- what is shown -----------------------------------------------------------------------------------------


def test_a_node_without_problems_is_ok() -> None:
    shown = health(snapshot(), clock.now())
    assert shown.status == "ok"
    assert shown.problems == []


@pytest.mark.parametrize(
    ("changes", "problem", "remedy"),
    [
        ({"error": "cannot reach it", "remedy": "check the cable"}, "cannot reach it", "check the cable"),
        ({"registered": False}, "not registered with the coordinator yet", "wait"),
        ({"last_heartbeat": 900.0}, "accepted no heartbeat for 100 s", None),
        ({"last_heartbeat": None, "started": 940.0}, "accepted no heartbeat for 60 s", None),
        ({"slots": ()}, "no slot is set up", "aitbc-miner check"),
        (
            {"slots": (slot("cpu7", state=SlotState.QUARANTINED, reason="it died 5 times"),)},
            "slot cpu7: it died 5 times",
            SLOT_REMEDY,
        ),
        ({"node": NodeView(3, "cannot deliver")}, "cannot deliver", "the node keeps the results and retries"),
        ({"gpu_error": "cannot start NVML"}, "cannot start NVML", None),
    ],
)
def test_each_problem_degrades_and_has_its_remedy(
    changes: dict[str, Any], problem: str, remedy: str | None
) -> None:
    shown = health(snapshot(**{"last_heartbeat": 1000.0, **changes}), 1000.0)
    assert shown.status == "degraded"
    assert len(shown.problems) == 1
    assert problem in shown.problems[0].problem
    assert (remedy or "") in (shown.problems[0].remedy or "")


def test_the_gauges_follow_the_snapshot(metrics: Metrics) -> None:
    busy = slot("gpu0", state=SlotState.BUSY, free=False, job_id="j1")
    metrics.snapshot = snapshot(
        slots=(busy, slot("cpu0")),
        queued=4,
        node=NodeView(pending_deliveries=2),
        uses={"gpu0": Use(250.0, 4096), "cpu0": Use(None, None)},
        gpu_uses={"gpu0": GpuUsage("GPU-a", vram_used_mb=3)},
        last_heartbeat=clock.now() - 7,
    )
    seen = samples(metrics)
    assert seen["aitbc_miner_running_jobs",] == 1
    assert seen["aitbc_miner_free_slots",] == 1
    assert seen["aitbc_miner_queue_jobs",] == 4
    assert seen["aitbc_miner_pending_deliveries",] == 2
    assert seen["aitbc_miner_coordinator_up",] == 1
    assert seen["aitbc_miner_coordinator_registered",] == 1
    assert 7 <= seen["aitbc_miner_last_heartbeat_age_seconds",] < 7 + LONG_S
    assert seen["aitbc_miner_slot_cpu_percent", "gpu0"] == 250
    assert seen["aitbc_miner_slot_memory_bytes", "gpu0"] == 4096
    assert seen["aitbc_miner_slot_vram_bytes", "gpu0"] == 3 << 20
    assert ("aitbc_miner_slot_cpu_percent", "cpu0") not in seen
    assert seen["aitbc_miner_slot_state", "gpu0", "BUSY"] == 1
    assert seen["aitbc_miner_slot_state", "gpu0", "IDLE"] == 0
    metrics.snapshot = snapshot(last_heartbeat=None)
    seen = samples(metrics)
    assert ("aitbc_miner_slot_cpu_percent", "gpu0") not in seen
    assert math.isnan(seen["aitbc_miner_last_heartbeat_age_seconds",])


def test_what_happens_is_counted(metrics: Metrics) -> None:
    metrics.count_job(None, {"run": 0.002, "upload": 7200.0})
    metrics.count_job(ErrorCode.E_OOM, {"run": math.nan, "prep": -1.0})
    for _ in range(2):
        with metrics.counted("heartbeats"):
            pass
    with suppress(OSError), metrics.counted("registrations"):
        raise OSError
    seen = samples(metrics)
    assert seen["aitbc_miner_jobs_total", "OK"] == 1
    assert seen["aitbc_miner_jobs_total", "E_OOM"] == 1
    assert seen["aitbc_miner_heartbeats_total", "sent"] == 2
    assert seen["aitbc_miner_heartbeats_total", "failed"] == 0
    assert seen["aitbc_miner_registrations_total", "failed"] == 1
    bucket = "aitbc_miner_step_duration_seconds_bucket"
    assert (seen[bucket, "0.001", "run"], seen[bucket, "0.005", "run"]) == (0, 1)
    assert (seen[bucket, "3600.0", "upload"], seen[bucket, "14400.0", "upload"]) == (0, 1)
    assert seen["aitbc_miner_step_duration_seconds_count", "run"] == 1
    assert not any("prep" in sample for sample in seen)


def test_the_page_says_what_each_metric_is(metrics: Metrics) -> None:
    metrics.snapshot = snapshot(
        uses={"cpu0": Use(1.0, 1)}, gpu_uses={"cpu0": GpuUsage("GPU-a", vram_used_mb=3)}
    )
    metrics.count_job(ErrorCode.E_OOM, {"run": 1.0})
    metrics.counters.count("retries", "E_OOM")
    rows = re.findall(r"^\| `(aitbc_\w+)` \| (\w+) \|(.*?)\|", METRICS_PAGE.read_text(), re.MULTILINE)
    documented = {name: (kind, set(re.findall(r"\w+", labels))) for name, kind, labels in rows}
    shown = {
        f"{family.name}_total" if family.type == "counter" else family.name: (
            family.type,
            {label for sample in family.samples for label in sample.labels} - {"le"},
        )
        for family in families(metrics)
    }
    assert documented == shown
    assert len(rows) == len(documented)


def test_every_counter_that_can_be_told_is_shown() -> None:
    told = get_args(get_type_hints(Counted)["name"])
    assert set(told) <= set(COUNTERS)
    assert {name for name in told if not COUNTERS[name].label} == {"broken_records"}


# --- the file for node_exporter ----------------------------------------------------------------------------


def test_the_textfile_is_what_prometheus_reads_and_anybody_may_read_it(
    metrics: Metrics, tmp_path: Path
) -> None:
    place = tmp_path / "metrics"
    place.mkdir()
    old = os.umask(0o077)
    try:
        with Upkeep(metrics, LONG_S, place / "node.prom", LONG_S):
            metrics.count_job(None, {})
    finally:
        os.umask(old)
    assert [path.name for path in place.iterdir()] == ["node.prom"]
    assert (place / "node.prom").stat().st_mode & 0o777 == 0o644
    written = text_string_to_metric_families((place / "node.prom").read_text())
    assert {family.name for family in written} == {family.name for family in families(metrics)}
    assert 'jobs_total{code="OK"} 1.0' in (place / "node.prom").read_text()


def test_a_textfile_that_cannot_be_written_is_told_once_and_degrades_nothing(
    metrics: Metrics, serving: Serving, tmp_path: Path, log: list[logging.LogRecord]
) -> None:
    place = tmp_path / "metrics"
    with Upkeep(metrics, 0.001, place / "node.prom", 0.001):
        until(lambda: metrics.textfile_error is not None)
        before = metrics.counters.shown
        metrics.count_job(None, {})
        until(lambda: metrics.counters.shown != before)
        status, _, body = serving.ask("GET", "/healthz")
        assert (status, json.loads(body)["status"]) == (200, "ok")
        told = json.loads(body)["textfile_error"]
        assert told.startswith(f"cannot write {place / 'node.prom'} (telemetry.textfile): No such file")
        place.mkdir()
        until(lambda: metrics.textfile_error is None)
        assert (place / "node.prom").exists()
    assert [(record.levelname, record.msg) for record in log if "textfile" in record.msg] == [
        ("WARNING", "textfile not written"),
        ("INFO", "textfile written"),
    ]


# --- how it is served --------------------------------------------------------------------------------------


def test_healthz_is_200_or_503(metrics: Metrics, serving: Serving) -> None:
    status, headers, body = serving.ask("GET", "/healthz?verbose")
    assert (status, headers["Content-Type"]) == (200, "application/json")
    shown = json.loads(body)
    assert shown["status"] == "ok"
    assert shown["node_id"] == "node-1"
    assert shown["slots"][0]["name"] == "cpu0"
    metrics.snapshot = snapshot(error="cannot reach it", remedy="check the cable")
    status, _, body = serving.ask("GET", "/healthz")
    assert status == 503
    assert json.loads(body)["problems"] == [{"problem": "cannot reach it", "remedy": "check the cable"}]


def test_metrics_and_page_are_served(metrics: Metrics, serving: Serving) -> None:
    status, headers, body = serving.ask("GET", "/metrics")
    assert status == 200
    assert headers["Content-Type"].startswith("text/plain")
    assert b"aitbc_miner_free_slots 1.0" in body
    metrics.snapshot = snapshot(error="<script>alert(1)</script>", slots=(slot("<b>"),))
    status, headers, body = serving.ask("GET", "/")
    assert status == 200
    assert "default-src 'none'" in headers["Content-Security-Policy"]
    assert b"&lt;script&gt;" in body
    assert b"<script" not in body
    assert b"<b>" not in body


def test_head_has_no_body(serving: Serving) -> None:
    status, headers, body = serving.ask("HEAD", "/healthz")
    assert (status, body) == (200, b"")
    assert int(headers["Content-Length"]) > 0


@pytest.mark.parametrize("target", ["/etc/passwd", "/../healthz", "/healthz/", "/metrics%2f"])
def test_there_is_nothing_else(serving: Serving, target: str) -> None:
    assert serving.ask("GET", target)[0] == 404


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS"])
def test_nothing_can_be_changed(serving: Serving, method: str) -> None:
    status, headers, _ = serving.ask(method, "/healthz")
    assert (status, headers["Allow"]) == (405, "GET, HEAD")


def test_unknown_methods_are_refused(serving: Serving) -> None:
    assert serving.ask("BREW", "/")[0] == 501


def test_a_long_request_line_is_refused(serving: Serving) -> None:
    assert serving.ask("GET", "/" + "a" * 2000)[0] == 414


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"GET /" + b"a" * 100_000,
        b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 50_000,
        b"\x16\x03\x01\0\r\n\r\n",
        b"\r\n",
    ],
    ids=["endless line", "endless headers", "tls", "empty"],
)
def test_garbage_is_cut_off_and_hurts_nobody(serving: Serving, request_bytes: bytes) -> None:
    with serving.connect() as connection:
        try:
            connection.sendall(request_bytes)
            connection.shutdown(socket.SHUT_WR)
        except (BrokenPipeError, ConnectionResetError):
            pass
        except OSError as error:
            assert error.errno == 107, "only a connection that is closed already may fail"  # noqa: PT017
        said = closed(connection)
    assert b" 200 " not in said
    assert serving.ask("GET", "/healthz")[0] == 200


def test_a_slow_client_has_one_deadline_for_the_whole_request(metrics: Metrics) -> None:
    serving = Serving(metrics, timeout_s=0.3)
    started = clock.now()
    try:
        with serving.connect() as connection:
            connection.settimeout(0.05)
            said = None
            for _ in range(1000):
                try:
                    connection.sendall(b"G")
                    said = connection.recv(100)
                    break
                except TimeoutError:
                    continue
                except ConnectionError:
                    break
            else:
                pytest.fail("the server listened to one byte after the other for ever")
        assert not said
        assert 0.25 <= clock.now() - started < LONG_S
    finally:
        serving.server.stop()


def test_connections_that_are_held_keep_nobody_from_an_answer(serving: Serving) -> None:
    held = [serving.connect() for _ in range(MAX_CONNECTIONS)]
    until(lambda: len(serving.server._served) == MAX_CONNECTIONS)
    # Each who comes takes the place of the one that has held longest.
    for _ in range(3):
        assert serving.ask("GET", "/healthz")[0] == 200
    assert closed(held[0]) == b""
    assert len(serving.server._served) <= MAX_CONNECTIONS
    for connection in held:
        connection.close()
    until(lambda: not serving.server._served)


def test_who_holds_most_connections_loses_one(serving: Serving) -> None:
    address, port = serving.server.address.rpartition(":")[::2]
    with socket.create_connection((address, int(port)), timeout=LONG_S) as first:
        held = [
            socket.create_connection((address, int(port)), LONG_S, source_address=("127.0.0.2", 0))
            for _ in range(MAX_CONNECTIONS - 1)
        ]
        until(lambda: len(serving.server._served) == MAX_CONNECTIONS)
        assert serving.ask("GET", "/healthz")[0] == 200
        # The oldest of all, but of a client that has only one.
        first.sendall(b"GET /healthz HTTP/1.0\r\n\r\n")
        assert b" 200 " in closed(first)
        for connection in held:
            connection.close()


def test_a_defect_of_a_page_ends_one_connection_and_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    def broken() -> Page:
        raise LookupError("a defect")

    server = PageServer("127.0.0.1:0", {"/": broken, "/well": lambda: Page(200, "text/plain", b"well")})
    server.start()
    logger = logging.getLogger("aitbc_miner.httpd")
    logger.addHandler(caplog.handler)
    try:
        port = int(server.address.rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", port), timeout=LONG_S) as connection:
            connection.sendall(b"GET / HTTP/1.0\r\n\r\n")
            assert closed(connection) == b""
        with socket.create_connection(("127.0.0.1", port), timeout=LONG_S) as connection:
            connection.sendall(b"GET /well HTTP/1.0\r\n\r\n")
            assert closed(connection).endswith(b"well")
    finally:
        logger.removeHandler(caplog.handler)
        server.stop()
    assert "a defect" in caplog.text


def test_without_a_free_thread_the_connection_is_closed(
    serving: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_thread(self: object, request: object, client_address: object) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(socketserver.ThreadingMixIn, "process_request", no_thread)
        with serving.connect() as connection:
            assert closed(connection) == b""
    assert serving.ask("GET", "/healthz")[0] == 200


def test_a_taken_port_is_named_with_the_remedy(serving: Serving, metrics: Metrics) -> None:
    address = serving.server.address
    with pytest.raises(MinerError, match=rf"cannot serve on {address}: .*in use; set telemetry\.listen"):
        PageServer(address, pages(metrics))


@pytest.mark.parametrize("listen", ["nonsense", "127.0.0.1:http", "127.0.0.1:70000"])
def test_what_is_no_address_is_refused(metrics: Metrics, listen: str) -> None:
    with pytest.raises(MinerError, match="not an address"):
        PageServer(listen, pages(metrics))


def test_ipv6_works_where_the_machine_has_it(metrics: Metrics) -> None:
    try:
        server = PageServer("[::1]:0", pages(metrics))
    except MinerError as error:
        assert "cannot serve on [::1]:0" in str(error)  # noqa: PT017  # a machine without IPv6
        return
    server.start()
    host, _, port = server.address.rpartition(":")
    assert host == "[::1]"
    with socket.create_connection(("::1", int(port)), timeout=LONG_S) as connection:
        connection.sendall(b"GET /healthz HTTP/1.0\r\n\r\n")
        assert b" 200 " in closed(connection)
    server.stop()
