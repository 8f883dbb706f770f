"""Builds tests/support/stub_nvml.c and puts it where the real NVIDIA library would be found first."""

import os
import subprocess
from pathlib import Path

from tools.lib.compiler import c_compiler

LIBRARY = "libnvidia-ml.so.1"


class NvmlStub:
    """A directory that holds the library and its settings; the top of stub_nvml.c says what there is to set.

    Settings given as keywords lose their NVML_STUB_ prefix: `NvmlStub(path, gpus=8, lost=1)`.
    """

    def __init__(self, directory: Path, **settings: object) -> None:
        self.directory = directory
        source = Path(__file__).with_name("stub_nvml.c")
        flags = ["-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
        command = [*c_compiler(), *flags, "-o", LIBRARY, str(source)]
        subprocess.run([*command, "-ldl"], cwd=directory, check=True, timeout=600)
        self.set(**settings)

    def set(self, **settings: object) -> None:
        """Replace all settings; a process that has already loaded the library keeps the old ones."""
        lines = [f"NVML_STUB_{name.upper()}={value}\n" for name, value in {"gpus": 1, **settings}.items()]
        (self.directory / "nvml_stub.conf").write_text("".join(lines))

    @property
    def environ(self) -> dict[str, str]:
        """Variables that make a child process find the stub."""
        return library_path(self.directory)


def library_path(directory: Path) -> dict[str, str]:
    """Return our own environment with the libraries of this directory before all others."""
    return {**os.environ, "LD_LIBRARY_PATH": str(directory)}


def no_library(directory: Path) -> dict[str, str]:
    """Return an environment in which NVML cannot be loaded, also on a machine that has it."""
    (directory / LIBRARY).write_bytes(b"")
    return library_path(directory)
