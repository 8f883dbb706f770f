"""The mock coordinator is what the node is judged by, so it is judged first."""

import re
import threading
from pathlib import Path

import pytest

from aitbc_miner.util.clock import now
from tools.mock.bootstrap.client import SLOT, TOKEN, Client, manifest
from tools.mock.bootstrap.coordinator import MockCoordinator
from tools.mock.bootstrap.records import Verdict

GPU_SLOT = {
    **SLOT,
    "name": "gpu0",
    "kind": "gpu",
    "vram_mb": 16000,
    "memory_mb": 16000,
    "runners": ["cli", "python"],
}


def saved(mock: MockCoordinator) -> list[Path]:
    return sorted(mock.out_dir.iterdir())


# Nodes.


def test_register_needs_the_bootstrap_token_and_keeps_the_payload(mock: MockCoordinator) -> None:
    with Client(mock, register=False) as client:
        client.token = "wrong"
        assert client.post("/nodes/register", {"node_id": "n"}).status_code == 401
        client.token = TOKEN
        assert client.post("/nodes/register", {"node_id": ""}).status_code == 400
        reply = client.post("/nodes/register", {"node_id": "n", "tags": ["a"]})
    assert reply.status_code == 200
    assert len(reply.json()["node_token"]) > 20
    assert mock.ledger.nodes()["n"].registrations[0].payload["tags"] == ["a"]


@pytest.mark.parametrize(
    "call", ["nodes/heartbeat", "jobs/pull", "jobs/ack", "jobs/progress", "jobs/result", "jobs/fail"]
)
def test_every_later_call_needs_the_node_token(mock: MockCoordinator, node: Client, call: str) -> None:
    for token in ("", "wrong", TOKEN):
        node.token = token
        reply = node.post(f"/{call}", {"node_id": "node-1", "job_id": "j"})
        assert reply.status_code == 401
        assert reply.json()["error"]["code"] == "bad_token"


def test_heartbeat_is_kept_with_its_time(mock: MockCoordinator, node: Client) -> None:
    assert node.heartbeat(free_mb=5).status_code == 200
    assert node.heartbeat().status_code == 200
    first, second = mock.ledger.nodes()["node-1"].heartbeats
    assert first.payload == {"node_id": "node-1", "load": 0.5, "free_mb": 5}
    assert first.at < second.at


def test_heartbeat_of_an_unknown_node_is_404_and_after_a_restart_401(
    mock: MockCoordinator, node: Client
) -> None:
    assert node.post("/nodes/heartbeat", {"node_id": "stranger"}).status_code == 404
    mock.ledger.forget_nodes()
    assert node.heartbeat().status_code == 404
    mock.ledger.revoke_tokens()
    assert node.heartbeat().status_code == 401


def test_a_node_cannot_speak_for_another(mock: MockCoordinator, node: Client) -> None:
    mock.submit(manifest("j"))
    with Client(mock, "node-2"):
        node.node_id = "node-2"
        assert node.heartbeat().status_code == 403
        assert node.post("/jobs/pull", {"node_id": "node-2"}).status_code == 403
    assert mock.job("j").handed == ()


# Jobs on their way out.


def test_a_job_from_submission_to_done(mock: MockCoordinator, node: Client) -> None:
    assert node.pull() is None
    job = manifest("j", extra={"kept": 1})
    assert mock.submit(job) == "j"
    assert mock.job("j").state == "queued"
    assert node.pull() == job
    assert mock.job("j").state == "leased"
    assert node.pull() is None
    assert node.ack("j").status_code == 200
    assert node.ack("j").status_code == 200, "an ack may be repeated by its node"
    assert node.progress("j").json() == {}
    assert node.result("j", {"out.txt": b"data", "logs/exec.log": b""}).json() == {"accepted": True}
    done = mock.job("j")
    assert (done.state, done.node, len(done.handed), done.acks) == ("done", "node-1", 1, 2)
    assert (done.progress[0].pct, done.progress[0].note) == (50, "half")
    assert done.acked_at is not None
    assert done.finished_at is not None
    assert done.handed[0].at <= done.acked_at <= done.finished_at
    assert done.accepted is not None
    assert [(each.path, each.file.read_bytes()) for each in done.accepted.artifacts] == [
        ("out.txt", b"data"),
        ("logs/exec.log", b""),
    ]


