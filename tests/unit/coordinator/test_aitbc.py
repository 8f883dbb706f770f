"""The dialect aitbc-v1 against a coordinator of canned answers: what is sent, and what each answer means."""

import base64
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import pytest
import responses

from aitbc_miner.config.settings import CoordinatorSection
from aitbc_miner.coordinator.aitbc import LIMITS, AitbcCoordinator, Profile
from aitbc_miner.coordinator.http import HttpClient
from aitbc_miner.coordinator.interface import (
    Busy,
    CoordinatorError,
    Gone,
    Heartbeat,
    Paced,
    PullFilters,
    Refused,
    Standing,
    Unauthorized,
    UnknownNode,
    Unreachable,
)
from aitbc_miner.coordinator.rate_limits import Limits
from aitbc_miner.coordinator.services import ServiceBook
from aitbc_miner.errors import ErrorCode
from aitbc_miner.jobs import LogInfo, Outcome, Usage
from tests.support.stopped_clock import Time

Scheme = Literal["bearer", "api_key"]
URL = "http://127.0.0.1:8203/v1"
KEY = "demo-key-0123456789"
JOB = "0123456789abcdef0123456789abcdef"
PAYLOAD = {"type": "words", "text": "a b a"}
SERVICE = """
service: words
match: {types: [words]}
models: ["tiny:1"]
fields:
  text: {type: text, required: true, max_bytes: 1000}
run: {command: wc, args: ["{text}"]}
result:
  said: {log: true}
"""
CAPABILITIES = {
    "node_id": "n1",
    "gpu": [{"vendor": "nvidia", "name": "NVIDIA X", "uuid": "GPU-1", "vram_mb": 24564, "cuda": {}}],
    "slots": [{"name": "cpu0"}, {"name": "cpu1", "offers": False}, {"name": "gpu0"}],
}
DONE = Outcome(job_id=JOB, usage=Usage(wall_s=1.2345), log=LogInfo(bytes=4, tail="said"))
FAILED = Outcome(
    job_id=JOB, code=ErrorCode.E_EXIT, message="exit status 3", log=LogInfo(tail="no\x1b[31m\nfile")
)


def token(**claims: Any) -> str:
    parts = [{"alg": "HS256"}, {"sub": "m-1", "role": "miner", "exp": 2e9, **claims}]
    texts = [base64.urlsafe_b64encode(json.dumps(part).encode()).decode().rstrip("=") for part in parts]
    return ".".join([*texts, "c2ln"])


@pytest.fixture
def wire() -> Iterator[responses.RequestsMock]:
    with responses.RequestsMock(assert_all_requests_are_fired=False) as mocked:
        yield mocked


@pytest.fixture
def services(tmp_path: Path) -> Path:
    directory = tmp_path / "services.d"
    directory.mkdir()
    (directory / "words.yaml").write_text(SERVICE)
    return directory


def client(
    services: Path,
    scheme: Scheme = "api_key",
    credential: str = KEY,
    cuda: Sequence[str] = (),
    **settings: Any,
) -> AitbcCoordinator:
    there = CoordinatorSection(URL, "env:MINER_AUTH", dialect="aitbc-v1", auth_scheme=scheme, **settings)
    made = Profile("n1", "env:MINER_AUTH", there, cuda)
    limits = Limits(services.parent / "calls.json", LIMITS)
    http = HttpClient(URL, 5, auth_scheme=scheme)
    found = AitbcCoordinator(http, made, credential, ServiceBook(services), limits)
    found.use_token(credential)
    return found


@pytest.fixture
def there(services: Path) -> AitbcCoordinator:
    return client(services)


def say(wire: responses.RequestsMock, path: str, body: Any = None, status: int = 200, **more: Any) -> None:
    text = body if isinstance(body, bytes | str) else json.dumps(body)
    wire.add(responses.POST, URL + path, text, status=status, **more)


