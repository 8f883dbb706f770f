"""What tools and people see of the node over HTTP: /metrics for Prometheus, /healthz, and a small page.

The main loop replaces one immutable `Snapshot` and counts events; the server's threads only ever read. All of
it is public on the address it listens on, so no secret may come into a snapshot.
"""

import html
import math
from collections.abc import Iterator, Mapping, Sequence

import msgspec
from msgspec import Struct
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from aitbc_miner import __version__
from aitbc_miner.errors import ErrorCode
from aitbc_miner.gpu import GpuUsage
from aitbc_miner.messages import NodeView, SlotView
from aitbc_miner.sampling import Use
from aitbc_miner.slot import SlotState
from aitbc_miner.util import clock
from aitbc_miner.util.httpd import Page, Pages

BUCKETS_S = (0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1, 5, 15, 60, 300, 900, 3600, 14400, 43200, 86400)
"""From a no-op's start to a day's rendering; both ends matter here."""
SILENT_AFTER = 3
"""Heartbeats missed in a row until the silence is a problem of its own."""


class Problem(Struct, frozen=True):
    """What is wrong, and what the operator can do about it."""

    problem: str
    remedy: str | None = None


class Snapshot(Struct, frozen=True):
    """All that is shown of the node at one moment. `last_heartbeat` is in boot time, the others as named."""

    node_id: str
    coordinator: str
    interval_s: float
    started: float = 0.0
    reachable: bool = False
    registered: bool = False
    error: str | None = None
    remedy: str | None = None
    last_heartbeat: float | None = None
    slots: tuple[SlotView, ...] = ()
    queued: int = 0
    accepting: bool = True
    node: NodeView = NodeView()
    uses: Mapping[str, Use] = {}
    gpu_uses: Mapping[str, GpuUsage] = {}
    gpu_error: str | None = None

    def age_s(self, now: float) -> float | None:
        """Give the seconds since the coordinator last took a heartbeat."""
        return None if self.last_heartbeat is None else max(0.0, now - self.last_heartbeat)


class SlotHealth(Struct, frozen=True):
    """A slot on /healthz and on the page."""

    name: str
    kind: str
    state: str
    job_id: str | None
    cpu_pct: float | None
    memory_bytes: int | None
    vram_bytes: int | None


class Health(Struct, frozen=True):
    """The body of /healthz; `status` is `ok`, or `degraded` when there are problems."""

    status: str
    node_id: str
    version: str
    coordinator: str
    reachable: bool
    registered: bool
    last_heartbeat_age_s: float | None
    accepting: bool
    queued: int
    pending_deliveries: int
    slots: list[SlotHealth]
    problems: list[Problem]


def health(snapshot: Snapshot, now: float) -> Health:
    """Judge the node: anything that keeps it from earning is a problem."""
    problems = list(_problems(snapshot, now))
    age_s = snapshot.age_s(now)
    return Health(
        status="degraded" if problems else "ok",
        node_id=snapshot.node_id,
        version=__version__,
        coordinator=snapshot.coordinator,
        reachable=snapshot.reachable,
        registered=snapshot.registered,
        last_heartbeat_age_s=None if age_s is None else round(age_s, 1),
        accepting=snapshot.accepting,
        queued=snapshot.queued,
        pending_deliveries=snapshot.node.pending_deliveries,
        slots=[_slot_health(snapshot, view) for view in snapshot.slots],
        problems=problems,
    )


def _slot_health(snapshot: Snapshot, view: SlotView) -> SlotHealth:
    name = view.offer.name
    use = snapshot.uses.get(name, Use())
    gpu = snapshot.gpu_uses.get(name)
    return SlotHealth(
        name=name,
        kind=view.offer.kind,
        state=view.state,
        job_id=view.job_id,
        cpu_pct=use.cpu_pct,
        memory_bytes=use.memory_bytes,
        vram_bytes=None if gpu is None or gpu.error else gpu.vram_used_mb << 20,
    )


