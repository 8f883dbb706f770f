"""From a file that a job has left to the bytes on the line: no name and no type gets out of its place."""

import contextlib
import errno
import json
import os
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from aitbc_miner.coordinator.bootstrap import BootstrapCoordinator
from aitbc_miner.coordinator.bootstrap import _log as unsent_log
from aitbc_miner.coordinator.http import HttpClient
from aitbc_miner.coordinator.service_result import result_object
from aitbc_miner.errors import JobError, LocalError
from aitbc_miner.jobs import Artifact, ArtifactSpec, Outcome
from aitbc_miner.util import fs
from aitbc_miner.worker.artifacts import Caps, Collector, check_path

HEAD = re.compile(rb'Content-Disposition: form-data; name="artifact"; filename="[^"\r\n\\]+"')
TYPE = re.compile(rb"Content-Type: [A-Za-z0-9_.+-]+/[A-Za-z0-9_.+-]+(; ?[A-Za-z0-9_.+-]+=[A-Za-z0-9_.+-]+)*")
NAMES = [
    *("plain", 'q"uote', '"; filename="x', "semi;colon=1", "--boundary--", "%0d%0aX-Evil: 1", "a: b", "ü☃"),
    *("'", " lead", "trail ", "%22", "<script>", "$(id)", "C:x", "con", "=?utf-8?q?a?=", "e\u0301"),
]
TYPES = [
    *("text/plain", "text/plain; charset=utf-8", "text/plain\r\nX-Evil: 1", 'text/plain"\r\n\r\n', "x", ""),
    *("a/b;", "\ud800/x", "text/plain\0", "text/ü", "text/plain\n", "a/" + "b" * 10_000),
]


class Line:
    """A server that keeps the last body that was sent to it, byte for byte, and the heads of its request."""

    def __init__(self) -> None:
        self.body = b""
        self.heads: list[tuple[str, str]] = []
        line = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                line.heads = self.headers.items()
                line.body = self.rfile.read(int(self.headers["Content-Length"]))
                self.send_response(200)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None:
                return

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)

    def send(self, artifacts: list[Artifact], root: Path) -> None:
        """Deliver a result that has these artifacts."""
        with contextlib.closing(HttpClient(f"http://127.0.0.1:{self.server.server_port}", 5)) as http:
            coordinator = BootstrapCoordinator(
                http, node_id="n", credential="c", source="env:X", max_manifest_kb=16
            )
            coordinator.result("j", Outcome("j", artifacts=artifacts), root, "key")

    def artifact_heads(self) -> list[list[bytes]]:
        """Give the lines before the content of each artifact but the log, found by the boundary alone."""
        boundary = dict(self.heads)["Content-Type"].partition("boundary=")[2].encode()
        parts = self.body.split(b"--" + boundary)[5:-1]
        return [part[2:].partition(b"\r\n\r\n")[0].split(b"\r\n") for part in parts]

    def metadata(self) -> list[dict[str, object]]:
        """Give what is said of the artifacts but the log."""
        found = re.search(rb'name="metadata"\r\n\r\n([^\r\n]*)\r\n', self.body)
        assert found
        told: list[dict[str, object]] = json.loads(found[1])["artifacts"]
        return told[1:]


@pytest.fixture(scope="module")
def line() -> Iterator[Line]:
    made = Line()
    serving = threading.Thread(target=made.server.serve_forever, args=(0.01,))
    serving.start()
    yield made
    made.server.shutdown()
    made.server.server_close()
    serving.join()


def assert_in_their_places(line: Line, count: int) -> None:
    heads = line.artifact_heads()
    assert len(heads) == len(line.metadata()) == count
    for disposition, kind in heads:
        assert HEAD.fullmatch(disposition), disposition
        assert TYPE.fullmatch(kind), kind
    assert not [name for name, _ in line.heads if name.lower().startswith("x-")]


@pytest.mark.parametrize("number", [errno.EMFILE, errno.EIO, errno.ENOMEM, errno.EACCES])
def test_a_file_that_cannot_be_read_now_has_not_changed(
    line: Line, tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs/exec.log").write_text("said")
    (tmp_path / "a").write_text("data")

    def fails(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(fs, "open_below", fails)
        with pytest.raises(LocalError, match="cannot send"):
            line.send([Artifact("a", "a", 4, "0" * 64)], tmp_path)
        with pytest.raises(LocalError, match="logs"):
            unsent_log(tmp_path)
        with pytest.raises(LocalError, match="cannot send"):
            result_object({"service": {"result": {"text": {"log": True}}}}, Outcome("j"), tmp_path)
    line.send([Artifact("a", "a", 4, "0" * 64)], tmp_path)
    assert b"\r\ndata\r\n" in line.body


def test_what_a_job_has_called_its_files_and_their_types(line: Line, tmp_path: Path) -> None:
    for name in ("work", "output", "artifacts"):
        (tmp_path / name).mkdir()
    for name in NAMES:
        (tmp_path / "output" / name).write_text(name)
    specs = [ArtifactSpec(path=f"output/{name}", type=TYPES[n % len(TYPES)]) for n, name in enumerate(NAMES)]
    with fs.directory(tmp_path) as fd:
        taken = Collector(fd, Caps(files=100, bytes=10_000), None).collect(specs)
    line.send(taken, tmp_path)
    assert_in_their_places(line, len(NAMES))
    assert [each["path"] for each in line.metadata()] == [f"output/{name}" for name in NAMES]
    assert [each["bytes"] for each in line.metadata()] == [len(name.encode()) for name in NAMES]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(path=st.text(min_size=1, max_size=60), kind=st.text(max_size=40))
def test_any_path_that_passes_with_any_type(line: Line, tmp_path: Path, path: str, kind: str) -> None:
    (tmp_path / "file").write_bytes(b"--content\r\n\r\n--")
    try:
        check_path(path)
    except JobError:
        path = path.encode("unicode_escape").decode().replace("\\", "/").strip("/.") or "x"
    line.send([Artifact(path, "file", 15, "0" * 64, kind)], tmp_path)
    assert_in_their_places(line, 1)
