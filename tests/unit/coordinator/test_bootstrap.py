import contextlib
import email.parser
import email.policy
import hashlib
import json
import os
import threading
import tracemalloc
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import responses

from aitbc_miner.coordinator.bootstrap import BootstrapCoordinator
from aitbc_miner.coordinator.http import HttpClient
from aitbc_miner.coordinator.interface import (
    ArtifactChanged,
    Busy,
    Coordinator,
    CoordinatorError,
    Gone,
    Heartbeat,
    PulledJob,
    PullFilters,
    Refused,
    Unauthorized,
    UnknownNode,
    Unreachable,
)
from aitbc_miner.errors import ErrorCode, MinerError
from aitbc_miner.jobs import Artifact, ExitStatus, LogInfo, Outcome
from aitbc_miner.util.clock import now

BASE = "http://coordinator.test/api/v1"
JOB = {"job_id": "j-1", "runner": "cli", "command": "true"}


@contextlib.contextmanager
def coordinator(base: str = BASE, credential: str = "boot-t0ken", kb: int = 16) -> Iterator[Coordinator]:
    with contextlib.closing(HttpClient(base, 5)) as http:
        client = BootstrapCoordinator(
            http, node_id="node-1", credential=credential, source="env:MINER_AUTH", max_manifest_kb=kb
        )
        client.use_token("node-t0ken")
        yield client


@pytest.fixture
def client() -> Iterator[Coordinator]:
    with responses.mock, coordinator() as made:
        yield made


def sent(number: int = 0) -> Any:
    return json.loads(responses.calls[number].request.body or b"")


def headers(number: int = 0) -> Any:
    return responses.calls[number].request.headers


def descriptors() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def heartbeat() -> Heartbeat:
    return Heartbeat("node-1", 0.5, 900, 1, [{"name": "cpu0", "state": "idle"}])


# Registration and heartbeats


def test_register_uses_the_bootstrap_token_and_then_the_node_token(client: Coordinator) -> None:
    responses.post(f"{BASE}/nodes/register", json={"node_token": "fresh"})
    responses.post(f"{BASE}/nodes/heartbeat", json={})
    assert client.register({"node_id": "node-1"}) == "fresh"
    client.heartbeat(heartbeat())
    assert sent() == {"node_id": "node-1"}
    assert headers()["Authorization"] == "Bearer boot-t0ken"
    assert headers(1)["Authorization"] == "Bearer fresh"
    assert sent(1) == {
        "node_id": "node-1",
        "load": 0.5,
        "free_mb": 900,
        "gpu_free": 1,
        "slots": [{"name": "cpu0", "state": "idle"}],
    }


@pytest.mark.parametrize("status", [401, 403])
def test_a_refused_registration_names_the_source_of_the_credential(client: Coordinator, status: int) -> None:
    responses.post(f"{BASE}/nodes/register", status=status, json={"error": {"message": "who?"}})
    with pytest.raises(Unauthorized) as caught:
        client.register({})
    assert str(caught.value) == (
        "cannot register this node: the coordinator does not accept the credential from env:MINER_AUTH,"
        f" coordinator.auth_token ({status}: who?)"
    )


@pytest.mark.parametrize("credential", ["", "boot t0ken", "boot\nt0ken"])
def test_a_credential_that_no_header_can_hold(credential: str) -> None:
    with coordinator(credential=credential) as client, pytest.raises(Unauthorized) as caught:
        client.register({})
    assert str(caught.value) == (
        "cannot register this node: the credential from env:MINER_AUTH: cannot use the token: it is empty or"
        " too long, or has spaces, line breaks or non-ASCII text; see coordinator.auth_token"
    )
    assert caught.value.__suppress_context__


@pytest.mark.parametrize("body", ["", "null", "[]", "{}", '{"node_token": 5}', '{"node_token": "a\\nb"}'])
def test_a_registration_without_a_usable_token(client: Coordinator, body: str) -> None:
    responses.post(f"{BASE}/nodes/register", body=body)
    with pytest.raises(Unreachable, match=r"^cannot register this node: garbage reply: "):
        client.register({})


