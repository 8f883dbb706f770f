"""The sample services with the real programs, from a payload to a result, each job in the sandbox."""

import base64
import json
import shutil
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.node.harness import WAIT_S, Node
from tests.node.networks import KEY
from tools.mock.aitbc.coordinator import MockAitbc
from tools.mock.bootstrap.coordinator import MockCoordinator

pytestmark = pytest.mark.needs("bubblewrap", "time")
ETC = Path(__file__).parents[2] / "etc"
SLOTS: list[dict[str, Any]] = [
    {"name": "cpu0", "kind": "cpu"},
    {"name": "net0", "kind": "cpu", "egress": "open", "runners": ["python"]},
]


@pytest.fixture
def double() -> Iterator[MockAitbc]:
    with MockAitbc(rate_limits=False) as made:
        yield made


@pytest.fixture
def node(double: MockAitbc) -> Iterator[Node]:
    mine = {"dialect": "aitbc-v1", "auth_scheme": "api_key"}
    changes: dict[str, Any] = {"coordinator": mine, "sandbox": {"mode": "required"}}
    made = Node(double.url, SLOTS, environ={"MINER_AUTH": KEY}, **changes)
    for name in ("services.d", "tasks", "allowlist.d"):
        put = made.put(name, ETC / name)
        for sample in put.glob("*.sample"):
            sample.rename(sample.with_suffix(""))
    made.write_config(double.url, services_dir=str(made.directory / "services.d"), **changes)
    yield made
    made.clean_up()
    shutil.rmtree(made.directory)


def result_of(double: MockAitbc, payload: dict[str, Any]) -> dict[str, Any]:
    job_id = double.submit(payload)
    final = {"COMPLETED", "FAILED"}
    double.wait(lambda _: double.job(job_id).state in final, 2 * WAIT_S)
    job = double.job(job_id)
    assert job.state == "COMPLETED", job.error
    assert job.result is not None
    return job.result


def test_wordstats(node: Node, double: MockAitbc) -> None:
    node.start()
    found = result_of(double, {"type": "wordstats", "text": "one two two", "top": 1})
    assert found["counts"] == {"words": 3, "distinct": 2, "top": [{"word": "two", "count": 2}]}
    assert set(found) == {"counts", "artifacts"}


@pytest.mark.needs("ffmpeg")
def test_reencode(node: Node, double: MockAitbc, tmp_path: Path) -> None:
    clip = ["-f", "lavfi", "-i", "testsrc=duration=1:size=64x48:rate=10", "-c:v", "mpeg4"]
    subprocess.run(["/usr/bin/ffmpeg", "-v", "error", *clip, str(tmp_path / "clip.avi")], check=True)
    node.start()
    with MockCoordinator(files_dir=tmp_path) as files:
        address = files.url.partition("/api")[0] + "/files/clip.avi"
        found = result_of(double, {"type": "reencode", "input": address, "output_format": "mkv"})
    (video,) = found["artifacts"]
    assert video["path"] == "result.mkv"
    (tmp_path / "out.mkv").write_bytes(base64.b64decode(video["data"]))
    probe = ["/usr/bin/ffprobe", "-v", "error", "-show_entries", "format=format_name", "-of", "csv=p=0"]
    said = subprocess.run([*probe, str(tmp_path / "out.mkv")], check=True, capture_output=True, text=True)
    assert "matroska" in said.stdout


class ModelServer(BaseHTTPRequestHandler):
    """Speaks both protocols, in so far as they are asked for."""

    asked: list[tuple[str, dict[str, Any]]]

    def do_POST(self) -> None:
        payload = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append((self.path, payload))
        answer = f"you said {payload.get('prompt') or payload['messages'][0]['content']}"
        if self.path == "/api/generate":
            said = {"model": payload["model"], "response": answer, "prompt_eval_count": 3, "eval_count": 4}
        else:
            message = {"choices": [{"message": {"content": answer}}]}
            said = {"model": "m", **message, "usage": {"prompt_tokens": 3, "completion_tokens": 4}}
        body = json.dumps(said).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


@pytest.fixture
def server() -> Iterator[tuple[str, list[tuple[str, dict[str, Any]]]]]:
    asked: list[tuple[str, dict[str, Any]]] = []
    handler = type("Handler", (ModelServer,), {"asked": asked})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as made:
        thread = threading.Thread(target=made.serve_forever, args=(0.02,))
        thread.start()
        yield f"http://127.0.0.1:{made.server_port}", asked
        made.shutdown()
        thread.join()


@pytest.mark.parametrize("protocol", ["ollama", "openai"])
def test_inference(
    protocol: str, node: Node, double: MockAitbc, server: tuple[str, list[tuple[str, dict[str, Any]]]]
) -> None:
    address, asked = server
    sample = node.directory / "services.d" / "inference.yaml"
    text = sample.read_text().replace("http://127.0.0.1:11434", address)
    sample.write_text(text.replace("protocol: ollama", f"protocol: {protocol}"))
    node.start()
    found = result_of(double, {"prompt": "why", "model": "llama3.2:latest", "max_tokens": 7})
    assert found["output"] == "you said why"
    assert found["usage"] == {"prompt_tokens": 3, "output_tokens": 4}
    ((path, payload),) = asked
    assert path == {"ollama": "/api/generate", "openai": "/v1/chat/completions"}[protocol]
    assert payload["model"] == "llama3.2:latest"
    assert double.miners()[node.node_id].capabilities["models"][0] == "base"
    assert "llama3.2:latest" in double.miners()[node.node_id].capabilities["models"]


def test_a_model_server_that_is_away_fails_the_job_with_a_reason(node: Node, double: MockAitbc) -> None:
    sample = node.directory / "services.d" / "inference.yaml"
    sample.write_text(sample.read_text().replace(":11434", ":9"))
    node.start()
    job_id = double.submit({"type": "inference", "prompt": "why"})
    double.wait(lambda _: double.job(job_id).state == "FAILED", WAIT_S)
    assert str(double.job(job_id).error).startswith("E_TASK: task inference: UNREACHABLE: ")
