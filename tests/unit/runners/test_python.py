"""The runner `python` with its child as a real process."""

import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from aitbc_miner.errors import ErrorCode, JobError
from aitbc_miner.jobs import ExitStatus, Manifest
from aitbc_miner.runners.interface import JobPaths, Verdict
from aitbc_miner.runners.python import PythonRunner, find_task
from aitbc_miner.task import (
    LINE_MAX,
    PROGRESS_MAX,
    RESULT_MAX,
    Progress,
    Report,
    ReportReader,
    TaskFailure,
    TaskResult,
)
from tests.support.task_process import SLOT, Ran, execute

pytestmark = pytest.mark.usefixtures("usual_umask")

Run = Callable[..., Ran]


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    path = tmp_path / "tasks"
    path.mkdir(mode=0o755)
    return path


@pytest.fixture
def run(tmp_path: Path, tasks: Path) -> Run:
    """Write a task and run it as the worker does: plan, a process with a pipe for reports, verdict."""

    def run(source: str, name: str = "trial", env: dict[str, str] | None = None, **params: Any) -> Ran:
        (tasks / f"{name}.py").write_text(source)
        paths = JobPaths(tmp_path / "job")
        for path in paths.work, paths.output, paths.tmp:
            path.mkdir(parents=True, exist_ok=True)
        manifest = Manifest(job_id="j1", runner="python", task=name, params=params, env=env or {})
        return execute(PythonRunner([tasks]), manifest, paths)

    return run


def test_a_result_comes_back(run: Run) -> None:
    ran = run(
        "def run(a: int, b: float = 0.5, *, c: list[str]): return {'a': a, 'b': b, 'c': c}", a=1, c=["ü"]
    )
    assert ran.verdict == Verdict(None, "", {"a": 1, "b": 0.5, "c": ["ü"]})
    assert ran.exit == ExitStatus(status=0)
    assert ran.log == ""


def test_the_task_has_its_directories_progress_and_environment(run: Run) -> None:
    ran = run(
        "import os, sys\n"
        "from aitbc_miner.task import output_dir, progress, work_dir\n"
        "def run():\n"
        "    progress(-5)\n"
        "    progress(50, 'half')\n"
        "    progress(float('nan'), 'x' * 5000)\n"
        "    (output_dir() / 'out').write_text('done')\n"
        "    print('hello')\n"
        "    assert work_dir().samefile(os.getcwd())\n"
        "    return sorted(os.environ), sys.stdin.read(), os.environ['HOME'], os.environ['LET_THROUGH']\n",
        env={"LET_THROUGH": "yes"},
    )
    names, stdin, home, let_through = ran.verdict.result
    assert "LET_THROUGH" in names
    assert "PYTHONPATH" not in names
    assert (stdin, home, let_through) == ("", str(ran.root / "work"), "yes")
    assert ran.reports[:3] == [Progress(0.0), Progress(50.0, "half"), Progress(0.0, "x" * 1000)]
    assert (ran.root / "output" / "out").read_text() == "done"
    assert ran.log == "hello\n"


