"""What the double of the AITBC coordinator shows beside its API, and how it runs as a program."""

import contextlib
import http.client
import re
import signal
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import requests

from tools.mock.aitbc.client import Caller, Miner
from tools.mock.aitbc.coordinator import KEY, MockAitbc
from tools.mock.faults import AITBC_ENDPOINTS, KINDS

SCRIPT = Path(__file__).parents[2] / "tools" / "mock_coordinator.py"
NOBODY = "f" * 32


def test_page_and_json_show_all_and_no_key() -> None:
    with MockAitbc() as mock, Miner(mock) as miner:
        _show_all(mock, miner)


def _show_all(mock: MockAitbc, miner: Miner) -> None:
    job_id = mock.submit({"type": "<script>alert(1)</script>"})
    miner.take()
    miner.beat(inflight=1, metadata={"x": "<b>"})
    miner.result(job_id, {"said": "<i>"}, duration_ms=1)
    miner.result(NOBODY)
    page = requests.get(f"{mock.root}/", timeout=10).text
    assert "&lt;script&gt;" in page
    assert not re.search(r"<(script|b|i)>", page)
    state = requests.get(f"{mock.root}/state.json", timeout=10)
    shown = state.json()
    assert (shown["jobs"][0]["state"], shown["jobs"][0]["results"][0]["miner"]) == ("COMPLETED", "m-1")
    assert (shown["miners"][0]["miner_id"], shown["miners"][0]["heartbeats"]) == ("m-1", 1)
    assert shown["strays"][0]["job_id"] == NOBODY
    assert KEY not in page + state.text


# As a program.


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)


def test_program(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"type": "x", "payload": "text"}')
    (tmp_path / "b.yaml").write_text("payload: {n: 2}\nconstraints: {region: eu}\nttl_seconds: 60\n")
    (tmp_path / "c.json").write_text('{"payload": {"n": 3}, "job_id": "c"}')
    key = "by-hand-0123456789"
    options = ("--dialect", "aitbc-v1", "--jobs", str(tmp_path), "--token", key, "--receipts")
    command = [sys.executable, str(SCRIPT), *options, "--no-rate-limits"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            lines = [process.stdout.readline() for _ in range(3)]
            found = re.fullmatch(r"listening on http://127\.0\.0\.1:(\d+)/v1\n", lines[0])
            assert found, lines
            token, public = (line.split()[-1] for line in lines[1:])
            with Caller(MockAitbc(int(found[1])), X_Api_Key=key, X_Miner_ID="m-1") as miner:
                miner.post("/miners/register", {"capabilities": {}, "concurrency": 5, "region": "eu"})
                jobs = [miner.post("/miners/poll", {}).json() for _ in range(3)]
                receipt = miner.post(f"/miners/{jobs[0]['job_id']}/result", {"result": {}}).json()["receipt"]
                miner.headers = {"Authorization": f"Bearer {token}"}
                assert miner.call("GET", "/jobs/c").json()["state"] == "RUNNING"
            process.send_signal(signal.SIGTERM)
            assert process.wait(10) == 0
        finally:
            process.kill()
    assert [job["payload"] for job in jobs] == [{"type": "x", "payload": "text"}, {"n": 2}, {"n": 3}]
    assert (jobs[1]["constraints"]["region"], jobs[2]["job_id"]) == ("eu", "c")
    assert receipt["signature"]["key_id"] == public


def test_program_has_limits_unless_told_otherwise() -> None:
    command = [sys.executable, str(SCRIPT), "--dialect", "aitbc-v1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            assert process.stdout is not None
            netloc = urlsplit(process.stdout.readline().split()[-1]).netloc
            connection = http.client.HTTPConnection(netloc, timeout=10)
            with contextlib.closing(connection):
                seen = []
                for _ in range(51):
                    head = {"X-Api-Key": KEY, "Content-Type": "application/json"}
                    connection.request("POST", f"/v1/miners/{NOBODY}/result", '{"result": {}}', head)
                    with connection.getresponse() as response:
                        response.read()
                        seen.append(response.status)
            assert seen == [404] * 50 + [429]
        finally:
            process.kill()


@pytest.mark.parametrize(
    ("dialect", "options"),
    [("aitbc-v1", ("--lease-s", "5")), ("aitbc-v1", ("--repeat",)), ("bootstrap", ("--receipts",))],
)
def test_program_refuses_what_is_the_other_dialects(dialect: str, options: tuple[str, ...]) -> None:
    ended = run("--dialect", dialect, *options)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert f"{options[0]} is not for dialect {dialect}" in ended.stderr


def test_program_names_a_job_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text('{"payload": {}, "constraints": {"gpus": 1}}')
    ended = run("--dialect", "aitbc-v1", "--jobs", str(tmp_path))
    assert (ended.returncode, ended.stdout) == (1, "")
    assert "constraint 'gpus'" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_program_names_both_dialects_endpoints() -> None:
    told = run("--help").stdout
    assert all(word in told for word in AITBC_ENDPOINTS | KINDS | {"aitbc-v1", "--no-rate-limits", KEY})
