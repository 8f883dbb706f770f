"""The node's own database: one SQLite file, written through to the disk, with a clock that nobody sets.

The node can make the contents anew from the jobs' records, except for jobs whose directories are gone. So it
sets a broken file aside and continues with a new file.
"""

import contextlib
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from aitbc_miner.errors import MinerError
from aitbc_miner.util import clock
from aitbc_miner.util.log import events
from aitbc_miner.util.system import boot_id

BUSY_S = 10.0

# SQLite quotes the file in its error messages, and Python decodes the messages as UTF-8.
_BROKEN = (sqlite3.Error, UnicodeDecodeError)

_STEADY = """
CREATE TABLE IF NOT EXISTS steady (
    id INTEGER PRIMARY KEY CHECK (id = 1), value REAL NOT NULL, boot TEXT NOT NULL, at REAL NOT NULL
) STRICT
"""


class DatabaseError(MinerError):
    """The node cannot open, read or write the database. "cannot X: cause; remedy"."""


class Database:
    """An open database file. Any thread may call the methods; a lock makes the threads take turns.

    `read_only` is for a process that only reads; `still`: no process has the file open for writing.
    """

    def __init__(self, path: Path, *, read_only: bool = False, still: bool = False) -> None:
        self.path = path
        self._lock = threading.RLock()
        self._connection = _connect_read_only(path, still=still) if read_only else _open(path)
        self._base, self._boot, self._at = self._load_steady()

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """Give the connection for reading.

        Raises:
            DatabaseError: SQLite cannot read the database.
        """
        with self._lock, _telling(f"read {self.path}"):
            yield self._connection

    @contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """Give the connection for one transaction. At the end the transaction is on the disk, or undone.

        Raises:
            DatabaseError: SQLite cannot write the database; the whole transaction is undone.
        """
        with self._lock, _telling(f"write {self.path}"):
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield self._connection
                self._save_steady()
                self._connection.execute("COMMIT")
            except BaseException:
                # After an error such as a full disk, SQLite may have rolled back the transaction already.
                with contextlib.suppress(sqlite3.Error):
                    self._connection.execute("ROLLBACK")
                raise

    def now(self) -> float:
        """Give the uptime of this machine since the file was made, in seconds, over all boots together.

        Nobody can set this clock. Time switched off does not count, nor the time between the last write and a
        power cut.
        """
        with self._lock:
            return self._base + clock.now() - self._at

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._connection.close()

    def _load_steady(self) -> tuple[float, str, float]:
        with self.reading() as connection:
            row = connection.execute("SELECT value, boot, at FROM steady").fetchone()
        value, boot, at = row or (0.0, boot_id(), clock.now())
        # Count on from the stored uptime; after a reboot, from the start of this boot.
        return value, boot_id(), at if boot == boot_id() else 0.0

    def _save_steady(self) -> None:
        self._connection.execute(
            "INSERT INTO steady VALUES (1, ?, ?, ?) ON CONFLICT (id) DO UPDATE"
            " SET value = excluded.value, boot = excluded.boot, at = excluded.at",
            (self.now(), self._boot, clock.now()),
        )


@contextmanager
def _telling(doing: str) -> Iterator[None]:
    try:
        yield
    except (*_BROKEN, OSError) as error:
        raise DatabaseError(f"cannot {doing}: {error}; free disk space, or check owner and mode") from error


def _open(path: Path) -> sqlite3.Connection:
    with _telling(f"open {path}"):
        path.parent.mkdir(mode=0o750, parents=True, exist_ok=True)
        try:
            return _connect(path)
        except _BROKEN as error:
            if isinstance(error, sqlite3.OperationalError):
                raise  # a full disk or a lock: the file itself is in order
            _set_aside(path, error)
            return _connect(path)


def _connect(path: Path) -> sqlite3.Connection:
    # Made before SQLite opens it: SQLite's further files get the mode of this file, and no job may read them.
    path.touch(mode=0o640)
    connection = sqlite3.connect(path, timeout=BUSY_S, isolation_level=None, check_same_thread=False)
    try:
        connection.execute("PRAGMA journal_mode = WAL")
        # In WAL mode any lower level may lose committed transactions at a power cut.
        connection.execute("PRAGMA synchronous = FULL")
        _check(connection)
        connection.execute(_STEADY)
    except BaseException:
        connection.close()
        raise
    return connection


def _check(connection: sqlite3.Connection) -> None:
    found = connection.execute("PRAGMA quick_check(1)").fetchone()
    if found != ("ok",):
        raise sqlite3.DatabaseError(str(found and found[0]))
    # All our tables are STRICT. The file of another program may be in order, so it must stay in its place.
    strange = connection.execute(
        "SELECT name FROM pragma_table_list WHERE schema = 'main' AND NOT strict AND name NOT LIKE 'sqlite%'"
    ).fetchone()
    if strange:
        table = strange[0][:80]
        raise sqlite3.OperationalError(f"not the miner's database: the file has a table {table!r}")


def _connect_read_only(path: Path, *, still: bool) -> sqlite3.Connection:
    with _telling(f"open {path}"):
        # Without `immutable`, SQLite would make a log beside the file and leave the log behind.
        immutable = "&immutable=1" if still and not Path(f"{path}-wal").exists() else ""
        uri = f"{path.absolute().as_uri()}?mode=ro{immutable}"
        return sqlite3.connect(uri, uri=True, timeout=BUSY_S, isolation_level=None, check_same_thread=False)


def _set_aside(path: Path, error: Exception) -> None:
    number = 1
    while (aside := path.with_name(f"{path.name}.broken-{number}")).exists():
        number += 1
    for suffix in ("-wal", "-shm"):
        # SQLite would apply the log of the broken file to the new file.
        with contextlib.suppress(FileNotFoundError):
            Path(f"{path}{suffix}").rename(f"{aside}{suffix}")
    path.rename(aside)
    events("agent").error("database set aside", path=str(path), aside=str(aside), error=str(error))
