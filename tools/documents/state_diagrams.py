"""Draws the tables of states in the code as mermaid diagrams, in docs/architecture.md.

A diagram stands between `<!-- diagram: NAME -->` and `<!-- /diagram -->`; the rest of the page is left alone.
"""

import argparse
import importlib
import re
import sys
from collections.abc import Iterator, Mapping
from enum import Enum
from pathlib import Path
from typing import NamedTuple

CHECKOUT = Path(__file__).resolve().parents[2]
PAGE = CHECKOUT / "docs/architecture.md"
BLOCK = re.compile(r"(<!-- diagram: (?P<name>[\w-]+) -->\n).*?(<!-- /diagram -->)", re.DOTALL)
COMMAND = "tools/diagrams"

Moves = Mapping[Enum, frozenset[Enum]]


class Diagram(NamedTuple):
    """A table `dict[Enum, frozenset[Enum]]` of the states that may follow each state, the start first."""

    name: str
    module: str
    attribute: str

    def table(self) -> Moves:
        """Import the table.

        Raises:
            DiagramError: the module has no such attribute, or the attribute is no table of states.
        """
        try:
            table = getattr(importlib.import_module(self.module), self.attribute)
        except (ImportError, AttributeError) as error:
            raise DiagramError(f"cannot draw {self.name}: {error}") from None
        if not isinstance(table, dict) or not all(isinstance(state, Enum) for state in table):
            raise DiagramError(
                f"cannot draw {self.name}: {self.module}.{self.attribute} is no dict[Enum, frozenset[Enum]]"
            )
        return table


DIAGRAMS = (
    Diagram("slot", "aitbc_miner.slots.state", "MOVES"),
    Diagram("job", "aitbc_miner.jobs", "MOVES"),
    Diagram("agent", "aitbc_miner.agent.job_table", "MOVES"),
)


class DiagramError(Exception):
    """A table or its place in the page is missing."""


def draw(table: Moves) -> str:
    """Draw a table as a mermaid `stateDiagram-v2`; states and moves stand in the order of the enum."""
    return "\n".join(["```mermaid", "stateDiagram-v2", *(f"    {line}" for line in arrows(table)), "```", ""])


def arrows(table: Moves) -> Iterator[str]:
    """Yield the arrows: into the first state, for each move, and out of each state without a move."""
    first = next(iter(table))
    order = list(type(first))
    yield f"[*] --> {first.name}"
    for state in sorted(table, key=order.index):
        for following in sorted(table[state], key=order.index):
            yield f"{state.name} --> {following.name}"
        if not table[state]:
            yield f"{state.name} --> [*]"


def redrawn(page: str, diagrams: tuple[Diagram, ...] = DIAGRAMS) -> str:
    """Give the page with each diagram as its table has it now.

    Raises:
        DiagramError: a diagram has no place in the page, or a place has no diagram.
    """
    places = [match["name"] for match in BLOCK.finditer(page)]
    names = [each.name for each in diagrams]
    if sorted(places) != sorted(names):
        raise DiagramError(
            f"cannot draw: the page has places for {', '.join(places) or 'no diagram'}, "
            f"and the tables are {', '.join(names)}; write <!-- diagram: NAME --> and <!-- /diagram --> "
            f"where a diagram is to stand, and name its table in tools/documents/state_diagrams.py"
        )
    drawn = {each.name: draw(each.table()) for each in diagrams}
    return BLOCK.sub(lambda match: f"{match[1]}{drawn[match['name']]}{match[3]}", page)


def check(page: str, diagrams: tuple[Diagram, ...] = DIAGRAMS) -> list[str]:
    """Name the diagrams of the page that differ from their tables."""
    now = dict(blocks(redrawn(page, diagrams)))
    return [name for name, block in blocks(page) if block != now[name]]


def blocks(page: str) -> Iterator[tuple[str, str]]:
    """Yield name and text of each diagram in a page."""
    yield from ((match["name"], match[0]) for match in BLOCK.finditer(page))


def main() -> int:
    """Draw the diagrams, or say which of them are old; the exit status is 1 if one is, or cannot be drawn."""
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; fail if a diagram is old")
    options = parser.parse_args()
    page = PAGE.read_text(encoding="utf-8")
    try:
        old = check(page)
        if old and not options.check:
            PAGE.write_text(redrawn(page), encoding="utf-8")
            print(f"drawn in {PAGE.relative_to(CHECKOUT)}: {', '.join(old)}")
            return 0
    except DiagramError as error:
        print(error, file=sys.stderr)
        return 1
    for name in old:
        print(
            f"{PAGE.relative_to(CHECKOUT)}: the diagram {name} differs from its table; run {COMMAND}",
            file=sys.stderr,
        )
    return int(bool(old))


if __name__ == "__main__":
    sys.exit(main())
