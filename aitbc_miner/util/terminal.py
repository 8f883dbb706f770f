"""Text for people: made harmless, cut and wrapped to the width of their terminal.

Much of what is shown comes from strangers (jobs, the coordinator), so it goes through `visible`.
"""

import shutil
import unicodedata
from collections.abc import Iterator

NARROWEST = 40


def width() -> int:
    """Give how many columns a page may take: $COLUMNS, else the terminal's; 80 into a pipe or a file."""
    return max(NARROWEST, shutil.get_terminal_size((80, 24)).columns)


def visible(text: str, keep: str = "") -> str:
    r"""Write what would act on a terminal (escape sequences, line breaks, …) as \x1b and the like."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() or char in keep else repr(char)[1:-1] for char in text)


def columns(text: str) -> int:
    """Give how many columns a text takes."""
    return len(text) if text.isascii() else sum(map(_columns, text))


def _columns(char: str) -> int:
    if unicodedata.combining(char):
        return 0
    return 2 if unicodedata.east_asian_width(char) in "WF" else 1


def cut(text: str, most: int) -> str:
    """Make a text fit, with … in the place of what is left out."""
    text = visible(text)
    return text if columns(text) <= most else _head(text, most - 1) + "…"


def _head(text: str, most: int) -> str:
    """Give as much of a text as fits, and of one that does not fit at all its first letter."""
    end = 0
    for char in text:
        most -= _columns(char)
        if most < 0:
            break
        end += 1
    return text[:end]


def pad(text: str, most: int) -> str:
    """Cut or fill a text to a width."""
    text = cut(text, most)
    return text + " " * (most - columns(text))


def wrap(label: str, text: str, *, lines: int = 99, most: int | None = None) -> list[str]:
    """Break a text into lines that begin under one another; `label` stands before the first."""
    most = most or width()
    if columns(label) > most // 2:
        return [cut(label.rstrip(), most), *wrap("    ", text, lines=lines, most=most)]
    inside = most - columns(label)
    pieces = list(_pieces(visible(" ".join(text.split())), inside)) or [""]
    if len(pieces) > lines:
        pieces[lines - 1 :] = [_head(pieces[lines - 1], inside - 1) + "…"]
    margins = [label, *[" " * columns(label)] * (len(pieces) - 1)]
    return [margin + piece for margin, piece in zip(margins, pieces, strict=True)]


def _pieces(text: str, inside: int) -> Iterator[str]:
    line = ""
    for whole in text.split():
        word = whole
        while columns(word) > inside:
            # A path or a key is longer than a line: it fills what is left, and goes on.
            room = inside - columns(line) - 1 if line else inside
            head = _head(word, room)
            if room >= inside // 2 and head:
                yield f"{line} {head}" if line else head
                word = word[len(head) :]
            else:
                yield line
            line = ""
        if line and columns(line) + 1 + columns(word) > inside:
            yield line
            line = ""
        line = f"{line} {word}" if line else word
    if line:
        yield line


def duration(seconds: float) -> str:
    """Write a time in the two units that matter: 3d04h, 5h09m, 2m30s, 7s."""
    whole = int(max(0.0, seconds))
    for big, one, small, other in ((86400, "d", 3600, "h"), (3600, "h", 60, "m"), (60, "m", 1, "s")):
        if whole >= big:
            return f"{whole // big}{one}{whole % big // small:02}{other}"
    return f"{whole}s"


def size(number: float) -> str:
    """Write bytes in the largest unit that they fill."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if number < 1024:
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1024
    return f"{number:.1f} TiB"
