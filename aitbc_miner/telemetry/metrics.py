"""The node's health for people and tools, and its metrics for Prometheus.

The main loop replaces one immutable `Snapshot` and counts events; other threads only read. Anybody who
reaches the address of the pages can read a snapshot, so no secret may enter a snapshot.
"""

import math
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Self

from msgspec import Struct
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from aitbc_miner import __version__
from aitbc_miner.errors import ErrorCode
from aitbc_miner.gpu.reader import GpuUsage
from aitbc_miner.ipc.messages import NodeView, SlotView
from aitbc_miner.slots.state import SLOT_REMEDY, SlotState
from aitbc_miner.telemetry.counters import BOUNDS, Counters, CounterTotals
from aitbc_miner.telemetry.sampling import Use
from aitbc_miner.util import clock
from aitbc_miner.util.log import events

log = events("heartbeat")

LAST_SAVE_S = 3.0
"""At its end the process waits at most this long for the disk."""
SILENT_AFTER = 3
"""After so many missed heartbeats in a row, /healthz reports a problem."""


class HealthProblem(Struct, frozen=True):
    """A problem of the node and the operator's remedy."""

    problem: str
    remedy: str | None = None


class Snapshot(Struct, frozen=True):
    """The state of the node at one moment. Times are seconds of the boot-time clock."""

    node_id: str
    coordinator: str
    interval_s: float
    started: float = 0.0
    reachable: bool = False
    registered: bool = False
    error: str | None = None
    remedy: str | None = None
    starved_since: float | None = None
    last_heartbeat: float | None = None
    slots: tuple[SlotView, ...] = ()
    queued: int = 0
    accepting: bool = True
    node: NodeView = NodeView()
    uses: Mapping[str, Use] = {}
    gpu_uses: Mapping[str, GpuUsage] = {}
    gpu_error: str | None = None

    def age_s(self, now: float) -> float | None:
        """Give the seconds since the coordinator last accepted a heartbeat; None before the first."""
        return None if self.last_heartbeat is None else max(0.0, now - self.last_heartbeat)


class SlotHealth(Struct, frozen=True):
    """A slot on /healthz and on the page for people."""

    name: str
    kind: str
    state: str
    job_id: str | None
    cpu_pct: float | None
    memory_bytes: int | None
    vram_bytes: int | None


class Health(Struct, frozen=True):
    """The body of /healthz; `status` is `ok` without problems, else `degraded`."""

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
    problems: list[HealthProblem]
    textfile_error: str | None = None


def health(snapshot: Snapshot, now: float, textfile_error: str | None = None) -> Health:
    """Make the body of /healthz; anything that keeps the node from earning is a problem."""
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
        textfile_error=textfile_error,
    )


def _slot_health(snapshot: Snapshot, view: SlotView) -> SlotHealth:
    name = view.offer.name
    use = snapshot.uses.get(name, Use())
    gpu = snapshot.gpu_uses.get(name)
    vram_mb = gpu.vram_used_mb if gpu else None
    return SlotHealth(
        name=name,
        kind=view.offer.kind,
        state=view.state,
        job_id=view.job_id,
        cpu_pct=use.cpu_pct,
        memory_bytes=use.memory_bytes,
        vram_bytes=None if vram_mb is None else vram_mb << 20,
    )


def _problems(snapshot: Snapshot, now: float) -> Iterator[HealthProblem]:
    if snapshot.error:
        yield HealthProblem(snapshot.error, snapshot.remedy)
    elif not snapshot.registered:
        yield HealthProblem("not registered with the coordinator yet", "wait some seconds")
    silent_s = now - (snapshot.started if snapshot.last_heartbeat is None else snapshot.last_heartbeat)
    if silent_s > SILENT_AFTER * snapshot.interval_s:
        yield HealthProblem(
            f"the coordinator has accepted no heartbeat for {silent_s:.0f} s", snapshot.remedy
        )
    if not snapshot.slots:
        yield HealthProblem("no slot is set up", "run `aitbc-miner check` and `aitbc-miner slots --suggest`")
    for view in snapshot.slots:
        if view.state in {SlotState.QUARANTINED, SlotState.BACKOFF}:
            yield HealthProblem(f"slot {view.offer.name}: {view.reason or 'unknown'}", SLOT_REMEDY)
    if snapshot.node.agent_error:
        yield HealthProblem(
            snapshot.node.agent_error, "no action needed here: the node keeps the results and retries"
        )
    if snapshot.gpu_error:
        yield HealthProblem(snapshot.gpu_error)