@pytest.mark.parametrize(
    ("signature", "params", "words"),
    [
        ("n: int", {}, "parameter 'n' is missing; expected int"),
        ("n: int", {"n": "7"}, "parameter 'n': Expected `int`, got `str`; expected int"),
        ("n: int", {"n": 1, "m": 2}, "parameter 'm' is unknown; this task takes: n"),
        ("", {"m": 2}, "this task takes: none"),
        ("n: list[int]", {"n": [1, "x"]}, "parameter 'n': Expected `int`, got `str` - at `$[1]`"),
        ("n: int | None", {"n": 1.5}, "expected int | None"),
        ("n: Annotated[int, Meta(ge=1, le=9)]", {"n": 0}, "; expected int of at least 1 and of at most 9"),
        ("n: Annotated[str, Meta(min_length=1)]", {}, "expected str of a length of at least 1"),
        ("n: Literal['a', 'b']", {"n": "c"}, "expected one of 'a', 'b'"),
        ("n: 'list[int]'", {"n": {}}, "expected list[int]"),
        ("*n", {"n": 1}, "parameter 'n' is unknown"),
        ("**n: int", {"a": 1, "b": "x"}, "parameter 'b': Expected `int`"),
        ("n: object", {}, "parameter 'n' is missing"),
        ("n: __import__('threading').Lock", {"n": 1}, "parameter 'n'"),
        ("n: missing_name", {"n": 1}, "missing_name"),
    ],
)
def test_params_that_do_not_fit_are_named(
    run: Run, signature: str, params: dict[str, Any], words: str
) -> None:
    future = "from __future__ import annotations\n" if "missing_name" in signature else ""
    imports = "from typing import Annotated, Literal\nfrom msgspec import Meta\n"
    ran = run(f"{future}{imports}def run({signature}): return 'must not run'", **params)
    assert ran.verdict.code is ErrorCode.E_TASK
    assert words in ran.verdict.message
    assert ran.verdict.message.startswith("task trial: ")
    assert words in ran.log


@pytest.mark.parametrize(
    ("signature", "params", "given"),
    [
        ("n=5", {}, 5),
        ("n=5", {"n": {"any": [None]}}, {"any": [None]}),
        ("n: float", {"n": 3}, 3.0),
        ("m=1, n=2, /", {"n": 9}, 9),
        ("*args, n: int = 4", {}, 4),
        ("**n: int", {"a": 1, "b": 2}, {"a": 1, "b": 2}),
        ("n: 'dict[str, int]'", {"n": {"a": 1}}, {"a": 1}),
    ],
)
def test_params_that_fit_arrive(run: Run, signature: str, params: dict[str, Any], given: object) -> None:
    assert run(f"def run({signature}): return n", **params).verdict == Verdict(None, "", given)


@pytest.mark.parametrize(
    ("body", "code", "words"),
    [
        ("raise ValueError('boo\\nhoo')", ErrorCode.E_TASK, "ValueError: boo?hoo"),
        ("raise MemoryError", ErrorCode.E_OOM, "MemoryError: out of memory"),
        ("raise OutOfMemoryError('CUDA out of memory')", ErrorCode.E_VRAM, "CUDA out of memory"),
        (
            "raise TaskError('BAD_SEED', 'the seed is odd')",
            ErrorCode.E_TASK,
            "task trial: BAD_SEED: the seed is odd",
        ),
        ("raise TaskError('E_CANCELLED', 'says who')", ErrorCode.E_TASK, "E_CANCELLED: says who"),
        ("sys.exit(3)", ErrorCode.E_EXIT, "exit status 3"),
        ("sys.exit('sorry')", ErrorCode.E_EXIT, "last line: sorry"),
        ("sys.exit(0)", ErrorCode.E_TASK, "the task has no result"),
        ("os._exit(0)", ErrorCode.E_TASK, "the task has no result"),
        ("os.kill(os.getpid(), 11)", ErrorCode.E_SIGNAL, "SIGSEGV"),
        ("return object()", ErrorCode.E_TASK, "cannot be written as JSON"),
        ("a = []; a.append(a); return a", ErrorCode.E_TASK, "cannot be written as JSON"),
        ("return 'x' * 2_000_000", ErrorCode.E_TASK, "more than 1048576"),
        ("return run()", ErrorCode.E_TASK, "RecursionError"),
        ("import no_such_module", ErrorCode.E_TASK, "no_such_module"),
        ("send(TaskFailure('E_CANCELLED', 'forged'))", ErrorCode.E_TASK, "forged"),
        ("send(TaskFailure('E_LOST', 'forged'))", ErrorCode.E_TASK, "forged"),
        ("send(TaskResult('forged')); raise ValueError", ErrorCode.E_EXIT, "exit status 1"),
        (
            "os.write(int(os.environ['AITBC_REPORT_FD']), b'{garbage\\n'); os._exit(0)",
            ErrorCode.E_TASK,
            "the task has no result",
        ),
    ],
)
def test_each_way_to_fail_has_its_code(run: Run, body: str, code: ErrorCode, words: str) -> None:
    ran = run(
        "import os, sys\n"
        "from aitbc_miner.task import TaskError, TaskFailure, TaskResult, send\n"
        "class OutOfMemoryError(RuntimeError): pass\n"
        f"def run(): {body}"
    )
    assert ran.verdict.code is code
    assert words in ran.verdict.message
    assert ran.verdict.message.isprintable()
    assert len(ran.verdict.message) <= 2000
    if "ValueError('boo" in body:
        assert "Traceback (most recent call last)" in ran.log
        assert "trial.py" in ran.log


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("", "no function run()"),
        ("run = 5", "no function run()"),
        ("def run(:", "SyntaxError"),
        ("1 / 0", "ZeroDivisionError"),
    ],
)
def test_a_file_that_is_no_task_says_why(run: Run, source: str, words: str) -> None:
    verdict = run(source).verdict
    assert verdict.code is ErrorCode.E_TASK
    assert words in verdict.message


