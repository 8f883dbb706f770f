"""The list of tasks, the Python that they run in, and who may have made either."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from aitbc_miner.config.settings import PythonRunnerSection
from aitbc_miner.runners.interpreter import InterpreterError, cannot_import, find_interpreter
from aitbc_miner.runners.task_catalogue import TOLD_MAX, FoundTask, TaskWatch, list_tasks, params_of, told
from aitbc_miner.runners.task_reader import TaskInfo
from aitbc_miner.util.trust import distrust_tree

GOOD = '''
"""Adds numbers.

At length.
"""
from typing import Annotated, Literal
from msgspec import Meta

print("printed while imported")

Small = Annotated[int, Meta(ge=1)]

def run(a: Small, how: Literal["up", "down"] = "up", *, many: list[str], free=None) -> int:
    return a
'''
BROKEN = {
    "raises": ("raise ValueError('no\\nway')", "ValueError: no"),
    "leaves": ("import os; os._exit(3)", "the import ends in exit status 3"),
    "dies": ("import os; os.kill(os.getpid(), 9)", "the import ends in SIGKILL"),
    "quits": ("raise SystemExit(2)", "SystemExit: 2"),
    "typed": ("def run(a: object()): pass", "parameter 'a' has an annotation that JSON cannot fill"),
    "json": ("def run(): pass", "a module named json exists already"),
}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Give a task path with a good task, broken ones, and a module that only helps."""
    directory = tmp_path / "tasks"
    directory.mkdir(mode=0o755)
    for name, text in {
        "add": GOOD,
        "helper": "X = 1",
        **{name: text for name, (text, _) in BROKEN.items()},
    }.items():
        (directory / f"{name}.py").write_text(text)
        (directory / f"{name}.py").chmod(0o644)
    return directory


def tasks_of(*places: Path) -> dict[str, TaskInfo]:
    return {task.info.name: task.info for task in list_tasks(PythonRunnerSection(task_paths=places))}


def test_each_task_is_there_with_what_it_takes_or_what_is_wrong_with_it(place: Path) -> None:
    found = tasks_of(place)
    assert sorted(found) == ["add", *sorted(BROKEN)]
    for name, (_, error) in BROKEN.items():
        assert found[name].error.startswith(error), found[name]
        assert found[name].params is None
    assert found["add"].description == "Adds numbers."
    assert found["add"].params == {
        "type": "object",
        "properties": {
            "a": {"type": "integer", "minimum": 1},
            "how": {"enum": ["down", "up"], "default": "up"},
            "many": {"type": "array", "items": {"type": "string"}},
            "free": {"default": None},
        },
        "required": ["a", "many"],
        "additionalProperties": False,
    }
    shown = dict(params_of(found["add"]))
    assert shown["a"] == "integer, minimum 1, required"
    assert 'default "up"' in shown["how"]


def test_the_first_path_with_the_name_counts(place: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir(mode=0o755)
    (other / "add.py").write_text('"""Another."""\ndef run(**more: int): pass\n')
    (other / "add.py").chmod(0o644)
    found = tasks_of(other, place, tmp_path / "nowhere")
    assert found["add"].description == "Another."
    assert list(params_of(found["add"])) == [("…", "others")]


def test_a_task_that_others_could_change_is_not_read(place: Path) -> None:
    (place / "add.py").chmod(0o666)
    assert "only root and the miner's user may own or write to the path" in tasks_of(place)["add"].error
    (place / "add.py").chmod(0o644)
    # What lies beside it, it can import.
    (place / "lib").mkdir()
    (place / "lib" / "more.py").touch()
    (place / "lib" / "more.py").chmod(0o666)
    assert all("more.py can be written by others" in info.error for info in tasks_of(place).values())


def test_what_a_coordinator_is_told_is_bounded() -> None:
    big = TaskInfo("t", "x", {"properties": {"p": {"title": "x" * TOLD_MAX}}})
    assert told([FoundTask(big, Path("/t.py"))]) == [{"name": "t", "description": "x"}]
    small = TaskInfo("t", "x", {"properties": {}})
    assert told([FoundTask(small, Path("/t.py"))])[0]["params"] == {"properties": {}}


def test_the_watch_tells_when_it_knows(place: Path) -> None:
    watch = TaskWatch(PythonRunnerSection(task_paths=(place,)))
    watch.seen()
    assert watch.told is not None
    assert "add" in [each["name"] for each in watch.told]
    assert TaskWatch(PythonRunnerSection(enable=False, task_paths=(place,))).told == []


# --- the tree ----------------------------------------------------------------------------------------------


def spoil_sticky(place: Path) -> None:
    place.chmod(0o1777)


def spoil_below(place: Path) -> None:
    (place / "sub").mkdir()
    (place / "sub").chmod(0o777)


def spoil_link(place: Path) -> None:
    (place / "link.py").symlink_to("/nowhere/at/all.py")


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (spoil_sticky, "can be written"),
        (spoil_below, "sub can be written"),
        (spoil_link, "link to a missing file"),
    ],
)
def test_a_tree_is_the_operators_in_all_its_parts(place: Path, spoil: Any, said: str) -> None:
    assert distrust_tree(place) is None
    spoil(place)
    assert said in (distrust_tree(place) or "")


# --- the interpreter ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def venv(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give an environment without any package but one of its own."""
    place = tmp_path_factory.mktemp("venv") / "v"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(place)], check=True)
    return place


def packages(venv: Path) -> Path:
    return next((venv / "lib").glob("python3.*/site-packages"))


def test_an_environment_without_msgspec_is_refused(venv: Path) -> None:
    with pytest.raises(
        InterpreterError, match=r"tasks need msgspec, but it cannot be imported.*-m pip install msgspec"
    ):
        find_interpreter(venv)


def test_an_environment_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InterpreterError, match=r"bin/python3 does not exist; run `python3 -m venv"):
        find_interpreter(tmp_path / "none")


def test_an_environment_of_its_own(venv: Path) -> None:
    target = packages(venv) / "msgspec"
    target.symlink_to(Path(msgspec.__file__).parent)
    (packages(venv) / "only_here.py").write_text("")
    try:
        python = find_interpreter(venv)
        assert python.program == venv / "bin" / "python3"
        assert venv in python.prefixes
        assert venv in python.needed()
        assert cannot_import(python, ["only_here", "nowhere"], None) == {
            "nowhere": "ModuleNotFoundError: No module named 'nowhere'"
        }
        (packages(venv) / "ender.py").write_text("import os; os._exit(3)")
        with pytest.raises(InterpreterError, match=r"failed \(exit status 3\)"):
            cannot_import(python, ["ender"], None)
        packages(venv).chmod(0o777)
        with pytest.raises(
            InterpreterError,
            match=r"site-packages.*only root and the miner's user may own or write to the path",
        ):
            find_interpreter(venv)
    finally:
        packages(venv).chmod(0o755)
        target.unlink()


def test_our_own_needs_no_asking() -> None:
    python = find_interpreter(None)
    assert python.program == Path(sys.executable)
    assert python.command("task_child", "m")[-1] == "m"
    assert os.access(python.program, os.X_OK)
