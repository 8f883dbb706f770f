"""What others say: a coordinator, agent and worker over their pipes, `aitbc-minerctl`, tasks, the fleet."""

import base64
import contextlib
import json
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, cast

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from aitbc_miner.agent import fleet
from aitbc_miner.control.protocol import MAX_REQUEST, Answer, Request
from aitbc_miner.coordinator.bootstrap import BootstrapCoordinator
from aitbc_miner.coordinator.http import MAX_REPLY, HttpClient, HttpReply, retry_after
from aitbc_miner.coordinator.interface import CoordinatorError, Heartbeat, PulledJob, PullFilters
from aitbc_miner.errors import JobError, MinerError
from aitbc_miner.identity.receipts import MAX_AMOUNT, Receipt, canonical, examine
from aitbc_miner.inputs.urls import check_names, name_of, parse, shown_url
from aitbc_miner.ipc import messages
from aitbc_miner.ipc.channel import MAX_FRAME, Channel, ChannelError
from aitbc_miner.jobs import (
    ExitStatus,
    InputUrl,
    Manifest,
    ManifestError,
    Outcome,
    decode_manifest,
    valid_job_id,
)
from aitbc_miner.queue import redis
from aitbc_miner.queue.interface import Kind, Task
from aitbc_miner.runners.python import PythonRunner
from aitbc_miner.store.records import pretty
from aitbc_miner.task import LINE_MAX, Progress, Report, ReportReader
from aitbc_miner.util.forgiving import too_deep
from tests.fuzz.engine import Check, Target, fit_to_print, only, simply
from tests.fuzz.mutations import HOSTILE, JSON, joined, mutated, parted, words
from tests.fuzz.shapes import JSON_VALUES, TEXT, encoded

JOB_IDS = st.sampled_from(["a", "job-1", "x" * 128, "A.b_c-9", "..", ".broken", "", "a/b", "x" * 129, "a\n"])
RUNNERS = st.sampled_from(["cli", "cli", "python", "python", "wasm", "\x1b[2J"])
MANIFESTS = encoded(Manifest, job_id=st.just("job-1") | JOB_IDS, runner=RUNNERS, command=TEXT, task=TEXT)
NOT_JSON = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


# --- the coordinator ---------------------------------------------------------------------------------------


def _manifest(data: bytes) -> None:
    try:
        value = msgspec.json.decode(data)
    except NOT_JSON:
        return  # no business of the manifest's; `reply` has that
    with only(ManifestError, size=len(data)):
        manifest = decode_manifest(value)
        assert valid_job_id(manifest.job_id)
        assert decode_manifest(msgspec.to_builtins(manifest)) == manifest
        # The worker reads what the agent has recorded.
        assert msgspec.json.decode(data, type=Manifest) == manifest


class _Answering(HttpClient):
    """Gives the one reply it is told to."""

    def __init__(self) -> None:
        super().__init__("http://127.0.0.1:1", 1.0)
        self.reply = HttpReply(200)

    def call(self, *_: Any, **__: Any) -> HttpReply:
        return self.reply


CALLS: dict[str, Callable[[BootstrapCoordinator], object]] = {
    "register": lambda it: it.register({}),
    "heartbeat": lambda it: it.heartbeat(Heartbeat("n", 0.0, 0, 0)),
    "pull": lambda it: it.pull(PullFilters()),
    "ack": lambda it: it.ack("job-1", "other"),
    "progress": lambda it: it.progress("job-1", 1.0, ""),
    "fail": lambda it: it.fail("job-1", Outcome("job-1"), "key"),
}
STATUSES = (200, 200, 200, 204, 301, 302, 400, 401, 403, 404, 409, 410, 418, 429, 500, 503, 100, 999, 0)
BODIES = st.one_of(
    MANIFESTS.map(lambda manifest: b'{"job":' + manifest + b"}"),
    st.fixed_dictionaries({"node_token": TEXT | st.just("t" * 40)}).map(msgspec.json.encode),
    st.fixed_dictionaries({"error": st.fixed_dictionaries({"code": TEXT, "message": TEXT})}).map(
        msgspec.json.encode
    ),
    st.fixed_dictionaries({"detail": TEXT, "cancel": st.booleans()}).map(msgspec.json.encode),
    st.just(b"<html>\x1b[31m"),
)


@contextlib.contextmanager
def _replies() -> Iterator[Check]:
    http = _Answering()
    coordinator = BootstrapCoordinator(http, node_id="n", credential="c", source="env:X", max_manifest_kb=4)

    def check(data: bytes) -> None:
        call, status, whole, location, body = parted(data, 5)
        code = int(status) if status.isascii() and status.isdigit() and len(status) < 4 else 200
        http.reply = HttpReply(code, body[:MAX_REPLY], whole != b"cut", 1.0, location.decode("latin-1"))
        with only(CoordinatorError, size=len(data)):
            got = CALLS.get(call.decode("latin-1"), CALLS["pull"])(coordinator)
            if isinstance(got, PulledJob):
                _see_pulled(got)

    yield check


