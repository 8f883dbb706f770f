"""For a Python type: its kind of YAML node, its parser, and its description in words."""

import difflib
import enum
import types
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Union

import msgspec
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode


class Parse(NamedTuple):
    """Marks a field whose YAML value `function` reads; `function` raises ValueError("must be ...")."""

    function: Callable[[object], object]


def members_of(type_: Any) -> tuple[Any, ...]:
    """Give the members of a union, or the type itself."""
    union = typing.get_origin(type_) in {Union, types.UnionType}
    return typing.get_args(type_) if union else (type_,)


def bare_type(type_: Any) -> Any:
    """Give the type without its annotations."""
    return typing.get_args(type_)[0] if typing.get_origin(type_) is Annotated else type_


def is_struct(type_: Any) -> bool:
    """Whether a type is a struct."""
    return isinstance(type_, type) and issubclass(type_, msgspec.Struct)


def node_kind(type_: Any) -> type[Node]:
    """Give the kind of YAML node in which a type is written."""
    bare = bare_type(type_)
    if any(isinstance(extra, Parse) for extra in typing.get_args(type_)):
        return ScalarNode
    if is_struct(bare) or typing.get_origin(bare) is dict or bare is dict:
        return MappingNode
    if (typing.get_origin(bare) or bare) in {list, tuple, set, frozenset}:
        return SequenceNode
    return ScalarNode


def parser_of(type_: Any) -> Callable[[object], object] | None:
    """Give the parser of a type with its own notation; None for a plain type."""
    own = next((extra.function for extra in typing.get_args(type_) if isinstance(extra, Parse)), None)
    return absolute_path if own is None and bare_type(type_) is Path else own


def absolute_path(value: object) -> Path:
    """Read an absolute path; raises ValueError otherwise."""
    if not isinstance(value, str) or not value.startswith("/") or "\0" in value:
        raise ValueError("must be an absolute path, such as /var/lib/aitbc")
    return Path(value)


def describe_type(type_: Any) -> str:
    """Describe the allowed values of a type, to follow "must be"."""
    members = [member for member in members_of(type_) if member is not types.NoneType]
    if len(members) < len(members_of(type_)):
        return " or ".join([*map(describe_type, members), "null"])
    if len(members) > 1:
        return " or ".join(map(describe_type, members))
    bare = bare_type(type_)
    if typing.get_origin(bare) is Literal:
        return _one_of(typing.get_args(bare))
    if isinstance(bare, type) and issubclass(bare, enum.Enum):
        return _one_of([member.value for member in bare])
    if node_kind(type_) is not ScalarNode:
        return "a mapping of keys to values" if node_kind(type_) is MappingNode else "a list"
    words = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}
    metas = [extra for extra in typing.get_args(type_) if isinstance(extra, msgspec.Meta)]
    if described := [meta.description for meta in metas if meta.description]:
        return described[0]
    limits = [limit for meta in metas for limit in limits_of(meta)]
    return " ".join([words.get(bare, getattr(bare, "__name__", str(bare))), " and ".join(limits)]).strip()


def _one_of(values: typing.Iterable[object]) -> str:
    options = [str(value) for value in values]
    return options[0] if len(options) == 1 else f"one of {', '.join(options)}"


def limits_of(meta: msgspec.Meta) -> Iterator[str]:
    """Describe the limits of a value."""
    words = {
        "ge": "of at least",
        "gt": "above",
        "le": "at most",
        "lt": "below",
        "min_length": "of length at least",
        "max_length": "of length at most",
        "pattern": "that matches",
    }
    for name, word in words.items():
        if (limit := getattr(meta, name)) is not None:
            yield f"{word} {limit}"


def nearest(name: str, known: typing.Iterable[str]) -> str:
    """Suggest the known name that an unknown name probably means."""
    options = sorted(known)
    if near := difflib.get_close_matches(name, options, n=1):
        return f"did you mean {near[0]}?"
    if len(options) > 24:
        return "remove it"
    return f"must be {_one_of(options)}"


def allowed(type_: Any) -> str:
    """Describe the allowed values of a type as a sentence with "must be"."""
    if parse := parser_of(members_of(type_)[0]):
        try:
            parse(object())  # no parser accepts an object, so the error lists the allowed values
        except ValueError as error:
            return str(error)
    return f"must be {describe_type(type_)}"
