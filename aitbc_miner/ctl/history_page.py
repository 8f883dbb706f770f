"""`aitbc-minerctl history`: the totals of ended jobs, as a page, as CSV and as JSON."""

import csv
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from typing import BinaryIO

import msgspec

from aitbc_miner.ctl.pages import Paint, amount
from aitbc_miner.store.ledger import LedgerRow, Total, Totals
from aitbc_miner.util.terminal import duration, pad, size, visible

COLUMNS = tuple(name for name in LedgerRow.__struct_fields__ if name != "finished")
"""All columns except `finished`, a time of the node's own clock."""
NAME = 24
# A spreadsheet takes a text with such a beginning for a formula; some accept the wide forms as well.
FORMULA = tuple("=+-@\uff1d\uff0b\uff0d\uff20")


def read_totals(file: BinaryIO) -> Totals:
    """Read the first line of the miner's history.

    Raises:
        msgspec.DecodeError: the line is from another version.
    """
    file.seek(0)  # the writer left the position at the end
    return msgspec.json.decode(file.readline(), type=Totals)


def read_rows(file: BinaryIO) -> Iterator[LedgerRow]:
    """Read the lines after the first; raises like `read_totals`."""
    decoder = msgspec.json.Decoder(LedgerRow)
    return map(decoder.decode, file)


def history_page(totals: Totals, since_s: float, paint: Paint) -> str:
    """Show the totals by slot, code and day, in 80 columns."""
    from aitbc_miner.config.units import format_duration  # noqa: PLC0415  # imports YAML

    since = format_duration(since_s)
    if not totals.all.jobs:
        return f"no job has ended in the last {since}"
    lines: list[str] = []
    for title, rows in (("SLOT", totals.slots), ("CODE", totals.codes), ("DAY (UTC)", totals.days)):
        lines += _table(title, rows, paint)
    if totals.all.receipts or totals.all.unverified:
        lines += _receipts(totals, paint)
    return "\n".join([*lines, paint(_row(totals.all, f"the last {since}"), "bold")])


def _table(title: str, rows: Sequence[Total], paint: Paint) -> Iterator[str]:
    heads = "".join(f"{head:>9}" for head in ("JOBS", "OK", "FAILED", "CPU TIME", "GPU TIME"))
    yield paint(f"{title:{NAME}}{heads}{'DELIVERED':>11}", "dim")
    yield from (_row(row, row.name) for row in rows)
    yield ""


def _receipts(totals: Totals, paint: Paint) -> Iterator[str]:
    """Show the coordinator's receipts by day; receipts that did not verify count under FLAGGED only."""
    widths = (10, 18, 18, 10)
    heads = "".join(map(str.rjust, ("RECEIPTS", "UNITS", "PRICE", "FLAGGED"), widths))
    yield paint(f"{'DAY (UTC)':{NAME}}{heads}", "dim")
    for day in [*(day for day in totals.days if day.receipts or day.unverified), totals.all]:
        cells = (str(day.receipts), amount(day.units), amount(day.price), str(day.unverified or "-"))
        row = pad("all" if day is totals.all else day.name, NAME) + "".join(map(str.rjust, cells, widths))
        yield paint(row, "bold") if day is totals.all else row
    yield ""


def _row(total: Total, name: str) -> str:
    cells = (str(total.jobs), str(total.ok), str(total.failed), _time(total.cpu_s), _time(total.gpu_s))
    numbers = "".join(f"{cell:>9}" for cell in cells)
    return f"{pad(name, NAME)}{numbers}{size(total.delivered_bytes):>11}"


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return duration(seconds) if seconds >= 60 else f"{seconds:.1f}s"


def csv_lines(rows: Iterable[LedgerRow]) -> Iterator[str]:
    """Write a head and one line for each job; no text of a job can become a further line or a formula."""
    yield _csv_line(COLUMNS)
    for row in rows:
        yield _csv_line([_cell(getattr(row, name)) for name in COLUMNS])


def _csv_line(cells: Iterable[str]) -> str:
    line = io.StringIO()
    csv.writer(line, lineterminator="").writerow(cells)
    return line.getvalue()


def _cell(value: object) -> str:
    if value is None:
        return ""
    text = visible(str(value))
    return f"'{text}" if isinstance(value, str) and text.lstrip().startswith(FORMULA) else text


def json_lines(since_s: float, totals: Totals, rows: Iterable[LedgerRow]) -> Iterator[str]:
    """Write one JSON document in ASCII, with the totals and each job on a line of its own."""
    yield f'{{"since_s": {json.dumps(since_s)},'
    yield f'"totals": {json.dumps(msgspec.to_builtins(totals))},'
    yield '"jobs": ['
    held = ""
    for row in rows:
        if held:
            yield f"{held},"
        held = json.dumps({name: getattr(row, name) for name in COLUMNS})
    if held:
        yield held
    yield "]}"
