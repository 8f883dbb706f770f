"""What is set aside for records: made, used on a full disk, given back, and not trusted."""

import errno
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from aitbc_miner.jobs import State, StateRecord
from aitbc_miner.store import reserve
from aitbc_miner.store.records import Records
from aitbc_miner.util import fs

MIB = 1 << 20
NUMBER = MIB // reserve.PIECE
needs_root = pytest.mark.xfail(os.geteuid() != 0, reason="only root can mount", strict=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """Give a disk of 4 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    subprocess.run(["/usr/bin/mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(place)], check=True)
    try:
        yield place
    finally:
        subprocess.run(["/usr/bin/umount", str(place)], check=True)


def free_bytes(place: Path) -> int:
    disk = os.statvfs(place)
    return disk.f_bavail * disk.f_frsize


def eat(place: Path) -> None:
    """Take all that is free."""
    with (place / "eaten").open("ab", buffering=0) as file:
        while free_bytes(place):
            file.write(bytes(4096))


def pieces(root: Path) -> list[Path]:
    return sorted((root / reserve.NAME).iterdir())


def test_it_is_made_whole_and_kept_so(tmp_path: Path) -> None:
    assert reserve.lacking(tmp_path, 1).size == MIB
    reserve.fill(tmp_path, 1)
    assert [path.stat().st_blocks * 512 for path in pieces(tmp_path)] == [reserve.PIECE] * NUMBER
    assert {path.stat().st_mode & 0o7777 for path in pieces(tmp_path)} == {0o640}
    assert reserve.release(tmp_path)
    assert reserve.lacking(tmp_path, 1).size == reserve.PIECE
    assert reserve.spent(tmp_path, 1) == fs.Room(reserve.PIECE, 1)
    reserve.fill(tmp_path, 1)
    assert reserve.lacking(tmp_path, 1).size == 0
    # Configured anew: what is too much goes.
    reserve.fill(tmp_path, 0)
    assert pieces(tmp_path) == []


def test_what_was_never_made_was_not_spent(tmp_path: Path) -> None:
    assert reserve.spent(tmp_path, 64) == (0, 0)
    assert not reserve.release(tmp_path)


def test_a_large_one_has_no_more_files_than_a_directory_is_fit_for() -> None:
    number, size = reserve._plan(100_000)
    assert number == reserve.MAX_PIECES
    assert number * size == 100_000 * MIB


@needs_root
def test_records_are_written_on_a_full_disk_whose_space_somebody_else_wants(disk: Path) -> None:
    reserve.fill(disk, 1)
    records = Records(disk)
    records.create("j1", b"{}")
    number = 0
    while reserve._left(disk):
        eat(disk)
        with records.open("j1") as job:
            job.write_state(StateRecord("j1", State.PULLED, note="x" * number))
            assert job.state().note == "x" * number
        number += 1
    # Each costs one piece, whatever the others take of it.
    assert number == NUMBER
    eat(disk)
    with records.open("j1") as job, pytest.raises(OSError, match="No space left"):
        job.write_state(StateRecord("j1", State.PULLED, note="too much"))
    assert [path.name for path in disk.iterdir() if path.name.startswith("+new")] == []
    with records.open("j1") as job:
        assert job.state().note == "x" * (number - 1)


@needs_root
def test_a_record_larger_than_a_piece_takes_several(disk: Path) -> None:
    reserve.fill(disk, 1)
    eat(disk)
    data = os.urandom(5 * reserve.PIECE + 1)
    with fs.directory(disk) as fd:
        reserve.write_with_reserve(disk, fd, "outcome.json", data)
    assert (disk / "outcome.json").read_bytes() == data
    assert reserve.lacking(disk, 1).size == 6 * reserve.PIECE


@needs_root
def test_what_is_no_record_is_given_room(disk: Path) -> None:
    reserve.fill(disk, 1)
    eat(disk)
    reserve.ensure(disk, 3 * reserve.PIECE)
    assert free_bytes(disk) == 3 * reserve.PIECE
    reserve.ensure(disk, 3 * reserve.PIECE)
    assert reserve.lacking(disk, 1).size == 3 * reserve.PIECE
    reserve.ensure(disk, 9 * MIB)
    assert pieces(disk) == []


@needs_root
def test_a_disk_too_small_keeps_what_could_be_made(disk: Path) -> None:
    with pytest.raises(OSError, match="No space left"):
        reserve.fill(disk, 8)
    assert reserve.lacking(disk, 8).size == 4 * MIB
    assert {path.stat().st_size for path in pieces(disk)} == {reserve.PIECE}


def refuse_new_files(patch: pytest.MonkeyPatch) -> None:
    """Have the disk be full for whatever is not there already."""

    def full(*_: object, **__: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    patch.setattr(fs, "make_file", full)
    patch.setattr(fs.write_durably, "__kwdefaults__", {"mode": 0o640, "make": full})


@pytest.mark.parametrize("trap", ["link", "second name", "fifo"])
def test_what_is_no_piece_is_not_written_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trap: str
) -> None:
    """The service owns the directory, and root writes there."""
    precious = tmp_path / "precious"
    precious.write_text("as it was")
    place = tmp_path / reserve.NAME
    place.mkdir()
    if trap == "link":
        (place / "000000").symlink_to(precious)
    elif trap == "second name":
        (place / "000000").hardlink_to(precious)
    else:
        os.mkfifo(place / "000000")
    refuse_new_files(monkeypatch)
    with (
        fs.directory(tmp_path) as fd,
        pytest.raises(OSError, match=r"not a piece of the reserve|Too many|No such device"),
    ):
        reserve.write_with_reserve(tmp_path, fd, "state.json", b"{}")
    assert precious.read_text() == "as it was"
    assert not (tmp_path / "state.json").exists()


def test_a_link_in_the_place_of_the_directory_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "000000").write_text("as it was")
    (tmp_path / reserve.NAME).symlink_to("other")
    assert not reserve.release(tmp_path)
    with pytest.raises(OSError, match=r"Too many levels|Not a directory"):
        reserve.fill(tmp_path, 1)
    assert (tmp_path / "other" / "000000").read_text() == "as it was"


def test_other_faults_of_a_disk_touch_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reserve.fill(tmp_path, 1)

    def broken(_: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", broken)
    with fs.directory(tmp_path) as fd, pytest.raises(OSError, match="Input/output"):
        reserve.write_with_reserve(tmp_path, fd, "state.json", b"{}")
    assert reserve.lacking(tmp_path, 1).size == 0


@needs_root
def test_it_belongs_to_whom_the_records_belong(tmp_path: Path) -> None:
    os.chown(tmp_path, 1_987_655, 1_987_655)
    reserve.fill(tmp_path, 1)
    owners = {
        (path.stat().st_uid, path.stat().st_gid) for path in [*pieces(tmp_path), tmp_path / reserve.NAME]
    }
    assert owners == {(1_987_655, 1_987_655)}
