"""Counts words that stand for others ("it", "that", …) in docstrings and messages; see docs/style.md.

A sentence that is full of them leaves its reader to find out what they stand for. Needs no library.
"""

import argparse
import ast
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

CHECKOUT = Path(__file__).resolve().parents[2]
PACKAGE = CHECKOUT / "aitbc_miner"
STAND_INS = frozenset(
    "it that which what who whom whose one ones such another these those this there".split()  # noqa: SIM905
)
WORD = re.compile(r"[A-Za-z']+")
LEVELS = frozenset({"debug", "info", "warning", "error", "exception"})
LOGGERS = frozenset({"log", "_log", "events", "_events"})
# In the table of packages: modules that are in none.
BESIDE = "(modules)"

Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


class Text(NamedTuple):
    """A docstring or message: `where` is its `file:line`, relative to the tree that was read."""

    package: str
    where: str
    text: str


class Share(NamedTuple):
    """How many of some words are stand-ins."""

    stand_ins: int = 0
    words: int = 0

    @property
    def percent(self) -> float:
        """Stand-ins in percent of all words; 0.0 without words."""
        return 100 * self.stand_ins / self.words if self.words else 0.0

    def __add__(self, other: "Share") -> "Share":  # type: ignore[override]
        """Take both texts together."""
        return Share(self.stand_ins + other.stand_ins, self.words + other.words)


def count(texts: Iterable[str]) -> Share:
    """Count the words of all texts together."""
    words = [word.lower() for text in texts for word in WORD.findall(text)]
    return Share(sum(word in STAND_INS for word in words), len(words))


def share(tree: Path = PACKAGE, *, messages: bool = False) -> float:
    """Give the stand-ins in percent of all words of the docstrings below `tree`, or of its messages."""
    return count(each.text for each in texts(tree, messages=messages)).percent


def texts(tree: Path, *, messages: bool = False) -> Iterator[Text]:
    """Yield the docstrings of all modules below `tree`, or their messages.

    Raises:
        SyntaxError: a module is no Python.
    """
    for path in sorted(tree.rglob("*.py")):
        name = path.relative_to(tree)
        package = name.parts[0] if len(name.parts) > 1 else BESIDE
        module = ast.parse(path.read_text(encoding="utf-8"), str(path))
        for line, text in said(module) if messages else docstrings(module):
            yield Text(package, f"{tree.name}/{name}:{line}", text)


def docstrings(module: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield line and text of the docstrings of a module, its classes, functions and attributes."""
    for node in ast.walk(module):
        if not isinstance(node, Documented):
            continue
        # The first statement is the node's docstring; a string after an assignment is the attribute's.
        before: ast.stmt | None = None
        for statement in node.body:
            if (before is None or isinstance(before, ast.Assign | ast.AnnAssign)) and (
                isinstance(statement, ast.Expr)
                and isinstance(statement.value, ast.Constant)
                and isinstance(statement.value.value, str)
            ):
                yield statement.lineno, statement.value.value
            before = statement


def said(module: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield line and text of the strings that exceptions and log events are given."""
    raised = [node.exc for node in ast.walk(module) if isinstance(node, ast.Raise)]
    for node in ast.walk(module):
        if isinstance(node, ast.Call) and (node in raised or is_error(node) or is_event(node)):
            given = [*node.args, *(keyword.value for keyword in node.keywords)]
            for value in given:
                yield from ((value.lineno, text) for text in literals(value))


def is_error(call: ast.Call) -> bool:
    """Whether a call makes an exception, by its name: `OSError`, `errors.MinerError`."""
    return last_name(call.func).endswith(("Error", "Exception"))


def is_event(call: ast.Call) -> bool:
    """Whether a call writes a log event: a method named as a level, of a logger of `util.log.events`."""
    return (
        isinstance(call.func, ast.Attribute)
        and call.func.attr in LEVELS
        and last_name(call.func.value) in LOGGERS
    )


def last_name(node: ast.expr) -> str:
    """Give the last part of a dotted name, or of the function that is called; "" for other expressions."""
    if isinstance(node, ast.Call):
        return last_name(node.func)
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else ""


def literals(value: ast.expr) -> Iterator[str]:
    """Yield the strings written in an expression: of an f-string its fixed parts, of a conditional both."""
    if isinstance(value, ast.Constant) and isinstance(value.value, str):
        yield value.value
    elif isinstance(value, ast.JoinedStr):
        # One text, so that a word that a field cuts in two counts as two.
        yield " ".join(
            part.value
            for part in value.values
            if isinstance(part, ast.Constant) and isinstance(part.value, str)
        )
    elif isinstance(value, ast.IfExp):
        yield from literals(value.body)
        yield from literals(value.orelse)
    elif isinstance(value, ast.BinOp):
        yield from literals(value.left)
        yield from literals(value.right)


def event_names(module: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield line and name of the log events that a module writes; a name made at run time is left out."""
    for node in ast.walk(module):
        if isinstance(node, ast.Call) and is_event(node) and node.args:
            yield from ((node.lineno, text) for text in literals(node.args[0]))


def report(found: list[Text], worst: int) -> Iterator[str]:
    """Yield the lines of the report: a table by package, the total, then the `worst` texts of all."""
    packages: dict[str, list[str]] = {}
    for each in found:
        packages.setdefault(each.package, []).append(each.text)
    yield f"{'package':<14}{'stand-ins':>10}{'words':>8}{'share':>8}"
    shares = {package: count(parts) for package, parts in packages.items()}
    for package, part in sorted(shares.items(), key=lambda item: -item[1].percent):
        yield row(package, part)
    yield row("total", sum(shares.values(), Share()))
    ranked = sorted(found, key=lambda each: -count([each.text]).percent)
    for each in ranked[:worst]:
        part = count([each.text])
        yield ""
        yield f"{each.where}: {part.percent:.0f} % of {part.words} words"
        yield f"    {' '.join(each.text.split())}"


def row(name: str, part: Share) -> str:
    """Make one row of the table."""
    return f"{name:<14}{part.stand_ins:>10}{part.words:>8}{part.percent:>6.1f} %"


def main() -> int:
    """Print the report; the exit status is 1 if a limit was given and the total is above it."""
    parser = argparse.ArgumentParser(prog="tools/words", description=__doc__)
    parser.add_argument("tree", nargs="?", type=Path, default=PACKAGE, help="default: aitbc_miner")
    parser.add_argument(
        "--worst", type=int, default=0, metavar="N", help="also the N texts with the highest share"
    )
    parser.add_argument(
        "--messages", action="store_true", help="not docstrings: what exceptions and log events are given"
    )
    parser.add_argument("--most", type=float, metavar="PERCENT", help="exit with 1 if the total is above it")
    options = parser.parse_args()
    found = list(texts(options.tree.resolve(), messages=options.messages))
    print("\n".join(report(found, options.worst)))
    total = count(each.text for each in found).percent
    return int(options.most is not None and total > options.most)


if __name__ == "__main__":
    sys.exit(main())
