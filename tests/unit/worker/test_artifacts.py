"""Collecting what a job left behind: real files, and every trap a job can lay."""

import errno
import gc
import hashlib
import os
import signal
import socket
import stat
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aitbc_miner.cgroup.group import Group
from aitbc_miner.errors import ErrorCode, JobError
from aitbc_miner.jobs import Artifact, ArtifactSpec, LeftOut
from aitbc_miner.util import fs
from aitbc_miner.worker import artifacts
from aitbc_miner.worker.artifacts import (
    LOG,
    MAX_DEPTH,
    MAX_LEFT_OUT,
    Caps,
    Collector,
    check_path,
    log_artifact,
)

CAPS = Caps(files=100, bytes=1_000_000)
ROOT = os.geteuid() == 0


@pytest.fixture
def job(tmp_path: Path) -> Path:
    for name in ("work", "output", "artifacts"):
        (tmp_path / "job" / name).mkdir(parents=True)
    return tmp_path / "job"


def names(path: Path | str) -> list[str]:
    return sorted(entry.name for entry in Path(path).iterdir())


LEFT_OUT: list[LeftOut] = []
"""By the last `collect`."""


def collect(
    job: Path,
    *specs: str | ArtifactSpec,
    caps: Caps = CAPS,
    owner: tuple[int, int] | None = None,
    group: Group | None = None,
) -> dict[str, Artifact]:
    wanted = [ArtifactSpec(path=spec) if isinstance(spec, str) else spec for spec in specs]
    with fs.directory(job) as fd:
        gc.collect()  # what an earlier test has left would else be closed meanwhile
        before = len(names("/proc/self/fd"))
        collector = Collector(fd, caps, owner, group)
        try:
            taken = collector.collect(wanted)
        finally:
            assert len(names("/proc/self/fd")) == before, "descriptors were left open"
    assert len({artifact.path for artifact in taken}) == len(taken), "two artifacts of one name"
    LEFT_OUT[:] = collector.left_out
    return {artifact.path: artifact for artifact in taken}


def refused(job: Path, *specs: str | ArtifactSpec, caps: Caps = CAPS) -> JobError:
    with pytest.raises(JobError) as caught:
        collect(job, *specs, caps=caps)
    assert caught.value.message.startswith("cannot ")
    return caught.value


# --- what is taken -----------------------------------------------------------------------------------------


def test_declared_files_and_everything_in_output_are_taken(job: Path) -> None:
    (job / "work/sub").mkdir()
    (job / "work/sub/clip.mp4").write_bytes(b"video")
    (job / "work/scratch").write_bytes(b"stays")
    (job / "output/deep/er").mkdir(parents=True)
    (job / "output/deep/er/log.txt").write_bytes(b"")
    (job / "output/z.bin").write_bytes(b"z" * 3_000_000)
    taken = collect(
        job, ArtifactSpec(path="sub/clip.mp4", type="video/mp4"), caps=Caps(files=3, bytes=3_000_005)
    )
    assert list(taken) == ["sub/clip.mp4", "deep/er/log.txt", "z.bin"]
    clip, log, big = taken.values()
    assert (clip.type, log.type) == ("video/mp4", "application/octet-stream")
    assert (clip.bytes, log.bytes, big.bytes) == (5, 0, 3_000_000)
    for artifact in taken.values():
        kept = job / artifact.file
        assert kept.parent == job / "artifacts"
        assert kept.stat().st_size == artifact.bytes
        assert stat.S_IMODE(kept.stat().st_mode) == 0o640
        assert hashlib.sha256(kept.read_bytes()).hexdigest() == artifact.sha256


def test_nothing_declared_and_nothing_left_is_nothing(job: Path) -> None:
    assert collect(job) == {}


def test_a_declared_file_is_looked_for_in_work_then_in_output(job: Path) -> None:
    (job / "work/both").write_bytes(b"work")
    (job / "output/both").write_bytes(b"output")
    (job / "output/only").write_bytes(b"only")
    (job / "output/named").write_bytes(b"named")
    taken = collect(job, "both", "only", "output/named")
    # Each once: what is declared and found again in output/ is the same file; what only has its name is not.
    assert {path: (job / a.file).read_bytes() for path, a in taken.items()} == {
        "both": b"work",
        "only": b"only",
        "output/named": b"named",
        "output/both": b"output",
    }


