"""The tasks of this node and what they take, for the operator and for the coordinator.

The miner imports none of them: a process of its own does, with the tasks' interpreter and as a user without
rights, and says what it has found.
"""

import os
import subprocess
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from aitbc_miner.config.settings import PythonRunnerSection
from aitbc_miner.errors import JobError
from aitbc_miner.runners.interpreter import Interpreter, InterpreterError, as_user, find_interpreter
from aitbc_miner.runners.python import TASK_NAME, find_task
from aitbc_miner.runners.task_reader import TaskInfo
from aitbc_miner.sandbox.users import Identity
from aitbc_miner.util.log import events

ALL_S = 60.0
TASKS_MAX = 200
TOLD_MAX = 1 << 18
"""How many bytes of JSON the coordinator is told of all tasks together."""

_INFO = msgspec.json.Decoder(TaskInfo)


class FoundTask(Struct, frozen=True):
    """A task of this node, with the file it is in."""

    info: TaskInfo
    file: Path


def list_tasks(
    config: PythonRunnerSection, user: Identity | None = None, interpreter: Interpreter | None = None
) -> list[FoundTask]:
    """Look into all tasks. What is wrong with one is in its `error`; takes `ALL_S` at most.

    Args:
        config: of the runner.
        user: as whom the tasks are read; None: as we are.
        interpreter: as it was found; None: it is looked for.
    """
    found: dict[str, FoundTask] = {}
    for name, file in _names(config.task_paths):
        try:
            found[name] = FoundTask(TaskInfo(name, error=_UNREAD), find_task(name, config.task_paths))
        except JobError as error:
            found[name] = FoundTask(TaskInfo(name, error=error.message), file)
    readable = [task for task in found.values() if task.info.error is _UNREAD]
    if readable:
        try:
            python = interpreter or find_interpreter(config.venv, user)
            said = _read(python, readable, user)
        except (InterpreterError, OSError) as error:
            said = [TaskInfo(task.info.name, error=str(error)) for task in readable]
        found |= {info.name: FoundTask(info, found[info.name].file) for info in said}
    return [task for task in found.values() if task.info.task]


def told(tasks: Sequence[FoundTask]) -> list[dict[str, Any]]:
    """Give what the coordinator is told: without their parameters where these are too much together."""
    infos = [task.info for task in tasks]
    if len(msgspec.json.encode(infos)) > TOLD_MAX:
        infos = [TaskInfo(info.name, info.description, error=info.error) for info in infos]
    return [msgspec.to_builtins(info) for info in infos]


class TaskWatch:
    """Has the tasks looked into once, from a thread; `told` is what the coordinator is told, None until then.

    It can be waited for with poll, and `seen` ends that.
    """

    def __init__(self, config: PythonRunnerSection) -> None:
        self.told: list[dict[str, Any]] | None = None
        self._config = config
        self._done = os.eventfd(0, os.EFD_CLOEXEC)
        if config.enable and _names(config.task_paths):
            threading.Thread(target=self._run, name="tasks", daemon=True).start()
        else:
            self.told = []

    def fileno(self) -> int:
        """Give the descriptor to wait on."""
        return self._done

    def seen(self) -> None:
        """Take notice that it is done."""
        os.eventfd_read(self._done)

    def _run(self) -> None:
        tasks: list[FoundTask] = []
        try:
            tasks = list_tasks(self._config)
        except OSError as error:
            events("heartbeat").error("cannot list tasks", error=str(error))
        for task in tasks:
            if task.info.error:
                events("heartbeat").warning("broken task", task=task.info.name, error=task.info.error)
        self.told = told(tasks)
        os.eventfd_write(self._done, 1)


def params_of(info: TaskInfo) -> Iterator[tuple[str, str]]:
    """Give the parameters of a task for people: each name, and in a few words what it takes."""
    schema = info.params or {}
    for name, kind in schema.get("properties", {}).items():
        words = [f"{key} {value}" for key, value in kind.items() if key not in {"type", "title", "default"}]
        words = [kind["type"], *words] if isinstance(kind.get("type"), str) else words or ["any value"]
        if "default" in kind:
            words.append(f"default {msgspec.json.encode(kind['default']).decode()}")
        yield name, ", ".join(words) + (", required" if name in schema["required"] else "")
    if schema.get("additionalProperties", False) is not False:
        yield "…", "others"


_UNREAD = f"not looked into: all tasks together took longer than {ALL_S:g} s"


def _names(task_paths: Sequence[Path]) -> list[tuple[str, Path]]:
    files: dict[str, Path] = {}
    for directory in task_paths:
        for file in sorted(directory.glob("[!.#]*.py")):
            if TASK_NAME.fullmatch(file.stem):
                files.setdefault(file.stem, file)
    return sorted(files.items())[:TASKS_MAX]


def _read(python: Interpreter, tasks: Sequence[FoundTask], user: Identity | None) -> list[TaskInfo]:
    wanted = [(task.info.name, str(task.file)) for task in tasks]
    try:
        done = subprocess.run(
            python.command("task_reader"),
            input=msgspec.json.encode(wanted),
            env={"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8"},
            cwd="/",
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=ALL_S,
            check=False,
            **as_user(user),
        )
        said, whole = done.stdout, True
    except subprocess.TimeoutExpired as late:
        said, whole = late.stdout or b"", False
    try:
        infos = [_INFO.decode(line) for line in said.splitlines(keepends=True) if line.endswith(b"\n")]
    except msgspec.DecodeError as error:
        raise OSError(f"{python.program} said what makes no sense: {error}") from error
    if whole and len(infos) < len(wanted):
        raise OSError(f"{python.program} ended before it had looked into all tasks")
    return infos