def test_a_heartbeat_of_an_unknown_node_or_with_an_old_token(client: Coordinator) -> None:
    responses.post(f"{BASE}/nodes/heartbeat", status=404)
    with pytest.raises(UnknownNode) as caught:
        client.heartbeat(heartbeat())
    assert str(caught.value) == "cannot send a heartbeat: the coordinator does not know this node (404)"
    responses.replace("POST", f"{BASE}/nodes/heartbeat", status=401)
    with pytest.raises(Unauthorized, match=r"the coordinator does not accept the node token \(401\)$"):
        client.heartbeat(heartbeat())


# Pulling


def pull(body: str | bytes, status: int = 200, kb: int = 16) -> PulledJob | None:
    with responses.mock as mock, coordinator(kb=kb) as client:
        mock.post(f"{BASE}/jobs/pull", body=body, status=status)
        return client.pull(PullFilters())


def test_the_filters_of_a_pull(client: Coordinator) -> None:
    responses.post(f"{BASE}/jobs/pull", json={"job": None})
    slot = {"name": "c", "kind": "cpu", "cpu_threads": 2, "memory_mb": 512, "vram_mb": 0, "runners": ["cli"]}
    gpu = {
        **slot,
        "name": "g",
        "kind": "gpu",
        "memory_mb": 256,
        "vram_mb": 8000,
        "runners": ["python", "cli"],
    }
    slots = [slot, {**slot, "name": "d"}, gpu]
    assert client.pull(PullFilters(slots, ["j-0"])) is None
    assert sent() == {
        "node_id": "node-1",
        "filters": {
            "slots": slots,
            "known": ["j-0"],
            "free": {"cpu": 2, "gpu": 1},
            "vram_mb": 8000,
            "memory_mb": 512,
            "runners": ["cli", "python"],
        },
    }


def test_a_job_comes_as_it_was_sent() -> None:
    text = '{"job_id" : "j-1",  "runner":"cli","command":"true", "extra": [1.50, "\\u00e9"]}'
    pulled = pull('{"job": ' + text + ', "more": 1}')
    assert pulled is not None
    assert pulled.raw == text.encode()
    assert pulled.manifest is not None
    assert (pulled.manifest.job_id, pulled.manifest.command) == ("j-1", "true")
    assert pulled.error is None


def test_no_job() -> None:
    assert pull('{"job": null}') is None
    assert pull("", 204) is None


def refused(body: str | bytes, kb: int = 16) -> tuple[str | None, str]:
    pulled = pull(body, kb=kb)
    assert pulled is not None
    assert pulled.manifest is None
    assert pulled.error is not None
    return pulled.error.job_id, str(pulled.error)


HEAD = b'{"job": {"params": {"job_id": "wrong"}, "note": "{\\"job_id\\": [", "job_id": "j-7", "x": '


@pytest.mark.parametrize(
    ("rest", "why"),
    [
        (b'"' + b"y" * 30_000 + b'"}}', "it is larger than 16 KiB"),
        (b'"' + b"y" * 17_000 + b'"}}', "it is larger than 16 KiB"),
        (b"[" * 10_000, "it is nested too deeply"),
        (b"[" * 7_000 + b"]" * 7_000 + b"}}", "it is nested too deeply"),
        (b'{"a":' * 2_000 + b"1" + b"}" * 2_000 + b"}}", "it is nested too deeply"),
        # What a decoder says of these is its own affair.
        *((rest, "") for rest in (b"NaN}}", b"Infinity}}", b'"cut off', b'"\xff"}}', b"1e999}}")),
    ],
)
def test_an_unreadable_job_is_refused_under_its_own_name(rest: bytes, why: str) -> None:
    name, said = refused(HEAD + rest)
    before, _, told = said.partition("cannot read the manifest: ")
    assert (name, before) == ("j-7", "")
    assert told == why if why else told


def test_a_large_job_within_the_bound_is_taken() -> None:
    pulled = pull(json.dumps({"job": {**JOB, "pad": "y" * 16_000}}))
    assert pulled is not None
    assert pulled.manifest is not None


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"<html>",
        b"[]",
        b"{}",
        b"5",
        b'{"job": 5}',
        b'{"job": []}',
        b'{"job": {}}',
        b'{"job": {"job_id": 5}}',
        b'{"job": [{"job_id": "a"}], "x": NaN}',
        b'{"job": {"a": {"job_id": "a"}}, "job_id": "b", "x": NaN}',
        b'{"job_id": "a", "x": NaN}',
        b'[{"job": {"job_id": "a"}}, NaN]',
        b'{"jobs": {"job_id": "a"}, "x": NaN}',
        b'{"job": {"x": "job_id", "y": NaN}}',
        b'{"job": {"x": "unfinished \\" , \\"job_id\\": \\"a\\" ',
        b'{"job": {"job_id": "unfinished',
        b'{"job": {"job_id": "\xff"}}',
        b'{"job": {"job_id": ""}, "x": NaN}',
        b"[" * 60_000,
        b"\x00" * 100,
    ],
)
def test_garbage_without_a_name_is_nobodys_job(body: bytes) -> None:
    with pytest.raises(Unreachable, match=r"^cannot pull a job: garbage reply: "):
        pull(body)