def sent(wire: responses.RequestsMock, number: int = -1) -> Any:
    return json.loads(wire.calls[number].request.body or "null")


def assigned(payload: Any = None, job_id: str = JOB) -> dict[str, Any]:
    return {"job_id": job_id, "payload": PAYLOAD if payload is None else payload, "constraints": {}}


def view(state: str = "RUNNING", job_id: str = JOB, **more: Any) -> dict[str, Any]:
    return {"job_id": job_id, "payload": PAYLOAD, "state": state, "expires_at": None, **more}


def listed(*jobs: dict[str, Any]) -> dict[str, Any]:
    return {"jobs": list(jobs), "total": len(jobs), "limit": 100, "offset": 0, "miner_id": "n1"}


# --- who we are --------------------------------------------------------------------------------------------


def test_an_api_key_goes_with_the_miners_id_and_without_authorization(
    wire: responses.RequestsMock, there: AitbcCoordinator
) -> None:
    say(wire, "/miners/poll", b"", 204)
    assert there.pull(PullFilters()) is None
    headers = wire.calls[0].request.headers
    assert (headers["X-Api-Key"], headers["X-Miner-ID"]) == (KEY, "n1")
    assert "Authorization" not in headers
    assert headers["Content-Type"] == "application/json"


def test_a_bearer_token_goes_alone(wire: responses.RequestsMock, services: Path) -> None:
    say(wire, "/miners/poll", b"", 204)
    client(services, "bearer", token()).pull(PullFilters())
    headers = wire.calls[0].request.headers
    assert headers["Authorization"] == f"Bearer {token()}"
    assert not {"X-Api-Key", "X-Miner-ID"} & set(headers)


def test_with_a_bearer_token_we_are_who_it_says(wire: responses.RequestsMock, services: Path) -> None:
    say(wire, "/miners/m-1/jobs", listed())
    assert client(services, "bearer", token()).assignments().jobs == []


@pytest.mark.parametrize(
    ("scheme", "credential", "status", "said"),
    [
        ("api_key", KEY, 401, "does not accept the credential from env:MINER_AUTH as an API key"),
        ("api_key", token(), 401, "is a JSON web token; set coordinator.auth_scheme: bearer"),
        ("bearer", KEY, 401, "is no JSON web token; for an API key set coordinator.auth_scheme: api_key"),
        ("bearer", token(), 401, "it was signed with another key"),
        ("bearer", token(exp=1e9), 401, "expired at 2001-09-09 01:46 UTC"),
        ("bearer", token(exp=1e300), 401, "it was signed with another key"),
        ("bearer", token(exp=-1e300), 401, "it was signed with another key"),
        ("bearer", token(role="client"), 403, "has the role 'client'; ask for a token with the role 'miner'"),
        ("bearer", token(), 403, "although the token's role is miner"),
    ],
)
def test_what_is_wrong_with_a_credential_is_told(
    scheme: Scheme, credential: str, status: int, said: str, wire: responses.RequestsMock, services: Path
) -> None:
    say(wire, "/miners/register", {"detail": "whatever"}, status)
    with pytest.raises(Unauthorized, match=said) as error:
        client(services, scheme, credential).register(CAPABILITIES)
    assert credential not in str(error.value)


def test_registration_says_what_the_matcher_reads(wire: responses.RequestsMock, services: Path) -> None:
    say(wire, "/miners/register", {"status": "ok", "session_token": "f" * 32})
    there = client(services, region="eu", price=0.5, cuda=("11.8.0", "12.4.1"))
    assert there.register(CAPABILITIES) == KEY, "the session token is accepted nowhere"
    body = sent(wire)
    assert (body["concurrency"], body["region"]) == (2, "eu")
    told = body["capabilities"]
    assert told["gpus"] == [{"name": "NVIDIA X", "memory_mb": 24564, "uuid": "GPU-1"}]
    assert (told["cuda"], told["models"], told["price"]) == ("11.8.0 12.4.1", ["tiny:1"], 0.5)
    assert told["slots"] == CAPABILITIES["slots"]
    assert "reputation_score" not in told


