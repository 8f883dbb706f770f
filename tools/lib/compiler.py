"""Finds a C compiler, for a stub of NVML and for a program without start-up time."""

import importlib.util
import shutil
import sys


def c_compiler() -> list[str]:
    """Give the command: the system's compiler, else the one that tools/test installs from PyPI.

    Raises:
        RuntimeError: neither is installed.
    """
    for name in ("cc", "gcc", "clang"):
        if found := shutil.which(name):
            return [found]
    if importlib.util.find_spec("ziglang"):
        return [sys.executable, "-m", "ziglang", "cc"]
    raise RuntimeError("cannot compile: no C compiler found; apt-get install gcc, or pip install ziglang")
