"""Patterns for arguments, what judging by them may cost, and the allowlist's short form: groups of patterns.

Patterns are RE2's, which matches in time linear in the argument; Python's own `re` cannot promise that. What
is left is bounded by `Work`, which counts before it matches: no answer depends on how busy the machine is.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Protocol

import re2  # type: ignore[import-untyped]  # google-re2 has no types of its own
from msgspec import Struct

from aitbc_miner.errors import brief

MAX_WORK = 1_500_000
"""In units of about 5 ns at worst: one state of a pattern, tried on one byte of an argument."""
STEP = 250
"""What a step of ours costs."""
A_MATCH, A_WIDE_MATCH = 600, 1500
"""What it costs to ask RE2 at all; it converts what is not ASCII."""
GLANCE = 25
"""What it costs to look up what is known already."""


class Pattern(Protocol):
    """A compiled pattern, as far as it is used here."""

    pattern: str
    programsize: int

    def fullmatch(self, text: str) -> object | None:
        """Match the whole text."""
        ...


PatternGroup = Sequence[Pattern]


def parse_pattern(value: object) -> Pattern:
    """Compile a pattern.

    Raises:
        ValueError: it is no text, or not in RE2's syntax.
    """
    if not isinstance(value, str):
        raise ValueError("must be a pattern; put it in quotes")  # noqa: TRY004  # what Parse asks for
    options = re2.Options()
    options.log_errors = False
    # Only whether it fits is asked; finding out which part fits which bracket takes many times as long.
    options.never_capture = True
    try:
        return re2.compile(value, options)  # type: ignore[no-any-return]
    except re2.error as error:
        reason = error.args[0]
        text = reason.decode(errors="replace") if isinstance(reason, bytes) else str(reason)
        raise ValueError(f"must be a pattern in RE2 syntax: {brief(text)}") from error


class TooMuchWork(Exception):  # noqa: N818  # says what it is
    """The arguments cannot be judged within MAX_WORK."""


class Work:
    """Does all that an argument list can make us do, and ends it when it is too much."""

    def __init__(self, limit: int = MAX_WORK) -> None:
        self._left = limit
        self._matched: dict[tuple[str, str], bool] = {}

    def spend(self, units: int = STEP) -> None:
        """Account for something that is about to be done.

        Raises:
            TooMuchWork: too much has been done already.
        """
        if units > self._left:
            raise TooMuchWork
        self._left -= units

    def fits(self, pattern: Pattern, text: str) -> bool:
        """Whether a pattern fits the whole text.

        Raises:
            TooMuchWork: that could take too long.
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
    """Why an argument list is not allowed: a sentence, the argument's index (their number: one is missing).

    `fits` is what would have been allowed there, `rule` the key in the file that does not allow it.
    """

    text: str
    at: int | None = None
    fits: tuple[str, ...] = ()
    rule: str = ""

    def __str__(self) -> str:
        return f"{self.text}; what would fit: {some(self.fits)}" if self.fits else self.text


def some(values: Iterable[str], between: str = ", ", most: int = 12) -> str:
    """Name a few of many, each of them in brief."""
    names = list(dict.fromkeys(values))
    return between.join(brief(name, 200) for name in names[:most]) + (
        f" and {len(names) - most} more" if len(names) > most else ""
    )


def quoted(args: Sequence[str], at: int) -> str:
    """Name an argument in a sentence."""
    return f"argument {at + 1} ({args[at][:60]!r})"


def too_much(limit: str = "too many of its rules fit the same arguments, or they are too long") -> Objection:
    """Object to arguments that cannot be judged in time."""
    return Objection(f"its arguments cannot be judged within the work that is allowed: {limit}")


def judge_groups(groups: Sequence[PatternGroup], args: Sequence[str]) -> Objection | None:
    """Object to arguments that cannot be cut into runs that fit.

    Each run must fit one group, pattern for pattern, each group may be used once, in any order.
    """
    try:
        return _judge(groups, args, Work())
    except TooMuchWork:
        return too_much("too many of its groups fit the same arguments, or they are too long")


def _judge(groups: Sequence[PatternGroup], args: Sequence[str], work: Work) -> Objection | None:
    most = sum(map(len, groups))
    if len(args) > most:
        return Objection(
            f"{quoted(args, most)} is one too many; at most {most} can be allowed", most, rule="args"
        )
    matched: list[list[int]] = []
    reached = {0}
    for at in range(len(args)):
        matched.append([_matched(group, args, at, work) for group in groups] if at in reached else [])
        reached |= {at + count for g, count in enumerate(matched[at]) if count == len(groups[g])}
    runs = [[g for g, count in enumerate(row) if count == len(groups[g])] for row in matched]
    # Where the rest could be cut if groups could be used again. Few lists fail only for using one twice,
    # so most searches end here, without a search.
    open_ends = {len(args)}
    for at in reversed(range(len(args))):
        if any(at + len(groups[g]) in open_ends for g in runs[at]):
            open_ends.add(at)
    if 0 not in open_ends:
        return _misfit(groups, args, matched)
    return _Search(groups, runs, open_ends, work).objection(args)


def _matched(group: PatternGroup, args: Sequence[str], at: int, work: Work) -> int:
    """Count the patterns of a group, from its first on, that fit the arguments from `at` on."""
    for count, pattern in enumerate(group):
        if at + count == len(args) or not work.fits(pattern, args[at + count]):
            return count
    return len(group)


def _misfit(groups: Sequence[PatternGroup], args: Sequence[str], matched: list[list[int]]) -> Objection:
    """Name the farthest argument that some cut arrives at, and what it would have had to be."""
    wanted: dict[int, dict[str, int]] = defaultdict(dict)
    for at in range(len(args)):
        for g, count in enumerate(matched[at]):
            if count < len(groups[g]):
                wanted[at + count].setdefault(repr(groups[g][count].pattern), g)
    farthest = max(wanted)
    fits = tuple(sorted(wanted[farthest]))
    if farthest == len(args):
        text = f"after the last {quoted(args, farthest - 1)} another is missing"
    else:
        text = f"{quoted(args, farthest)} is not allowed there"
    groups_there = set(wanted[farthest].values())
    return Objection(
        text, farthest, fits, f"args[{groups_there.pop()}]" if len(groups_there) == 1 else "args"
    )


class _Search:
    """Depth first, at most as deep as there are groups; dead ends are remembered."""

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
        # A group that fits nothing further on makes no difference there, used or not.
        self.useful = [0] * (len(runs) + 1)
        for at in reversed(range(len(runs))):
            self.useful[at] = self.useful[at + 1] | sum(1 << g for g in runs[at])

    def _twins(self) -> list[int]:
        """Give for each group the bit of the one before that fits in all the same places, or 0."""
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
            # Of groups that are alike here, only the first that is free need be tried.
            if used & bit or self.twins[g] & ~used or end not in self.open_ends:
                continue
            if self.cut(end, used | bit):
                return True
        self.dead.add(here)
        return False
