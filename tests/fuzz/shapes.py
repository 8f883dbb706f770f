"""Values of our own types, within what the types allow, from what msgspec knows of them."""

from typing import Any

import msgspec
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from msgspec import inspect

# Beside letters what ends lines, moves cursors, leads out of directories, and cannot be encoded.
ODD = st.sampled_from(
    [
        "",
        ".",
        "..",
        "/",
        "a/b",
        "-x",
        "\0",
        "\n",
        "\x1b[2J",
        '"',
        "\\",
        "%0a",
        "\u202e",
        "\u2028",
        "é",
        "\U0001f4a5",
        "x" * 300,
    ]
)
TEXT = st.text(max_size=12) | ODD
NUMBERS = st.sampled_from([0, 1, -1, 7, 2**31, 2**31 + 1, -(2**31), 2**53, 2**63 - 1, 2**64 - 1, -(2**63)])
FLOATS = st.floats(allow_nan=False, allow_infinity=False) | st.sampled_from([0.0, -0.0, 0.5, 1e308, 5e-324])
JSON_VALUES: SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | NUMBERS | FLOATS | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)


def encoded(type_: Any, **known: SearchStrategy[Any]) -> SearchStrategy[bytes]:
    """Give values of a type as JSON; `known` are fields, wherever they are, with strategies of their own."""
    return plain(type_, **known).map(msgspec.json.encode)


def plain(type_: Any, **known: SearchStrategy[Any]) -> SearchStrategy[Any]:
    """Give values of a type as dicts, lists and scalars."""
    return _of(inspect.type_info(type_), known)


def _of(info: inspect.Type, known: dict[str, SearchStrategy[Any]]) -> SearchStrategy[Any]:
    match info:
        case inspect.StructType():
            return _struct(info, known)
        case inspect.UnionType(types=types):
            return st.one_of(*(_of(one, known) for one in types))
        case inspect.Metadata(type=inner):
            return _of(inner, known)
        case inspect.ListType(item_type=item) | inspect.VarTupleType(item_type=item):
            return st.lists(_of(item, known), min_size=info.min_length or 0, max_size=4)
        case inspect.DictType(key_type=key, value_type=value):
            return st.dictionaries(_of(key, known), _of(value, known), max_size=3)
    return _scalar(info)


def _scalar(info: inspect.Type) -> SearchStrategy[Any]:
    match info:
        case inspect.LiteralType(values=values):
            return st.sampled_from(values)
        case inspect.EnumType(cls=cls):
            return st.sampled_from([member.value for member in cls])
        case inspect.IntType() | inspect.FloatType():
            return _number(info)
        case inspect.StrType(pattern=str(pattern)):
            return st.from_regex(
                pattern.removeprefix("^").removesuffix(r"\Z").removesuffix("$"), fullmatch=True
            )
        case inspect.StrType(max_length=longest):
            return TEXT.map(lambda text: text[:longest])
    # Any and Raw are all that is left.
    return PLAIN.get(type(info), JSON_VALUES)


PLAIN: dict[type[inspect.Type], SearchStrategy[Any]] = {
    inspect.BoolType: st.booleans(),
    inspect.NoneType: st.none(),
    inspect.BytesType: st.binary(max_size=20),
}


def _number(info: inspect.IntType | inspect.FloatType) -> SearchStrategy[Any]:
    if isinstance(info, inspect.IntType):
        return st.integers(-5 if info.ge is None else info.ge, 2**31 if info.le is None else info.le)
    low = info.gt if info.ge is None else info.ge
    high = info.lt if info.le is None else info.le
    above = info.gt is not None
    return st.floats(low, high, allow_nan=False, allow_infinity=False, exclude_min=above)


def _struct(info: inspect.StructType, known: dict[str, SearchStrategy[Any]]) -> SearchStrategy[Any]:
    needed = {f.encode_name: f for f in info.fields if f.required}
    others = {f.encode_name: f for f in info.fields if not f.required}
    tag = {info.tag_field: st.just(info.tag)} if info.tag_field is not None else {}

    def pick(fields: dict[str, inspect.Field]) -> dict[str, SearchStrategy[Any]]:
        return {
            name: known[name] if name in known else _of(field.type, known) for name, field in fields.items()
        }

    return st.fixed_dictionaries({**tag, **pick(needed)}, optional=pick(others))
