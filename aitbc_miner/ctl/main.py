"""`aitbc-minerctl`: shows and steers the running miner.

The command starts fast because it imports little: no network library, no YAML.
"""

import argparse
import contextlib
import io
import json
import os
import sys
from functools import partial
from typing import Any, BinaryIO

import msgspec

from aitbc_miner.control.protocol import Done, Files, History, Jobs, Judged, Request, Status
from aitbc_miner.ctl.arguments import parser
from aitbc_miner.ctl.ask import Target, ask_miner, close_all, job_files, not_ours, warn
from aitbc_miner.ctl.history_page import csv_lines, history_page, json_lines, read_rows, read_totals
from aitbc_miner.ctl.logs import log_writer, show_log
from aitbc_miner.ctl.pages import Paint, job_page, jobs_page, judged_page, plain, slots_page, status_page
from aitbc_miner.errors import EXIT_FAILURE, EXIT_USAGE, CommandError, MinerError
from aitbc_miner.util.inherited import begin_command
from aitbc_miner.util.terminal import until_unread, visible

MAX_RECORD = 64 << 20
EXIT_INTERRUPTED = 130
COLOURS = {"red": 31, "green": 32, "yellow": 33, "bold": 1, "dim": 2}


def start() -> int:
    """Run the program `aitbc-minerctl`."""
    begin_command()
    return main()


def main() -> int:
    """Run one command and give the exit status."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # some terminals lack some characters
    arguments = parser().parse_args()
    try:
        return until_unread(partial(_run, arguments))
    except MinerError as error:
        # A message may have several lines: one for each fault of the configuration.
        text = visible(str(error), keep="\n")
        print(f"aitbc-minerctl: {text}", file=sys.stderr)
        return getattr(error, "exit_code", EXIT_FAILURE)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except OSError as error:
        print(f"aitbc-minerctl: cannot finish the command: {error.strerror}", file=sys.stderr)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILURE


def _run(arguments: argparse.Namespace) -> None:
    target = Target(arguments.socket, arguments.config)
    if arguments.verb == "logs":
        show_log(target, arguments.job_id, log_writer(as_json=arguments.json), follow=arguments.follow)
        return
    if arguments.verb == "job":
        with job_files(target, "job", arguments.job_id) as (row, files, _):
            records = _records(files)
            _show(_json({"job": row, **records}) if arguments.json else job_page(row, records, _paint()))
        return
    if arguments.verb == "history":
        _history(target, arguments.since, as_json=arguments.json, as_csv=arguments.csv)
        return
    if arguments.verb == "sandbox":
        from aitbc_miner.preflight.try_sandbox import try_out  # noqa: PLC0415  # imports YAML and the GPU reader

        raise SystemExit(try_out(arguments.config, arguments.slot, arguments.command, os.environ, warn))
    asked = {"job_id", "state", "command", "inputs"} & vars(arguments).keys()
    answer, fds = ask_miner(
        target, Request(arguments.verb, **{name: getattr(arguments, name) for name in asked})
    )
    close_all(fds)
    _show(_json(_value(arguments.verb, answer)) if arguments.json else _page(arguments.verb, answer))
    if isinstance(answer, Judged) and not answer.permitted:
        raise SystemExit(EXIT_FAILURE)


def _show(text: str) -> None:
    print(text, flush=True)  # flushed here, so that `main` reports a full disk


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
    raise not_ours(verb)


def _value(verb: str, answer: object) -> object:
    """Give the value that `--json` prints: the answer, but for `slots` its slots only."""
    if isinstance(answer, Files | History):
        raise not_ours(verb)
    return {"slots": answer.slots} if verb == "slots" and isinstance(answer, Status) else answer


def _paint() -> Paint:
    if not sys.stdout.isatty() or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        return plain
    return lambda text, colour: f"\x1b[{COLOURS[colour]}m{text}\x1b[0m"


def _json(value: object) -> str:
    # ASCII only: msgspec's JSON would let some control characters through to the terminal.
    return json.dumps(msgspec.to_builtins(value), indent=2)


def _records(files: dict[str, BinaryIO]) -> dict[str, Any]:
    """Read a job's records by name; None for a missing record."""
    names = ("manifest", "state", "outcome", "receipt")
    return {name: _record(files.get(f"{name}.json"), name) for name in names}


def _record(file: BinaryIO | None, name: str) -> Any:
    try:
        return msgspec.json.decode(file.read(MAX_RECORD)) if file else None
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        print(f"aitbc-minerctl: cannot read {name}.json of this job: {error}", file=sys.stderr)
        return None


def _history(target: Target, since_s: float, *, as_json: bool, as_csv: bool) -> None:
    if as_json and as_csv:
        raise CommandError("cannot show the history: --json and --csv exclude each other", EXIT_USAGE)
    answer, fds = ask_miner(target, Request("history", since_s=since_s, each=as_json or as_csv))
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(os.fdopen(fd, "rb")) for fd in fds]
        if not isinstance(answer, History) or len(files) != 1:
            raise not_ours("history")
        try:
            totals, rows = read_totals(files[0]), read_rows(files[0])
            if not (as_json or as_csv):
                _show(history_page(totals, since_s, _paint()))
                return
            for line in json_lines(since_s, totals, rows) if as_json else csv_lines(rows):
                print(line)
        except (msgspec.DecodeError, ValueError, RecursionError):
            raise not_ours("history") from None
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(start())
