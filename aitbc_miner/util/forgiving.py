"""JSON from strangers, as its types mean it: many write 1.0 for 1, and null for what is not there."""

import functools
from typing import Any, TypeVar, cast

import msgspec
from msgspec import inspect

T = TypeVar("T")

_EXACT = float(2**53)


def decode(data: bytes | msgspec.Raw, type_: type[T]) -> T:
    """Decode JSON; raises what msgspec raises."""
    return convert(msgspec.json.decode(data), type_)


def convert(value: object, type_: type[T]) -> T:
    """Convert a decoded JSON value: a whole number may have a `.0`, and a field with a default be null.

    Raises:
        msgspec.ValidationError: it is not of this type all the same.
    """
    return msgspec.convert(_fit(value, _info(cast("Any", type_))), type_)


_info = functools.cache(inspect.type_info)


def _fit(value: Any, wanted: inspect.Type) -> Any:
    if isinstance(wanted, inspect.UnionType):
        wanted = next((one for one in wanted.types if _may_fit(value, one)), wanted)
    if isinstance(wanted, inspect.IntType) and isinstance(value, float):
        return int(value) if value.is_integer() and abs(value) <= _EXACT else value
    if isinstance(wanted, inspect.ListType) and isinstance(value, list):
        return [_fit(one, wanted.item_type) for one in value]
    if isinstance(wanted, inspect.DictType) and isinstance(value, dict):
        return {key: _fit(one, wanted.value_type) for key, one in value.items()}
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
        key: _fit(one, fields[key].type) if key in fields else one
        for key, one in value.items()
        if one is not None or key not in fields or fields[key].required
    }
