"""The tasks that come with the node, run as jobs run them, and what they are written with."""

import hashlib
import math
import os
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from aitbc_miner.errors import ErrorCode
from aitbc_miner.jobs import Manifest
from aitbc_miner.runners.interface import JobPaths
from aitbc_miner.runners.python import PythonRunner
from aitbc_miner.task import Progress, hear_cancellation, output_dir, progress, work_dir
from tests.support.task_process import Ran, execute

SHIPPED = Path(__file__).parents[2] / "etc" / "tasks"

Run = Callable[..., Ran]


@pytest.fixture
def paths(tmp_path: Path) -> JobPaths:
    paths = JobPaths(tmp_path / "job")
    for path in paths.work, paths.output, paths.tmp:
        path.mkdir(parents=True)
    return paths


@pytest.fixture
def run(tmp_path: Path, paths: JobPaths) -> Run:
    # Installed as an operator would: a checkout may be writable by a group.
    tasks = tmp_path / "tasks"
    tasks.mkdir(mode=0o755)
    for file in SHIPPED.glob("*.py"):
        shutil.copyfile(file, tasks / file.name)
        (tasks / file.name).chmod(0o644)

    def run(task: str, **params: Any) -> Ran:
        manifest = Manifest(job_id="j1", runner="python", task=task, params=params)
        return execute(PythonRunner([tasks]), manifest, paths)

    return run


def percents(ran: Ran) -> list[float]:
    return [report.pct for report in ran.reports if isinstance(report, Progress)]


def test_a_fork_of_a_task_ends_as_a_pool_expects() -> None:
    if (task := os.fork()) == 0:
        hear_cancellation()
        if os.fork() == 0:
            os._exit(0 if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL else 1)
        os._exit(os.waitstatus_to_exitcode(os.wait()[1]))
    assert os.waitstatus_to_exitcode(os.waitpid(task, 0)[1]) == 0


def test_a_fork_of_a_task_that_is_ended_at_once_ends() -> None:
    if (task := os.fork()) == 0:
        # Runs in the child before the action of SIGTERM changes.
        os.register_at_fork(after_in_child=lambda: os.kill(os.getpid(), signal.SIGTERM))
        hear_cancellation()
        if os.fork() == 0:
            os._exit(1)
        os._exit(0 if os.waitstatus_to_exitcode(os.wait()[1]) == -signal.SIGTERM else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(task, 0)[1]) == 0


def test_word_statistics_counts_a_text(run: Run, paths: JobPaths) -> None:
    (paths.work / "text").write_text(
        "The cat's hat.\nthe Cat\u2019s Straße, THE straße\nco-op 7 \N{SNOWMAN} the_end"
    )
    ran = run("word_statistics", path="text", top=2)
    assert ran.verdict.code is None
    assert ran.verdict.result == {
        "lines": 2,
        "words": 11,
        "bytes": (paths.work / "text").stat().st_size,
        "distinct": 7,
        "top": [{"word": "the", "count": 4}, {"word": "strasse", "count": 2}],
    }


def test_word_statistics_takes_an_empty_file_and_binary_rubbish(run: Run, paths: JobPaths) -> None:
    (paths.work / "empty").touch()
    assert run("word_statistics", path="empty").verdict.result["words"] == 0
    (paths.work / "rubbish").write_bytes(bytes(range(256)) * 8192)
    ran = run("word_statistics", path="rubbish")
    assert ran.verdict.result["bytes"] == 256 * 8192
    assert percents(ran) == []


def test_word_statistics_reports_progress_by_lines(run: Run, paths: JobPaths) -> None:
    (paths.work / "long").write_text("a b\n" * 200_000)
    ran = run("word_statistics", path="long")
    assert percents(ran) == [50.0, 100.0]
    assert ran.verdict.result["words"] == 400_000


def test_tasks_stay_in_the_jobs_directory(run: Run, paths: JobPaths) -> None:
    (paths.work / "link").symlink_to("/etc/passwd")
    (paths.work / "root").symlink_to("/etc")
    for path in ["/etc/passwd", "../../../../../etc/passwd", "link"]:
        verdict = run("word_statistics", path=path).verdict
        assert verdict.code is ErrorCode.E_TASK
        assert "OUTSIDE" in verdict.message
    for root in ["/", "..", "root"]:
        assert "OUTSIDE" in run("tree_hash", root=root).verdict.message
    assert "NO_FILE" in run("word_statistics", path="none").verdict.message
    assert "NO_DIRECTORY" in run("tree_hash", root="none").verdict.message


def test_tree_hash_writes_what_sha256sum_can_check(run: Run, paths: JobPaths) -> None:
    for name in ["b", "a/deep/file", "with space", "new\nline", "back\\slash"]:
        (paths.work / name).parent.mkdir(parents=True, exist_ok=True)
        (paths.work / name).write_text(name)
    (paths.work / "link").symlink_to("/etc/passwd")
    (paths.work / "a" / "loop").symlink_to("..")
    os.mkfifo(paths.work / "fifo")
    ran = run("tree_hash")
    listing = paths.output / "tree.sha256"
    assert ran.verdict.result == {
        "files": 5,
        "bytes": sum(map(len, ["b", "a/deep/file", "with space", "new\nline", "back\\slash"])),
        "sha256": hashlib.sha256(listing.read_bytes()).hexdigest(),
    }
    subprocess.run(["sha256sum", "--check", "--strict", "--quiet", listing], cwd=paths.work, check=True)
    before = ran.verdict.result["sha256"]
    (paths.work / "b").write_text("B")
    assert run("tree_hash").verdict.result["sha256"] != before


def test_tree_hash_of_nothing_is_an_empty_list(run: Run, paths: JobPaths) -> None:
    (paths.work / "empty").mkdir()
    result = run("tree_hash", root="empty").verdict.result
    assert result == {"files": 0, "bytes": 0, "sha256": hashlib.sha256(b"").hexdigest()}


def test_monte_carlo_pi_is_near_and_the_same_on_any_number_of_cpus(run: Run) -> None:
    runs = [run("monte_carlo_pi", samples=500_000, seed=7, processes=count) for count in (1, 3)]
    results = [ran.verdict.result for ran in runs]
    assert [result.pop("processes") for result in results] == [1, 3]
    assert results[0] == results[1]
    assert results[0]["samples"] == 500_000
    # Five standard deviations of the mean.
    assert abs(results[0]["pi"] - math.pi) < 5 * 1.642 / math.sqrt(500_000)
    assert percents(runs[1])[-1] == 100
    assert percents(runs[1]) == sorted(percents(runs[1]))


def test_monte_carlo_pi_uses_all_cpus_it_may(run: Run) -> None:
    result = run("monte_carlo_pi", samples=1).verdict.result
    assert result["processes"] == len(os.sched_getaffinity(0))
    assert result["pi"] in {0.0, 4.0}
    for samples in 0, -1, 1e3, "many":
        assert "parameter 'samples'" in run("monte_carlo_pi", samples=samples).verdict.message


def test_by_hand_the_same_functions_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ["AITBC_WORK_DIR", "AITBC_OUTPUT_DIR", "AITBC_REPORT_FD"]:
        monkeypatch.delenv(name, raising=False)
    progress(12.34, "words")
    assert capsys.readouterr().err == " 12.3% words\n"
    assert work_dir() == tmp_path
    assert output_dir() == tmp_path / "output"
    assert output_dir().is_dir()


def test_progress_that_nobody_reads_fails_no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    read, write = os.pipe()
    os.close(read)
    monkeypatch.setenv("AITBC_REPORT_FD", str(write))
    progress(1)
    os.close(write)
