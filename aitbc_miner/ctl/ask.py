"""Asks the miner and, should it not run, its disk; what goes wrong has an exit status."""

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
from aitbc_miner.errors import EXIT_NOT_PERMITTED, EXIT_UNREACHABLE, EXIT_USAGE, MinerError
from aitbc_miner.util.terminal import visible

TIMEOUT_S = 5.0


class Target(NamedTuple):
    """Where the miner listens, and the configuration that tells where its files are, should it not."""

    socket: Path
    config: Path = Path(CONFIG)


class CtlError(MinerError):
    """Ends the command with this message and exit status."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def warn(text: str) -> None:
    """Tell the operator something that is none of the answer."""
    print(f"aitbc-minerctl: {visible(text)}", file=sys.stderr)


def ask_miner(target: Target, request: Request) -> tuple[Any, list[int]]:
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
    path = target.socket
    patience = LATER_S if request.verb in SLOW_VERBS else TIMEOUT_S
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
        answer, fds = _ask_the_disk(target, request, cause)
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise _unreachable(path, f"what answers there is no miner of this version ({error})") from error
    if isinstance(answer, Refusal):
        close_all(fds)
        raise CtlError(answer.message, answer.exit_code)
    return answer, fds


def _ask_the_disk(target: Target, request: Request, cause: CtlError) -> tuple[Any, list[int]]:
    from aitbc_miner.ctl import stopped_node  # noqa: PLC0415  # reads YAML, records and the database

    if request.verb not in stopped_node.VERBS:
        raise cause
    try:
        told = stopped_node.answer_from_disk(target.config, target.socket, request)
    except (MinerError, OSError) as error:
        raise CtlError(f"{cause}; and its disk: {error}", EXIT_UNREACHABLE) from error
    if told is None:
        hint = "what its disk tells can be had with --config and the configuration of that miner"
        raise CtlError(f"{cause}; {hint}", EXIT_UNREACHABLE)
    warn(f"the miner is not running at {target.socket}; this is what its disk tells")
    return told


def _unreachable(path: Path, cause: str) -> CtlError:
    remedy = "is it running? `systemctl status aitbc-miner`, or name its socket with --socket"
    return CtlError(f"cannot reach the miner at {path}: {cause}; {remedy}", EXIT_UNREACHABLE)


def not_ours(verb: str) -> CtlError:
    """Give the error for an answer that is none to this verb."""
    return CtlError(f"cannot {verb}: the miner gave another answer; is it another version?", EXIT_UNREACHABLE)


def close_all(fds: list[int]) -> None:
    """Close the files that came with an answer."""
    for fd in fds:
        os.close(fd)


@contextlib.contextmanager
def job_files(target: Target, verb: str, job_id: str) -> Iterator[tuple[JobRow, dict[str, BinaryIO], bool]]:
    """Ask for a job, its files by name (those that it has not are left out), and whether they may change."""
    answer, fds = ask_miner(target, Request(verb, job_id))
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(os.fdopen(fd, "rb", buffering=0)) for fd in fds]
        if not isinstance(answer, Files) or len(files) != len(answer.names):
            raise not_ours(verb)
        yield answer.job, dict(zip(answer.names, files, strict=True)), type(answer) is Files