def test_a_lease_that_is_not_acked_returns_to_the_queue() -> None:
    with MockCoordinator(lease_s=0.05) as mock, Client(mock) as one, Client(mock, "node-2") as two:
        mock.submit(manifest("j"))
        assert one.pull()["job_id"] == "j"
        mock.wait(lambda ledger: ledger.job("j").state == "queued", 5)
        assert one.ack("j").status_code == 409
        mock.submit(manifest("second"))
        assert two.pull()["job_id"] == "j", "age counts from the submission"
        assert one.ack("j").status_code == 409
        assert [handout.node for handout in mock.job("j").handed] == ["node-1", "node-2"]


def test_an_acked_job_outlives_its_lease() -> None:
    with MockCoordinator(lease_s=0.05) as mock, Client(mock) as node:
        mock.submit(manifest("j", priority=1))
        # The lease is shorter than a busy machine may need to ack it.
        while not ((job := node.pull()) and node.ack(job["job_id"]).status_code == 200):
            mock.wait(lambda ledger: ledger.job("j").state == "queued", 5)
        mock.submit(manifest("later"))
        node.pull()
        mock.wait(lambda ledger: ledger.job("later").state == "queued", 5)
        assert mock.job("j").state == "acked"


def test_an_acked_job_may_be_taken_from_a_silent_node() -> None:
    with MockCoordinator(silent_s=0.5) as mock, Client(mock) as one, Client(mock, "node-2") as two:
        mock.submit(manifest("j"))
        one.run("j")
        one.heartbeat()
        mock.wait(lambda ledger: ledger.job("j").state == "queued", 5)
        assert now() >= mock.ledger.nodes()["node-1"].heartbeats[-1].at + 0.5
        two.run("j")
        assert (mock.job("j").state, mock.job("j").node) == ("acked", "node-2")


@pytest.mark.parametrize(
    ("needs", "slot", "fits"),
    [
        ({}, SLOT, True),
        ({"cpu_threads": 2, "memory_mb": 1024}, SLOT, True),
        ({"cpu_threads": 3}, SLOT, False),
        ({"memory_mb": 1025}, SLOT, False),
        ({"gpu": True}, SLOT, False),
        ({"gpu": True, "vram_mb": 16000}, GPU_SLOT, True),
        ({"gpu": True, "vram_mb": 16001}, GPU_SLOT, False),
        ({}, {**SLOT, "runners": ["python"]}, False),
        ({"memory_mb": "a lot"}, SLOT, True),
    ],
)
def test_only_what_fits_a_free_slot_is_handed_out(
    mock: MockCoordinator, node: Client, needs: dict[str, object], slot: dict[str, object], fits: bool
) -> None:
    mock.submit(manifest("j", requirements=needs))
    assert (node.pull(slot) is not None) == fits


def test_filters_know_what_is_held_and_may_be_missing(mock: MockCoordinator, node: Client) -> None:
    mock.submit(manifest("j", requirements={"memory_mb": 10**6}))
    no_slots = {"node_id": "node-1", "filters": {"slots": [], "known": []}}
    assert node.post("/jobs/pull", no_slots).json() == {"job": None}
    assert node.pull({**SLOT, "memory_mb": 10**6}, known=("j",)) is None
    assert node.post("/jobs/pull", {"node_id": "node-1"}).json()["job"]["job_id"] == "j"


def test_priority_then_age(mock: MockCoordinator, node: Client) -> None:
    for job_id, priority in (("a", 0), ("b", 5), ("c", 0), ("d", 5)):
        mock.submit(manifest(job_id, priority=priority))
    assert [node.pull()["job_id"] for _ in range(4)] == ["b", "d", "a", "c"]


def test_ignore_filters_hands_out_what_fits_nothing() -> None:
    with MockCoordinator(ignore_filters=True) as mock, Client(mock) as node:
        mock.submit(manifest("j", requirements={"gpu": True}))
        assert node.pull(known=("j",))["job_id"] == "j"


def test_repeat_answers_every_pull_with_the_same_job() -> None:
    with MockCoordinator(repeat=True) as mock, Client(mock) as node:
        assert node.pull() is None
        mock.submit(manifest("j"))
        node.run("j")
        assert node.pull()["job_id"] == "j"
        assert mock.job("j").state == "acked"
        assert node.result("j", {"x": b"1"}).status_code == 200
        assert node.pull(known=("j",))["job_id"] == "j"
        assert node.result("j", {"x": b"1"}).json() == {"duplicate": True}
        assert (mock.job("j").state, len(mock.job("j").handed)) == ("done", 3)


def test_jobs_have_ids_of_their_own(mock: MockCoordinator) -> None:
    assert mock.submit({"runner": "cli"}) == "job-0001"
    with pytest.raises(ValueError, match="the id is taken"):
        mock.submit(manifest("job-0001"))


