"""What the supervisor makes of the space that is free: pulling stops and goes on, sweeps, the reserve."""

import os
from collections.abc import Callable
from math import inf
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from aitbc_miner.config.settings import WorkspaceSection
from aitbc_miner.ipc.channel import MAX_SWEEPABLE, ExcessError
from aitbc_miner.ipc.messages import SpaceWanted, Sweepable, Swept
from aitbc_miner.store import reserve
from aitbc_miner.store.records import MARK
from aitbc_miner.store.reserve import MIB
from aitbc_miner.supervisor import disk_watch
from aitbc_miner.supervisor.children import OneShots
from aitbc_miner.supervisor.disk_watch import AGAIN_S, DiskWatch
from aitbc_miner.supervisor.sweep import Sweep
from aitbc_miner.util import clock, fs

LEAST, RESERVE = 160, 1


class FakeOneShots(OneShots):
    """Children that are never started: the test says how they end."""

    def __init__(self) -> None:
        super().__init__()
        self.started: list[tuple[str, Any]] = []
        self.done: Callable[[Any], None] = lambda _: None
        self.refuse = False

    def start(self, name: str, work: Any, says: Any, done: Callable[[Any], None], keep: Any = ()) -> None:
        if self.refuse:
            raise BlockingIOError(11, "Resource temporarily unavailable")
        self.started.append((name, work.args[1:3] if name == "sweep" else None))
        self.done = done

    def names(self) -> list[str]:
        return [name for name, _ in self.started]


class Site:
    """A disk with as much space as the test says, at the time that it says."""

    def __init__(self, root: Path, patch: pytest.MonkeyPatch, least: int = LEAST) -> None:
        self.errands = FakeOneShots()
        self.said: list[Swept | SpaceWanted] = []
        self.free = 1000 * MIB
        self.time = 1000.0
        self.inodes = inf
        patch.setattr(os, "statvfs", self._statvfs)
        patch.setattr(clock, "now", lambda: self.time)
        kept = WorkspaceSection(root, min_free_mb=least, reserve_mb=RESERVE)
        agent: Any = SimpleNamespace(send=self.said.append)
        self.storage = DiskWatch(kept, self.errands, agent)

    def _statvfs(self, _: object) -> SimpleNamespace:
        counted = self.inodes if self.inodes < inf else 0
        return SimpleNamespace(f_bavail=self.free, f_frsize=1, f_files=counted and 10**6, f_favail=counted)

    def begun(self) -> "Site":
        """Have the sweep of the start be over, and the reserve made."""
        (self.storage._kept.root / MARK).touch()
        reserve.fill(self.storage._kept.root, RESERVE)
        self.storage.tick()
        self.errands.done(Sweep())
        self.errands.started.clear()
        return self

    def tick(self, free_mib: float, after: float = AGAIN_S) -> bool:
        self.free = int(free_mib * MIB)
        self.time += after
        before = self.storage.short
        self.storage.tick()
        return self.storage.short is not before


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    return Site(tmp_path, monkeypatch).begun()


def test_pulling_stops_below_the_limit_and_goes_on_well_above_it(site: Site) -> None:
    assert not site.tick(LEAST)
    assert not site.storage.short
    assert site.tick(LEAST - 1)
    assert site.storage.short
    problem = site.storage.problem
    assert problem is not None
    assert problem.what == (
        "workspace.root has 159 MiB free; the node pulls no jobs below 170 MiB"
        " (workspace.min_free_mb, 1/16 more, and what the reserve lacks)"
    )
    assert "lower workspace.min_free_mb or keep_*" in problem.remedy
    assert not site.tick(LEAST + LEAST / 16 - 1)
    assert site.storage.short
    assert site.tick(LEAST + LEAST / 16)
    assert not site.storage.short
    assert site.storage.problem is None


def test_a_place_without_the_mark_is_left_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = Site(tmp_path, monkeypatch)
    site.storage.sweep(Sweepable(["j1"]))
    site.tick(LEAST * 2)
    assert site.errands.started == []
    (tmp_path / MARK).touch()
    site.tick(LEAST * 2)
    assert site.errands.names() == ["sweep"]


def test_inodes_are_guarded_as_bytes_are(site: Site) -> None:
    site.inodes = 10_000
    assert not site.tick(LEAST)
    site.inodes = 9_999
    assert site.tick(LEAST)
    problem = site.storage.problem
    assert problem is not None
    assert problem.what == (
        "workspace.root has 9999 inodes (files) free; the node pulls no jobs below 10625"
        " (workspace.min_free_inodes, 1/16 more, and what the reserve lacks)"
    )
    assert "lower workspace.min_free_inodes or keep_*" in problem.remedy
    assert site.said == [SpaceWanted()]
    site.storage.sweep(Sweepable(["j1"], early=True))
    assert not site.tick(LEAST)
    [(name, (job_ids, enough))] = site.errands.started
    assert (name, job_ids, enough.files) == ("sweep", ["j1"], 10_000 * 17 / 16)
    site.inodes = 10_000 * 17 / 16
    assert site.tick(LEAST * 2)
    assert (site.storage.short, site.storage.problem) == (False, None)


def test_a_disk_that_does_not_count_inodes_has_enough_of_them(site: Site) -> None:
    assert site.inodes == inf
    assert not site.tick(LEAST)
    assert not site.storage.short


