"""An AITBC coordinator: its replies, the payloads of its clients, and the operator's files that answer."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
from hypothesis import strategies as st

from aitbc_miner.config.document import Fault
from aitbc_miner.config.settings import CoordinatorSection
from aitbc_miner.coordinator.aitbc import AitbcCoordinator, Profile
from aitbc_miner.coordinator.http import HttpClient, HttpReply
from aitbc_miner.coordinator.interface import Assignments, CoordinatorError, Heartbeat, PulledJob, PullFilters
from aitbc_miner.coordinator.rate_limits import Limits
from aitbc_miner.coordinator.service_result import FileChanged
from aitbc_miner.coordinator.services import ServiceBook, read_services
from aitbc_miner.errors import ErrorCode
from aitbc_miner.jobs import Manifest, ManifestError, Outcome, decode_manifest
from aitbc_miner.util.forgiving import too_deep
from tests.fuzz.engine import Check, Target, directory, fit_to_print, only
from tests.fuzz.mutations import JSON, YAML, joined, mutated, parted, words
from tests.fuzz.shapes import JSON_VALUES, TEXT

ETC = Path(__file__).parents[2] / "etc"
SERVICE = b"""\
service: script
match: {types: [script], service_types: [scripts], when: [line]}
fields:
  line: {type: text, required: true, aliases: [input], max_bytes: 100, pattern: "[a-z{} -]*"}
  n: {type: number, min: 0, max: 9}
  j: {type: json, default: {a: [1]}}
