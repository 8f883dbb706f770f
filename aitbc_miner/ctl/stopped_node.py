"""Answers for a stopped node from its disk: its jobs, their records and logs, and the history.

Nothing is written. Root reads as the user who owns the files, like the node itself.
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from aitbc_miner.config.settings import Config, load_config
from aitbc_miner.control.protocol import Answer, Files, History, JobRow, Jobs, Refusal, Request
from aitbc_miner.errors import EXIT_NOT_PERMITTED
from aitbc_miner.jobs import Outcome, State
from aitbc_miner.store.records import JobDir, RecordError, Records
from aitbc_miner.supervisor.control_api import open_files
from aitbc_miner.supervisor.slow_answers import read_history
from aitbc_miner.util.system import drop_privileges

VERBS = frozenset({"jobs", "job", "logs", "history"})


class Stored(Files, frozen=True, tag="stored"):
    """A job's files on the disk of a stopped node, where no process changes them."""


def answer_from_disk(config: Path, socket: Path, request: Request) -> tuple[Answer, list[int]] | None:
    """Answer like the node; None if only a running node can answer, or the configuration is another node's.

    Raises:
        MinerError, OSError: the files cannot be read.
    """
    if request.verb in VERBS and config.exists() and not os.access(config, os.R_OK):
        return _not_permitted(f"cannot read {config}"), []
    known, _, _ = load_config(config, os.environ) if request.verb in VERBS else (None, [], [])
    if known is None or known.control.socket != socket:
        return None
    root = known.workspace.root
    try:
        info = root.stat()
        if os.geteuid() == 0 and info.st_uid != 0:
            drop_privileges(info.st_uid, info.st_gid)
        if request.verb == "history":
            return _history(known.queue.path, request)
        if request.verb == "jobs":
            return Jobs(sorted(_rows(known, request.state), key=lambda row: row.since_wall)), []
        return _files(known, request)
    except RecordError as error:
        denied = isinstance(error.__cause__, PermissionError)
        return (_not_permitted(str(error)) if denied else Refusal(str(error))), []
    except PermissionError as error:
        return _not_permitted(f"cannot read {error.filename or root}"), []


def _not_permitted(what: str) -> Refusal:
    message = "only root and the miner's user may read the files of a stopped miner; use sudo"
    return Refusal(f"{what}: {message}", EXIT_NOT_PERMITTED)


def _rows(config: Config, state: State | None) -> Iterator[JobRow]:
    records = Records(config.workspace.root)
    for job_id in records.ids():
        with contextlib.suppress(RecordError), records.open(job_id) as job:
            row = _row(config, job)
            if state in {None, row.state}:
                yield row


def _row(config: Config, job: JobDir) -> JobRow:
    said = job.state()
    outcome = Outcome(job_id=job.job_id)
    with contextlib.suppress(RecordError):
        outcome = job.outcome() or outcome
    return JobRow(
        job.job_id,
        said.state,
        said.runner,
        said.slot or outcome.slot,
        outcome.code,
        outcome.message,
        said.since_wall,
        outcome.usage.wall_s,
        outcome.count_artifacts(log_too=config.coordinator.dialect == "bootstrap"),
    )


def _files(config: Config, request: Request) -> tuple[Answer, list[int]]:
    with Records(config.workspace.root).open(request.job_id or "") as job:
        row = _row(config, job)
        names, fds = open_files(job.fd, request.verb)
    return Stored(row, names), fds


def _history(path: Path, request: Request) -> tuple[Answer, list[int]]:
    if path.exists() and not os.access(path, os.R_OK):
        raise PermissionError(13, "not permitted", str(path))
    memory = os.memfd_create("history")
    with os.fdopen(os.dup(memory), "wb") as out:
        fault = read_history(path, request, out, still=True)
    if fault:
        os.close(memory)
        return Refusal(fault), []
    return History(), [memory]