def test_ack_wants_body_and_query_and_the_lease(mock: MockCoordinator, node: Client) -> None:
    mock.submit(manifest("j"))
    named = {"job_id": "j", "node_id": "node-1"}
    assert node.ack("j").status_code == 409, "not handed out yet"
    node.pull()
    for query in ({}, {"job_id": "j"}, {"job_id": "other", "node_id": "node-1"}):
        assert node.post("/jobs/ack", named, params=query).status_code == 400
    assert node.post("/jobs/ack", params=named).status_code == 400
    with Client(mock, "node-2") as other:
        assert other.ack("j").status_code == 409
    assert node.ack("unknown").status_code == 409
    assert (mock.job("j").state, mock.job("j").acks) == ("leased", 0)


def test_cancel_reaches_the_node_with_its_next_progress(mock: MockCoordinator, node: Client) -> None:
    mock.submit(manifest("j"))
    node.run("j")
    mock.cancel("j")
    assert node.progress("j").json() == {"cancel": True}
    assert mock.job("j").state == "acked"
    assert node.fail("j", code="E_CANCELLED").status_code == 200
    assert mock.job("j").error_code == "E_CANCELLED"
    assert node.progress("j").status_code == 409


def test_cancel_before_the_ack_ends_the_job(mock: MockCoordinator, node: Client) -> None:
    mock.submit(manifest("queued"))
    mock.cancel("queued")
    assert node.pull() is None
    mock.submit(manifest("leased"))
    node.pull()
    mock.cancel("leased")
    assert node.ack("leased").status_code == 409
    assert {job.state.value for job in mock.ledger.jobs().values()} == {"failed"}


@pytest.mark.parametrize(("pct", "note"), [("half", ""), (None, ""), (True, ""), (1, 7)])
def test_progress_is_checked(mock: MockCoordinator, node: Client, pct: object, note: object) -> None:
    mock.submit(manifest("j"))
    node.run("j")
    assert node.progress("j", pct, note).status_code == 400
    assert mock.job("j").progress == ()


# Raw replies.


def test_raw_jobs_are_sent_verbatim_and_answered(mock: MockCoordinator, node: Client) -> None:
    named = mock.submit_raw(b'{"job_id":  "j-raw", "runner": 7}')
    nameless = mock.submit_raw(b'{"job_id": "../../etc", "x": NaN}')
    broken = mock.submit_raw(b"{nonsense")
    again = mock.submit_raw(b'{"job_id": "j-raw"}')
    assert (named, nameless) == ("j-raw", "../../etc")
    assert {broken, again} == {"raw-0003", "raw-0004"}
    texts = [node.post("/jobs/pull", {"node_id": "node-1", "filters": {"slots": []}}).text for _ in range(4)]
    assert texts[0] == '{"job": {"job_id":  "j-raw", "runner": 7}}'
    assert texts[2] == '{"job": {nonsense}'
    assert node.fail("j-raw", "k1", "E_MANIFEST").status_code == 200
    assert node.fail("../../etc", "k2", "E_MANIFEST").status_code == 200
    assert node.fail(None, "k3", "E_MANIFEST").status_code == 200, "answers the job that cannot be named"
    assert [mock.job(job_id).error_code for job_id in (named, nameless, broken)] == ["E_MANIFEST"] * 3
    assert mock.job(again).state == "leased"


def test_a_whole_reply_can_be_raw(mock: MockCoordinator, node: Client) -> None:
    mock.submit_raw(b"[1, 2", whole_reply=True)
    assert mock.submit_raw(b'{"job": {"job_id": "inside"}}', whole_reply=True) == "inside"
    deep = mock.submit_raw(b"[" * 100_000 + b"]" * 100_000)
    bodies = [node.post("/jobs/pull", {"node_id": "node-1"}).content for _ in range(3)]
    assert bodies[:2] == [b"[1, 2", b'{"job": {"job_id": "inside"}}']
    assert len(bodies[2]) > 200_000
    assert mock.job(deep).state == "leased"
    assert node.get("/state.json").status_code == 200


# Reports.


