"""Jobs on disk: what is durable when, what a crash leaves, and what is read of a record that is broken."""

import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from aitbc_miner.errors import ErrorCode
from aitbc_miner.identity.receipts import RECEIPT, Receipt
from aitbc_miner.jobs import ArtifactSpec, Outcome, State, StateRecord
from aitbc_miner.store.records import MANIFEST, OUTCOME, STATE, RecordError, Records
from aitbc_miner.util import fs
from tests.support.power_cut import Cut, cut_at

RAW = b'{"job_id": "j1", "runner": "cli", "command": "true", "artifacts": [{"path": "a"}], "new": 1}'


def names(path: Path | str) -> list[str]:
    return sorted(entry.name for entry in Path(path).iterdir())


class Disk:
    """Writes down what is made durable, in order, by the names that it has at that moment."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, root: Path) -> None:
        self.calls: list[str] = []
        self._root = root
        self._rename, self._fsync = os.rename, os.fsync
        monkeypatch.setattr(os, "fsync", self.fsync)
        monkeypatch.setattr(os, "rename", self.rename)

    def fsync(self, fd: int) -> None:
        path = Path(f"/proc/self/fd/{fd}").readlink()
        self.calls.append(f"fsync {path.relative_to(self._root)}")
        self._fsync(fd)

    def rename(
        self,
        source: str | Path,
        target: str | Path,
        *,
        src_dir_fd: int | None = None,
        dst_dir_fd: int | None = None,
    ) -> None:
        self.calls.append(f"rename {Path(source).name} {Path(target).name}")
        self._rename(source, target, src_dir_fd=src_dir_fd, dst_dir_fd=dst_dir_fd)


def test_a_file_is_durable_before_its_name_and_its_name_before_we_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = Disk(monkeypatch, tmp_path)
    with fs.directory(tmp_path) as fd:
        fs.write_durably(fd, "file", b"new")
    assert disk.calls == ["fsync .file.new", "rename .file.new file", "fsync ."]
    assert (tmp_path / "file").read_bytes() == b"new"
    assert names(tmp_path) == ["file"]


def test_a_pulled_job_gets_its_name_only_when_all_of_it_is_durable(
    records: Records, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = Disk(monkeypatch, records.root)
    records.create("j1", RAW)
    expected = [
        "fsync +new-j1/.manifest.json.new",
        "rename .manifest.json.new manifest.json",
        "fsync +new-j1",
        "fsync +new-j1/.state.json.new",
        "rename .state.json.new state.json",
        "fsync +new-j1",
        "rename +new-j1 j1",
        "fsync .",
    ]
    assert disk.calls == expected


def test_a_failing_disk_leaves_the_old_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    with fs.directory(tmp_path) as fd:
        fs.write_durably(fd, "file", b"old")
        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            fs.write_durably(fd, "file", b"new")
        assert fs.read_bounded(fd, "file", 10) == b"old"


@pytest.mark.parametrize("call", range(8))
def test_a_crash_while_pulling_leaves_a_whole_job_or_none(records: Records, call: int) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        cut_at(monkeypatch, call)
        with pytest.raises(Cut):
            records.create("j1", RAW)
    found = {job_id: records.state_of(job_id) for job_id in records.ids()}
    assert set(found) in (set(), {"j1"})
    if not found:
        assert not records.known("j1")
        records.create("j1", RAW)
    with records.open("j1") as job:
        assert job.manifest().command == "true"
        assert job.state().state is State.PULLED
    assert names(records.root) == ["j1"]


@pytest.mark.parametrize("call", range(3))
def test_a_crash_while_moving_leaves_the_old_or_the_new_state(records: Records, call: int) -> None:
    records.create("j1", RAW)
    with records.open("j1") as job:
        with pytest.MonkeyPatch.context() as monkeypatch:
            cut_at(monkeypatch, call)
            with pytest.raises(Cut):
                job.move(State.ACKED)
        assert job.state().state is (State.ACKED if call == 2 else State.PULLED)
        assert job.move(State.ACKED if call < 2 else State.PREP)


def test_a_job_keeps_what_was_written(records: Records) -> None:
    records.create("j1", RAW)
    assert (records.root / "j1" / MANIFEST).read_bytes() == RAW
    with records.open("j1") as job:
        assert job.manifest().artifacts == [ArtifactSpec(path="a")]
        assert not job.has_outcome()
        assert job.outcome() is None
        moved = job.move(State.ACKED)
        assert moved == job.state()
        assert moved.since > 0
        assert moved.since_wall.endswith("Z")
        assert len(moved.boot_id) == 36
        moved = job.move(State.PREP, slot="cpu0", worker_pid=5)
        assert (moved.slot, moved.worker_pid) == ("cpu0", 5)
        outcome = Outcome(
            job_id="j1", code=ErrorCode.E_EXIT, message="no", timings={"run": 0.5}, result=[1, {}]
        )
        job.write_outcome(outcome)
        assert job.outcome() == outcome
        assert job.has_outcome()
        # What was noted stays noted.
        assert job.move(State.UPLOADING).slot == "cpu0"


def test_an_illegal_move_is_refused_and_changes_nothing(records: Records) -> None:
    records.create("j1", RAW)
    with records.open("j1") as job:
        with pytest.raises(RecordError, match="cannot move job j1 from PULLED to RUNNING"):
            job.move(State.RUNNING)
        assert job.state().state is State.PULLED


def test_a_job_is_taken_once(records: Records) -> None:
    assert not records.known("j1")
    records.create("j1", RAW)
    assert records.known("j1")
    with pytest.raises(RecordError, match="recorded already"):
        records.create("j1", b"{}")
    with records.open("j1") as job:
        assert job.manifest().command == "true"


def test_a_job_may_be_called_as_what_we_have_there_ourselves(records: Records) -> None:
    for job_id in (".next", ".broken", "-rf"):
        records.create(job_id, b"{}")
        assert records.known(job_id)
        with records.open(job_id) as job:
            assert job.move(State.ACKED).job_id == job_id
    assert records.ids() == ["-rf", ".broken", ".next"]
    assert names(records.root) == ["+job.broken", "+job.next", "-rf"]
    aside = records.set_aside(".broken")
    assert (aside.parent.name, aside.name) == (".broken", ".broken")
    assert records.ids() == ["-rf", ".next"]


@pytest.mark.parametrize("job_id", ["", ".", "..", "a/b", "/etc", "a\0b", "+new-j1", "x" * 129, "ä", "a\n"])
def test_a_bad_id_never_touches_the_disk(records: Records, job_id: str) -> None:
    records.create("j1", RAW)
    before = names(records.root), names(records.root.parent)
    with pytest.raises(RecordError, match="cannot record job"):
        records.create(job_id, RAW)
    with pytest.raises(RecordError, match="not a job id"), records.open(job_id):
        pass
    assert not records.known(job_id)
    assert (names(records.root), names(records.root.parent)) == before


@pytest.fixture
def planted(records: Records, tmp_path: Path) -> Iterator[Path]:
    """A job's directory, and beside it a file that no link may lead to."""
    records.create("j1", RAW)
    secret = tmp_path / "+secret"
    secret.write_bytes(msgspec.json.encode(StateRecord(job_id="j1", state=State.DONE)))
    yield tmp_path / "j1"
    assert secret.read_bytes() == msgspec.json.encode(StateRecord(job_id="j1", state=State.DONE))


