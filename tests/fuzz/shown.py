"""What is shown of strangers' texts: log lines, pages, a terminal, the headers of an upload."""

import contextlib
import email.parser
import email.policy
import io
import json
import logging
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
from hypothesis import strategies as st
from msgspec.structs import replace
from requests_toolbelt import MultipartEncoder

from aitbc_miner.control.protocol import Answer, JobRow, Request
from aitbc_miner.coordinator.bootstrap import BootstrapCoordinator
from aitbc_miner.coordinator.http import HttpClient, HttpReply, clean
from aitbc_miner.ctl import ask, history_page, logs, pages
from aitbc_miner.ctl import main as ctl
from aitbc_miner.errors import CommandError, JobError
from aitbc_miner.identity.receipts import Receipt
from aitbc_miner.jobs import Artifact, Outcome, State
from aitbc_miner.runners.interface import last_line, printable
from aitbc_miner.store.ledger import LedgerRow, Totals
from aitbc_miner.util.log import MASK, Formatter
from aitbc_miner.util.terminal import visible
from aitbc_miner.worker.artifacts import check_path
from tests.fuzz.engine import Check, Target, directory, only, raw, simply
from tests.fuzz.kept import NAMES
from tests.fuzz.mutations import JSON, joined, mutated, parted, words
from tests.fuzz.said import MANIFESTS, framed
from tests.fuzz.shapes import encoded

SECRET = "s3cr3t/\"t0k\\en'"
PAINT = pages.plain


# --- log lines ---------------------------------------------------------------------------------------------


def _log(data: bytes) -> None:
    name, value = (part.decode("utf-8", "surrogateescape") for part in parted(data, 2))
    record = logging.makeLogRecord({"name": "aitbc_miner.x", "levelname": "INFO", "msg": "event"})
    record.attrs = {"job_id": name, "slot": value, "text": value, "more": [name, {name: value}]}
    for as_json in (True, False):
        with only(size=20 * len(data)):
            line = Formatter("node", as_json=as_json, secrets=[SECRET]).format(record)
            assert not raw(line)
            assert SECRET not in line
            line.encode()
            if as_json and MASK not in line:
                assert json.loads(line)["attrs"]["text"] == value
    for text in (clean(value, 100), printable(value, 100), last_line(value), visible(value)):
        assert not raw(text)
    assert len(clean(value, 100)) <= 100


# --- the operator's terminal -------------------------------------------------------------------------------


def _terminal(data: bytes) -> None:
    """However a log comes in pieces, it is shown the same, and nothing of it acts on a terminal."""
    with only(size=4 * len(data)):
        whole = _shown([data])
        assert _shown([data[:7], data[7:8], data[8:]]) == whole
        assert not raw(whole, "\n\t")


def _shown(pieces: list[bytes]) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as out:
        write = logs.TextWriter(logs._tamed)
        for piece in pieces:
            write(piece)
        write(b"", last=True)
    return out.getvalue()


def _job_page(data: bytes) -> None:
    names = ("manifest", "state", "outcome", "receipt")
    files: Any = {
        f"{name}.json": io.BytesIO(part) for name, part in zip(names, parted(data, 4, b"\0\n"), strict=True)
    }
    with only(size=len(data)), contextlib.redirect_stderr(io.StringIO()) as told:
        records = ctl._records(files)
        page = pages.job_page(JobRow("job-1", State.DONE), records, PAINT)
        assert not raw(page + told.getvalue(), "\n")
        assert not raw(ctl._json({"job": None, **records}), "\n")


def _history(data: bytes) -> None:
    file = io.BytesIO(data)
    with only(msgspec.DecodeError, ValueError, RecursionError, size=len(data)):
        totals, rows = history_page.read_totals(file), [*history_page.read_rows(file)]
        page = history_page.history_page(totals, 86_400.0, PAINT)
        lines = [*history_page.csv_lines(rows), *history_page.json_lines(1.0, totals, rows)]
        assert not raw("".join((page, *lines)), "\n")


class _Stranger:
    """Listens where the miner would, and answers everyone with the same bytes."""

    def __init__(self, path: Path) -> None:
        self.answer = b""
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(os.fspath(path))
        self._listener.listen()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            client, _ = self._listener.accept()
            with client, contextlib.suppress(OSError):
                client.recv(4096)
                if not self.answer:
                    return
                client.sendall(self.answer)

    def close(self, path: Path) -> None:
        self.answer = b""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as last, contextlib.suppress(OSError):
            last.connect(os.fspath(path))
            last.sendall(b"x")
        self._thread.join(10)
        self._listener.close()


