"""The Python that tasks run in: the miner's own, or that of a virtual environment of the operator's."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from aitbc_miner.errors import MinerError
from aitbc_miner.sandbox.users import Identity
from aitbc_miner.util.trust import distrust

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
    """A Python, such as that of `runners.python.venv`, does not do for tasks."""


class Interpreter(Struct, frozen=True):
    """A Python for tasks: its program, where its files are, and where it looks for modules."""

    program: Path
    prefixes: tuple[Path, ...]
    path: tuple[Path, ...] = ()

    def command(self, module: str, *arguments: str) -> list[str]:
        """Give the arguments that run `main()` of a module of `aitbc_miner.runners`."""
        # With -I neither the job's directory nor its environment says what is imported. That leaves out
        # PYTHONPATH too, by which this package may have been found itself, so its place is told.
        find = f"import sys; sys.path.append({str(PACKAGE_ROOT)!r})"
        boot = f"{find}; from aitbc_miner.runners import {module}; sys.exit({module}.main())"
        return [str(self.program), *_ISOLATED, boot, *arguments]

    def needed(self) -> list[Path]:
        """Give what it reads outside of /usr."""
        resolved = self.program.resolve().parent.parent
        places = dict.fromkeys((*self.prefixes, resolved, PACKAGE_ROOT))
        return [place for place in places if not place.is_relative_to("/usr")]


_ISOLATED = ("-I", "-B", "-u", "-c")


def find_interpreter(venv: Path | None, user: Identity | None = None) -> Interpreter:
    """Find the Python of a virtual environment, by asking it; of our own, None, all else is known.

    Args:
        venv: `runners.python.venv`.
        user: as whom it is asked; None: as we are.

    Raises:
        InterpreterError: it is not there, others could change it, it is too old, or has no msgspec.
    """
    if venv is None:
        if user is not None:
            try:
                _ask(Path(sys.executable), _ASK, user)
            except InterpreterError as error:
                remedy = "install the miner with a Python that all users may start, such as Debian's"
                where = Path(sys.executable).resolve()
                raise InterpreterError(f"{user.name} cannot start {where}: {error}; {remedy}") from error
        prefixes = (Path(sys.base_prefix), Path(sys.prefix))
        return Interpreter(Path(sys.executable), prefixes, tuple(map(Path, sys.path)))
    program = venv / "bin" / "python3"
    if not program.exists():
        raise _unusable(venv, f"there is no {program}; make it with `python3 -m venv {venv}`")
    _trust(venv, program)
    try:
        said = _ask(program, _ASK, user)
    except InterpreterError as error:
        raise _unusable(venv, str(error)) from error
    for place in filter(Path.exists, map(Path, said["path"])):
        _trust(venv, place)
    version = tuple(said["version"])
    if version < OLDEST:
        raise _unusable(venv, f"it has Python {version[0]}.{version[1]}; 3.11 or later is needed")
    if said["lacking"]:
        remedy = f"`{program} -m pip install msgspec`"
        raise _unusable(venv, f"it cannot import msgspec, which tasks need ({said['lacking']}); {remedy}")
    return Interpreter(program, tuple(map(Path, said["prefixes"])), tuple(map(Path, said["path"])))


def _trust(venv: Path, path: Path) -> None:
    try:
        problem = distrust(path)
    except OSError as error:
        raise _unusable(venv, f"cannot look at {path}: {error.strerror or error}") from error
    if problem:
        raise _unusable(venv, f"{problem}; it must belong to root and be writable by nobody else")


def cannot_import(python: Interpreter, modules: Sequence[str], user: Identity | None) -> dict[str, str]:
    """Try modules out; gives those that cannot be imported, and why.

    Raises:
        InterpreterError: importing one ended the process, or took too long.
    """
    failed: dict[str, str] = _ask(python.program, _TRY, user, *modules) if modules else {}
    return failed


def as_user(user: Identity | None) -> dict[str, Any]:
    """Give what has `subprocess` start a program as this user."""
    return {} if user is None else {"user": user.uid, "group": user.gid, "extra_groups": []}


def _ask(program: Path, script: str, user: Identity | None, *arguments: str) -> dict[str, Any]:
    """Run a script and give what it says in its last line."""
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
        raise InterpreterError(f"{program} ends in status {error.returncode}: {last}"[:500]) from error
    except (OSError, subprocess.SubprocessError, msgspec.DecodeError, IndexError) as error:
        raise InterpreterError(f"{program} does not work: {error!s:.300}") from error
    return said


def _unusable(venv: Path, reason: str) -> InterpreterError:
    return InterpreterError(f"cannot use the task environment {venv}: {reason}")
