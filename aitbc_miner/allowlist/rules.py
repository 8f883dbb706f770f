"""Rules for argument lists as the operator writes them: sections of options and operands."""

from collections import Counter
from functools import cached_property
from typing import Annotated, Literal

from msgspec import Meta, Struct, field

from aitbc_miner.allowlist.values import Choice, FloatRange, InputValue, IntRange, Value, value_of
from aitbc_miner.config.document import BadField

MAX_RULES = 128

Name = Annotated[
    str,
    Meta(
        pattern=r"^[-+][!-<>-~]{1,63}\Z",
        description="an option with its dashes and without `=`, such as --time",
    ),
]
Names = Annotated[list[Name], Meta(min_length=1, max_length=16)]
Written = Value | Literal["input", "output"]
Often = Annotated[int, Meta(ge=1, le=10_000)]


class Option(Struct, frozen=True, dict=True):
    """A flag, or an option with a `value`. `name` may list several spellings."""

    name: Name | Names
    value: Written | None = None
    write: Annotated[list[Literal["separate", "equals", "joined"]], Meta(min_length=1)] = field(
        default_factory=lambda: ["separate"]
    )
    required: bool = False
    max: Often = 1

    def __post_init__(self) -> None:
        if self.value is None and self.write != ["separate"]:
            raise BadField("write", "says how the value is written, but there is no `value`; remove it")
        if "joined" in self.write and any(len(name) != 2 or name[0] != "-" for name in self.names):
            raise BadField(
                "write", "has joined, which is only for names of a dash and one letter, such as -t"
            )

    @property
    def names(self) -> list[str]:
        """All spellings of the option."""
        return [self.name] if isinstance(self.name, str) else self.name

    @cached_property
    def rule(self) -> Value | None:
        """The rule for the option's value; None for a flag."""
        return None if self.value is None else value_of(self.value)


class Operand(Struct, frozen=True, dict=True):
    """A positional argument; with `name`, a fixed word that precedes each value."""

    value: Written
    name: Name | None = None
    min: Annotated[int, Meta(ge=0, le=10_000)] = 1
    max: Often | None = None

    def __post_init__(self) -> None:
        if self.max is not None and self.max < self.min:
            raise BadField("max", f"{self.max} is below min ({self.min}); nothing could fit")
        kind = self.rule.kind
        if self.name is None and isinstance(kind, IntRange | FloatRange) and kind.min < 0:
            raise BadField("value", "may be negative, and a program would read -5 as an option; add a `name`")
        if (
            self.name is None
            and isinstance(kind, Choice)
            and any(len(word) > 1 and word[0] == "-" for word in kind.words)
        ):
            raise BadField("value", "has a word that begins with a dash; make the word an option")

    @cached_property
    def rule(self) -> Value:
        """The rule for the operand's value."""
        return value_of(self.value)

    @property
    def most(self) -> int:
        """The largest number of such operands in a row."""
        return max(1, self.min) if self.max is None else self.max

    def describe(self, inputs: InputValue) -> str:
        """Describe the operand for a message."""
        what = self.rule.kind.describe(inputs)
        return f"{self.name} with {what}" if self.name else what


class Section(Struct, frozen=True, dict=True):
    """Options, then operands. An argument list has `min` to `max` such sections in a row."""

    name: Annotated[str, Meta(min_length=1, max_length=60)] | None = None
    options: Annotated[list[Option], Meta(max_length=MAX_RULES)] = []
    operands: Annotated[list[Operand], Meta(max_length=MAX_RULES)] = []
    order: Literal["options_first", "fixed", "any"] = "options_first"
    exclusive: list[Names] = []
    min: Annotated[int, Meta(ge=0, le=1000)] = 0
    max: Annotated[int, Meta(ge=1, le=1000)] | None = None

    def __post_init__(self) -> None:
        if self.max is not None and self.max < self.min:
            raise BadField("max", f"{self.max} is below min ({self.min}); nothing could fit")
        names = [name for option in self.options for name in option.names]
        if twice := [name for name, count in Counter(names).items() if count > 1]:
            raise BadField("options", f"has {twice[0]} twice; remove one of the two")
        for operand in self.operands:
            if operand.name in names:
                raise BadField("operands", f"has {operand.name}, an option as well; remove one of the two")
        for name in (name for names_of_one in self.exclusive for name in names_of_one):
            if name not in names:
                raise BadField("exclusive", f"names {name}, but the section has no such option")

    @property
    def most(self) -> int:
        """How often the section may be repeated."""
        return max(1, self.min) if self.max is None else self.max

    @cached_property
    def required(self) -> tuple[int, ...]:
        """The indices of the required options."""
        return tuple(index for index, option in enumerate(self.options) if option.required)

    @cached_property
    def words(self) -> frozenset[str]:
        """The names of operands. A name is never read as the value of an operand."""
        return frozenset(operand.name for operand in self.operands if operand.name)

    @cached_property
    def _written(self) -> dict[str, dict[str, int]]:
        """The index of each option, by way of writing and by name."""
        ways: dict[str, dict[str, int]] = {"whole": {}, "equals": {}, "joined": {}}
        for index, option in enumerate(self.options):
            ways["whole"] |= dict.fromkeys(option.names, index)
            for way in option.write:
                ways.setdefault(way, {}).update(dict.fromkeys(option.names, index))
        return ways

    @cached_property
    def rivals(self) -> dict[int, set[int]]:
        """For each option, the options that exclude it."""
        found: dict[int, set[int]] = {}
        for names in self.exclusive:
            together = {self._written["whole"][name] for name in names}
            for index in together:
                found[index] = found.get(index, set()) | together - {index}
        return found

    def read(self, arg: str) -> tuple[int, str | None] | None:
        """Split an argument into an option's index and its value; None if the argument is no option.

        The value is None unless the argument itself holds the value, as in --time=5.
        """
        if arg in self._written["whole"]:
            return self._written["whole"][arg], None
        name, equals, value = arg.partition("=")
        if equals and name in self._written["equals"]:
            return self._written["equals"][name], value
        if len(arg) > 2 and arg[:2] in self._written["joined"]:
            return self._written["joined"][arg[:2]], arg[2:]
        return None