def test_what_is_not_known_is_not_said_and_no_slot_is_not_unlimited(
    wire: responses.RequestsMock, there: AitbcCoordinator
) -> None:
    say(wire, "/miners/register", {"status": "ok"})
    there.register({**CAPABILITIES, "slots": []})
    body = sent(wire)
    assert body["concurrency"] == -1
    assert not {"cuda", "price"} & set(body["capabilities"])


def test_heartbeat(wire: responses.RequestsMock, there: AitbcCoordinator) -> None:
    say(wire, "/miners/heartbeat", {"status": "ok"})
    there.heartbeat(Heartbeat("n1", 0.5, 100, 0, [{"name": "cpu0"}], inflight=3))
    assert (sent(wire)["inflight"], sent(wire)["status"]) == (3, "ONLINE")
    there.heartbeat(Heartbeat("n1", 0.5, 100, 0, accepting=False))
    assert (sent(wire)["inflight"], sent(wire)["status"]) == (0, "DRAINING")


def test_an_unknown_miner_registers_again(wire: responses.RequestsMock, there: AitbcCoordinator) -> None:
    say(wire, "/miners/heartbeat", {"detail": "miner not registered"}, 404)
    say(wire, "/miners/poll", {"error": {"type": "internal_error"}}, 500)
    with pytest.raises(UnknownNode):
        there.heartbeat(Heartbeat("n1", 0.5, 100, 0))
    with pytest.raises(UnknownNode):
        there.pull(PullFilters())


def test_leaving(wire: responses.RequestsMock, there: AitbcCoordinator) -> None:
    for status, body in ((200, {"status": "deregistered"}), (404, {"detail": "no"})):
        wire.add(responses.DELETE, URL + "/miners/n1", json.dumps(body), status=status)
        there.leave()
    assert len(wire.calls) == 2


# --- jobs that come ----------------------------------------------------------------------------------------


def test_a_job_is_put_into_our_words(wire: responses.RequestsMock, there: AitbcCoordinator) -> None:
    say(wire, "/miners/poll", assigned())
    job = there.pull(PullFilters())
    assert job is not None
    assert job.manifest is not None
    assert (job.manifest.job_id, job.manifest.command, job.manifest.args) == (JOB, "wc", ["a b a"])
    assert json.loads(job.raw)["service"]["name"] == "words"
    there.ack(JOB)
    assert len(wire.calls) == 1, "the reply to the poll has made it ours"


@pytest.mark.parametrize(
    ("payload", "code"),
    [
        ({"type": "mine bitcoin"}, ErrorCode.E_DENY),
        ({}, ErrorCode.E_DENY),
        ({"type": "words"}, ErrorCode.E_MANIFEST),
        ({"type": "words", "text": 7}, ErrorCode.E_MANIFEST),
    ],
)
def test_what_no_service_takes_is_refused_by_name(
    payload: dict[str, Any], code: ErrorCode, wire: responses.RequestsMock, there: AitbcCoordinator
) -> None:
    say(wire, "/miners/poll", assigned(payload))
    job = there.pull(PullFilters())
    assert job is not None
    assert job.error is not None
    assert (job.error.job_id, job.error.code) == (JOB, code)
    assert json.loads(job.raw)["payload"] == payload


@pytest.mark.parametrize(
    "body",
    [
        json.dumps(assigned({"type": "words", "text": "x" * 300_000})),
        json.dumps(assigned(None)).replace('"a b a"', "[" * 5000 + "]" * 5000),
        json.dumps(assigned(None)).replace('"a b a"', "{" + '"a":[' * 50_000),
        json.dumps(assigned(None))[:-30],
        json.dumps({"job_id": JOB, "payload": "text"}),
    ],
    ids=["large", "deep", "open", "cut", "no object"],
)
def test_what_cannot_be_read_is_refused_by_name(
    body: str, wire: responses.RequestsMock, there: AitbcCoordinator
) -> None:
    say(wire, "/miners/poll", body)
    job = there.pull(PullFilters())
    assert job is not None
    assert job.error is not None
    assert job.error.job_id == JOB


