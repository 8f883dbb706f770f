"""The lock files: what setup.cfg requires is in them, in its bounds, with hashes; and the newest and lowest.

They are renewed by tools/lock.
"""

import configparser
import re
import subprocess
from pathlib import Path

import pytest
from packaging.requirements import Requirement

CHECKOUT = Path(__file__).parents[1]
LOCKS = CHECKOUT / "tools" / "locks"


def required(*places: tuple[str, str]) -> list[Requirement]:
    parser = configparser.ConfigParser()
    parser.read(CHECKOUT / "setup.cfg")
    return [Requirement(line) for place in places for line in parser.get(*place).split("\n") if line]


RUN = required(("options", "install_requires"))
TEST = [*RUN, *required(("options.extras_require", "test"), ("options.extras_require", "lint"))]


@pytest.mark.parametrize(("lock", "requirements"), [("run", RUN), ("test", TEST)])
def test_what_setup_cfg_requires_is_locked_within_its_bounds(
    lock: str, requirements: list[Requirement]
) -> None:
    found = re.findall(r"^([a-z0-9-]+)==([^ ]+)", (LOCKS / f"{lock}.lock").read_text(), re.MULTILINE)
    assert {each.name.lower() for each in requirements} <= {name for name, _ in found}
    for each in requirements:
        versions = [version for name, version in found if name == each.name.lower()]
        assert all(each.specifier.contains(version) for version in versions), each


@pytest.mark.parametrize("lock", ["build", "compiler", "run", "test"])
def test_each_locked_package_has_hashes(lock: str) -> None:
    text = (LOCKS / f"{lock}.lock").read_text()
    packages = re.split(r"^(?=[a-z])", text, flags=re.MULTILINE)[1:]
    assert packages
    assert all("--hash=sha256:" in package for package in packages)


def test_what_is_tested_with_has_bounds_on_both_sides() -> None:
    bounded = [*RUN, *required(("options.extras_require", "test"))]
    for each in bounded:
        operators = sorted(clause.operator for clause in each.specifier if clause.operator != "!=")
        assert operators == ["<", ">="], each


@pytest.mark.parametrize(
    ("versions", "line"), [("lowest", "msgspec ==0.19"), ("newest", "msgspec >=0.19,!=0.23.1")]
)
def test_newest_and_lowest_are_taken_from_the_bounds(versions: str, line: str, tmp_path: Path) -> None:
    tools = tmp_path / "tools"
    tools.mkdir()
    setup = (
        "[options]\ninstall_requires =\n    msgspec >=0.19,<0.24,!=0.23.1\n\n[next]\nkey =\n    other >=1\n"
    )
    (tmp_path / "setup.cfg").write_text(setup)
    # Everything but the making of it.
    script = f"""
. {CHECKOUT}/tools/env.sh
root={tmp_path}
find_python() {{ echo true; }}
pip_install() {{ true; }}
mkdir -p {tmp_path}/.venv-{versions}/bin
ln -s /bin/true {tmp_path}/.venv-{versions}/bin/python
ensure_versions {versions}
"""
    subprocess.run(["bash", "-euo", "pipefail", "-c", script], check=True, capture_output=True)
    assert (tmp_path / f".venv-{versions}" / "requirements").read_text() == f"{line}\n"
