"""Every cause of a job's end, and which one is believed when there is evidence for several."""

import os
import signal
from collections.abc import Iterator
from math import inf
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from aitbc_miner.errors import ErrorCode
from aitbc_miner.jobs import ExitStatus, Usage
from aitbc_miner.sandbox.bubblewrap import OF_JOB
from aitbc_miner.sandbox.users import UNALLOCATED
from aitbc_miner.util import fs
from aitbc_miner.worker import cleanup, workspace
from aitbc_miner.worker.causes import Evidence, cause_of

MIB = 1 << 20
GOOD = ExitStatus(status=0)
FAILED = ExitStatus(status=1)
KILLED = ExitStatus(signal=signal.SIGKILL)
OOM: dict[str, Any] = {
    "memory_events": {"low": 0, "high": 0, "max": 91, "oom": 3, "oom_kill": 2, "oom_group_kill": 1},
    "usage": Usage(peak_memory_bytes=64 * MIB),
    "memory_max": 64 * MIB,
}
MACHINE_OOM = OOM | {"memory_events": {"max": 5, "oom": 0, "oom_kill": 1}, "memory_max": 128 * MIB}
REFUSED: dict[str, Any] = {"pids_events": {"max": 1234}, "pids_max": 64}
LARGE: dict[str, Any] = {"file_max": 4 * MIB, "file_at_limit": "work/big\n"}
NO_ROOM: dict[str, Any] = {"disk_free": fs.NO_ROOM._replace(size=fs.NO_ROOM.size - 1)}
CPU: dict[str, Any] = {"cpu_max_s": 3, "usage": Usage(user_s=2.0, system_s=1.25)}
CALM: dict[str, Any] = {
    "memory_events": {"low": 0, "high": 9, "max": 7, "oom": 1, "oom_kill": 0},
    "usage": Usage(wall_s=4.0, user_s=2.0, system_s=0.5, peak_memory_bytes=MIB),
    "memory_max": 64 * MIB,
    "pids_events": {"max": 0},
    "pids_max": 64,
    "file_max": 4 * MIB,
    "disk_free": fs.NO_ROOM,
    "cpu_max_s": 3,
    "time_max_s": 10,
}


@pytest.mark.parametrize(
    ("exit_status", "facts", "code", "message"),
    [
        pytest.param(
            KILLED, OOM, "E_OOM",
            "the job was out of memory: peak 67108864 bytes (64.0 MiB), limit 67108864 bytes (64.0 MiB)",
            id="at its memory limit",
        ),
        pytest.param(
            KILLED, OOM | {"usage": Usage(), "memory_max": None}, "E_OOM",
            "the job was out of memory: peak unknown, limit unknown", id="before Linux 5.19",
        ),
        pytest.param(
            KILLED, MACHINE_OOM, "E_OOM",
            "the kernel killed the job, because the whole machine was out of memory: "
            "peak 67108864 bytes (64.0 MiB), limit 134217728 bytes (128.0 MiB)", id="the machine is full",
        ),
        pytest.param(FAILED, OOM, "E_OOM", "the job was out of memory: ", id="a child was killed"),
        pytest.param(
            FAILED, REFUSED, "E_PIDS",
            "the job failed, and the kernel refused the job a new process 1234 times; "
            "the limit is 64 processes and threads",
            id="processes refused",
        ),
        pytest.param(KILLED, REFUSED | {"pids_max": None}, "E_PIDS", "a new process 1234 times", id="signal"),
        pytest.param(
            ExitStatus(signal=signal.SIGXFSZ), {}, "E_OUTPUT",
            "a file of the job reached the size limit, set by rlimits.fsize of the slot or max_output_mb of "
            "the allowlist entry", id="SIGXFSZ",
        ),
        pytest.param(
            FAILED, LARGE, "E_OUTPUT",
            "the file work/big? of the job reached the size limit of 4194304 bytes (4.0 MiB), "
            "set by rlimits.fsize of the slot or max_output_mb of the allowlist entry",
            id="EFBIG",
        ),
        pytest.param(
            FAILED, NO_ROOM, "E_DISK",
            "the job failed, and the disk of the workspace is full: 65535 bytes free", id="disk full",
        ),
        pytest.param(
            ExitStatus(signal=signal.SIGBUS), NO_ROOM, "E_DISK", "the disk of the workspace is full",
            id="a mapped file on a full disk",
        ),
        pytest.param(
            FAILED, {"disk_free": fs.Room(MIB, 7)}, "E_DISK",
            "the job failed, and the disk of the workspace can hold no more files", id="no inodes",
        ),
        pytest.param(
            KILLED, CPU, "E_TIMEOUT", "the job used 3.2 s of CPU time; rlimits.cpu is 3 s", id="rlimits.cpu",
        ),
        pytest.param(
            ExitStatus(killed_for="timeout"), CALM, "E_TIMEOUT",
            "the job was ended after 4.0 s: its time limit of 10 s was reached", id="time",
        ),
        pytest.param(
            ExitStatus(killed_for="timeout"), {}, "E_TIMEOUT",
            "the job was ended after 0.0 s: its time limit was reached", id="time, by the supervisor",
        ),
        pytest.param(
            ExitStatus(signal=15, killed_for="cancel"), {"cancel_detail": "not wanted"}, "E_CANCELLED",
            "the job was cancelled: not wanted", id="cancelled",
        ),
        pytest.param(
            ExitStatus(status=0, killed_for="cancel"), CALM, "E_CANCELLED", "the job was cancelled",
            id="cancelled, in good order",
        ),
        pytest.param(
            ExitStatus(signal=9, killed_for="disk"), CALM, "E_DISK",
            "the job was ended: the disk of the workspace is full", id="no room for the log",
        ),
        pytest.param(
            ExitStatus(signal=15, killed_for="shutdown"), CALM, "E_LOST",
            "the job was ended: the miner was told to stop at once", id="our own stop",
        ),
        pytest.param(
            ExitStatus(status=1, killed_for="sandbox"), {"last_line": "bwrap: no /srv/models"}, "E_SANDBOX",
            "the job was not started: making its sandbox failed: bwrap: no /srv/models", id="no sandbox",
        ),
    ],
)  # fmt: skip
def test_each_cause_by_its_evidence(
    exit_status: ExitStatus, facts: dict[str, Any], code: str, message: str
) -> None:
    verdict = cause_of(Evidence(exit_status, **facts))
    assert verdict is not None
    assert verdict.code == code
    assert verdict.message == message or (message in verdict.message and len(message) < 50)