def test_a_file_declared_twice_is_taken_once(job: Path) -> None:
    (job / "output/a").write_bytes(b"a")
    assert len(collect(job, "a", "a", "output/a")) == 1


def test_names_stay_apart_however_they_were_declared(job: Path) -> None:
    for path in ("work/a", "work/output/a", "output/a", "output/output/a"):
        (job / path).parent.mkdir(exist_ok=True)
        (job / path).write_text(path)
    assert len(collect(job, "a", "output/a")) == 4


def test_names_may_be_of_any_language_and_have_spaces(job: Path) -> None:
    for name in ("größe 1.txt", "日本.bin", "-rf", "a'b\"c;$(d)", " "):
        (job / "output" / name).write_bytes(b"x")
    assert len(collect(job, "-rf")) == 5


def test_a_file_that_nobody_may_read_is_no_crash(job: Path) -> None:
    (job / "output/closed").write_bytes(b"x")
    (job / "output/closed").chmod(0)
    if ROOT:
        assert list(collect(job)) == ["closed"]
    else:
        assert collect(job) == {}
        assert [left.path for left in LEFT_OUT] == ["closed"]


def test_the_uploading_user_gets_what_is_taken_and_the_file_is_the_same(job: Path) -> None:
    (job / "output/a").write_bytes(b"a")
    owner = (60600, 60601) if ROOT else (os.getuid(), os.getgid())
    taken = collect(job, owner=owner)["a"]
    info = (job / taken.file).stat()
    assert (info.st_uid, info.st_gid, stat.S_IMODE(info.st_mode)) == (*owner, 0o640)
    assert info.st_ino == (job / "output/a").stat().st_ino


def test_the_log_goes_along_but_not_through_a_link(job: Path) -> None:
    (job / "logs").mkdir()
    (job / "logs/exec.log").write_bytes(b"said")
    with fs.directory(job) as fd:
        (artifact,) = log_artifact(fd, "logs/exec.log")
        assert (artifact.path, artifact.file, artifact.bytes) == ("logs/exec.log", "logs/exec.log", 4)
        assert artifact.sha256 == hashlib.sha256(b"said").hexdigest()
        (job / "logs/exec.log").unlink()
        # A job that runs as our own user may have removed it; that is no failure of the job.
        assert log_artifact(fd, "logs/exec.log") == []
        (job / "logs/exec.log").symlink_to("/etc/passwd")
        assert log_artifact(fd, "logs/exec.log") == []


# --- what is not -------------------------------------------------------------------------------------------


def device(path: Path) -> None:
    if ROOT:
        os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 3))
    else:
        unix_socket(path)


def unix_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        # The path of a socket is at most 107 bytes long, and pytest's directories are deep.
        here = os.open(path.parent, os.O_RDONLY)
        sock.bind(f"/proc/self/fd/{here}/{path.name}")
        os.close(here)


def hard_link(path: Path) -> None:
    foreign = path.parent.parent.parent / "foreign"
    foreign.write_bytes(b"secret")
    path.hardlink_to(foreign)


TRAPS: dict[str, tuple[Callable[[Path], object], str]] = {
    "link to a file": (lambda path: path.symlink_to("/etc/passwd"), "a symbolic link"),
    "link to nowhere": (lambda path: path.symlink_to("nowhere"), "a symbolic link"),
    "link to itself": (lambda path: path.symlink_to(path), "a symbolic link"),
    "link to a directory": (lambda path: path.symlink_to("/etc"), "a symbolic link"),
    "hard link": (hard_link, "2 hard links"),
    "fifo": (os.mkfifo, "a FIFO"),
    "socket": (unix_socket, "a device or socket"),
    "device": (device, "a device or socket"),
}


@pytest.mark.parametrize(("lay", "said"), TRAPS.values(), ids=TRAPS)
@pytest.mark.parametrize("place", ["output/trap", "output/sub/trap"])
def test_a_trap_in_output_is_left_out_and_told_of(
    job: Path, place: str, lay: Callable[[Path], object], said: str
) -> None:
    (job / "output/sub").mkdir()
    (job / "output/good").write_text("x")
    lay(job / place)
    assert list(collect(job)) == ["good"]
    [left] = LEFT_OUT
    assert (left.path, said in left.why) == (place.removeprefix("output/"), True)
    assert names(job / "artifacts") == ["0000"]
    # Declared, it is strictly what it must be.
    assert said in refused(job, place.removeprefix("output/")).message


