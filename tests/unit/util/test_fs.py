"""Removing what a stranger has made: however deep, however much, whatever it leads to."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from aitbc_miner.util import clock, fs

DEPTH = 5000
MANY = 20_000
needs_root = pytest.mark.xfail(os.geteuid() != 0, reason="only root can mount", strict=True)


@pytest.fixture
def place(tmp_path: Path) -> Iterator[int]:
    with fs.directory(tmp_path) as fd:
        yield fd


def dig(at: int, depth: int) -> None:
    """Make a chain of directories with a file in each, deeper than any path can be long."""
    here = os.dup(at)
    for _ in range(depth):
        os.close(fs.make_file(here, "file", 0o600))
        os.mkdir("d", dir_fd=here)
        below = os.open("d", fs.DIRECTORY, dir_fd=here)
        os.close(here)
        here = below
    os.close(here)


def test_depth_is_no_matter(tmp_path: Path, place: int) -> None:
    (tmp_path / "deep").mkdir()
    with fs.directory("deep", at=place) as deep:
        dig(deep, DEPTH)
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208  # only how many
    fs.remove_tree(place, "deep")
    assert list(tmp_path.iterdir()) == []
    assert len(os.listdir("/proc/self/fd")) <= before  # noqa: PTH208


def test_neither_is_number_and_what_is_freed_is_told(tmp_path: Path, place: int) -> None:
    wide = tmp_path / "wide"
    for each in range(fs.NAMES_AT_ONCE * 2 + 1):
        (wide / f"d{each}" / "inner").mkdir(parents=True)
    with fs.directory(wide) as fd:
        for each in range(MANY):
            os.mknod(f"f{each}", dir_fd=fd)
    (wide / "d7" / "inner" / "data").write_bytes(b"x" * 100_000)
    (wide / "linked").write_bytes(b"x" * 1_000_000)
    (tmp_path / "also").hardlink_to(wide / "linked")
    assert 100_000 <= fs.remove_tree(place, "wide") < 1_000_000
    assert [path.name for path in tmp_path.iterdir()] == ["also"]


STRANGER = 60_123


def test_a_strangers_link_on_the_way_is_not_followed(tmp_path: Path) -> None:
    """Whoever owns a directory on the way could have root work in another's: the place of jobs was a link."""
    real = tmp_path / "real" / "jobs"
    real.mkdir(parents=True)
    (tmp_path / "ours").symlink_to("real")
    (tmp_path / "whole").symlink_to(tmp_path / "ours")
    for way in ("real", "ours", "whole", "real/../ours"):
        with fs.directory(tmp_path / way / "jobs") as fd:
            assert os.fstat(fd).st_ino == real.stat().st_ino, way
    (real / "link").symlink_to(".")
    with pytest.raises(NotADirectoryError):
        fs.open_directory(real / "link")
    (tmp_path / "round").symlink_to("round")
    with pytest.raises(NotADirectoryError):
        fs.open_directory(tmp_path / "round" / "jobs")


@pytest.mark.parametrize(
    "whose", [*(pytest.param(each, marks=needs_root) for each in ("link", "directory")), "writable"]
)
def test_who_could_have_made_a_link(tmp_path: Path, whose: str) -> None:
    (tmp_path / "elsewhere" / "jobs").mkdir(parents=True)
    place = tmp_path / "place"
    place.mkdir(mode=0o755)
    (place / "link").symlink_to(tmp_path / "elsewhere")
    if whose == "link":
        os.lchown(place / "link", STRANGER, STRANGER)
    elif whose == "directory":
        os.chown(place, STRANGER, STRANGER)
    else:
        place.chmod(0o777)
    with pytest.raises(OSError, match=r"user id .* or others could have made the link 'link' on the way"):
        fs.open_directory(place / "link" / "jobs")
    # A directory of his own is another matter: what is in it is looked at again.
    (place / "own" / "jobs").mkdir(parents=True)
    os.close(fs.open_directory(place / "own" / "jobs"))


