"""What is on disk, where it may be torn, exchanged or somebody else's, and what the kernel tells."""

import contextlib
import ctypes
import os
import sqlite3
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import msgspec
from hypothesis import strategies as st

from aitbc_miner.agent.recovery import recover
from aitbc_miner.ctl.history_page import csv_lines, history_page, json_lines
from aitbc_miner.errors import JobError
from aitbc_miner.jobs import ArtifactSpec, Outcome, StateRecord
from aitbc_miner.queue.interface import Kind, QueueError, Task
from aitbc_miner.queue.sqlite import SqliteQueue
from aitbc_miner.store.database import Database, DatabaseError
from aitbc_miner.store.ledger import Ledger, LedgerRow, Totals
from aitbc_miner.store.records import MANIFEST, OUTCOME, STATE, RecordError, Records, pretty
from aitbc_miner.supervisor.adoption import WorkerBook, WorkerName
from aitbc_miner.telemetry.counters import Counters, CounterTotals
from aitbc_miner.util.system import process_start
from aitbc_miner.worker import cleanup
from aitbc_miner.worker.artifacts import Caps, Collector, check_path
from tests.fuzz.engine import Check, Target, directory, fit_to_print, only, raw
from tests.fuzz.mutations import JSON, joined, mutated, parted, words
from tests.fuzz.said import MANIFESTS
from tests.fuzz.shapes import encoded

PR_SET_NAME, PR_GET_NAME = 15, 16  # <linux/prctl.h>
_LIBC = ctypes.CDLL(None)


# --- records of jobs ---------------------------------------------------------------------------------------

FILES = (STATE, OUTCOME, MANIFEST)


@contextlib.contextmanager
def _records() -> Iterator[Check]:
    with directory() as root:
        records = Records(root)
        job = root / "job-1"

        def check(data: bytes) -> None:
            job.mkdir(exist_ok=True)
            for name, content in zip(FILES, parted(data, 3, b"\0\n"), strict=True):
                (job / name).write_bytes(content)
            with only(RecordError, size=len(data)), records.open("job-1") as opened:
                for read in (opened.manifest, opened.state, opened.outcome):
                    with only(RecordError, size=len(data)):
                        value = read()
                        assert msgspec.json.decode(pretty(value), type=type(value)) == value
            with only(size=len(data)):
                found = recover(records)
                assert found.broken <= 2

        yield check


RECORDS = joined(
    mutated(encoded(StateRecord, job_id=st.sampled_from(["job-1", "job-1", "job-2"])), JSON),
    mutated(encoded(Outcome, job_id=st.sampled_from(["job-1", "job-1", "job-2"])), JSON),
    mutated(MANIFESTS, JSON),
    by=b"\0\n",
)


# --- the node's database -----------------------------------------------------------------------------------


@cache
def database() -> bytes:
    """Make a database with something in each of its tables."""
    with directory() as where:
        path = where / "queue.db"
        made = Database(path)
        queue, accounts = SqliteQueue(made), Ledger(made)
        for number in range(3):
            queue.put(Task(Kind.RUN, f"job-{number}", "node", 1, 3, "its node was lost", b'{"a":1}'), 0.0)
            queue.bury(Task(Kind.REPORT, f"job-{number}", "node", reason="refused"))
            accounts.enter(
                LedgerRow(
                    f"job-{number}",
                    "cpu0",
                    "cli",
                    "E_EXIT",
                    "it failed",
                    "accepted",
                    1,
                    "2026-07-01T10:00:00Z",
                )
            )
        made.close()
        return path.read_bytes()


@cache
def other_database() -> bytes:
    """Make a database that has tables of the same names, and is not ours."""
    with directory() as where:
        path = where / "queue.db"
        connection = sqlite3.connect(path)
        connection.executescript(
            "CREATE TABLE steady (id, value, boot, at); INSERT INTO steady VALUES (1, 'x', x'00ff', NULL);"
            "CREATE TABLE queue (kind, job_id, node, attempts, max_attempts, reason, payload, token, at,"
            " becomes);"
            "INSERT INTO queue VALUES ('no', 1, 'node', 'x', NULL, x'ff', 5, NULL, -1, 'due'),"
            " (NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, 'x', 'dead');"
            "CREATE TABLE finished (code, jobs); INSERT INTO finished VALUES (NULL, 'many');"
        )
        connection.close()
        return path.read_bytes()


@contextlib.contextmanager
def _databases() -> Iterator[Check]:
    with directory() as where:
        path = where / "queue.db"

        def check(data: bytes) -> None:
            for left in where.iterdir():
                left.unlink()
            path.write_bytes(data)
            with only(DatabaseError, QueueError, size=1000):
                opened = Database(path)
                with contextlib.closing(opened):
                    _use(opened)

        yield check


