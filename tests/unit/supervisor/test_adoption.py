"""Whom the supervisor may signal, and what it ends."""

import errno
import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from aitbc_miner.supervisor.adoption import WorkerBook, children, end_worker, kill_strangers, works_in
from aitbc_miner.supervisor.loop import Supervisor
from aitbc_miner.util.log import events
from aitbc_miner.util.system import process_start
from tools.lib.local_node import wait_until


@pytest.fixture
def sleeper() -> "subprocess.Popen[bytes]":
    return subprocess.Popen(["/usr/bin/sleep", "60"])


def gone(process: "subprocess.Popen[bytes]") -> bool:
    return process.poll() is not None


def test_only_workers_that_this_node_started_are_known(tmp_path: Path) -> None:
    path = tmp_path / "workers.json"
    own, start = os.getpid(), process_start(os.getpid())
    book = WorkerBook(path)
    book.note("cpu0", own)
    # Of this run: it is our child, and nobody else's word is needed for it.
    assert not book.knows("cpu0", own, start)
    after = WorkerBook(path)
    assert after.knows("cpu0", own, start)
    assert not after.knows("cpu1", own, start)
    assert not after.knows("cpu0", 1, start)
    assert not after.knows("cpu0", own, (start or 0) + 1)
    assert not after.knows(None, None, None)
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_worker_that_goes_on_stays_in_the_book_of_the_next_run(tmp_path: Path) -> None:
    path = tmp_path / "workers.json"
    own, start = os.getpid(), process_start(os.getpid())
    WorkerBook(path).note("cpu0", own)
    # The next run starts a worker for the other slot only: the first one's is still at its job.
    WorkerBook(path).note("cpu1", own)
    assert WorkerBook(path).knows("cpu0", own, start)


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"cpu0": {"pid": "x", "start": 1}}', "\xff"])
def test_a_broken_book_knows_nobody(tmp_path: Path, text: str) -> None:
    path = tmp_path / "workers.json"
    path.write_bytes(text.encode("latin-1"))
    assert not WorkerBook(path).knows("cpu0", 1, 1)


@pytest.mark.parametrize("how", ["mode", "hard link", "link", "owner"])
def test_a_book_that_others_could_have_written_knows_nobody(tmp_path: Path, how: str) -> None:
    """It had root kill a process of another's."""
    path = tmp_path / "workers.json"
    own, start = os.getpid(), process_start(os.getpid())
    WorkerBook(path).note("cpu0", own)
    if how == "mode":
        path.chmod(0o622)
    elif how == "hard link":
        (tmp_path / "other").hardlink_to(path)
    elif how == "link":
        path.rename(tmp_path / "other")
        path.symlink_to("other")
    elif os.geteuid() == 0:
        os.chown(path, 60_123, -1)
    else:
        path.chmod(0o606)
    assert not WorkerBook(path).knows("cpu0", own, start)


def test_a_process_outside_of_the_slots_group_is_no_worker(
    tmp_path: Path, sleeper: "subprocess.Popen[bytes]", monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **_more: object) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    (tmp_path / "worker").mkdir()
    (tmp_path / "worker" / "cgroup.procs").write_text(f"{os.getpid()}\n")
    assert works_in(tmp_path, os.getpid())
    assert not works_in(tmp_path, sleeper.pid)
    assert not works_in(tmp_path / "gone", sleeper.pid)
    assert works_in(None, sleeper.pid)
    for group in (tmp_path, None):
        # Taken for gone it would work on, at a job that is called lost.
        with monkeypatch.context() as patch:
            patch.setattr(Path, "stat", fail)
            patch.setattr(os, "scandir", fail)
            with pytest.raises(OSError, match="Too many open files"):
                works_in(group, os.getpid())
    sleeper.kill()
    sleeper.wait()
    assert not works_in(None, sleeper.pid)


def test_a_book_that_cannot_be_written_stops_nothing(tmp_path: Path) -> None:
    WorkerBook(tmp_path / "nowhere" / "workers.json").note("cpu0", os.getpid())
    assert not (tmp_path / "nowhere").exists()


def test_a_book_is_plain_json(tmp_path: Path) -> None:
    WorkerBook(tmp_path / "workers.json").note("cpu0", os.getpid())
    assert json.loads((tmp_path / "workers.json").read_text())["cpu0"]["pid"] == os.getpid()


def test_a_worker_is_ended_only_under_its_full_name(sleeper: "subprocess.Popen[bytes]") -> None:
    start = process_start(sleeper.pid)
    assert start
    end_worker(sleeper.pid, start + 1)
    assert sleeper.poll() is None
    end_worker(sleeper.pid, start)
    wait_until(lambda: gone(sleeper), 10)
    # Long gone, and no error.
    end_worker(sleeper.pid, start)


def test_trouble_with_a_chore_of_the_supervisor_is_shown_and_ends_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    shown: dict[str, object] = {}
    supervisor: Any = SimpleNamespace(_api=SimpleNamespace(troubles=shown), _log=events("supervisor"))
    book = WorkerBook(tmp_path / "workers.json")
    chores: dict[str, Callable[[], object]] = {"look": lambda: kill_strangers(children()), "note": book.write}

    def fails(*_: object, **__: object) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "iterdir", fails)
        patch.setattr(os, "open", fails)
        book.note("cpu0", os.getpid())
        for what, chore in chores.items():
            Supervisor._chore(supervisor, what, chore)
    assert list(shown) == ["look", "note"]
    assert "Too many open files" in str(shown["look"])
    for what, chore in chores.items():
        Supervisor._chore(supervisor, what, chore)
    assert shown == {}
    assert WorkerBook(tmp_path / "workers.json").knows("cpu0", os.getpid(), process_start(os.getpid()))
