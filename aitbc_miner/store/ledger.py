"""The outcome and the use of each job: one row for each job in the node's own database, kept for 90 days.

The agent enters the row when a job's report is settled. `Database.now` gives the row's time, so a wrong time
of day neither prunes nor keeps a row. The day on display is the day at the job's end, by the time of day.
"""

import heapq
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import msgspec
from msgspec import Struct
from msgspec.structs import asdict, replace

from aitbc_miner.jobs import Outcome, StateRecord

if TYPE_CHECKING:  # the supervisor and the client do not load SQLite
    import sqlite3

    from aitbc_miner.identity.receipts import Receipt
    from aitbc_miner.store.database import Database

KEEP_S = 90 * 86_400.0
MESSAGE = 200
OK = "OK"
"""Stands for the code of a job that succeeded."""
NO_DAY = "unknown"
VERIFIED, UNVERIFIED = "verified", "unverified"
REOPENED = "reopened"
"""The `delivery` of a job while the agent sends its report once more."""

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
    # Few rows at any time. Succeeded and failed jobs lie apart: their directories have different ages.
    "CREATE INDEX IF NOT EXISTS accounts_held ON accounts (code IS NULL, finished) WHERE NOT swept",
    # A table of its own, because the counts outlive the rows.
    "CREATE TABLE IF NOT EXISTS finished (code TEXT PRIMARY KEY, jobs INTEGER NOT NULL) STRICT",
)


_ADDED = {"units": "REAL", "price": "REAL", "receipt": "TEXT"}
"""The columns that databases of earlier versions lack."""


class LedgerRow(Struct, frozen=True):
    """The outcome and the use of one job, in seconds and bytes; None for values unknown to this machine.

    `code` is None for a job that succeeded. `delivery` is the fate of its report: `accepted`, `superseded`,
    `refused`, `lost` or `handed_on`. `finished` is a time of `Database.now`, None before the row is entered;
    `finished_wall` is for display only. `cpu_s` is user and system time together. `units` and `price` come
    from the coordinator's receipt, and `receipt` is `verified` or `unverified`.
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
    """A sum over the jobs of a slot, code or day, or over all jobs. Seconds, None if unknown for every job.

    `delivered_bytes` sums the artifacts of accepted reports. `receipts` counts verified receipts, `units` and
    `price` sum them up, and `unverified` counts the other receipts.
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
        """Add two sums, and keep this sum's name."""
        numbers = self.__struct_fields__[1:]
        return replace(self, **{name: _sum(getattr(self, name), getattr(other, name)) for name in numbers})


