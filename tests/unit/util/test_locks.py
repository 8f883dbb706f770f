"""Locks that say who holds them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from aitbc_miner.util.locks import HeldError, Locks

HOLD = """
import sys
from pathlib import Path
from aitbc_miner.util.locks import Locks
locks = Locks("pid 7, the first", Path(sys.argv[1]))
locks.take("the thing", "")
print("held", flush=True)
sys.stdin.read()
"""


def test_who_holds_a_lock_is_said_and_its_end_frees_it(tmp_path: Path) -> None:
    place = tmp_path / "run" / "locks"
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(place)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == b"held\n"
        mine = Locks("pid 8, the second", place)
        with pytest.raises(
            HeldError, match=r"^cannot use the thing: another miner uses it \(pid 7, the first\); wait$"
        ):
            mine.take("the thing", "wait", 0.0)
        mine.take("another thing", "wait", 0.0)
        first.kill()
        first.wait()
        mine.take("the thing", "wait")
        mine.take("the thing", "wait")
    assert {path.stat().st_mode & 0o777 for path in place.iterdir()} == {0o600}
    mine.close()
    Locks("pid 9", place).take("the thing", "wait", 0.0)


def test_a_directory_that_others_can_enter_holds_no_locks(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    with pytest.raises(HeldError, match=r"others may open .*; remove this directory"):
        Locks("me", tmp_path).take("the thing", "")


def test_a_link_is_no_directory_of_locks(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir(mode=0o700)
    (tmp_path / "locks").symlink_to("real")
    with pytest.raises(OSError, match=r"Not a directory|Too many levels"):
        Locks("me", tmp_path / "locks").take("the thing", "")


def test_a_lock_file_is_opened_through_no_link(tmp_path: Path) -> None:
    place = tmp_path / "locks"
    locks = Locks("me", place)
    locks.take("the thing", "")
    (file,) = place.iterdir()
    locks.close()
    file.unlink()
    (tmp_path / "precious").write_text("kept")
    os.symlink(tmp_path / "precious", file)  # noqa: PTH211  # as an intruder would
    with pytest.raises(OSError, match="Too many levels"):
        locks.take("the thing", "")
    assert (tmp_path / "precious").read_text() == "kept"
