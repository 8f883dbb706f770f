"""Jobs on disk: one directory each, which is the truth about the job.

```
<root>/<job-id>/  manifest.json  state.json  outcome.json  input/  work/  output/  logs/exec.log
<root>/.broken/   what cannot be read, set aside
```
Each file has one writer at a time, like a baton: the agent until the job is in a slot, then that slot's
worker until the outcome is there, then the agent again.
"""

import itertools
import os
import shutil
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import msgspec
from msgspec.structs import replace

from aitbc_miner.errors import MinerError, brief
from aitbc_miner.identity.receipts import RECEIPT, Receipt
from aitbc_miner.jobs import (
    BROKEN,
    MOVES,
    Manifest,
    Outcome,
    State,
    StateRecord,
    directory_of,
    job_in,
    valid_job_id,
)
from aitbc_miner.store import reserve
from aitbc_miner.util import clock, forgiving, fs
from aitbc_miner.util.system import boot_id

T = TypeVar("T")
R = TypeVar("R", StateRecord, Outcome)

MARK = "+workspace"
"""A file in `workspace.root` that tells it from any other, see `agent/anchor.py`."""
MANIFEST, STATE, OUTCOME = "manifest.json", "state.json", "outcome.json"
# A slot's user must reach its own directories below, but list nothing on the way there.
PASSABLE = 0o711
# `+` is not allowed in a job id, so a directory being made can never be taken for a job.
BUILDING = "+new-"
MAX_STATE = 1 << 16
MAX_OUTCOME = 64 << 20
MAX_MANIFEST = 64 << 20
MAX_RECEIPT = 64 << 20


class RecordError(MinerError):
    """A job's record is missing or cannot be read."""


