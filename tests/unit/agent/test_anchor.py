"""The mark by which a node tells the directory of its jobs from the empty place of a disk."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from aitbc_miner.agent.anchor import LOOK_S, Anchor
from aitbc_miner.store.database import Database
from aitbc_miner.store.records import MARK, Records
from aitbc_miner.util import clock
from aitbc_miner.util.log import events


class Home:
    """A database, and a directory of jobs of which the database knows `kept`."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.root = folder / "jobs"
        self.root.mkdir()
        self.kept: set[str] = set()
        self.told: list[str | None] = []
        self.anchors: list[Anchor] = []
        self.now = 100.0
        self._patch = patch
        self._database = Database(folder / "queue.db")
        patch.setattr(clock, "now", lambda: self.now)
        self.context: Any = SimpleNamespace(homeless=None, log=events("agent"), records=Records(self.root))
        self.context.ledger = SimpleNamespace(settled=lambda: self.kept)
        self.context.tell = lambda: self.told.append(self.context.homeless)
        self.anchor = self.started()

    def started(self) -> Anchor:
        """Start anew, with the same database."""
        self.context.homeless = None
        self.anchor = Anchor(self.context, self._database)
        self.anchors.append(self.anchor)
        self.anchor.start_due()
        return self.anchor

    @property
    def begun(self) -> int:
        """Count the starts after which the jobs could be read."""
        return sum(anchor.found for anchor in self.anchors)

    def look(self) -> str | None:
        """Let the time pass until it looks again, and give what is wrong."""
        self.now += LOOK_S
        self.anchor.start_due()
        said: str | None = self.context.homeless
        return said

    def swap(self) -> Path:
        """Put an empty directory in the place of the jobs; gives where these are."""
        away = self.root.with_name("away")
        self.root.rename(away)
        self.root.mkdir()
        return away

    def back(self, away: Path) -> None:
        """Put the jobs back."""
        for path in self.root.iterdir():
            path.unlink()
        self.root.rmdir()
        away.rename(self.root)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Home]:
    home = Home(tmp_path, monkeypatch)
    yield home
    home._database.close()


def test_a_new_node_marks_its_workspace_and_finds_it_again(home: Home) -> None:
    assert (home.begun, home.context.homeless) == (1, None)
    mark = (home.root / MARK).read_text()
    home.started()
    assert (home.begun, home.context.homeless, (home.root / MARK).read_text()) == (2, None, mark)


def test_nothing_begins_before_the_right_one_is_there(home: Home) -> None:
    away = home.swap()
    home.started()
    assert home.begun == 1
    said = home.look() or ""
    assert f"cannot use workspace.root {home.root}: the directory has no +workspace, and this node's" in said
    assert "mounted at" in said
    assert list(home.root.iterdir()) == []
    home.back(away)
    assert home.look() is None
    assert (home.begun, home.told[-1]) == (2, None)


@pytest.mark.parametrize("how", ["unmounted", "deleted", "another's"])
def test_what_goes_while_the_node_runs_is_seen(home: Home, how: str) -> None:
    away = home.swap()
    if how == "deleted":
        home.root.rmdir()
    elif how == "another's":
        (home.root / MARK).write_text("0123\n")
    assert home.anchor.lost()
    assert "the node pulls no jobs; mount the disk of the workspace, or, " in (home.look() or "")
    assert how != "another's" or "+workspace is of another node ('0123')" in home.context.homeless
    home.root.mkdir(exist_ok=True)
    home.back(away)
    assert not home.anchor.lost()
    assert home.begun == 1


def test_the_operator_may_say_that_it_is_gone_for_good(home: Home) -> None:
    home.swap()
    said = home.look() or ""
    command = said.split("`")[1]
    word, path = command.removeprefix("echo ").split(" > ")
    Path(path).write_text(f"{word}\n")
    assert home.look() is None


@pytest.mark.parametrize("there", [True, False])
def test_of_an_older_version_the_jobs_say_where_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: bool
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Anchor, "start_due", lambda _: None)
        home = Home(tmp_path, monkeypatch)
    home.kept = {"j1", "swept-meanwhile"}
    if there:
        home.context.records.create("j1", b"{}")
    home.started()
    assert (home.begun, (home.root / MARK).exists()) == (there, there)
    if not there:
        home.context.records.create("j1", b"{}")
        assert home.look(), "once it is known to be missing, the mark alone counts"


def test_trouble_with_looking_is_shown_and_passes(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("aitbc_miner.util.fs.read_bounded", fails)
        assert "Too many open files" in (home.look() or "")
    assert home.look() is None


def fails(*_: object, **__: object) -> bytes:
    raise OSError(24, "Too many open files")