def _see_pulled(job: PulledJob) -> None:
    if job.error is not None:
        assert job.error.job_id
        assert len(job.error.job_id) <= 256
        fit_to_print(str(job.error))
        return
    assert job.manifest is not None
    assert not too_deep(msgspec.json.decode(job.raw))


def _signed() -> dict[str, Any]:
    """Make a receipt that verifies."""
    key = Ed25519PrivateKey.from_private_bytes(bytes(32))
    receipt = {
        "job_id": "job-1",
        "provider": "node-1",
        "units": 1.5,
        "price": 1,
        "metadata": {"n": [None, 1e22]},
    }
    public = key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
    parts = {"key_id": public, "sig": key.sign(canonical(receipt))}
    spelled = {name: base64.urlsafe_b64encode(part).decode().rstrip("=") for name, part in parts.items()}
    return {**receipt, "signature": {"alg": "Ed25519", **spelled}, "zk_status": "none", "tee_quote": None}


SIGNED = _signed()


def _receipt(data: bytes) -> None:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return
    with only(size=len(data)):
        found = examine(value, "job-1", "node-1")
        assert not found.verified or canonical(value) == canonical(SIGNED)
        assert all(0 <= (amount or 0) <= MAX_AMOUNT for amount in (found.units, found.price))
        fit_to_print(found.why or "none")
        msgspec.json.decode(pretty(found), type=Receipt)


def _headers(data: bytes) -> None:
    said, date = (part.decode("latin-1") for part in parted(data, 2))
    with only(size=len(data)):
        wait = retry_after({"Retry-After": said, "Date": date})
        assert wait is None or 0 <= wait <= 3600, wait


DATES = words(
    *(
        "120",
        "0",
        "-1",
        "Wed, 21 Oct 2015 07:28:00 GMT",
        "Wed, 21 Oct 2099 07:28:00 +2400",
        "1 Jan 1 00:00:00 -0000",
    ),
    *(
        "Fri, 31 Dec 9999 23:59:60 -2359",
        "Sunday, 06-Nov-94 08:49:37 GMT",
        "Sun Nov  6 08:49:37 1994",
        "1 2 3 4:5 6",
    ),
)


def _token(data: bytes) -> None:
    http = HttpClient("http://127.0.0.1:1", 1.0)
    with only(MinerError, size=len(data)):
        http.set_token(data.decode("latin-1"))
        assert all(0x21 <= byte < 0x7F for byte in data)


# --- inputs: what a manifest says of them, before anything is fetched --------------------------------------


def _addresses(data: bytes) -> None:
    url, name = (part.decode("utf-8", "surrogateescape") for part in parted(data, 2))
    fit_to_print(f"x{shown_url(url)}")
    with only(JobError, size=len(data)):
        parse(url, "https://a.example/b/c")
        check_names([name_of(InputUrl(url, name or None)), "other"])
        named = name_of(InputUrl(url, name or None))
        assert "/" not in named
        assert named not in {"", ".", ".."}
        os.fsencode(named)
        fit_to_print(named, keep="\u2028\u2029")  # odd, but no control characters


ADDRESSES = words(
    *(
        "https://a.example/f.bin",
        "http://[::1]:80/x",
        "//h/p",
        "http://u:p@h/",
        "HTTP://H:99999/",
        "file:///etc/shadow",
    ),
    *(
        "https://h/%2e%2e",
        "https://h/a%2Fb",
        "https://h/%00",
        "https://h/-rf",
        "https://xn--e1afmkfd/\u0430",
        "http://[v1.x]/",
    ),
)


# --- over pipes and sockets --------------------------------------------------------------------------------


class Line(NamedTuple):
    """One direction of a channel: what may come along it, and how long a message may be."""

    incoming: Any
    longest: int = MAX_FRAME


LINES = {
    "agent": Line(messages.FromAgent),
    "heartbeat": Line(messages.FromHeartbeat),
    "worker": Line(messages.FromWorker),
    "to-agent": Line(messages.ToAgent),
    "to-heartbeat": Line(messages.ToHeartbeat),
    "to-worker": Line(messages.ToWorker),
    "private": Line(messages.PrivateLine),
    "request": Line(Request, MAX_REQUEST),
    "answer": Line(Answer),
}


def framed(body: bytes) -> bytes:
    """Put a message into a frame."""
    return len(body).to_bytes(4, "big") + body


