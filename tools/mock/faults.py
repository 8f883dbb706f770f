"""The faults of calls: once, several times or for ever.

Write a fault as `NAME`, `NAME:ARGUMENT`, or `after:NAME…`. A fault that replaces the answer also prevents the
call, as if the request had never arrived; with `after:` the coordinator carries the call out first and only
the answer is wrong. `delay`, `drop_after`, `truncate` and `slow` always carry the call out.

    refuse          hang up before the body is read
    delay:SECONDS   answer late
    status:CODE     an error status; `status:429:5` sets Retry-After, which 429 and 503 always have
    drop_after      carry the call out and hang up without an answer
    truncate        half of the answer under the full Content-Length
    slow            an answer, padded, of one byte a second; `slow:0.1` for another pace
    garbage         200, random bytes said to be JSON
    huge            200, an endless body (1 GiB)
    redirect        302 to another name of this server (counted there); `redirect:URL` to somewhere else
    wrong_json      200, JSON of the wrong shape
    deep_json       200, 100,000 arrays in each other
    empty           200, no body
    says:CODE:BODY  this status with one of the bodies that no coordinator means: empty, null, list, text,
                    object, cut, html, ok, failed (an empty list with an error) or error (its own error)
"""

import json
import re
import secrets
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace

from tools.mock.http import FileSpan, Refusal, Reply, Sending

ENDPOINTS = frozenset({"register", "heartbeat", "pull", "ack", "progress", "result", "fail", "files"})
AITBC_ENDPOINTS = frozenset({"register", "heartbeat", "poll", "result", "fail", "jobs", "leave", "client"})
KINDS = frozenset(
    {*"refuse delay status drop_after truncate slow garbage huge".split()}  # noqa: SIM905
    | {"redirect", "wrong_json", "deep_json", "empty", "says"}
)
AFTER = frozenset({"delay", "drop_after", "truncate", "slow"})
SAID = {
    "empty": b"",
    "null": b"null",
    "list": b"[]",
    "text": b'"ok"',
    "object": b"{}",
    "cut": b'{"status": "o',
    "html": b"<html><body><center><h1>It works, or it does not</h1><hr>nginx</center></body></html>",
    "ok": b'{"status": "ok"}',
    "failed": b'{"jobs": [], "total": 0, "limit": 100, "offset": 0, "error": "Failed to list jobs"}',
}
ARGUMENTS = {
    "delay": r"\d+(\.\d+)?",
    "slow": r"(\d+(\.\d+)?)?",
    "status": r"[2-5]\d\d(:\d+)?",
    "says": rf"[2-5]\d\d:(error|{'|'.join(SAID)})",
}
SLOW_BYTES = 600
DEPTH = 100_000


@dataclass(frozen=True)
class Fault:
    """A kind of fault; `argument`: the text after the name, `after`: the call is carried out first."""

    name: str
    argument: str = ""
    after: bool = False

    @classmethod
    def parse(cls, text: str) -> "Fault":
        """Read a fault as the module's description writes it.

        Raises:
            ValueError: the text is no fault; the message lists the faults.
        """
        plain = text.removeprefix("after:")
        name, _, argument = plain.partition(":")
        if name not in KINDS:
            raise ValueError(f"cannot set fault {text!r}: not one of {', '.join(sorted(KINDS))}")
        pattern = ARGUMENTS.get(name)
        if pattern and not re.fullmatch(pattern, argument):
            raise ValueError(f"cannot set fault {text!r}: its argument does not match {pattern}")
        return cls(name, argument, plain != text or name in AFTER)

    def __str__(self) -> str:
        prefix = "after:" if self.after and self.name not in AFTER else ""
        return f"{prefix}{self.name}{':' if self.argument else ''}{self.argument}"

    @property
    def delay_s(self) -> float:
        """The seconds before the call is carried out."""
        return float(self.argument) if self.name == "delay" else 0.0

    def spoil(self, reply: Reply, elsewhere: str, refused: Callable[[Refusal], Reply]) -> Reply:
        """Return the reply that replaces `reply`.

        `elsewhere` is the target of a redirect without URL, `refused` makes the dialect's error.
        """
        match self.name:
            case "delay":
                return reply
            case "refuse" | "drop_after":
                return Reply(0, sending=Sending.NOTHING)
            case "truncate":
                return replace(reply, sending=Sending.HALF)
            case "slow":
                return _slow(reply, float(self.argument or 1))
            case "huge":
                return Reply(sending=Sending.ENDLESS)
            case "status" | "says":
                return (
                    _say(self.argument, refused) if self.name == "says" else refused(_status(self.argument))
                )
            case "redirect":
                return Reply(302, headers={"Location": self.argument or elsewhere})
        return Reply(200, _BODIES[self.name]() if self.name in _BODIES else b"")