class JobDir:
    """One job's directory, by descriptor: nothing in it is ever reached through a link."""

    def __init__(self, root: Path, job_id: str, fd: int) -> None:
        self.job_id = job_id
        self.path = root / directory_of(job_id)
        self.fd = fd

    def manifest(self) -> Manifest:
        """Read manifest.json.

        Raises:
            RecordError: it is missing or broken.
            OSError: it cannot be read now, whatever it is; so for each record.
        """
        return self._read(MANIFEST, Manifest, MAX_MANIFEST, forgiving.decode)

    def raw_manifest(self) -> bytes:
        """Read manifest.json as it came.

        Raises:
            RecordError: it is missing, or too large.
        """
        return self._bytes(MANIFEST, MAX_MANIFEST)

    def state(self) -> StateRecord:
        """Read state.json.

        Raises:
            RecordError: it is missing, broken, of another version, or of another job.
        """
        return self._of_this(STATE, StateRecord, MAX_STATE)

    def outcome(self) -> Outcome | None:
        """Read outcome.json; None when the job has none yet.

        Raises:
            RecordError: it is broken, of another version, or of another job.
        """
        return self._of_this(OUTCOME, Outcome, MAX_OUTCOME) if self.has_outcome() else None

    def has_outcome(self) -> bool:
        """Whether the job's result stands."""
        return fs.exists(self.fd, OUTCOME)

    def rescue_outcome(self) -> bool:
        """Give its name to an outcome that its writer, dead by now, has written but not named; True if so.

        It counts if it is whole, and of the attempt that is under way. (A state needs none of this: the one
        before is as true, and the step that it was to tell of is taken again.)
        """
        aside = fs.unfinished(OUTCOME)
        try:
            found = self._of_this(aside, Outcome, MAX_OUTCOME)
        except (RecordError, PermissionError):
            return False  # none; or not whole, for what is whole is ours to read
        if self.has_outcome() or found.attempt != self.state().attempt:
            return False
        fd = os.open(aside, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self.fd)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
        os.rename(aside, OUTCOME, src_dir_fd=self.fd, dst_dir_fd=self.fd)
        os.fsync(self.fd)
        return True

    def move(self, to: State, **changes: Any) -> StateRecord:
        """Write the next state, durably.

        Raises:
            RecordError: the present state cannot be read, or `to` may not follow it.
            OSError: the disk is full or broken.
        """
        return self.write_state(self.after(to, **changes))

    def after(self, to: State, **changes: Any) -> StateRecord:
        """Give what the next state is to be. Raises as `move`."""
        old = self.state()
        if to not in MOVES[old.state]:
            raise RecordError(f"cannot move job {self.job_id} from {old.state} to {to}: not a legal step")
        return replace(old, state=to, **changes)

    def write_state(self, record: StateRecord) -> StateRecord:
        """Write state.json durably, stamped with now."""
        stamped = replace(record, boot_id=boot_id(), since=clock.now(), since_wall=clock.wall())
        self.write(STATE, pretty(stamped))
        return stamped

    def write_outcome(self, outcome: Outcome) -> None:
        """Write outcome.json durably: from here on the job has its one result."""
        self.write(OUTCOME, pretty(outcome))

    def write_receipt(self, receipt: Receipt) -> None:
        """Write receipt.json durably, unless there is one that has verified: it is the one in the books."""
        kept = self.receipt()
        if kept is None or not kept.verified:
            self.write(RECEIPT, pretty(receipt))

    def receipt(self) -> Receipt | None:
        """Read receipt.json; None without one, or where it is broken: nothing depends on it."""
        try:
            return self._read(RECEIPT, Receipt, MAX_RECEIPT)
        except RecordError:
            return None

    def write(self, name: str, data: bytes) -> None:
        """Write a record durably, if need be with space that is set aside for that."""
        reserve.write_with_reserve(self.path.parent, self.fd, name, data)

    def try_again(self, **changes: Any) -> StateRecord:
        """Have the job wait for its next attempt; what the last one came to is kept as outcome.N.json.

        Raises:
            RecordError, OSError: as `move`.
        """
        record = self.move(State.RETRY_WAIT, attempt=self.state().attempt + 1, **changes)
        self.drop_stale_outcome(record)
        return record

    def drop_stale_outcome(self, record: StateRecord) -> None:
        """Set the outcome of an earlier attempt aside, which a crash may have left in the way of the next."""
        outcome = self.outcome()
        if outcome is not None and outcome.attempt < record.attempt:
            aside = f"outcome.{outcome.attempt}.json"
            os.rename(OUTCOME, aside, src_dir_fd=self.fd, dst_dir_fd=self.fd)
            os.fsync(self.fd)

    def _of_this(self, name: str, type_: type[R], limit: int) -> R:
        record = self._read(name, type_, limit)
        if record.job_id != self.job_id:
            raise RecordError(f"cannot use {self.path / name}: it is of job {record.job_id[:128]!r}")
        return record

    def _read(
        self, name: str, type_: type[T], limit: int, decode: Callable[[bytes, type[T]], T] | None = None
    ) -> T:
        data = self._bytes(name, limit)
        try:
            return decode(data, type_) if decode else msgspec.json.decode(data, type=type_)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise RecordError(f"cannot read {self.path / name}: {brief(error)}") from error

    def _bytes(self, name: str, limit: int) -> bytes:
        try:
            return fs.read_bounded(self.fd, name, limit)
        except OSError as error:
            if fs.may_pass(error):
                raise
            raise RecordError(f"cannot read {self.path / name}: {brief(error)}") from error


def pretty(value: object) -> bytes:
    """Encode as JSON that a person can read."""
    return msgspec.json.format(msgspec.json.encode(value), indent=1) + b"\n"