class Totals(Struct, frozen=True):
    """Sums over the same jobs: all together, by slot, by code, and by day (UTC, as displayed)."""

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
    """The rows of a database. Any thread may call the methods. Each method raises DatabaseError."""

    def __init__(self, database: "Database", *, read_only: bool = False) -> None:
        self._database = database
        with database.reading() if read_only else database.writing() as connection:
            if not read_only:
                for statement in _TABLES:
                    connection.execute(statement)
                for name in _ADDED.keys() - _columns(connection):
                    connection.execute(f"ALTER TABLE accounts ADD COLUMN {name} {_ADDED[name]}")
            # A process that only reads cannot add the columns to a database of an earlier version.
            self._has_receipts = _columns(connection) >= _ADDED.keys()

    def enter(self, row: LedgerRow) -> bool:
        """Enter a row and count its job; False if the job has a row already.

        A row without `finished` gets the present time. A second report changes only the row of a reopened
        job, and the receipt of a row without a verified receipt.
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
                # The first report counted the job already. The row shows the fate of the second report.
                connection.execute(
                    "UPDATE accounts SET delivery = ?, code = ?, message = ?, finished = ?"
                    " WHERE job_id = ? AND delivery = ?",
                    (row.delivery, row.code, row.message, row.finished, row.job_id, REOPENED),
                )
                if row.receipt is not None:
                    # The first verified receipt stands: a result that the coordinator counted twice is still
                    # one job here.
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
        """Give the jobs among `job_ids` that have a row."""
        asked = msgspec.json.encode(list(job_ids)).decode()
        with self._database.reading() as connection:
            found = connection.execute(
                "SELECT job_id FROM accounts WHERE job_id IN (SELECT value FROM json_each(?))", (asked,)
            )
            return {job_id for (job_id,) in found}

    def finished_counts(self) -> dict[str, int]:
        """Count all jobs ever entered, by code; pruning does not change the counts."""
        with self._database.reading() as connection:
            return dict(connection.execute("SELECT code, jobs FROM finished").fetchall())

    def settled(self) -> set[str]:
        """Give all settled jobs that still have a directory here."""
        with self._database.reading() as connection:
            found = connection.execute(
                "SELECT job_id FROM accounts WHERE NOT swept AND delivery <> ?", (REOPENED,)
            )
            return {job_id for (job_id,) in found}

    def reopen(self, job_id: str) -> None:
        """Note that the agent will send the report of a job once more."""
        with self._database.writing() as connection:
            connection.execute("UPDATE accounts SET delivery = ? WHERE job_id = ?", (REOPENED, job_id))

    def latest(self, n: int) -> list[LedgerRow]:
        """Give the rows of the `n` jobs that were settled last, the newest last."""
        return list(self._select("ORDER BY finished DESC, rowid DESC LIMIT ?", n))[::-1]

    def of(self, job_id: str) -> LedgerRow | None:
        """Give a job's row, or None."""
        rows = list(self._select("WHERE job_id = ?", job_id))
        return rows[0] if rows else None

    def rows(self, since_s: float | None = None) -> Iterator[LedgerRow]:
        """Give the rows of the last `since_s` seconds, or all rows, the newest last.

        Locks the database object until the caller has taken the last row.
        """
        return self._select("WHERE finished >= ? ORDER BY finished, rowid", self._edge(since_s))

    def totals(self, since_s: float | None = None) -> Totals:
        """Sum up the rows of the last `since_s` seconds, or all rows."""
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
        return Totals(everything, slots, sorted(codes, key=lambda total: (-total.jobs, total.name)), days)

    def prune(self, keep_s: float = KEEP_S, limit: int = 1000) -> int:
        """Remove at most `limit` rows older than `keep_s`, the oldest first; gives their number.

        Keeps the row of a job that still has a directory here: the sweep finds the directory by the row.
        """
        with self._database.writing() as connection:
            return connection.execute(
                "DELETE FROM accounts WHERE rowid IN (SELECT rowid FROM accounts"
                " WHERE finished < ? AND swept ORDER BY finished LIMIT ?)",
                (self._edge(keep_s), limit),
            ).rowcount

    @property
    def there(self) -> bool:
        """Whether the database has the ledger's tables; without them, no other method works."""
        with self._database.reading() as connection:
            found = connection.execute("SELECT 1 FROM sqlite_schema WHERE name = 'finished'").fetchone()
            return found is not None

    @contextmanager
    def standing_still(self) -> Iterator[None]:
        """Make all reads inside see the same moment, even if other processes write meanwhile."""
        with self._database.reading() as connection:
            connection.execute("BEGIN")
            try:
                yield
            finally:
                connection.execute("ROLLBACK")

    # --- the jobs' directories -----------------------------------------------------------------------------

    def expired(self, keep_success_s: float, keep_failed_s: float, limit: int) -> list[str]:
        """Give at most `limit` jobs whose directories have reached their age, the oldest first."""
        return self._held(self._edge(keep_success_s), self._edge(keep_failed_s), limit)

    def oldest_delivered(self, limit: int) -> list[str]:
        """Give jobs whose directories may go early if space is short, the oldest first.

        Leaves out each job whose report the node may still have to send: a refused report, a refused result
        (E_UPLOAD), and a job that was handed on to the fleet and may come back.
        """
        return self._held(self._edge(0.0), self._edge(0.0), limit, early=True)

    def mark_swept(self, job_ids: Iterable[str]) -> None:
        """Note that the directories of these jobs are gone."""
        with self._database.writing() as connection:
            connection.executemany(
                "UPDATE accounts SET swept = 1 WHERE job_id = ?", [(job_id,) for job_id in job_ids]
            )

    def _held(self, succeeded_by: float, failed_by: float, limit: int, *, early: bool = False) -> list[str]:
        kinds = []
        with self._database.reading() as connection:
            for ok, by in ((1, succeeded_by), (0, failed_by)):
                found = connection.execute(
                    "SELECT finished, job_id FROM accounts INDEXED BY accounts_held WHERE NOT swept"
                    " AND (code IS NULL) = ? AND finished <= ? AND delivery <> ? AND NOT (? AND"
                    " (delivery IN ('refused', 'handed_on') OR coalesce(code, '') = 'E_UPLOAD'))"
                    " ORDER BY finished LIMIT ?",
                    (ok, by, REOPENED, early, limit),
                )
                kinds.append(found.fetchall())
        return [job_id for _, job_id in heapq.merge(*kinds)][:limit]

    def _edge(self, ago_s: float | None) -> float:
        return -1.0 if ago_s is None else self._database.now() - ago_s

    def _select(self, rest: str, value: float | str) -> Iterator[LedgerRow]:
        # The added columns are the last fields, and have defaults.
        listed = _LISTED if self._has_receipts else ", ".join(_COLUMNS[: -len(_ADDED)])
        with self._database.reading() as connection:
            for row in connection.execute(f"SELECT {listed} FROM accounts {rest}", (value,)):  # noqa: S608
                yield LedgerRow(*row)


def _columns(connection: "sqlite3.Connection") -> set[str]:
    return {name for (name,) in connection.execute("SELECT name FROM pragma_table_info('accounts')")}


def _sum(one: float | None, other: float | None) -> float | None:
    return one if other is None else other if one is None else one + other