@contextlib.contextmanager
def _client() -> Iterator[Check]:
    with directory() as where:
        path = where / "control.sock"
        stranger = _Stranger(path)

        def check(data: bytes) -> None:
            stranger.answer = data or b"\0"
            for verb in ("status", "slots", "jobs", "drain"):
                with only(size=len(data)):
                    try:
                        answer, fds = ask.ask_miner(ask.Target(path), Request(verb))
                        assert not fds
                        page = ctl._page(verb, answer)
                        told = ctl._json(ctl._value(verb, answer))
                    except CommandError as error:
                        # As `main` prints it; how much the miner says is not the client's affair.
                        page, told = visible(str(error), keep="\n"), ""
                    assert not raw(page + told, "\n")

        try:
            yield check
        finally:
            stranger.close(path)


ANSWERS = mutated(encoded(Answer), JSON).map(framed) | mutated(encoded(Answer).map(framed), JSON)


# --- an upload ---------------------------------------------------------------------------------------------


class _Sent(HttpClient):
    """Keeps the body of an upload."""

    def __init__(self) -> None:
        super().__init__("http://127.0.0.1:1", 1.0)
        self.body, self.kind = b"", ""

    def call(self, method: str, path: str, payload: Any = None, **_: Any) -> HttpReply:
        assert isinstance(payload, MultipartEncoder)
        self.body, self.kind = payload.read(), payload.content_type
        return HttpReply(200)


@contextlib.contextmanager
def _upload() -> Iterator[Check]:
    with directory() as root:
        (root / "artifacts").mkdir()
        (root / "artifacts" / "0000").write_bytes(b"content")
        http = _Sent()
        coordinator = BootstrapCoordinator(
            http, node_id="n", credential="c", source="env:X", max_manifest_kb=4
        )

        def check(data: bytes) -> None:
            name, media, message = (part.decode("utf-8", "surrogateescape") for part in parted(data, 3))
            try:
                check_path(name)
            except JobError:
                name = "a.txt"
            outcome = Outcome(
                "job-1", message=message, artifacts=[Artifact(name, "artifacts/0000", 7, "0" * 64, media)]
            )
            with only(size=10_000 + len(data)):
                coordinator.result("job-1", outcome, root, f"key:{message}")
            parts = _parts(http)
            assert [str(part["Content-Disposition"]).split(";")[1] for part in parts] == [
                f' name="{field}"' for field in ("job_id", "node_id", "metadata", "artifact", "artifact")
            ]
            for part in parts:
                assert set(part.keys()) <= {"Content-Disposition", "Content-Type"}, part.keys()
                assert not raw("".join(map(str, part.values())))
            metadata = json.loads(parts[2].get_payload(decode=True))
            assert len(metadata["artifacts"]) == 2

        yield check


def _parts(http: _Sent) -> list[Any]:
    whole = b"Content-Type: " + http.kind.encode() + b"\r\n\r\n" + http.body
    parsed = email.parser.BytesParser(policy=email.policy.compat32).parsebytes(whole)
    parts = parsed.get_payload()
    assert isinstance(parts, list)
    assert not parsed.defects
    return parts


OUTCOMES = encoded(Outcome, job_id=st.just("job-1")).map(
    lambda raw_outcome: msgspec.json.encode(
        replace(msgspec.json.decode(raw_outcome, type=Outcome), job_id="job-1")
    )
)
RECEIPTS = encoded(Receipt)
LINES = words(
    "[31mred\x1b[0m",
    "a\rb",
    "progress\b\b",
    "\x9b31m",
    "\x1b]0;title\x07",
    "é\u202etxt",
    "ok\n",
    SECRET,
    SECRET[:4],
)

TARGETS = (
    Target(
        "log", joined(mutated(LINES, (SECRET.encode(),)), mutated(LINES, (SECRET.encode(),))), simply(_log)
    ),
    Target("terminal", mutated(st.lists(LINES, max_size=4).map(b"\n".join)), simply(_terminal)),
    Target(
        "job-page",
        joined(
            mutated(MANIFESTS, JSON),
            st.just(b"null"),
            mutated(OUTCOMES, JSON),
            mutated(RECEIPTS, JSON),
            by=b"\0\n",
        ),
        simply(_job_page),
    ),
    Target(
        "history",
        joined(mutated(encoded(Totals), JSON), mutated(encoded(LedgerRow), JSON)),
        simply(_history),
    ),
    Target("client", ANSWERS, _client),
    Target(
        "upload",
        joined(mutated(NAMES), mutated(words("text/plain", "a/b; c=d", "x")), mutated(words("it failed"))),
        _upload,
    ),
)
