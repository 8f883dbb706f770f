"""What each job came to: entered once, counted for ever, pruned by a clock that nobody sets."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from aitbc_miner.errors import ErrorCode
from aitbc_miner.identity.receipts import Receipt
from aitbc_miner.jobs import Artifact, Outcome, State, StateRecord, Usage
from aitbc_miner.store.database import Database, DatabaseError
from aitbc_miner.store.ledger import Ledger, LedgerRow, Total, Totals, account_of
from tests.support.stopped_clock import Time

DAY = 86_400.0


@pytest.fixture
def database(tmp_path: Path, time: Time) -> Iterator[Database]:
    made = Database(tmp_path / "q.db")
    yield made
    made.close()


@pytest.fixture
def accounts(database: Database) -> Ledger:
    return Ledger(database)


def row(job_id: str, code: ErrorCode | None = None, **more: Any) -> LedgerRow:
    given = {"slot": "cpu0", "runner": "cli", "message": "", "delivery": "accepted", "attempts": 1}
    return LedgerRow(job_id=job_id, code=code, **{**given, "finished_wall": "2026-07-01T10:00:00Z", **more})


def enter(accounts: Ledger, *rows: LedgerRow) -> None:
    for each in rows:
        assert accounts.enter(each)


def ids(rows: Iterator[LedgerRow] | list[LedgerRow]) -> list[str]:
    return [each.job_id for each in rows]


# --- entering ----------------------------------------------------------------------------------------------


def test_a_row_comes_back_as_it_was_entered(accounts: Ledger) -> None:
    whole = row(
        "j1",
        ErrorCode.E_OOM,
        message="too much\nof it \x00",
        finished=7.5,
        **{name: number for number, name in enumerate(LedgerRow.__struct_fields__[9:-1], 11)},
        receipt="verified",
    )
    bare = row("j2", slot=None, finished=8.0)
    enter(accounts, whole, bare)
    assert accounts.of("j1") == whole
    assert accounts.of("j2") == bare
    assert accounts.of("j3") is None


def test_a_job_is_entered_and_counted_once(accounts: Ledger) -> None:
    enter(accounts, row("j1"), row("j2", ErrorCode.E_EXIT), row("j3"))
    assert not accounts.enter(row("j1", ErrorCode.E_LOST, message="again"))
    assert accounts.finished_counts() == {"OK": 2, "E_EXIT": 1}
    assert (accounts.of("j1") or row("none")).code is None


def test_a_row_that_cannot_be_entered_is_not_counted(accounts: Ledger, database: Database) -> None:
    with database.writing() as connection:
        connection.execute("DROP TABLE finished")
    with pytest.raises(DatabaseError):
        accounts.enter(row("j1"))
    assert not accounts.knows("j1"), "the row and its count are one transaction"


def test_counts_and_rows_are_there_for_the_next(accounts: Ledger, database: Database) -> None:
    enter(accounts, row("j1"))
    again = Database(database.path)
    assert Ledger(again).finished_counts() == {"OK": 1}
    assert not Ledger(again).enter(row("j1"))
    again.close()


def test_known_ones_are_found_among_many(accounts: Ledger) -> None:
    enter(accounts, *(row(f"j{number}") for number in range(20)))
    asked = [f"j{number}" for number in range(10, 2000)]
    assert accounts.known(asked) == {f"j{number}" for number in range(10, 20)}
    assert accounts.known([]) == set()
    assert accounts.knows("j3")
    assert not accounts.knows("j20")


def test_nothing_that_is_done_often_walks_through_all_rows(accounts: Ledger, database: Database) -> None:
    enter(accounts, *(row(f"j{number}") for number in range(100)))
    said: list[str] = []
    with database.reading() as connection:
        connection.set_trace_callback(said.append)
        accounts.knows("j1")
        accounts.of("j1")
        accounts.latest(5)
        list(accounts.rows(5.0))
        accounts.prune()
        accounts.expired(1.0, 1.0, 5)
        accounts.oldest_delivered(5)
        accounts.mark_swept(["j1"])
        connection.set_trace_callback(None)
        asked = [text for text in said if "accounts" in text]
        plans = [
            text
            for query in asked
            for *_, text in connection.execute(f"EXPLAIN QUERY PLAN {query}").fetchall()
        ]
    assert len(asked) == 10
    walks = [plan for plan in plans if plan.endswith("SCAN accounts") or "TEMP B-TREE" in plan]
    assert walks == []


def test_the_latest_are_given_with_the_newest_last(accounts: Ledger, time: Time) -> None:
    for number in range(5):
        time.now += 1
        enter(accounts, row(f"j{number}"))
    enter(accounts, row("same time"))
    assert ids(accounts.latest(3)) == ["j3", "j4", "same time"]


def test_what_is_read_at_once_is_of_one_moment(accounts: Ledger, database: Database) -> None:
    enter(accounts, row("j1"))
    seen = Ledger(Database(database.path, read_only=True), read_only=True)
    assert seen.there
    with seen.standing_still():
        assert seen.totals().all.jobs == 1
        enter(accounts, row("j2"))
        assert ids(seen.rows()) == ["j1"]
    assert seen.totals().all.jobs == 2


def test_a_database_without_accounts_says_so(database: Database) -> None:
    with database.writing():
        pass
    assert not Ledger(Database(database.path, read_only=True), read_only=True).there


# --- time --------------------------------------------------------------------------------------------------


def test_the_wall_clock_changes_nothing(accounts: Ledger, time: Time) -> None:
    for year in (1970, 2036, 2016):
        enter(accounts, row(f"in {year}", finished_wall=f"{year}-01-01T00:00:00.000Z"))
        time.now += 10
    accounts.mark_swept(["in 1970", "in 2036", "in 2016"])
    assert ids(accounts.rows(since_s=15.0)) == ["in 2016"]
    assert ids(accounts.rows(since_s=25.0)) == ["in 2036", "in 2016"]
    assert accounts.prune(keep_s=25.0) == 1
    assert ids(accounts.rows()) == ["in 2036", "in 2016"]


def test_old_rows_are_pruned_a_few_at_a_time_and_their_counts_stay(accounts: Ledger, time: Time) -> None:
    enter(accounts, *(row(f"old{number}", finished=float(number)) for number in range(5)))
    time.now += 91 * DAY
    enter(accounts, row("new"))
    assert accounts.prune() == 0, "their directories are still there"
    accounts.mark_swept([*(f"old{number}" for number in range(5)), "new", "unknown"])
    assert accounts.prune(limit=3) == 3
    assert ids(accounts.rows()) == ["old3", "old4", "new"]
    assert [accounts.prune(limit=3), accounts.prune(limit=3)] == [2, 0]
    assert accounts.finished_counts() == {"OK": 6}


def test_directories_are_kept_for_as_long_as_what_came_of_their_jobs(accounts: Ledger, time: Time) -> None:
    enter(accounts, row("bad1", ErrorCode.E_EXIT), row("good1"))
    time.now += DAY
    enter(accounts, row("good2"), row("bad2", ErrorCode.E_OOM, delivery="superseded"))
    time.now += DAY / 2
    assert accounts.expired(DAY, 7 * DAY, 10) == ["good1"]
    time.now += 6 * DAY
    assert accounts.expired(DAY, 7 * DAY, 10) == ["bad1", "good1", "good2"]
    assert accounts.expired(DAY, 7 * DAY, 2) == ["bad1", "good1"]
    accounts.mark_swept(["bad1", "good1"])
    assert accounts.expired(DAY, 7 * DAY, 10) == ["good2"]


def test_for_space_the_oldest_delivered_go_first_and_what_was_refused_stays(
    accounts: Ledger, time: Time
) -> None:
    for number, delivery in enumerate(("accepted", "refused", "superseded", "lost", "accepted")):
        time.now += 1
        enter(accounts, row(f"j{number}", ErrorCode.E_EXIT if number % 2 else None, delivery=delivery))
    assert accounts.oldest_delivered(10) == ["j0", "j2", "j3", "j4"]
    assert accounts.oldest_delivered(2) == ["j0", "j2"]
    accounts.mark_swept(["j0", "j2"])
    assert accounts.oldest_delivered(2) == ["j3", "j4"]


def test_a_report_that_goes_out_again_keeps_its_directory(accounts: Ledger, time: Time) -> None:
    enter(accounts, row("j1", ErrorCode.E_UPLOAD, delivery="refused"))
    accounts.reopen("j1")
    time.now += 30 * DAY
    assert accounts.expired(0.0, 0.0, 10) == []
    assert accounts.oldest_delivered(10) == []
    assert accounts.settled() == set()
    assert not accounts.enter(row("j1", message="taken at last"))
    assert accounts.settled() == {"j1"}
    assert (accounts.of("j1") or row("none")).delivery == "accepted"
    assert accounts.finished_counts() == {"E_UPLOAD": 1}


# --- sums --------------------------------------------------------------------------------------------------


def test_totals(accounts: Ledger, time: Time) -> None:
    enter(accounts, row("before", cpu_s=1000.0))
    time.now += 100
    enter(
        accounts,
        row("j1", cpu_s=1.5, gpu_s=3.0, artifact_bytes=100, finished_wall="2026-07-02T00:00:00Z"),
        row("j2", slot="gpu0", cpu_s=2.0, artifact_bytes=10),
        row("j3", ErrorCode.E_EXIT, slot="gpu0", artifact_bytes=1),
        row("j4", ErrorCode.E_DENY, slot=None, finished_wall=""),
        row("j5", delivery="superseded", artifact_bytes=5),
    )
    both = Total("gpu0", 2, 1, 1, 2.0, None, 11)
    assert accounts.totals(since_s=50.0) == Totals(
        Total("all", 5, 3, 2, 3.5, 3.0, 111),
        [Total("cpu0", 2, 2, 0, 1.5, 3.0, 100), both, Total("none", 1, 0, 1)],
        [
            Total("OK", 3, 3, 0, 3.5, 3.0, 110),
            Total("E_DENY", 1, 0, 1),
            Total("E_EXIT", 1, 0, 1, None, None, 1),
        ],
        [
            Total("2026-07-01", 3, 2, 1, 2.0, None, 11),
            Total("2026-07-02", 1, 1, 0, 1.5, 3.0, 100),
            Total("unknown", 1, 0, 1),
        ],
    )
    assert accounts.totals().all.cpu_s == 1003.5
    assert accounts.totals(since_s=0.0).all.jobs == 5
    time.now += 1
    assert accounts.totals(since_s=0.0) == Totals()


def test_receipts_are_added_up_and_those_that_do_not_verify_apart(accounts: Ledger) -> None:
    good: dict[str, Any] = {"receipt": "verified"}
    enter(
        accounts,
        row("j1", **good, units=1.5, price=0.25),
        row("j2", **good, units=2.0, price=0.5),
        row("j3", **good, units=None, price=None, finished_wall="2026-07-02T00:00:00Z"),
        row("j4", receipt="unverified", units=1000.0, price=1000.0),
        row("j5"),
    )
    totals = accounts.totals()
    assert totals.all == Total("all", 5, 5, receipts=3, units=3.5, price=0.75, unverified=1)
    assert totals.days == [
        Total("2026-07-01", 4, 4, receipts=2, units=3.5, price=0.75, unverified=1),
        Total("2026-07-02", 1, 1, receipts=1),
    ]


@pytest.mark.parametrize(
    ("first", "second", "kept"),
    [
        (None, ("verified", 1.0), ("verified", 1.0)),
        (("unverified", 1.0), ("verified", 2.0), ("verified", 2.0)),
        (("verified", 1.0), ("verified", 2.0), ("verified", 1.0)),
        (("verified", 1.0), ("unverified", 2.0), ("verified", 1.0)),
        (("verified", 1.0), None, ("verified", 1.0)),
    ],
)
def test_a_job_has_one_receipt_however_often_its_result_was_sent(
    accounts: Ledger,
    first: tuple[str, float] | None,
    second: tuple[str, float] | None,
    kept: tuple[str, float],
) -> None:
    for number, given in enumerate((first, second)):
        receipt, units = given or (None, None)
        assert accounts.enter(row("j1", receipt=receipt, units=units)) == (number == 0)
    found = accounts.of("j1")
    assert found is not None
    assert (found.receipt, found.units) == kept
    assert accounts.totals().all.receipts == 1
    assert accounts.finished_counts() == {"OK": 1}


def test_a_report_that_was_sent_once_more_brings_its_receipt(accounts: Ledger) -> None:
    enter(accounts, row("j1", ErrorCode.E_UPLOAD, delivery="refused"))
    accounts.reopen("j1")
    assert not accounts.enter(row("j1", receipt="verified", price=0.5))
    found = accounts.of("j1")
    assert found is not None
    assert (found.code, found.delivery, found.receipt, found.price) == (None, "accepted", "verified", 0.5)


# --- a database of an earlier version ----------------------------------------------------------------------

BEFORE_RECEIPTS = """
    CREATE TABLE accounts (
        job_id TEXT PRIMARY KEY, slot TEXT, runner TEXT NOT NULL, code TEXT, message TEXT NOT NULL,
        delivery TEXT NOT NULL, attempts INTEGER NOT NULL, finished_wall TEXT NOT NULL,
        finished REAL NOT NULL, wall_s REAL, cpu_s REAL, gpu_s REAL, peak_memory_bytes INTEGER,
        peak_vram_bytes INTEGER, read_bytes INTEGER, written_bytes INTEGER,
        artifact_bytes INTEGER NOT NULL, artifacts INTEGER NOT NULL, swept INTEGER NOT NULL DEFAULT 0
    ) STRICT;
    CREATE INDEX accounts_finished ON accounts (finished);
    CREATE INDEX accounts_held ON accounts (code IS NULL, finished) WHERE NOT swept;
    CREATE TABLE finished (code TEXT PRIMARY KEY, jobs INTEGER NOT NULL) STRICT;
    INSERT INTO finished VALUES ('OK', 7);
    INSERT INTO accounts VALUES ('old', 'cpu0', 'cli', NULL, '', 'accepted', 1, '2026-07-01T10:00:00Z',
        1.0, 2.0, 3.0, NULL, 4, NULL, 5, 6, 7, 8, 1);
