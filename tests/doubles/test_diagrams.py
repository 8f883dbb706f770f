"""The diagrams in docs/architecture.md are those of the tables in the code."""

from enum import Enum

import pytest

from tools.documents import state_diagrams
from tools.documents.state_diagrams import DIAGRAMS, Diagram, DiagramError


class Light(Enum):
    RED = "red"
    GREEN = "green"
    OFF = "off"


MOVES = {
    Light.RED: frozenset({Light.OFF, Light.GREEN}),
    Light.GREEN: frozenset({Light.RED}),
    Light.OFF: frozenset[Light](),
}
NO_TABLE = "red"
LIGHT = Diagram("light", __name__, "MOVES")
DRAWN = """<!-- diagram: light -->
```mermaid
stateDiagram-v2
    [*] --> RED
    RED --> GREEN
    RED --> OFF
    GREEN --> RED
    OFF --> [*]
```
<!-- /diagram -->"""
OLD = "before\n<!-- diagram: light -->\nold\n<!-- /diagram -->\nafter\n"


def test_the_page_has_the_tables_of_the_code() -> None:
    old = state_diagrams.check(state_diagrams.PAGE.read_text(encoding="utf-8"))
    assert old == [], "run tools/diagrams"


def test_a_diagram_has_all_moves_in_the_order_of_the_states() -> None:
    assert state_diagrams.redrawn(OLD, (LIGHT,)) == f"before\n{DRAWN}\nafter\n"


def test_an_old_diagram_is_named() -> None:
    assert state_diagrams.check(OLD, (LIGHT,)) == ["light"]
    assert state_diagrams.check(DRAWN, (LIGHT,)) == []


@pytest.mark.parametrize("page", ["", OLD.replace("light", "lamp"), OLD + OLD])
def test_a_diagram_has_one_place(page: str) -> None:
    with pytest.raises(DiagramError, match="the page has places for"):
        state_diagrams.redrawn(page, (LIGHT,))


@pytest.mark.parametrize("module", [__name__, "aitbc_miner.no_such_module"])
@pytest.mark.parametrize("attribute", ["NO_TABLE", "GONE"])
def test_what_is_no_table_is_named(module: str, attribute: str) -> None:
    with pytest.raises(DiagramError, match="cannot draw light"):
        Diagram("light", module, attribute).table()


def test_every_state_of_a_table_has_its_moves() -> None:
    for each in DIAGRAMS:
        table = each.table()
        assert set(table) == set(type(next(iter(table)))), each.name
