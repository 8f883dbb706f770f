"""Rules for the values of options and operands: numbers, words, patterns, files of the job, texts.

In YAML a rule is a mapping with one key, `{int: {min: 0, max: 51}}`, or the bare word `input` or `output`.
Each kind of rule has `fits`, to judge a text, and `describe`, to name the permitted texts.
"""

import re
from collections.abc import Collection
from decimal import Decimal
from functools import cached_property
from itertools import islice
from typing import Annotated, Literal

import msgspec
from msgspec import Meta, Struct

from aitbc_miner.allowlist.patterns import Pattern, Work, parse_pattern, some
from aitbc_miner.config.document import BadField, Parse

MAX_TEXT = 4096
"""The most characters of one argument."""
MAX_NAME = 255
MAX_DEPTH = 8
MAX_SHOWN = 100

_INT = re.compile(r"-?(0|[1-9][0-9]{0,18})", re.ASCII)
_FLOAT = re.compile(r"-?(0|[1-9][0-9]{0,14})(\.[0-9]{1,15})?", re.ASCII)

InputValue = Collection[str] | None
"""The names of a job's inputs; None if any name may be an input."""
Number = Annotated[float, Meta(ge=-1e15, le=1e15)]


class IntRange(Struct, frozen=True):
    """A whole number in decimal, without a plus sign or leading zeros."""

    min: Annotated[int, Meta(ge=-(2**62), le=2**62)]
    max: Annotated[int, Meta(ge=-(2**62), le=2**62)]

    def __post_init__(self) -> None:
        if self.min > self.max:
            raise BadField("max", f"{self.max} is below min ({self.min}); nothing could fit")

    def fits(self, text: str, inputs: InputValue, work: Work) -> bool:  # noqa: ARG002  # as all kinds
        """Whether the text is a number in the range."""
        return bool(_INT.fullmatch(text)) and text != "-0" and self.min <= int(text) <= self.max

    def describe(self, inputs: InputValue) -> str:  # noqa: ARG002
        """Name the range."""
        return f"a whole number from {self.min} to {self.max}"


class FloatRange(Struct, frozen=True):
    """A decimal number without an exponent."""

    min: Number
    max: Number

    def __post_init__(self) -> None:
        if self.min > self.max:
            raise BadField("max", f"{self.max:.15g} is below min ({self.min:.15g}); nothing could fit")

    def fits(self, text: str, inputs: InputValue, work: Work) -> bool:  # noqa: ARG002
        """Whether the text is a number in the range. If `min` is 0 or more, -0 does not fit either."""
        if not _FLOAT.fullmatch(text) or (text.startswith("-") and self.min >= 0):
            return False
        # Compared as decimals, because 60.000000000000001 as a float is 60.
        return Decimal(str(self.min)) <= Decimal(text) <= Decimal(str(self.max))

    def describe(self, inputs: InputValue) -> str:  # noqa: ARG002
        """Name the range."""
        return f"a number from {self.min:.15g} to {self.max:.15g}"


def _word(value: object) -> str:
    if not isinstance(value, str) or not value.isprintable() or len(value) > MAX_TEXT:
        raise ValueError(f"must be at most {MAX_TEXT} printable characters in quotes")
    return value


class Choice(Struct, frozen=True):
    """A word of the operator's list."""

    words: list[str]

    def fits(self, text: str, inputs: InputValue, work: Work) -> bool:  # noqa: ARG002
        """Whether the text is in the list."""
        return text in self.words

    def describe(self, inputs: InputValue) -> str:  # noqa: ARG002
        """Name the words."""
        return some(self.words, " or ")


class Regex(Struct, frozen=True):
    """A text that matches a pattern from beginning to end."""

    pattern: Pattern

    def fits(self, text: str, inputs: InputValue, work: Work) -> bool:  # noqa: ARG002
        """Whether the pattern fits the text."""
        return work.fits(self.pattern, text)

    def describe(self, inputs: InputValue) -> str:  # noqa: ARG002
        """Name the pattern."""
        return f"a text that matches {self.pattern.pattern!r}"


def _name_chars(value: object) -> str:
    if not isinstance(value, str) or not value.isprintable() or set(value) & set("/\\:") or len(value) > 64:
        raise ValueError(r"must be at most 64 printable characters in quotes, without / \ and :")
    return value


def _suffix(value: object) -> str:
    if not isinstance(value, str) or not re.fullmatch(r"(\.[A-Za-z0-9_-]{1,16}){1,4}", value):
        raise ValueError("must be the ending of a file's name, such as .mp4")
    return value


class NameFilter(Struct, frozen=True, dict=True):
    """A rule for names of files. `chars` are permitted besides ASCII letters, digits and `. _ -`."""

    suffixes: Annotated[list[Annotated[str, Parse(_suffix)]], Meta(max_length=64)] = []
    chars: Annotated[str, Parse(_name_chars)] = ""

    @cached_property
    def pattern(self) -> Pattern:
        """The pattern for each part of a path: a part begins with a letter, a digit or an underscore."""
        more = "".join(f"\\x{{{ord(char):x}}}" for char in self.chars)
        return parse_pattern(f"[A-Za-z0-9_][A-Za-z0-9._{more}-]*")

    def suits(self, path: str, work: Work) -> bool:
        """Whether each part of the path fits the pattern, and the path has a permitted ending."""
        if self.suffixes and not path.endswith(tuple(self.suffixes)):
            return False
        parts = path.split("/")
        # `isprintable` comes first, because `encode` fails for text that is not valid Unicode.
        if (
            not path.isprintable()
            or len(parts) > MAX_DEPTH
            or any(len(part.encode()) > MAX_NAME for part in parts)
        ):
            return False
        return all(work.fits(self.pattern, part) for part in parts)

    def ending(self) -> str:
        """Name the permitted endings, in parentheses."""
        return f" ({some(self.suffixes, ' ')})" if self.suffixes else ""


