"""Log lines as JSON for journald and tools, or as text on a terminal; the one place that masks secrets."""

import json
import logging
import math
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar, TextIO

from aitbc_miner.util import clock

MASK = "****"
# A shorter value would blank out ordinary words.
MIN_SECRET = 4


class Event(logging.LoggerAdapter[logging.Logger]):
    """A logger whose message is the name of an event and whose keywords are the event's attributes."""

    def __init__(self, logger: logging.Logger, **context: str | None) -> None:
        super().__init__(logger, {key: value for key, value in context.items() if value is not None})

    def process(self, msg: object, kwargs: Any) -> tuple[object, Any]:
        """Keep the event's name apart from its attributes."""
        passed = {key: kwargs.pop(key) for key in ("exc_info", "stack_info") if key in kwargs}
        context = dict(self.extra or {})
        attrs = {key: value for key, value in {**context, **kwargs}.items() if value is not None}
        return msg, {**passed, "extra": {"attrs": attrs}}


def events(part: str, **context: str | None) -> Event:
    """Give the logger of one part of the node (`supervisor`, `agent`, …)."""
    return Event(logging.getLogger(f"aitbc_miner.{part}"), **context)


class Formatter(logging.Formatter):
    """One line an event: `ts level node_id job_id slot event attrs`, as JSON or for eyes."""

    FIRST: ClassVar[tuple[str, ...]] = ("job_id", "slot")

    def __init__(self, node_id: str, *, as_json: bool, secrets: Iterable[str] = ()) -> None:
        super().__init__()
        self._node_id = node_id
        self._as_json = as_json
        self._masked_forms: list[str] = []
        for secret in secrets:
            self.add_secret(secret)

    def add_secret(self, secret: str) -> None:
        """Mask this value from now on."""
        if len(secret) >= MIN_SECRET:
            # The longest first, for a secret may begin like another one.
            self._masked_forms = sorted({*self._masked_forms, *_forms(secret)}, key=len, reverse=True)

    def format(self, record: logging.LogRecord) -> str:
        """Make the line; a traceback becomes an attribute, so that a line stays a line."""
        attrs = dict(getattr(record, "attrs", {}))
        if record.exc_info:
            attrs["traceback"] = self.formatException(record.exc_info)
        part = record.name.removeprefix("aitbc_miner.")
        first = {key: attrs.pop(key) for key in self.FIRST if key in attrs}
        head = {"ts": clock.wall(), "level": record.levelname.lower(), "node_id": self._node_id}
        what = {"part": part, "event": record.getMessage(), "attrs": attrs}
        whole = {**head, **first, **what}
        line = json.dumps(_plain(whole)) if self._as_json else _text(head, first, what)
        for form in self._masked_forms:
            line = line.replace(form, MASK)
        return line


def _forms(secret: str) -> set[str]:
    """Give the secret as it may stand in a line: itself, in a traceback, and either of them inside JSON."""
    plain = {secret, repr(secret)[1:-1]}
    shown = plain | {_printable(form) for form in plain}
    return shown | {json.dumps(form)[1:-1] for form in shown}


def _text(head: dict[str, str], first: dict[str, Any], what: dict[str, Any]) -> str:
    where = " ".join(str(value) for value in first.values())
    rest = " ".join(f"{key}={value}" for key, value in what["attrs"].items())
    begin = f"{head['ts'][11:]} {head['level'].upper():<7} {what['part']:<10} {where:<12}"
    return _printable(f"{begin} {what['event']} {rest}".rstrip())


def _plain(value: object) -> object:
    """Turn anything into what JSON can hold: a line with an odd value in it is better than no line."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, str | int | float | None) else str(value)


def _printable(text: str) -> str:
    """Escape what would end the line, move the cursor, or cannot be encoded."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def descriptors() -> set[int]:
    """Name the descriptors that log lines go to, which a forked child must keep."""
    handlers = logging.getLogger("aitbc_miner").handlers
    return {handler.stream.fileno() for handler in handlers if isinstance(handler, logging.StreamHandler)}


def configure(
    node_id: str, *, level: str, as_json: bool, path: str | None = None, stream: TextIO | None = None
) -> Formatter:
    """Send all log lines to one place; gives the formatter, which learns the secrets to mask.

    Raises:
        OSError: the log file cannot be opened.
    """
    handler: logging.Handler
    handler = logging.FileHandler(Path(path)) if path else logging.StreamHandler(stream or sys.stderr)
    formatter = Formatter(node_id, as_json=as_json)
    handler.setFormatter(formatter)
    # A full disk or a closed pipe under the log must never end the process that logs.
    logging.raiseExceptions = False
    root = logging.getLogger("aitbc_miner")
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    root.propagate = False
    return formatter