def test_what_is_missing_is_made_with_its_mode(tmp_path: Path) -> None:
    old = os.umask(0o077)
    try:
        os.close(fs.open_directory(tmp_path / "a" / "b", make=0o711))
    finally:
        os.umask(old)
    assert [(tmp_path / path).stat().st_mode & 0o777 for path in ("a", "a/b")] == [0o711, 0o711]
    with pytest.raises(FileNotFoundError):
        fs.open_directory(tmp_path / "c")


def test_links_are_removed_and_not_followed(tmp_path: Path, place: int) -> None:
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "file").touch()
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "up").symlink_to("..")
    (tree / "dir").symlink_to(kept)
    (tree / "file").symlink_to(kept / "file")
    os.mkfifo(tree / "fifo")
    fs.remove_tree(place, "tree")
    assert [path.name for path in kept.iterdir()] == ["file"]
    (tmp_path / "link").symlink_to(kept)
    with pytest.raises(OSError, match=r"Too many levels|Not a directory"):
        fs.remove_tree(place, "link")
    assert [path.name for path in kept.iterdir()] == ["file"]


def test_directories_that_are_shut(tmp_path: Path) -> None:
    """As an ordinary user, whom that stops; in a child, if we are root."""
    (tmp_path / "shut" / "inner").mkdir(parents=True)
    (tmp_path / "shut" / "inner" / "file").touch()
    (tmp_path / "shut" / "inner").chmod(0)
    (tmp_path / "shut").chmod(0o500)
    if os.geteuid() == 0:
        for path in (tmp_path, *tmp_path.rglob("*")):
            os.chown(path, 1_987_655, 1_987_655)
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            at = os.open(tmp_path, fs.DIRECTORY)
            if os.geteuid() == 0:
                os.setresuid(1_987_655, 1_987_655, 1_987_655)
            fs.remove_tree(at, "shut")
            status = 0
        finally:
            os._exit(status)
    assert os.waitpid(pid, 0)[1] == 0
    assert list(tmp_path.iterdir()) == []


def test_time_is_bounded_and_the_next_time_goes_on(tmp_path: Path, place: int) -> None:
    for each in range(50):
        (tmp_path / "tree" / f"d{each}").mkdir(parents=True)
    with pytest.raises(TimeoutError, match="too many files to remove in time"):
        fs.remove_tree(place, "tree", clock.now())
    fs.remove_tree(place, "tree", clock.now() + 30.0)
    assert list(tmp_path.iterdir()) == []


def test_what_is_moved_meanwhile_takes_nothing_else_with_it(
    tmp_path: Path, place: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = tmp_path / "tree" / "a" / "b"
    inner.mkdir(parents=True)
    (inner / "file").touch()
    other = tmp_path / "other"
    (other / "b").mkdir(parents=True)
    (other / "precious").touch()
    unlink = os.unlink

    def move_then_unlink(name: str, *, dir_fd: int) -> None:
        unlink(name, dir_fd=dir_fd)
        # What `..` leads to from here is another directory now, with one of the same name in it.
        inner.rename(other / "moved")

    monkeypatch.setattr(os, "unlink", move_then_unlink)
    with pytest.raises(OSError, match="somebody moved the directory during its removal"):
        fs.remove_tree(place, "tree")
    assert (other / "precious").exists()
    assert (other / "b").exists()


@needs_root
@pytest.mark.parametrize("kind", ["tmpfs", "bind"])
def test_no_mount_point_is_crossed(tmp_path: Path, place: int, kind: str) -> None:
    source = tmp_path / "source"
    source.mkdir()
    point = tmp_path / "tree" / "point"
    point.mkdir(parents=True)
    arguments = ["-t", "tmpfs", "tmpfs"] if kind == "tmpfs" else ["--bind", str(source)]
    subprocess.run(["/usr/bin/mount", *arguments, str(point)], check=True)
    try:
        (point / "precious").touch()
        with pytest.raises(OSError, match="another file system is mounted there"):
            fs.remove_tree(place, "tree")
        assert (point / "precious").exists()
    finally:
        subprocess.run(["/usr/bin/umount", str(point)], check=True)
    shutil.rmtree(tmp_path / "tree")