"""
OLD = row(
    "old",
    finished=1.0,
    wall_s=2.0,
    cpu_s=3.0,
    peak_memory_bytes=4,
    read_bytes=5,
    written_bytes=6,
    artifact_bytes=7,
    artifacts=8,
)


@pytest.fixture
def earlier(database: Database) -> Database:
    """Give a database as nodes made it that knew of no receipts."""
    with database.writing() as connection:
        for statement in BEFORE_RECEIPTS.split(";"):
            connection.execute(statement)
    return database


def test_an_earlier_database_is_brought_up_to_date_once(earlier: Database) -> None:
    for _ in range(2):
        accounts = Ledger(earlier)
        assert list(accounts.rows()) == [OLD]
        assert accounts.settled() == set(), "of what else it knows nothing is lost"
    enter(accounts, row("new", receipt="verified", price=0.5, finished=2.0))
    assert ids(Ledger(earlier).rows()) == ["old", "new"]
    assert accounts.totals().all == Total("all", 2, 2, 0, 3.0, None, 7, 1, None, 0.5)
    assert accounts.finished_counts() == {"OK": 8}


def test_who_only_looks_reads_an_earlier_database_as_it_is(earlier: Database) -> None:
    with earlier.reading() as connection:
        before = connection.execute("SELECT sql FROM sqlite_schema").fetchall()
    looking = Ledger(Database(earlier.path, read_only=True), read_only=True)
    assert looking.there
    assert list(looking.rows()) == looking.latest(5) == [looking.of("old")] == [OLD]
    assert looking.totals().all == Total("all", 1, 1, 0, 3.0, None, 7)
    with earlier.reading() as connection:
        assert connection.execute("SELECT sql FROM sqlite_schema").fetchall() == before
        # Who looked before goes on looking after it was brought up to date.
    Ledger(earlier)
    assert list(looking.rows()) == [OLD]


# --- making one --------------------------------------------------------------------------------------------


def test_a_row_is_made_of_what_is_on_record() -> None:
    usage = Usage(3.0, 1.0, 0.5, peak_memory_bytes=7, read_bytes=8, written_bytes=9, gpu_s=2.0)
    files = [Artifact(f"a{size}", "f", size, "0" * 64) for size in (10, 20)]
    outcome = Outcome("j1", slot="cpu0", usage=usage, artifacts=files, finished_wall="2026-07-01T10:00:00Z")
    made = account_of(outcome, StateRecord("j1", State.DONE, slot="other", attempt=3), "python", "accepted")
    assert (made.job_id, made.slot, made.runner, made.code) == ("j1", "cpu0", "python", None)
    assert (made.delivery, made.attempts, made.finished_wall) == ("accepted", 3, "2026-07-01T10:00:00Z")
    assert (made.wall_s, made.cpu_s, made.gpu_s) == (3.0, 1.5, 2.0)
    assert (made.peak_memory_bytes, made.read_bytes, made.written_bytes) == (7, 8, 9)
    assert (made.artifact_bytes, made.artifacts, made.peak_vram_bytes) == (30, 2, None)


def test_a_row_counts_what_the_client_gets() -> None:
    files = [Artifact(name, name, 1, "0" * 64) for name in ("a", "logs/exec.log")]
    outcome, state = Outcome("j1", artifacts=files), StateRecord("j1", State.DONE)
    assert account_of(outcome, state, "cli", "accepted").artifacts == 2
    assert account_of(outcome, state, "cli", "accepted", log_too=False).artifacts == 1


def test_a_row_of_a_job_that_was_in_no_slot() -> None:
    outcome = Outcome("j1", code=ErrorCode.E_LOST, message="x" * 10_000)
    made = account_of(outcome, StateRecord("j1", State.FAILED, slot="cpu3"), "cli", "superseded")
    assert (made.code, made.slot, made.cpu_s, made.gpu_s, made.artifacts) == ("E_LOST", "cpu3", None, None, 0)
    assert len(made.message) == 200


@pytest.mark.parametrize(("verified", "shown"), [(True, "verified"), (False, "unverified")])
def test_a_row_has_what_the_receipt_says(*, verified: bool, shown: str) -> None:
    state = StateRecord("j1", State.DONE)
    receipt = Receipt({"units": 1.5}, verified, "", 1.5, None)
    made = account_of(Outcome("j1"), state, "cli", "accepted", receipt)
    assert (made.receipt, made.units, made.price) == (shown, 1.5, None)
    made = account_of(Outcome("j1"), state, "cli", "accepted")
    assert (made.receipt, made.units, made.price) == (None, None, None)
