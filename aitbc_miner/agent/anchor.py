"""Whether `workspace.root` is the one with the jobs of this node's database: a mark in it, known to both.

A disk that is not mounted leaves an empty directory of the same name. What is pulled then may have been done
before, and its record is lost when the disk comes back.
"""

import os
import secrets
from pathlib import Path

from aitbc_miner.agent.context import AgentContext
from aitbc_miner.store import reserve
from aitbc_miner.store.database import Database
from aitbc_miner.store.records import MARK
from aitbc_miner.util import clock, fs

MAX_MARK = 64
LOOK_S = 2.0

_TABLE = """
CREATE TABLE IF NOT EXISTS workspace (
    id INTEGER PRIMARY KEY CHECK (id = 1), mark TEXT NOT NULL, place TEXT NOT NULL
) STRICT
"""


class Anchor:
    """For the agent's main thread. `found` is set when the right workspace is there."""

    def __init__(self, context: AgentContext, database: Database) -> None:
        self._context = context
        self._database = database
        self._known: tuple[str, str] | None = None
        self._due = clock.now()
        self.found = False
        """Whether it has been there since the start: only then the records may be read."""

    def next_due(self) -> float:
        """When to look next."""
        return self._due

    def start_due(self) -> None:
        """Look whether it is still there, or there at last."""
        if clock.now() >= self._due:
            self._due = clock.now() + LOOK_S
            self.found |= not self.lost()

    def lost(self) -> bool:
        """Whether it is not there now; says why, to the operator. Nothing may be taken in then."""
        context, before = self._context, self._context.homeless
        try:
            self._known = self._known or self._find()
            self._compare(*self._known)
            context.homeless = None
        except OSError as error:
            context.homeless = str(error)
        if context.homeless != before:
            context.log.warning("workspace", error=context.homeless or "it is there")
            context.tell()
        return context.homeless is not None

    def _find(self) -> tuple[str, str]:
        """Give the mark that the database knows, and where it was; makes both where there is none yet."""
        with self._database.writing() as connection:
            connection.execute(_TABLE)
            known: tuple[str, str] | None = connection.execute("SELECT mark, place FROM workspace").fetchone()
        if known is not None:
            return known
        records, found = self._context.records, self._read()
        known = (found or secrets.token_hex(8), _place_of(records.root))
        # An earlier version has made no mark: then it is where the jobs are that it knows.
        kept = self._context.ledger.settled()
        if kept and not any(map(records.known, kept)):
            known = (secrets.token_hex(8), "another disk")
        elif not found:
            with fs.directory(records.root) as root:
                reserve.write_with_reserve(records.root, root, MARK, known[0].encode() + b"\n")
        with self._database.writing() as connection:
            connection.execute("INSERT INTO workspace VALUES (1, ?, ?)", known)
        return known

    def _compare(self, mark: str, place: str) -> None:
        found, root = self._read(), self._context.records.root
        if found != mark:
            lacks = f"it has another's mark, {found!a:.80}" if found else f"there is no {MARK} in it"
            raise OSError(
                f"workspace.root {root} is not the one with this node's jobs, which was on {place}: {lacks};"
                " no jobs are pulled. Mount its disk; or, if what was there is gone for good:"
                f" `echo {mark} > {root / MARK}`"
            )

    def _read(self) -> str:
        try:
            with fs.directory(self._context.records.root) as root:
                return fs.read_bounded(root, MARK, MAX_MARK).decode("ascii", "replace").strip()
        except (FileNotFoundError, NotADirectoryError):
            return ""


def _place_of(root: Path) -> str:
    """Name the device and the mount point that a directory is on. Source: proc(5), mountinfo."""
    device, real = root.stat().st_dev, root.resolve()
    number = f"{os.major(device)}:{os.minor(device)}"
    mounts = []
    for line in Path("/proc/self/mountinfo").read_text("utf-8", "backslashreplace").splitlines():
        fields, _, source = line.partition(" - ")
        found, point = fields.split()[2], fields.split()[4]
        if found == number and real.is_relative_to(point):
            mounts.append((len(point), f"{source.split()[1]}, mounted at {point}"))
    return max(mounts, default=(0, f"device {number}"))[1]