@pytest.mark.parametrize("job_id", ["../../etc", ".", "..", "a b", "x" * 200, "", "a\x00b", "ü"])
def test_a_hostile_id_is_an_error_with_that_id(job_id: str) -> None:
    found, why = refused(json.dumps({"job": {**JOB, "job_id": job_id}}))
    assert found == job_id
    assert why.startswith("cannot accept the job: job_id ")


def test_a_manifest_of_the_wrong_shape_is_kept_for_the_record() -> None:
    pulled = pull('{"job": {"job_id": "j-1", "runner": 5}}')
    assert pulled is not None
    assert pulled.error is not None
    assert pulled.raw == b'{"job_id": "j-1", "runner": 5}'
    assert str(pulled.error).startswith("cannot read the manifest: ")
    assert "$.runner" in str(pulled.error)


def test_the_search_for_a_name_ends_whatever_the_reply() -> None:
    begun = now()
    for filler in (b"[" * 600_000, b'"' * 600_001, b"\\" * 600_000, b'{"a":' * 120_000, b'"\\"' * 200_000):
        with pytest.raises(Unreachable, match="garbage reply"):
            pull(b'{"job": {"a": ' + filler, kb=1024)
    assert now() - begun < 20  # a search that goes back and forth would take hours


# Ack and progress


def test_ack_has_its_ids_in_body_and_query_and_a_stable_key(client: Coordinator) -> None:
    responses.post(f"{BASE}/jobs/ack", json={"status": "ok"})
    for _ in range(2):
        client.ack("j-1")
    assert responses.calls[0].request.url == f"{BASE}/jobs/ack?job_id=j-1&node_id=node-1"
    assert sent() == {"job_id": "j-1", "node_id": "node-1"}
    assert headers()["Idempotency-Key"] == headers(1)["Idempotency-Key"] == "ack:node-1:j-1"
    assert headers()["Authorization"] == "Bearer node-t0ken"


@pytest.mark.parametrize("status", [400, 404, 409, 410, 413, 422])
def test_a_job_that_is_gone_or_refused(client: Coordinator, status: int, tmp_path: Path) -> None:
    for path in ("ack", "result", "fail"):
        responses.post(f"{BASE}/jobs/{path}", status=status, json={"error": {"message": "unknown job"}})
    for name, call in calls(client, tmp_path).items():
        if name in {"ack", "result", "fail"}:
            with pytest.raises(Gone if status in {409, 410} else Refused, match=f"{status}: unknown"):
                call()


@pytest.mark.parametrize("name", ["ack", "progress", "result", "fail"])
@pytest.mark.parametrize("body", [b"<html>404</html>", b"", b"{}", b"[]", b'"error"', b"\xff", b"[" * 60_000])
def test_a_404_that_is_not_the_coordinators_own_takes_no_job_away(
    client: Coordinator, name: str, body: bytes, tmp_path: Path
) -> None:
    responses.post(f"{BASE}/jobs/{name}", status=404, body=body)
    with pytest.raises(
        CoordinatorError, match="not the coordinator but another server, such as a proxy, answered 404"
    ) as caught:
        calls(client, tmp_path)[name]()
    assert type(caught.value) is CoordinatorError


@pytest.mark.parametrize(
    ("body", "cancel"),
    [("", False), ("{}", False), ('{"cancel": true}', True), ('{"cancel": 1}', False), ('{"x": []}', False)],
)
def test_progress(client: Coordinator, body: str, *, cancel: bool) -> None:
    responses.post(f"{BASE}/jobs/progress", body=body)
    assert client.progress("j-1", 12.5, "half") is cancel
    assert sent() == {"job_id": "j-1", "pct": 12.5, "note": "half"}
    assert "Idempotency-Key" not in headers()