def _frames(data: bytes) -> None:
    name, rest = parted(data, 2)
    line = LINES.get(name.decode("latin-1"), LINES["agent"])
    theirs, ours = socket.socketpair()
    with theirs, ours:
        channel: Channel[Any] = Channel(ours, line.incoming, max_frame=line.longest)
        theirs.setblocking(False)  # takes no keyword
        with only(ChannelError, size=len(data)):
            for start in range(0, len(rest), 1000):
                theirs.sendall(rest[start : start + 1000])
                for message in channel.receive():
                    again = msgspec.json.decode(msgspec.json.encode(message), type=line.incoming)
                    assert again == message
                assert len(channel._received) <= line.longest + 4


def stream(name: str) -> SearchStrategy[bytes]:
    """Give what might come along a line: messages in frames, of right and wrong length."""
    bodies = mutated(encoded(LINES[name].incoming), JSON)
    odd = st.sampled_from([0, 1, 3, 4095, 4096, 4097, MAX_FRAME, MAX_FRAME + 1, 2**31, 2**32 - 1])
    frames = st.one_of(
        bodies.map(framed), bodies.map(framed), odd.map(lambda n: n.to_bytes(4, "big")), bodies
    )
    whole = st.lists(frames, min_size=1, max_size=3).map(b"".join)
    return whole.map(f"{name}\n".encode().__add__)


# --- tasks and the fleet -----------------------------------------------------------------------------------


def _reports(data: bytes) -> None:
    reader = ReportReader()
    reports: list[Report] = []
    with only(size=len(data)):
        for start in range(0, len(data), 700):
            reports += reader.feed(data[start : start + 700])
            assert len(reader._line) <= LINE_MAX
        reports += reader.finish()
        assert len(reader.notes) <= 4
        for note in reader.notes:
            fit_to_print(note)
        for report in reports:
            if isinstance(report, Progress):
                assert 0 <= report.pct <= 100
                assert len(report.note) <= 1000
        assert sum(not isinstance(report, Progress) for report in reports) <= 1
        verdict = PythonRunner([Path("/nonexistent")]).verdict(
            ExitStatus(status=0), reports, data[-4096:].decode("latin-1")
        )
        fit_to_print(verdict.message or "well", most=2100)
        msgspec.json.encode(verdict.result)


REPORTS = st.lists(mutated(encoded(Report), JSON) | encoded(Report), max_size=4).map(b"\n".join)


def _handover(data: bytes) -> None:
    with only(size=len(data)):
        read = fleet._read(Task(Kind.RUN, "job-1", "n", payload=data))
        if read is not None:
            assert read[1].job_id == "job-1"
            msgspec.json.encode(read[1])


def _redis(data: bytes) -> None:
    attempts, blob = parted(data, 2)
    with only(size=len(data)):
        task = redis._task([blob or None, attempts or None])
        if task is not None:
            assert cast("Any", redis._task)([msgspec.msgpack.encode(task), b"%d" % task.attempts]) == task


HANDOVERS = MANIFESTS.flatmap(
    lambda manifest: st.sampled_from([b"true", b"false", b"1"]).map(
        lambda started: b'{"manifest":' + manifest + b',"started":' + started + b"}"
    )
)
TASKS = st.builds(
    lambda task, extra: msgspec.msgpack.encode({**task, "payload": b"{}", **extra}),
    st.fixed_dictionaries(
        {
            "kind": st.sampled_from(["run", "report", "x"]),
            "job_id": TEXT,
            "node": TEXT,
            "attempts": st.integers(-1, 2**64 - 1),
        }
    ),
    st.dictionaries(TEXT, JSON_VALUES, max_size=1),
)

TARGETS = (
    Target("manifest", mutated(MANIFESTS, JSON), simply(_manifest)),
    Target(
        "reply",
        joined(
            words(*CALLS, "pull", "pull"),
            words(*STATUSES),
            words("whole", "whole", "cut"),
            st.sampled_from([b"", b"https://x/?t=secret", b"\x1b]0;x\x07", b"A" * 3000]),
            mutated(BODIES, JSON),
        ),
        _replies,
    ),
    Target("receipt", mutated(st.just(json.dumps(SIGNED).encode()), (b"NaN", *JSON)), simply(_receipt)),
    Target("headers", joined(mutated(DATES), mutated(DATES)), simply(_headers)),
    Target("token", mutated(words("t" * 40, "x", "a b")), simply(_token)),
    Target(
        "addresses",
        joined(mutated(ADDRESSES), mutated(words("", "", "a.bin", "-x", "..", "a/b"))),
        simply(_addresses),
    ),
    Target("frames", st.one_of(*map(stream, sorted(LINES))), simply(_frames)),
    Target("reports", mutated(REPORTS, (b"\n", *JSON)), simply(_reports)),
    Target("handover", mutated(HANDOVERS, JSON), simply(_handover)),
    Target("redis", joined(mutated(words(1, 0, 100)), mutated(TASKS, HOSTILE)), simply(_redis)),
)
