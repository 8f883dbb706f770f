"""Which build this is: by its code, and said wherever the version is."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from aitbc_miner import __version__
from aitbc_miner.util.build import build

PACKAGE = Path(__file__).parents[3] / "aitbc_miner"


def build_of(place: Path, module: str = "main") -> str:
    done = subprocess.run(
        [sys.executable, "-P", "-c", f"from aitbc_miner.{module} import start; start()", "--version"],
        env={"PYTHONPATH": str(place), "PATH": "/usr/bin:/bin"},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return done.stdout.split()[1]


def test_a_build_is_its_version_and_its_code(tmp_path: Path) -> None:
    here = build()
    assert here.startswith(f"{__version__}+")
    shutil.copytree(PACKAGE, tmp_path / "aitbc_miner", ignore=shutil.ignore_patterns("__pycache__"))
    assert build_of(tmp_path) == build_of(tmp_path, "ctl.main") == here
    with (tmp_path / "aitbc_miner" / "errors.py").open("a") as file:
        file.write("# another\n")
    other = build_of(tmp_path)
    assert other != here
    assert other.startswith(f"{__version__}+")


@pytest.mark.parametrize("change", ["rename", "remove"])
def test_names_count_as_well_as_contents(tmp_path: Path, change: str) -> None:
    copy = shutil.copytree(PACKAGE, tmp_path / "aitbc_miner")
    (copy / "spare.py").write_text("1\n")
    with_it = build_of(tmp_path)
    (copy / "spare.py").rename(copy / "other.py") if change == "rename" else (copy / "spare.py").unlink()
    assert build_of(tmp_path) != with_it
