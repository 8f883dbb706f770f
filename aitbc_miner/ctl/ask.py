"""Asks the miner or, if the miner does not run, reads its disk; each error has an exit status."""

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import msgspec

from aitbc_miner.control.client import ask
from aitbc_miner.control.protocol import LATER_S, MAX_REQUEST, SLOW_VERBS, Files, JobRow, Refusal, Request
from aitbc_miner.control.server import READERS
from aitbc_miner.ctl.arguments import CONFIG
from aitbc_miner.errors import EXIT_NOT_PERMITTED, EXIT_UNREACHABLE, EXIT_USAGE, CommandError, MinerError
from aitbc_miner.util.terminal import visible

TIMEOUT_S = 5.0


class Target(NamedTuple):
    """The miner's socket, and the configuration that locates its files if the miner does not run."""

    socket: Path
    config: Path = Path(CONFIG)


def warn(text: str) -> None:
    """Print a warning for the operator on stderr."""
    print(f"aitbc-minerctl: {visible(text)}", file=sys.stderr)


def ask_miner(target: Target, request: Request) -> tuple[Any, list[int]]:
    """Ask the miner; if the miner does not run, answer from its disk as far as possible.

    Raises:
        CommandError: the miner does not answer (69), we may not ask (77), or the miner refuses (its own
            status).
    """
    try:
        too_long = len(msgspec.json.encode(request)) > MAX_REQUEST
    except UnicodeEncodeError:
        raise CommandError(
            "cannot ask the miner: an argument is not UTF-8, and jobs can send UTF-8 only", EXIT_USAGE
        ) from None
    if too_long:
        raise CommandError(
            f"cannot ask the miner: the arguments have more than {MAX_REQUEST} bytes", EXIT_USAGE
        )
    path = target.socket
    patience = LATER_S if request.verb in SLOW_VERBS else TIMEOUT_S
    try:
        answer, fds = ask(path, request, patience)
    except PermissionError:
        remedy = f"use sudo, or join the group {READERS}"
        message = f"cannot reach the miner at {path}: this user may not; {remedy}"
        raise CommandError(message, EXIT_NOT_PERMITTED) from None
    except TimeoutError:
        raise _unreachable(path, f"no answer within {patience:g} s") from None
    except OSError as error:
        cause = _unreachable(path, error.strerror or str(error))
        if not isinstance(error, FileNotFoundError | ConnectionRefusedError):
            raise cause from error
        answer, fds = _ask_the_disk(target, request, cause)
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise _unreachable(path, f"the answer is not from a miner of this version ({error})") from error
    if isinstance(answer, Refusal):
        close_all(fds)
        raise CommandError(answer.message, answer.exit_code)
    return answer, fds


def _ask_the_disk(target: Target, request: Request, cause: CommandError) -> tuple[Any, list[int]]:
    from aitbc_miner.ctl import stopped_node  # noqa: PLC0415  # imports YAML, records and the database

    if request.verb not in stopped_node.VERBS:
        raise cause
    try:
        told = stopped_node.answer_from_disk(target.config, target.socket, request)
    except (MinerError, OSError) as error:
        raise CommandError(f"{cause}; cannot read the files either: {error}", EXIT_UNREACHABLE) from error
    if told is None:
        where = target.config if target.config.exists() else f"{target.config}, which does not exist"
        hint = f"to read a stopped miner's files, name its configuration with --config (now {where})"
        raise CommandError(f"{cause}; {hint}", EXIT_UNREACHABLE)
    warn(f"no miner runs at {target.socket}; the answer comes from the stopped miner's files")
    return told


def _unreachable(path: Path, cause: str) -> CommandError:
    remedy = "check `systemctl status aitbc-miner`, or name the miner's socket with --socket"
    return CommandError(f"cannot reach the miner at {path}: {cause}; {remedy}", EXIT_UNREACHABLE)


def not_ours(verb: str) -> CommandError:
    """Make the error for an answer of the wrong type for this verb."""
    message = f"cannot show `{verb}`: the answer has another type; use the miner's version of aitbc-minerctl"
    return CommandError(message, EXIT_UNREACHABLE)


def close_all(fds: list[int]) -> None:
    """Close the files that came with an answer."""
    for fd in fds:
        os.close(fd)


@contextlib.contextmanager
def job_files(target: Target, verb: str, job_id: str) -> Iterator[tuple[JobRow, dict[str, BinaryIO], bool]]:
    """Ask for a job, its existing files by name, and whether the files may still change."""
    answer, fds = ask_miner(target, Request(verb, job_id))
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(os.fdopen(fd, "rb", buffering=0)) for fd in fds]
        if not isinstance(answer, Files) or len(files) != len(answer.names):
            raise not_ours(verb)
        yield answer.job, dict(zip(answer.names, files, strict=True)), type(answer) is Files