def calls(client: Coordinator, root: Path) -> dict[str, Any]:
    return {
        "register": lambda: client.register({}),
        "heartbeat": lambda: client.heartbeat(heartbeat()),
        "pull": lambda: client.pull(PullFilters()),
        "ack": lambda: client.ack("j-1"),
        "progress": lambda: client.progress("j-1", 1, ""),
        "result": lambda: client.result("j-1", Outcome("j-1"), root, "k"),
        "fail": lambda: client.fail("j-1", Outcome("j-1"), "k"),
    }


DOING = {
    "register": "register this node",
    "heartbeat": "send a heartbeat",
    "pull": "pull a job",
    "ack": "accept job j-1",
    "progress": "report the progress of job j-1",
    "result": "deliver the result of job j-1",
    "fail": "report the failure of job j-1",
}


@pytest.mark.parametrize("name", DOING)
def test_every_call_says_what_it_could_not_do(client: Coordinator, name: str, tmp_path: Path) -> None:
    path = f"{BASE}/{'nodes' if name in {'register', 'heartbeat'} else 'jobs'}/{name}"
    call = calls(client, tmp_path)[name]
    for status, kind in [
        (500, CoordinatorError),
        (403, Unauthorized if name == "register" else CoordinatorError),
        (429, Busy),
        (401, Unauthorized),
        (302, Unreachable),
    ]:
        responses.upsert("POST", path, status=status, headers={"Retry-After": "7"})
        with pytest.raises(kind, match=f"^cannot {DOING[name]}: the coordinator ") as caught:
            call()
        assert type(caught.value) is kind
    for garbage in (b"<html>Please log in", b"[" * 50_000, b"x" * 100_000, b"\xff"):
        # Garbage with 200 is no yes: it may be a login page on the way, and the result would be lost.
        responses.upsert("POST", path, body=garbage)
        with pytest.raises(Unreachable, match=f"^cannot {DOING[name]}: garbage reply: "):
            call()


# Results, over a real connection


class Sink:
    """A server that keeps what is uploaded, or only its size."""

    def __init__(self) -> None:
        self.headers: Any = None
        self.body = b""
        self.received = 0
        self.keep = True
        sink = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                sink.headers, sink.body, sink.received = self.headers, b"", 0
                left = int(self.headers["Content-Length"])
                while left and (piece := self.rfile.read(min(left, 1 << 20))):
                    left -= len(piece)
                    sink.received += len(piece)
                    sink.body += piece if sink.keep else b""
                self.send_response(200)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None:
                return

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.base = f"http://127.0.0.1:{self.server.server_address[1]}"

    def parts(self) -> list[tuple[str, str | None, str, bytes]]:
        """Name, filename, content type and content of each part, read by another parser than ours."""
        kind = self.headers["Content-Type"]
        boundary = kind.partition("boundary=")[2].encode()
        found = []
        for part in self.body.split(b"--" + boundary)[1:-1]:
            head, _, content = part[2:].partition(b"\r\n\r\n")
            parsed = email.parser.BytesParser(policy=email.policy.HTTP).parsebytes(head)
            disposition = parsed["Content-Disposition"].params
            assert set(parsed) <= {"Content-Disposition", "Content-Type"}
            found.append(
                (disposition["name"], disposition.get("filename"), parsed["Content-Type"] or "", content[:-2])
            )
        return found


@pytest.fixture
def sink() -> Iterator[Sink]:
    made = Sink()
    thread = threading.Thread(target=made.server.serve_forever, args=(0.01,))
    thread.start()
    yield made
    made.server.shutdown()
    made.server.server_close()
    thread.join()


def write(root: Path, name: str, content: bytes) -> Artifact:
    path = root / "artifacts" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return Artifact(name, f"artifacts/{name}", len(content), "0" * 64, "text/plain")


