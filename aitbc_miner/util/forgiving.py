"""Decodes JSON of other programs leniently: many write 1.0 for 1, and null for an absent field."""

import functools
from typing import Any, TypeVar, cast

import msgspec
from msgspec import inspect

T = TypeVar("T")

_EXACT = float(2**53)


def decode(data: bytes | msgspec.Raw, type_: type[T]) -> T:
    """Decode JSON as `convert` does.

    Raises:
        msgspec.DecodeError: the data is no JSON, or does not fit the type.
    """
    return convert(msgspec.json.decode(data), type_)


def convert(value: object, type_: type[T]) -> T:
    """Convert a decoded JSON value; accept `1.0` as an integer and null in a field with a default.

    Raises:
        msgspec.ValidationError: the value does not fit the type even so.
    """
    return msgspec.convert(_fit(value, _info(cast("Any", type_))), type_)


_info = functools.cache(inspect.type_info)


def _fit(value: Any, wanted: inspect.Type) -> Any:
    if isinstance(wanted, inspect.UnionType):
        wanted = next((each for each in wanted.types if _may_fit(value, each)), wanted)
    if isinstance(wanted, inspect.IntType) and isinstance(value, float):
        return int(value) if value.is_integer() and abs(value) <= _EXACT else value
    if isinstance(wanted, inspect.ListType) and isinstance(value, list):
        return [_fit(item, wanted.item_type) for item in value]
    if isinstance(wanted, inspect.DictType) and isinstance(value, dict):
        return {key: _fit(item, wanted.value_type) for key, item in value.items()}
    if isinstance(wanted, inspect.StructType) and isinstance(value, dict):
        return _fit_fields(value, wanted)
    return value


def _may_fit(value: Any, wanted: inspect.Type) -> bool:
    if isinstance(value, dict):
        return isinstance(wanted, inspect.StructType | inspect.DictType)
    if isinstance(value, list):
        return isinstance(wanted, inspect.ListType)
    return isinstance(value, float) and isinstance(wanted, inspect.IntType)


def _fit_fields(value: dict[str, Any], wanted: inspect.StructType) -> dict[str, Any]:
    fields = {field.encode_name: field for field in wanted.fields}
    return {
        key: _fit(item, fields[key].type) if key in fields else item
        for key, item in value.items()
        if item is not None or key not in fields or fields[key].required
    }


MAX_NESTING = 100


def too_deep(value: object) -> bool:
    """Whether a decoded JSON value nests more than MAX_NESTING lists and objects."""
    level: list[list[object] | dict[object, object]] = [[value]]
    for _ in range(MAX_NESTING + 1):
        inner = (item for outer in level for item in (outer.values() if isinstance(outer, dict) else outer))
        level = [item for item in inner if isinstance(item, dict | list)]
    return bool(level)
