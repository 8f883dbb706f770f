"""YAML read into structs: every fault in one pass, with its place, and nothing that hurts the reader."""

import enum
import os
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import Meta, Struct

from aitbc_miner.config.document import BadField, Fault, decode_text, read_document
from aitbc_miner.config.units import Size
from aitbc_miner.config.yaml_text import line_of

SIZE = "must be a size: bytes, or a number with K, M, G, T or P, such as 512M"


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Range(Struct, frozen=True):
    low: Annotated[int, Meta(ge=0, le=10)] = 1
    high: float = 9.0

    def __post_init__(self) -> None:
        if self.low > self.high:
            raise BadField("low", f"is {self.low}, above high")


class Item(Struct, frozen=True):
    name: str
    size: Size | None = None
    extra: dict[str, Any] = {}
    kind: str = msgspec.field(name="class", default="x")

    def __post_init__(self) -> None:
        if self.name == "forbidden":
            raise ValueError("this item may not be here")


class Document(Struct, frozen=True):
    range: Range = Range()
    items: list[Item] = []
    names: Annotated[tuple[str, ...], Meta(max_length=2)] = ()
    limits: dict[Literal["a", "b"], Size] = {}
    mode: Literal["on", "off"] = "on"
    colour: Colour | None = None
    either: str | int | None = None
    text_or_item: str | Item | None = None
    auth_token: Annotated[str, Meta(max_length=8)] | None = None
    path: Path | None = None
    flag: bool = False
    anything: Any = None


class Strict(Struct, frozen=True):
    needed: int
    section: Document = Document()


def faults_of(text: str, type_: type[Struct] = Document) -> list[str]:
    faults: list[Fault] = []
    assert decode_text(text, type_, faults, file="f.yaml") is None
    assert faults
    return [str(fault).removeprefix("f.yaml") for fault in faults]


def read(text: str) -> Document:
    faults: list[Fault] = []
    document = decode_text(text, Document, faults, file="f.yaml")
    assert not faults
    assert document is not None
    return document


def test_everything_at_once() -> None:
    document = read(
        """
range: {low: 2, high: 3}
items:
  - {name: a, size: 16G, extra: {deep: [1, {x: null}], when: 2024-01-01}}
  - name: b
    class: other
names: [x, "1"]
limits: {a: 512M}
mode: off
colour: blue
either: 7
text_or_item: {name: c}
auth_token: env:X
path: /var/lib
flag: yes
anything: [1, two, 3.5, true]
"""
    )
    assert document == Document(
        range=Range(2, 3.0),
        items=[
            Item("a", 16 << 30, {"deep": [1, {"x": None}], "when": "2024-01-01"}),
            Item("b", kind="other"),
        ],
        names=("x", "1"),
        limits={"a": 512 << 20},
        mode="off",
        colour=Colour.BLUE,
        either=7,
        text_or_item=Item("c"),
        auth_token="env:X",
        path=Path("/var/lib"),
        flag=True,
        anything=[1, "two", 3.5, True],
    )
    assert isinstance(document.range.high, float)


@pytest.mark.parametrize("text", ["", "# only a comment\n", "---\n", "null", "range:\nitems: []\n", "{}"])
def test_what_is_left_out_has_its_default(text: str) -> None:
    assert read(text) == Document()


