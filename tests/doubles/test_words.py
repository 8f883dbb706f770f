"""The share of words that stand for others, in a small tree."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tools.documents import plain_words
from tools.documents.plain_words import CHECKOUT, Share, Text

MOST = 6.0
"""Percent of pronouns and fillers, see docs/style.md."""

MODULE = '''"""It is what it is."""

LIMIT = 3
"""That of jobs."""


class Slot:
    """A slot takes one job."""

    name: str
    """The slot's name."""

    def free(self) -> None:
        """Free those slots."""
        text = "it is no docstring"
        log.info("slot freed", note="this slot")
        events("agent").warning("slot lost" if self else "slot kept")
        parser.error("it is no event")
        raise SlotError(f"cannot free {self.name}: what holds it stays")

    def take(self) -> None:
        raise Busy("cannot take the job")
'''


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    tree = tmp_path / "tree"
    (tree / "slots").mkdir(parents=True)
    (tree / "slots" / "state.py").write_text(MODULE)
    (tree / "node.py").write_text('"""Starts the node\'s processes."""\n')
    return tree


def test_docstrings_of_modules_classes_functions_and_attributes_are_read(tree: Path) -> None:
    assert list(plain_words.texts(tree)) == [
        Text(plain_words.BESIDE, "tree/node.py:1", "Starts the node's processes."),
        Text("slots", "tree/slots/state.py:1", "It is what it is."),
        Text("slots", "tree/slots/state.py:4", "That of jobs."),
        Text("slots", "tree/slots/state.py:8", "A slot takes one job."),
        Text("slots", "tree/slots/state.py:11", "The slot's name."),
        Text("slots", "tree/slots/state.py:14", "Free those slots."),
    ]


def test_messages_are_what_exceptions_and_events_are_given(tree: Path) -> None:
    assert [each.text for each in plain_words.texts(tree, messages=True)] == [
        "slot freed",
        "this slot",
        "slot lost",
        "slot kept",
        "cannot free  : what holds it stays",
        "cannot take the job",
    ]


def test_events_are_named_by_their_first_argument() -> None:
    names = [name for _, name in plain_words.event_names(ast.parse(MODULE))]
    assert names == ["slot freed", "slot lost", "slot kept"]


def test_stand_ins_are_counted_in_any_case_and_as_whole_words() -> None:
    assert plain_words.count(["It is what it is."]) == Share(3, 5)
    assert plain_words.count(["Its item, that's all; ONE-one"]) == Share(2, 6)
    assert plain_words.count([]).percent == 0


def test_the_share_of_a_tree_is_of_all_its_words_together(tree: Path) -> None:
    assert plain_words.share(tree) == pytest.approx(100 * 6 / 23)
    assert plain_words.share(tree, messages=True) == pytest.approx(100 * 3 / 18)


def test_the_report_has_packages_the_total_and_the_worst(tree: Path) -> None:
    lines = list(plain_words.report(list(plain_words.texts(tree)), worst=1))
    assert [line.split() for line in lines[:4]] == [
        ["package", "stand-ins", "words", "share"],
        ["slots", "6", "19", "31.6", "%"],
        ["(modules)", "0", "4", "0.0", "%"],
        ["total", "6", "23", "26.1", "%"],
    ]
    assert lines[4:] == ["", "tree/slots/state.py:1: 60 % of 5 words", "    It is what it is."]


@pytest.mark.parametrize(("most", "status"), [("30", 0), ("20", 1)])
def test_the_command_fails_above_a_limit(tree: Path, most: str, status: int) -> None:
    words: list[str | Path] = [CHECKOUT / "tools/words", "--most", most, tree]
    done = subprocess.run(
        words,
        capture_output=True,
        text=True,
        check=False,
        env={"PYTHON": sys.executable, "PATH": "/usr/bin:/bin"},
    )
    assert done.returncode == status, done.stderr
    assert "26.1 %" in done.stdout


@pytest.mark.parametrize("messages", [False, True])
def test_the_product_speaks_in_plain_words(messages: bool) -> None:
    assert plain_words.share(messages=messages) <= MOST
