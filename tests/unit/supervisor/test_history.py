"""The history of jobs on its way from the database to the operator."""

import contextlib
import csv
import io
import json
import os
import sqlite3
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from aitbc_miner.control.protocol import LATER_S, Done, History, Request
from aitbc_miner.ctl import ask
from aitbc_miner.ctl import main as ctl
from aitbc_miner.ctl.history_page import csv_lines, history_page, json_lines, read_rows, read_totals
from aitbc_miner.ctl.pages import plain
from aitbc_miner.errors import ErrorCode
from aitbc_miner.store import database
from aitbc_miner.store.database import Database
from aitbc_miner.store.ledger import Ledger, LedgerRow, Total, Totals
from aitbc_miner.supervisor import slow_answers
from aitbc_miner.util import clock

EVIL = "=cmd|'/c calc'!A1\n\"; \x1b[2J\u2028,end"
WEEK = 604_800.0


def row(job_id: str, code: str | None = None, **more: Any) -> LedgerRow:
    given = {"slot": "cpu0", "runner": "cli", "message": "", "delivery": "accepted", "attempts": 1}
    return LedgerRow(job_id=job_id, code=code, **{**given, "finished_wall": "2026-07-01T10:00:00Z", **more})


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Give a database with two jobs in it."""
    made = Database(tmp_path / "q.db")
    for each in (row("j1", cpu_s=90.0, artifact_bytes=2048), row("j2", "E_EXIT", message=EVIL)):
        Ledger(made).enter(each)
    made.close()
    return tmp_path / "q.db"


def read(path: Path, **asked: Any) -> tuple[Totals, list[LedgerRow]]:
    out = io.BytesIO()
    assert slow_answers.read_history(path, Request("history", **asked), out) == ""
    return read_totals(out), list(read_rows(out))


# --- reading the database ----------------------------------------------------------------------------------


def test_totals_come_first_and_then_each_job_that_is_asked_for(path: Path) -> None:
    totals, rows = read(path)
    assert (totals.all.jobs, totals.all.delivered_bytes, rows) == (2, 2048, [])
    totals, rows = read(path, each=True)
    assert [each.job_id for each in rows] == ["j1", "j2"]
    assert rows[1].message == EVIL


def test_only_the_time_that_is_asked_for_counts(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    later = clock.now() + 100
    monkeypatch.setattr(clock, "now", lambda: later)
    assert read(path, since_s=1000.0)[0].all.jobs == 2
    assert read(path, since_s=50.0, each=True) == (Totals(), [])


def test_without_a_database_the_history_is_empty(tmp_path: Path) -> None:
    assert read(tmp_path / "none" / "q.db", each=True) == (Totals(), [])
    assert not (tmp_path / "none").exists()


def test_without_accounts_it_is_empty_too(tmp_path: Path) -> None:
    Database(tmp_path / "q.db").close()
    assert read(tmp_path / "q.db", each=True) == (Totals(), [])


def test_reading_changes_nothing_beside_a_node_that_writes(path: Path) -> None:
    node = Database(path)
    try:
        with node.writing() as connection:
            connection.execute("DELETE FROM accounts")
            assert read(path)[0].all.jobs == 2
        assert read(path)[0].all.jobs == 0
    finally:
        node.close()


def fault(path: Path) -> str:
    out = io.BytesIO()
    told = slow_answers.read_history(path, Request("history"), out)
    assert told.startswith("cannot show the history")
    assert str(path) in told
    assert "; " in told
    return told


def test_a_broken_file_is_told_and_left_as_it_is(path: Path) -> None:
    path.write_bytes(b"this is no database, but text" * 100)
    assert "is not a database" in fault(path)
    assert path.exists()


def test_a_locked_file_is_told(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database, "BUSY_S", 0.05)
    with sqlite3.connect(path, isolation_level=None) as holder:
        holder.execute("PRAGMA journal_mode = DELETE")
        holder.execute("BEGIN EXCLUSIVE")
        assert "locked" in fault(path)
        holder.execute("ROLLBACK")
    holder.close()


def test_a_directory_that_cannot_be_entered_is_told(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(_: Path) -> bool:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "exists", denied)
    assert "Permission denied; let the miner's user" in fault(path)


def test_more_than_there_is_room_for_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slow_answers, "MAX_HISTORY", 10)
    assert read(path)[0].all.jobs == 2, "the totals are never too much"
    told = slow_answers.read_history(path, Request("history", each=True), io.BytesIO())
    assert told.endswith("; choose a shorter time with --since")


# --- for the operator --------------------------------------------------------------------------------------

TOTALS = Totals(
    Total("all", 3, 2, 1, 93_784.0, None, 3 << 30),
    [Total("cpu0", 2, 2, 0, 93_783.5, None, 3 << 30), Total("s" * 60, 1, 0, 1, 0.5)],
    [Total("OK", 2, 2, 0, 93_783.5, None, 3 << 30), Total("E_EXIT", 1, 0, 1, 0.5)],
    [Total("2026-07-01", 3, 2, 1, 93_784.0, 60.0, 1536)],
)


def test_the_page() -> None:
    page = history_page(TOTALS, WEEK, plain).splitlines()
    assert max(map(len, page)) == 80
    assert [line.split() for line in page if line.startswith(("SLOT", "cpu0", "E_EXIT", "2026"))] == [
        ["SLOT", "JOBS", "OK", "FAILED", "CPU", "TIME", "GPU", "TIME", "DELIVERED"],
        ["cpu0", "2", "2", "0", "1d02h", "-", "3.0", "GiB"],
        ["E_EXIT", "1", "0", "1", "0.5s", "-", "0", "B"],
        ["2026-07-01", "3", "2", "1", "1d02h", "1m00s", "1.5", "KiB"],
    ]
    assert page[-1].startswith("the last 7d  ")
    assert history_page(Totals(), 90.0, plain) == "no job has ended in the last 90s"


def test_receipts_have_a_table_of_their_own_where_there_are_any() -> None:
    assert "RECEIPTS" not in history_page(TOTALS, WEEK, plain)
    days = [
        Total("2026-07-01", 3, 3, receipts=2, units=93_784.25, price=12_345_678.125),
        Total("2026-07-02", 1, 1, unverified=1),
        Total("2026-07-03", 9, 9),
    ]
    whole = Total("all", 13, 13, receipts=2, units=1.23456789e15, price=1.23456789e-5, unverified=1)
    page = history_page(Totals(whole, days=days), WEEK, plain).splitlines()
    assert max(map(len, page)) == 80
    start = next(number for number, line in enumerate(page) if "RECEIPTS" in line)
    assert [line.split() for line in page[start : start + 5]] == [
        ["DAY", "(UTC)", "RECEIPTS", "UNITS", "PRICE", "FLAGGED"],
        ["2026-07-01", "2", "93784.25", "12345678.125", "-"],
        ["2026-07-02", "0", "-", "-", "1"],
        ["all", "2", "1234567890000000", "0.0000123457", "1"],
        [],
    ]


def test_programs_get_what_receipts_say() -> None:
    rows = [row("j1", receipt="verified", units=1.5, price=0.25), row("j2")]
    first, second = csv.DictReader(io.StringIO("\n".join(csv_lines(rows))))
    assert (first["receipt"], first["units"], first["price"]) == ("verified", "1.5", "0.25")
    assert (second["receipt"], second["units"], second["price"]) == ("", "", "")
    document = json.loads("\n".join(json_lines(WEEK, Totals(Total("all", receipts=1, price=0.25)), rows)))
    assert (document["totals"]["all"]["price"], document["totals"]["all"]["unverified"]) == (0.25, 0)
    assert (document["jobs"][0]["price"], document["jobs"][1]["receipt"]) == (0.25, None)


def test_csv_has_a_line_for_each_job_whatever_their_messages_are() -> None:
    rows = [
        row("j1", message=EVIL, cpu_s=1.5),
        row("-1+2", slot=None, message="  @SUM(A1)"),
        row("j3", message="\uff1d1"),
    ]
    text = "".join(f"{line}\n" for line in csv_lines(rows))
    assert len(text.splitlines()) == 4
    read = list(csv.DictReader(io.StringIO(text)))
    assert [each["message"] for each in read] == [
        "'" + r"""=cmd|'/c calc'!A1\n"; \x1b[2J\u2028,end""",
        "'  @SUM(A1)",
        "'\uff1d1",
    ]
    assert [each["job_id"] for each in read] == ["j1", "'-1+2", "j3"]
    assert (read[0]["cpu_s"], read[0]["gpu_s"], read[1]["slot"]) == ("1.5", "", "")
    assert "finished" not in read[0]


