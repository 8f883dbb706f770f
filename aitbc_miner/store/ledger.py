"""What each job came to and cost: one row a job in the node's own database, kept for 90 days.

A row is entered when a job's report is settled. When that was is told by `Database.now`, so a clock that is
set wrongly neither prunes a row nor keeps it; the day that is shown is the one of the time of day at the end.
"""

import heapq
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import msgspec
from msgspec import Struct
from msgspec.structs import asdict, replace

from aitbc_miner.jobs import Outcome, StateRecord

if TYPE_CHECKING:  # the supervisor and the client have no use for SQLite
    import sqlite3

    from aitbc_miner.identity.receipts import Receipt
    from aitbc_miner.store.database import Database

KEEP_S = 90 * 86_400.0
MESSAGE = 200
OK = "OK"
"""In the place of a code, where there is none."""
NO_DAY = "unknown"
VERIFIED, UNVERIFIED = "verified", "unverified"
REOPENED = "reopened"
"""In the place of what became of a report, as long as it is sent once more."""

_TABLES = (
    """
    CREATE TABLE IF NOT EXISTS accounts (
        job_id TEXT PRIMARY KEY, slot TEXT, runner TEXT NOT NULL, code TEXT, message TEXT NOT NULL,
        delivery TEXT NOT NULL, attempts INTEGER NOT NULL, finished_wall TEXT NOT NULL,
        finished REAL NOT NULL, wall_s REAL, cpu_s REAL, gpu_s REAL, peak_memory_bytes INTEGER,
        peak_vram_bytes INTEGER, read_bytes INTEGER, written_bytes INTEGER,
        artifact_bytes INTEGER NOT NULL, artifacts INTEGER NOT NULL, swept INTEGER NOT NULL DEFAULT 0,
        units REAL, price REAL, receipt TEXT
    ) STRICT
    """,
    "CREATE INDEX IF NOT EXISTS accounts_finished ON accounts (finished)",
    # Few at any time. The two kinds apart, for they are kept for different times.
    "CREATE INDEX IF NOT EXISTS accounts_held ON accounts (code IS NULL, finished) WHERE NOT swept",
    # Of its own, because it outlives the rows.
    "CREATE TABLE IF NOT EXISTS finished (code TEXT PRIMARY KEY, jobs INTEGER NOT NULL) STRICT",
)


_ADDED = {"units": "REAL", "price": "REAL", "receipt": "TEXT"}
"""Columns that databases of earlier versions lack."""


class LedgerRow(Struct, frozen=True):
    """What one job came to and cost; None where this machine cannot tell.

    `code` is None for a job that did what it was asked to. `delivery` is what became of its report:
    `accepted`, `superseded`, `refused` or `lost`. `finished` is on `Database.now`, None before it is entered;
    `finished_wall` is only shown. Seconds and bytes; `cpu_s` is user and system together. `units` and `price`
    are what the coordinator's receipt says, and `receipt` is `verified` or `unverified`.
    """

    job_id: str
    slot: str | None
    runner: str
    code: str | None
    message: str
    delivery: str
    attempts: int
    finished_wall: str
    finished: float | None = None
    wall_s: float | None = None
    cpu_s: float | None = None
    gpu_s: float | None = None
    peak_memory_bytes: int | None = None
    peak_vram_bytes: int | None = None
    read_bytes: int | None = None
    written_bytes: int | None = None
    artifact_bytes: int = 0
    artifacts: int = 0
    units: float | None = None
    price: float | None = None
    receipt: str | None = None


