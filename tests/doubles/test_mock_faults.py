"""What the mock coordinator does wrong on purpose, and what it serves beside the dialect."""

import http.client
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import requests
from requests_toolbelt import MultipartEncoder

from aitbc_miner.util.clock import now
from tools.mock.bootstrap.client import Client, manifest
from tools.mock.bootstrap.coordinator import MockCoordinator
from tools.mock.faults import ENDPOINTS, KINDS, Faults

SCRIPT = Path(__file__).parents[2] / "tools" / "mock_coordinator.py"


# Faults.


@pytest.mark.parametrize("endpoint", sorted(ENDPOINTS))
def test_every_endpoint_can_be_made_to_fail(mock: MockCoordinator, node: Client, endpoint: str) -> None:
    mock.submit(manifest("j"))
    mock.submit(manifest("k"))
    node.run("j")
    node.pull()
    calls: dict[str, Callable[[], requests.Response]] = {
        "register": lambda: node.post(
            "/nodes/register", {"node_id": "n"}, headers={"Authorization": "Bearer demo-token"}
        ),
        "heartbeat": node.heartbeat,
        "pull": lambda: node.post("/jobs/pull", {"node_id": "node-1"}),
        "ack": lambda: node.ack("k"),
        "progress": lambda: node.progress("j"),
        "result": lambda: node.result("j", {"x": b"1"}),
        "fail": lambda: node.fail("k"),
        "files": lambda: node.get("/files/in.bin"),
    }
    mock.fault(endpoint, "status:500", times=2)
    assert [calls[endpoint]().status_code for _ in range(3)] == [500, 500, 200]
    assert [(call.status, call.fault) for call in mock.ledger.calls(endpoint)[-3:]] == [
        (500, "status:500"),
        (500, "status:500"),
        (200, None),
    ]


def test_status_faults_have_retry_after_and_the_error_shape(mock: MockCoordinator, node: Client) -> None:
    for kind in ("status:429", "status:503:7", "status:404", "status:204"):
        mock.fault("heartbeat", kind, times=1)
    replies = [node.heartbeat() for _ in range(4)]
    assert [reply.status_code for reply in replies] == [429, 503, 404, 204]
    assert [reply.headers.get("Retry-After") for reply in replies] == ["1", "7", None, None]
    assert replies[0].json()["error"]["code"] == "fault"
    assert mock.ledger.nodes()["node-1"].heartbeats == ()
    assert node.heartbeat().status_code == 200


def test_refuse_leaves_the_call_undone_and_drop_after_does_it(mock: MockCoordinator, node: Client) -> None:
    mock.submit(manifest("j"))
    node.run("j")
    for kind, state in (("refuse", "acked"), ("drop_after", "done")):
        mock.fault("result", kind, times=1)
        with pytest.raises(requests.ConnectionError):
            node.result("j", {"x": b"1" * 100_000})
        assert mock.job("j").state == state
    assert node.result("j", {"x": b"1" * 100_000}).json() == {"duplicate": True}


def test_after_carries_out_what_a_fault_would_leave_undone(mock: MockCoordinator, node: Client) -> None:
    mock.submit(manifest("j"))
    node.run("j")
    mock.fault("fail", "status:502", times=1)
    mock.fault("fail", "after:status:502", times=1)
    assert node.fail("j").status_code == 502
    assert mock.job("j").state == "acked"
    assert node.fail("j").status_code == 502
    assert mock.job("j").state == "failed"


def test_delay(mock: MockCoordinator, node: Client) -> None:
    mock.fault("heartbeat", "delay:0.2")
    begin = now()
    assert node.heartbeat().status_code == 200
    assert now() - begin >= 0.2
    with pytest.raises(requests.Timeout):
        node.post("/nodes/heartbeat", {"node_id": "node-1"}, timeout=0.05)


def test_truncate_sends_half_of_what_it_announces(mock: MockCoordinator, node: Client) -> None:
    mock.submit(manifest("j", args=["x" * 1000]))
    mock.fault("pull", "truncate", times=1)
    with pytest.raises(requests.exceptions.ChunkedEncodingError, match="IncompleteRead"):
        node.pull()
    assert mock.job("j").state == "leased"


def test_bodies_that_are_no_answer(mock: MockCoordinator, node: Client) -> None:
    def body(kind: str) -> bytes:
        mock.fault("pull", kind, times=1)
        reply = node.post("/jobs/pull", {"node_id": "node-1"})
        assert (reply.status_code, reply.headers["Content-Type"]) == (200, "application/json")
        return reply.content

    with pytest.raises(ValueError, match=r"codec|Expecting|JSON"):
        json.loads(body("garbage"))
    assert body("empty") == b""
    assert not isinstance(json.loads(body("wrong_json"))["job"], dict | None)
    assert body("deep_json").count(b"[") == 100_000
    assert node.pull() is None, "the connection is still in step"