@pytest.mark.parametrize("count", [0, 1, 3])
def test_json_is_one_document(count: int) -> None:
    rows = [row(f"j{number}", message=EVIL) for number in range(count)]
    text = "\n".join(json_lines(WEEK, TOTALS, rows))
    assert text.isascii()
    assert "\x1b" not in text
    document = json.loads(text)
    assert document["since_s"] == WEEK
    assert document["totals"]["all"]["failed"] == 1
    assert [each["message"] for each in document["jobs"]] == [EVIL] * count


# --- the command -------------------------------------------------------------------------------------------


def memories() -> int:
    """Count those that are open; of what is not ours anything may be closed meanwhile."""
    found = 0
    for fd in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # the listing's own
            found += str(fd.readlink()).startswith("/memfd:history")
    return found


class Miner:
    """Stands for the miner: takes one request and gives one answer."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[Request] = []
        self.answer: Any = History()
        self.lines = [TOTALS, row("j1", "E_EXIT")]
        monkeypatch.setattr(ask, "ask", self._ask)

    def _ask(self, _path: Path, request: Request, timeout_s: float) -> tuple[Any, list[int]]:
        assert timeout_s == LATER_S
        self.asked.append(request)
        if not isinstance(self.answer, History):
            return self.answer, []
        memory = os.memfd_create("history")
        os.write(memory, b"".join(msgspec.json.encode(line) + b"\n" for line in self.lines))
        return self.answer, [memory]


@pytest.fixture
def miner(monkeypatch: pytest.MonkeyPatch) -> Iterator[Miner]:
    yield Miner(monkeypatch)
    assert memories() == 0


def run(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["aitbc-minerctl", *words])
    return ctl.main()


def test_the_command_shows_a_week(
    miner: Miner, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "history") == 0
    assert miner.asked == [Request("history", since_s=WEEK)]
    assert "cpu0" in capsys.readouterr().out


def test_the_command_prints_each_job_for_programs(
    miner: Miner, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "history", "--since", "12h", "--csv") == 0
    assert [line.split(",")[0] for line in capsys.readouterr().out.splitlines()] == ["job_id", "j1"]
    assert run(monkeypatch, "--json", "history") == 0
    assert json.loads(capsys.readouterr().out)["jobs"][0]["code"] == ErrorCode.E_EXIT
    assert miner.asked[0] == Request("history", since_s=43_200.0, each=True)
    assert [request.each for request in miner.asked] == [True, True]


def test_a_time_that_is_none_is_wrong_usage(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        run(monkeypatch, "history", "--since", "yesterday")
    assert ended.value.code == 2
    assert "'yesterday' must be a duration" in capsys.readouterr().err


def test_json_and_csv_exclude_each_other(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "--json", "history", "--csv") == 2
    assert "exclude each other" in capsys.readouterr().err


@pytest.mark.parametrize("words", [("history",), ("history", "--csv"), ("history", "--json")])
def test_another_answer_is_another_version(
    words: tuple[str, ...], miner: Miner, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    miner.answer = Done("done")
    assert run(monkeypatch, *words) == 69
    miner.answer = History()
    miner.lines = [msgspec.Raw(b"[1]")]  # type: ignore[list-item]
    assert run(monkeypatch, *words) == 69
    assert "the answer has another type" in capsys.readouterr().err
