"""The node installed once, and a machine that is as it was after each test."""

import os
import platform
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tools.mock_coordinator import MockCoordinator
from vm.boxed import BoxedMachine
from vm.machine import CURRENT, MAIN, SLOTS, Machine, install, run

Count = Callable[[int, int], int]


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add what makes a campaign long, and what makes it the same in both releases."""
    parser.addoption("--full", action="store_true", help="as often as it takes to be sure, which takes hours")
    parser.addoption("--everywhere", action="store_true", help="also what is marked for the other release")


def pytest_configure(config: pytest.Config) -> None:
    """Make the mark known."""
    config.addinivalue_line(
        "markers", "one_release(number, reason): runs in this Debian; the reason it is enough"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what the other release proves for both, and bring the rest into its order.

    The installer's tests go first: they begin with a machine that has never seen the miner. What compares
    a calm time with a wild one goes last, when the host has the least to do beside it.
    """
    order = {"test_install.py": 0, "test_clock.py": 2}
    items.sort(key=lambda item: order.get(item.path.name, 1))
    if not config.getoption("--everywhere"):
        here = platform.freedesktop_os_release().get("VERSION_ID")
        left = [
            item
            for item in items
            if (mark := item.get_closest_marker("one_release")) and mark.args[0] != here
        ]
        config.hook.pytest_deselected(items=left)
        items[:] = [item for item in items if item not in left]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """Keep what the units said of a test that failed."""
    report = yield
    if report.when == "call" and report.failed:  # type: ignore[attr-defined]
        text = run("journalctl", "--no-pager", "-o", "short-monotonic", "-u", MAIN, "-u", SLOTS, check=False)
        (reports_directory() / f"{item.name}.journal.txt").write_text(text)
    return report


def reports_directory() -> Path:
    """Give where files go that are to outlive the machine."""
    return Path(os.environ["AITBC_REPORTS"])


@pytest.fixture
def reports() -> Path:
    """Give the directory for files that are to outlive the machine."""
    return reports_directory()


@pytest.fixture
def count(request: pytest.FixtureRequest) -> Count:
    """Give a chooser of how often: `count(small, full)`."""
    return lambda small, full: full if request.config.getoption("--full") else small


@pytest.fixture
def installed() -> None:
    """Have the node installed, not started."""
    if not CURRENT.exists():
        install("--no-start")


@pytest.fixture
def coordinator(tmp_path: Path) -> Iterator[MockCoordinator]:
    """Give a coordinator."""
    with MockCoordinator(lease_s=120.0, out_dir=tmp_path / "taken") as mock:
        yield mock


@pytest.fixture
def machine(installed: None, coordinator: MockCoordinator) -> Iterator[Machine]:
    """Give the machine with the node configured for `coordinator`, without slots files and not started.

    Afterwards all is stopped, and nothing may be left.
    """
    machine = Machine(coordinator)
    machine.configure()
    yield machine
    machine.clean_up()
    assert machine.remains() == []


@pytest.fixture
def boxed(installed: None, coordinator: MockCoordinator) -> Iterator[BoxedMachine]:
    """Give the machine as `machine` does, with its jobs in the sandbox."""
    machine = BoxedMachine(coordinator)
    machine.configure()
    yield machine
    machine.clean_up()
    assert machine.remains() == []