@pytest.mark.parametrize("body", [b"", b"<html>", b"{}", b"[]", b"null", b'{"payload": {"job_id": "x"}}'])
def test_garbage_names_nobody(body: bytes, wire: responses.RequestsMock, there: AitbcCoordinator) -> None:
    say(wire, "/miners/poll", body)
    with pytest.raises(Unreachable):
        there.pull(PullFilters())


def test_the_list_of_our_jobs(wire: responses.RequestsMock, there: AitbcCoordinator) -> None:
    # The coordinator's clock, not ours: by ours its time may have been over for years.
    jobs = [view(expires_at="2001-01-01T00:01:30"), view("RUNNING", "b" * 32, payload={"type": "odd"})]
    say(wire, "/miners/n1/jobs", listed(*jobs), headers={"Date": "Mon, 01 Jan 2001 00:00:00 GMT"})
    found = there.assignments()
    assert found.complete
    assert [(each.job_id, each.left_s) for each in found.jobs] == [(JOB, 90.0), ("b" * 32, None)]
    assert found.jobs[0].job.manifest is not None
    assert found.jobs[1].job.error is not None
    assert wire.calls[0].request.url == f"{URL}/miners/n1/jobs?job_status=RUNNING&limit=100&offset=0"
    assert wire.calls[0].request.body is None


def test_a_long_list_comes_in_pages(wire: responses.RequestsMock, there: AitbcCoordinator) -> None:
    say(wire, "/miners/n1/jobs", listed(*(view(job_id=f"{n:032x}") for n in range(100))))
    say(wire, "/miners/n1/jobs", listed(view(job_id="b" * 32)))
    found = there.assignments()
    assert (len(found.jobs), found.complete) == (101, True)


def test_an_endless_page_is_no_list(wire: responses.RequestsMock, there: AitbcCoordinator) -> None:
    """Half a million jobs fit the bytes of a page, and would keep us busy for minutes."""
    say(wire, "/miners/n1/jobs", {"jobs": [{"job_id": "a"}] * 200_000})
    with pytest.raises(Unreachable, match="garbage reply: a page of 200000 jobs"):
        there.assignments()


def test_a_job_that_makes_the_list_unreadable_is_refused_by_name(
    wire: responses.RequestsMock, there: AitbcCoordinator
) -> None:
    large = json.dumps(listed(view(payload={"type": "words", "text": "x" * (9 << 20)})))
    for _ in range(3):
        say(wire, "/miners/n1/jobs", large)
    say(wire, "/miners/n1/jobs", listed())
    found = there.assignments()
    assert [each.job_id for each in found.jobs] == [JOB]
    assert found.jobs[0].job.error is not None
    assert [call.request.url.partition("limit=")[2] for call in wire.calls if call.request.url] == [
        "100&offset=0",
        "10&offset=0",
        "1&offset=0",
        "1&offset=1",
    ]


@pytest.mark.parametrize("odd", ["1e999", '"\\ud800"', "[" * 5000 + "]" * 5000, "-", "tru"])
def test_a_job_that_cannot_be_read_hides_no_other(
    odd: str, wire: responses.RequestsMock, there: AitbcCoordinator
) -> None:
    text = json.dumps(listed(view(), view(job_id="b" * 32)))
    first, _, rest = text.partition('"a b a"')
    say(wire, "/miners/n1/jobs", f"{first}{odd}{rest}")
    try:
        found = there.assignments()
    except Unreachable:
        # What is no JSON at all, or too deep to be passed over; then it is asked for again.
        assert odd != "1e999"
        return
    assert [(each.job_id, each.job.error is None) for each in found.jobs] == [(JOB, False), ("b" * 32, True)]