@pytest.mark.parametrize("exit_status", [FAILED, KILLED, ExitStatus(status=137), ExitStatus(signal=15), GOOD])
@pytest.mark.parametrize("facts", [{}, CALM], ids=["nothing counted", "nothing happened"])
def test_without_evidence_the_runner_says_what_came_of_it(
    exit_status: ExitStatus, facts: dict[str, Any]
) -> None:
    assert cause_of(Evidence(exit_status, **facts)) is None


@pytest.mark.parametrize("facts", [REFUSED, LARGE, NO_ROOM, CPU, {"disk_free": fs.Room(MIB, 0)}])
def test_what_did_not_keep_a_job_from_its_good_end_is_no_cause(facts: dict[str, Any]) -> None:
    assert cause_of(Evidence(GOOD, **facts)) is None


@pytest.mark.parametrize("exit_status", [KILLED, ExitStatus(signal=signal.SIGSEGV)])
def test_a_full_disk_kills_nobody(exit_status: ExitStatus) -> None:
    assert cause_of(Evidence(exit_status, **NO_ROOM)) is None


# Each of them hides what stands below it.
RANKS: list[tuple[ErrorCode, dict[str, Any]]] = [
    (ErrorCode.E_OOM, OOM | {"usage": Usage(peak_memory_bytes=1, user_s=9.0)}),
    (ErrorCode.E_OUTPUT, LARGE),
    (ErrorCode.E_TIMEOUT, CPU),
    (ErrorCode.E_PIDS, REFUSED),
    (ErrorCode.E_DISK, NO_ROOM),
]


@pytest.mark.parametrize("rank", range(len(RANKS)))
@pytest.mark.parametrize("exit_status", [FAILED, KILLED])
def test_which_cause_is_believed(rank: int, exit_status: ExitStatus) -> None:
    facts: dict[str, Any] = {}
    for _, each in reversed(RANKS[rank:]):
        facts |= each
    verdict = cause_of(Evidence(exit_status, **facts))
    # CPU time ends a program by a signal, and a full disk does not.
    expected = next(
        (
            code
            for code, _ in RANKS[rank:]
            if code is not (ErrorCode.E_DISK if exit_status is KILLED else ErrorCode.E_TIMEOUT)
        ),
        None,
    )
    assert (verdict and verdict.code) == expected


