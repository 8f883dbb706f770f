"""The database file: transactions, the clock that goes on over boots, and what is broken."""

import contextlib
import sqlite3
from pathlib import Path

import pytest

from aitbc_miner.store import database
from aitbc_miner.store.database import Database, DatabaseError


def test_what_was_written_is_there_for_the_next(tmp_path: Path) -> None:
    first = Database(tmp_path / "q.db")
    with first.writing() as connection:
        connection.execute("CREATE TABLE t (x)")
        connection.execute("INSERT INTO t VALUES (7)")
    first.close()
    with Database(tmp_path / "q.db", read_only=True).reading() as connection:
        assert connection.execute("SELECT x FROM t").fetchall() == [(7,)]


def test_it_is_written_through_to_the_disk(tmp_path: Path) -> None:
    with Database(tmp_path / "q.db").reading() as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        assert connection.execute("PRAGMA synchronous").fetchone() == (2,)  # FULL


def execute(base: Database, *statements: str) -> None:
    with base.writing() as connection:
        for statement in statements:
            connection.execute(statement)


def test_a_failed_transaction_leaves_nothing(tmp_path: Path) -> None:
    base = Database(tmp_path / "q.db")
    with base.writing() as connection:
        connection.execute("CREATE TABLE t (x)")
    both = "INSERT INTO t VALUES (1)", "INSERT INTO nowhere VALUES (1)"
    with pytest.raises(DatabaseError, match=r"cannot write .*q\.db: "):
        execute(base, *both)
    with base.writing() as connection:
        assert connection.execute("SELECT count(*) FROM t").fetchone() == (0,)


class Time:
    """A machine's time, to be moved by hand."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.boot = 1000.0, "a"
        monkeypatch.setattr("aitbc_miner.util.clock.now", lambda: self.now)
        monkeypatch.setattr(database, "boot_id", lambda: self.boot)


def test_its_clock_goes_on_over_restarts_and_boots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    time = Time(monkeypatch)
    base = Database(tmp_path / "q.db")
    assert base.now() == 0.0
    time.now = 1100.0
    with base.writing():
        pass
    assert base.now() == 100.0
    base.close()
    time.now = 1150.0
    base = Database(tmp_path / "q.db")
    assert base.now() == 150.0
    base.close()
    # The machine is down for a while, and has been up again for 30 s; the 50 s since the last write are lost.
    time.now, time.boot = 30.0, "b"
    base = Database(tmp_path / "q.db")
    assert base.now() == 130.0
    with base.writing():
        pass
    time.now = 40.0
    assert base.now() == 140.0


@pytest.mark.parametrize(
    "content", [b"this is no database, but text" * 100, b"SQLite format 3\0" + b"\xff" * 4096]
)
def test_a_broken_file_is_set_aside(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "q.db"
    path.write_bytes(content)
    base = Database(path)
    with base.writing() as connection:
        connection.execute("CREATE TABLE t (x)")
    assert (tmp_path / "q.db.broken-1").read_bytes() == content


def test_a_file_that_sqlite_cannot_quote_is_set_aside(tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("CREATE TABLE t (x TEXT) STRICT")
    connection.execute("PRAGMA writable_schema = 1")
    connection.execute("UPDATE sqlite_schema SET name = CAST(x'80' AS TEXT), sql = 'CREATE TABLE'")
    connection.close()
    with (
        pytest.raises(DatabaseError, match="cannot read"),
        contextlib.closing(Database(path, read_only=True)),
    ):
        pass
    Database(path).close()
    assert path.with_name("a.db.broken-1").exists()


def test_a_torn_file_is_set_aside(tmp_path: Path) -> None:
    path = tmp_path / "q.db"
    base = sqlite3.connect(path)
    base.execute("CREATE TABLE t (x)")
    base.executemany("INSERT INTO t VALUES (?)", [("x" * 1000,)] * 100)
    base.commit()
    base.close()
    path.write_bytes(path.read_bytes()[:20_000])
    Database(path).close()
    assert (tmp_path / "q.db.broken-1").exists()


def test_what_cannot_be_opened_is_told(tmp_path: Path) -> None:
    (tmp_path / "q.db").mkdir()
    with pytest.raises(DatabaseError, match=r"cannot open .*q\.db: .*; "):
        Database(tmp_path / "q.db")
