"""Makes text safe for a terminal, and cuts and wraps text to the terminal's width.

Jobs and the coordinator supply much of the shown text, so `visible` escapes control characters.
"""

import os
import shutil
import sys
import unicodedata
from collections.abc import Callable, Iterator

NARROWEST = 40
EXIT_PIPE = 141


def width() -> int:
    """Give the columns of a page: $COLUMNS, else the terminal's width, else 80 (pipe or file)."""
    return max(NARROWEST, shutil.get_terminal_size((80, 24)).columns)


def until_unread(command: Callable[[], int | None]) -> int:
    """Run a command and give its exit status; EXIT_PIPE if the reader of its output has ended."""
    try:
        status = command()
        sys.stdout.flush()
    except BrokenPipeError:
        # Python's last flush at exit would fail on the broken pipe.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_PIPE
    return status or 0


def visible(text: str, keep: str = "") -> str:
    r"""Escape characters that act on a terminal (escape sequences, line breaks, …), such as \x1b."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() or char in keep else repr(char)[1:-1] for char in text)


def columns(text: str) -> int:
    """Give the columns of a text on a terminal."""
    return len(text) if text.isascii() else sum(map(_columns, text))


def _columns(char: str) -> int:
    if unicodedata.combining(char):
        return 0
    return 2 if unicodedata.east_asian_width(char) in "WF" else 1


def cut(text: str, most: int) -> str:
    """Cut a text to `most` columns, with … in place of the omitted end."""
    text = visible(text)
    return text if columns(text) <= most else _head(text, most - 1) + "…"


def _head(text: str, most: int) -> str:
    """Give the beginning of a text that fits into `most` columns."""
    end = 0
    for char in text:
        most -= _columns(char)
        if most < 0:
            break
        end += 1
    return text[:end]


def pad(text: str, most: int) -> str:
    """Cut or fill a text to `most` columns."""
    text = cut(text, most)
    return text + " " * (most - columns(text))


def wrap(label: str, text: str, *, lines: int = 99, most: int | None = None) -> list[str]:
    """Break a text into lines with `label` before the first line and equal indents before the others."""
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
            # A word longer than a line, such as a path, fills the rest of the line and continues on the next.
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
    """Write a time in its two largest units: 3d04h, 5h09m, 2m30s, 7s."""
    whole = int(max(0.0, seconds))
    for big, one, small, other in ((86400, "d", 3600, "h"), (3600, "h", 60, "m"), (60, "m", 1, "s")):
        if whole >= big:
            return f"{whole // big}{one}{whole % big // small:02}{other}"
    return f"{whole}s"


def size(number: float) -> str:
    """Write a number of bytes in the largest unit not above the number."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if number < 1024:
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1024
    return f"{number:.1f} TiB"
