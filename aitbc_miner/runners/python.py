"""Runs a task: a separate process calls the function `run` of a file in the operator's task paths."""

import re
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from aitbc_miner.errors import ErrorCode, JobError
from aitbc_miner.jobs import ExitStatus, Manifest
from aitbc_miner.runners.interface import JobPaths, Launch, Verdict, ended_badly, job_env, printable, shortest
from aitbc_miner.runners.interpreter import Interpreter, find_interpreter
from aitbc_miner.runners.task_child import MESSAGE_MAX, Order
from aitbc_miner.sandbox.spawn import REPORT_FD
from aitbc_miner.slots.spec import SlotSpec
from aitbc_miner.task import REPORT_VARIABLE, Progress, Report, TaskFailure
from aitbc_miner.util.forgiving import MAX_NESTING, too_deep
from aitbc_miner.util.trust import TRUSTED, distrust, distrust_tree

TASK_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}")

# The codes that a task may report. Other codes, such as E_CANCELLED, only the node may set.
_CODES_OF_TASKS = frozenset({ErrorCode.E_TASK, ErrorCode.E_OOM, ErrorCode.E_VRAM})


class PythonRunner:
    """The runner `python`.

    `interpreter` defaults to the miner's own. `preload` are the modules that a waiting process has imported.
    """

    name = "python"

    def __init__(
        self, task_paths: Sequence[Path], interpreter: Interpreter | None = None, preload: Sequence[str] = ()
    ) -> None:
        self.task_paths = task_paths
        self.interpreter = interpreter or find_interpreter(None)
        self.preload = preload

    def plan(self, manifest: Manifest, paths: JobPaths, slot: SlotSpec, gpu_env: Mapping[str, str]) -> Launch:
        """Find the task's file. The task's process checks the params, because it can read their annotations.

        Raises:
            JobError: E_DENY, no such task, or other users can change its file; E_MANIFEST, no task is named.
        """
        if not manifest.task:
            raise JobError(ErrorCode.E_MANIFEST, "cannot run the job: its manifest names no task")
        file = find_task(manifest.task, self.task_paths)
        env = job_env(manifest, paths, slot, gpu_env, slot.env)
        return Launch(
            argv=self.interpreter.command("task_child"),
            env=env | {REPORT_VARIABLE: str(REPORT_FD)},
            max_runtime_s=shortest(manifest.timeout_s, slot.max_runtime_s),
            max_output_bytes=None,
            reports=True,
            stdin=msgspec.json.encode(Order(manifest.task, str(file), manifest.params, env)),
            binds=self.interpreter.needed(file.parent),
            # The job's variables can change how modules import, and a waiting process has imported them.
            may_wait=bool(self.preload) and not manifest.env,
        )

    def waiting(self, paths: JobPaths, slot: SlotSpec, gpu_env: Mapping[str, str]) -> Launch:
        """Make the Launch of a process that imports `preload` and then waits for the `stdin` of a task."""
        nothing = Manifest(job_id="", runner=self.name)
        return Launch(
            argv=self.interpreter.command("task_child", *self.preload),
            env=job_env(nothing, paths, slot, gpu_env, []) | {REPORT_VARIABLE: str(REPORT_FD)},
            max_runtime_s=None,
            max_output_bytes=None,
            reports=True,
            binds=self.interpreter.needed(*filter(Path.is_dir, self.task_paths)),
        )

    def verdict(self, exit: ExitStatus, reports: list[Report], log_tail: str) -> Verdict:  # noqa: A002
        """Judge the job by the task's final report; without a reported failure, by the exit status too."""
        said = next((report for report in reports if not isinstance(report, Progress)), None)
        if isinstance(said, TaskFailure):
            code = ErrorCode(said.code) if said.code in _CODES_OF_TASKS else ErrorCode.E_TASK
            return Verdict(code, printable(said.message, MESSAGE_MAX))
        if bad := ended_badly(exit, log_tail):
            return bad
        if said is None:
            return Verdict(ErrorCode.E_TASK, "the task has no result: it exited before run() returned")
        if too_deep(said.value):
            return Verdict(ErrorCode.E_TASK, f"the task's result is nested deeper than {MAX_NESTING} levels")
        return Verdict(None, "", said.value)


def find_task(name: str, task_paths: Sequence[Path]) -> Path:
    """Find `<name>.py` in the first task path that has it.

    Raises:
        JobError: E_DENY, the name is malformed, no path has the file, or other users can change the file.
    """
    if not TASK_NAME.fullmatch(name):
        raise _denied(name, "task names have 1 to 64 characters of A-Z a-z 0-9 _ and begin with no digit")
    for directory in task_paths:
        file = directory / f"{name}.py"
        try:
            info = file.lstat()
            if not stat.S_ISREG(info.st_mode):
                raise _denied(name, f"{file} is not a regular file")
            # The task can import every file beside it.
            problem = distrust(file) or distrust_tree(directory)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            raise _denied(name, f"cannot examine {file}: {error.strerror or error}") from error
        if problem:
            raise _denied(name, f"{problem}; {TRUSTED}")
        return file
    raise _denied(name, f"no {name}.py in the task paths {', '.join(map(str, task_paths)) or '(none set)'}")


def _denied(name: str, reason: str) -> JobError:
    return JobError(ErrorCode.E_DENY, f"cannot run task {name[:64]!r}: {reason}")
