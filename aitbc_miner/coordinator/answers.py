"""The meaning of each reply to each call of each dialect, in one table.

Proxies, login pages and coordinators under maintenance reply, too. The node treats a reply that fits no rule
of the table like a lost reply. Only an error in the coordinator's own format can refuse a job or a report.
"""

from collections.abc import Callable, Mapping
from contextlib import suppress
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
"""Statuses that do not refuse a report: for example, filters and expired credentials cause 403 as well."""
CLOSED = frozenset({409, 410})
"""Statuses of the coordinator for a job that is closed or belongs to another node."""


class Call(Struct, frozen=True):
    """The meaning of the replies to one call.

    `holds` says whether a JSON object without an error is an answer; `empty` whether an empty body is one.
    `nothing` are the statuses for "no job", `strange` for UnknownNode, `denied` for Unauthorized, `gone` for
    Gone. If `refusable`, any other 4xx is Refused. `patience_s` bounds the pause that a coordinator requests.
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
    """The calls of a dialect, and the test for an error in its coordinator's own format."""

    calls: Mapping[str, Call]
    is_error: Callable[[Mapping[str, Any]], bool]


def _is_bootstrap_error(body: Mapping[str, Any]) -> bool:
    error = body.get("error")
    return isinstance(error, dict) and _texts(error, "message") and isinstance(error.get("code", ""), str)


def _is_aitbc_error(body: Mapping[str, Any]) -> bool:
    # Every service of the same framework gives these two texts, for example for an unknown path.
    if isinstance(said := body.get("detail"), str):
        return said not in {"", "Not Found", "Method Not Allowed"}
    error = body.get("error")
    return isinstance(error, dict) and (_texts(error, "code", "message") or _texts(error, "type", "message"))


def _texts(body: Mapping[str, Any], *names: str) -> bool:
    return all(isinstance(body.get(name), str) for name in names)


def _is_ok(body: Mapping[str, Any]) -> bool:
    return body.get("status") == "ok"


# For most calls this dialect specifies a status and no body.
_REPORT = Call(empty=True, gone=CLOSED, refusable=True, patience_s=600.0)
BOOTSTRAP = Dialect(
    {
        "register": Call(
            lambda body: _texts(body, "node_token"), denied=frozenset({401, 403}), refusable=True
        ),
        "heartbeat": Call(empty=True, strange=frozenset({404})),
        "pull": Call(nothing=frozenset({204}), strange=frozenset({404})),
        "ack": Call(empty=True, gone=CLOSED, refusable=True, patience_s=60.0),
        "progress": Call(empty=True),
        "result": _REPORT,
        "fail": _REPORT,
    },
    _is_bootstrap_error,
)
_AITBC_REPORT = Call(_is_ok, gone=CLOSED, refusable=True, patience_s=600.0)
AITBC = Dialect(
    {
        "register": Call(_is_ok, refusable=True),
        "heartbeat": Call(_is_ok, strange=frozenset({404})),
        # The coordinator answers 500 to a node that it does not know.
        "poll": Call(nothing=frozenset({204}), strange=frozenset({500})),
        "jobs": Call(lambda body: isinstance(body.get("jobs"), list) and body.get("error") is None),
        "result": _AITBC_REPORT,
        "fail": _AITBC_REPORT,
        "leave": Call(lambda body: body.get("status") == "deregistered"),
    },
    _is_aitbc_error,
)


def answer(reply: HttpReply, call: Call, dialect: Dialect, doing: str, credential: str) -> dict[str, Any]:
    """Give the JSON object of an answer, {} for an empty body.

    Raises:
        CoordinatorError: the reply is an error or no answer to this call; see `check` and `confirm`.
    """
    check(reply, call, dialect, doing, credential)
    return confirm(call, decode_answer(reply, doing), doing)


