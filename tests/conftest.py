"""What tests of several packages use, and which tests belong together: the tiers."""

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from aitbc_miner.store.records import Records
from tests.support.stopped_clock import Time

HERE = Path(__file__).parent
# Which tier the tests of a directory are in; pyproject.toml says how long each may take.
TIERS = {
    "unit": "unit",
    "machine": "unit",
    "doubles": "unit",
    "node": "node",
    "fuzz": "fuzz",
    "vm": "vm",
}


# First, so that `-m unit` finds the marks.
@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark each test with its tier."""
    for item in items:
        item.add_marker(TIERS[item.path.relative_to(HERE).parts[0]])


@pytest.fixture
def time(monkeypatch: pytest.MonkeyPatch) -> Time:
    """Give the boot-time clock, which stands still until it is moved."""
    return Time(monkeypatch)


@pytest.fixture
def records(tmp_path: Path) -> Records:
    """Give a place for the records of jobs, with none in it."""
    return Records(tmp_path)


@pytest.fixture
def usual_umask() -> Iterator[None]:
    """Have the umask of most machines, whatever this one's."""
    before = os.umask(0o022)
    yield
    os.umask(before)


@pytest.fixture
def log() -> Iterator[list[logging.LogRecord]]:
    """Give what the heartbeat process logs."""
    records: list[logging.LogRecord] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            records.append(record)

    logger, handler = logging.getLogger("aitbc_miner.heartbeat"), Keep()
    level = logger.level
    logger.setLevel("DEBUG")
    logger.addHandler(handler)
    yield records
    logger.removeHandler(handler)
    logger.setLevel(level)
