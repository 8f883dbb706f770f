"""The Python that runs tasks: the miner's own, or the Python of an operator's virtual environment."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from aitbc_miner.errors import MinerError
from aitbc_miner.sandbox.users import Identity
from aitbc_miner.util.trust import TRUSTED, distrust

OLDEST = (3, 11)
ASK_S = 60.0

PACKAGE_ROOT = Path(__file__).resolve().parents[2]

_ASK = """
import json, sys
try: import msgspec; lacking = ""
except ImportError as error: lacking = str(error)
said = {"version": sys.version_info[:2], "prefixes": [sys.base_prefix, sys.prefix], "path": sys.path}
print(json.dumps({**said, "lacking": lacking}))
"""

_TRY = """
import importlib, json, os, sys
out = os.dup(1)
os.dup2(2, 1)
failed = {}
for name in sys.argv[1:]:
    try: importlib.import_module(name)
    except (Exception, SystemExit) as error: failed[name] = f"{type(error).__name__}: {error}"[:300]
os.write(out, json.dumps(failed).encode() + b"\\n")
os._exit(0)
"""


class InterpreterError(MinerError):
    """A Python, such as the one of `runners.python.venv`, cannot run tasks."""


class Interpreter(Struct, frozen=True):
    """A Python for tasks: its program, its installation directories, and its `sys.path`."""

    program: Path
    prefixes: tuple[Path, ...]
    path: tuple[Path, ...] = ()

    def command(self, module: str, *arguments: str) -> list[str]:
        """Give the command line that runs `main()` of a module of `aitbc_miner.runners`."""
        # -I ignores the job's directory and environment. It ignores PYTHONPATH too, although this package
        # may have been found by PYTHONPATH: so the package's place is appended.
        find = f"import sys; sys.path.append({str(PACKAGE_ROOT)!r})"
        boot = f"{find}; from aitbc_miner.runners import {module}; sys.exit({module}.main())"
        return [str(self.program), *_ISOLATED, boot, *arguments]

    def needed(self, *tasks: Path) -> tuple[Path, ...]:
        """Give the directories outside /usr that this Python reads to run tasks below `tasks`."""
        resolved = self.program.resolve().parent.parent
        places = dict.fromkeys((*self.prefixes, resolved, PACKAGE_ROOT, *tasks))
        return tuple(place for place in places if not place.is_relative_to("/usr"))


_ISOLATED = ("-I", "-B", "-u", "-c")


def find_interpreter(venv: Path | None, user: Identity | None = None) -> Interpreter:
    """Find the Python of a virtual environment by running it; without one, describe the miner's own.

    Args:
        venv: `runners.python.venv`.
        user: the user who runs the Python; None for the current user.

    Raises:
        InterpreterError: the Python is missing, too old or without msgspec, or other users can change it.
    """
    if venv is None:
        if user is not None:
            try:
                _ask(Path(sys.executable), _ASK, user)
            except InterpreterError as error:
                remedy = "install the miner with a Python that all users may run, such as Debian's"
                where = Path(sys.executable).resolve()
                raise InterpreterError(f"{user.name} cannot start {where}: {error}; {remedy}") from error
        prefixes = (Path(sys.base_prefix), Path(sys.prefix))
        return Interpreter(Path(sys.executable), prefixes, tuple(map(Path, sys.path)))
    program = venv / "bin" / "python3"
    if not program.exists():
        raise _unusable(venv, f"{program} does not exist; run `python3 -m venv {venv}`")
    _trust(venv, program)
    try:
        said = _ask(program, _ASK, user)
    except InterpreterError as error:
        raise _unusable(venv, str(error)) from error
    for place in filter(Path.exists, map(Path, said["path"])):
        _trust(venv, place)
    version = tuple(said["version"])
    if version < OLDEST:
        raise _unusable(venv, f"it has Python {version[0]}.{version[1]}; tasks need 3.11 or later")
    if said["lacking"]:
        remedy = f"run `{program} -m pip install msgspec`"
        raise _unusable(venv, f"tasks need msgspec, but it cannot be imported ({said['lacking']}); {remedy}")
    return Interpreter(program, tuple(map(Path, said["prefixes"])), tuple(map(Path, said["path"])))


def _trust(venv: Path, path: Path) -> None:
    try:
        problem = distrust(path)
    except OSError as error:
        raise _unusable(venv, f"cannot examine {path}: {error.strerror or error}") from error
    if problem:
        raise _unusable(venv, f"{problem}; {TRUSTED}")


def cannot_import(python: Interpreter, modules: Sequence[str], user: Identity | None) -> dict[str, str]:
    """Import modules in a process of the task's Python; give the error of each module that fails.

    Raises:
        InterpreterError: an import ended the process, or took longer than `ASK_S`.
    """
    failed: dict[str, str] = _ask(python.program, _TRY, user, *modules) if modules else {}
    return failed


def as_user(user: Identity | None) -> dict[str, Any]:
    """Give the arguments with which `subprocess` runs a program as this user."""
    return {} if user is None else {"user": user.uid, "group": user.gid, "extra_groups": []}


def _ask(program: Path, script: str, user: Identity | None, *arguments: str) -> dict[str, Any]:
    """Run a script and decode the last line of its output, one JSON object."""
    try:
        done = subprocess.run(
            [program, *_ISOLATED, script, *arguments],
            env={"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8"},
            cwd="/",
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=ASK_S,
            check=True,
            **as_user(user),
        )
        said: dict[str, Any] = msgspec.json.decode(done.stdout.splitlines()[-1])
    except subprocess.CalledProcessError as error:
        last = error.stderr.decode("utf-8", "replace").strip().splitlines()[-1:]
        raise InterpreterError(f"{program} failed (exit status {error.returncode}): {last}"[:500]) from error
    except (OSError, subprocess.SubprocessError, msgspec.DecodeError, IndexError) as error:
        raise InterpreterError(f"{program} does not work: {error!s:.300}") from error
    return said


def _unusable(venv: Path, reason: str) -> InterpreterError:
    return InterpreterError(f"cannot use the task environment {venv}: {reason}")