def test_the_same_key_counts_once_and_another_is_a_conflict(mock: MockCoordinator, node: Client) -> None:
    mock.submit(manifest("j"))
    node.run("j")
    assert node.result("j", {"x": b"1"}, "k").json() == {"accepted": True}
    assert node.result("j", {"x": b"1"}, "k").json() == {"duplicate": True}
    assert node.result("j", {"x": b"2"}, "other").status_code == 409
    assert node.result("j", {"x": b"2"}, None).status_code == 409
    assert node.fail("j", "k").status_code == 409, "a failure is not the report that was counted"
    job = mock.job("j")
    assert [report.verdict for report in job.reports] == [
        Verdict.ACCEPTED,
        Verdict.DUPLICATE,
        *[Verdict.CONFLICT] * 3,
    ]
    assert [report.key for report in job.reports] == ["k", "k", "other", None, "k"]
    assert len(saved(mock)) == 1, "only what was accepted is kept"


def test_failures_count_once_too(mock: MockCoordinator, node: Client) -> None:
    mock.submit(manifest("j"))
    node.run("j")
    assert node.fail("j").json() == {"accepted": True}
    assert node.fail("j").json() == {"duplicate": True}
    assert node.fail("j", "other").status_code == 409
    assert (mock.job("j").state, mock.job("j").error_code) == ("failed", "E_EXIT")
    assert node.post("/jobs/fail", {"job_id": "j", "error_code": "E_EXIT"}).status_code == 400


def test_a_key_belongs_to_one_job(mock: MockCoordinator, node: Client) -> None:
    for job_id in ("a", "b"):
        mock.submit(manifest(job_id))
        node.run(job_id)
    assert node.fail("a", "k").status_code == 200
    reply = node.fail("b", "k")
    assert reply.status_code == 400
    assert "used for job 'a'" in reply.json()["error"]["message"]


def test_a_result_that_comes_after_its_lease_is_still_counted() -> None:
    with MockCoordinator(lease_s=0.05) as mock, Client(mock) as one, Client(mock, "node-2") as two:
        mock.submit(manifest("j"))
        one.pull()
        mock.wait(lambda ledger: ledger.job("j").state == "queued", 5)
        reply = two.result("j", {"x": b""})
        assert (reply.status_code, "never handed" in reply.text) == (400, True)
        assert one.result("j", {"x": b""}).status_code == 200
        assert two.pull() is None


def test_reports_on_unknown_jobs_are_404_and_kept(mock: MockCoordinator, node: Client) -> None:
    assert node.fail("nobody").status_code == 404
    assert node.result("nobody", {"x": b"1"}).status_code == 404
    assert [report.job_id for report in mock.ledger.strays()] == ["nobody", "nobody"]
    assert saved(mock) == []


def test_what_was_uploaded_must_be_what_the_metadata_says(mock: MockCoordinator, node: Client) -> None:
    mock.submit(manifest("j"))
    node.run("j")
    good = {"a.txt": b"data"}
    for files, told in (
        (good, {"a.txt": b"datA"}),
        (good, {"a.txt": b"data", "b.txt": b""}),
        (good, {}),
        ({}, {}),
    ):
        assert node.result("j", files, told=told).status_code == 400
    for metadata in ("not json", "[]", "[" * 50_000, '{"artifacts": 3}', '{"artifacts": ["a.txt"]}'):
        assert node.result("j", good, metadata=metadata).status_code == 400
    assert mock.job("j").state == "acked"
    assert mock.job("j").reports[0].complaint == "artifacts differ from metadata.artifacts: a.txt"
    assert saved(mock) == []
    assert node.result("j", good, metadata="{}").status_code == 200, "the list may be missing"


def test_artifact_names_never_become_paths(mock: MockCoordinator, node: Client) -> None:
    mock.submit(manifest("j"))
    node.run("j")
    names = ["../../escape", "/etc/passwd", 'quo"te', "naïve 文.txt", "a/b\\\\c", "<x>; name=y", "x" * 300]
    assert node.result("j", {name: name.encode() for name in names}).status_code == 200
    report = mock.job("j").accepted
    assert report is not None
    assert [each.path for each in report.artifacts] == names
    assert all(each.file.parent == mock.out_dir for each in report.artifacts)
    assert all(re.fullmatch(r"artifact-[0-9a-f]{16}", path.name) for path in saved(mock))


def test_wait_gives_up_and_says_where_things_are(mock: MockCoordinator) -> None:
    mock.submit(manifest("j"))
    with pytest.raises(TimeoutError, match="'j': 'queued'"):
        mock.wait(lambda ledger: ledger.job("j").state == "done", 0.01)


def test_wait_wakes_with_the_change(mock: MockCoordinator, node: Client) -> None:
    mock.fault("heartbeat", "delay:0.2")
    thread = threading.Thread(target=node.heartbeat)
    begin = now()
    thread.start()
    assert mock.wait(lambda ledger: ledger.calls("heartbeat"), 10)[0].credentials
    assert now() - begin < 5
    thread.join()