@pytest.mark.parametrize(
    ("why", "code"),
    [("timeout", "E_TIMEOUT"), ("cancel", "E_CANCELLED"), ("disk", "E_DISK"), ("shutdown", "E_LOST")],
)
@pytest.mark.parametrize("exit_status", [ExitStatus(), GOOD, FAILED, KILLED])
def test_our_own_record_comes_first_and_the_kernels_counts_are_added(
    why: str, code: str, exit_status: ExitStatus
) -> None:
    ended = ExitStatus(exit_status.status, exit_status.signal, why)
    verdict = cause_of(Evidence(ended, **(OOM | REFUSED | LARGE | NO_ROOM | {"cpu_max_s": 0})))
    assert verdict is not None
    assert verdict.code == code
    assert verdict.message.endswith(
        "; the kernel killed 2 of its processes for want of memory"
        "; the kernel refused the job a new process 1234 times; the limit is 64 processes and threads"
    )


# --- where the evidence on disk comes from -----------------------------------------------------------------


@pytest.fixture
def job_fd(tmp_path: Path) -> Iterator[int]:
    for name in OF_JOB:
        (tmp_path / name).mkdir()
    with fs.directory(tmp_path) as fd:
        yield fd


def write(path: Path, size: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    os.truncate(path, size)


@pytest.mark.parametrize("place", ["work/x", "output/a/b/c", "tmp/\udcff\n"])
def test_a_file_that_has_reached_its_size_is_found(job_fd: int, tmp_path: Path, place: str) -> None:
    write(tmp_path / "work" / "small", 99)
    write(tmp_path / "output" / "small", 99)
    assert workspace.file_of_size(job_fd, 100) is None
    write(tmp_path / place, 100)
    assert workspace.file_of_size(job_fd, 100) == place


def test_no_link_is_followed_in_search_of_a_file(job_fd: int, tmp_path: Path) -> None:
    write(tmp_path / "elsewhere" / "x", 100)
    (tmp_path / "work" / "file").symlink_to(tmp_path / "elsewhere" / "x")
    (tmp_path / "work" / "folder").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "output").rmdir()
    (tmp_path / "output").symlink_to(tmp_path / "elsewhere")
    os.mkfifo(tmp_path / "work" / "fifo")
    assert workspace.file_of_size(job_fd, 100) is None


def test_the_search_for_a_file_is_bounded(
    job_fd: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workspace, "MAX_LOOKED_AT", 50)
    for number in range(50):
        write(tmp_path / "work" / str(number), 1)
    write(tmp_path / "tmp" / "x", 100)
    assert workspace.file_of_size(job_fd, 100) is None
    monkeypatch.setattr(workspace, "MAX_LOOKED_AT", 51)
    assert workspace.file_of_size(job_fd, 100) == "tmp/x"
    monkeypatch.setattr(workspace, "MAX_LOOKED_AT", 10_000)
    write(tmp_path / "tmp" / "/".join("d" * (workspace.MAX_DEPTH + 1)) / "y", 200)
    assert workspace.file_of_size(job_fd, 200) is None


def test_the_room_on_the_jobs_disk(job_fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    assert workspace.room_left(job_fd, fs.Room()).size > 0
    disk = SimpleNamespace(f_bavail=3, f_frsize=4096, f_files=10, f_favail=0)
    monkeypatch.setattr(os, "statvfs", lambda _: disk)
    assert workspace.room_left(job_fd, fs.Room(4096, 1)) == (2 * 4096, 0)
    disk.f_files = 0
    assert workspace.room_left(job_fd, fs.Room()) == (3 * 4096, inf)


# --- what is left of a job ---------------------------------------------------------------------------------


def test_processes_are_named_with_what_they_do() -> None:
    own = os.getpid()
    assert cleanup.named([]) == ""
    assert cleanup.named([own]) == f"the process {own} (running)"
    gone = [4_194_304 + number for number in range(12)]
    shown = ", ".join(map(str, gone[:10]))
    assert cleanup.named(gone[::-1]) == f"the processes {shown} and 2 more"


def test_an_id_of_nobody_is_not_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getpriority", lambda *_: 0)
    monkeypatch.setattr(cleanup, "_owner", lambda _: UNALLOCATED)
    assert cleanup.processes_of(UNALLOCATED) == []