def test_what_is_left_out_is_told_of_whatever_its_name_is(job: Path) -> None:
    os.mkfifo(job / "output/a: b")
    collect(job)
    [left] = LEFT_OUT
    assert (left.path, left.why) == ("a: b", "a FIFO, not a regular file")


def test_no_more_than_so_many_are_listed_as_left_out(job: Path) -> None:
    for n in range(MAX_LEFT_OUT + 50):
        (job / "output" / f"{n:03}").symlink_to("nowhere")
    assert collect(job) == {}
    assert len(LEFT_OUT) == MAX_LEFT_OUT + 1
    assert "others" in LEFT_OUT[-1].why


def test_a_log_of_the_jobs_own_is_told_apart_from_the_real_one(job: Path) -> None:
    (job / "logs").mkdir()
    (job / "logs/exec.log").write_text("said")
    for place in ("work/logs", "output/logs"):
        (job / place).mkdir()
        (job / place / "exec.log").write_text(place)
    with fs.directory(job) as fd:
        real = log_artifact(fd, LOG)
    taken = {**collect(job, "logs/exec.log"), **{one.path: one for one in real}}
    assert {path: (job / one.file).read_text() for path, one in taken.items()} == {
        "logs/exec.log": "said",
        "output/logs/exec.log": "work/logs",
        "output/output/logs/exec.log": "output/logs",
    }


