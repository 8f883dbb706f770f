"""The retry queue of one node, in its own database file.

At the time in the column `at`, a task becomes due or dead, as the column `becomes` says. Until then a task
with a token is held, and a task without a token waits. So no row changes when a delay or a lease ends.
"""

# ruff: noqa: S608  # the queries consist of the constants below and of nothing else

import secrets
import sqlite3
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

from aitbc_miner.queue.interface import Claim, Kind, QueueError, Task
from aitbc_miner.store.database import Database, DatabaseError

_SCHEMA = (
    """
    CREATE TABLE IF NOT EXISTS queue (
        kind TEXT NOT NULL CHECK (kind IN ('run', 'report')),
        job_id TEXT NOT NULL,
        node TEXT NOT NULL,
        attempts INTEGER NOT NULL,
        max_attempts INTEGER NOT NULL CHECK (max_attempts >= 0),
        reason TEXT NOT NULL,
        payload BLOB NOT NULL,
        token TEXT,
        at REAL NOT NULL,
        becomes TEXT NOT NULL CHECK (becomes IN ('due', 'dead')),
        PRIMARY KEY (kind, job_id)
    ) STRICT
    """,
    "CREATE INDEX IF NOT EXISTS queue_at ON queue (becomes, at)",
)
_TASK = "kind, job_id, node, attempts, max_attempts, reason, payload"
_OF_NODE = "becomes = 'due' AND (kind = 'run' OR node = :node)"
_SET = "UPDATE queue SET token = :token, at = :at"
_THIS = "WHERE kind = :kind AND job_id = :job_id"