class Family(Struct, frozen=True):
    """A counter: its meaning, the name of its label if any, and the label's values shown from the start.

    The counter is stored as a whole number, `scale` times the shown value.
    """

    meaning: str
    label: str = ""
    always: tuple[str, ...] = ()
    scale: int = 1


# `always` shows a label's value with 0 from the start, so that Prometheus sees the rise to the first failure.
COUNTERS = {
    "jobs": Family("Jobs ended, by error code; OK for success", "code"),
    "heartbeats": Family("Heartbeats, by result", "result", ("sent", "failed")),
    "registrations": Family("Registrations, by result", "result", ("sent", "failed")),
    "broken_records": Family("Records of jobs that could not be read and were set aside", always=("",)),
    "deliveries": Family(
        "Reports that the coordinator has settled, by result", "how", ("accepted", "superseded", "refused")
    ),
    "rate_limited": Family("Calls that the coordinator answered with 429, by kind", "call", ("pull",)),
    "receipts": Family("Receipts for results, by result of the check", "check", ("verified", "unverified")),
    "units": Family("Units that receipts name", "check", ("verified", "unverified"), 10**6),
    "price": Family("Prices that receipts name", "check", ("verified", "unverified"), 10**6),
    "retries": Family("Attempts that failed and are followed by another, by error code", "code"),
}
STEPS = "step_duration_seconds"


class Metrics(Collector):
    """The counters, including earlier runs of the node, and the gauges of the present snapshot.

    Each scrape makes the gauges anew, so that a removed slot disappears. The main loop counts; any thread may
    render. `directory` holds the file of the counters.
    """

    def __init__(self, snapshot: Snapshot, directory: Path) -> None:
        self.snapshot = snapshot
        self.listen_error: str | None = None
        self.textfile_error: str | None = None
        self.counters = Counters(directory)
        self._registry = CollectorRegistry()
        for name, family in COUNTERS.items():
            for label in family.always:
                self.counters.count(name, label, 0)
        self._registry.register(self)

    @contextmanager
    def counted(self, name: str) -> Iterator[None]:
        """Count a call to the coordinator under `name`: as "failed" if the block raises, else as "sent"."""
        result = "failed"
        try:
            yield
            result = "sent"
        finally:
            self.counters.count(name, result)

    def count_job(self, code: ErrorCode | None, timings: Mapping[str, float]) -> None:
        """Count a job that ended and the seconds of each of its steps."""
        self.counters.count("jobs", code or "OK")
        for step, seconds in timings.items():
            self.counters.observe(STEPS, step, seconds)

    def render(self) -> bytes:
        """Give the metrics as text in the format of Prometheus."""
        self.counters.save()
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """Yield all metrics; none of the counters until their file is read."""
        yield _gauge(
            "metrics_unsaved",
            "1 while the counters stand still, because the node cannot write them to the disk",
            self.counters.unsaved,
        )
        if self.counters.shown is not None:
            yield from _counted(self.counters.shown)
        yield from _node_gauges(self.snapshot)
        yield from _slot_gauges(self.snapshot)


class Upkeep:
    """A thread that writes the metrics to the disk, so that a hanging disk does not delay a heartbeat.

    The thread saves the counters every `every_s` seconds, and the file for node_exporter every `textfile_s`.
    """

    def __init__(self, metrics: Metrics, every_s: float, textfile: Path | None, textfile_s: float) -> None:
        self._metrics, self._textfile = metrics, textfile
        self._pause_s = min(every_s, textfile_s) if textfile else every_s
        self._textfile_s, self._due = textfile_s, clock.now()
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run, name="upkeep", daemon=True)

    def __enter__(self) -> Self:
        """Start the thread."""
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """End the thread after a last save; wait at most LAST_SAVE_S for it."""
        self._ending.set()
        self._thread.join(LAST_SAVE_S)
        if not self._thread.is_alive():
            self._metrics.counters.close()

    def _run(self) -> None:
        ending = False
        while True:
            self._metrics.counters.save()
            if self._textfile and (ending or clock.now() >= self._due):
                self._write(self._textfile)
                self._due = clock.now() + self._textfile_s
            if ending:
                return
            ending = self._ending.wait(self._pause_s)

    def _write(self, path: Path) -> None:
        error = None
        try:
            _replace(path, self._metrics.render())
        except OSError as caught:
            remedy = "make the directory and let the service's user write there"
            error = f"cannot write {path} (telemetry.textfile): {caught.strerror}; {remedy}"
        if error != self._metrics.textfile_error:
            if error:
                log.warning("textfile not written", error=error)
            else:
                log.info("textfile written")
        self._metrics.textfile_error = error