def test_huge_goes_on_until_the_client_hangs_up(mock: MockCoordinator, node: Client) -> None:
    mock.fault("heartbeat", "huge", times=1)
    with node.post("/nodes/heartbeat", {"node_id": "node-1"}, stream=True) as reply:
        assert "Content-Length" not in reply.headers
        assert sum(len(reply.raw.read(1024**2)) for _ in range(32)) == 32 * 1024**2
    assert node.heartbeat().status_code == 200


def test_slow_sends_byte_by_byte_and_all_of_it(mock: MockCoordinator, node: Client) -> None:
    mock.fault("heartbeat", "slow:0.0005", times=1)
    begin = now()
    reply = node.heartbeat()
    assert (len(reply.content), reply.json()) == (600, {})
    assert now() - begin > 0.3
    mock.fault("heartbeat", "slow", times=1)
    with node.post("/nodes/heartbeat", {"node_id": "node-1"}, stream=True) as reply:
        assert reply.raw.read(1) == b" "


def test_redirects_lead_elsewhere_and_are_counted_there(mock: MockCoordinator, node: Client) -> None:
    mock.fault("pull", "redirect", times=1)
    mock.fault("pull", "redirect:http://other.example/x", times=1)
    first, second = (node.post("/jobs/pull", {"node_id": "node-1"}) for _ in range(2))
    assert (first.status_code, second.status_code) == (302, 302)
    assert second.headers["Location"] == "http://other.example/x"
    elsewhere = first.headers["Location"]
    assert elsewhere == f"http://localhost:{urlsplit(mock.url).port}/elsewhere"
    assert mock.ledger.calls("elsewhere") == []
    node.session.get(elsewhere, headers={"Authorization": "Bearer leaked"}, timeout=10)
    node.session.get(elsewhere, timeout=10)
    assert [call.credentials for call in mock.ledger.calls("elsewhere")] == [True, False]


def faults(node: Client, body: object = None, **more: Any) -> requests.Response:
    return node.session.post(f"{node.mock.root}/_faults", json=body, timeout=10, **more)


def test_faults_over_http(mock: MockCoordinator, node: Client) -> None:
    reply = faults(node, {"endpoint": "pull", "kind": "status:500"})
    assert reply.json() == {"faults": [{"endpoint": "pull", "kind": "status:500", "times": None}]}
    assert [node.post("/jobs/pull", {}).status_code for _ in range(3)] == [500] * 3
    for bad in (
        {"endpoint": "pull", "kind": "nap"},
        {"endpoint": "moon", "kind": "empty"},
        {"endpoint": "pull"},
    ):
        assert faults(node, bad).status_code == 400
    assert faults(node, data=b'{"clear": true}').status_code == 415
    assert faults(node, {"clear": True}).json() == {"faults": []}
    assert node.pull() is None


@pytest.mark.parametrize("kind", ["nap", "delay", "delay:x", "status", "status:x", "after:", "slow:x"])
def test_unknown_faults_are_refused(kind: str) -> None:
    with pytest.raises(ValueError, match="cannot set fault"):
        Faults().add("pull", kind)


def test_faults_are_written_as_they_were_set() -> None:
    faults = Faults()
    needs = {"says": "says:404:html", "delay": "delay:1", "status": "status:500:3"}
    texts = [needs.get(kind, kind) for kind in sorted(KINDS)] + ["after:garbage"]
    for text in texts:
        faults.add("pull", text, 1)
    assert [str(faults.take("pull")) for _ in texts] == texts
    assert faults.take("pull") is None
    with pytest.raises(ValueError, match="0 times"):
        faults.add("pull", "empty", 0)


def test_an_outage_keeps_the_port_and_the_ledger(mock: MockCoordinator, node: Client) -> None:
    mock.submit(manifest("j"))
    node.run("j")
    url = mock.url
    mock.stop()
    with pytest.raises(requests.ConnectionError):
        node.heartbeat()
    mock.start()
    assert mock.url == url
    assert node.result("j", {"x": b"1"}).status_code == 200


def test_stop_does_not_wait_for_slow_replies(mock: MockCoordinator, node: Client) -> None:
    mock.fault("heartbeat", "slow")
    begin = now()
    with node.post("/nodes/heartbeat", {"node_id": "node-1"}, stream=True):
        mock.stop()
    assert now() - begin < 5


# Requests that are wrong.


