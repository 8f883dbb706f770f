"""`aitbc-minerctl logs`: a job's log and, with `-f`, the lines that follow."""

import codecs
import io
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import BinaryIO, Protocol

from aitbc_miner.ctl.ask import Target, job_files
from aitbc_miner.errors import EXIT_FAILURE, CommandError
from aitbc_miner.jobs import FINAL, State
from aitbc_miner.util import clock
from aitbc_miner.util.terminal import visible

POLL_S = 0.25
ASK_S = 1.0
CHUNK = 1 << 16
LOG_ENDED = FINAL | {State.UPLOADING}
"""In these states the log is complete, although the report may wait for days for the coordinator."""


class LogWriter(Protocol):
    """Writes a log to stdout, piece by piece."""

    def __call__(self, data: bytes, *, last: bool = False) -> None:
        """Write the next piece."""
        ...


def show_log(target: Target, job_id: str, write: LogWriter, *, follow: bool) -> None:
    """Show a job's output and, with `follow`, its further output until the job has ended.

    Raises:
        CommandError: like `ask_miner`, or the job has no log.
    """
    offset, found = 0, False
    if follow:
        # In the background of a script the shell ignores Ctrl-C: only SIGTERM would end `logs -f`.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    while True:
        with job_files(target, "logs", job_id) as (row, files, live):
            # The state is older than the read below, so after the job's end the read gets the whole log.
            ended = not follow or not live or row.state in LOG_ENDED
            log = next(iter(files.values()), None)
            found = found or log is not None
            until = clock.now() + ASK_S
            while True:
                offset = _copy(log, offset, write) if log else 0
                if ended or clock.now() >= until:
                    break
                time.sleep(POLL_S)
        if ended:
            break
    write(b"", last=True)
    if not found:
        message = f"cannot show the log of job {job_id}: the job has no log; its state is {row.state}"
        raise CommandError(message, EXIT_FAILURE)


def _copy(log: BinaryIO, offset: int, write: LogWriter) -> int:
    if os.fstat(log.fileno()).st_size < offset:
        offset = 0  # each attempt has a new log
    while data := os.pread(log.fileno(), CHUNK, offset):
        write(data)
        offset += len(data)
    return offset


def log_writer(*, as_json: bool) -> LogWriter:
    """Choose the writer: JSON lines, text without control characters for a terminal, or the raw bytes."""
    if as_json:
        return TextWriter(_json_lines, whole_lines=True)
    return TextWriter(_tamed) if sys.stdout.isatty() else _write_bytes


def _write_bytes(data: bytes, *, last: bool = False) -> None:  # noqa: ARG001  # a LogWriter
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()


def _tamed(text: str) -> str:
    return "\n".join(visible(line, keep="\t") for line in text.split("\n"))


def _json_lines(text: str) -> str:
    lines = text.removesuffix("\n").split("\n") if text else []
    return "".join(json.dumps({"line": line}) + "\n" for line in lines)


class TextWriter:
    """Shows a log as text, with any kind of line end; with `whole_lines` only whole lines at a time."""

    def __init__(self, show: Callable[[str], str], *, whole_lines: bool = False) -> None:
        self._show = show
        self._whole_lines = whole_lines
        utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._decoder = io.IncrementalNewlineDecoder(utf8, translate=True)
        self._held: list[str] = []

    def __call__(self, data: bytes, *, last: bool = False) -> None:
        """Show the next piece, or keep the piece until its line is whole."""
        self._held.append(self._decoder.decode(data, final=last))
        partly = self._whole_lines and not last
        if partly and "\n" not in self._held[-1]:
            return
        text = "".join(self._held)
        end = text.rindex("\n") + 1 if partly else len(text)
        self._held = [text[end:]]
        print(self._show(text[:end]), end="", flush=True)