def test_a_collection_that_was_broken_off_is_made_anew(job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b"):
        (job / "output" / name).write_text(name)
    real, calls = os.link, iter(range(9))

    def link(*arguments: Any, **more: Any) -> None:
        if next(calls) == 1:
            raise OSError(errno.EIO, "Input/output error")
        real(*arguments, **more)

    monkeypatch.setattr(os, "link", link)
    with pytest.raises(OSError, match="Input/output"):
        collect(job)
    assert list(collect(job)) == ["a", "b"]


@pytest.mark.parametrize(("lay", "said"), TRAPS.values(), ids=TRAPS)
def test_a_trap_in_the_place_of_a_declared_file_is_refused(
    job: Path, lay: Callable[[Path], object], said: str
) -> None:
    lay(job / "work/trap")
    error = refused(job, "trap")
    assert error.code is ErrorCode.E_ARTIFACT
    assert said in error.message


def test_a_directory_in_the_place_of_a_declared_file_is_refused(job: Path) -> None:
    (job / "work/out.mp4").mkdir()
    assert "a directory, not a regular file" in refused(job, "out.mp4").message


@pytest.mark.parametrize("way", ["/etc", "..", "."])
def test_no_link_on_the_way_is_followed(job: Path, way: str) -> None:
    (job / "work/way").symlink_to(way)
    (job / "work/passwd").write_text("")
    error = refused(job, "way/passwd")
    assert error.code is ErrorCode.E_ARTIFACT
    assert "link" in error.message


def test_a_file_on_the_way_is_refused(job: Path) -> None:
    (job / "work/way").write_text("")
    assert refused(job, "way/passwd").code is ErrorCode.E_ARTIFACT


@pytest.mark.parametrize("place", ["work", "output"])
@pytest.mark.parametrize("instead", ["link", "file", "nothing"])
def test_a_job_that_replaced_its_own_directories_is_refused(job: Path, place: str, instead: str) -> None:
    (job / place).rmdir()
    if instead == "link":
        (job / place).symlink_to("/etc")
    elif instead == "file":
        (job / place).write_text("")
    assert refused(job, "passwd").code is ErrorCode.E_ARTIFACT


@pytest.mark.parametrize(
    "path",
    [
        *(
            "",
            "/etc/passwd",
            "../escape",
            "a/../../escape",
            "a//b",
            "./a",
            "a/",
            ".",
            "..",
            "a\0b",
            "x" * 256,
            "é" * 128,
            "/".join(["x" * 200] * 6),
        ),
        *("a\nb", "a\r\nContent-Type: x", "\ud800", "\udcff", "a\x1b[2J", "..\\..\\x", "a\u202etxt"),
    ],
)
def test_a_declared_path_that_leads_out_or_cannot_be_sent_is_refused(job: Path, path: str) -> None:
    (job.parent / "escape").write_text("outside")
    if "\0" not in path and "\ud800" not in path and path.startswith(("a\n", "a\r", "\udcff", "a\x1b")):
        (job / "work" / path).parent.mkdir(parents=True, exist_ok=True)
        (job / "work" / path).write_text("x")
    assert refused(job, path).code is ErrorCode.E_ARTIFACT


@pytest.mark.parametrize("path", ["missing", "sub/missing", "output/missing", "x" * 200])
def test_a_declared_file_that_is_missing_is_named(job: Path, path: str) -> None:
    error = refused(job, path)
    assert error.code is ErrorCode.E_ARTIFACT
    assert path in error.message


@pytest.mark.parametrize("name", [b"a\nb", b"\xff\xfe", b"a\x1b[2J", b"a\rb", "a\u202eb".encode(), b"a\\b"])
@pytest.mark.parametrize("kind", ["file", "directory"])
def test_a_name_that_cannot_be_sent_is_refused_in_words_that_can(job: Path, name: bytes, kind: str) -> None:
    path = job / "output" / os.fsdecode(name)
    if kind == "directory":
        path.mkdir()
    else:
        path.write_bytes(b"x")
    assert collect(job) == {}
    [left] = LEFT_OUT
    assert (left.path + left.why).isprintable()
    left.path.encode()


def test_a_long_path_is_left_out(job: Path) -> None:
    (job / "output" / "/".join(["d" * 200] * 6)).mkdir(parents=True)
    assert collect(job) == {}
    assert len(LEFT_OUT) == 1


def test_a_deep_tree_is_taken_up_to_the_limit_and_left_out_beyond_it(job: Path) -> None:
    deepest = job / "output" / "/".join(["d"] * MAX_DEPTH)
    deepest.mkdir(parents=True)
    (deepest / "leaf").write_text("x")
    assert list(collect(job)) == ["d/" * MAX_DEPTH + "leaf"]
    (deepest / "d").mkdir()
    (deepest / "d/leaf").write_text("x")
    assert list(collect(job)) == ["d/" * MAX_DEPTH + "leaf"]
    assert [str(MAX_DEPTH) in left.why for left in LEFT_OUT] == [True]


def test_a_tree_deeper_than_any_recursion_is_left_out_soon(job: Path) -> None:
    here = [os.open(job / "output", os.O_RDONLY)]
    try:
        for _ in range(sys.getrecursionlimit() + 100):
            os.mkdir("d", dir_fd=here[0])
            here.append(os.open("d", os.O_RDONLY, dir_fd=here[0]))
            os.close(here.pop(0))
        assert collect(job) == {}
        assert len(LEFT_OUT) == 1
    finally:
        os.close(here[0])
        # shutil.rmtree, and so pytest, cannot remove what is so deep.
        subprocess.run(["rm", "-rf", job / "output"], check=True)


# --- caps --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [2_000_000, 2_000_001])
def test_a_file_over_its_own_size_is_refused(job: Path, size: int) -> None:
    (job / "work/a").write_bytes(b"x" * size)
    spec = ArtifactSpec(path="a", max_mb=2)
    caps = Caps(files=1, bytes=size)
    if size <= 2_000_000:
        assert collect(job, spec, caps=caps)["a"].bytes == size
        return
    error = refused(job, spec, caps=caps)
    assert (error.code, "over its max_mb of 2 MB" in error.message) == (ErrorCode.E_ARTIFACT, True)


def test_more_files_than_allowed_are_refused(job: Path) -> None:
    for number in range(4):
        (job / f"output/{number}").write_text("x")
    caps = Caps(files=3, bytes=100)
    error = refused(job, caps=caps)
    assert error.code is ErrorCode.E_OUTPUT
    assert error.message.endswith(": more than 3 files (workspace.max_artifacts)")
    (job / "output/3").unlink()
    for artifact in (job / "artifacts").iterdir():
        artifact.unlink()
    assert len(collect(job, caps=caps)) == 3


@pytest.mark.parametrize("caps", [Caps(9, 9), Caps(9, 100, 9), Caps(9, 9, 100), Caps(9, 100, 0)])
def test_more_bytes_in_all_than_allowed_are_refused(job: Path, caps: Caps) -> None:
    (job / "output/a").write_bytes(b"x" * 5)
    (job / "output/b").write_bytes(b"x" * 5)
    error = refused(job, caps=caps)
    assert error.code is ErrorCode.E_OUTPUT
    key = "workspace.max_artifacts_mb" if caps.bytes == 9 else "max_output_mb"
    shown = "0" if caps.job_bytes == 0 else "8.58306884766e-06"
    assert error.message.endswith(f": all files have more than {shown} MiB ({key})")


def test_a_directory_of_very_many_names_is_left_early(job: Path) -> None:
    many = job / "output/many"
    many.mkdir()
    for number in range(20_000):
        os.close(os.open(many / f"{number:0200}", os.O_CREAT))
    tracemalloc.start()
    error = refused(job, caps=Caps(files=20, bytes=100))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (error.code, "too many files" in error.message) == (ErrorCode.E_OUTPUT, True)
    assert peak < 1 << 20


def test_a_sparse_file_is_hashed_and_sent_as_what_it_seems(job: Path) -> None:
    with (job / "output/holes").open("wb") as file:
        file.truncate(CAPS.bytes)
    taken = collect(job)["holes"]
    assert (taken.bytes, taken.sha256) == (CAPS.bytes, hashlib.sha256(bytes(CAPS.bytes)).hexdigest())


def test_names_that_some_take_for_one_stay_apart(job: Path) -> None:
    # Of another case; of other characters that look, or are in some normal form, like dots and slashes.
    names = ["A", "a", "e\u0301", "é", "\uff0e\uff0e", "\uff0e\uff0e\u2215etc", "\u2025", "...", "c%22", 'c"']
    for name in names:
        (job / "output" / name).write_text(name)
    assert {path: (job / each.file).read_text() for path, each in collect(job).items()} == {
        name: name for name in names
    }


def test_a_sparse_file_counts_by_its_length_and_is_not_read(job: Path) -> None:
    with (job / "output/huge").open("wb") as file:
        file.truncate(1 << 40)
    assert refused(job).code is ErrorCode.E_OUTPUT


# --- any declared path -------------------------------------------------------------------------------------

PARTS = st.sampled_from(["..", ".", "", "a", "b", "\0", "é", " ", "\n", "*"])


@given(st.lists(PARTS, max_size=5).map("/".join) | st.text(max_size=40))
def test_a_path_that_passes_is_relative_and_goes_only_down(path: str) -> None:
    try:
        check_path(path)
    except JobError:
        return
    assert not path.startswith("/")
    assert path == os.path.normpath(path)
    assert ".." not in path.split("/")
    assert path.isprintable()


@given(st.lists(st.sampled_from(["a", "b.txt", "é", " ", "*", "-x"]), min_size=1, max_size=5).map("/".join))
def test_an_ordinary_path_passes(path: str) -> None:
    check_path(path)


@pytest.mark.parametrize("sizes", [(1, 1000), (400, 400, 400)], ids=["a large one", "many small ones"])
def test_what_is_much_to_hash_is_hashed_in_the_jobs_group(
    job: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, sizes: tuple[int, ...]
) -> None:
    monkeypatch.setattr(artifacts, "CHARGED_FROM", 1000)
    files = {f"f{number}": bytes([number]) * size for number, size in enumerate(sizes)}
    for name, content in files.items():
        (job / "output" / name).write_bytes(content)
    group = tmp_path / "group"
    group.mkdir()
    (group / "cgroup.procs").touch()
    taken = collect(job, group=Group(group))
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    assert {path: one.sha256 for path, one in taken.items()} == digests
    entered = int((group / "cgroup.procs").read_text())
    assert entered != os.getpid()
    assert not Path(f"/proc/{entered}").exists()


@pytest.mark.parametrize("hindered", ["no group", "killed", "killed midway"])
def test_what_the_jobs_group_is_kept_from_is_done_all_the_same(
    job: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, hindered: str
) -> None:
    monkeypatch.setattr(artifacts, "CHARGED_FROM", 1000)
    for name in ("a", "b"):
        (job / "output" / name).write_bytes(name.encode() * 1000)
    ours, hashed = os.getpid(), artifacts.sha256

    def kill(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def hash_one(fd: int) -> str:
        if os.getpid() != ours and os.pread(fd, 1, 0) == b"b":
            kill()
        return hashed(fd)

    if hindered != "no group":
        monkeypatch.setattr(Group, "write", kill if hindered == "killed" else lambda *_: None)
        monkeypatch.setattr(artifacts, "sha256", hash_one)
    taken = collect(job, group=Group(tmp_path / "none"))
    for name in ("a", "b"):
        assert taken[name].sha256 == hashlib.sha256(name.encode() * 1000).hexdigest()
