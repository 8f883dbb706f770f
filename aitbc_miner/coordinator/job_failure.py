"""What a client is told of a failed job: the reason once, without the insides of this machine. Pure.

The operator keeps all of it: in the job's own log, and in its outcome.
"""

import re
from collections.abc import Iterator

from aitbc_miner.jobs import Outcome

_TRACE = re.compile(r'[\s|+]*(Traceback \(most recent call last\):|File ".*", line \d+|\+ Exception Group )')
_BETWEEN = re.compile(r"(During handling of the above exception|The above exception was the direct cause)")
# Neither the path of a URL nor a fraction; one name alone, as /tmp, tells nothing.
_PATH = re.compile(r"(?<![\w.:/])/(?:[\w.+@~=-]+/)+(?=([\w.+@~=-]*))")


def message_of(outcome: Outcome) -> str:
    """Give the reason, in one or more lines."""
    return _plain(outcome.message)


def log_of(outcome: Outcome) -> str:
    """Give the end of the job's log, but for what the reason says already."""
    tail = outcome.log.tail
    if outcome.log.bytes > len(tail) and "\n" in tail:
        tail = tail.partition("\n")[2]  # half a line, perhaps half a path
    said = message_of(outcome)
    return "\n".join(line for line in dict.fromkeys(_plain(tail).splitlines()) if line.strip() not in said)


def _plain(text: str) -> str:
    return _PATH.sub("", "\n".join(_without_traces(text)))


def _without_traces(text: str) -> Iterator[str]:
    """Yield the lines of a text but for those of Python's tracebacks; behind these stands the reason."""
    inside = False
    for line in text.splitlines():
        inside = bool(_TRACE.match(line)) or (inside and line[:1] in {"", " ", "\t"})
        if not inside and not _BETWEEN.match(line):
            yield line