class Records:
    """All jobs below one directory (`workspace.root`)."""

    def __init__(self, root: Path) -> None:
        self.root = root

    @contextmanager
    def open(self, job_id: str) -> Iterator[JobDir]:
        """Open a job's directory.

        Raises:
            RecordError: the id is no job id, or there is no such job here.
            OSError: that cannot be told now.
        """
        if not valid_job_id(job_id):
            raise RecordError(f"cannot open job {job_id[:80]!r}: not a job id")
        try:
            fd = fs.open_directory(self.root / directory_of(job_id))
        except OSError as error:
            if fs.may_pass(error):
                raise
            absent = isinstance(error, FileNotFoundError)
            cause = "there is none of this id here; see `aitbc-minerctl jobs`" if absent else error.strerror
            raise RecordError(f"cannot open job {job_id}: {cause}") from error
        try:
            yield JobDir(self.root, job_id, fd)
        finally:
            os.close(fd)

    def known(self, job_id: str) -> bool:
        """Whether this job was ever taken here and its record is still kept.

        Raises:
            OSError: that cannot be told now.
        """
        try:
            return valid_job_id(job_id) and bool((self.root / directory_of(job_id) / STATE).stat())
        except (FileNotFoundError, NotADirectoryError):
            return False

    def create(self, job_id: str, manifest: bytes, *, state: State = State.PULLED, **more: Any) -> None:
        """Record a job that is new here: its manifest as it came, and its state with what `more` says.

        It appears under its name only when both files are durable, so a crash leaves a job or nothing.

        Raises:
            RecordError: the id is no job id, or the job is here already.
            OSError: the disk is full or broken.
        """
        if not valid_job_id(job_id) or self.known(job_id):
            raise RecordError(f"cannot record job {job_id[:128]!r}: a bad id, or it is here already")
        building = self.root / f"{BUILDING}{job_id}"
        shutil.rmtree(building, ignore_errors=True)
        building.mkdir(mode=PASSABLE)
        building.chmod(PASSABLE)
        (building / "input").mkdir(mode=0o700)
        with fs.directory(building) as fd:
            fs.write_durably(fd, MANIFEST, manifest)
            JobDir(self.root, job_id, fd).write_state(StateRecord(job_id=job_id, state=state, **more))
        building.rename(self.root / directory_of(job_id))
        with fs.directory(self.root) as fd:
            os.fsync(fd)

    def remove_unfinished(self) -> None:
        """Remove what an agent that died was about to make or to drop; nobody was told of it."""
        for path in self.root.glob(f"{BUILDING}*"):
            shutil.rmtree(path, ignore_errors=True)

    def ids(self) -> list[str]:
        """Name all jobs."""
        with os.scandir(self.root) as entries:
            found = (job_in(entry.name) for entry in entries if entry.is_dir(follow_symlinks=False))
            return sorted(job_id for job_id in found if job_id is not None)

    def scan(self, skip: Container[str] = ()) -> Iterator[tuple[str, StateRecord | RecordError | OSError]]:
        """Go through all jobs but those to skip: id, and the state or why it cannot be read."""
        for name in self.ids():
            if name not in skip:
                yield name, self.state_of(name)

    def state_of(self, job_id: str) -> StateRecord | RecordError | OSError:
        """Give the state of a job, or why it cannot be read: RecordError for good, OSError for now."""
        try:
            with self.open(job_id) as job:
                return job.state()
        except (RecordError, OSError) as error:
            return error

    def set_aside(self, job_id: str, file: str | None = None) -> Path:
        """Move a job's directory, or one file of it, to where broken records are kept; gives its new path.

        Raises:
            OSError: it is not ours to move, or the disk is broken.
        """
        keep = self.root / BROKEN
        keep.mkdir(mode=0o750, exist_ok=True)
        source, name = self.root / directory_of(job_id), job_id
        if file is not None:
            source, name = source / file, f"{job_id}+{file}"
        # `+` is in no job id, so that no two jobs can have the same place.
        places = (keep / (f"{name}+{number}" if number else name) for number in itertools.count())
        target = next(place for place in places if not os.path.lexists(place))
        source.rename(target)
        for directory in (self.root, keep):
            with fs.directory(directory) as fd:
                os.fsync(fd)
        return target