def _use(database: Database) -> None:
    queue, accounts = SqliteQueue(database), Ledger(database)
    assert database.now() >= 0
    for task in (
        *queue.due("node", 10),
        *queue.dead(),
        *(task for task, _ in queue.waiting(Kind.RUN, "node")),
    ):
        queue.claim(task.kind, task.job_id, "node", 1.0)
        queue.requeue(task.kind, task.job_id)
    sums, rows = accounts.totals(), [*accounts.rows()]
    accounts.settled(), accounts.finished_counts(), accounts.expired(1.0, 1.0, 5)
    # What the operator's command makes of them.
    sent = msgspec.json.decode(msgspec.json.encode(sums), type=Totals)
    again = [msgspec.json.decode(msgspec.json.encode(row), type=LedgerRow) for row in rows]
    for text in (
        history_page(sent, 1.0, lambda text, _: text),
        *csv_lines(again),
        *json_lines(1.0, sent, again),
    ):
        assert not raw(text, "\n")


DATABASES = mutated(
    st.deferred(lambda: st.sampled_from([database(), database(), database(), other_database()])),
    (b"run", b"ruo", b"due", b"job-0", b"\xff\xff", b"cpu0", b"accounts", b"CREATE", b"TEXT", b"its"),
)


# --- counters and the list of workers ----------------------------------------------------------------------


@contextlib.contextmanager
def _metrics() -> Iterator[Check]:
    with directory() as where:

        def check(data: bytes) -> None:
            (where / "metrics.json").write_bytes(data)
            with only(size=len(data)):
                counters = Counters(where)
                counters.save()
                counters.count("jobs", "OK")
                counters.observe("steps", "run", 5.0)
                counters.save()
                counters.close()
                assert counters.shown is not None
                assert counters.shown.counters["jobs"]["OK"] >= 1

        yield check


@contextlib.contextmanager
def _workers() -> Iterator[Check]:
    with directory() as where:

        def check(data: bytes) -> None:
            (where / "workers.json").write_bytes(data)
            with only(size=len(data)):
                WorkerBook(where / "workers.json").knows("cpu0", 1, 1)

        yield check


# --- what a job leaves behind ------------------------------------------------------------------------------


@contextlib.contextmanager
def _artifacts() -> Iterator[Check]:
    with directory() as job:
        for name in ("work", "output", "artifacts"):
            (job / name).mkdir()

        def check(data: bytes) -> None:
            declared, found = parted(data, 2)
            path = declared.decode("utf-8", "surrogateescape")
            with only(JobError, size=len(data)):
                check_path(path)
                fit_to_print(path)
                assert not path.startswith("/")
                assert ".." not in path.split("/")
            with _file(job / "output", found), only(JobError, size=len(data)):
                _collect(job, path)

        yield check


def _collect(job: Path, path: str) -> None:
    fd = os.open(job, os.O_RDONLY | os.O_DIRECTORY)
    try:
        for artifact in Collector(fd, Caps(10, 1000), None).collect([ArtifactSpec(path)] if path else []):
            fit_to_print(artifact.path)
            (job / artifact.file).unlink()
    finally:
        os.close(fd)


@contextlib.contextmanager
def _file(where: Path, name: bytes) -> Iterator[None]:
    """Make a file whose name is whatever a file system allows."""
    path = os.fsencode(where) + b"/" + name.replace(b"\0", b"").replace(b"/", b"")[:255]
    try:
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL))
    except OSError:
        yield  # no name at all: then there is none
        return
    try:
        yield
    finally:
        os.unlink(path)  # noqa: PTH108  # bytes


@contextlib.contextmanager
def _process_names() -> Iterator[Check]:
    """A process may call itself what it likes, and what the kernel tells of it is read all the same."""
    before = ctypes.create_string_buffer(16)
    _LIBC.prctl(PR_GET_NAME, before)
    pid = os.getpid()
    start = process_start(pid)

    def check(data: bytes) -> None:
        _LIBC.prctl(PR_SET_NAME, ctypes.create_string_buffer(data[:15].replace(b"\0", b"")))
        with only(size=100_000):
            assert process_start(pid) == start
            assert cleanup._owner(pid) == os.getuid(), f"uid {cleanup._owner(pid)}"
            fit_to_print(cleanup.named([pid]))

    try:
        yield check
    finally:
        _LIBC.prctl(PR_SET_NAME, before)


NAMES = words(
    "a.txt", "a/b.txt", 'x".txt', "a\r\nX: y", "../x", "/etc/passwd", "output/a", "x" * 255, "é", ""
)

TARGETS = (
    Target("records", RECORDS, _records),
    Target("database", DATABASES, _databases),
    Target("metrics", mutated(encoded(CounterTotals), JSON), _metrics),
    Target("workers", mutated(encoded(dict[str, WorkerName]), JSON), _workers),
    Target("artifacts", joined(mutated(NAMES), mutated(NAMES)), _artifacts),
    Target(
        "process-names",
        mutated(words("python", "a) R 1", "Uid:\t7\t7\t7", "State:\tZ", "(x)", "\n", "kworker/0:1")),
        _process_names,
    ),
)