class Total(Struct, frozen=True):
    """A sum over jobs: of one slot, code or day, or of all. Seconds, None where nobody could tell of any job.

    `delivered_bytes` are those of artifacts whose report was accepted. `receipts` counts those that verified,
    `units` and `price` are what these say, `unverified` counts the others.
    """

    name: str
    jobs: int = 0
    ok: int = 0
    failed: int = 0
    cpu_s: float | None = None
    gpu_s: float | None = None
    delivered_bytes: int = 0
    receipts: int = 0
    units: float | None = None
    price: float | None = None
    unverified: int = 0

    def plus(self, other: "Total") -> "Total":
        """Add another sum to this one."""
        return Total(
            self.name,
            self.jobs + other.jobs,
            self.ok + other.ok,
            self.failed + other.failed,
            _sum(self.cpu_s, other.cpu_s),
            _sum(self.gpu_s, other.gpu_s),
            self.delivered_bytes + other.delivered_bytes,
            self.receipts + other.receipts,
            _sum(self.units, other.units),
            _sum(self.price, other.price),
            self.unverified + other.unverified,
        )


class Totals(Struct, frozen=True):
    """Sums over the same jobs: all together, and by slot, by code, and by day in UTC as it was displayed."""

    all: Total = Total("all")
    slots: list[Total] = []
    codes: list[Total] = []
    days: list[Total] = []


def account_of(
    outcome: Outcome,
    state: StateRecord,
    runner: str,
    delivery: str,
    receipt: "Receipt | None" = None,
    *,
    log_too: bool = True,
) -> LedgerRow:
    """Make the row of a job whose report is settled."""
    usage = outcome.usage
    return LedgerRow(
        job_id=outcome.job_id,
        slot=outcome.slot or state.slot,
        runner=runner,
        code=outcome.code,
        message=outcome.message[:MESSAGE],
        delivery=delivery,
        attempts=state.attempt,
        finished_wall=outcome.finished_wall,
        wall_s=usage.wall_s,
        cpu_s=_sum(usage.user_s, usage.system_s),
        gpu_s=usage.gpu_s,
        peak_memory_bytes=usage.peak_memory_bytes,
        peak_vram_bytes=usage.peak_vram_bytes,
        read_bytes=usage.read_bytes,
        written_bytes=usage.written_bytes,
        artifact_bytes=sum(artifact.bytes for artifact in outcome.artifacts),
        artifacts=outcome.count_artifacts(log_too=log_too),
        units=receipt.units if receipt else None,
        price=receipt.price if receipt else None,
        receipt=None if receipt is None else VERIFIED if receipt.verified else UNVERIFIED,
    )


_RECEIPTS = (
    "count(*) FILTER (WHERE receipt = 'verified'), sum(units) FILTER (WHERE receipt = 'verified'),"
    " sum(price) FILTER (WHERE receipt = 'verified'), count(*) FILTER (WHERE receipt = 'unverified')"
)
_COLUMNS = LedgerRow.__struct_fields__
_LISTED = ", ".join(_COLUMNS)


