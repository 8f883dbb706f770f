"""The node's tasks and their parameters, for the operator and for the coordinator.

The miner itself imports no task. A separate process (task_reader.py) imports each with the tasks' Python, as
an unprivileged user, and describes it.
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
"""The most bytes of JSON that describe all tasks to the coordinator."""

_INFO = msgspec.json.Decoder(TaskInfo)


class FoundTask(Struct, frozen=True):
    """A task of this node and its file."""

    info: TaskInfo
    file: Path


def list_tasks(
    config: PythonRunnerSection, user: Identity | None = None, interpreter: Interpreter | None = None
) -> list[FoundTask]:
    """Describe all tasks within `ALL_S`. If a task is faulty, its `error` has the reason.

    Args:
        config: the runner's section of the configuration.
        user: the user who imports the tasks; None for the current user.
        interpreter: the tasks' Python; None to find it.
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
    """Describe tasks to the coordinator, without parameters if they would exceed `TOLD_MAX`."""
    infos = [task.info for task in tasks]
    if len(msgspec.json.encode(infos)) > TOLD_MAX:
        infos = [TaskInfo(info.name, info.description, error=info.error) for info in infos]
    return [msgspec.to_builtins(info) for info in infos]


class TaskWatch:
    """Describes the tasks once, in a thread. `told` is the result for the coordinator; None until then.

    The caller waits for the result with poll, and calls `seen` after that.
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
        """Give the descriptor to poll."""
        return self._done

    def seen(self) -> None:
        """Reset the descriptor after the caller has seen the result."""
        os.eventfd_read(self._done)

    def _run(self) -> None:
        tasks: list[FoundTask] = []
        try:
            tasks = list_tasks(self._config)
        except OSError as error:
            events("heartbeat").error("cannot list tasks", error=str(error))
        for task in tasks:
            if task.info.error:
                events("heartbeat").warning("task unusable", task=task.info.name, error=task.info.error)
        self.told = told(tasks)
        os.eventfd_write(self._done, 1)


def params_of(info: TaskInfo) -> Iterator[tuple[str, str]]:
    """Describe a task's parameters in words: yield each name with its type, bounds and default."""
    schema = info.params or {}
    for name, kind in schema.get("properties", {}).items():
        words = [f"{key} {value}" for key, value in kind.items() if key not in {"type", "title", "default"}]
        words = [kind["type"], *words] if isinstance(kind.get("type"), str) else words or ["any value"]
        if "default" in kind:
            words.append(f"default {msgspec.json.encode(kind['default']).decode()}")
        yield name, ", ".join(words) + (", required" if name in schema["required"] else "")
    if schema.get("additionalProperties", False) is not False:
        yield "…", "others"


_UNREAD = f"not examined: all tasks together took longer than {ALL_S:g} s"


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
        raise OSError(f"cannot read the task list that {python.program} printed: {error}") from error
    if whole and len(infos) < len(wanted):
        raise OSError(f"{python.program} ended before it had examined all tasks")
    return infos