def test_a_link_in_the_place_of_a_record_is_not_followed(records: Records, planted: Path) -> None:
    (planted / STATE).unlink()
    (planted / STATE).symlink_to("../+secret")
    (planted / OUTCOME).symlink_to("../+secret")
    with records.open("j1") as job:
        with pytest.raises(RecordError, match=r"cannot read .*/j1/state.json"):
            job.state()
        with pytest.raises(RecordError, match=r"cannot read .*/j1/outcome.json"):
            job.outcome()
        # Replaced, not written through.
        job.write_state(StateRecord(job_id="j1", state=State.PREP))
        assert job.state().state is State.PREP
    assert not (planted / STATE).is_symlink()


def test_a_link_in_the_place_of_the_temporary_file_is_not_written_through(
    records: Records, planted: Path
) -> None:
    (planted / ".state.json.new").symlink_to("../+secret")
    with records.open("j1") as job:
        try:
            job.move(State.ACKED)
        except OSError:
            assert job.state().state is State.PULLED
        else:
            assert job.state().state is State.ACKED


def test_a_second_name_of_a_foreign_file_is_not_written_through(records: Records, planted: Path) -> None:
    (planted / ".state.json.new").hardlink_to(planted.parent / "+secret")
    with records.open("j1") as job:
        job.move(State.ACKED)
        assert job.state().state is State.ACKED