def confirm(call: Call, body: object, doing: str) -> dict[str, Any]:
    """Check the decoded body of a reply with the right status. Raises Unreachable if it is no answer."""
    if body is None and call.empty:
        return {}
    if not isinstance(body, dict):
        raise Unreachable(f"cannot {doing}: garbage reply: no JSON object")
    if body.get("error"):
        said = clean(str(_message(body) or "no message"), 200)
        raise Unreachable(f"cannot {doing}: the coordinator answered 200 with an error: {said}")
    if not call.holds(body):
        raise Unreachable(f"cannot {doing}: garbage reply: JSON that does not answer this call")
    return body


def check(reply: HttpReply, call: Call, dialect: Dialect, doing: str, credential: str) -> None:
    """Raise the error that a reply's status means; return for 200 and for a status of `call.nothing`.

    `credential` names the credential of the call, for the message.
    """
    status, said = reply.status, _said(reply)
    if status == 200 or status in call.nothing:
        return
    if 300 <= status < 400:
        raise Unreachable(
            f"cannot {doing}: the coordinator answered {status}, a redirect to"
            f" {clean(reply.location.partition('?')[0], 120) or 'nowhere'}; the node follows no redirects:"
            " set coordinator.base_url to the final address"
        )
    if 200 <= status < 300:
        raise Unreachable(f"cannot {doing}: garbage reply: {said} does not answer this call")
    if status in call.denied:
        raise Unauthorized(f"cannot {doing}: the coordinator does not accept {credential} ({said})")
    if status in call.strange:
        raise UnknownNode(f"cannot {doing}: the coordinator does not know this node ({said})")
    if status in {429, 503}:
        asked = None if reply.retry_after is None else min(reply.retry_after, call.patience_s)
        wait = "" if reply.retry_after is None else f" and asks to wait {reply.retry_after:.0f} s"
        raise Busy(f"cannot {doing}: the coordinator is busy ({said}){wait}", asked, status)
    if 400 <= status < 500 and status not in ABOUT_US and not is_own_error(reply, dialect):
        # A proxy without a connection to the coordinator answers so; obeying would lose a job or a result.
        cause = f"not the coordinator but another server, such as a proxy, answered {said}"
        raise CoordinatorError(f"cannot {doing}: {cause}", status)
    if status in call.gone:
        raise Gone(f"cannot {doing}: the job no longer belongs to this node ({said})", status)
    if call.refusable and 400 <= status < 500 and status not in ABOUT_US:
        raise Refused(f"cannot {doing}: the coordinator refuses ({said})", status)
    raise CoordinatorError(f"cannot {doing}: the coordinator answered {said}", status)


def is_own_error(reply: HttpReply, dialect: Dialect) -> bool:
    """Whether the body is an error in the format of this dialect's coordinator."""
    return dialect.is_error(json_object(reply))


def decode_answer(reply: HttpReply, doing: str) -> Any:
    """Decode a JSON body; None for an empty body. Raises Unreachable if the body is too large or not JSON."""
    if not reply.complete:
        raise Unreachable(f"cannot {doing}: garbage reply: larger than {len(reply.body) // 1024} KiB")
    try:
        value = msgspec.json.decode(reply.body) if reply.body else None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Unreachable(f"cannot {doing}: garbage reply: {clean(str(error), 100)}") from error
    if value is None and reply.body:
        raise Unreachable(f"cannot {doing}: garbage reply: null")
    return value


def json_object(reply: HttpReply) -> dict[str, Any]:
    """Decode a body that is a JSON object; {} for any other body."""
    with suppress(msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        body = msgspec.json.decode(reply.body)
        return body if isinstance(body, dict) else {}
    return {}


def _message(body: Mapping[str, Any]) -> object:
    """Give `error.message` or `detail` of an error body."""
    error = body.get("error", body.get("detail"))
    return error.get("message") if isinstance(error, dict) else error


def _said(reply: HttpReply) -> str:
    """Return the status and the shortened message of an error body."""
    message = _message(json_object(reply))
    return f"{reply.status}: {clean(message, 200)}" if isinstance(message, str) else str(reply.status)
