"""Bounds the depth of JSON, because each recursive decoder fails at a different depth."""

MAX_NESTING = 100


def too_deep(value: object) -> bool:
    """Whether a decoded JSON value nests more than MAX_NESTING lists and objects."""
    level: list[list[object] | dict[object, object]] = [[value]]
    for _ in range(MAX_NESTING + 1):
        inner = (item for outer in level for item in (outer.values() if isinstance(outer, dict) else outer))
        level = [item for item in inner if isinstance(item, dict | list)]
    return bool(level)
