"""A plugin for pytest: leaves out what needs a Debian package that a user's machine lacks, and counts it.

`@pytest.mark.needs("redis-server")` names what a test cannot do without; debian.py knows how to look for it.
As root nothing is left out: tools/test installs what is missing.
And no example of a property has a deadline, for the machine may be busy.
"""

import os
from collections import Counter
from typing import Any

import hypothesis
import pytest

from tools.vm_lab import debian

_LEFT_OUT = pytest.StashKey[dict[str, int]]()


def pytest_configure(config: pytest.Config) -> None:
    """Make the mark known, and take the deadline away."""
    hypothesis.settings.register_profile("patient", deadline=None)
    hypothesis.settings.load_profile("patient")
    config.addinivalue_line("markers", "needs(*packages): Debian packages that the test cannot do without")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Take out what cannot run here."""
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
    """Tell the process that started this one, where tests run in several."""
    if (output := getattr(session.config, "workeroutput", None)) is not None:
        output["left out"] = session.config.stash.get(_LEFT_OUT, {})


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Take what such a process tells; each of them has looked at all tests."""
    if told := getattr(node, "workeroutput", {}).get("left out"):
        node.config.stash[_LEFT_OUT] = told


def pytest_terminal_summary(terminalreporter: "pytest.TerminalReporter", config: pytest.Config) -> None:
    """Say how many were left out, for want of what, and how to leave out none."""
    if left_out := config.stash.get(_LEFT_OUT, {}):
        terminalreporter.section("left out")
        for packages, count in left_out.items():
            terminalreporter.write_line(f"{count} tests for want of {packages}")
        line = f"{debian.INSTALL} {' '.join(debian.missing('test'))}"
        total = sum(left_out.values())
        terminalreporter.write_line(f"{total} tests left out in all; to run them, as root: {line}")
