"""A plugin of pytest, for `tools/test`: how the tests are spread over several processes."""

import pytest


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the nodes, which wait most, and leave together what shares a fixture beyond one test."""
    items.sort(key=lambda item: "process" not in item.path.parts)
    for item in items:
        if _shares(item):
            item.add_marker(pytest.mark.xdist_group(item.path.stem))


def _shares(item: pytest.Item) -> bool:
    # Those of pytest itself have no base, and each process may have its own.
    fixtures = item._fixtureinfo.name2fixturedefs.values() if isinstance(item, pytest.Function) else ()  # noqa: SLF001
    return any(each.scope != "function" and each.baseid for defined in fixtures for each in defined)
