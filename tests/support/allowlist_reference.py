"""What an argument list has to be, said a second time: slowly, by trying everything, and sharing no code.

It takes a grammar as `yaml.safe_load` gives it, so that nothing of ours has touched it.
"""

import itertools
import re
from collections.abc import Iterator, Sequence
from decimal import Decimal
from typing import Any

Grammar = dict[str, Any]
Tokens = list[tuple[str, int, str | None]]
"""Options and operands by their index, with the name before an operand or the value of an option."""


def allowed(entry: Grammar, args: Sequence[str], inputs: Sequence[str]) -> bool:
    """Whether an entry in the long form allows an argument list."""
    if any(not arg.isprintable() or len(arg) > 4096 for arg in args):
        return False
    sections = entry.get("sections") or [{**entry, "min": 1, "max": 1}]
    repeated = [
        [section] * times
        for section in sections
        for times in [section.get("max", max(1, section.get("min", 0)))]
    ]
    counts = [
        range(section.get("min", 0), len(many) + 1) for section, many in zip(sections, repeated, strict=True)
    ]
    return any(
        _in_turn(
            list(itertools.chain.from_iterable(many[:n] for many, n in zip(repeated, chosen, strict=True))),
            args,
            inputs,
        )
        for chosen in itertools.product(*counts)
    )


def _in_turn(sections: list[Grammar], args: Sequence[str], inputs: Sequence[str]) -> bool:
    if not sections:
        return not args
    return any(
        _is_section(sections[0], args[:cut], inputs) and _in_turn(sections[1:], args[cut:], inputs)
        for cut in range(len(args) + 1)
    )


def _is_section(section: Grammar, args: Sequence[str], inputs: Sequence[str]) -> bool:
    return any(_holds(section, tokens) for tokens in _tokens(section, args, inputs))


def _names(option: Grammar) -> list[str]:
    name = option["name"]
    return [name] if isinstance(name, str) else list(name)


def _tokens(section: Grammar, args: Sequence[str], inputs: Sequence[str]) -> Iterator[Tokens]:
    """Give each way to read the arguments as options and operands, with each value fit for its own rule."""
    if not args:
        yield []
        return
    for length, first in _first(section, args, inputs):
        for rest in _tokens(section, args[length:], inputs):
            yield [first, *rest]


def _first(
    section: Grammar, args: Sequence[str], inputs: Sequence[str]
) -> Iterator[tuple[int, tuple[str, int, str | None]]]:
    options, operands = section.get("options", []), section.get("operands", [])
    for index, option in enumerate(options):
        for name in _names(option):
            for length, value in _as_option(options, option, name, args, inputs):
                yield length, ("option", index, value)
    words = {operand["name"] for operand in operands if "name" in operand}
    for index, operand in enumerate(operands if not _looks_like_option(options, args[0]) else []):
        length = 2 if "name" in operand else 1
        named = args[0] == operand["name"] if "name" in operand else args[0] not in words
        if named and len(args) >= length and _apart(operand["value"], args[length - 1], inputs):
            yield length, ("operand", index, args[length - 1])


def _as_option(
    options: list[Grammar], option: Grammar, name: str, args: Sequence[str], inputs: Sequence[str]
) -> Iterator[tuple[int, str | None]]:
    """Give each way to read the first arguments as this spelling of this option."""
    write, value, arg = option.get("write", ["separate"]), option.get("value"), args[0]
    if value is None:
        if arg == name:
            yield 1, None
        return
    if arg == name and "separate" in write and len(args) > 1 and _apart(value, args[1], inputs):
        yield 2, args[1]
    if "equals" in write and arg.startswith(name + "=") and _fits(value, arg[len(name) + 1 :], inputs):
        yield 1, arg
    others = [other for option in options for other in _names(option)]
    taken = arg in others or any(arg.startswith(other + "=") for other in _with_equals(options))
    if "joined" in write and arg.startswith(name) and not taken and _fits(value, arg[2:], inputs):
        yield 1, arg


def _with_equals(options: list[Grammar]) -> list[str]:
    return [name for option in options if "equals" in option.get("write", []) for name in _names(option)]


def _looks_like_option(options: list[Grammar], arg: str) -> bool:
    for option in options:
        write = option.get("write", ["separate"])
        for name in _names(option):
            if arg == name or ("equals" in write and arg.startswith(name + "=")):
                return True
            if "joined" in write and arg.startswith(name):
                return True
    return False


def _holds(section: Grammar, tokens: Tokens) -> bool:
    """Whether options and operands are there as often, and in the order, that the section wants."""
    options = [(place, index) for place, (kind, index, _) in enumerate(tokens) if kind == "option"]
    operands = [(place, index) for place, (kind, index, _) in enumerate(tokens) if kind == "operand"]
    used = [index for _, index in options]
    for index, option in enumerate(section.get("options", [])):
        least = 1 if option.get("required") else 0
        if not least <= used.count(index) <= option.get("max", 1):
            return False
    for rivals in section.get("exclusive", []):
        there = {
            index
            for index, option in enumerate(section.get("options", []))
            if index in used and set(_names(option)) & set(rivals)
        }
        if len(there) > 1:
            return False
    order = section.get("order", "options_first")
    if order != "any" and options and operands and options[-1][0] > operands[0][0]:
        return False
    if order == "fixed" and used != sorted(used):
        return False
    sequence = [index for _, index in operands]
    if sequence != sorted(sequence):
        return False
    for index, operand in enumerate(section.get("operands", [])):
        least = operand.get("min", 1)
        if not least <= sequence.count(index) <= operand.get("max", max(1, least)):
            return False
    return True


def _apart(value: Any, text: str, inputs: Sequence[str]) -> bool:
    """Whether a text fits as an argument of its own."""
    kind = value if isinstance(value, str) else next(iter(value))
    return _fits(value, text, inputs) and (not text.startswith("-") or kind in {"int", "float", "enum"})


def _fits(value: Any, text: str, inputs: Sequence[str]) -> bool:
    kind, rule = (value, {}) if isinstance(value, str) else next(iter(value.items()))
    if kind == "enum":
        return text in rule
    if kind == "regex":
        return re.fullmatch(rule, text) is not None
    if kind == "int":
        numeral = re.fullmatch("-?[0-9]{1,20}", text, re.ASCII) and str(int(text)) == text
        return bool(numeral) and rule["min"] <= int(text) <= rule["max"]
    if kind == "float":
        if not re.fullmatch(r"-?[0-9]+(\.[0-9]{1,15})?", text, re.ASCII) or re.match(r"-?0[0-9]", text):
            return False
        bounds = Decimal(str(rule["min"])), Decimal(str(rule["max"]))
        return bounds[0] <= Decimal(text) <= bounds[1] and not (text.startswith("-") and bounds[0] >= 0)
    if kind == "text":
        class_ = re.compile("[" + re.sub(r"([\[\]\\^])", r"\\\1", rule["chars"]) + "]")
        return rule.get("min_length", 1) <= len(text) <= rule["max_length"] and all(map(class_.match, text))
    return _is_path(kind, rule, text) and (kind == "output" or text in inputs)


def _is_path(kind: str, rule: dict[str, Any], text: str) -> bool:
    if kind == "output" and text.startswith("../output/"):
        text = text[len("../output/") :]
    good = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_"
    parts = text.split("/")
    return (
        len(parts) <= (8 if kind == "output" else 1)
        and all(part and part[0] in good and len(part.encode()) <= 255 for part in parts)
        and all(char in good + ".-" + rule.get("chars", "") for part in parts for char in part)
        and (not rule.get("suffixes") or any(text.endswith(end) for end in rule["suffixes"]))
    )
