"""The node's own database: one SQLite file, written through to the disk, with a clock that no one sets.

What it holds can be made anew from the jobs' records, or is about jobs whose directories are gone: a file
that is broken is set aside, and the node goes on with a new one.
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

# SQLite quotes the file in what it says of it, and Python takes that for UTF-8.
_BROKEN = (sqlite3.Error, UnicodeDecodeError)

_STEADY = """
CREATE TABLE IF NOT EXISTS steady (
    id INTEGER PRIMARY KEY CHECK (id = 1), value REAL NOT NULL, boot TEXT NOT NULL, at REAL NOT NULL
) STRICT
"""


class DatabaseError(MinerError):
    """The database cannot be opened, read or written. "cannot X: cause; remedy"."""


class Database:
    """An open database file. Its methods may be called from any thread, and take turns.

    `read_only` is for another process that only looks; `still` if nobody has it open to write.
    """

    def __init__(self, path: Path, *, read_only: bool = False, still: bool = False) -> None:
        self.path = path
        self._lock = threading.RLock()
        self._connection = _connect_read_only(path, still=still) if read_only else _open(path)
        self._base, self._boot, self._at = self._load_steady()

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """Give the connection for looking.

        Raises:
            DatabaseError: it cannot be read.
        """
        with self._lock, _telling(f"read {self.path}"):
            yield self._connection

    @contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """Give the connection for one transaction, which is on the disk at the end, or undone.

        Raises:
            DatabaseError: it cannot be written; nothing of the transaction was.
        """
        with self._lock, _telling(f"write {self.path}"):
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield self._connection
                self._save_steady()
                self._connection.execute("COMMIT")
            except BaseException:
                # A full disk may have rolled it back already.
                with contextlib.suppress(sqlite3.Error):
                    self._connection.execute("ROLLBACK")
                raise

    def now(self) -> float:
        """Give the seconds that this machine has been up since the file was made, over all boots together.

        What time it is does not matter, nor how often that is set. Hours switched off do not count, nor what
        has passed between the last write and a power cut.
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
        # Another boot had lasted so long when it was last heard of; this one, since its clock was 0.
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
        raise DatabaseError(
            f"cannot {doing}: {error}; free space on its disk, or mend what is said"
        ) from error


def _open(path: Path) -> sqlite3.Connection:
    with _telling(f"open {path}"):
        path.parent.mkdir(mode=0o750, parents=True, exist_ok=True)
        try:
            return _connect(path)
        except _BROKEN as error:
            if isinstance(error, sqlite3.OperationalError):
                raise  # a full disk, a lock: nothing is wrong with the file
            _set_aside(path, error)
            return _connect(path)


def _connect(path: Path) -> sqlite3.Connection:
    # Before SQLite does: what it makes beside a file gets the file's mode, and jobs of others may look there.
    path.touch(mode=0o640)
    connection = sqlite3.connect(path, timeout=BUSY_S, isolation_level=None, check_same_thread=False)
    try:
        connection.execute("PRAGMA journal_mode = WAL")
        # In WAL mode anything less may lose what was committed, when the power fails.
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
    # All of ours are STRICT. It may be in order, and somebody else's, who would miss it if it were set aside.
    strange = connection.execute(
        "SELECT name FROM pragma_table_list WHERE schema = 'main' AND NOT strict AND name NOT LIKE 'sqlite%'"
    ).fetchone()
    if strange:
        raise sqlite3.OperationalError(f"it is another program's, with a table {strange[0][:80]!r}")


def _connect_read_only(path: Path, *, still: bool) -> sqlite3.Connection:
    with _telling(f"open {path}"):
        # SQLite would make a log beside it, and leave it there.
        as_it_is = "&immutable=1" if still and not Path(f"{path}-wal").exists() else ""
        uri = f"{path.absolute().as_uri()}?mode=ro{as_it_is}"
        return sqlite3.connect(uri, uri=True, timeout=BUSY_S, isolation_level=None, check_same_thread=False)


def _set_aside(path: Path, error: Exception) -> None:
    number = 1
    while (aside := path.with_name(f"{path.name}.broken-{number}")).exists():
        number += 1
    for suffix in ("-wal", "-shm"):
        # They belong to the broken one, and would be played into the new one.
        with contextlib.suppress(FileNotFoundError):
            Path(f"{path}{suffix}").rename(f"{aside}{suffix}")
    path.rename(aside)
    events("agent").error("database set aside", path=str(path), aside=str(aside), error=str(error))