def test_a_task_cannot_stand_in_for_a_module(run: Run) -> None:
    for name in ["json", "queue", "msgspec"]:
        assert (
            f"a module named {name} exists already" in run("def run(): return 1", name=name).verdict.message
        )


def test_modules_beside_the_task_help_it_but_replace_nothing(run: Run, tasks: Path) -> None:
    (tasks / "helper_of_trial.py").write_text("VALUE = 7")
    (tasks / "json.py").write_text("raise SystemExit(9)")
    ran = run("import helper_of_trial, json\ndef run(): return json.dumps(helper_of_trial.VALUE)")
    assert ran.verdict == Verdict(None, "", "7")
    assert not list(tasks.glob("**/__pycache__"))


def test_the_jobs_directory_is_not_searched_for_modules(run: Run, tmp_path: Path) -> None:
    planted = tmp_path / "job" / "work"
    planted.mkdir(parents=True)
    for name in ["msgspec", "aitbc_miner", "sitecustomize", "planted"]:
        (planted / f"{name}.py").write_text("raise SystemExit(9)")
    ran = run("import planted\ndef run(): return 1")
    assert "No module named 'planted'" in ran.verdict.message


def test_programs_of_the_task_do_not_hold_the_pipe(run: Run) -> None:
    ran = run(
        "import os, subprocess\n"
        "def run():\n"
        "    fd = os.environ['AITBC_REPORT_FD']\n"
        "    return subprocess.run(['test', '-e', f'/proc/self/fd/{fd}'], close_fds=False).returncode\n"
    )
    assert ran.verdict.result == 1


def test_large_params_and_results_pass(run: Run) -> None:
    text = "x" * (RESULT_MAX - 2)
    assert run("def run(text: str): return text", text=text).verdict.result == text


@pytest.mark.parametrize(
    "name",
    [
        *("", ".", "..", "a.b", "a/b", "../trial", "/etc/passwd", "-c", "1a", "a\n", "é", "a\0", "a" * 65),
        *("__init__.py", "a b", "a;b"),
    ],
)
def test_a_name_that_is_no_plain_name_is_denied(tasks: Path, name: str) -> None:
    with pytest.raises(JobError, match="names have 1 to 64") as error:
        find_task(name, [tasks])
    assert error.value.code is ErrorCode.E_DENY
    assert error.value.message.isprintable()


def test_the_first_task_path_that_has_it_counts(tmp_path: Path, tasks: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "trial.py").touch()
    (other / "only.py").touch()
    (tasks / "trial.py").touch()
    paths = [tmp_path / "none", tasks, other]
    assert find_task("trial", paths) == tasks / "trial.py"
    assert find_task("only", paths) == other / "only.py"
    with pytest.raises(JobError, match=r"no nothing\.py in the task paths .*other") as error:
        find_task("nothing", paths)
    assert error.value.code is ErrorCode.E_DENY
    with pytest.raises(JobError, match="none set"):
        find_task("trial", [])