def test_every_fault_in_one_pass() -> None:
    text = """
rnge: 1
range: {low: 11, high: x, hihg: 2}
items:
  - {size: 12Q}
  - name: [a]
    nmae: b
  - 7
names: [a, 1]
limits: {c: 1, a: -1}
mode: maybe
colour: green
either: {}
text_or_item: [1]
auth_token: hunter2-and-more
path: relative
flag: 1
anything: {x: 1, x: 2}
"""
    assert faults_of(text) == [
        ":2: rnge: unknown key; did you mean range?",
        ":3: range.low: is 11; must be a whole number of at least 0 and at most 10",
        ":3: range.high: is 'x'; must be a number",
        ":3: range.hihg: unknown key; did you mean high?",
        ":5: items[0].size: is '12Q'; " + SIZE,
        ":5: items[0].name: this key is missing; must be text",
        ":6: items[1].name: is a list; must be text",
        ":7: items[1].nmae: unknown key; did you mean name?",
        ":8: items[2]: is a single value; must be a mapping of keys to values",
        ":9: names[1]: is 1; must be text; put it in quotes",
        ":10: limits.c: is 'c'; must be one of a, b",
        ":10: limits.a: is -1; " + SIZE,
        ":11: mode: is 'maybe'; must be one of on, off",
        ":12: colour: is 'green'; must be one of red, blue or null",
        ":13: either: is a mapping; must be text or a whole number or null",
        ":14: text_or_item: is a list; must be text or a mapping of keys to values or null",
        ":15: auth_token: is (hidden); must be text of length at most 8 or null",
        ":16: path: is 'relative'; must be an absolute path, such as /var/lib/aitbc",
        ":17: flag: is 1; must be true or false",
        ":18: anything.x: duplicate key, first in line 18; remove one of the two",
    ]


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("[]", ":1: is a list; must be a mapping of keys to values"),
        ("7", ":1: is a single value; must be a mapping of keys to values"),
        ("range: {low: 5, high: 3}", ":1: range.low: is 5, above high"),
        ("range:\n  high: 0", ":2: range.low: is 1, above high"),
        ("items:\n- {name: forbidden}", ":2: items[0]: this item may not be here"),
        ("names: [a, b, c]", ":1: names: has 3 entries; must be of length at most 2"),
        ("a: 1\n---\nb: 2", ":2: holds more than one YAML document; keep one"),
        ("range:\n\tlow: 1", ":2: is indented with a tab; use spaces"),
        ("either: &x 1\nanything: *x", ":2: aliases (*name) are not accepted; write the value out"),
        ("anything: " + "[" * 50, ":1: is nested more than 40 levels deep"),
        ("either: a\nmode: 'x", ":2: is not valid YAML: found unexpected end of stream"),
        ("either: a\nmode: \x07", ":2: contains a control character; remove the character"),
        ("range: {high: .nan}", ":1: range.high: is .nan; must be a number"),
        ("range: {high: .inf}", ":1: range.high: is .inf; must be a number"),
        ("range: {low: true}", ":1: range.low: is true; must be a whole number of at least 0 and at most 10"),
        ("range: {low: 1.5}", ":1: range.low: is 1.5; must be a whole number of at least 0 and at most 10"),
        ("range: {low: null}", ":1: range.low: is null; must be a whole number of at least 0 and at most 10"),
        ("mode: no", ":1: mode: is no; must be one of on, off"),
        ("items: [{name: no}]", ":1: items[0].name: is no; must be text; put it in quotes"),
        (
            "anything: !!python/object/apply:os.system [id]",
            ":1: anything: has a tag (!name), and tags are not accepted; remove the tag",
        ),
        (
            "anything: !!set {a, b}",
            ":1: anything: has a tag (!name), and tags are not accepted; remove the tag",
        ),
        ("flag: !x 1", ":1: flag: has a tag (!name), and tags are not accepted; remove the tag"),
        ("flag: !!int abc", ":1: flag: does not fit its tag, or has too many digits"),
        ("range: {low: " + "9" * 6000 + "}", ":1: range.low: does not fit its tag, or has too many digits"),
        ("? [a]\n: 1", ":1: has a list for a key; must be plain text"),
        ('limits: {"/a.b": 1}', ":1: limits['/a.b']: is '/a.b'; must be one of a, b"),
        (
            "items: [{name: x, size: [1]}]",
            f":1: items[0].size: is a list; {SIZE}",
        ),
        (
            "zzz: 1",
            f":1: zzz: unknown key; must be one of {', '.join(sorted(Document.__struct_fields__))}",
        ),
    ],
)
def test_one_fault(text: str, fault: str) -> None:
    assert faults_of(text) == [fault]


def test_a_missing_key() -> None:
    assert faults_of("section: {}", Strict) == [":1: needed: this key is missing; must be a whole number"]


def test_no_secret_is_shown() -> None:
    secret = "hunter2hunter2"
    for text in (
        f"auth_token: {secret}",
        f"auth_token: *{secret}",
        f"auth_token: !{secret}!x y",
        f"auth_token: '{secret}",
        f"auth_token: [{secret}]",
        f"auth_token: {secret}: x",
        f"auth_token: |{secret}",
        f"auth_token: @{secret}",
        f'auth_token: "\\q{secret}"',
        f"path: https://user:{secret}@host/",
    ):
        assert secret not in "".join(faults_of(text)), text