def test_a_fifo_in_the_place_of_the_temporary_file_does_not_become_the_record(
    records: Records, planted: Path
) -> None:
    os.mkfifo(planted / ".state.json.new")
    # With a reader there, opening it for writing cannot hang this test.
    reader = os.open(planted / ".state.json.new", os.O_RDONLY | os.O_NONBLOCK)
    try:
        with records.open("j1") as job:
            job.move(State.ACKED)
    finally:
        os.close(reader)
    assert stat.S_ISREG((planted / STATE).lstat().st_mode)


def test_a_job_that_is_a_link_is_no_job(records: Records, planted: Path) -> None:
    (records.root / "j2").symlink_to("j1")
    with pytest.raises(RecordError, match="cannot open job j2"), records.open("j2"):
        pass
    assert records.ids() == ["j1"]


BROKEN = {
    "torn": b'{"job_id":"j1","sta',
    "empty": b"",
    "zeros": b"\0" * 200,
    "foreign": b"[1, 2]",
    "no state": b'{"job_id": "j1", "state": "SLEEPING"}',
    "deep": b"[" * 60_000,
    "huge": b" " * (1 << 17),
    "not UTF-8": b'{"job_id": "\xff"}',
}


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN)
def test_a_broken_state_is_reported_and_hides_no_other_job(records: Records, content: bytes) -> None:
    for job_id in ("a", "j1", "z"):
        records.create(job_id, RAW)
    (records.root / "j1" / STATE).write_bytes(content)
    found = {job_id: records.state_of(job_id) for job_id in records.ids()}
    assert isinstance(found["j1"], RecordError)
    assert "j1/state.json" in str(found["j1"])
    assert isinstance(found["a"], StateRecord)
    assert isinstance(found["z"], StateRecord)
    # Broken or not, it was taken here and may have run.
    assert records.known("j1")


@pytest.mark.parametrize("kind", ["absent", "directory", "fifo"])
def test_what_is_no_file_is_no_record_and_costs_no_descriptor(records: Records, kind: str) -> None:
    records.create("j1", RAW)
    path = records.root / "j1" / STATE
    path.unlink()
    if kind == "directory":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    with records.open("j1") as job:
        before = len(names("/proc/self/fd"))
        for _ in range(5):
            with pytest.raises(RecordError, match=r"cannot read .*/state.json"):
                job.state()
        assert len(names("/proc/self/fd")) == before


def test_an_absent_job_and_an_absent_manifest_are_told_apart(records: Records) -> None:
    with (
        pytest.raises(RecordError, match="cannot open job j1: this node has no such job"),
        records.open("j1"),
    ):
        pass
    records.create("j1", RAW)
    (records.root / "j1" / MANIFEST).unlink()
    with records.open("j1") as job, pytest.raises(RecordError, match=r"cannot read .*manifest.json"):
        job.manifest()


def test_only_jobs_are_found_and_in_order(records: Records) -> None:
    for job_id in ("b", "a"):
        records.create(job_id, RAW)
    (records.root / "file").write_text("")
    (records.root / "+new-c").mkdir()
    (records.root / "not a job").mkdir()
    (records.root / "empty").mkdir()
    assert records.ids() == ["a", "b", "empty"]
    assert isinstance(records.state_of("empty"), RecordError)


# --- another attempt ---------------------------------------------------------------------------------------


