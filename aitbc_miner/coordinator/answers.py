"""What counts as an answer: for each call of each dialect, in one table, which reply means what.

Proxies, login pages and a coordinator in maintenance answer, too. What is no answer by this table says
nothing: it is as if the answer had been lost. And only the coordinator itself, in the form of its own errors,
can refuse a thing.
"""

from collections.abc import Callable, Mapping
from typing import Any

import msgspec
from msgspec import Struct

from aitbc_miner.coordinator.http import HttpReply, clean
from aitbc_miner.coordinator.interface import (
    Busy,
    CoordinatorError,
    Gone,
    Refused,
    Unauthorized,
    UnknownNode,
    Unreachable,
)

ABOUT_US = frozenset({403, 408, 425})
"""What answers 403 is as often a filter on the way, or a credential that has just expired."""
FINAL_THERE = frozenset({409, 410})


class Call(Struct, frozen=True):
    """What the replies to one call mean.

    holds: whether a JSON object, which says of no error, is the answer. empty: no body at all is one, too.
    nothing, strange, gone: the statuses for "there is none", UnknownNode and Gone. refusable: any other 4xx
    is Refused. patience_s: the longest that the coordinator may ask us to leave this call alone.
    """

    holds: Callable[[Mapping[str, Any]], bool] = lambda _: True
    empty: bool = False
    nothing: frozenset[int] = frozenset()
    strange: frozenset[int] = frozenset()
    denied: frozenset[int] = frozenset({401})
    gone: frozenset[int] = frozenset()
    refusable: bool = False
    patience_s: float = 300.0


class Dialect(Struct, frozen=True):
    """The calls of a dialect, and what its coordinator's own errors look like."""

    calls: Mapping[str, Call]
    is_error: Callable[[Mapping[str, Any]], bool]


def _is_bootstrap_error(body: Mapping[str, Any]) -> bool:
    error = body.get("error")
    return isinstance(error, dict) and _texts(error, "message") and isinstance(error.get("code", ""), str)


def _is_aitbc_error(body: Mapping[str, Any]) -> bool:
    # What its framework says of a path that is not there, other services say in the same words.
    if isinstance(said := body.get("detail"), str):
        return said not in {"", "Not Found", "Method Not Allowed"}
    error = body.get("error")
    return isinstance(error, dict) and (_texts(error, "code", "message") or _texts(error, "type", "message"))


def _texts(body: Mapping[str, Any], *names: str) -> bool:
    return all(isinstance(body.get(name), str) for name in names)


def _is_ok(body: Mapping[str, Any]) -> bool:
    return body.get("status") == "ok"


# This dialect names a status alone for most calls.
_REPORT = Call(empty=True, gone=FINAL_THERE, refusable=True, patience_s=600.0)
BOOTSTRAP = Dialect(
    {
        "register": Call(
            lambda body: _texts(body, "node_token"), denied=frozenset({401, 403}), refusable=True
        ),
        "heartbeat": Call(empty=True, strange=frozenset({404})),
        "pull": Call(nothing=frozenset({204}), strange=frozenset({404})),
        "ack": Call(empty=True, gone=FINAL_THERE, refusable=True, patience_s=60.0),
        "progress": Call(empty=True),
        "result": _REPORT,
        "fail": _REPORT,
    },
    _is_bootstrap_error,
)
_AITBC_REPORT = Call(_is_ok, gone=FINAL_THERE, refusable=True, patience_s=600.0)
AITBC = Dialect(
    {
        "register": Call(_is_ok, refusable=True),
        "heartbeat": Call(_is_ok, strange=frozenset({404})),
        # It answers 500 to strangers.
        "poll": Call(nothing=frozenset({204}), strange=frozenset({500})),
        "jobs": Call(lambda body: isinstance(body.get("jobs"), list) and body.get("error") is None),
        "result": _AITBC_REPORT,
        "fail": _AITBC_REPORT,
        "leave": Call(lambda body: body.get("status") == "deregistered"),
    },
    _is_aitbc_error,
)