def test_long_values_are_cut() -> None:
    assert len(faults_of("mode: " + "x" * 5000)[0]) < 150


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "latin").write_bytes(b"mode: \xe9")
    (tmp_path / "huge").write_bytes("é".encode() * (512 * 1024 + 1))
    expected = {
        "nope": "cannot read this file: No such file or directory",
        "fifo": "cannot read this path: it is not a regular file",
        ".": "cannot read this path: it is not a regular file",
        "latin": "cannot read this file: byte 6 is not UTF-8",
        "huge": "is larger than 1048576 bytes",
    }
    for name, message in expected.items():
        faults: list[Fault] = []
        assert read_document(tmp_path / name, Document, faults) is None
        assert faults == [Fault(str(tmp_path / name), None, "", message)]


def test_overrides(tmp_path: Path) -> None:
    path = tmp_path / "f.yaml"
    path.write_text("needed: x\nsection:\n")
    environ = {
        "AITBC_MINER_NEEDED": "5",
        "AITBC_MINER_SECTION__RANGE__LOW": "3",
        "AITBC_MINER_SECTION__NAMES": "[a, b]",
        "PATH": "/bin",
    }
    faults: list[Fault] = []
    document = read_document(path, Strict, faults, env_overrides=environ)
    assert document == Strict(5, Document(range=Range(low=3), names=("a", "b")))
    assert faults == []


def test_faulty_overrides_name_the_variable(tmp_path: Path) -> None:
    path = tmp_path / "f.yaml"
    path.write_text("needed: 1\nsection: []\n")
    environ = {
        "AITBC_MINER_NEEDED": "many",
        "AITBC_MINER_NEEDDED": "1",
        "AITBC_MINER_SECTION__NAMES": "[a",
        "AITBC_MINER_SECTION__FLAG": "true",
        "AITBC_MINER_": "1",
    }
    faults: list[Fault] = []
    assert read_document(path, Strict, faults, env_overrides=environ) is None
    by_file = {fault.file: fault for fault in faults}
    assert (
        str(by_file["AITBC_MINER_NEEDED"]) == "AITBC_MINER_NEEDED: needed: is 'many'; must be a whole number"
    )
    assert by_file["AITBC_MINER_NEEDDED"].message == "unknown variable; did you mean AITBC_MINER_NEEDED?"
    assert by_file["AITBC_MINER_SECTION__NAMES"].line is None
    assert str(by_file[str(path)]) == f"{path}:2: section: is a list; must be a mapping of keys to values"
    assert "unknown variable" in by_file["AITBC_MINER_"].message
    # Whole, and none of it taken for a piece of the value.
    shown = "is not valid YAML: expected ',' or ']', but got '<stream end>'"
    assert by_file["AITBC_MINER_SECTION__NAMES"].message == shown
    assert len(faults) == 5


def test_a_yaml_error_quotes_no_piece_of_the_file() -> None:
    assert faults_of("mode: !hunter2!x y") == [":1: is not valid YAML: found undefined tag handle this"]
    assert faults_of("names: {a, b") == [
        ":1: is not valid YAML: expected ',' or '}', but got '<stream end>'",
    ]


def test_a_contradiction_with_an_override_names_the_variable(tmp_path: Path) -> None:
    path = tmp_path / "f.yaml"
    path.write_text("range: {low: 1, high: 3}\n")
    faults: list[Fault] = []
    assert read_document(path, Document, faults, env_overrides={"AITBC_MINER_RANGE__LOW": "4"}) is None
    assert list(map(str, faults)) == ["AITBC_MINER_RANGE__LOW: range.low: is 4, above high"]


def test_line_of(tmp_path: Path) -> None:
    path = tmp_path / "f.yaml"
    path.write_text("a: 1\nitems:\n  - x: 1\n  - x: 2\n    y: 3\n")
    assert line_of(path, ["items", 1, "y"]) == 5
    assert line_of(path, ["items", 1, "nope"]) == 4
    assert line_of(path, ["a", "deeper"]) == 1
    assert line_of(tmp_path / "nope", ["a"]) is None


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from([*Document.__struct_fields__]), inner)
    ),
)


@settings(deadline=None)
@given(st.text() | VALUES.map(lambda value: msgspec.yaml.encode(value).decode()))
def test_never_an_exception(text: str) -> None:
    faults: list[Fault] = []
    document = decode_text(text, Document, faults, file="f.yaml")
    assert (document is None) == bool(faults)
