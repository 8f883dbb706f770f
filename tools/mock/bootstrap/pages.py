"""The mock coordinator's page and JSON of its ledger, and its input files."""

import json
import re
from collections.abc import Iterable
from html import escape
from pathlib import Path
from urllib.parse import unquote

from tools.mock.bootstrap.ledger import Ledger
from tools.mock.bootstrap.records import Job, Node
from tools.mock.faults import Faults
from tools.mock.http import FileSpan, Refusal, Reply

RANGE = re.compile(r"bytes=(\d*)-(\d*)")

PAGE = """<!doctype html><meta charset="utf-8"><meta http-equiv="refresh" content="3">
<title>Mock coordinator</title><style>
body{{font:14px sans-serif;margin:2em}}table{{border-collapse:collapse;margin-bottom:2em}}
td,th{{border:1px solid #bbb;padding:.3em .6em;text-align:left;vertical-align:top}}</style>
<h1>Mock coordinator</h1>{tables}<p><a href="/state.json">the same as JSON</a></p>
"""


def state_reply(ledger: Ledger, faults: Faults) -> Reply:
    """Return the whole state as JSON, without tokens."""
    shown = {
        "jobs": [_job_state(job) for job in ledger.jobs().values()],
        "nodes": [_node_state(node) for node in ledger.nodes().values()],
        "strays": ledger.strays(),
        "faults": faults.as_list(),
        "calls": len(ledger.calls()),
    }
    return Reply(200, json.dumps(shown, default=_plain).encode())


def _plain(value: object) -> object:
    return str(value) if isinstance(value, Path) else vars(value)


def _job_state(job: Job) -> dict[str, object]:
    # The reply has the manifest in it, as text: a hostile one may be nested deeper than can be encoded.
    reply = job.reply[:4096].decode(errors="replace")
    return {**vars(job), "manifest": None, "reply": reply, "error_code": job.error_code}


def _node_state(node: Node) -> dict[str, object]:
    last = node.heartbeats[-1] if node.heartbeats else None
    return {**vars(node), "heartbeats": len(node.heartbeats), "last_heartbeat": last}


def page(ledger: Ledger) -> Reply:
    """Return the page for people."""
    jobs = [
        (
            job.job_id,
            job.state,
            job.node or "",
            len(job.handed),
            _last_progress(job),
            job.error_code or "",
            _files(job),
        )
        for job in ledger.jobs().values()
    ]
    nodes = [
        (
            node.node_id,
            len(node.registrations),
            len(node.heartbeats),
            node.heartbeats[-1].payload if node.heartbeats else "",
        )
        for node in ledger.nodes().values()
    ]
    return tables_reply(
        table("Nodes", ("node", "registered", "heartbeats", "last heartbeat"), nodes),
        table("Jobs", ("job", "state", "node", "handed out", "progress", "error", "artifacts"), jobs),
    )


def tables_reply(*tables: str) -> Reply:
    """Return a page of tables."""
    # A job's author and a node both choose text that is shown here, so nothing on this page may run.
    policy = {"Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'"}
    return Reply(
        200, PAGE.format(tables="".join(tables)).encode(errors="replace"), "text/html; charset=utf-8", policy
    )


def _last_progress(job: Job) -> str:
    return f"{job.progress[-1].pct:g} % {job.progress[-1].note}" if job.progress else ""


def _files(job: Job) -> str:
    artifacts = job.accepted.artifacts if job.accepted else ()
    return ", ".join(f"{each.path} ({each.bytes} bytes, sha256 {each.sha256[:12]}…)" for each in artifacts)


def table(title: str, heads: tuple[str, ...], rows: Iterable[tuple[object, ...]]) -> str:
    """Return a table in HTML; its cells are text, cut to a length."""
    lines = ["".join(f"<th>{head}</th>" for head in heads)]
    lines += ["".join(f"<td>{escape(str(cell)[:500])}</td>" for cell in row) for row in rows]
    return f"<h2>{title}</h2><table>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>"


def file_reply(folder: Path | None, quoted: str, wanted: str | None, if_range: str | None) -> Reply:
    """Return a file of the folder, or the part in a Range header.

    Raises:
        Refusal: 404, the file is missing; 416, the file has no such part.
    """
    name = unquote(quoted)
    path = folder / name if folder and name and not re.search(r"[/\0]|^\.", name) else None
    if path is None or not path.is_file():
        raise Refusal(404, "no_file", f"no file {name[:128]!r} here")
    found = path.stat()
    size = found.st_size
    headers = {"ETag": f'"{found.st_mtime_ns:x}-{size:x}"', "Accept-Ranges": "bytes"}
    stretch = _stretch(wanted, size) if if_range in {None, headers["ETag"]} else None
    start, length = stretch or (0, size)
    if stretch:
        headers["Content-Range"] = f"bytes {start}-{start + length - 1}/{size}"
    return Reply(206 if stretch else 200, FileSpan(path, start, length), "application/octet-stream", headers)


def _stretch(wanted: str | None, size: int) -> tuple[int, int] | None:
    """Return start and length of a Range header's single part; None: ignore the header."""
    match = RANGE.fullmatch(wanted or "")
    if match is None or not any(match.groups()):
        return None
    first, last = match.groups()
    if first:
        start, end = int(first), min(int(last or size), size - 1)
    else:
        start, end = max(size - int(last), 0), size - 1
    if start >= size:
        raise Refusal(416, "bad_range", f"the file has {size} bytes")
    return (start, end - start + 1) if start <= end else None