class SqliteQueue:
    """A RetryQueue in the node's database. Keeps the `dead_max` latest dead tasks."""

    shared = False

    def __init__(self, database: Database, *, dead_max: int = 10_000) -> None:
        self._database = database
        self._dead_max = dead_max
        with _telling(self._database.writing()) as connection:
            for statement in _SCHEMA:
                connection.execute(statement)

    def examine(self) -> None:
        """Do nothing: the file loses no tasks."""

    def hold(self, task: Task, token: str, lease_s: float) -> bool:
        """Enter a task as held, or update the task."""
        with _telling(self._database.writing()) as connection:
            there = connection.execute(f"SELECT token FROM queue {_THIS}", _key(task.kind, task.job_id))
            allowed = (there.fetchone() or (token,)) == (token,)
            if allowed:
                self._enter(connection, task, self._database.now() + lease_s, token)
            return allowed

    def put(self, task: Task, delay_s: float, token: str | None = None) -> bool:
        """Enter a task to be done after a delay."""
        with _telling(self._database.writing()) as connection:
            allowed = self._may_change(connection, task.kind, task.job_id, token)
            if allowed:
                delay_s = 0.0 if task.exhausted else delay_s
                self._enter(connection, task, self._database.now() + delay_s, None)
            return allowed

    def bury(self, task: Task) -> None:
        """Enter a task as dead."""
        with _telling(self._database.writing()) as connection:
            self._enter(connection, task, self._database.now(), None, bury=True)

    def due(self, node: str, limit: int) -> list[Task]:
        """Give tasks that `node` may claim now."""
        with _telling(self._database.reading()) as connection:
            rows = connection.execute(
                f"SELECT {_TASK} FROM queue WHERE {_OF_NODE} AND at <= :now ORDER BY at, rowid LIMIT :limit",
                {"node": node, "now": self._database.now(), "limit": limit},
            )
            return [_task(row) for row in rows]

    def claim(self, kind: Kind, job_id: str, node: str, lease_s: float) -> Claim | None:
        """Hold a due task."""
        values = {**_key(kind, job_id), "node": node, "token": secrets.token_hex(16), "lease_s": lease_s}
        with _telling(self._database.writing()) as connection:
            row = connection.execute(
                "UPDATE queue SET attempts = attempts + 1, token = :token, at = :now + :lease_s,"
                " becomes = iif(max_attempts BETWEEN 1 AND attempts + 1, 'dead', 'due')"
                f" {_THIS} AND {_OF_NODE} AND at <= :now RETURNING {_TASK}, token",
                {**values, "now": self._database.now()},
            ).fetchone()
            return Claim(_task(row[:-1]), row[-1]) if row else None

    def renew(self, kind: Kind, job_id: str, token: str, lease_s: float) -> bool:
        """Make a lease end `lease_s` from now."""
        with _telling(self._database.writing()) as connection:
            values = {**_key(kind, job_id), "token": token, "at": self._database.now() + lease_s}
            return connection.execute(f"{_SET} {_THIS} AND token = :token", values).rowcount == 1

    def remove(self, kind: Kind, job_id: str, token: str | None = None) -> bool:
        """Remove a finished task."""
        with _telling(self._database.writing()) as connection:
            key = _key(kind, job_id)
            if not connection.execute(f"SELECT 1 FROM queue {_THIS}", key).fetchone():
                return True
            allowed = self._may_change(connection, kind, job_id, token)
            if allowed:
                connection.execute(f"DELETE FROM queue {_THIS}", key)
            return allowed

    def waiting(self, kind: Kind, node: str) -> list[tuple[Task, float]]:
        """Give the waiting tasks that `node` entered, the longest due first."""
        with _telling(self._database.reading()) as connection:
            rows = connection.execute(
                f"SELECT at, {_TASK} FROM queue WHERE kind = ? AND node = ? AND token IS NULL"
                " AND becomes = 'due' ORDER BY at, rowid",
                (kind, node),
            )
            now = self._database.now()
            return [(_task(row), max(0.0, at - now)) for at, *row in rows]

    def dead(self) -> list[Task]:
        """Give the dead tasks, the oldest first."""
        with _telling(self._database.reading()) as connection:
            rows = connection.execute(
                f"SELECT {_TASK} FROM queue WHERE becomes = 'dead' AND at <= ? ORDER BY at, rowid",
                (self._database.now(),),
            )
            return [_task(row) for row in rows]

    def requeue(self, kind: Kind, job_id: str) -> Task | None:
        """Make a dead or waiting task due now."""
        with _telling(self._database.writing()) as connection:
            values = {**_key(kind, job_id), "token": None, "at": self._database.now()}
            row = connection.execute(
                f"{_SET}, attempts = 0, becomes = 'due' {_THIS} AND iif(becomes = 'dead', at <= :at,"
                f" token IS NULL) RETURNING {_TASK}",
                values,
            ).fetchone()
            return _task(row) if row else None

    def close(self) -> None:
        """Do nothing: other parts of the agent use the same database."""

    def _may_change(self, connection: sqlite3.Connection, kind: Kind, job_id: str, token: str | None) -> bool:
        query = f"SELECT token, at FROM queue {_THIS}"
        holder, at = connection.execute(query, _key(kind, job_id)).fetchone() or (None, 0.0)
        if token is None:
            return holder is None or at <= self._database.now()
        return bool(token == holder)

    def _enter(
        self, connection: sqlite3.Connection, task: Task, at: float, token: str | None, *, bury: bool = False
    ) -> None:
        becomes = "dead" if bury or task.exhausted else "due"
        connection.execute(
            "INSERT OR REPLACE INTO queue VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                *(task.kind, task.job_id, task.node, task.attempts, task.max_attempts, task.reason),
                *(task.payload, token, at, becomes),
            ),
        )
        connection.execute(
            "DELETE FROM queue WHERE rowid IN (SELECT rowid FROM queue WHERE becomes = 'dead' AND at <= ?"
            " ORDER BY at DESC, rowid DESC LIMIT -1 OFFSET ?)",
            (self._database.now(), self._dead_max),
        )


@contextmanager
def _telling(connected: AbstractContextManager[sqlite3.Connection]) -> Iterator[sqlite3.Connection]:
    try:
        with connected as connection:
            yield connection
    except DatabaseError as error:
        raise QueueError(str(error)) from error


def _key(kind: Kind, job_id: str) -> dict[str, object]:
    return {"kind": kind, "job_id": job_id}


def _task(row: list[object] | tuple[object, ...]) -> Task:
    kind, *rest = row
    return Task(Kind(kind), *rest)  # type: ignore[arg-type]  # the table is STRICT
