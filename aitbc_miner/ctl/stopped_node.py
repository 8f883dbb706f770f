"""What the disk tells of a node that does not run: its jobs, their records and logs, and the history.

Nothing is written. Root reads as the user whose files they are, as the node itself does.
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
from aitbc_miner.supervisor.control_api import FILES
from aitbc_miner.supervisor.slow_answers import read_history
from aitbc_miner.util import fs
from aitbc_miner.util.system import drop_privileges

VERBS = frozenset({"jobs", "job", "logs", "history"})


class Stored(Files, frozen=True, tag="stored"):
    """A job's files that do not change any more, for nobody is there to change them."""


def answer_from_disk(config: Path, socket: Path, request: Request) -> tuple[Answer, list[int]] | None:
    """Answer as the node would; None for what only a running one can, or where it is another's configuration.

    Raises:
        MinerError, OSError: what there is cannot be read.
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
    message = (
        "not permitted; the files of a miner that is not running are for root and its own user: use sudo"
    )
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
    fds: list[int] = []
    names: list[str] = []
    try:
        with Records(config.workspace.root).open(request.job_id or "") as job:
            row = _row(config, job)
            for name in FILES[request.verb]:
                with contextlib.suppress(FileNotFoundError):
                    fds.append(fs.open_below(job.fd, name))
                    names.append(Path(name).name)
    except OSError:
        for fd in fds:
            os.close(fd)
        raise
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
