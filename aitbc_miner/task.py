"""What a Python task may use: report progress, find its directories, fail with a reason, hear of its end.

A task is a file `<name>.py` in one of the task paths with a function `run(...)`; see docs/tasks.md. Run by
hand, the same functions work: progress goes to stderr, files go below the current directory.

The structs are what the process of a task tells the miner. The job controls that process, so nothing in them
is believed further than the job's own result.
"""

import contextlib
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

__all__ = ["TaskCancelled", "TaskError", "cancelled", "output_dir", "progress", "work_dir"]

REPORT_VARIABLE = "AITBC_REPORT_FD"
"""Names the environment variable with the number of the descriptor that reports go to, as lines of JSON."""


RESULT_MAX = 1 << 20
"""A returned value may take this many bytes as JSON: larger results belong into a file in output/."""

LINE_MAX = RESULT_MAX + 4096
PROGRESS_MAX = 10_000


class Progress(Struct, frozen=True, tag="progress"):
    """How far a task is, 0 to 100."""

    pct: float
    note: str = ""


class TaskResult(Struct, frozen=True, tag="result"):
    """A task came back with a value."""

    value: Any = None


class TaskFailure(Struct, frozen=True, tag="failure"):
    """A task did not come back with a value; `code` is one of our E_ codes as the child sees it."""

    code: str
    message: str


Report = Progress | TaskResult | TaskFailure


class Preloaded(Struct, frozen=True, tag="preloaded"):
    """A process that waits for its task has imported what it was to; `failed`: what it could not, and why."""

    failed: dict[str, str] = {}


class TaskError(Exception):
    """Raised by a task to fail with a code and a sentence of its own; the job's code is then E_TASK."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code
        self.message = message


class TaskCancelled(BaseException):  # says what happened, as KeyboardInterrupt does
    """Raised in a task's main thread, wherever it is, when the job is to end: cancelled, or out of time.

    No Exception, so that a task that goes on after errors does not go on after this one.
    """


# Set by the handler alone, and waited for by nobody, so that no thread can be in its lock then.
_told_to_end = threading.Event()


def cancelled() -> bool:
    """Whether the job is to end: some seconds later it is killed. For threads, and for what cleans up."""
    return _told_to_end.is_set()


def hear_cancellation() -> None:
    """Raise `TaskCancelled` at SIGTERM, once; for the process that runs the task."""

    def end(_number: int, _frame: object) -> None:
        # Not SIG_IGN, which programs that are started from here on would inherit.
        signal.signal(signal.SIGTERM, lambda *_: None)
        _told_to_end.set()
        raise TaskCancelled

    signal.signal(signal.SIGTERM, end)
    # A pool ends its processes with this signal, and waits until it has: no exception there may get lost.
    os.register_at_fork(after_in_child=lambda: signal.signal(signal.SIGTERM, signal.SIG_DFL))


def progress(pct: float, note: str = "") -> None:
    """Tell the coordinator how far the task is: percent from 0 to 100, and a few words."""
    if REPORT_VARIABLE not in os.environ:
        print(f"{pct:5.1f}% {note}", file=sys.stderr)  # noqa: T201  # run by hand
        return
    # That nobody listens any more is no reason for the work to fail.
    with contextlib.suppress(BrokenPipeError):
        send(Progress(min(100.0, max(0.0, float(pct))), note[:1000]))


def work_dir() -> Path:
    """Directory with the job's inputs; also where the task starts."""
    return Path(os.environ.get("AITBC_WORK_DIR", ".")).absolute()


def output_dir() -> Path:
    """Directory whose files all go to the coordinator with the result."""
    path = Path(os.environ.get("AITBC_OUTPUT_DIR", "output")).absolute()
    path.mkdir(exist_ok=True)
    return path


def send(report: Report | Preloaded) -> None:
    """Write one report; for the process that runs the task.

    Raises:
        OSError: the miner does not listen.
    """
    left = memoryview(msgspec.json.encode(report) + b"\n")
    while left:
        left = left[os.write(int(os.environ[REPORT_VARIABLE]), left) :]


class ReportReader:
    """Takes the reports of a task from its pipe, as they arrive and within bounds.

    The job writes them, so anything can be there: what is no report, or is one too many, is left out and told
    in `notes`, once for each kind. A task has one end, so only the first result or failure counts.
    """

    def __init__(self) -> None:
        self.notes: list[str] = []
        self._line = bytearray()
        self._skipping = False
        self._progress = 0
        self._ended = False
        self._decoder = msgspec.json.Decoder(Report | Preloaded)

    def feed(self, data: bytes) -> list[Report]:
        """Take the bytes that came and return the reports they complete."""
        reports: list[Report] = []
        *whole, rest = data.split(b"\n")
        for part in whole:
            self._append(part)
            if not self._skipping and self._line:
                reports += self._decode(bytes(self._line))
            self._line.clear()
            self._skipping = False
        self._append(rest)
        return reports

    def finish(self) -> list[Report]:
        """Return what the last bytes hold, where the task ended without a last newline."""
        return self.feed(b"\n")

    def _append(self, part: bytes) -> None:
        if self._skipping or len(self._line) + len(part) > LINE_MAX:
            self._skipping = True
            self._line.clear()
            self._note(f"a report longer than {LINE_MAX} bytes was left out")
        else:
            self._line += part

    def _decode(self, line: bytes) -> list[Report]:
        try:
            report = self._decoder.decode(line)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            self._note("something that is no report was left out")
            return []
        if isinstance(report, Preloaded):
            # Of a process that got its task before it had said so: its log has it, too.
            return []
        if isinstance(report, Progress):
            self._progress += 1
            if self._progress > PROGRESS_MAX:
                self._note(f"progress after the first {PROGRESS_MAX} reports was left out")
                return []
            return [Progress(min(100.0, max(0.0, report.pct)), report.note[:1000])]
        if self._ended:
            self._note("what was reported after the task's end was left out")
            return []
        self._ended = True
        return [report]

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)