def test_bad_requests_are_answered_and_the_connection_goes_on(mock: MockCoordinator, node: Client) -> None:
    for data in (b"", b"{", b"[]", b"[" * 100_000, b"\xff"):
        assert node.post("/jobs/pull", data=data).status_code == 400
    for filters in ([1], {"slots": 3}, {"slots": [3]}, {"known": 3}):
        assert node.post("/jobs/pull", {"node_id": "node-1", "filters": filters}).status_code == 400
    assert node.post("/jobs/pull", data=b" " * 5_000_000).status_code == 413
    assert node.post("/jobs/dance", {}).status_code == 404
    assert node.get("/secret").status_code == 404
    assert len({call.endpoint for call in mock.ledger.calls()}) == 3


@pytest.mark.parametrize(
    ("body", "complaint"),
    [
        (b"", "before its last boundary"),
        (b"--B\r\n", "before its last boundary"),
        (b"--Bxx", "goes on after the boundary"),
        (b"--B\r\n\r\nno name\r\n--B--", "unexpected"),
        (b'--B\r\nContent-Disposition: form-data; name="job_id"\r\n\r\nj\r\n' * 2 + b"--B--", "comes twice"),
        (b'--B\r\nContent-Disposition: form-data; name="o"; filename="f"\r\n\r\nj\r\n--B--', "unexpected"),
        (b"--B\r\nX: " + b"x" * 20_000 + b"\r\n\r\n\r\n--B--", "part headers over"),
        (b'--B\r\nContent-Disposition: form-data; name="artifact"; filename="f"\r\n\r\nj', "before its last"),
        (b"preamble\r\n--B--", "node_id must be"),
    ],
)
def test_broken_forms(mock: MockCoordinator, node: Client, body: bytes, complaint: str) -> None:
    headers = {"Content-Type": "multipart/form-data; boundary=B"}
    reply = node.post("/jobs/result", data=body, headers=headers)
    assert (reply.status_code, complaint in reply.json()["error"]["message"]) == (400, True), reply.text
    assert list(mock.out_dir.iterdir()) == []
    assert node.post("/jobs/result", data=body, headers={"Content-Type": "text/plain"}).status_code == 400


def test_an_upload_that_breaks_off_leaves_nothing(mock: MockCoordinator, node: Client) -> None:
    connection = http.client.HTTPConnection(urlsplit(mock.url).netloc, timeout=10)
    connection.putrequest("POST", "/api/v1/jobs/result")
    connection.putheader("Authorization", f"Bearer {node.token}")
    connection.putheader("Content-Type", "multipart/form-data; boundary=B")
    connection.putheader("Content-Length", "1000000")
    connection.endheaders()
    connection.send(
        b'--B\r\nContent-Disposition: form-data; name="artifact"; filename="f"\r\n\r\n' + b"x" * 500_000
    )
    connection.close()
    mock.stop()
    assert list(mock.out_dir.iterdir()) == []


@pytest.mark.parametrize("size", [1, 7, 1000, 300_000])
def test_chunked_uploads_at_any_cut(mock: MockCoordinator, node: Client, size: int) -> None:
    mock.submit(manifest("j"))
    node.run("j")
    # Bytes that nearly look like the boundary, so that cuts in bad places would be seen.
    data = b"\r\n--B\r\n--boundar\r\n--" * (50 if size < 1000 else 50_000)
    fields = {"job_id": "j", "node_id": "node-1", "metadata": "{}", "artifact": ("f", data)}
    encoded = MultipartEncoder(fields, boundary="boundary").to_string()
    pieces = (encoded[at : at + size] for at in range(0, len(encoded), size))
    headers = {"Content-Type": "multipart/form-data; boundary=boundary"}
    assert node.post("/jobs/result", data=pieces, headers=headers).status_code == 200
    report = mock.job("j").accepted
    assert report is not None
    assert report.artifacts[0].file.read_bytes() == data
    assert node.heartbeat().status_code == 200


def test_an_artifact_name_may_be_in_the_old_encoding(mock: MockCoordinator, node: Client) -> None:
    mock.submit(manifest("j"))
    node.run("j")
    parts = [("job_id", b"j"), ("node_id", b"node-1"), ("metadata", b"{}"), ("artifact", b"data")]
    heads = [f'Content-Disposition: form-data; name="{name}"' for name, _ in parts]
    heads[-1] += "; filename*=utf-8''na%C3%AFve"
    body = b"".join(
        b"--B\r\n" + head.encode() + b"\r\n\r\n" + data + b"\r\n"
        for head, (_, data) in zip(heads, parts, strict=True)
    )
    headers = {"Content-Type": "multipart/form-data; boundary=B"}
    assert node.post("/jobs/result", data=body + b"--B--\r\n", headers=headers).status_code == 200
    report = mock.job("j").accepted
    assert report is not None
    assert report.artifacts[0].path == "naïve"
