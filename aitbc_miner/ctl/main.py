"""`aitbc-minerctl`: asks the running miner how it goes, and tells it what to do.

It starts in a moment, because it imports little: nothing of the network, nothing that reads YAML.
"""

import argparse
import codecs
import contextlib
import io
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol

import msgspec

from aitbc_miner.control.client import ask
from aitbc_miner.control.protocol import (
    LATER_S,
    MAX_REQUEST,
    Done,
    Files,
    History,
    JobRow,
    Jobs,
    Judged,
    Refusal,
    Request,
    Status,
)
from aitbc_miner.control.server import READERS
from aitbc_miner.ctl.arguments import CONFIG, parser
from aitbc_miner.ctl.history_page import csv_lines, history_page, json_lines, read_rows, read_totals
from aitbc_miner.ctl.pages import Paint, job_page, jobs_page, judged_page, plain, slots_page, status_page
from aitbc_miner.errors import (
    EXIT_FAILURE,
    EXIT_NOT_PERMITTED,
    EXIT_OK,
    EXIT_UNREACHABLE,
    EXIT_USAGE,
    MinerError,
)
from aitbc_miner.jobs import FINAL, State
from aitbc_miner.util import clock
from aitbc_miner.util.inherited import begin_command
from aitbc_miner.util.terminal import visible

TIMEOUT_S = 5.0
POLL_S = 0.25
ASK_S = 1.0
CHUNK = 1 << 16
MAX_RECORD = 64 << 20
LOG_ENDED = FINAL | {State.UPLOADING}
"""From here on the log stays as it is, while the report may wait for days for a coordinator that is down."""
EXIT_INTERRUPTED = 130
EXIT_PIPE = 141
COLOURS = {"red": 31, "green": 32, "yellow": 33, "bold": 1, "dim": 2}


class Where(NamedTuple):
    """Where the miner listens, and the configuration that tells where its files are, should it not."""

    socket: Path
    config: Path = Path(CONFIG)


