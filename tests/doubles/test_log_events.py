"""Log events have one form: lower-case words with single spaces, at most six; see docs/style.md."""

import ast
import re
from pathlib import Path

import pytest

from tools.documents.plain_words import PACKAGE, event_names

NAME = re.compile(r"[a-z]+( [a-z]+){0,5}")


def events(path: Path) -> list[tuple[int, str]]:
    return list(event_names(ast.parse(path.read_text(encoding="utf-8"))))


def test_every_event_has_the_one_form() -> None:
    wrong = [
        f"{path.relative_to(PACKAGE)}:{line}: {name}"
        for path in sorted(PACKAGE.rglob("*.py"))
        for line, name in events(path)
        if not NAME.fullmatch(name)
    ]
    assert wrong == [], "\n".join(wrong)


def test_events_are_found() -> None:
    assert "child died" in {name for _, name in events(PACKAGE / "supervisor" / "loop.py")}
    assert sum(len(events(path)) for path in PACKAGE.rglob("*.py")) > 80


@pytest.mark.parametrize("name", ["report accepted", "stopped", "job not wanted any more"])
def test_the_form_fits(name: str) -> None:
    assert NAME.fullmatch(name)


@pytest.mark.parametrize(
    "name",
    [
        "slots-not-told",
        "Slot lost",
        "slot  lost",
        "slot lost.",
        "lease: lost",
        " slot lost",
        "2 slots lost",
        "",
        "the slot of the job was lost",
    ],
)
def test_other_forms_do_not(name: str) -> None:
    assert not NAME.fullmatch(name)
