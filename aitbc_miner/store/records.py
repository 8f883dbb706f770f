"""Jobs on disk: each job has one directory, and the directory is the truth about the job.

```
<root>/<job-id>/  manifest.json  state.json  outcome.json  input/  work/  output/  logs/exec.log
<root>/.broken/   unreadable records, set aside
```
Each file has one writer at a time: the agent until a slot has the job, then the slot's worker until the
outcome is written, then the agent again.
"""

import itertools
import os
import shutil
from collections.abc import Callable, Iterator
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
"""The file in `workspace.root` that identifies the workspace, see `agent/anchor.py`."""
MANIFEST, STATE, OUTCOME = "manifest.json", "state.json", "outcome.json"
# A slot's user must reach its own directories below, but must not list the directories above.
PASSABLE = 0o711
# No job id has a `+`, so nobody can take an unfinished directory for a job.
BUILDING = "+new-"
MAX_STATE = 1 << 16
MAX_OUTCOME = 64 << 20
MAX_MANIFEST = 64 << 20
MAX_RECEIPT = 64 << 20


class RecordError(MinerError):
    """A job's record is missing or broken."""


class JobDir:
    """One job's directory, by descriptor; its methods follow no link."""

    def __init__(self, root: Path, job_id: str, fd: int) -> None:
        self.job_id = job_id
        self.path = root / directory_of(job_id)
        self.fd = fd

    def manifest(self) -> Manifest:
        """Read manifest.json.

        Raises:
            RecordError: the file is missing or broken.
            OSError: a temporary fault prevents the reading. All methods that read a record raise OSError so.
        """
        return self._read(MANIFEST, Manifest, MAX_MANIFEST, forgiving.decode)

    def raw_manifest(self) -> bytes:
        """Read the bytes of manifest.json, as the coordinator sent them.

        Raises:
            RecordError: the file is missing or too large.
        """
        return self._bytes(MANIFEST, MAX_MANIFEST)

    def state(self) -> StateRecord:
        """Read state.json.

        Raises:
            RecordError: the file is missing, broken, of another version, or of another job.
        """
        return self._of_this(STATE, StateRecord, MAX_STATE)

    def outcome(self) -> Outcome | None:
        """Read outcome.json; None if the job has no outcome yet.

        Raises:
            RecordError: the file is broken, of another version, or of another job.
        """
        return self._of_this(OUTCOME, Outcome, MAX_OUTCOME) if self.has_outcome() else None

    def has_outcome(self) -> bool:
        """Whether the job has an outcome."""
        return fs.exists(self.fd, OUTCOME)

    def rescue_outcome(self) -> bool:
        """Rename the temporary file of an outcome whose writer died before the renaming; True if done.

        The outcome counts if it is complete and belongs to the present attempt. (A state needs no rescue: the
        state before is as true, and the next writer takes the step again.)
        """
        aside = fs.unfinished(OUTCOME)
        try:
            found = self._of_this(aside, Outcome, MAX_OUTCOME)
        except (RecordError, PermissionError):
            return False  # missing or incomplete: the writer makes a complete file readable for us
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
            RecordError: the present state is unreadable, or `to` may not follow the present state.
            OSError: the disk is full or broken.
        """
        return self.write_state(self.after(to, **changes))

    def after(self, to: State, **changes: Any) -> StateRecord:
        """Give the record of the next state, and write nothing. Raises as `move`."""
        old = self.state()
        if to not in MOVES[old.state]:
            raise RecordError(f"cannot move job {self.job_id} from {old.state} to {to}: not a legal step")
        return replace(old, state=to, **changes)

    def write_state(self, record: StateRecord) -> StateRecord:
        """Write state.json durably, with the present boot and times."""
        stamped = replace(record, boot_id=boot_id(), since=clock.now(), since_wall=clock.wall())
        self.write(STATE, pretty(stamped))
        return stamped

    def write_outcome(self, outcome: Outcome) -> None:
        """Write outcome.json durably."""
        self.write(OUTCOME, pretty(outcome))

    def write_receipt(self, receipt: Receipt) -> None:
        """Write receipt.json durably, unless it has a verified receipt already, which the ledger counts."""
        kept = self.receipt()
        if kept is None or not kept.verified:
            self.write(RECEIPT, pretty(receipt))

    def receipt(self) -> Receipt | None:
        """Read receipt.json; None if it is missing or broken, because nothing depends on a receipt."""
        try:
            return self._read(RECEIPT, Receipt, MAX_RECEIPT)
        except RecordError:
            return None

    def write(self, name: str, data: bytes) -> None:
        """Write a record durably, on a full disk with space from the reserve."""
        reserve.write_with_reserve(self.path.parent, self.fd, name, data)

    def try_again(self, **changes: Any) -> StateRecord:
        """Have the job wait for its next attempt, and keep the last outcome as outcome.N.json.

        Raises:
            RecordError, OSError: as `move`.
        """
        record = self.move(State.RETRY_WAIT, attempt=self.state().attempt + 1, **changes)
        self.drop_stale_outcome(record)
        return record

    def drop_stale_outcome(self, record: StateRecord) -> None:
        """Rename an outcome of an earlier attempt, which a crash may have left behind, to outcome.N.json."""
        outcome = self.outcome()
        if outcome is not None and outcome.attempt < record.attempt:
            aside = f"outcome.{outcome.attempt}.json"
            os.rename(OUTCOME, aside, src_dir_fd=self.fd, dst_dir_fd=self.fd)
            os.fsync(self.fd)

    def _of_this(self, name: str, type_: type[R], limit: int) -> R:
        record = self._read(name, type_, limit)
        if record.job_id != self.job_id:
            raise RecordError(
                f"cannot use {self.path / name}: the record belongs to job {record.job_id[:128]!r}"
            )
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
    """Encode as indented JSON."""
    return msgspec.json.format(msgspec.json.encode(value), indent=1) + b"\n"


class Records:
    """All jobs below one directory (`workspace.root`)."""

    def __init__(self, root: Path) -> None:
        self.root = root

    @contextmanager
    def open(self, job_id: str) -> Iterator[JobDir]:
        """Open a job's directory.

        Raises:
            RecordError: the id is no job id, or this node has no job with this id.
            OSError: a temporary fault prevents the look-up.
        """
        if not valid_job_id(job_id):
            raise RecordError(f"cannot open job {job_id[:80]!r}: not a job id")
        try:
            fd = fs.open_directory(self.root / directory_of(job_id))
        except OSError as error:
            if fs.may_pass(error):
                raise
            absent = isinstance(error, FileNotFoundError)
            cause = "this node has no such job; see `aitbc-minerctl jobs`" if absent else error.strerror
            raise RecordError(f"cannot open job {job_id}: {cause}") from error
        try:
            yield JobDir(self.root, job_id, fd)
        finally:
            os.close(fd)

    def known(self, job_id: str) -> bool:
        """Whether this node has a record of the job.

        Raises:
            OSError: a temporary fault prevents the look-up.
        """
        try:
            return valid_job_id(job_id) and bool((self.root / directory_of(job_id) / STATE).stat())
        except (FileNotFoundError, NotADirectoryError):
            return False

    def absent(self, job_id: str) -> bool:
        """Whether the job certainly has no directory here."""
        try:
            (self.root / directory_of(job_id)).lstat()
        except OSError as error:
            return isinstance(error, FileNotFoundError)
        return False

    def create(self, job_id: str, manifest: bytes, *, state: State = State.PULLED, **more: Any) -> None:
        """Record a new job: its manifest as it came, and its state with the fields `more`.

        The directory gets its name when both files are durable, so a crash leaves a complete job or nothing.

        Raises:
            RecordError: the id is no job id, or this node has a record of the job already.
            OSError: the disk is full or broken.
        """
        if not valid_job_id(job_id) or self.known(job_id):
            raise RecordError(f"cannot record job {job_id[:128]!r}: not a job id, or recorded already")
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
        """Remove directories that a dead agent had half made or half removed; nobody knows of them."""
        for path in self.root.glob(f"{BUILDING}*"):
            shutil.rmtree(path, ignore_errors=True)

    def ids(self) -> list[str]:
        """Name all jobs, sorted."""
        with os.scandir(self.root) as entries:
            found = (job_in(entry.name) for entry in entries if entry.is_dir(follow_symlinks=False))
            return sorted(job_id for job_id in found if job_id is not None)

    def state_of(self, job_id: str) -> StateRecord | RecordError | OSError:
        """Give the state of a job, or the error: RecordError is permanent, OSError temporary."""
        try:
            with self.open(job_id) as job:
                return job.state()
        except (RecordError, OSError) as error:
            return error

    def set_aside(self, job_id: str, file: str | None = None) -> Path:
        """Move a job's directory, or one file of it, to the broken records; gives its new path.

        Raises:
            OSError: we may not move the directory or file, or the disk is broken.
        """
        keep = self.root / BROKEN
        keep.mkdir(mode=0o750, exist_ok=True)
        source, name = self.root / directory_of(job_id), job_id
        if file is not None:
            source, name = source / file, f"{job_id}+{file}"
        # No job id has a `+`, so two jobs cannot have the same place.
        places = (keep / (f"{name}+{number}" if number else name) for number in itertools.count())
        target = next(place for place in places if not os.path.lexists(place))
        source.rename(target)
        for directory in (self.root, keep):
            with fs.directory(directory) as fd:
                os.fsync(fd)
        return target
