"""The report of a failed job for its client: the reason once, without paths and tracebacks. Pure.

The job's log and its outcome keep the full text for the operator.
"""

import re
from collections.abc import Iterator

from aitbc_miner.jobs import Outcome

_TRACE = re.compile(r'[\s|+]*(Traceback \(most recent call last\):|File ".*", line \d+|\+ Exception Group )')
_BETWEEN = re.compile(r"(During handling of the above exception|The above exception was the direct cause)")
# Not the path of a URL, not a fraction, and not a single name such as /tmp, which reveals nothing.
_PATH = re.compile(r"(?<![\w.:/])/(?:[\w.+@~=-]+/)+(?=([\w.+@~=-]*))")


def message_of(outcome: Outcome) -> str:
    """Give the reason of the failure, in one or more lines."""
    return _plain(outcome.message)


def log_of(outcome: Outcome) -> str:
    """Give the end of the job's log without the lines that the reason repeats."""
    tail = outcome.log.tail
    if outcome.log.bytes > len(tail) and "\n" in tail:
        tail = tail.partition("\n")[2]  # the first line is truncated, and may begin inside a path
    said = message_of(outcome)
    return "\n".join(line for line in dict.fromkeys(_plain(tail).splitlines()) if line.strip() not in said)


def _plain(text: str) -> str:
    return _PATH.sub("", "\n".join(_without_traces(text)))


def _without_traces(text: str) -> Iterator[str]:
    """Yield the lines of a text without Python's tracebacks; the line after a traceback has the reason."""
    inside = False
    for line in text.splitlines():
        inside = bool(_TRACE.match(line)) or (inside and line[:1] in {"", " ", "\t"})
        if not inside and not _BETWEEN.match(line):
            yield line