class Ledger:
    """The rows of a database. Every method may be called from any thread and raises DatabaseError."""

    def __init__(self, database: "Database", *, read_only: bool = False) -> None:
        self._database = database
        with database.reading() if read_only else database.writing() as connection:
            if not read_only:
                for statement in _TABLES:
                    connection.execute(statement)
                for name in _ADDED.keys() - _columns(connection):
                    connection.execute(f"ALTER TABLE accounts ADD COLUMN {name} {_ADDED[name]}")
            # Who only looks cannot change one of an earlier version.
            self._has_receipts = _columns(connection) >= _ADDED.keys()

    def enter(self, row: LedgerRow) -> bool:
        """Enter a row and count its job; False, and nothing changes, when the job has one already.

        It is finished now, unless the row says when.
        """
        values = ", ".join(f":{name}" for name in _COLUMNS)
        with self._database.writing() as connection:
            if row.finished is None:
                row = replace(row, finished=self._database.now())
            entered = connection.execute(
                f"INSERT INTO accounts ({_LISTED}) VALUES ({values}) ON CONFLICT (job_id) DO NOTHING",  # noqa: S608
                asdict(row),
            ).rowcount
            if not entered:
                # Counted it was before; what became of the second report is what is shown.
                connection.execute(
                    "UPDATE accounts SET delivery = ?, code = ?, message = ?, finished = ?"
                    " WHERE job_id = ? AND delivery = ?",
                    (row.delivery, row.code, row.message, row.finished, row.job_id, REOPENED),
                )
                if row.receipt is not None:
                    # Of those that verify the first one stands: a result that was counted twice there is
                    # still one job here.
                    connection.execute(
                        "UPDATE accounts SET units = ?, price = ?, receipt = ?"
                        " WHERE job_id = ? AND receipt IS NOT ?",
                        (row.units, row.price, row.receipt, row.job_id, VERIFIED),
                    )
            else:
                connection.execute(
                    "INSERT INTO finished VALUES (?, 1) ON CONFLICT (code) DO UPDATE SET jobs = jobs + 1",
                    (row.code or OK,),
                )
        return bool(entered)

    def knows(self, job_id: str) -> bool:
        """Whether a job has a row."""
        return job_id in self.known([job_id])

    def known(self, job_ids: Iterable[str]) -> set[str]:
        """Give those of many jobs that have a row."""
        asked = msgspec.json.encode(list(job_ids)).decode()
        with self._database.reading() as connection:
            found = connection.execute(
                "SELECT job_id FROM accounts WHERE job_id IN (SELECT value FROM json_each(?))", (asked,)
            )
            return {job_id for (job_id,) in found}

    def finished_counts(self) -> dict[str, int]:
        """Give how many jobs have ever been entered, by code; pruning takes nothing away."""
        with self._database.reading() as connection:
            return dict(connection.execute("SELECT code, jobs FROM finished").fetchall())

    def settled(self) -> set[str]:
        """Give all jobs that have a directory here and nothing left to be done."""
        with self._database.reading() as connection:
            found = connection.execute(
                "SELECT job_id FROM accounts WHERE NOT swept AND delivery <> ?", (REOPENED,)
            )
            return {job_id for (job_id,) in found}

    def reopen(self, job_id: str) -> None:
        """Note that the report of a job is to be sent once more."""
        with self._database.writing() as connection:
            connection.execute("UPDATE accounts SET delivery = ? WHERE job_id = ?", (REOPENED, job_id))

    def latest(self, n: int) -> list[LedgerRow]:
        """Give the rows of the jobs that were settled last, the newest last."""
        return list(self._select("ORDER BY finished DESC, rowid DESC LIMIT ?", n))[::-1]

    def of(self, job_id: str) -> LedgerRow | None:
        """Give a job's row, if it has one."""
        rows = list(self._select("WHERE job_id = ?", job_id))
        return rows[0] if rows else None

    def rows(self, since_s: float | None = None) -> Iterator[LedgerRow]:
        """Give the rows of the last so many seconds, or all, the newest last.

        Nobody else gets at the database object before the last one is taken.
        """
        return self._select("WHERE finished >= ? ORDER BY finished, rowid", self._edge(since_s))

    def totals(self, since_s: float | None = None) -> Totals:
        """Sum up the last so many seconds, or all."""
        with self._database.reading() as connection:
            sums_of_receipts = _RECEIPTS if self._has_receipts else "0, NULL, NULL, 0"
            groups = connection.execute(
                "SELECT coalesce(slot, ''), coalesce(code, ?), substr(finished_wall, 1, 10), count(*),"  # noqa: S608
                " count(*) FILTER (WHERE code IS NULL), count(code), sum(cpu_s), sum(gpu_s),"
                " coalesce(sum(artifact_bytes) FILTER (WHERE delivery = 'accepted'), 0),"
                f" {sums_of_receipts} FROM accounts WHERE finished >= ? GROUP BY 1, 2, 3",
                (OK, self._edge(since_s)),
            ).fetchall()
        sums: tuple[dict[str, Total], ...] = ({}, {}, {})
        everything = Total("all")
        for slot, code, day, *numbers in groups:
            total = Total("", *numbers)
            everything = everything.plus(total)
            for kind, name in zip(sums, (slot or "none", code, day or NO_DAY), strict=True):
                kind[name] = kind.get(name, Total(name)).plus(total)
        slots, codes, days = ([kind[name] for name in sorted(kind)] for kind in sums)
        return Totals(everything, slots, sorted(codes, key=_most_first), days)

    def prune(self, keep_s: float = KEEP_S, limit: int = 1000) -> int:
        """Forget the oldest rows that are older than that, at most `limit` at a time; gives how many.

        One whose job still has its directory here is kept: by its row that is found and freed.
        """
        with self._database.writing() as connection:
            return connection.execute(
                "DELETE FROM accounts WHERE rowid IN (SELECT rowid FROM accounts"
                " WHERE finished < ? AND swept ORDER BY finished LIMIT ?)",
                (self._edge(keep_s), limit),
            ).rowcount

    @property
    def there(self) -> bool:
        """Whether the database has accounts at all; else nothing may be asked of them."""
        with self._database.reading() as connection:
            found = connection.execute("SELECT 1 FROM sqlite_schema WHERE name = 'finished'").fetchone()
            return found is not None

    @contextmanager
    def standing_still(self) -> Iterator[None]:
        """Have all that is read within be of the same moment, whatever others write meanwhile."""
        with self._database.reading() as connection:
            connection.execute("BEGIN")
            try:
                yield
            finally:
                connection.execute("ROLLBACK")

    # --- the jobs' directories -----------------------------------------------------------------------------

    def expired(self, keep_success_s: float, keep_failed_s: float, limit: int) -> list[str]:
        """Give jobs whose directories have been kept for their time, the oldest first."""
        return self._held(self._edge(keep_success_s), self._edge(keep_failed_s), limit)

    def oldest_delivered(self, limit: int) -> list[str]:
        """Give jobs whose directories may go before their time where space is short, the oldest first.

        None of them may still have something to be sent: a report that was refused, a result that was
        (E_UPLOAD), or that of a job that was left to a fleet and may come back.
        """
        return self._held(self._edge(0.0), self._edge(0.0), limit, but=("refused", "handed_on"), made=False)

    def mark_swept(self, job_ids: Iterable[str]) -> None:
        """Note that these jobs have no directories any more."""
        with self._database.writing() as connection:
            connection.executemany(
                "UPDATE accounts SET swept = 1 WHERE job_id = ?", [(job_id,) for job_id in job_ids]
            )

    def _held(
        self,
        succeeded_by: float,
        failed_by: float,
        limit: int,
        but: tuple[str, str] = ("", ""),
        *,
        made: bool = True,
    ) -> list[str]:
        kinds = []
        with self._database.reading() as connection:
            for ok, by in ((1, succeeded_by), (0, failed_by)):
                found = connection.execute(
                    "SELECT finished, job_id FROM accounts INDEXED BY accounts_held WHERE NOT swept"
                    " AND (code IS NULL) = ? AND finished <= ? AND delivery NOT IN (?, ?, ?)"
                    " AND (? OR coalesce(code, '') <> 'E_UPLOAD')"
                    " ORDER BY finished LIMIT ?",
                    (ok, by, *but, REOPENED, made, limit),
                )
                kinds.append(found.fetchall())
        return [job_id for _, job_id in heapq.merge(*kinds)][:limit]

    def _edge(self, ago_s: float | None) -> float:
        return -1.0 if ago_s is None else self._database.now() - ago_s

    def _select(self, rest: str, value: float | str) -> Iterator[LedgerRow]:
        # Those that were added are the last ones, and have defaults.
        listed = _LISTED if self._has_receipts else ", ".join(_COLUMNS[: -len(_ADDED)])
        with self._database.reading() as connection:
            for row in connection.execute(f"SELECT {listed} FROM accounts {rest}", (value,)):  # noqa: S608
                yield LedgerRow(*row)


def _columns(connection: "sqlite3.Connection") -> set[str]:
    return {name for (name,) in connection.execute("SELECT name FROM pragma_table_info('accounts')")}


def _sum(one: float | None, other: float | None) -> float | None:
    return None if one is None and other is None else (one or 0.0) + (other or 0.0)


def _most_first(total: Total) -> tuple[int, str]:
    return -total.jobs, total.name
