"""The functions for Python tasks: report progress, find directories, fail with a reason, hear of the end.

A task is a file `<name>.py` in one of the task paths with a function `run(...)`; see docs/tasks.md. Outside a
job the functions work as well: progress goes to stderr, files go below the current directory.

The structs are the messages of a task's process to the miner. The job controls the process, so the miner
trusts them no more than the job's result.
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
"""The environment variable with the number of the descriptor for reports, which are lines of JSON."""

RESULT_MAX = 1 << 20
"""The most bytes of a returned value as JSON; larger results belong into a file in output/."""

LINE_MAX = RESULT_MAX + 4096
PROGRESS_MAX = 10_000


class Progress(Struct, frozen=True, tag="progress"):
    """The progress of a task in percent, 0 to 100."""

    pct: float
    note: str = ""


class TaskResult(Struct, frozen=True, tag="result"):
    """A task returned a value."""

    value: Any = None


class TaskFailure(Struct, frozen=True, tag="failure"):
    """A task failed; `code` is an E_ code, chosen by the task's process."""

    code: str
    message: str


Report = Progress | TaskResult | TaskFailure


class Preloaded(Struct, frozen=True, tag="preloaded"):
    """A waiting process has imported the modules to preload; `failed`: error by module."""

    failed: dict[str, str] = {}


class TaskError(Exception):
    """Raised by a task to fail with its own code and sentence; the job's code is E_TASK."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code
        self.message = message


class TaskCancelled(BaseException):  # a name like KeyboardInterrupt
    """Raised in a task's main thread when the job must end: cancelled, or out of time.

    Not an Exception, so that `except Exception` in a task does not catch it.
    """


# Only the handler sets the event and no thread waits for it, so the handler never meets a held lock.
_told_to_end = threading.Event()


def cancelled() -> bool:
    """Whether the job must end: the node kills it some seconds later. For threads and for cleaning up."""
    return _told_to_end.is_set()


def hear_cancellation() -> None:
    """Raise `TaskCancelled` at SIGTERM, once; for the process that runs the task."""

    def end(_number: int, _frame: object) -> None:
        # Not SIG_IGN, because programs that the task starts would inherit SIG_IGN.
        signal.signal(signal.SIGTERM, lambda *_: None)
        _told_to_end.set()
        raise TaskCancelled

    # A process pool ends its processes with SIGTERM and waits: they need the default action. The kernel holds
    # back a SIGTERM during the fork, because a SIGTERM before the change of the action would be lost.
    kept = threading.local()

    def hold_back() -> None:
        kept.mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def let() -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, kept.mask)

    def be_child() -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        let()

    signal.signal(signal.SIGTERM, end)
    os.register_at_fork(before=hold_back, after_in_parent=let, after_in_child=be_child)


def progress(pct: float, note: str = "") -> None:
    """Report the task's progress to the coordinator: percent from 0 to 100, and a few words."""
    if REPORT_VARIABLE not in os.environ:
        print(f"{pct:5.1f}% {note}", file=sys.stderr)  # noqa: T201  # outside a job
        return
    # The task goes on even if the miner has closed the pipe.
    with contextlib.suppress(BrokenPipeError):
        send(Progress(min(100.0, max(0.0, float(pct))), note[:1000]))


def work_dir() -> Path:
    """Directory with the job's inputs, and the task's current directory at the start."""
    return Path(os.environ.get("AITBC_WORK_DIR", ".")).absolute()


def output_dir() -> Path:
    """Directory whose files go to the coordinator with the result."""
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
    """Reads the reports of a task from its pipe, piece by piece and within bounds.

    The job controls the pipe: a line that is no report, or a report beyond the bounds, is dropped, with a
    note in `notes` once for each kind. Only the first result or failure counts.
    """

    def __init__(self) -> None:
        self.notes: list[str] = []
        self._line = bytearray()
        self._skipping = False
        self._progress = 0
        self._ended = False
        self._decoder = msgspec.json.Decoder(Report | Preloaded)

    def feed(self, data: bytes) -> list[Report]:
        """Take the next bytes and return the reports that they complete."""
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
        """Return the report in a last line without a newline."""
        return self.feed(b"\n")

    def _append(self, part: bytes) -> None:
        if self._skipping or len(self._line) + len(part) > LINE_MAX:
            self._skipping = True
            self._line.clear()
            self._note(f"a report longer than {LINE_MAX} bytes was dropped")
        else:
            self._line += part

    def _decode(self, line: bytes) -> list[Report]:
        try:
            report = self._decoder.decode(line)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            self._note("a line that is no report was dropped")
            return []
        if isinstance(report, Preloaded):
            # Of a process that got its task early; the job's log shows the failed imports as well.
            return []
        if isinstance(report, Progress):
            self._progress += 1
            if self._progress > PROGRESS_MAX:
                self._note(f"progress after the first {PROGRESS_MAX} reports was dropped")
                return []
            return [Progress(min(100.0, max(0.0, report.pct)), report.note[:1000])]
        if self._ended:
            self._note("a report after the task's end was dropped")
            return []
        self._ended = True
        return [report]

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)
