"""The HTTP pages of the node: /metrics for Prometheus, /healthz, and a small page for people."""

import html
from collections.abc import Sequence
from typing import Self

import msgspec
from prometheus_client import CONTENT_TYPE_LATEST

from aitbc_miner.errors import MinerError
from aitbc_miner.telemetry.httpd import Page, Pages, PageServer
from aitbc_miner.telemetry.metrics import Health, Metrics, health
from aitbc_miner.util import clock
from aitbc_miner.util.log import events

log = events("heartbeat")


class Served:
    """Serves the pages on `listen` ("host:port"). While the address is taken, each call of `tend` retries."""

    def __init__(self, listen: str, metrics: Metrics) -> None:
        self._listen, self._metrics = listen, metrics
        self._server: PageServer | None = None

    def __enter__(self) -> Self:
        self.tend()
        return self

    def __exit__(self, *_: object) -> None:
        if self._server:
            self._server.stop()

    def tend(self) -> None:
        """Start the server unless it runs; log a failure, because jobs do not need these pages."""
        if self._server or not self._listen:
            return
        try:
            server = PageServer(self._listen, pages(self._metrics))
        except MinerError as error:
            if self._metrics.listen_error is None:
                log.error("telemetry not served", error=str(error))  # noqa: TRY400  # the message has the cause
            self._metrics.listen_error = f"{error}; the node retries by itself"
            return
        log.info("telemetry served", address=server.address)
        self._metrics.listen_error = None
        self._server = server
        server.start()


def pages(metrics: Metrics) -> Pages:
    """Give the pages: `/healthz` (200, or 503 if degraded), `/metrics`, and `/` for people."""

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
