"""The process a Python task runs in: reads what to run from stdin, runs it, reports what came of it.

Its arguments are modules to import before it reads: it can be started ahead of its task, and wait there.

It runs as the job's user within the job's limits, and is as little trusted as the task: everything it says is
judged again by `runners/python.py`.
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
    """What the child is told to do: `file` was found and judged by the miner, `env` is the job's."""

    task: str
    file: str
    params: dict[str, Any] = {}
    env: dict[str, str] = {}


class TaskRefused(Exception):  # noqa: N818  # says what happened, as StopIteration does
    """The task cannot be run as asked, or came back with what cannot be sent."""


class NoTaskError(TaskRefused):
    """The file is no task."""


def main() -> int:
    """Run the task that stdin describes and return the exit status: 0 with a result, 1 with a failure."""
    if modules := sys.argv[1:]:
        del sys.argv[1:]
        send(Preloaded(preload(modules)))
    if not (told := sys.stdin.buffer.read()):
        return 0  # there will be no task: the worker has ended
    order = msgspec.json.decode(told, type=Order)
    _close_stdin()
    os.environ.update(order.env)
    # Programs that the task starts must not hold the pipe open after it has ended.
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
    """Import modules; gives those that cannot be, and why. A task that needs one will fail of it itself."""
    failed: dict[str, str] = {}
    for name in modules:
        try:
            importlib.import_module(name)
        except (Exception, SystemExit) as error:  # noqa: BLE001  # the task may not need it
            failed[name] = f"{type(error).__name__}: {error}"[:MESSAGE_MAX]
            print(f"cannot preload {name}: {failed[name]}", file=sys.stderr)  # noqa: T201  # the job's log
    return failed


def _end_cancelled(task: str) -> int:
    """End as a program does that takes no notice of SIGTERM, by which the worker knows it."""
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
    """Import a task's file and give its function.

    Raises:
        NoTaskError: there is none in it.
        Refused: it has the name of something else.
        Exception: whatever importing it raises.
    """
    if name in sys.modules or name in sys.stdlib_module_names:
        raise TaskRefused(f"a task cannot be called {name}, as a module already is; rename {file.name}")
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise TaskRefused(f"{file} is not a Python file")
    # At the end: a file beside the task may help it, but not stand in for a module of Python or of ours.
    sys.path.append(str(file.parent))
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    run = getattr(module, "run", None)
    if not callable(run):
        raise NoTaskError(f"{file} has no function run(); see docs/tasks.md")
    return run  # type: ignore[no-any-return]


def bind_params(run: Callable[..., Any], params: Mapping[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    """Fit a job's params to a function's signature, each converted to what its annotation says.

    Raises:
        Refused: a parameter is missing, unknown, or not of its type.
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
            continue  # params have names, so there is never anything for *args
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
    annotation = parameter.annotation
    if annotation is parameter.empty:
        return "any value"
    return _readable(annotation)


def _readable(annotation: Any) -> str:
    """Write a type as the author of a job would: `int of at least 1`, not `typing.Annotated[int, …]`."""
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
        "multiple_of": "that is a multiple of",
        "min_length": "of a length of at least",
        "max_length": "of a length of at most",
        "pattern": "that matches",
    }
    return (
        f"{said} {getattr(meta, name)}" for name, said in words.items() if getattr(meta, name) is not None
    )


def _failure(task: str, error: Exception) -> TaskFailure:
    # Matched by name: torch and cupy are not here to be imported, and cupy's is a MemoryError as well.
    names = {kind.__name__ for kind in type(error).__mro__}
    code = ErrorCode.E_TASK
    if "OutOfMemoryError" in names:
        code = ErrorCode.E_VRAM
    elif isinstance(error, MemoryError):
        code = ErrorCode.E_OOM
    told = isinstance(error, TaskRefused | TaskError)
    text = str(error) or ("out of memory" if isinstance(error, MemoryError) else "")
    said = text if told else ": ".join(filter(None, (type(error).__name__, text)))
    return TaskFailure(code, f"task {task}: {said}"[:MESSAGE_MAX])