REFUSED, DROPPED = Fault.parse("refuse"), Fault.parse("drop_after")


def _slow(reply: Reply, byte_s: float) -> Reply:
    # JSON may be padded, and must be: `{}` would be over in two seconds. A file is sent as it is.
    body = reply.body if isinstance(reply.body, FileSpan) else reply.body.rjust(SLOW_BYTES)
    return replace(reply, body=body, sending=Sending.SLOW, byte_s=byte_s)


def _status(argument: str) -> Refusal:
    status, _, retry_after = argument.partition(":")
    code = int(status)
    if not retry_after and code in {429, 503}:
        retry_after = "1"
    headers = {"Retry_After": retry_after} if retry_after else {}
    return Refusal(code, "fault", f"this {code} was asked for as a fault", **headers)


def _say(argument: str, refused: Callable[[Refusal], Reply]) -> Reply:
    status, _, body = argument.partition(":")
    if body == "error":
        return refused(Refusal(int(status), "fault", f"this {status} was asked for as a fault"))
    kind = "text/html" if body == "html" else "application/json"
    return Reply(int(status), SAID[body], kind, {"Location": "/elsewhere"} if status[0] == "3" else {})


_BODIES: dict[str, Callable[[], bytes]] = {
    "garbage": lambda: secrets.token_bytes(4096),
    "wrong_json": lambda: json.dumps(
        {"job": 42, "node_token": ["x"], "cancel": "perhaps", "error": 7}
    ).encode(),
    "deep_json": lambda: b'{"job": ' + b"[" * DEPTH + b"]" * DEPTH + b"}",
}


class Faults:
    """The pending faults of each endpoint, in their order."""

    def __init__(self, endpoints: frozenset[str] = ENDPOINTS) -> None:
        self._endpoints = endpoints
        self._lock = threading.Lock()
        self._set: dict[str, list[tuple[Fault, int | None]]] = {}

    def add(self, endpoint: str, kind: str, times: int | None = None) -> None:
        """Make the next `times` calls of an endpoint fail, after its earlier faults; None: for ever.

        Raises:
            ValueError: the endpoint or the fault is unknown.
        """
        if endpoint not in self._endpoints:
            known = ", ".join(sorted(self._endpoints))
            raise ValueError(f"cannot set a fault on {endpoint!r}: not one of {known}")
        if times is not None and times < 1:
            raise ValueError(f"cannot set a fault {times} times: at least 1, or null for ever")
        fault = Fault.parse(kind)
        with self._lock:
            self._set.setdefault(endpoint, []).append((fault, times))

    def clear(self) -> None:
        """Remove all faults."""
        with self._lock:
            self._set.clear()

    def take(self, endpoint: str) -> Fault | None:
        """Return the due fault of this call, and count it down."""
        with self._lock:
            due = self._set.get(endpoint)
            if not due:
                return None
            fault, times = due[0]
            if times == 1:
                due.pop(0)
            elif times is not None:
                due[0] = (fault, times - 1)
            return fault

    def as_list(self) -> list[dict[str, object]]:
        """Return the pending faults as text."""
        with self._lock:
            return [
                {"endpoint": endpoint, "kind": str(fault), "times": times}
                for endpoint, due in self._set.items()
                for fault, times in due
            ]