def test_a_result(sink: Sink, tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs/exec.log").write_bytes(b"said\n")
    artifacts = [write(tmp_path, "a.txt", b"A" * 10), write(tmp_path, "sub/empty", b"")]
    outcome = Outcome(
        "j-1",
        slot="cpu0",
        exit=ExitStatus(0),
        timings={"run": 1.5},
        artifacts=artifacts,
        result={"answer": [1, "é"]},
        log=LogInfo(5, 2, "said"),
        enforced={"memory": "cgroup"},
        versions={"miner": "0.1"},
    )
    with coordinator(sink.base) as client:
        client.result("j-1", outcome, tmp_path, "key-1")
    assert sink.headers["Idempotency-Key"] == "key-1"
    assert sink.headers["Authorization"] == "Bearer node-t0ken"
    assert int(sink.headers["Content-Length"]) == sink.received
    job, node, metadata, *files = sink.parts()
    assert (job[0], job[3], node[0], node[3], metadata[0]) == (
        "job_id",
        b"j-1",
        "node_id",
        b"node-1",
        "metadata",
    )
    assert files == [
        ("artifact", "logs/exec.log", "text/plain", b"said\n"),
        ("artifact", "a.txt", "text/plain", b"A" * 10),
        ("artifact", "sub/empty", "text/plain", b""),
    ]
    said = json.loads(metadata[3])
    assert set(said) == {
        *("exit", "usage", "slot", "timings", "versions", "artifacts", "result", "log", "enforced"),
    }
    log, first, _ = said["artifacts"]
    digest = hashlib.sha256(b"said\n").hexdigest()
    assert log == {"path": "logs/exec.log", "type": "text/plain", "bytes": 5, "sha256": digest}
    assert first == {"path": "a.txt", "type": "text/plain", "bytes": 10, "sha256": "0" * 64}
    assert said["log"] == {"bytes": 5, "dropped": 2}
    assert said["result"] == {"answer": [1, "é"]}
    assert said["exit"]["status"] == 0


def test_a_job_without_a_log_sends_an_empty_one(sink: Sink, tmp_path: Path) -> None:
    with coordinator(sink.base) as client:
        client.result("j-1", Outcome("j-1"), tmp_path, "k")
    assert sink.parts()[3:] == [("artifact", "logs/exec.log", "text/plain", b"")]
    assert json.loads(sink.parts()[2][3])["artifacts"][0]["sha256"] == hashlib.sha256().hexdigest()


def test_a_log_that_was_collected_goes_once(sink: Sink, tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs/exec.log").write_bytes(b"said\n")
    collected = Artifact("logs/exec.log", "logs/exec.log", 5, "1" * 64, "text/plain")
    with coordinator(sink.base) as client:
        client.result("j-1", Outcome("j-1", artifacts=[collected]), tmp_path, "k")
    assert sink.parts()[3:] == [("artifact", "logs/exec.log", "text/plain", b"said\n")]
    assert [one["sha256"] for one in json.loads(sink.parts()[2][3])["artifacts"]] == ["1" * 64]


def test_a_log_that_is_a_link_is_not_sent(sink: Sink, tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "secret").write_bytes(b"secret")
    (tmp_path / "logs/exec.log").symlink_to(tmp_path / "secret")
    with coordinator(sink.base) as client:
        client.result("j-1", Outcome("j-1"), tmp_path, "k")
    assert sink.parts()[3:] == [("artifact", "logs/exec.log", "text/plain", b"")]


HOSTILE = [
    'q"uote',
    "new\r\nX-Evil: 1\r\n\r\nline",
    "semi;colon=1",
    "back\\slash",
    "ü☃",
    "tab\t",
    "byte\udcff",
    '";x="',
]


def test_hostile_names_and_types_break_no_header(sink: Sink, tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"data")
    artifacts = [Artifact(name, "f", 4, "0" * 64, f"text/plain\r\nX-Evil: {name}") for name in HOSTILE]
    with coordinator(sink.base) as client:
        client.result("j-1", Outcome("j-1", artifacts=artifacts), tmp_path, "k\r\nX-Evil: 1\udcff")
    assert sink.headers["X-Evil"] is None
    assert sink.headers["Idempotency-Key"] == "k%0D%0AX-Evil:%201%5Cudcff"
    files = sink.parts()[4:]
    assert [(name, kind, content) for name, _, kind, content in files] == [
        ("artifact", "application/octet-stream", b"data")
    ] * len(HOSTILE)
    raw = [line for line in sink.body.split(b"\r\n") if line.startswith(b"Content-Disposition")]
    assert b'filename="q%22uote"' in raw[4]
    assert b'filename="new%0D%0AX-Evil: 1%0D%0A%0D%0Aline"' in raw[5]
    assert 'filename="ü☃"'.encode() in raw[8]
    assert b'filename="byte\\\\udcff"' in raw[10] or b'filename="byte\\udcff"' in raw[10]


def test_a_large_upload_takes_little_memory_and_few_descriptors(sink: Sink, tmp_path: Path) -> None:
    sink.keep = False
    big = tmp_path / "big"
    with big.open("wb") as file:
        file.truncate(200 << 20)
    small = write(tmp_path, "s", b"x")
    artifacts = [Artifact("big", "big", 200 << 20, "0" * 64), *[small] * 2000]
    before = descriptors()
    with coordinator(sink.base) as client:
        tracemalloc.start()
        client.result("j-1", Outcome("j-1", artifacts=artifacts), tmp_path, "k")
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert sink.received > 200 << 20
    assert peak < 32 << 20
    assert descriptors() <= before + 2


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("longer", "it has 11 bytes instead of 10, or is no plain file"),
        ("shorter", "it has 9 bytes instead of 10, or is no plain file"),
        ("missing", "No such file or directory"),
        ("link", "Too many levels of symbolic links"),
        ("linked directory", "Not a directory"),
        ("fifo", "it has 0 bytes instead of 10, or is no plain file"),
        ("directory", None),
    ],
)
def test_a_file_that_is_not_the_collected_one_is_not_sent(
    sink: Sink, tmp_path: Path, kind: str, why: str | None
) -> None:
    artifact = write(tmp_path, "d/f", b"0123456789")
    path = tmp_path / artifact.file
    secret = tmp_path / "elsewhere"
    secret.mkdir()
    (secret / "f").write_bytes(b"0123456789")
    before = descriptors()
    if kind in {"longer", "shorter"}:
        path.write_bytes(b"x" * {"longer": 11, "shorter": 9}[kind])
    else:
        path.unlink()
    if kind == "link":
        path.symlink_to(secret / "f")
    elif kind == "linked directory":
        path.parent.rmdir()
        path.parent.symlink_to(secret)
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    with coordinator(sink.base) as client, pytest.raises(ArtifactChanged) as caught:
        client.result("j-1", Outcome("j-1", artifacts=[artifact]), tmp_path, "k")
    assert str(caught.value).startswith("cannot send artifacts/d/f: ")
    assert why is None or str(caught.value) == f"cannot send artifacts/d/f: {why}"
    assert not isinstance(caught.value, CoordinatorError)
    assert descriptors() <= before + 2


