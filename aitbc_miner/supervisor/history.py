"""Reads the history of jobs from the node's database, and writes it down for `aitbc-minerctl`.

A line of JSON with the `Totals` and, where they are asked for, one with the `LedgerRow` of each job.
"""

from pathlib import Path
from typing import BinaryIO

import msgspec

from aitbc_miner.control.protocol import Request
from aitbc_miner.errors import MinerError
from aitbc_miner.store.database import Database, DatabaseError
from aitbc_miner.store.ledger import Ledger, Totals

MAX_BYTES = 128 << 20
"""Of memory for one answer, some 300,000 jobs."""


def read_history(path: Path, request: Request, out: BinaryIO, *, still: bool = False) -> str:
    """Write what a request asks for; gives why there is no history, or nothing.

    Where no job has ended yet, there is an empty one. `still`: the node does not run.
    """
    try:
        if path.exists():
            _write(Ledger(Database(path, read_only=True, still=still), read_only=True), request, out)
        else:
            _line(out, Totals())
        out.flush()
    except DatabaseError as error:
        remedy = "try again; a file that is broken is set aside when the miner starts anew"
        return f"cannot show the history: cannot read {path}: {error.__cause__ or error}; {remedy}"
    except MinerError as error:
        return str(error)
    except OSError as error:
        return f"cannot show the history from {path}: {error.strerror}; see that the miner's user can read it"
    return ""


def _write(accounts: Ledger, request: Request, out: BinaryIO) -> None:
    if not accounts.there:
        _line(out, Totals())
        return
    with accounts.standing_still():
        _line(out, accounts.totals(request.since_s))
        for row in accounts.rows(request.since_s) if request.each else ():
            _line(out, row)
            if out.tell() > MAX_BYTES:
                raise MinerError(
                    f"cannot show the history: these jobs take more than {MAX_BYTES >> 20} MiB; "
                    "ask for less time with --since"
                )


def _line(out: BinaryIO, value: msgspec.Struct) -> None:
    out.write(msgspec.json.encode(value) + b"\n")
