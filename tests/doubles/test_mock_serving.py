"""What the mock coordinator serves beside the dialect, and how it runs as a program."""

import hashlib
import http.client
import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from requests_toolbelt import MultipartEncoder

from tests.doubles.conftest import DATA
from tools.mock.bootstrap.client import Client, manifest
from tools.mock.bootstrap.coordinator import MockCoordinator
from tools.mock.faults import ENDPOINTS, KINDS

SCRIPT = Path(__file__).parents[2] / "tools" / "mock_coordinator.py"


# Files and pages.


def test_files_whole_and_in_ranges(node: Client) -> None:
    whole = node.get("/files/in.bin")
    assert (whole.status_code, whole.content) == (200, DATA)
    for wanted, part, shown in (
        ("bytes=100-", DATA[100:], f"100-{len(DATA) - 1}"),
        ("bytes=5-9", DATA[5:10], "5-9"),
        ("bytes=-3", DATA[-3:], f"{len(DATA) - 3}-{len(DATA) - 1}"),
    ):
        reply = node.get("/files/in.bin", headers={"Range": wanted, "If-Range": whole.headers["ETag"]})
        assert (reply.status_code, reply.content) == (206, part)
        assert reply.headers["Content-Range"] == f"bytes {shown}/{len(DATA)}"
    assert node.get("/files/in.bin", headers={"Range": f"bytes={len(DATA)}-"}).status_code == 416
    for ignored in ({"Range": "bytes=-"}, {"Range": "lines=1-2"}, {"Range": "bytes=1-", "If-Range": '"old"'}):
        assert node.get("/files/in.bin", headers=ignored).status_code == 200


@pytest.mark.parametrize("name", ["none", "", "..%2fout", "..", ".hidden", "%00", "%2fetc%2fpasswd"])
def test_no_other_files(mock: MockCoordinator, name: str) -> None:
    connection = http.client.HTTPConnection(urlsplit(mock.url).netloc, timeout=10)
    with closing(connection):
        connection.request("GET", f"/files/{name}")
        assert connection.getresponse().status == 404


def test_flaky_breaks_the_first_transfer_only(node: Client) -> None:
    with node.get("/flaky/in.bin", stream=True) as reply:
        assert reply.headers["Content-Length"] == str(len(DATA))
        half = reply.raw.read(len(DATA) // 2)
        with pytest.raises(Exception, match="IncompleteRead"):
            reply.raw.read(1)
    rest = node.get("/flaky/in.bin", headers={"Range": f"bytes={len(half)}-"})
    assert half + rest.content == DATA


def test_redirect_page(node: Client) -> None:
    reply = node.get("/redirect", params={"to": "http://x.example/y?z=1"})
    assert (reply.status_code, reply.headers["Location"]) == (302, "http://x.example/y?z=1")
    assert node.get("/redirect", params={"to": "http://x\r\nSet-Cookie: a"}).status_code == 400


def test_page_and_json_show_all_and_no_token(mock: MockCoordinator, node: Client) -> None:
    mock.submit(manifest("<script>alert(1)</script>", priority=1))
    mock.submit_raw(b"\xff<b>")
    node.heartbeat(note="<i>")
    node.run("<script>alert(1)</script>")
    node.progress("<script>alert(1)</script>", note="{brace} <u>")
    reply = node.result("<script>alert(1)</script>", {"<img>": b"1"})
    assert reply.status_code == 200, reply.text
    page = node.get("/").text
    assert "&lt;script&gt;" in page
    assert not re.search(r"<(script|b|i|u|img)>", page)
    assert "done" in page
    state = node.get("/state.json")
    shown = state.json()
    job = shown["jobs"][0]
    assert (job["state"], job["handed"][0]["node"], job["reports"][0]["verdict"]) == (
        "done",
        "node-1",
        "accepted",
    )
    assert job["reports"][0]["artifacts"][0]["sha256"] == hashlib.sha256(b"1").hexdigest()
    assert shown["nodes"][0]["heartbeats"] == 1
    for text in (page, state.text):
        assert node.token not in text
        assert "demo-token" not in text


# As a program.


@contextmanager
def program(*arguments: str) -> Iterator[tuple[subprocess.Popen[str], MockCoordinator]]:
    """The mock as a program; what is yielded beside it only carries its addresses."""
    command = [sys.executable, str(SCRIPT), *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            match = re.fullmatch(r"listening on http://127\.0\.0\.1:(\d+)/api/v1\n", line)
            assert match, line
            addresses = MockCoordinator(int(match[1]))
            yield process, addresses
            addresses.close()
        finally:
            process.kill()


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGINT])
def test_program(tmp_path: Path, end: signal.Signals) -> None:
    (tmp_path / "a.json").write_text('{"job_id": "a", "runner": "cli", "command": "true"}')
    (tmp_path / "b.yaml").write_text("job_id: b\nrunner: cli\ncommand: 'true'\n")
    (tmp_path / "notes.txt").write_text("no manifest")
    out = tmp_path / "out"
    with program("--jobs", str(tmp_path), "--files", str(tmp_path), "--out", str(out), "--lease-s", "60") as (
        process,
        mock,
    ):
        with Client(mock) as node:
            assert [node.pull()["job_id"] for _ in range(2)] == ["a", "b"]
            assert node.get("/files/notes.txt").text == "no manifest"
            assert node.result("a", {"x": b"kept"}).status_code == 200
            process.send_signal(end)
            output, errors = process.communicate(timeout=10)
        assert (process.returncode, output, errors) == (0, "", "")
    assert [path.read_bytes() for path in out.iterdir()] == [b"kept"]


