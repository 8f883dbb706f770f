"""The table of what counts as an answer: by dialect, call, status and body."""

import json

import pytest

from aitbc_miner.coordinator.answers import AITBC, BOOTSTRAP, Dialect, answer, check
from aitbc_miner.coordinator.http import HttpReply
from aitbc_miner.coordinator.interface import Busy, CoordinatorError, Gone, Refused, Unreachable

DIALECTS = {"bootstrap": BOOTSTRAP, "aitbc-v1": AITBC}
CALLS = [(name, call) for name, dialect in DIALECTS.items() for call in dialect.calls]
YES = {
    "register": {"node_token": "t", "status": "ok"},
    "jobs": {"jobs": [], "total": 0},
    "leave": {"miner_id": "n", "status": "deregistered"},
}
NEVER = (
    *(
        b"null",
        b"[]",
        b'""',
        b'"ok"',
        b"0",
        b"true",
        b"<html>log in</html>",
        b'{"status": "ok"',
        b"\xff",
        b" ",
    ),
    *(b'{"error": "Failed to list jobs", "jobs": [], "status": "ok", "node_token": "t"}',),
    b'{"error": {"code": "busy", "message": "in maintenance"}, "status": "ok", "node_token": "t"}',
    *(b'{"error": true, "jobs": [], "job": null, "status": "ok", "node_token": "t"}',),
    *(b'{"error": ["no database"], "jobs": [], "job": null, "status": "ok", "node_token": "t"}',),
)


def said(dialect: Dialect, call: str, reply: HttpReply) -> dict[str, object]:
    return answer(reply, dialect.calls[call], dialect, "ask", "the token")


@pytest.mark.parametrize(("name", "call"), CALLS)
def test_what_is_an_answer(name: str, call: str) -> None:
    yes = YES.get(call, {"status": "ok"})
    assert said(DIALECTS[name], call, HttpReply(200, json.dumps(yes).encode())) == yes


@pytest.mark.parametrize(("name", "call"), CALLS)
@pytest.mark.parametrize("body", NEVER)
def test_what_is_never_one(name: str, call: str, body: bytes) -> None:
    with pytest.raises(Unreachable):
        said(DIALECTS[name], call, HttpReply(200, body))


@pytest.mark.parametrize(("name", "call"), CALLS)
def test_no_body_is_one_where_a_status_alone_is_named(name: str, call: str) -> None:
    if name == "bootstrap" and call not in {"register", "pull"}:
        assert said(DIALECTS[name], call, HttpReply(200)) == {}
        return
    with pytest.raises(Unreachable):
        said(DIALECTS[name], call, HttpReply(200))


@pytest.mark.parametrize(("name", "call"), CALLS)
@pytest.mark.parametrize("status", [201, 202, 203, 204, 206, 299])
def test_no_other_status_says_yes_but_204_where_there_may_be_no_job(
    name: str, call: str, status: int
) -> None:
    dialect = DIALECTS[name]
    if status == 204 and call in {"pull", "poll"}:
        check(HttpReply(204), dialect.calls[call], dialect, "ask", "the token")
        return
    with pytest.raises(Unreachable):
        said(dialect, call, HttpReply(status, json.dumps(YES.get(call, {"status": "ok"})).encode()))


@pytest.mark.parametrize("call", [call for call in AITBC.calls if call not in YES and call != "poll"])
@pytest.mark.parametrize("body", [b"{}", b'{"status": "failed"}', b'{"status": true}', b'{"ok": true}'])
def test_in_aitbc_an_object_must_say_ok(call: str, body: bytes) -> None:
    with pytest.raises(Unreachable):
        said(AITBC, call, HttpReply(200, body))


OWN = {
    "bootstrap": [b'{"error": {"code": "x", "message": "no", "details": {}}}'],
    "aitbc-v1": [
        b'{"detail": "job not found"}',
        b'{"error": {"code": "VALIDATION_ERROR", "message": "no", "status": 422, "details": []}}',
        b'{"error": {"type": "internal_error", "message": "no", "status_code": 400, "path": "/"}}',
    ],
}
FOREIGN = (
    *(
        b"",
        b"<html><h1>404 Not Found</h1><center>nginx</center>",
        b"404 page not found",
        b"[]",
        b"{}",
        b"null",
    ),
    *(b'{"message": "no Route matched with those values"}', b'{"detail": "Not Found"}'),
    *(
        b'{"timestamp": "2026", "status": 404, "error": "Not Found", "path": "/"}',
        b'{"detail": [{"loc": []}]}',
    ),
    b'{"error": {"code": 404, "message": "not here", "status": "NOT_FOUND"}}',
)


@pytest.mark.parametrize(("name", "call"), CALLS)
@pytest.mark.parametrize("status", [400, 402, 404, 405, 409, 410, 413, 422, 451])
def test_only_the_coordinator_itself_can_refuse(name: str, call: str, status: int) -> None:
    for body in FOREIGN:
        with pytest.raises(CoordinatorError) as caught:
            said(DIALECTS[name], call, HttpReply(status, body))
        assert not isinstance(caught.value, Refused | Gone), body
    refusable = call in {"register", "ack", "result", "fail"}
    for body in OWN[name]:
        with pytest.raises(CoordinatorError) as caught:
            said(DIALECTS[name], call, HttpReply(status, body))
        assert isinstance(caught.value, Refused | Gone) == refusable, body


@pytest.mark.parametrize(("name", "call"), CALLS)
def test_no_call_rests_for_an_hour(name: str, call: str) -> None:
    with pytest.raises(Busy) as caught:
        said(DIALECTS[name], call, HttpReply(503, retry_after=3600.0))
    assert caught.value.retry_after is not None
    assert caught.value.retry_after <= 600
