"""A coordinator, and nodes that leave nothing behind."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.node.bench import Bench
from tests.node.harness import Node
from tools.mock.bootstrap.coordinator import MockCoordinator

NodeFactory = Callable[..., Node]


@pytest.fixture
def coordinator() -> Iterator[MockCoordinator]:
    """Give a coordinator that hands a job out again soon when its node has forgotten it."""
    with MockCoordinator(lease_s=3.0) as mock:
        yield mock


@pytest.fixture
def node_factory(coordinator: MockCoordinator) -> Iterator[NodeFactory]:
    """Give a maker of nodes that are not started yet: number of slots or their rows, and changes to config.

    `base_url` is that of the fixture `coordinator` unless given. All are ended after the test.
    """
    made: list[Node] = []

    def make(slots: int | list[dict[str, Any]] = 1, *, base_url: str | None = None, **changes: Any) -> Node:
        made.append(Node(base_url or coordinator.url, slots, **changes))
        return made[-1]

    yield make
    for node in made:
        node.clean_up()
        shutil.rmtree(node.directory)


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(tmp_path)
    yield bench
    bench.stop()