@pytest.mark.parametrize("file", ["/etc/passwd", "../x", "a/../../x", ""])
def test_a_file_outside_the_job_is_not_opened(sink: Sink, tmp_path: Path, file: str) -> None:
    outcome = Outcome("j-1", artifacts=[Artifact("x", file, 5, "0" * 64)])
    with (
        coordinator(sink.base) as client,
        pytest.raises(ArtifactChanged, match=r"is not below the job's directory$"),
    ):
        client.result("j-1", outcome, tmp_path, "k")


# Failures


def test_a_failure(client: Coordinator) -> None:
    responses.post(f"{BASE}/jobs/fail", json={})
    outcome = Outcome(
        "j-1",
        code=ErrorCode.E_EXIT,
        message="it\nended " + "x" * 3000,
        slot="cpu0",
        log=LogInfo(9, 0, "y" * 5000),
    )
    client.fail("j-1", outcome, "key")
    body = sent()
    metrics = body.pop("metrics")
    assert len(body.pop("error_msg")) == 2000
    assert body == {"job_id": "j-1", "node_id": "node-1", "error_code": "E_EXIT", "logs_ref": "logs/exec.log"}
    assert metrics["log_tail"] == "y" * 4096
    assert set(metrics) == {"exit", "usage", "slot", "timings", "versions", "log", "enforced", "log_tail"}
    assert headers()["Idempotency-Key"] == "key"


def test_the_failure_of_a_hostile_id(client: Coordinator) -> None:
    responses.post(f"{BASE}/jobs/fail", json={})
    client.fail("../\r\n\x00", Outcome("x", code=ErrorCode.E_MANIFEST, message="bad"), "fail:../\r\n")
    assert sent()["job_id"] == "../\r\n\x00"
    assert headers()["Idempotency-Key"] == "fail:../%0D%0A"


def test_a_token_from_elsewhere_is_checked(client: Coordinator) -> None:
    with pytest.raises(MinerError, match=r"^cannot use the token: "):
        client.use_token("a\nb")
