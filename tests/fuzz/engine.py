"""What a target is, what must hold for all of them, and how one is tried with many inputs."""

import logging
import os
import sys
import tempfile
import traceback
import unicodedata
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

from hypothesis import HealthCheck, Phase, Verbosity, given, seed, settings
from hypothesis.errors import HypothesisWarning
from hypothesis.strategies import SearchStrategy

from aitbc_miner.util.log import Formatter

MESSAGE_MAX = 2000
"""Characters of an error's text: what is longer is the input, not a message about it."""
CALLS, CALLS_A_BYTE = 60_000, 400
"""Calls of functions that one input may cause; a loop that does not end makes more of them in a second."""
_RAW = frozenset({"Cc", "Cs", "Zl", "Zp"})
_ROOT = Path(__file__).parents[2]

Check = Callable[[bytes], None]
"""Tries one input; raises whatever should not have come of it."""


class Target(NamedTuple):
    """A decoder and all that it promises of its input: `opened` gives a `Check` for as long as it is open."""

    name: str
    inputs: SearchStrategy[bytes]
    opened: Callable[[], AbstractContextManager[Check]]


class Finding(NamedTuple):
    """An input that broke a promise, and how. Findings with the same `place` are one."""

    place: str
    error: str
    data: bytes


class TooMuchWork(BaseException):
    """An input causes more calls than its length accounts for. No handler of the code under test stops it."""


def simply(check: Check) -> Callable[[], AbstractContextManager[Check]]:
    """Make the `opened` of a target that needs nothing but its function."""
    return lambda: nullcontext(check)


@contextmanager
def directory() -> Iterator[Path]:
    """Make a directory for as long as a target is open; in memory, where the disk is waited for in vain."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(
        prefix="fuzz-", dir=memory if os.access(memory, os.W_OK) else None
    ) as made:
        yield Path(made)


@contextmanager
def only(*errors: type[Exception], size: int = 0) -> Iterator[None]:
    """Let these errors pass, if they are told well, and no other; count the work of so many bytes."""
    with bounded(CALLS + CALLS_A_BYTE * size):
        try:
            yield
        except errors as error:
            fit_to_print(str(error))


@contextmanager
def bounded(calls: int) -> Iterator[None]:
    """Raise TooMuchWork after so many calls. Counted, not timed: a busy machine makes no finding."""
    left = calls

    def count(_frame: object, event: str, _argument: object) -> None:
        nonlocal left
        left -= event in {"call", "c_call"}
        if left < 0:
            raise TooMuchWork(f"more than {calls} calls")

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        yield
    finally:
        sys.setprofile(before)


def fit_to_print(text: str, *, most: int = MESSAGE_MAX, keep: str = "") -> None:
    """See that a text is there, is short, and has nothing in it that a terminal or an encoder acts on."""
    assert text, "an error without a word"
    assert len(text) < most, f"a message of {len(text)} characters: {text[:100]!r}"
    assert not raw(text, keep), f"not fit to print: {raw(text, keep)!r} in {text[:300]!r}"


def raw(text: str, keep: str = "") -> set[str]:
    """Give the control characters, lone surrogates and odd line ends of a text."""
    return {char for char in text if unicodedata.category(char) in _RAW and char not in keep}


class _Judge(logging.Handler):
    """Takes the log lines of the code under test, and sees that each is one line."""

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(Formatter("node", as_json=False))

    def emit(self, record: logging.LogRecord) -> None:
        line = self.format(record)
        assert not raw(line), f"not fit for a log: {line[:300]!r}"


@contextmanager
def judged_log() -> Iterator[None]:
    """Have what is logged meanwhile judged, and shown nowhere."""
    logger = logging.getLogger("aitbc_miner")
    before = logger.handlers[:], logger.propagate
    logger.handlers[:], logger.propagate = [_Judge()], False
    try:
        yield
    finally:
        logger.handlers[:], logger.propagate = before


class Explorer:
    """Tries one target, round by round; `known` findings are met again in silence.

    `note` hears of each input before it is tried, for nothing can be asked of a process that died of it.
    """

    def __init__(self, target: Target, check: Check, note: Callable[[bytes], None] = lambda _: None) -> None:
        self._target = target
        self._check = check
        self._note = note
        self._last = b""
        self.runs = 0
        self.known: dict[str, Finding] = {}

    def round(self, runs: int, number: int) -> Finding | None:
        """Try so many inputs that follow from a number; gives what was new, made as small as it goes."""
        quiet: dict[str, Any] = {
            "max_examples": runs,
            "database": None,
            "deadline": None,
            "phases": (Phase.generate, Phase.shrink),
            "suppress_health_check": list(HealthCheck),
            "verbosity": Verbosity.quiet,
            "report_multiple_bugs": False,
        }

        # A new function each time: hypothesis keeps what it learned with it.
        @seed(number)
        @settings(**quiet)
        @given(data=self._target.inputs)
        def attempt(data: bytes) -> None:
            self._attempt(data)

        try:
            with judged_log(), warnings.catch_warnings():
                # Of hypothesis: that it shows a long input when one fails.
                warnings.simplefilter("ignore", HypothesisWarning)
                attempt()
        except BaseException as error:  # whatever comes out is the finding
            if isinstance(error, KeyboardInterrupt | SystemExit):
                raise
            finding = Finding(place_of(error), _told(error), self._last)
            self.known[finding.place] = finding
            return finding
        return None

    def _attempt(self, data: bytes) -> None:
        self.runs += 1
        self._note(data)
        try:
            self._check(data)
        except (Exception, TooMuchWork) as error:
            if place_of(error) in self.known:
                return
            self._last = data
            raise


def place_of(error: BaseException) -> str:
    """Name an error by its kind and the innermost line of ours that it came through."""
    ours = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if Path(frame.filename).is_relative_to(_ROOT)
        and ".venv" not in frame.filename
        and Path(frame.filename) != Path(__file__)
    ]
    at = f"{Path(ours[-1].filename).relative_to(_ROOT)}:{ours[-1].lineno}" if ours else "nowhere"
    return f"{type(error).__name__} at {at}"


def _told(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error)[:500]!a}"