def _replace(path: Path, text: bytes) -> None:
    """Replace a world-readable file by a rename, so that no reader sees half of the text."""
    temporary = path.with_name(f".{path.name}.new")
    temporary.unlink(missing_ok=True)
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    with os.fdopen(fd, "wb") as file:
        os.fchmod(fd, 0o644)
        file.write(text)
    temporary.rename(path)


def _counted(shown: CounterTotals) -> Iterator[Metric]:
    for name, family in COUNTERS.items():
        labels = [family.label] if family.label else []
        counts = CounterMetricFamily(f"aitbc_miner_{name}", family.meaning, labels=labels)
        for label, n in shown.counters.get(name, {}).items():
            counts.add_metric([label] if labels else [], n if family.scale == 1 else n / family.scale)
        yield counts
    steps = HistogramMetricFamily(f"aitbc_miner_{STEPS}", "Duration of each step of a job", labels=["step"])
    for step, durations in shown.durations.get(STEPS, {}).items():
        upto = accumulate(durations.buckets.get(bound, 0) for bound in BOUNDS)
        steps.add_metric([step], list(zip(BOUNDS, upto, strict=True)), durations.sum_s)
    yield steps


def _node_gauges(snapshot: Snapshot) -> Iterator[Metric]:
    slots = snapshot.slots
    yield _gauge("running_jobs", "Jobs in a slot", sum(view.job_id is not None for view in slots))
    yield _gauge("free_slots", "Slots that could take a job", sum(view.free for view in slots))
    yield _gauge("queue_jobs", "Jobs that wait for a slot", snapshot.queued)
    yield _gauge(
        "pending_deliveries", "Reports not yet accepted by the coordinator", snapshot.node.pending_deliveries
    )
    yield _gauge("coordinator_up", "Whether the coordinator answers", snapshot.reachable)
    yield _gauge("coordinator_registered", "Whether the node is registered", snapshot.registered)
    since = snapshot.starved_since
    yield _gauge(
        "starved_seconds",
        "Seconds since the first of the pulls that all brought no job, from 300 on; else 0",
        0.0 if since is None else max(0.0, clock.now() - since),
    )
    age_s = snapshot.age_s(clock.now())
    yield _gauge(
        "last_heartbeat_age_seconds",
        "Seconds since the coordinator last accepted a heartbeat; NaN before the first",
        math.nan if age_s is None else age_s,
    )


def _slot_gauges(snapshot: Snapshot) -> Iterator[Metric]:
    shown = [_slot_health(snapshot, view) for view in snapshot.slots]
    for name, meaning, field in (
        ("cpu_percent", "CPU use of the slot's job in percent of one core", "cpu_pct"),
        ("memory_bytes", "Memory use of the slot's job", "memory_bytes"),
        ("vram_bytes", "Video memory in use on the slot's GPU", "vram_bytes"),
    ):
        family = GaugeMetricFamily(f"aitbc_miner_slot_{name}", meaning, labels=["slot"])
        for slot in shown:
            if (value := getattr(slot, field)) is not None:
                family.add_metric([slot.name], value)
        yield family
    states = GaugeMetricFamily("aitbc_miner_slot_state", "1 for the slot's state", labels=["slot", "state"])
    for slot in shown:
        for state in SlotState:
            states.add_metric([slot.name, state], slot.state == state)
    yield states


def _gauge(name: str, meaning: str, value: float) -> Metric:
    return GaugeMetricFamily(f"aitbc_miner_{name}", meaning, value=value)
