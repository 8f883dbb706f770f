"""The process that describes tasks: it imports each task in a fork of its own.

Stdin has the tasks' names and files as JSON. Stdout gets a line of JSON for each task, even if its fork dies.
"""

import inspect
import os
import select
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from aitbc_miner.runners.task_child import NoTaskError, TaskRefused, load
from aitbc_miner.util.signals import signal_name
from aitbc_miner.util.system import PR_SET_PDEATHSIG, prctl

READ_S = 20
SCHEMA_MAX = 1 << 15
DEFAULT_MAX = 1 << 10
TEXT_MAX = 300


class TaskInfo(Struct, frozen=True, omit_defaults=True):
    """The description of a task. `params` is a JSON schema; if it is None, `error` has the reason.

    `task` is False for a file without a function `run`, such as a helper of other tasks.
    """

    name: str
    description: str = ""
    params: dict[str, Any] | None = None
    error: str = ""
    task: bool = True


def main() -> int:
    """Print the description of each task."""
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    wanted = msgspec.json.decode(sys.stdin.buffer.read(), type=list[tuple[str, str]])
    said = os.dup(1)
    # Modules may print while they are imported; their output goes to stderr.
    os.dup2(2, 1)
    for name, file in wanted:
        with os.fdopen(os.dup(said), "wb") as out:
            out.write(msgspec.json.encode(_ask(name, Path(file))) + b"\n")
    return 0


def _ask(name: str, file: Path) -> TaskInfo:
    """Have a fork describe the task, so that a task that ends its process spoils no other description."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            os.write(writing, msgspec.json.encode(describe(name, file)))
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        # The fork writes its whole answer at once.
        late = not select.select([pipe], [], [], READ_S)[0]
        if late:
            os.kill(pid, signal.SIGKILL)
        answer = pipe.read()
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if answer:
        return msgspec.json.decode(answer, type=TaskInfo)
    end = f"exit status {code}" if code >= 0 else signal_name(-code)
    return TaskInfo(name, error=f"the import {f'takes longer than {READ_S} s' if late else f'ends in {end}'}")


def describe(name: str, file: Path) -> TaskInfo:
    """Import a task and describe it; the description has the error of a faulty task."""
    try:
        run = load(name, file)
        text = sys.modules[name].__doc__ or run.__doc__ or ""
        params = schema_of(run)
    except NoTaskError:
        return TaskInfo(name, task=False)
    except (Exception, SystemExit) as error:  # noqa: BLE001  # any error goes into the description
        kind = "" if isinstance(error, TaskRefused) else f"{type(error).__name__}: "
        return TaskInfo(name, error=_line(f"{kind}{error}"))
    if len(msgspec.json.encode(params)) > SCHEMA_MAX:
        return TaskInfo(name, error=f"the JSON schema of its parameters is larger than {SCHEMA_MAX} bytes")
    return TaskInfo(name, _line(text), params)


def schema_of(run: Callable[..., Any]) -> dict[str, Any]:
    """Describe the params of a job as a JSON schema of an object.

    Raises:
        TaskRefused: JSON cannot express the type of a parameter.
    """
    takes = [
        each
        for each in inspect.signature(run, eval_str=True).parameters.values()
        if each.kind is not each.VAR_POSITIONAL
    ]
    kinds = [Any if each.annotation is each.empty else each.annotation for each in takes]
    for each, kind in zip(takes, kinds, strict=True):
        try:
            msgspec.json.schema(kind)
        except TypeError as error:
            raise TaskRefused(f"parameter {each.name!r} has an annotation that JSON cannot fill") from error
    schemas, named = msgspec.json.schema_components(kinds, ref_template="#/$defs/{name}")
    rest = next((schema for each, schema in zip(takes, schemas, strict=True) if _is_rest(each)), False)
    plain = [(each, schema) for each, schema in zip(takes, schemas, strict=True) if not _is_rest(each)]
    return {
        "type": "object",
        "properties": {each.name: schema | _default(each) for each, schema in plain},
        "required": [each.name for each, _ in plain if each.default is each.empty],
        "additionalProperties": rest,
        **({"$defs": named} if named else {}),
    }


def _is_rest(parameter: inspect.Parameter) -> bool:
    return parameter.kind is parameter.VAR_KEYWORD


def _default(parameter: inspect.Parameter) -> dict[str, Any]:
    if parameter.default is parameter.empty:
        return {}
    try:
        value = msgspec.json.encode(parameter.default)
    except (TypeError, ValueError, OverflowError, RecursionError):
        return {}  # the schema omits the default, but jobs may still omit the parameter
    return {"default": msgspec.Raw(value)} if len(value) <= DEFAULT_MAX else {}


def _line(text: str) -> str:
    """Give the first line of a text with words in it, shortened and printable."""
    first = next(filter(None, map(str.strip, text.splitlines())), "")
    return "".join(char if char.isprintable() else "?" for char in first[:TEXT_MAX])