@pytest.mark.parametrize(
    ("name", "text"), [("x.json", "{"), ("x.json", "[]"), ("x.yaml", "a: [b"), ("x.yaml", "a: 2020-01-01")]
)
def test_program_names_the_file_that_is_no_manifest(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    command = [sys.executable, str(SCRIPT), "--jobs", str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    assert (ended.returncode, ended.stdout) == (1, "")
    assert f"cannot load job {tmp_path / name}: " in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize("option", ["--jobs", "--files"])
def test_program_names_a_directory_that_is_not_there(tmp_path: Path, option: str) -> None:
    command = [sys.executable, str(SCRIPT), option, str(tmp_path / "nope")]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert f"argument {option}: cannot read {tmp_path / 'nope'}: No such file or directory" in ended.stderr


def test_program_names_the_faults() -> None:
    command = [sys.executable, str(SCRIPT), "--help"]
    told = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    assert all(kind in told for kind in KINDS | ENDPOINTS | {"POST /_faults", "demo-token", "job-0001"})


def test_a_large_upload_takes_little_memory(tmp_path: Path) -> None:
    (tmp_path / "j.json").write_text(json.dumps(manifest("j")))
    big = tmp_path / "big"
    with big.open("wb") as file:
        for number in range(64):
            file.write(hashlib.sha256(bytes([number])).digest() * 32768)
    with big.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    told = json.dumps({"artifacts": [{"path": "big", "bytes": 64 * 1024**2, "sha256": digest}]})
    with (
        program("--jobs", str(tmp_path), "--out", str(tmp_path / "out")) as (process, mock),
        Client(mock) as node,
    ):
        node.run("j")
        before = peak_kib(process.pid)
        with big.open("rb") as file:
            form = MultipartEncoder(
                {"job_id": "j", "node_id": "node-1", "metadata": told, "artifact": ("big", file)}
            )
            reply = node.post(
                "/jobs/result", data=form, headers={"Content-Type": form.content_type}, timeout=60
            )
        assert (reply.status_code, reply.text) == (200, '{"accepted": true}')
        assert peak_kib(process.pid) - before < 16 * 1024


def peak_kib(pid: int) -> int:
    match = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert match
    return int(match[1])