def answer(reply: HttpReply, call: Call, dialect: Dialect, doing: str, credential: str) -> dict[str, Any]:
    """Give the JSON object of an answer, empty if there is no body.

    Raises:
        CoordinatorError: it is none, or it is not the wished-for one; as `check` and `confirm` do.
    """
    check(reply, call, dialect, doing, credential)
    return confirm(call, decode_answer(reply, doing), doing)


def confirm(call: Call, body: object, doing: str) -> dict[str, Any]:
    """Give the body of a reply with the right status. Raises Unreachable if it is no answer."""
    if body is None and call.empty:
        return {}
    if not isinstance(body, dict):
        raise Unreachable(f"cannot {doing}: garbage reply: no JSON object")
    if body.get("error"):
        said = clean(str(_message(body) or "an error"), 200)
        raise Unreachable(f"cannot {doing}: the coordinator answered 200, and with it an error: {said}")
    if not call.holds(body):
        raise Unreachable(f"cannot {doing}: garbage reply: it is JSON, but no answer to this")
    return body


def check(reply: HttpReply, call: Call, dialect: Dialect, doing: str, credential: str) -> None:
    """Raise what a status means that neither says yes nor, where that may be, that there is nothing.

    `credential` says which one was used.
    """
    status, said = reply.status, _said(reply)
    if status == 200 or status in call.nothing:
        return
    if 300 <= status < 400:
        raise Unreachable(
            f"cannot {doing}: the coordinator answered {status}, a redirect to"
            f" {clean(reply.location.partition('?')[0], 120) or 'nowhere'}, which is not followed;"
            " set coordinator.base_url to the final address"
        )
    if 200 <= status < 300:
        raise Unreachable(f"cannot {doing}: garbage reply: {said}, which is no answer to this")
    if status in call.denied:
        raise Unauthorized(f"cannot {doing}: the coordinator does not accept {credential} ({said})")
    if status in call.strange:
        raise UnknownNode(f"cannot {doing}: the coordinator does not know this node ({said})")
    if status in {429, 503}:
        asked = None if reply.retry_after is None else min(reply.retry_after, call.patience_s)
        wait = "" if reply.retry_after is None else f"; it asks to wait {reply.retry_after:.0f} s"
        raise Busy(f"cannot {doing}: the coordinator is busy ({said}){wait}", asked, status)
    if 400 <= status < 500 and status not in ABOUT_US and not is_own_error(reply, dialect):
        # A proxy that has lost the coordinator answers so; taking its word would lose a job or a result.
        what = f"something answered {said} that is not the coordinator"
        raise CoordinatorError(f"cannot {doing}: {what}", status)
    if status in call.gone:
        raise Gone(f"cannot {doing}: the job is not ours any more ({said})", status)
    if call.refusable and 400 <= status < 500 and status not in ABOUT_US:
        raise Refused(f"cannot {doing}: the coordinator refuses it ({said})", status)
    raise CoordinatorError(f"cannot {doing}: the coordinator answered {said}", status)


def is_own_error(reply: HttpReply, dialect: Dialect) -> bool:
    """Whether the body is an error as this dialect's coordinator writes it."""
    body = _object(reply)
    return body is not None and dialect.is_error(body)


def decode_answer(reply: HttpReply, doing: str) -> Any:
    """Decode a JSON body; None if it is empty. Raises Unreachable for garbage."""
    if not reply.complete:
        raise Unreachable(f"cannot {doing}: garbage reply: larger than {len(reply.body) // 1024} KiB")
    try:
        value = msgspec.json.decode(reply.body) if reply.body else None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Unreachable(f"cannot {doing}: garbage reply: {clean(str(error), 100)}") from error
    if value is None and reply.body:
        raise Unreachable(f"cannot {doing}: garbage reply: null")
    return value


def _object(reply: HttpReply) -> dict[str, Any] | None:
    try:
        body = msgspec.json.decode(reply.body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    return body if isinstance(body, dict) else None


def _message(body: Mapping[str, Any]) -> object:
    """Give what an error body says in `error.message` or in `detail`."""
    error = body.get("error", body.get("detail"))
    return error.get("message") if isinstance(error, dict) else error


def _said(reply: HttpReply) -> str:
    """Return the status and, shortened, what an error body says."""
    message = _message(_object(reply) or {})
    return f"{reply.status}: {clean(message, 200)}" if isinstance(message, str) else str(reply.status)
