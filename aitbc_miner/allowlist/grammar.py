"""Whether an argument list follows a grammar: a sequence of sections, each with options and then operands.

A list can have several readings: where a section ends, and which operands an argument fills. The reader
follows all readings at once. A reading is known by its section and the argument at which the section begins,
so the work grows with the number of arguments, not of readings. `Work` bounds the work.
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
    """The progress of one reading of a section.

    `at` is the index of the next argument. `used` counts the uses of each option; `last` is the latest one.
    `spots` has each possible place among the operands: the operand's index and how many of it were read.
    `begun` is true once an operand was read.
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
        """Set the spots to these, and to all spots reachable from them without reading an operand."""
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
        """The required options not used yet."""
        options = self.section.options
        return [options[index] for index in self.section.required if not self.used[index]]

    @property
    def complete(self) -> bool:
        """Whether the section may end here."""
        return (len(self.section.operands), 0) in self.spots and not self.lacking

    def refusal(self, index: int) -> str:
        """Give the reason to refuse an option here; empty if the option may come here."""
        option = self.section.options[index]
        if self.section.order != "any" and self.begun:
            return "must come before the operands"
        if self.section.order == "fixed" and index < self.last:
            return f"must come before {self.section.options[self.last].names[0]}"
        if self.used[index] >= option.max:
            return f"may be used only {'once' if option.max == 1 else f'{option.max} times'}"
        for rival in self.section.rivals.get(index, ()):
            if self.used[rival]:
                return f"cannot be used together with {self.section.options[rival].names[0]}"
        return ""

    def expected(self, inputs: InputValue) -> list[str]:
        """Describe the arguments permitted here."""
        options = list(enumerate(self.section.options))
        able = [option.names[0] for index, option in options if not self.refusal(index)]
        operands = [
            self.section.operands[which].describe(inputs)
            for which, count in sorted(self.spots)
            if which < len(self.section.operands) and count < self.section.operands[which].most
        ]
        return [*(option.names[0] for option in self.lacking), *operands, *able]


class ArgumentMisfit(Exception):  # noqa: N818  # the name says what happened
    """The argument at index `at` does not fit this reading.

    `why` is the reason, `rule` the key of the rule; `fits` describes the arguments that the rule permits.
    """

    def __init__(self, at: int, why: str, rule: str, fits: Callable[[], list[str]]) -> None:
        super().__init__(why)
        self.at = at
        self.why = why
        self.rule = rule
        self.fits = fits


def judge_sections(
    sections: Sequence[Section], args: Sequence[str], inputs: InputValue, prefix: str = "sections[{}]."
) -> Objection | None:
    """Object to arguments that do not follow the sections.

    `prefix` is the key of a section in the file, with {} for its index. `inputs` are the job's input names.
    """
    for at, arg in enumerate(args):
        if not arg.isprintable() or len(arg) > MAX_TEXT:
            fault = f"is longer than {MAX_TEXT}" if arg.isprintable() else "has unprintable"
            return Objection(f"{quoted(args, at)} {fault} characters", at)
    reader = Reader(sections, args, inputs, prefix)
    try:
        return None if reader.accepts() else reader.objection()
    except TooMuchWork:
        return too_much()


class Reader:
    """Follows all readings of one argument list."""

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
        """Whether some reading reaches the end of the arguments."""
        reached = {0}
        for k, section in enumerate(self._sections):
            found = set(reached) if section.min == 0 else set()
            for times in range(1, section.most + 1):
                reached = {end for start in reached for end in self._ends(k, start)}
                if times >= section.min:
                    # A reading that came here with fewer repetitions has more repetitions left.
                    reached -= found
                    found |= reached
                if not reached:
                    break
            reached = found
        return len(self._args) in reached

    def objection(self) -> Objection:
        """Name the argument at which the best reading fails, and the arguments permitted there."""
        best = max(self._misfits, key=lambda misfit: bool(misfit.why))
        at = best.at
        readings = [best, *(misfit for misfit in self._misfits if misfit is not best)]
        fits = tuple(dict.fromkeys(word for misfit in readings for word in misfit.fits()))
        rule = best.rule if best.why or len({misfit.rule for misfit in readings}) == 1 else ""
        if at < len(self._args):
            why = best.why or ("is not allowed at this place" if fits else "is one too many")
            return Objection(f"{quoted(self._args, at)} {why}", at, fits, rule)
        last = f" after {quoted(self._args, at - 1)}" if self._args else ""
        return Objection(f"an argument is missing{last}", at, fits, rule)

    def _ends(self, k: int, start: int) -> frozenset[int]:
        """Give the indices at which section `k` may end if it begins at argument `start`."""
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
        """Keep the misfits of the readings that came farthest."""
        farthest = self._misfits[0].at if self._misfits else -1
        if misfit.at > farthest:
            self._misfits = []
        if misfit.at >= farthest and len(self._misfits) < MAX_MISFITS:
            self._misfits.append(misfit)

    def _step(self, place: ArgumentPlace, key: str) -> None:
        """Read an option or an operand.

        Raises:
            ArgumentMisfit: the next argument is neither.
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
                raise ArgumentMisfit(at, "has no value; write the value in the same argument", rule, list)
            at += 1
            value = self._value(at, option.rule, rule)
        if option.rule is not None and value is not None and not self._fits(option.rule, value):
            name = option.names[0]
            raise ArgumentMisfit(
                at, f"is not a value of {name}", f"{rule}.value", partial(self._describe, option.rule)
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
            raise ArgumentMisfit(at, f"is not a value of {name}", f"{key}operands[{which}].value", missing)
        if not spots:
            raise self._stuck(place, key)
        place.settle(spots)
        place.at, place.begun = at + 1, True

    def _value(self, at: int, rule: Value, key: str) -> str:
        """Give the argument at `at` as an option's value.

        Raises:
            ArgumentMisfit: there is no argument, or a program may read it as an option.
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
    """Whether no program reads the value as an option, if the value is a separate argument."""
    return rule.may_begin_with_dash or not value.startswith("-")
