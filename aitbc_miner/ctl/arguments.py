"""The command line of `aitbc-minerctl`: its verbs and their arguments."""

import argparse
import os
from pathlib import Path
from typing import Any

from aitbc_miner.jobs import State, valid_job_id
from aitbc_miner.util.build import build

SOCKET = "/run/aitbc-miner/control.sock"
CONFIG = "/etc/aitbc/miner/config.yaml"
SOCKET_VARIABLE = "AITBC_MINER_CONTROL__SOCKET"


def parser() -> argparse.ArgumentParser:
    """Make the parser of the command line."""
    top = argparse.ArgumentParser(prog="aitbc-minerctl", description="Ask and steer the running miner.")
    top.add_argument("--version", action="version", version=f"aitbc-minerctl {build()}")
    _add_places(top)
    as_json: dict[str, Any] = {"action": "store_true", "help": "print JSON instead of a page"}
    top.add_argument("--json", default=False, **as_json)
    verbs = top.add_subparsers(dest="verb", required=True, metavar="COMMAND")
    verbs.add_parser("status", help="the node on one screen")
    verbs.add_parser("slots", help="every slot, and what enforces its limits")
    jobs = verbs.add_parser("jobs", help="the jobs that this node holds")
    states = ", ".join(State)
    jobs.add_argument("--state", type=_state, metavar="STATE", help=f"only the jobs in one state: {states}")
    job = verbs.add_parser("job", help="one job in detail")
    logs = verbs.add_parser("logs", help="the output of a job")
    logs.add_argument("-f", "--follow", action="store_true", help="go on until the job has ended")
    _add_history(verbs.add_parser("history", help="totals of ended jobs, by slot, code and day"))
    verbs.add_parser("drain", help="pull no new jobs; present jobs go on")
    verbs.add_parser("resume", help="pull jobs again")
    verbs.add_parser("reload", help="read slots.d again; running jobs go on")
    cancel = verbs.add_parser("cancel", help="end a job that runs or waits")
    retry = verbs.add_parser("retry", help="start a job in RETRY_WAIT, or send a job's report, now")
    _add_allow(verbs.add_parser("allow", help="say whether a job may run a command, and if not, why"))
    _add_sandbox(verbs.add_parser("sandbox", help="run a command in the surroundings of a job (root only)"))
    for verb in (job, logs, cancel, retry):
        verb.add_argument("job_id", type=_job_id, metavar="ID", help="the job's id, as `jobs` shows it")
    for verb in verbs.choices.values():
        # A default here would undo a --json before the verb.
        verb.add_argument("--json", default=argparse.SUPPRESS, **as_json)
    return top


def _add_places(top: argparse.ArgumentParser) -> None:
    top.add_argument(
        "--socket",
        type=Path,
        metavar="PATH",
        default=os.environ.get(SOCKET_VARIABLE) or SOCKET,
        help=f"where the miner listens (default: ${SOCKET_VARIABLE}, else {SOCKET})",
    )
    what = f"the configuration that locates the files of a stopped miner (default: {CONFIG})"
    top.add_argument("--config", type=Path, metavar="FILE", default=CONFIG, help=what)


def _add_history(verb: argparse.ArgumentParser) -> None:
    how_far = "how far back, such as 12h or 30d (default: 7d)"
    verb.add_argument("--since", type=_duration, metavar="TIME", default="7d", help=how_far)
    verb.add_argument("--csv", action="store_true", help="print a line for each job")


def _add_allow(verb: argparse.ArgumentParser) -> None:
    known = "an input file of the job; repeatable (default: every name counts as an input)"
    verb.add_argument("--input", dest="inputs", action="append", metavar="NAME", help=known)
    verb.add_argument("command", nargs="+", metavar="COMMAND", help="after --, with its arguments")


def _add_sandbox(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--slot", required=True, metavar="NAME", help="the slot whose limits apply")
    default = argparse.SUPPRESS
    verb.add_argument("--config", type=Path, default=default, metavar="FILE", help=f"default: {CONFIG}")
    verb.add_argument("command", nargs="+", metavar="COMMAND", help="after --, with its arguments")


def _state(text: str) -> State:
    try:
        return State(text.upper())
    except ValueError:
        states = ", ".join(State)
        raise argparse.ArgumentTypeError(f"{text!r} is not a state of jobs; name one of {states}") from None


def _job_id(text: str) -> str:
    if not valid_job_id(text):
        raise argparse.ArgumentTypeError(
            f"{text[:80]!r} is not a job id: write 1 to 128 of A-Z a-z 0-9 . _ -"
        )
    return text


def _duration(text: str) -> float:
    from aitbc_miner.config.units import parse_duration  # noqa: PLC0415  # imports YAML

    try:
        return parse_duration(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text[:80]!r} {error}") from None