@pytest.mark.parametrize("state", ["COMPLETED", "CANCELED", "EXPIRED", None])
def test_a_job_of_before_is_run_only_while_it_is_ours(
    state: str | None, wire: responses.RequestsMock, there: AitbcCoordinator
) -> None:
    say(wire, "/miners/n1/jobs", listed(*([view(state)] if state else [])))
    with pytest.raises(Gone):
        there.ack(JOB)
    wire.replace(responses.POST, URL + "/miners/n1/jobs", json.dumps(listed(view())))
    there.ack(JOB)


# --- what came of them -------------------------------------------------------------------------------------


@pytest.fixture
def root(there: AitbcCoordinator, tmp_path: Path) -> Path:
    directory = tmp_path / JOB
    (directory / "logs").mkdir(parents=True)
    (directory / "logs" / "exec.log").write_text("said")
    manifest = ServiceBook(tmp_path / "services.d").manifest(JOB, PAYLOAD)
    (directory / "manifest.json").write_text(json.dumps(manifest))
    return directory


RESULT, FAIL = f"/miners/{JOB}/result", f"/miners/{JOB}/fail"


def test_a_result(wire: responses.RequestsMock, there: AitbcCoordinator, root: Path) -> None:
    say(wire, RESULT, {"status": "ok", "receipt": None})
    told = there.result(JOB, DONE, root, "key")
    assert (told.receipt, told.beat) == (None, False)
    body = sent(wire)
    assert body["result"]["said"] == "said"
    assert body["metrics"]["duration_ms"] == 1234 or body["metrics"]["duration_ms"] == 1235


def test_a_receipt_that_does_not_verify_is_kept(
    wire: responses.RequestsMock, there: AitbcCoordinator, root: Path
) -> None:
    say(wire, RESULT, {"status": "ok", "receipt": {"job_id": JOB, "units": 1.5}})
    receipt = there.result(JOB, DONE, root, "key").receipt
    assert receipt is not None
    assert not receipt.verified
    assert receipt.receipt["units"] == 1.5


def test_a_failure_says_its_code_where_its_client_sees_it(
    wire: responses.RequestsMock, there: AitbcCoordinator
) -> None:
    say(wire, FAIL, {"status": "ok"})
    told = there.fail(JOB, FAILED, "key")
    assert told.beat, "until the next heartbeat the slot counts as taken"
    body = sent(wire)
    assert body["error_code"] == "E_EXIT"
    assert body["error_message"] == "E_EXIT: exit status 3 | the end of its log: no [31m file"


@pytest.mark.parametrize(("state", "sends"), [("COMPLETED", 0), ("RUNNING", 1), ("EXPIRED", 1), (None, 1)])
def test_a_result_whose_answer_was_lost_is_sent_again_only_if_it_did_not_count(
    state: str | None, sends: int, wire: responses.RequestsMock, there: AitbcCoordinator, root: Path
) -> None:
    say(wire, RESULT, {"status": "ok"})
    say(wire, "/miners/n1/jobs", listed(*([view(state)] if state else [])))
    there.result(JOB, DONE, root, "key", again=True)
    assert sum("result" in str(call.request.url) for call in wire.calls) == sends