def test_the_reserve_comes_before_more_jobs(site: Site) -> None:
    site.tick(0)
    reserve.release(site.storage._kept.root)
    assert not site.tick(LEAST + LEAST / 16)
    assert site.errands.names() == ["reserve"]
    reserve.fill(site.storage._kept.root, RESERVE)
    site.errands.done("ended with exit status 0")
    assert site.tick(LEAST + LEAST / 16)


def test_without_a_limit_pulling_never_stops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = Site(tmp_path, monkeypatch, least=0).begun()
    assert not site.tick(0)
    assert (site.storage.short, site.storage.problem, site.said) == (False, None, [])


def test_the_agent_is_asked_for_what_may_go_now_and_then(site: Site) -> None:
    site.tick(LEAST - 10)
    assert site.said == [SpaceWanted()]
    site.tick(LEAST - 10, after=AGAIN_S / 2)
    assert len(site.said) == 1
    site.tick(LEAST - 10, after=AGAIN_S / 2)
    assert len(site.said) == 2


def test_what_is_over_its_time_goes_whether_there_is_space_or_not(site: Site) -> None:
    site.storage.sweep(Sweepable(["j1", "j2", "j3"]))
    site.tick(1000)
    assert site.errands.started == [("sweep", (["j1", "j2", "j3"], fs.Room(inf, inf)))]
    # Named again while it is under way, and nothing else is started beside it.
    site.storage.sweep(Sweepable(["j3", "j4"]))
    site.tick(1000)
    assert len(site.errands.started) == 1
    site.errands.done(Sweep(gone=["j1"], kept=["j2"], freed_bytes=5, unfinished=True))
    assert site.said == [Swept(["j1"], 5)]
    site.tick(1000)
    assert site.errands.started[1:] == [("sweep", (["j3", "j4"], fs.Room(inf, inf)))]
    site.errands.done(Sweep(gone=["j3", "j4"]))
    site.tick(1000)
    assert len(site.errands.started) == 2


def test_before_their_time_only_so_many_go_as_it_takes(site: Site) -> None:
    site.storage.sweep(Sweepable(["j1", "j2"], early=True))
    site.tick(1000)
    assert site.errands.started == []
    site.tick(LEAST - 1)
    assert site.errands.started == [("sweep", (["j1", "j2"], site.storage._wanted(fs.Room())))]
    site.errands.done(Sweep(gone=["j1"]))
    # The other one is named anew, if it still may go when it must.
    site.tick(LEAST - 1)
    assert len(site.errands.started) == 1
    assert isinstance(site.said[-1], SpaceWanted)


def test_remains_of_an_earlier_run_are_looked_for_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = Site(tmp_path, monkeypatch)
    (tmp_path / MARK).touch()
    site.tick(1000)
    assert site.errands.started == [("sweep", ([], fs.Room(inf, inf)))]
    site.errands.done(Sweep(unfinished=True))
    site.tick(1000)
    site.errands.done(Sweep())
    site.tick(1000)
    assert site.errands.names() == ["sweep", "sweep", "reserve"]


def test_a_sweep_that_fails_is_made_again_after_a_pause(site: Site) -> None:
    site.storage.sweep(Sweepable(["j1"]))
    site.tick(1000)
    site.errands.done("was killed by SIGKILL")
    site.tick(1000, after=AGAIN_S / 2)
    assert len(site.errands.started) == 1
    site.tick(1000)
    assert site.errands.started[1] == ("sweep", (["j1"], fs.Room(inf, inf)))


def test_no_process_is_to_be_had(site: Site) -> None:
    site.storage.sweep(Sweepable(["j1"]))
    site.errands.refuse = True
    site.tick(1000)
    site.errands.refuse = False
    site.tick(1000)
    assert site.errands.names() == ["sweep"]


def test_the_reserve_never_takes_more_than_half_of_what_there_is(site: Site) -> None:
    for _ in range(4):
        reserve.release(site.storage._kept.root)
    lacking = 4 * reserve.PIECE / MIB
    site.tick(2 * lacking - 0.01)
    assert "reserve" not in site.errands.names()
    site.tick(2 * lacking)
    assert "reserve" in site.errands.names()


def test_the_child_fills_the_reserve_and_says_why_it_cannot(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    disk_watch._fill(WorkspaceSection(tmp_path, reserve_mb=1))
    assert reserve.lacking(tmp_path, 1).size == 0
    disk_watch._fill(WorkspaceSection(tmp_path / "none", reserve_mb=1))
    [record] = caplog.records
    assert record.getMessage() == "reserve not filled"


@pytest.mark.parametrize("call", ["statvfs", "stat"])
def test_a_disk_that_is_gone_is_said(site: Site, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    def fail(*_: object, **_more: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, call, fail)
    assert not site.storage.short
    site.storage.tick()
    assert site.storage.problem is not None
    assert "Input/output error; the node pulls no jobs" in site.storage.problem.what
    assert site.storage.short
    monkeypatch.undo()
    site.tick(1000)
    assert [site.storage.short, site.storage.problem] == [False, None]


def test_too_many_directories_to_remove_are_an_excess(site: Site) -> None:
    for n in range(MAX_SWEEPABLE // 1000):
        site.storage.sweep(Sweepable([f"j{n}-{m}" for m in range(1000)]))
    with pytest.raises(ExcessError, match="20000 directories"):
        site.storage.sweep(Sweepable(["one-more"]))