class CtlError(MinerError):
    """Ends the command with this message and exit status."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def start() -> int:
    """Be the program `aitbc-minerctl`, however it was started."""
    begin_command()
    return main()


def main() -> int:
    """Run one command and give the exit status."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # not every terminal knows every letter
    arguments = parser().parse_args()
    try:
        _run(arguments)
    except CtlError as error:
        # Each fault of a configuration has a line of its own.
        text = visible(str(error), keep="\n")
        print(f"aitbc-minerctl: {text}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # Python flushes once more at its end, and would complain then.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_PIPE
    except OSError as error:
        print(f"aitbc-minerctl: cannot go on: {error.strerror}", file=sys.stderr)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILURE
    return EXIT_OK


def _run(arguments: argparse.Namespace) -> None:
    socket = Where(arguments.socket, arguments.config)
    if arguments.verb == "logs":
        _logs(socket, arguments.job_id, _log_writer(as_json=arguments.json), follow=arguments.follow)
        return
    if arguments.verb == "job":
        with _files(socket, "job", arguments.job_id) as (row, files, _):
            records = _records(files)
            _show(_json({"job": row, **records}) if arguments.json else job_page(row, records, _paint()))
        return
    if arguments.verb == "history":
        _history(socket, arguments.since, as_json=arguments.json, as_csv=arguments.csv)
        return
    if arguments.verb == "sandbox":
        _sandbox(arguments)
        return
    asked = {"job_id", "state", "command", "inputs"} & vars(arguments).keys()
    answer, fds = _ask(socket, Request(arguments.verb, **{name: getattr(arguments, name) for name in asked}))
    _close(fds)
    _show(_json(_value(arguments.verb, answer)) if arguments.json else _page(arguments.verb, answer))
    if isinstance(answer, Judged) and not answer.permitted:
        raise SystemExit(EXIT_FAILURE)


def _sandbox(asked: argparse.Namespace) -> None:
    from aitbc_miner.preflight.try_sandbox import try_out  # noqa: PLC0415  # reads YAML and asks for GPUs

    try:
        status = try_out(asked.config, asked.slot, asked.command, os.environ, _warn)
    except MinerError as error:
        raise CtlError(str(error), getattr(error, "exit_code", EXIT_FAILURE)) from error
    raise SystemExit(status)  # of the command, whatever it means


def _warn(text: str) -> None:
    print(f"aitbc-minerctl: {visible(text)}", file=sys.stderr)


def _show(text: str) -> None:
    print(text, flush=True)  # now, while a closed pipe or a full disk can still be told


def _page(verb: str, answer: object) -> str:
    match answer:
        case Status() if verb == "slots":
            return slots_page(answer, _paint())
        case Status():
            return status_page(answer, _paint())
        case Jobs():
            return jobs_page(answer, _paint())
        case Judged():
            return judged_page(answer, _paint())
        case Done():
            return visible(answer.message)
    raise _not_ours(verb)


def _value(verb: str, answer: object) -> object:
    """Give what `--json` prints: the answer as it came, of `slots` only the slots."""
    if isinstance(answer, Files | History):
        raise _not_ours(verb)
    return {"slots": answer.slots} if verb == "slots" and isinstance(answer, Status) else answer


def _paint() -> Paint:
    if not sys.stdout.isatty() or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        return plain
    return lambda text, colour: f"\x1b[{COLOURS[colour]}m{text}\x1b[0m"


def _json(value: object) -> str:
    # ASCII only, so that nothing in it can speak to a terminal; msgspec leaves some control characters.
    return json.dumps(msgspec.to_builtins(value), indent=2)


# --- asking ------------------------------------------------------------------------------------------------


def _ask(where: Where, request: Request) -> tuple[Any, list[int]]:
    """Ask the miner; of one that is not there, the disk tells what it can.

    Raises:
        CtlError: it does not answer (69), we may not ask (77), or it refuses (as it says).
    """
    try:
        too_long = len(msgspec.json.encode(request)) > MAX_REQUEST
    except UnicodeEncodeError:
        raise CtlError(
            "cannot ask: an argument is not valid UTF-8, which no job can send", EXIT_USAGE
        ) from None
    if too_long:
        raise CtlError(f"cannot ask: more than {MAX_REQUEST} bytes of arguments", EXIT_USAGE)
    path = where.socket
    patience = LATER_S if request.verb in {"reload", "history", "allow"} else TIMEOUT_S
    try:
        answer, fds = ask(path, request, patience)
    except PermissionError:
        remedy = f"use sudo, or join the group {READERS}"
        message = f"cannot reach the miner at {path}: not permitted; {remedy}"
        raise CtlError(message, EXIT_NOT_PERMITTED) from None
    except TimeoutError:
        raise _unreachable(path, f"no answer within {patience:g} s") from None
    except OSError as error:
        cause = _unreachable(path, error.strerror or str(error))
        if not isinstance(error, FileNotFoundError | ConnectionRefusedError):
            raise cause from error
        answer, fds = _ask_the_disk(where, request, cause)
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise _unreachable(path, f"what answers there is no miner of this version ({error})") from error
    if isinstance(answer, Refusal):
        _close(fds)
        raise CtlError(answer.message, answer.exit_code)
    return answer, fds


def _ask_the_disk(where: Where, request: Request, cause: CtlError) -> tuple[Any, list[int]]:
    from aitbc_miner.ctl import stopped_node  # noqa: PLC0415  # reads YAML, records and the database

    if request.verb not in stopped_node.VERBS:
        raise cause
    try:
        told = stopped_node.answer(where.config, where.socket, request)
    except (MinerError, OSError) as error:
        raise CtlError(f"{cause}; and its disk: {error}", EXIT_UNREACHABLE) from error
    if told is None:
        hint = "what its disk tells can be had with --config and the configuration of that miner"
        raise CtlError(f"{cause}; {hint}", EXIT_UNREACHABLE)
    _warn(f"the miner is not running at {where.socket}; this is what its disk tells")
    return told


def _unreachable(path: Path, cause: str) -> CtlError:
    remedy = "is it running? `systemctl status aitbc-miner`, or name its socket with --socket"
    return CtlError(f"cannot reach the miner at {path}: {cause}; {remedy}", EXIT_UNREACHABLE)


def _not_ours(verb: str) -> CtlError:
    return CtlError(f"cannot {verb}: the miner gave another answer; is it another version?", EXIT_UNREACHABLE)


def _close(fds: list[int]) -> None:
    for fd in fds:
        os.close(fd)


@contextlib.contextmanager
def _files(socket: Where, verb: str, job_id: str) -> Iterator[tuple[JobRow, dict[str, BinaryIO], bool]]:
    """Ask for a job, its files by name (those that it has not are left out), and whether they may change."""
    answer, fds = _ask(socket, Request(verb, job_id))
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(os.fdopen(fd, "rb", buffering=0)) for fd in fds]
        if not isinstance(answer, Files) or len(files) != len(answer.names):
            raise _not_ours(verb)
        yield answer.job, dict(zip(answer.names, files, strict=True)), type(answer) is Files


