"""Inputs made of valid ones: pieces taken out, doubled, exchanged, cut, and put where they do not belong."""

import re
from collections.abc import Callable, Sequence
from typing import Any

from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy

# A string, a word or number, white space, or a single byte.
_PIECES = re.compile(rb'"(?:[^"\\]|\\.)*"|[A-Za-z0-9_.+%-]+|\s+|.', re.DOTALL)

HOSTILE: tuple[bytes, ...] = (
    *(
        b"",
        b"\0",
        b"\n",
        b"\r\n",
        b"\r",
        b"\t",
        b" ",
        b"\x1b[31m",
        b"\x7f",
        b"\xff",
        b"\xc3",
        b"\xed\xa0\x80",
    ),
    *("\u2028".encode(), "\x85".encode(), "\u202e".encode(), "\ufeff".encode(), "\U0001f4a5".encode()),
    *(b"-1", b"0", b"1e999", b"-1e999", b"1e-999", b"NaN", b"Infinity", b".inf", b".nan", b"0x10", b"1_000"),
    *(b"9" * 20, b"9" * 5000, b"18446744073709551616", b"-9223372036854775809", b"4294967296", b"2147483648"),
    *(b"null", b"true", b"~", b"[]", b"{}", b'""', b'"x"', b'"A', b"/", b"..", b"%s%n", b"${HOME}", b"{0}"),
    *(b"A" * 300, b"A" * 5000, b"[" * 1500, b'{"a":' * 1500, b"[" * 150 + b"]" * 150, b"(" * 200),
    *(b'"\\ud800"', b'"\\u0000"', b'"\\u001b[2J"', b'"\\ud83d\\udca5"', b'"\xff"', b'"' + b"B" * 5000 + b'"'),
)
JSON: tuple[bytes, ...] = (b'"type":"X"', b'"version":2', b'"job_id":"other"', b'{"a":1,"a":2}', b",", b":")
YAML: tuple[bytes, ...] = (
    *(
        b"*a",
        b"&a",
        b"!!int ''",
        b"!!python/object:os.system",
        b"!x y",
        b"!!binary x",
        b"!!set {a}",
        b"<<: *a",
    ),
    *(
        b"? a",
        b"? [a]",
        b"- - - -",
        b"|\n a",
        b">-\n",
        b"---\n",
        b"...\n",
        b"%YAML 9.9\n---\n",
        b"# x\n",
        b"'",
    ),
    *(
        b'"\\ud800"',
        b'"\\U99999999"',
        b'"\\x1b"',
        b"2001-01-01",
        b"1:30:00",
        b"0b" + b"1" * 100,
        b"0o7",
        b"1_0",
    ),
    *(
        b"[" * 60,
        b"{a: " * 60,
        b"\n" + b"- " * 60,
        b"1" + b":0" * 300 + b":0.5",
        b"\x00",
        b"\xef\xbb\xbf",
        b"@",
        b"`",
    ),
)


def mutated(samples: SearchStrategy[bytes], words: Sequence[bytes] = ()) -> SearchStrategy[bytes]:
    """Give samples with none to six edits, by byte and by piece; `words` are what their format knows."""
    return _mutated(samples, st.sampled_from((*words, *words, *HOSTILE)))


@st.composite
def _mutated(draw: DrawFn, samples: SearchStrategy[bytes], words: SearchStrategy[bytes]) -> bytes:
    data = draw(samples)
    for _ in range(draw(st.integers(0, 6))):
        data = draw(st.sampled_from(EDITS))(draw, data, words, samples)
    return data


Words = SearchStrategy[bytes]


def _at(draw: DrawFn, data: bytes) -> int:
    return draw(st.integers(0, len(data)))


def _flip(draw: DrawFn, data: bytes, _words: Words, _samples: Words) -> bytes:
    at = _at(draw, data)
    return data[:at] + bytes([draw(st.integers(0, 255))]) + data[at + 1 :]


def _cut(draw: DrawFn, data: bytes, _words: Words, _samples: Words) -> bytes:
    first, last = sorted((_at(draw, data), _at(draw, data)))
    return data[:first] + data[last:]


def _truncate(draw: DrawFn, data: bytes, _words: Words, _samples: Words) -> bytes:
    return data[: _at(draw, data)]


def _double(draw: DrawFn, data: bytes, _words: Words, _samples: Words) -> bytes:
    first, last = sorted((_at(draw, data), _at(draw, data)))
    return data[:last] + data[first:last] * draw(st.sampled_from((1, 2, 50))) + data[last:]


def _insert(draw: DrawFn, data: bytes, words: Words, _samples: Words) -> bytes:
    at = _at(draw, data)
    return data[:at] + draw(words) + data[at:]


def _splice(draw: DrawFn, data: bytes, _words: Words, samples: Words) -> bytes:
    other = draw(samples)
    return data[: _at(draw, data)] + other[_at(draw, other) :]


def _exchange(draw: DrawFn, data: bytes, words: Words, samples: Words) -> bytes:
    """Put a word, or a piece of another sample, in the place of one: what is well-formed gets deepest."""
    pieces = _PIECES.findall(data)
    if not pieces:
        return draw(words)
    others = _PIECES.findall(draw(samples)) if draw(st.booleans()) else []
    new = draw(st.sampled_from(others)) if others else draw(words)
    pieces[draw(st.integers(0, len(pieces) - 1))] = new
    return b"".join(pieces)


def _move(draw: DrawFn, data: bytes, _words: Words, _samples: Words) -> bytes:
    pieces = _PIECES.findall(data)
    if not pieces:
        return data
    piece = pieces.pop(draw(st.integers(0, len(pieces) - 1)))
    pieces.insert(draw(st.integers(0, len(pieces))), piece)
    return b"".join(pieces)


Edit = Callable[[DrawFn, bytes, Words, Words], bytes]
EDITS: tuple[Edit, ...] = (
    _flip,
    _cut,
    _truncate,
    _double,
    _insert,
    _splice,
    _exchange,
    _exchange,
    _exchange,
    _move,
)


def joined(*parts: SearchStrategy[bytes], by: bytes = b"\n") -> SearchStrategy[bytes]:
    """Give inputs of several parts; the check takes them apart with `parted`."""
    return st.tuples(*parts).map(by.join)


def parted(data: bytes, number: int, by: bytes = b"\n") -> list[bytes]:
    """Take an input apart; parts that are not there are empty, and all that is left over is the last."""
    parts = data.split(by, number - 1)
    return [*parts, *[b""] * (number - len(parts))]


def words(*choices: Any) -> SearchStrategy[bytes]:
    """Give one of some words."""
    return st.sampled_from([str(choice).encode() for choice in choices])
