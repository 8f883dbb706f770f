"""Patterns for arguments, a bound on the work of matching, and groups of patterns (`args` of an entry).

RE2 matches in time linear in the argument, unlike Python's `re`. `Work` bounds the number of matches. It
counts units and not seconds, so that no verdict depends on the load of the machine.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Protocol

import re2  # type: ignore[import-untyped]  # google-re2 has no types of its own
from msgspec import Struct

from aitbc_miner.errors import brief

MAX_WORK = 1_500_000
"""A unit is one state of a pattern, tried on one byte of an argument: at worst about 5 ns."""
STEP = 250
"""The cost of one step of the search."""
A_MATCH, A_WIDE_MATCH = 600, 1500
"""The cost of one call of RE2, for ASCII and for other text, which RE2 converts first."""
GLANCE = 25
"""The cost of looking up a remembered match."""


class Pattern(Protocol):
    """A compiled RE2 pattern."""

    pattern: str
    programsize: int

    def fullmatch(self, text: str) -> object | None:
        """Match the whole text."""


PatternGroup = Sequence[Pattern]


def parse_pattern(value: object) -> Pattern:
    """Compile a pattern.

    Raises:
        ValueError: the value is not text, or not in RE2's syntax.
    """
    if not isinstance(value, str):
        raise ValueError("must be a pattern in quotes")  # noqa: TRY004  # Parse expects ValueError
    options = re2.Options()
    options.log_errors = False
    # No caller reads capture groups, and finding them takes many times as long.
    options.never_capture = True
    try:
        return re2.compile(value, options)  # type: ignore[no-any-return]
    except re2.error as error:
        reason = error.args[0]
        text = reason.decode(errors="replace") if isinstance(reason, bytes) else str(reason)
        raise ValueError(f"must be a pattern in RE2 syntax: {brief(text)}") from error


class TooMuchWork(Exception):  # noqa: N818  # the name says what happened
    """The arguments cannot be judged within MAX_WORK."""


class Work:
    """Matches patterns for one argument list, remembers the results, and stops at a limit of units."""

    def __init__(self, limit: int = MAX_WORK) -> None:
        self._left = limit
        self._matched: dict[tuple[str, str], bool] = {}

    def spend(self, units: int = STEP) -> None:
        """Account for a step before the caller takes it.

        Raises:
            TooMuchWork: the step exceeds the limit.
        """
        if units > self._left:
            raise TooMuchWork
        self._left -= units

    def fits(self, pattern: Pattern, text: str) -> bool:
        """Whether a pattern fits the whole text.

        Raises:
            TooMuchWork: the match exceeds the limit.
        """
        asked = pattern.pattern, text
        self.spend(GLANCE)
        known = self._matched.get(asked)
        if known is None:
            size, once = (len(text), A_MATCH) if text.isascii() else (4 * len(text), A_WIDE_MATCH)
            self.spend(once + size * pattern.programsize)
            known = self._matched[asked] = pattern.fullmatch(text) is not None
        return known


class Objection(Struct, frozen=True):
    """The reason to deny an argument list.

    `at` is the index of the argument; the number of arguments, if a further argument is missing. `fits`
    describes the permitted arguments at this place. `rule` is the key of the allowlist that denies.
    """

    text: str
    at: int | None = None
    fits: tuple[str, ...] = ()
    rule: str = ""

    def __str__(self) -> str:
        return f"{self.text}; what would fit: {some(self.fits)}" if self.fits else self.text


def some(values: Iterable[str], between: str = ", ", most: int = 12) -> str:
    """Join the first `most` values, each shortened, and count the rest."""
    names = list(dict.fromkeys(values))
    return between.join(brief(name, 200) for name in names[:most]) + (
        f" and {len(names) - most} more" if len(names) > most else ""
    )


def quoted(args: Sequence[str], at: int) -> str:
    """Name an argument by its number and text."""
    return f"argument {at + 1} ({args[at][:60]!r})"


def too_much(rules: str = "rules") -> Objection:
    """Object to arguments that take too much work; `rules` says what they are judged by."""
    return Objection(
        f"checking the arguments takes too much work: too many {rules} fit the same arguments,"
        " or the arguments are too long"
    )


def judge_groups(groups: Sequence[PatternGroup], args: Sequence[str]) -> Objection | None:
    """Object to arguments that cannot be cut into runs of which each fits a group of its own.

    A run fits a group if each argument fits the pattern at its place. Groups may come in any order.
    """
    try:
        return _judge(groups, args, Work())
    except TooMuchWork:
        return too_much("groups")


def _judge(groups: Sequence[PatternGroup], args: Sequence[str], work: Work) -> Objection | None:
    most = sum(map(len, groups))
    if len(args) > most:
        return Objection(
            f"{quoted(args, most)} is one too many; the entry permits at most {most}", most, rule="args"
        )
    matched: list[list[int]] = []
    reached = {0}
    for at in range(len(args)):
        matched.append([_matched(group, args, at, work) for group in groups] if at in reached else [])
        reached |= {at + count for g, count in enumerate(matched[at]) if count == len(groups[g])}
    runs = [[g for g, count in enumerate(row) if count == len(groups[g])] for row in matched]
    # Places from which the rest can be cut if groups may be used again. Few lists fail only because they
    # use a group twice, so most need no search.
    open_ends = {len(args)}
    for at in reversed(range(len(args))):
        if any(at + len(groups[g]) in open_ends for g in runs[at]):
            open_ends.add(at)
    if 0 not in open_ends:
        return _misfit(groups, args, matched)
    return _Search(groups, runs, open_ends, work).objection(args)


def _matched(group: PatternGroup, args: Sequence[str], at: int, work: Work) -> int:
    """Count how many patterns of a group, from the first on, fit the arguments from `at` on."""
    for count, pattern in enumerate(group):
        if at + count == len(args) or not work.fits(pattern, args[at + count]):
            return count
    return len(group)


def _misfit(groups: Sequence[PatternGroup], args: Sequence[str], matched: list[list[int]]) -> Objection:
    """Name the farthest argument at which any cut fails, and the patterns for this place."""
    wanted: dict[int, dict[str, int]] = defaultdict(dict)
    for at in range(len(args)):
        for g, count in enumerate(matched[at]):
            if count < len(groups[g]):
                wanted[at + count].setdefault(repr(groups[g][count].pattern), g)
    farthest = max(wanted)
    fits = tuple(sorted(wanted[farthest]))
    if farthest == len(args):
        text = f"an argument is missing after {quoted(args, farthest - 1)}"
    else:
        text = f"{quoted(args, farthest)} is not allowed at this place"
    groups_there = set(wanted[farthest].values())
    return Objection(
        text, farthest, fits, f"args[{groups_there.pop()}]" if len(groups_there) == 1 else "args"
    )


class _Search:
    """A depth-first search for a cut, at most as deep as the number of groups; it remembers dead ends."""

    def __init__(
        self, groups: Sequence[PatternGroup], runs: list[list[int]], open_ends: set[int], work: Work
    ) -> None:
        self.lengths = [len(group) for group in groups]
        self.runs = runs
        self.open_ends = open_ends
        self.work = work
        self.dead: set[tuple[int, int]] = set()
        self.farthest = 0
        self.twins = self._twins()
        # From a place on, only groups that fit a later run matter: a dead end is remembered by these alone.
        self.useful = [0] * (len(runs) + 1)
        for at in reversed(range(len(runs))):
            self.useful[at] = self.useful[at + 1] | sum(1 << g for g in runs[at])

    def _twins(self) -> list[int]:
        """Give for each group the bit of the latest earlier group with the same length and places, or 0."""
        places: list[list[int]] = [[length] for length in self.lengths]
        for at, fitting in enumerate(self.runs):
            for g in fitting:
                places[g].append(at)
        latest: dict[tuple[int, ...], int] = {}
        twins = []
        for g, where in enumerate(map(tuple, places)):
            twins.append(latest.get(where, 0))
            latest[where] = 1 << g
        return twins

    def objection(self, args: Sequence[str]) -> Objection | None:
        if self.cut(0, 0):
            return None
        text = f"every group that fits {quoted(args, self.farthest)} is already used by another argument"
        return Objection(text, self.farthest, rule="args")

    def cut(self, at: int, used: int) -> bool:
        if at == len(self.runs):
            return True
        self.farthest = max(self.farthest, at)
        here = (at, used & self.useful[at])
        if here in self.dead:
            return False
        for g in self.runs[at]:
            self.work.spend()
            bit, end = 1 << g, at + self.lengths[g]
            # Of twins, only the first free group need be tried.
            if used & bit or self.twins[g] & ~used or end not in self.open_ends:
                continue
            if self.cut(end, used | bit):
                return True
        self.dead.add(here)
        return False
