"""A plugin of pytest for `tools/test` that distributes the tests over processes (pytest-xdist)."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start with tests/node, because these tests wait longest."""
    items.sort(key=lambda item: "node" not in item.path.parts)


class Spread(LoadScopeScheduling):  # type: ignore[misc]  # it has no types
    """Gives each test to a free process, but all tests of a module with a shared fixture to one process."""

    def _split_scope(self, nodeid: str) -> str:
        module = nodeid.partition("::")[0]
        return module if _shares(self.config.rootpath / module) else nodeid


# By the text alone: the process that hands out the tests imports none of them.
@cache
def _shares(module: Path) -> bool:
    return 'scope="module"' in module.read_text()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Spread:
    """Make xdist use `Spread`."""
    return Spread(config, log)
