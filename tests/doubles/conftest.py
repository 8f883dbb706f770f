"""Both doubles of a coordinator, and who speaks with them."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tools.mock.aitbc.client import Miner
from tools.mock.aitbc.coordinator import MockAitbc
from tools.mock.bootstrap.client import Client
from tools.mock.bootstrap.coordinator import MockCoordinator

DATA = bytes(range(256)) * 400


@pytest.fixture
def mock(tmp_path: Path) -> Iterator[MockCoordinator]:
    """Give the double of dialect `bootstrap`; it serves DATA as `in.bin`."""
    files = tmp_path / "files"
    files.mkdir()
    (files / "in.bin").write_bytes(DATA)
    with MockCoordinator(files_dir=files, out_dir=tmp_path / "out") as coordinator:
        yield coordinator


@pytest.fixture
def node(mock: MockCoordinator) -> Iterator[Client]:
    with Client(mock) as client:
        yield client


@pytest.fixture
def double() -> Iterator[MockAitbc]:
    """Give the double of dialect `aitbc-v1`."""
    with MockAitbc(rate_limits=False) as double:
        yield double


@pytest.fixture
def miner(double: MockAitbc) -> Iterator[Miner]:
    with Miner(double) as made:
        yield made