def tried(records: Records) -> None:
    records.create("j1", RAW)
    with records.open("j1") as job:
        job.move(State.ACKED)
        job.move(State.PREP, slot="cpu0")
        job.write_outcome(Outcome("j1", code=ErrorCode.E_INTERNAL, message="first"))


def test_another_attempt_keeps_what_the_last_one_came_to(records: Records) -> None:
    tried(records)
    with records.open("j1") as job:
        state = job.try_again(note="first")
        assert state == job.state()
        assert (state.state, state.attempt, state.note) == (State.RETRY_WAIT, 2, "first")
        assert job.outcome() is None
        job.move(State.PREP)
        job.write_outcome(Outcome("j1", attempt=2, code=ErrorCode.E_INTERNAL, message="second"))
        assert job.try_again().attempt == 3
    kept = [(records.root / "j1" / f"outcome.{number}.json").read_bytes() for number in (1, 2)]
    assert [msgspec.json.decode(each, type=Outcome).message for each in kept] == ["first", "second"]


@pytest.mark.parametrize("call", range(5))
def test_a_crash_between_two_attempts_makes_no_old_outcome_count(records: Records, call: int) -> None:
    tried(records)
    with records.open("j1") as job:
        with pytest.MonkeyPatch.context() as monkeypatch:
            cut_at(monkeypatch, call)
            with pytest.raises(Cut):
                job.try_again()
        state = job.state()
        job.drop_stale_outcome(state)
        outcome = job.outcome()
        assert (state.attempt, outcome is None) == ((1, False) if call < 2 else (2, True))


def test_the_outcome_of_this_attempt_is_not_stale(records: Records) -> None:
    tried(records)
    with records.open("j1") as job:
        job.drop_stale_outcome(job.state())
        assert job.has_outcome()


def test_an_attempt_after_the_report_is_refused_and_changes_nothing(records: Records) -> None:
    tried(records)
    with records.open("j1") as job:
        job.move(State.UPLOADING)
        with pytest.raises(RecordError, match="cannot move job j1 from UPLOADING to RETRY_WAIT"):
            job.try_again()
        assert (job.state().attempt, job.has_outcome()) == (1, True)


# --- set aside ---------------------------------------------------------------------------------------------


def test_what_is_set_aside_is_kept_however_often(records: Records) -> None:
    places = []
    for number in range(3):
        records.create("j1", RAW)
        (records.root / "j1/mark").write_text(str(number))
        places.append(records.set_aside("j1"))
        assert not records.known("j1")
    assert [place.parent.name for place in places] == [".broken"] * 3
    assert [(place / "mark").read_text() for place in places] == ["0", "1", "2"]
    assert records.ids() == []


def test_a_file_is_set_aside_and_its_job_stays(records: Records) -> None:
    tried(records)
    content = (records.root / "j1" / OUTCOME).read_bytes()
    assert records.set_aside("j1", OUTCOME).read_bytes() == content
    with records.open("j1") as job:
        assert (job.state().state, job.outcome()) == (State.PREP, None)
    with pytest.raises(FileNotFoundError):
        records.set_aside("j1", OUTCOME)


def test_what_is_set_aside_is_durable(records: Records, monkeypatch: pytest.MonkeyPatch) -> None:
    records.create("j1", RAW)
    disk = Disk(monkeypatch, records.root)
    records.set_aside("j1")
    assert {"fsync .", "fsync .broken"} <= set(disk.calls)


def test_a_job_may_begin_with_what_is_known_of_it(records: Records) -> None:
    records.create("j1", RAW, lease="token", origin="node-b", attempt=2, started=True)
    with records.open("j1") as job:
        state, raw = job.state(), job.raw_manifest()
    assert (state.state, state.lease, state.origin) == (State.PULLED, "token", "node-b")
    assert (state.attempt, state.started, raw) == (2, True, RAW)


