"""The process that runs a Python task: it reads an Order from stdin, runs the task, and reports the result.

Its arguments are modules to import before it reads stdin, so that it can start ahead of its task and wait.
The process runs as the job's user within the job's limits. The node trusts it no more than the task:
`runners/python.py` judges its reports again.
"""

import importlib
import importlib.util
import inspect
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import msgspec
from msgspec import Struct

from aitbc_miner.errors import ErrorCode
from aitbc_miner.task import (
    REPORT_VARIABLE,
    RESULT_MAX,
    Preloaded,
    TaskCancelled,
    TaskError,
    TaskFailure,
    TaskResult,
    hear_cancellation,
    send,
)

MESSAGE_MAX = 2000


class Order(Struct, frozen=True):
    """The task to run. The miner has found and checked `file`; `env` is the job's environment."""

    task: str
    file: str
    params: dict[str, Any] = {}
    env: dict[str, str] = {}


class TaskRefused(Exception):  # noqa: N818  # the name says what happened, as StopIteration does
    """The process cannot run the task with these parameters, or cannot send its result."""


class NoTaskError(TaskRefused):
    """The file has no function `run`."""


def main() -> int:
    """Run the task that stdin describes; return the exit status, 0 for a result and 1 for a failure."""
    if modules := sys.argv[1:]:
        del sys.argv[1:]
        send(Preloaded(preload(modules)))
    if not (told := sys.stdin.buffer.read()):
        return 0  # the worker ended and will send no task
    order = msgspec.json.decode(told, type=Order)
    _close_stdin()
    os.environ.update(order.env)
    # Programs that the task starts must not hold the pipe open after the task has ended.
    os.set_inheritable(int(os.environ[REPORT_VARIABLE]), False)  # noqa: FBT003
    try:
        hear_cancellation()
        return _carry_out(order)
    except TaskCancelled:
        return _end_cancelled(order.task)


def _carry_out(order: Order) -> int:
    try:
        send(TaskResult(_result(order)))
    except Exception as error:  # noqa: BLE001  # whatever a task raises becomes its report
        failure = _failure(order.task, error)
        sys.stdout.flush()
        if not isinstance(error, TaskRefused):
            traceback.print_exception(error)
        print(failure.message, file=sys.stderr)  # noqa: T201  # the job's log
        send(failure)
        return 1
    return 0


def preload(modules: Sequence[str]) -> dict[str, str]:
    """Import modules; give the error of each module that fails. Tasks that need such a module fail later."""
    failed: dict[str, str] = {}
    for name in modules:
        try:
            importlib.import_module(name)
        except (Exception, SystemExit) as error:  # noqa: BLE001  # the task may not need it
            failed[name] = f"{type(error).__name__}: {error}"[:MESSAGE_MAX]
            print(f"cannot preload {name}: {failed[name]}", file=sys.stderr)  # noqa: T201  # the job's log
    return failed


def _end_cancelled(task: str) -> int:
    """End by SIGTERM, as a program without a handler does: the worker recognises a cancelled job by that."""
    sys.stdout.flush()
    print(f"task {task}: cancelled", file=sys.stderr)  # noqa: T201  # the job's log
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.kill(os.getpid(), signal.SIGTERM)
    return 1


def _close_stdin() -> None:
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)


def _result(order: Order) -> msgspec.Raw:
    run = load(order.task, Path(order.file))
    args, kwargs = bind_params(run, order.params)
    value = run(*args, **kwargs)
    try:
        encoded = msgspec.json.encode(value)
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise TaskRefused(f"run() returned a value that cannot be written as JSON: {error}") from error
    if len(encoded) > RESULT_MAX:
        size = f"{len(encoded)} bytes of JSON, more than {RESULT_MAX}"
        raise TaskRefused(f"run() returned {size}; write a file to output/ instead")
    return msgspec.Raw(encoded)