def test_only_a_regular_file_that_nobody_else_can_change_is_a_task(tmp_path: Path, tasks: Path) -> None:
    trial, other = tasks / "trial.py", tmp_path / "other"
    other.mkdir()
    (other / "trial.py").touch()
    makers: list[Callable[[], None]] = [
        lambda: trial.symlink_to(other / "trial.py"),
        trial.mkdir,
        lambda: os.mkfifo(trial),
    ]
    for make in makers:
        make()
        # The one further on must not take its place.
        with pytest.raises(JobError, match="not a regular file"):
            find_task("trial", [tasks, other])
        trial.rmdir() if trial.is_dir() and not trial.is_symlink() else trial.unlink()
    trial.touch()
    for path in trial, tasks, tmp_path:
        mode = stat.S_IMODE(path.stat().st_mode)
        for extra in 0o020, 0o002:
            path.chmod(mode | extra)
            with pytest.raises(JobError, match=f"{path} can be written by others") as error:
                find_task("trial", [tasks])
            assert error.value.code is ErrorCode.E_DENY
        path.chmod(mode)
    assert find_task("trial", [tasks]) == trial


def test_a_task_of_another_user_is_denied(tasks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trial = tasks / "trial.py"
    trial.touch()
    if os.geteuid() == 0:
        os.chown(trial, 12345, -1)
    else:  # only root can give a file away; to root, ours is another user's
        monkeypatch.setattr(os, "geteuid", lambda: 0)
    with pytest.raises(JobError, match=r"belongs to user id [1-9]"):
        find_task("trial", [tasks])


def test_a_job_without_a_task_is_no_manifest(tmp_path: Path) -> None:
    with pytest.raises(JobError) as error:
        PythonRunner([]).plan(Manifest(job_id="j", runner="python"), JobPaths(tmp_path), SLOT, {})
    assert error.value.code is ErrorCode.E_MANIFEST


def test_reports_are_read_whatever_their_pieces() -> None:
    sent: list[Report] = [Progress(1.0, "a"), Progress(2.0), TaskResult({"x": [1]})]
    data = b"\n".join(map(msgspec.json.encode, sent))
    for size in 1, 7, len(data):
        reader = ReportReader()
        got = [report for at in range(0, len(data), size) for report in reader.feed(data[at : at + size])]
        assert got + reader.finish() == sent
        assert not reader.notes


def test_garbage_between_reports_is_left_out_with_a_note() -> None:
    reader = ReportReader()
    good = msgspec.json.encode(Progress(1.0))
    lines = [b"", b"{", b"\xff\xfe", b'{"type":"other"}', b'{"type":"progress"}', b"[" * 100_000, b"5", good]
    lines += [b'{"type":"progress","pct":1e999}', b'{"type":"progress","pct":-1e300}']
    got = reader.feed(b"\n".join(lines) + b"\n")
    assert got[0] == Progress(1.0)
    assert all(isinstance(report, Progress) and 0 <= report.pct <= 100 for report in got)
    assert reader.notes == ["a line that is no report was dropped"]


def test_an_endless_line_takes_no_memory() -> None:
    reader = ReportReader()
    for _ in range(40):
        assert reader.feed(b"x" * 100_000) == []
        assert len(reader._line) <= LINE_MAX
    assert reader.feed(b'\n{"type":"progress","pct":1}\n') == [Progress(1.0)]
    assert reader.notes == [f"a report longer than {LINE_MAX} bytes was dropped"]


def test_too_many_reports_are_left_out() -> None:
    reader = ReportReader()
    line = msgspec.json.encode(Progress(1.0)) + b"\n"
    assert len(reader.feed(line * (PROGRESS_MAX + 5))) == PROGRESS_MAX
    assert reader.feed(b'{"type":"failure","code":"E_TASK","message":"m"}\n') == [TaskFailure("E_TASK", "m")]
    assert reader.feed(b'{"type":"result","value":1}\n{"type":"result"}\n') == []
    assert len(reader.notes) == 2