@pytest.mark.parametrize("name", [STATE, OUTCOME])
def test_a_record_of_another_job_is_none_of_this(records: Records, name: str) -> None:
    tried(records)
    other = StateRecord("j2", State.RUNNING) if name == STATE else Outcome("j2")
    (records.root / "j1" / name).write_bytes(msgspec.json.encode(other))
    with records.open("j1") as job:
        read: Callable[[], object] = job.state if name == STATE else job.outcome
        with pytest.raises(RecordError, match=f"cannot use .*/j1/{name}: the record belongs to job 'j2'"):
            read()


def test_a_record_is_readable_for_people_and_closed_to_others(records: Records) -> None:
    records.create("j1", RAW)
    assert b'\n "state": "PULLED"' in (records.root / "j1" / STATE).read_bytes()
    assert stat.S_IMODE((records.root / "j1" / STATE).stat().st_mode) & 0o007 == 0
    # A slot's user must pass through, and list nothing on the way.
    assert stat.S_IMODE((records.root / "j1").stat().st_mode) == 0o711
    assert stat.S_IMODE((records.root / "j1/input").stat().st_mode) == 0o700


def test_the_modes_do_not_depend_on_the_umask(records: Records) -> None:
    old = os.umask(0o077)
    try:
        records.create("j1", RAW)
    finally:
        os.umask(old)
    assert stat.S_IMODE((records.root / "j1").stat().st_mode) == 0o711


def test_a_file_is_read_up_to_its_limit(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x" * 10)
    with fs.directory(tmp_path) as fd:
        assert fs.read_bounded(fd, "file", 10) == b"x" * 10
        with pytest.raises(OSError, match="cannot read file: larger than 9 bytes"):
            fs.read_bounded(fd, "file", 9)


def test_a_link_is_no_directory_but_something(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "nowhere").symlink_to("gone")
    with fs.directory(tmp_path) as fd:
        with pytest.raises(OSError, match=r"Not a directory|Too many levels"), fs.directory("link", at=fd):
            pass
        with fs.directory("real", at=fd) as below:
            assert names(f"/proc/self/fd/{below}") == []
        assert [fs.exists(fd, name) for name in ("real", "nowhere", "gone")] == [True, True, False]


# --- receipts ----------------------------------------------------------------------------------------------


def test_a_receipt_comes_back_as_it_came(records: Records) -> None:
    records.create("j1", RAW)
    said = {
        "units": 1.0,
        "n": 1,
        "big": 2**70,
        "far": 1e22,
        "text": "Grüße \x1b",
        "none": None,
        "list": [None],
    }
    receipt = Receipt(said, True, "", 1.0, None, "2026-07-01T10:00:00Z")
    with records.open("j1") as job:
        assert job.receipt() is None
        job.write_receipt(receipt)
        assert job.receipt() == receipt
        assert repr((job.receipt() or receipt).receipt) == repr(said), "1.0 is not 1"


def test_the_receipt_that_verified_first_stands(records: Records) -> None:
    records.create("j1", RAW)
    bad, good = Receipt({"n": 1}, False, "because"), Receipt({"n": 2}, True)
    with records.open("j1") as job:
        for given, kept in ((bad, bad), (good, good), (bad, good), (Receipt({"n": 3}, True), good)):
            job.write_receipt(given)
            assert job.receipt() == kept


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b'{"receipt":{},"verified":true,"version":2}', b"\xff"]
)
def test_a_broken_receipt_is_none_and_can_be_written_anew(records: Records, content: bytes) -> None:
    records.create("j1", RAW)
    (records.root / "j1" / RECEIPT).write_bytes(content)
    with records.open("j1") as job:
        assert job.receipt() is None
        job.write_receipt(Receipt({}, True))
        assert job.receipt() == Receipt({}, True)


@pytest.mark.parametrize("call", range(3))
def test_a_crash_while_a_receipt_is_kept_leaves_it_or_none(records: Records, call: int) -> None:
    records.create("j1", RAW)
    with records.open("j1") as job:
        with pytest.MonkeyPatch.context() as monkeypatch:
            cut_at(monkeypatch, call)
            with pytest.raises(Cut):
                job.write_receipt(Receipt({"n": 1}, True))
        assert job.receipt() in (None, Receipt({"n": 1}, True))