run: {command: tool, args: ["-c", "{line}", ["-n", "{n}"], "x={j}{{}}"]}
inputs: [{url: "{line}", name: in.bin}]
env: {LINE: "{line}"}
result: {all: {task: true}, log: {log: true}, file: {file: "a", as: json}}
"""
PAYLOADS = st.one_of(
    st.fixed_dictionaries({"type": st.sampled_from(["script", "x", "\x1b"]), "line": TEXT}),
    st.fixed_dictionaries({"type": st.just("script"), "line": st.just("a b"), "n": JSON_VALUES}),
    st.fixed_dictionaries({"service_type": st.just("scripts"), "service_request": JSON_VALUES}),
    st.dictionaries(TEXT, JSON_VALUES, max_size=3),
)
STATES = ("RUNNING", "RUNNING", "COMPLETED", "FAILED", "QUEUED", "\x1b[2J")
IDS = st.sampled_from(["a" * 32, "job-1", "", "..", "x" * 400, "\x1b]0;x\x07"])
JOBS = st.fixed_dictionaries(
    {
        "job_id": IDS,
        "payload": PAYLOADS,
        "state": st.sampled_from(STATES),
        "expires_at": st.sampled_from(["2001-01-01T00:00:00", "x", "9999-12-31T23:59:59.999999+23:59", "0"]),
    }
)
BODIES = st.one_of(
    JOBS,
    st.fixed_dictionaries({"jobs": st.lists(JOBS, max_size=3), "total": st.integers()}),
    st.fixed_dictionaries({"status": st.just("ok"), "receipt": JSON_VALUES}),
    st.fixed_dictionaries({"detail": TEXT | st.just("job not found")}),
).map(msgspec.json.encode)
STATUSES = (200, 200, 200, 204, 301, 401, 403, 404, 413, 422, 429, 500, 503)
RESULT, FAILED = Outcome("job-1"), Outcome("job-1", code=ErrorCode.E_EXIT, message="no")
CANCELLED = Outcome("job-1", code=ErrorCode.E_CANCELLED)
CALLS: dict[str, Callable[[AitbcCoordinator, Path], object]] = {
    "register": lambda it, _: it.register({"gpu": [], "slots": []}),
    "heartbeat": lambda it, _: it.heartbeat(Heartbeat("n", 0.0, 0, 0)),
    "poll": lambda it, _: it.pull(PullFilters()),
    "jobs": lambda it, _: it.assignments(),
    "ack": lambda it, _: it.ack("job-1"),
    "leave": lambda it, _: it.leave(),
    "result": lambda it, root: it.result("job-1", RESULT, root, "key", again=True),
    "fail": lambda it, _: it.fail("job-1", FAILED, "key", again=True),
    "cancelled": lambda it, _: it.fail("job-1", CANCELLED, "key"),
}


class _Answering(HttpClient):
    """Gives the one reply it is told to."""

    def __init__(self) -> None:
        super().__init__("http://127.0.0.1:1", 1.0, auth_scheme="api_key")
        self.reply = HttpReply(200)

    def call(self, *_: Any, **__: Any) -> HttpReply:
        return self.reply


class _Free(Limits):
    """Lets every call be made."""

    def take(self, name: str) -> None:
        """Count nothing."""


@contextlib.contextmanager
def _replies() -> Iterator[Check]:
    http = _Answering()
    with directory() as where:
        (where / "service.yaml").write_bytes(SERVICE)
        (where / "logs").mkdir()
        (where / "logs" / "exec.log").write_bytes(b"log")
        settings = CoordinatorSection("https://c/v1", "env:X", "aitbc-v1", "api_key", max_manifest_kb=4)
        profile = Profile("n", "env:X", settings)
        limits = _Free(where / "calls", dict.fromkeys(("register", "heartbeat", "poll", "result", "fail"), 9))
        there = AitbcCoordinator(http, profile, "c" * 16, ServiceBook(where), limits)

        def check(data: bytes) -> None:
            call, status, whole, body = parted(data, 4)
            code = int(status) if status.isascii() and status.isdigit() and len(status) < 4 else 200
            http.reply = HttpReply(code, body, whole != b"cut", 1.0, "", 1e9)
            with only(CoordinatorError, FileChanged, size=10 * len(data)):
                got = CALLS.get(call.decode("latin-1"), CALLS["poll"])(there, where)
                jobs = [each.job for each in got.jobs] if isinstance(got, Assignments) else [got]
                for job in jobs:
                    if isinstance(job, PulledJob):
                        _see_job(job)

        yield check


def _see_job(job: PulledJob) -> None:
    if job.error is not None:
        assert job.error.job_id is not None
        fit_to_print(str(job.error))
        return
    assert job.manifest is not None
    _see_manifest(job.manifest)
    assert not too_deep(msgspec.json.decode(job.raw)["payload"])
    assert decode_manifest(msgspec.json.decode(job.raw)) == job.manifest


def _see_manifest(manifest: Manifest) -> None:
    """See that nothing but the service says what runs, and that a field is one argument."""
    assert (manifest.command, manifest.args[0], manifest.task) == ("tool", "-c", None)
    assert len(manifest.args) in {3, 5}
    assert [one.name for one in manifest.input.urls if not isinstance(one, str)] == ["in.bin"]


@contextlib.contextmanager
def _payloads() -> Iterator[Check]:
    with directory() as where:
        (where / "service.yaml").write_bytes(SERVICE)
        book = ServiceBook(where)

        def check(data: bytes) -> None:
            try:
                payload = msgspec.json.decode(data)
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
                return
            if not isinstance(payload, dict) or too_deep(payload):
                return  # such a job is refused before
            with only(ManifestError, size=len(data)):
                made = book.manifest("job-1", payload)
                _see_manifest(decode_manifest(msgspec.json.decode(msgspec.json.encode(made))))

        yield check


@contextlib.contextmanager
def _services() -> Iterator[Check]:
    with directory() as where:

        def check(data: bytes) -> None:
            (where / "service.yaml").write_bytes(data)
            faults: list[Fault] = []
            with only(ManifestError, size=len(data)):
                services = read_services(where, faults)
                assert len(services) + bool(faults) == 1, "it is there, or it is said why not"
                for fault in faults:
                    fit_to_print(str(fault))
                for service in services:
                    kind = (*service.match.types, "")[0]
                    ServiceBook(where).manifest("job-1", {"type": kind, "line": "a", "text": "a", "url": "a"})

        yield check


FILES = st.sampled_from(
    [SERVICE, *(path.read_bytes() for path in sorted((ETC / "services.d").glob("*.yaml*")))]
)
TARGETS = (
    Target(
        "aitbc-reply",
        joined(
            words(*CALLS, "poll", "jobs"),
            words(*STATUSES),
            words("whole", "whole", "cut"),
            mutated(BODIES, (b"NaN", b"1e999", *JSON)),
        ),
        _replies,
    ),
    Target("payload", mutated(PAYLOADS.map(msgspec.json.encode), JSON), _payloads),
    Target("services", mutated(FILES, YAML), _services),
)