def load(name: str, file: Path) -> Callable[..., Any]:
    """Import a task's file and give its function `run`.

    Raises:
        NoTaskError: the file has no function `run`.
        TaskRefused: the task has the name of a module of Python or of the miner.
        Exception: any error of the import.
    """
    if name in sys.modules or name in sys.stdlib_module_names:
        raise TaskRefused(f"a module named {name} exists already; rename {file.name}")
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise TaskRefused(f"{file} is not a Python file")
    # Appended: the task may import files beside it, but these must not replace modules of Python or ours.
    sys.path.append(str(file.parent))
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    run = getattr(module, "run", None)
    if not callable(run):
        raise NoTaskError(f"{file} has no function run(); see docs/tasks.md")
    return run  # type: ignore[no-any-return]


def bind_params(run: Callable[..., Any], params: Mapping[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    """Fit a job's params to a function's signature, and convert each to the type of its annotation.

    Raises:
        TaskRefused: a parameter is missing, unknown, or not of its type.
    """
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    left = dict(params)
    signature = inspect.signature(run, eval_str=True)
    rest: inspect.Parameter | None = None
    for name, parameter in signature.parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            rest = parameter
        elif parameter.kind is parameter.VAR_POSITIONAL:
            continue  # params have names, so *args stays empty
        elif name in left:
            kwargs[name] = _converted(name, left.pop(name), parameter)
        elif parameter.default is parameter.empty:
            raise TaskRefused(f"parameter {name!r} is missing; expected {_type_name(parameter)}")
        else:
            kwargs[name] = parameter.default
        if parameter.kind is parameter.POSITIONAL_ONLY:
            args.append(kwargs.pop(name))
    if left and rest is None:
        known = ", ".join(signature.parameters) or "none"
        raise TaskRefused(f"parameter {min(left)[:64]!r} is unknown; this task takes: {known}")
    if rest:
        kwargs |= {name: _converted(name, value, rest) for name, value in left.items()}
    return args, kwargs


def _converted(name: str, value: Any, parameter: inspect.Parameter) -> Any:
    if parameter.annotation is parameter.empty:
        return value
    try:
        return msgspec.convert(value, parameter.annotation)
    except msgspec.ValidationError as error:
        raise TaskRefused(f"parameter {name[:64]!r}: {error}; expected {_type_name(parameter)}") from error
    except TypeError as error:
        raise TaskRefused(
            f"parameter {name[:64]!r} has an annotation that JSON cannot fill: {error}"
        ) from error


def _type_name(parameter: inspect.Parameter) -> str:
    return "any value" if parameter.annotation is parameter.empty else _readable(parameter.annotation)


def _readable(annotation: Any) -> str:
    """Write a type for authors of jobs: `int of at least 1`, not `typing.Annotated[int, …]`."""
    if get_origin(annotation) is Annotated:
        plain, *metas = get_args(annotation)
        bounds = [words for meta in metas if isinstance(meta, msgspec.Meta) for words in _bounds(meta)]
        return f"{_readable(plain)} {' and '.join(bounds)}".rstrip()
    if get_origin(annotation) is Literal:
        return "one of " + ", ".join(map(repr, get_args(annotation)))
    if type(annotation) is type:
        return annotation.__name__
    return re.sub(r"\btyping\.", "", str(annotation))


def _bounds(meta: msgspec.Meta) -> Iterator[str]:
    words = {
        "ge": "of at least",
        "gt": "above",
        "le": "of at most",
        "lt": "below",
        "multiple_of": "in multiples of",
        "min_length": "of a length of at least",
        "max_length": "of a length of at most",
        "pattern": "matching",
    }
    return (
        f"{said} {getattr(meta, name)}" for name, said in words.items() if getattr(meta, name) is not None
    )


def _failure(task: str, error: Exception) -> TaskFailure:
    # Matched by name, because torch and cupy may not be installed. cupy's error is a MemoryError as well.
    names = {kind.__name__ for kind in type(error).__mro__}
    code = ErrorCode.E_TASK
    if "OutOfMemoryError" in names:
        code = ErrorCode.E_VRAM
    elif isinstance(error, MemoryError):
        code = ErrorCode.E_OOM
    text = str(error) or ("out of memory" if isinstance(error, MemoryError) else "")
    if not isinstance(error, TaskRefused | TaskError):
        text = ": ".join(filter(None, (type(error).__name__, text)))
    return TaskFailure(code, f"task {task}: {text}"[:MESSAGE_MAX])