def _problems(snapshot: Snapshot, now: float) -> Iterator[Problem]:
    if snapshot.error:
        yield Problem(snapshot.error, snapshot.remedy)
    elif not snapshot.registered:
        yield Problem("not registered with the coordinator yet", "wait some seconds")
    silent_s = now - (snapshot.started if snapshot.last_heartbeat is None else snapshot.last_heartbeat)
    if silent_s > SILENT_AFTER * snapshot.interval_s:
        yield Problem(f"the coordinator has taken no heartbeat for {silent_s:.0f} s", snapshot.remedy)
    if not snapshot.slots:
        yield Problem("no slot is set up", "run `aitbc-miner check` and `aitbc-miner slots --suggest`")
    for view in snapshot.slots:
        if view.state in {SlotState.QUARANTINED, SlotState.BACKOFF}:
            why = view.reason or "its worker failed"
            yield Problem(f"slot {view.offer.name} is out of use: {why}", "run `aitbc-miner doctor`")
    if snapshot.node.agent_error:
        yield Problem(snapshot.node.agent_error, "results are kept and sent again")
    if snapshot.gpu_error:
        yield Problem(snapshot.gpu_error)


class Metrics:
    """What is counted over the life of the process, and the gauges of the present snapshot.

    Counting is for the main loop, `render` for any thread.
    """

    def __init__(self, snapshot: Snapshot) -> None:
        self.snapshot = snapshot
        registry = self._registry = CollectorRegistry()
        self._jobs = Counter(
            "aitbc_miner_jobs", "Jobs ended, by error code; OK for success", ["code"], registry=registry
        )
        self._heartbeats = Counter(
            "aitbc_miner_heartbeats", "Heartbeats, by whether they were taken", ["result"], registry=registry
        )
        self._registrations = Counter(
            "aitbc_miner_registrations",
            "Registrations, by whether they were taken",
            ["result"],
            registry=registry,
        )
        self._steps = Histogram(
            "aitbc_miner_step_duration_seconds",
            "Duration of each step of a job",
            ["step"],
            buckets=BUCKETS_S,
            registry=registry,
        )
        for counter in (self._heartbeats, self._registrations):
            # So that a rate can be told from the first failure on.
            counter.labels("sent"), counter.labels("failed")
        registry.register(_Gauges(self))

    def count_heartbeat(self, *, sent: bool) -> None:
        """Count a heartbeat that was sent or failed."""
        self._heartbeats.labels("sent" if sent else "failed").inc()

    def count_registration(self, *, sent: bool) -> None:
        """Count a registration that was taken or failed."""
        self._registrations.labels("sent" if sent else "failed").inc()

    def count_job(self, code: ErrorCode | None, timings: Mapping[str, float]) -> None:
        """Count a job that ended, with the seconds that each of its steps took."""
        self._jobs.labels(code or "OK").inc()
        for step, seconds in timings.items():
            if math.isfinite(seconds) and seconds >= 0:
                self._steps.labels(step).observe(seconds)

    def render(self) -> bytes:
        """Give the text that Prometheus reads."""
        return generate_latest(self._registry)


