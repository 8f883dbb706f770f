"""Counting what a running job has on disk, whatever it does meanwhile."""

import gc
import os
import subprocess
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from aitbc_miner.sandbox.bubblewrap import OF_JOB
from aitbc_miner.util import clock, fs
from aitbc_miner.worker import disk_use
from aitbc_miner.worker.disk_use import MAX_DEPTH, DiskUse

MIB = 1 << 20
TOO_MUCH = "it had more than 4 MiB on disk (workspace.max_job_mb)"
TOO_MANY = "it had more than 20 files and directories (workspace.max_job_files)"
TOO_DEEP = f"it had directories more than {MAX_DEPTH} deep"
Start = Callable[..., DiskUse]


@pytest.fixture
def job(tmp_path: Path) -> Path:
    for name in OF_JOB:
        (tmp_path / name).mkdir()
    return tmp_path


@pytest.fixture
def start(job: Path) -> Iterator[Start]:
    """Start watching the job, with so many MiB and files permitted."""
    gc.collect()  # what an earlier test has left would else be closed meanwhile
    before = len(list(Path("/proc/self/fd").iterdir()))
    with fs.directory(job) as fd:
        made: list[DiskUse] = []

        def begin(mib: int | None = 4, files: int | None = 20) -> DiskUse:
            made.append(DiskUse(fd, OF_JOB, None if mib is None else mib * MIB, files))
            return made[-1]

        yield begin
        for each in made:
            each.close()
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def counted(use: DiskUse) -> str:
    """Look until a count is over that has not found anything, or two that have."""
    while True:
        if said := use.look():
            return said
        if use.due > clock.now() + disk_use.PAUSE_S:
            return ""


def write(path: Path, size: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(os.urandom(size))


def test_the_first_look_is_not_at_once_and_the_next_is_not_at_once_either(start: Start) -> None:
    now = clock.now()
    use = start()
    assert use.due >= now + disk_use.REST_S
    assert counted(use) == ""
    assert use.due >= now + disk_use.REST_S


@pytest.mark.parametrize("place", ["work/x", "output/a/b/c", "tmp/\udcff\n"])
def test_bytes_are_counted_wherever_they_are(job: Path, start: Start, place: str) -> None:
    use = start()
    write(job / place, 3 * MIB)
    assert counted(use) == ""
    write(job / "work/other", 2 * MIB)
    assert counted(use) == TOO_MUCH


def test_files_and_directories_and_links_are_counted(job: Path, start: Start) -> None:
    use = start()
    for number in range(10):
        (job / "tmp" / str(number)).mkdir()
        (job / "tmp" / str(number) / "link").symlink_to("/")
    assert counted(use) == ""
    os.mkfifo(job / "work/fifo")
    assert counted(use) == TOO_MANY


def test_what_has_no_limit_has_none(job: Path, start: Start) -> None:
    write(job / "work/x", 5 * MIB)
    for number in range(30):
        (job / "tmp" / str(number)).mkdir()
    assert counted(start(mib=None, files=None)) == ""


def test_it_is_blocks_that_count_and_not_lengths(job: Path, start: Start) -> None:
    with (job / "work/sparse").open("wb") as file:
        file.truncate(1 << 40)
    use = start()
    assert counted(use) == ""
    # What it has beyond its end counts, too.
    with (job / "work/ahead").open("wb") as file:
        subprocess.run(
            ["/usr/bin/fallocate", "--keep-size", "--length", str(5 * MIB), f"/proc/self/fd/{file.fileno()}"],
            check=True,
            pass_fds=[file.fileno()],
        )
    assert (job / "work/ahead").stat().st_size == 0
    assert counted(use) == TOO_MUCH


def test_a_file_of_many_names_counts_once(job: Path, start: Start) -> None:
    write(job / "work/x", 3 * MIB)
    for number in range(10):
        (job / "work" / str(number)).hardlink_to(job / "work/x")
    use = start()
    assert counted(use) == ""
    write(job / "work/y", 2 * MIB)
    assert counted(use) == TOO_MUCH


def test_no_link_is_followed(job: Path, start: Start) -> None:
    write(job / "elsewhere/x", 5 * MIB)
    (job / "work/file").symlink_to(job / "elsewhere/x")
    (job / "work/folder").symlink_to(job / "elsewhere")
    (job / "output").rmdir()
    (job / "output").symlink_to(job / "elsewhere")
    (job / "tmp").rmdir()
    assert counted(start()) == ""


def test_a_single_count_is_not_believed(job: Path, start: Start) -> None:
    use = start()
    write(job / "work/x", 5 * MIB)
    assert use.look() == ""
    # The second one begins at once.
    assert use.due <= clock.now()
    (job / "work/x").unlink()
    assert counted(use) == ""
    write(job / "work/x", 5 * MIB)
    assert use.look() == ""
    assert use.look() == TOO_MUCH


def dig(at: Path, depth: int) -> None:
    here = os.open(at, os.O_RDONLY)
    for _ in range(depth):
        os.mkdir("d", dir_fd=here)
        below = os.open("d", os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = below
    os.close(here)


def test_a_tree_that_is_too_deep_is_told(job: Path, start: Start) -> None:
    use = start(files=None)
    dig(job / "work", MAX_DEPTH)
    assert counted(use) == ""
    dig(job / "tmp", MAX_DEPTH + 200)
    assert counted(use) == TOO_DEEP


def test_a_look_takes_a_moment_and_little_memory_however_much_there_is(
    job: Path, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk_use, "REST_TIMES", 10_000)
    for number in range(8000):
        os.close(os.open(job / "tmp" / f"{number:0200}", os.O_CREAT))
    use = start(files=None)
    looks, longest = 0, 0.0
    tracemalloc.start()
    while not looks or use.due <= clock.now() + disk_use.PAUSE_S:
        began = time.thread_time()
        assert use.look() == ""
        longest = max(longest, time.thread_time() - began)
        looks += 1
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert looks > 1
    # Of the processor's time: others may have had it in between.
    assert longest < 5 * disk_use.LOOK_S
    assert peak < MIB
    # The count was long, so the rest is, too.
    assert use.due > clock.now() + 10 * disk_use.REST_S


def test_what_goes_and_comes_while_it_is_counted_is_no_crash(job: Path, start: Start) -> None:
    use = start(mib=None, files=None)
    churn = (
        "while :; do mkdir -p a/b/c; : > a/b/c/x; mv a z; rm -r z; chmod 0 b 2> /dev/null; mkdir -p b; done"
    )
    with subprocess.Popen(["/bin/sh", "-c", churn], cwd=job / "work", stderr=subprocess.DEVNULL) as process:
        try:
            until = clock.now() + 1.0
            while clock.now() < until:
                assert counted(use) == ""
        finally:
            process.kill()


def test_a_count_that_is_given_up_leaves_nothing_open(job: Path, start: Start) -> None:
    for number in range(5000):
        (job / "tmp" / str(number)).mkdir()
    use = start(files=None)
    assert use.look() == ""
    use.close()
