"""What is served over HTTP: /metrics for Prometheus, /healthz, and a small page for people."""

import html
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import msgspec
from prometheus_client import CONTENT_TYPE_LATEST

from aitbc_miner.errors import MinerError
from aitbc_miner.telemetry import Health, Metrics, health
from aitbc_miner.util import clock
from aitbc_miner.util.httpd import Page, Pages, PageServer
from aitbc_miner.util.log import events

log = events("heartbeat")


@contextmanager
def serving(listen: str | None, metrics: Metrics) -> Iterator[None]:
    """Serve the pages on `listen` ("host:port") meanwhile; nothing, if it is empty or cannot be had."""
    if not listen:
        yield
        return
    try:
        server = PageServer(listen, pages(metrics))
    except MinerError as error:
        # Jobs are worth more than their statistics.
        log.error("no-telemetry", error=str(error))  # noqa: TRY400  # the message says it all
        yield
        return
    log.info("telemetry", address=server.address)
    server.start()
    try:
        yield
    finally:
        server.stop()


def pages(metrics: Metrics) -> Pages:
    """Give what the server serves: `/healthz` (200, or 503 when degraded), `/metrics`, and `/` for people."""

    def healthz() -> Page:
        now = health(metrics.snapshot, clock.now(), metrics.textfile_error)
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
