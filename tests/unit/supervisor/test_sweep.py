"""Which directories a sweep removes, whatever it is told; and what it leaves for the next."""

import os
from collections.abc import Callable
from math import inf
from pathlib import Path
from typing import Any

import pytest

from aitbc_miner.jobs import FINAL, State, StateRecord
from aitbc_miner.store.records import Records
from aitbc_miner.supervisor.sweep import LEAVING, Sweep, sweep
from aitbc_miner.util import fs

SIZE = 1 << 20


def make(root: Path, job_id: str, state: State = State.DONE) -> Path:
    records = Records(root)
    records.create(job_id, b"{}")
    with records.open(job_id) as job:
        job.write_state(StateRecord(job_id, state))
    (root / job_id / "output").mkdir()
    (root / job_id / "output" / "data").write_bytes(bytes(SIZE))
    return root / job_id


def run(root: Path, *job_ids: str, enough: float = inf, files: float = 0.0, time_s: float = 30.0) -> Sweep:
    return sweep(root, list(job_ids), fs.Room(enough, files), time_s)


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def test_what_is_delivered_goes(tmp_path: Path) -> None:
    for number, state in enumerate(FINAL):
        make(tmp_path, f"j{number}", state)
    said = run(tmp_path, "j0", "j1")
    assert (said.gone, said.kept, said.unfinished) == (["j0", "j1"], [], False)
    assert said.freed_bytes >= 2 * SIZE
    assert names(tmp_path) == []


@pytest.mark.parametrize("state", sorted(set(State) - FINAL))
def test_what_is_not_delivered_stays_whatever_the_agent_says(tmp_path: Path, state: State) -> None:
    make(tmp_path, "j1", state)
    make(tmp_path, "j2")
    said = run(tmp_path, "j1", "j2")
    assert (said.gone, said.kept) == (["j2"], ["j1"])
    assert names(tmp_path) == ["j1"]


def test_what_cannot_be_read_stays(tmp_path: Path) -> None:
    (make(tmp_path, "torn") / "state.json").write_text("{")
    (make(tmp_path, "none") / "state.json").unlink()
    # The record of another job, which is delivered.
    make(tmp_path, "done")
    (tmp_path / "done" / "state.json").rename(make(tmp_path, "other", State.RUNNING) / "state.json")
    (tmp_path / "link").symlink_to(make(tmp_path, "target"))
    before = names(tmp_path)
    named = ["torn", "none", "other", "link", "..", "+broken", "+reserve", "a/../target"]
    said = run(tmp_path, *named)
    assert (said.gone, said.kept, said.freed_bytes) == ([], named, 0)
    assert names(tmp_path) == before


def test_what_is_gone_already_is_said_to_be(tmp_path: Path) -> None:
    assert run(tmp_path, "j1") == Sweep(gone=["j1"])


def test_no_more_than_is_needed_goes_and_the_oldest_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(4):
        make(tmp_path, f"j{number}")
    # A file system that hands out later what was freed.
    disk = os.statvfs(tmp_path)
    monkeypatch.setattr(os, "statvfs", lambda _: disk)
    said = run(tmp_path, "j3", "j1", "j0", "j2", enough=disk.f_bavail * disk.f_frsize + 3 * SIZE // 2)
    assert said.gone == ["j3", "j1"]
    assert names(tmp_path) == ["j0", "j2"]
    assert run(tmp_path, "j0", enough=0.0) == Sweep()


def test_a_sweep_that_has_no_time_leaves_nothing_that_is_taken_for_a_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path, "j1")
    make(tmp_path, "j2")
    check, calls = fs.check_time, []

    def over_soon(deadline: float) -> None:
        calls.append(deadline)
        check(0.0 if len(calls) == 3 else deadline)

    monkeypatch.setattr(fs, "check_time", over_soon)
    said = run(tmp_path, "j1", "j2")
    assert (said.gone, said.unfinished) == (["j1"], True)
    assert names(tmp_path) == [f"{LEAVING}j1", "j2"]
    assert Records(tmp_path).ids() == ["j2"]
    # The next one goes on with that, whatever else it is told.
    said = run(tmp_path)
    assert (said.gone, said.unfinished) == ([], False)
    assert said.freed_bytes >= SIZE
    assert names(tmp_path) == ["j2"]


def test_no_time_at_all(tmp_path: Path) -> None:
    make(tmp_path, "j1")
    assert run(tmp_path, "j1", time_s=0.0) == Sweep(unfinished=True)
    assert names(tmp_path) == ["j1"]


def test_what_cannot_be_removed_holds_nothing_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / f"{LEAVING}j0" / "stays").mkdir(parents=True)
    make(tmp_path, "j1")
    rmdir = os.rmdir

    def refuse(name: str, *, dir_fd: int) -> None:
        if name == "stays":
            raise PermissionError(1, "Operation not permitted")
        rmdir(name, dir_fd=dir_fd)

    monkeypatch.setattr(os, "rmdir", refuse)
    said = run(tmp_path, "j1")
    assert (said.gone, said.unfinished) == (["j1"], False)
    assert names(tmp_path) == [f"{LEAVING}j0"]


def noted(calls: list[str], name: str) -> Callable[..., None]:
    """Make a function of `os` that writes down that it was called."""
    real = getattr(os, name)

    def call(*arguments: Any, **more: Any) -> None:
        calls.append(name)
        real(*arguments, **more)

    return call


def test_its_name_is_gone_durably_before_anything_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path, "j1")
    calls: list[str] = []
    for name in ("rename", "fsync", "unlink"):
        monkeypatch.setattr(os, name, noted(calls, name))
    run(tmp_path, "j1")
    assert calls[:3] == ["rename", "fsync", "unlink"]