class InputFile(NameFilter, frozen=True, dict=True):
    """The name of an input of the job. Inputs are in the directory in which the program starts."""

    def fits(self, text: str, inputs: InputValue, work: Work) -> bool:
        """Whether the text is an input whose name a program cannot misread as an option or a URL."""
        return (inputs is None or text in inputs) and "/" not in text and self.suits(text, work)

    def describe(self, inputs: InputValue) -> str:
        """Name the inputs that fit, if the names are known."""
        what = f"an input of this job{self.ending()}"
        if inputs is None:
            return what
        work = Work()
        good = [name for name in islice(inputs, MAX_SHOWN) if self.fits(name, inputs, work)]
        return f"{what}: {some(good, ' or ') or 'the job has none'}"


class OutputFile(NameFilter, frozen=True, dict=True):
    """A path of a file to write, below work/ or, if it begins with `../output/`, below output/."""

    def fits(self, text: str, inputs: InputValue, work: Work) -> bool:  # noqa: ARG002
        """Whether the path stays in the job's directory, and a program cannot misread it."""
        return self.suits(text.removeprefix("../output/"), work)

    def describe(self, inputs: InputValue) -> str:  # noqa: ARG002
        """Give two examples of paths."""
        end = self.suffixes[0] if self.suffixes else ".txt"
        return f"a path to write to{self.ending()}: out{end} or ../output/out{end}"


def _char_class(value: object) -> str:
    if not isinstance(value, str) or not value or not value.isprintable():
        raise ValueError('must be printable characters and ranges in quotes, such as "A-Za-z0-9 .,-"')
    _ranges(value)
    return value


def _ranges(chars: str) -> list[tuple[str, str]]:
    """Read single characters and ranges. A dash at the beginning or end stands for itself.

    Raises:
        ValueError: the first character of a range comes after the last.
    """
    found = re.findall(r"(.)-(.)|(.)", chars)
    ranges = [(low or one, high or one) for low, high, one in found]
    for low, high in ranges:
        if low > high:
            raise ValueError(f"has the range {low}-{high}; write {high}-{low}")
    return ranges


class TextValue(Struct, frozen=True, dict=True):
    """A text of `min_length` to `max_length` characters of a class."""

    max_length: Annotated[int, Meta(ge=1, le=MAX_TEXT)]
    chars: Annotated[str, Parse(_char_class)]
    min_length: Annotated[int, Meta(ge=0, le=MAX_TEXT)] = 1

    def __post_init__(self) -> None:
        if self.min_length > self.max_length:
            raise BadField("max_length", f"{self.max_length} is below min_length; nothing could fit")

    @cached_property
    def pattern(self) -> Pattern:
        """The class as an RE2 pattern."""
        ranges = "".join(f"\\x{{{ord(low):x}}}-\\x{{{ord(high):x}}}" for low, high in _ranges(self.chars))
        return parse_pattern(f"[{ranges}]*")

    def fits(self, text: str, inputs: InputValue, work: Work) -> bool:  # noqa: ARG002
        """Whether the text has a permitted length, and all its characters are of the class."""
        return self.min_length <= len(text) <= self.max_length and work.fits(self.pattern, text)

    def describe(self, inputs: InputValue) -> str:  # noqa: ARG002
        """Name the lengths and the class."""
        return f"{self.min_length} to {self.max_length} characters of {self.chars}"


ValueKind = IntRange | FloatRange | Choice | Regex | InputFile | OutputFile | TextValue
Words = Annotated[list[Annotated[str, Parse(_word)]], Meta(min_length=1, max_length=1000)]


class Value(Struct, frozen=True, dict=True):
    """A rule as the operator wrote it: exactly one key is set."""

    integer: IntRange | None = msgspec.field(name="int", default=None)
    number: FloatRange | None = msgspec.field(name="float", default=None)
    enum: Words | None = None
    regex: Annotated[Pattern, Parse(parse_pattern)] | None = None
    input: InputFile | None = None
    output: OutputFile | None = None
    text: TextValue | None = None

    def __post_init__(self) -> None:
        given = [name for name in self.__struct_fields__ if getattr(self, name) is not None]
        if len(given) != 1:
            kinds = ", ".join(field.encode_name for field in msgspec.structs.fields(Value))
            raise ValueError(f"has {len(given)} kinds of value; must be one of {kinds}")

    @cached_property
    def kind(self) -> ValueKind:
        """The rule for the key that is set."""
        if self.enum is not None:
            return Choice(self.enum)
        if self.regex is not None:
            return Regex(self.regex)
        kinds = (self.integer, self.number, self.input, self.output, self.text)
        return next(kind for kind in kinds if kind is not None)

    @property
    def may_begin_with_dash(self) -> bool:
        """Whether the rule permits a separate argument that begins with a dash."""
        return isinstance(self.kind, IntRange | FloatRange | Choice)


def value_of(written: Value | Literal["input", "output"]) -> Value:
    """Make a rule from the bare word `input` or `output`; give a full rule back unchanged."""
    if isinstance(written, Value):
        return written
    return Value(input=InputFile()) if written == "input" else Value(output=OutputFile())
