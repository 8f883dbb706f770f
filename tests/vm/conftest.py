"""The node installed once, and a machine that is as it was after each test."""

import os
import platform
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.vm.boxed import BoxedMachine
from tests.vm.machine import CONTAINER, CURRENT, MAIN, SLOTS, Machine, install, run
from tools.mock.bootstrap.coordinator import MockCoordinator

Count = Callable[[int, int], int]


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add what makes a campaign long, and what makes it the same in both releases."""
    parser.addoption("--full", action="store_true", help="as often as it takes to be sure, which takes hours")
    parser.addoption("--own-kernel", action="store_true", help="without what is tried in a container")
    parser.addoption("--everywhere", action="store_true", help="also what is marked for the other release")


def pytest_configure(config: pytest.Config) -> None:
    """Make the mark known."""
    for mark in (
        "one_release(number, reason): of the machines, runs in this Debian; the reason it is enough",
        "own_kernel(reason): does not run in a container, where the kernel is the host's",
        "smoke: runs in a container, and with a kernel of its own as well",
    ):
        config.addinivalue_line("markers", mark)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what is tried elsewhere, and bring the rest into its order.

    The installer's tests go first: they begin with a machine that has never seen the miner. What compares
    a calm time with a wild one goes last, when the host has the least to do beside it.
    """
    order = {"test_install.py": 0, "test_clock.py": 2}
    items.sort(key=lambda item: order.get(item.path.name, 1))
    left = [item for item in items if not _belongs(item, config)]
    config.hook.pytest_deselected(items=left)
    items[:] = [item for item in items if item not in left]


def _belongs(item: pytest.Item, config: pytest.Config) -> bool:
    own_kernel, smoke, release = map(item.get_closest_marker, ("own_kernel", "smoke", "one_release"))
    if CONTAINER:
        # It is fast, so all of it runs in both releases.
        return not own_kernel
    if config.getoption("--own-kernel") and not (own_kernel or smoke):
        return False
    here = platform.freedesktop_os_release().get("VERSION_ID")
    return config.getoption("--everywhere") or not release or release.args[0] == here


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


@pytest.fixture
def release(machine: Machine) -> Path:
    """Give the file for which long jobs wait."""
    return machine.marks / "release"