def _records(files: dict[str, BinaryIO]) -> dict[str, Any]:
    """Read what is on record of a job; None for what is not there."""
    names = ("manifest", "state", "outcome", "receipt")
    return {name: _record(files.get(f"{name}.json"), name) for name in names}


def _record(file: BinaryIO | None, name: str) -> Any:
    try:
        return msgspec.json.decode(file.read(MAX_RECORD)) if file else None
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        print(f"aitbc-minerctl: cannot read {name}.json of this job: {error}", file=sys.stderr)
        return None


def _history(socket: Where, since_s: float, *, as_json: bool, as_csv: bool) -> None:
    if as_json and as_csv:
        raise CtlError("cannot show the history: --json and --csv exclude each other", EXIT_USAGE)
    answer, fds = _ask(socket, Request("history", since_s=since_s, each=as_json or as_csv))
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(os.fdopen(fd, "rb")) for fd in fds]
        if not isinstance(answer, History) or len(files) != 1:
            raise _not_ours("history")
        try:
            totals, rows = read_totals(files[0]), read_rows(files[0])
            if not (as_json or as_csv):
                _show(history_page(totals, since_s, _paint()))
                return
            for line in json_lines(since_s, totals, rows) if as_json else csv_lines(rows):
                print(line)
        except (msgspec.DecodeError, ValueError, RecursionError):
            raise _not_ours("history") from None
    sys.stdout.flush()


# --- logs --------------------------------------------------------------------------------------------------


class LogWriter(Protocol):
    """Brings a log to stdout, piece by piece."""

    def __call__(self, data: bytes, *, last: bool = False) -> None:
        """Take the next piece."""
        ...


def _logs(socket: Where, job_id: str, write: LogWriter, *, follow: bool) -> None:
    offset, found = 0, False
    if follow:
        # Also in the background of a script, where the shell has Ctrl-C ignored: else nothing short of
        # SIGTERM would end this.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    while True:
        with _files(socket, "logs", job_id) as (row, files, live):
            # The state was asked for before the file is read, so after the end nothing can be missed.
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
        raise CtlError(f"cannot show the log of job {job_id}: it has none; it is {row.state}", EXIT_FAILURE)


def _copy(log: BinaryIO, offset: int, write: LogWriter) -> int:
    if os.fstat(log.fileno()).st_size < offset:
        offset = 0  # a new try of the job has a log of its own
    while data := os.pread(log.fileno(), CHUNK, offset):
        write(data)
        offset += len(data)
    return offset


def _log_writer(*, as_json: bool) -> LogWriter:
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
    """Shows a log as text, whichever way it ends its lines; with `whole_lines` each one in one go."""

    def __init__(self, show: Callable[[str], str], *, whole_lines: bool = False) -> None:
        self._show = show
        self._whole_lines = whole_lines
        utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._decoder = io.IncrementalNewlineDecoder(utf8, translate=True)
        self._held: list[str] = []

    def __call__(self, data: bytes, *, last: bool = False) -> None:
        """Show the next piece, or keep it until its line is whole."""
        self._held.append(self._decoder.decode(data, final=last))
        partly = self._whole_lines and not last
        if partly and "\n" not in self._held[-1]:
            return
        text = "".join(self._held)
        end = text.rindex("\n") + 1 if partly else len(text)
        self._held = [text[end:]]
        print(self._show(text[:end]), end="", flush=True)


if __name__ == "__main__":
    sys.exit(start())
