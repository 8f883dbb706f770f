"""How deep JSON may go. Every decoder that recurses gives up somewhere, each at a depth of its own."""

MAX_NESTING = 100


def too_deep(value: object) -> bool:
    """Whether a decoded JSON value has more than MAX_NESTING lists and objects one within the other."""
    level: list[list[object] | dict[object, object]] = [[value]]
    for _ in range(MAX_NESTING + 1):
        inner = (one for outer in level for one in (outer.values() if isinstance(outer, dict) else outer))
        level = [one for one in inner if isinstance(one, dict | list)]
    return bool(level)
