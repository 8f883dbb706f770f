"""Whether an argument list follows a grammar: one section after the other, each options and then operands.

Where a section ends, and which of its operands are there, may be read in several ways. All of them are
followed at once, and which options have been used follows from where a section began. So the work grows with
the arguments, not with the ways to read them, and `Work` bounds it.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial

from aitbc_miner.allowlist.patterns import GLANCE, STEP, Objection, TooMuchWork, Work, quoted, too_much
from aitbc_miner.allowlist.rules import Option, Section
from aitbc_miner.allowlist.values import MAX_TEXT, InputValue, Value

MAX_MISFITS = 16
A_TOKEN = 4 * STEP


class ArgumentPlace:
    """How far one reading of a section has come.

    `at` is the next argument, `used` how often each option is there, `last` the latest of them. `spots` is
    where one may be among the operands: at which, with how many of it so far; `begun` says that there is one.
    """

    def __init__(self, section: Section, at: int) -> None:
        self.section = section
        self.at = at
        self.used: Counter[int] = Counter()
        self.last = 0
        self.begun = False
        self.spots: set[tuple[int, int]] = set()
        self.settle({(0, 0)})

    def settle(self, spots: set[tuple[int, int]]) -> None:
        """Be at these spots, and where one gets from them without another operand."""
        operands = self.section.operands
        self.spots = set(spots)
        waiting = list(spots)
        while waiting:
            which, count = waiting.pop()
            beyond = (which + 1, 0)
            if which < len(operands) and count >= operands[which].min and beyond not in self.spots:
                self.spots.add(beyond)
                waiting.append(beyond)

    @property
    def lacking(self) -> list[Option]:
        """Options that have to be there, and are not."""
        options = self.section.options
        return [options[index] for index in self.section.required if not self.used[index]]

    @property
    def complete(self) -> bool:
        """Whether the section may end here."""
        return (len(self.section.operands), 0) in self.spots and not self.lacking

    def refusal(self, index: int) -> str:
        """Say why an option must not be here; empty when it may."""
        option = self.section.options[index]
        if self.section.order != "any" and self.begun:
            return "must come before the operands"
        if self.section.order == "fixed" and index < self.last:
            return f"must come before {self.section.options[self.last].names[0]}"
        if self.used[index] >= option.max:
            return "is there already" if option.max == 1 else f"may be there {option.max} times"
        for rival in self.section.rivals.get(index, ()):
            if self.used[rival]:
                return f"cannot be used together with {self.section.options[rival].names[0]}"
        return ""

    def expected(self, inputs: InputValue) -> list[str]:
        """Say what could come here."""
        options = list(enumerate(self.section.options))
        able = [option.names[0] for index, option in options if not self.refusal(index)]
        operands = [
            self.section.operands[which].describe(inputs)
            for which, count in sorted(self.spots)
            if which < len(self.section.operands) and count < self.section.operands[which].most
        ]
        return [*(option.names[0] for option in self.lacking), *operands, *able]


class ArgumentMisfit(Exception):  # noqa: N818  # says what it is
    """An argument is not what this reading wants: which one, why, by which rule, and what would be."""

    def __init__(self, at: int, why: str, rule: str, fits: Callable[[], list[str]]) -> None:
        super().__init__(why)
        self.at = at
        self.why = why
        self.rule = rule
        self.fits = fits


def judge_sections(
    sections: Sequence[Section], args: Sequence[str], inputs: InputValue, prefix: str = "sections[{}]."
) -> Objection | None:
    """Object to arguments that are not these sections, one after the other.

    `prefix` is the key of a section in the file, `inputs` are the names of the job's inputs.
    """
    for at, arg in enumerate(args):
        if not arg.isprintable() or len(arg) > MAX_TEXT:
            why = (
                f"is longer than {MAX_TEXT} characters" if arg.isprintable() else "holds a control character"
            )
            return Objection(f"{quoted(args, at)} {why}", at)
    reader = Reader(sections, args, inputs, prefix)
    try:
        return None if reader.accepts() else reader.objection()
    except TooMuchWork:
        return too_much()


class Reader:
    """Reads one argument list in all the ways in which it can be read."""

    def __init__(
        self, sections: Sequence[Section], args: Sequence[str], inputs: InputValue, prefix: str
    ) -> None:
        self._sections = sections
        self._args = args
        self._inputs = inputs
        self._prefix = prefix
        self._work = Work()
        self._misfits: list[ArgumentMisfit] = []
        self._known: dict[tuple[int, int], frozenset[int]] = {}

    def accepts(self) -> bool:
        """Whether there is a way to read all of it."""
        reached = {0}
        for k, section in enumerate(self._sections):
            found = set(reached) if section.min == 0 else set()
            for times in range(1, section.most + 1):
                reached = {end for start in reached for end in self._ends(k, start)}
                if times >= section.min:
                    # Where it has been before with fewer of them, it has more left to use.
                    reached -= found
                    found |= reached
                if not reached:
                    break
            reached = found
        return len(self._args) in reached

    def objection(self) -> Objection:
        """Name the argument up to which the best reading comes, and what it would have had to be."""
        best = max(self._misfits, key=lambda misfit: bool(misfit.why))
        at = best.at
        readings = [best, *(misfit for misfit in self._misfits if misfit is not best)]
        fits = tuple(dict.fromkeys(word for misfit in readings for word in misfit.fits()))
        rule = best.rule if best.why or len({misfit.rule for misfit in readings}) == 1 else ""
        if at < len(self._args):
            why = best.why or ("is not allowed there" if fits else "is one too many: nothing more may follow")
            return Objection(f"{quoted(self._args, at)} {why}", at, fits, rule)
        last = f"after the last {quoted(self._args, at - 1)} another" if self._args else "an argument"
        return Objection(f"{last} is missing", at, fits, rule)

    def _ends(self, k: int, start: int) -> frozenset[int]:
        """Say where one section that begins at an argument may end."""
        self._work.spend()
        if (k, start) not in self._known:
            self._known[k, start] = frozenset(self._walk(k, start))
        return self._known[k, start]

    def _walk(self, k: int, start: int) -> Iterator[int]:
        place = ArgumentPlace(self._sections[k], start)
        key = self._prefix.format(k)
        while True:
            self._work.spend(A_TOKEN + 2 * GLANCE * (len(place.spots) + len(place.section.required)))
            if place.complete:
                yield place.at
            try:
                self._step(place, key)
            except ArgumentMisfit as misfit:
                self._note(misfit)
                return

    def _note(self, misfit: ArgumentMisfit) -> None:
        """Remember those that came farthest."""
        farthest = self._misfits[0].at if self._misfits else -1
        if misfit.at > farthest:
            self._misfits = []
        if misfit.at >= farthest and len(self._misfits) < MAX_MISFITS:
            self._misfits.append(misfit)

    def _step(self, place: ArgumentPlace, key: str) -> None:
        """Read an option or an operand.

        Raises:
            Misfit: it is neither.
        """
        if place.at == len(self._args):
            raise self._stuck(place, key)
        option = place.section.read(self._args[place.at])
        if option is None:
            self._read_operand(place, key)
        else:
            self._read_option(place, key, *option)

    def _stuck(self, place: ArgumentPlace, key: str, why: str = "") -> ArgumentMisfit:
        lists = [name for name in ("operands", "options") if getattr(place.section, name)]
        rule = key.rstrip(".") or next(iter(lists), "")
        return ArgumentMisfit(place.at, why, rule, partial(place.expected, self._inputs))

    def _read_option(self, place: ArgumentPlace, key: str, index: int, written: str | None) -> None:
        option = place.section.options[index]
        rule = f"{key}options[{index}]"
        if why := place.refusal(index):
            raise self._stuck(place, rule, why)
        at, value = place.at, written
        if option.rule is not None and value is None:
            if "separate" not in option.write:
                raise ArgumentMisfit(at, "has no value; it must be written in the same argument", rule, list)
            at += 1
            value = self._value(at, option.rule, rule)
        if option.rule is not None and value is not None and not self._fits(option.rule, value):
            name = option.names[0]
            raise ArgumentMisfit(
                at, f"is no value of {name}", f"{rule}.value", partial(self._describe, option.rule)
            )
        place.at = at + 1
        place.used[index] += 1
        place.last = index

    def _read_operand(self, place: ArgumentPlace, key: str) -> None:
        operands, at = place.section.operands, place.at
        name = self._args[at] if self._args[at] in place.section.words else None
        open_to = {
            (which, count)
            for which, count in place.spots
            if which < len(operands) and operands[which].name == name and count < operands[which].most
        }
        if not open_to:
            raise self._stuck(place, key)
        which = min(open_to)[0]
        missing = partial(self._describe, operands[which].rule)
        if name is not None:
            at += 1
            if at == len(self._args):
                raise ArgumentMisfit(at, "", f"{key}operands[{which}]", missing)
        spots = {
            (which, count + 1)
            for which, count in open_to
            if _stands_alone(operands[which].rule, self._args[at])
            and self._fits(operands[which].rule, self._args[at])
        }
        if not spots and name is not None:
            raise ArgumentMisfit(at, f"is no value of {name}", f"{key}operands[{which}].value", missing)
        if not spots:
            raise self._stuck(place, key)
        place.settle(spots)
        place.at, place.begun = at + 1, True

    def _value(self, at: int, rule: Value, key: str) -> str:
        """Give the argument that is an option's value.

        Raises:
            Misfit: there is none, or it would pass for an option.
        """
        if at == len(self._args):
            raise ArgumentMisfit(at, "", key, partial(self._describe, rule))
        value = self._args[at]
        if not _stands_alone(rule, value):
            raise ArgumentMisfit(at, "begins with a dash", f"{key}.value", partial(self._describe, rule))
        return value

    def _fits(self, rule: Value, value: str) -> bool:
        self._work.spend()
        return rule.kind.fits(value, self._inputs, self._work)

    def _describe(self, rule: Value) -> list[str]:
        return [rule.kind.describe(self._inputs)]


def _stands_alone(rule: Value, value: str) -> bool:
    """Whether a program cannot take a value that is an argument of its own for an option."""
    return rule.may_begin_with_dash or not value.startswith("-")
