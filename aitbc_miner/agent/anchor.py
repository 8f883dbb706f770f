"""Checks that `workspace.root` belongs to this node's database: both hold the same mark.

If the disk of the workspace is not mounted, an empty directory has the same name. The node must not pull jobs
then: it may have done them before, and their records would be lost when the disk comes back.
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
    """Checks the workspace at intervals. For the agent's main thread."""

    def __init__(self, context: AgentContext, database: Database) -> None:
        self._context = context
        self._database = database
        self._known: tuple[str, str] | None = None
        self._due = clock.now()
        self.found = False
        """Whether the workspace was present at least once. Before, the agent must not read the records."""

    def next_due(self) -> float:
        """When to check next."""
        return self._due

    def start_due(self) -> None:
        """Check the workspace, if due."""
        if clock.now() >= self._due:
            self._due = clock.now() + LOOK_S
            self.found |= not self.lost()

    def lost(self) -> bool:
        """Whether the workspace is missing. If so, tells the operator why, and the node must admit no job."""
        context, before = self._context, self._context.homeless
        try:
            self._known = self._known or self._find()
            self._compare(*self._known)
            context.homeless = None
        except OSError as error:
            context.homeless = str(error)
        if context.homeless != before:
            if context.homeless:
                context.log.warning("workspace not found", error=context.homeless)
            else:
                context.log.warning("workspace found")
            context.tell()
        return context.homeless is not None

    def _find(self) -> tuple[str, str]:
        """Give the mark and the place of the workspace from the database; enters both at the first start."""
        with self._database.writing() as connection:
            connection.execute(_TABLE)
            known: tuple[str, str] | None = connection.execute("SELECT mark, place FROM workspace").fetchone()
        if known is not None:
            return known
        records, found = self._context.records, self._read()
        known = (found or secrets.token_hex(8), _place_of(records.root))
        # Earlier versions made no mark. Then the workspace must have jobs of the ledger.
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
            cause = f"{MARK} is of another node ({found!a:.80})" if found else f"the directory has no {MARK}"
            raise OSError(
                f"cannot use workspace.root {root}: {cause}, and this node's workspace was on {place}; the"
                " node pulls no jobs; mount the disk of the workspace, or, if its jobs are gone for good:"
                f" `echo {mark} > {root / MARK}`"
            )

    def _read(self) -> str:
        try:
            with fs.directory(self._context.records.root) as root:
                return fs.read_bounded(root, MARK, MAX_MARK).decode("ascii", "replace").strip()
        except (FileNotFoundError, NotADirectoryError):
            return ""


def _place_of(root: Path) -> str:
    """Give the device and the mount point of a directory. Source: proc(5), mountinfo."""
    device, real = root.stat().st_dev, root.resolve()
    number = f"{os.major(device)}:{os.minor(device)}"
    mounts = []
    for line in Path("/proc/self/mountinfo").read_text("utf-8", "backslashreplace").splitlines():
        fields, _, source = line.partition(" - ")
        found, point = fields.split()[2], fields.split()[4]
        if found == number and real.is_relative_to(point):
            mounts.append((len(point), f"{source.split()[1]}, mounted at {point}"))
    return max(mounts, default=(0, f"device {number}"))[1]
