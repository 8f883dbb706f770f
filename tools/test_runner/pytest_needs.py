"""A plugin of pytest that skips and counts the tests whose Debian packages are missing.

`@pytest.mark.needs("redis-server")` names a package that a test needs; debian.py checks for the package. As
root, tools/test installs the missing packages, so no test is skipped. The plugin also removes hypothesis's
deadline, because the machine may be busy.
"""

import os
from collections import Counter
from typing import Any

import hypothesis
import pytest

from tools.vm_lab import debian

_LEFT_OUT = pytest.StashKey[dict[str, int]]()


def pytest_configure(config: pytest.Config) -> None:
    """Register the mark and remove the deadline."""
    hypothesis.settings.register_profile("patient", deadline=None)
    hypothesis.settings.load_profile("patient")
    config.addinivalue_line("markers", "needs(*packages): Debian packages that the test cannot do without")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect the tests that cannot run here."""
    missing = set(debian.missing("test"))
    lacking = {item: sorted(named & missing) for item in items if (named := _needs(item)) & missing}
    if not lacking:
        return
    packages = sorted(set().union(*lacking.values()))
    if os.geteuid() == 0:
        raise pytest.UsageError(f"as root no test is left out: {debian.INSTALL} {' '.join(packages)}")
    config.stash[_LEFT_OUT] = dict(Counter(" and ".join(names) for names in lacking.values()))
    config.hook.pytest_deselected(items=list(lacking))
    items[:] = [item for item in items if item not in lacking]


def _needs(item: pytest.Item) -> set[str]:
    return {package for mark in item.iter_markers("needs") for package in mark.args}


def pytest_sessionfinish(session: pytest.Session) -> None:
    """In a worker process of xdist, send the counts to the main process."""
    if (output := getattr(session.config, "workeroutput", None)) is not None:
        output["left out"] = session.config.stash.get(_LEFT_OUT, {})


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Receive the counts of a worker process; each worker has checked all tests."""
    if told := getattr(node, "workeroutput", {}).get("left out"):
        node.config.stash[_LEFT_OUT] = told


def pytest_terminal_summary(terminalreporter: "pytest.TerminalReporter", config: pytest.Config) -> None:
    """Print the number of skipped tests, the missing packages, and the command that installs them."""
    if left_out := config.stash.get(_LEFT_OUT, {}):
        terminalreporter.section("left out")
        for packages, count in left_out.items():
            terminalreporter.write_line(f"{count} tests for want of {packages}")
        line = f"{debian.INSTALL} {' '.join(debian.missing('test'))}"
        total = sum(left_out.values())
        terminalreporter.write_line(f"{total} tests left out in all; to run them, as root: {line}")