def test_what_was_refused_for_now_did_not_count(
    wire: responses.RequestsMock, there: AitbcCoordinator, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    time = Time(monkeypatch)
    say(wire, RESULT, {"detail": "Rate limit exceeded"}, 429, headers={"Retry-After": "60"})
    with pytest.raises(Busy) as error:
        there.result(JOB, DONE, root, "key")
    assert error.value.retry_after is not None
    assert error.value.retry_after <= 10, "60 is what it always says, and never how long it takes"
    with pytest.raises(Paced):
        there.result(JOB, DONE, root, "key", again=True)
    say(wire, f"/miners/{'f' * 32}/fail", {"status": "ok"})
    there.fail("f" * 32, FAILED, "key")
    time.now += 2
    wire.replace(responses.POST, URL + RESULT, json.dumps({"status": "ok"}))
    there.result(JOB, DONE, root, "key", again=True)
    assert len(wire.calls) == 3, "nobody was asked for the job's state"


@pytest.mark.parametrize(
    ("status", "asks"), [(500, True), (502, True), (401, False), (503, True), (400, True)]
)
def test_after_an_error_of_the_server_nobody_knows(
    status: int, asks: bool, wire: responses.RequestsMock, there: AitbcCoordinator, root: Path
) -> None:
    say(wire, RESULT, {"detail": "no"}, status)
    with pytest.raises(CoordinatorError):
        there.result(JOB, DONE, root, "key")
    wire.replace(responses.POST, URL + RESULT, json.dumps({"status": "ok"}))
    say(wire, "/miners/n1/jobs", listed(view("COMPLETED")))
    there.result(JOB, DONE, root, "key", again=True)
    assert ("jobs?" in str(wire.calls[-1].request.url)) == asks


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        ({"detail": "job not found"}, Refused),
        ({"detail": "Not Found"}, CoordinatorError),
        ("<html>", CoordinatorError),
        ("{}", CoordinatorError),
    ],
)
def test_only_the_coordinator_can_say_that_a_job_is_unknown(
    body: Any, kind: type[Exception], wire: responses.RequestsMock, there: AitbcCoordinator, root: Path
) -> None:
    say(wire, RESULT, body, 404)
    with pytest.raises(kind) as error:
        there.result(JOB, DONE, root, "key")
    assert type(error.value) is kind


@pytest.mark.parametrize("body", [b"", b"<html>", b"[]", b'"ok"'])
def test_a_page_that_says_yes_to_all_is_no_yes(
    body: bytes, wire: responses.RequestsMock, there: AitbcCoordinator, root: Path
) -> None:
    say(wire, RESULT, body)
    with pytest.raises(Unreachable):
        there.result(JOB, DONE, root, "key")


def test_a_result_that_is_refused_is_refused(
    wire: responses.RequestsMock, there: AitbcCoordinator, root: Path
) -> None:
    say(wire, RESULT, {"error": {"code": "VALIDATION_ERROR", "message": "too odd"}}, 422)
    with pytest.raises(Refused, match="too odd"):
        there.result(JOB, DONE, root, "key")


def test_a_job_that_its_client_cancelled_is_not_reported(
    wire: responses.RequestsMock, there: AitbcCoordinator
) -> None:
    cancelled = Outcome(job_id=JOB, code=ErrorCode.E_CANCELLED, message="cancelled")
    say(wire, "/miners/n1/jobs", listed())
    with pytest.raises(Gone):
        there.fail(JOB, cancelled, "key")
    # The operator did: its client is told.
    wire.replace(responses.POST, URL + "/miners/n1/jobs", json.dumps(listed(view())))
    say(wire, FAIL, {"status": "ok"})
    there.fail(JOB, cancelled, "key")


# --- why there is nothing ----------------------------------------------------------------------------------


def test_the_causes_of_an_empty_poll_are_those_that_apply(services: Path) -> None:
    bare = "\n".join(client(services).why_idle(Standing(succeeded=7, failed=3)))
    assert "3 of the 10 jobs of this node failed" in bare
    assert "coordinator.price" in bare
    assert "coordinator.region" in bare
    assert "bond" in bare
    assert "offers no service" not in bare
    told = "\n".join(client(services, region="eu", price=1.0, cuda=("12",)).why_idle(Standing(succeeded=7)))
    assert "reputation" not in told
    assert "coordinator.price" not in told


def test_without_a_service_that_is_the_first_cause(services: Path) -> None:
    (services / "words.yaml").unlink()
    assert "offers no service" in client(services).why_idle(Standing())[0]