class _Gauges(Collector):
    """The snapshot as gauges: made anew at each scrape, so that no slot outlives its end."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def describe(self) -> list[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        snapshot = self._metrics.snapshot
        yield from _node_gauges(snapshot)
        yield from _slot_gauges(snapshot)


def _node_gauges(snapshot: Snapshot) -> Iterator[Metric]:
    slots = snapshot.slots
    yield _gauge("running_jobs", "Jobs in a slot", sum(view.job_id is not None for view in slots))
    yield _gauge("free_slots", "Slots that could take a job", sum(view.free for view in slots))
    yield _gauge("queue_jobs", "Jobs that wait for a slot", snapshot.queued)
    yield _gauge(
        "pending_deliveries", "Reports not yet taken by the coordinator", snapshot.node.pending_deliveries
    )
    yield _gauge("coordinator_up", "Whether the coordinator answers", snapshot.reachable)
    yield _gauge("coordinator_registered", "Whether the node is registered", snapshot.registered)
    age_s = snapshot.age_s(clock.now())
    yield _gauge(
        "last_heartbeat_age_seconds",
        "Seconds since the coordinator last took a heartbeat; NaN before the first",
        math.nan if age_s is None else age_s,
    )


def _slot_gauges(snapshot: Snapshot) -> Iterator[Metric]:
    shown = [_slot_health(snapshot, view) for view in snapshot.slots]
    yield _by_slot(
        "slot_cpu_percent",
        "Processor use of the slot's job in percent of one core",
        [(slot.name, slot.cpu_pct) for slot in shown],
    )
    yield _by_slot(
        "slot_memory_bytes",
        "Memory use of the slot's job",
        [(slot.name, slot.memory_bytes) for slot in shown],
    )
    yield _by_slot(
        "slot_vram_bytes",
        "Video memory in use on the slot's GPU",
        [(slot.name, slot.vram_bytes) for slot in shown],
    )
    states = GaugeMetricFamily(
        "aitbc_miner_slot_state", "1 for the state that the slot is in", labels=["slot", "state"]
    )
    for slot in shown:
        for state in SlotState:
            states.add_metric([slot.name, state], slot.state == state)
    yield states


def _gauge(name: str, meaning: str, value: float) -> Metric:
    return GaugeMetricFamily(f"aitbc_miner_{name}", meaning, value=value)


def _by_slot(name: str, meaning: str, values: Sequence[tuple[str, float | None]]) -> Metric:
    family = GaugeMetricFamily(f"aitbc_miner_{name}", meaning, labels=["slot"])
    for slot, value in values:
        if value is not None:
            family.add_metric([slot], value)
    return family


def pages(metrics: Metrics) -> Pages:
    """Give what the server serves: `/healthz` (200, or 503 when degraded), `/metrics`, and `/` for people."""

    def healthz() -> Page:
        now = health(metrics.snapshot, clock.now())
        return Page(200 if now.status == "ok" else 503, "application/json", msgspec.json.encode(now) + b"\n")

    return {
        "/healthz": healthz,
        "/metrics": lambda: Page(200, CONTENT_TYPE_LATEST, metrics.render()),
        "/": lambda: Page(
            200, "text/html; charset=utf-8", _html(health(metrics.snapshot, clock.now())).encode()
        ),
    }


_STYLE = "body{font:1rem sans-serif;margin:2em}td,th{padding:.2em 1em;text-align:left}.degraded{color:#b00}"


def _html(shown: Health) -> str:
    age_s = shown.last_heartbeat_age_s
    facts = [
        ("Version", shown.version),
        ("Coordinator", shown.coordinator),
        ("Answers", "yes" if shown.reachable else "no"),
        ("Registered", "yes" if shown.registered else "no"),
        ("Last heartbeat", "none yet" if age_s is None else f"{age_s:.0f} s ago"),
        ("Takes jobs", "yes" if shown.accepting else "no (draining)"),
        ("Jobs waiting", shown.queued),
        ("Reports waiting", shown.pending_deliveries),
    ]
    columns = ["slot", "kind", "state", "job", "CPU %", "memory, bytes", "video memory, bytes"]
    slots = [msgspec.structs.astuple(slot) for slot in shown.slots]
    problems = [(problem.problem, problem.remedy) for problem in shown.problems]
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{_cell(shown.node_id)}</title>"
        f"<style>{_STYLE}</style>"
        f"<h1>{_cell(shown.node_id)}: <span class={shown.status}>{shown.status}</span></h1>"
        f"{_table(['problem', 'remedy'], problems) if problems else ''}"
        f"{_table([], facts)}{_table(columns, slots)}"
        "<p><a href=/healthz>/healthz</a> <a href=/metrics>/metrics</a></p></html>\n"
    )


def _table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    head = "".join(f"<th>{_cell(name)}</th>" for name in columns)
    body = "".join(f"<tr>{''.join(f'<td>{_cell(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"


def _cell(value: object) -> str:
    return html.escape("" if value is None else str(value))
