"""Typed values: what fits each kind, and that no path leaves the job's directory."""

import posixpath
import re
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aitbc_miner.allowlist.entries import Entry
from aitbc_miner.allowlist.patterns import A_MATCH, MAX_WORK, TooMuchWork, Work, parse_pattern
from aitbc_miner.allowlist.values import InputFile, OutputFile
from aitbc_miner.config.document import Fault, decode_text
from tests.unit.allowlist.test_grammar import COMMAND, entry


def fits(value: str, text: str, inputs: list[str] | None = None) -> bool:
    """Judge an option's value, so that a dash at its front does not decide."""
    given = entry(f"options: [{{name: -q, value: {value}, write: [equals]}}]\n")
    return given.objection([f"-q={text}"], inputs) is None


@pytest.mark.parametrize(
    ("value", "good", "bad"),
    [
        (
            "{int: {min: 0, max: 51}}",
            ["0", "7", "51"],
            ["-0", "-1", "52", "07", "+7", "7.0", "0x7", "1_0", " 7", "\u0663", "", "1e1", "9" * 30],
        ),
        ("{int: {min: -5, max: -1}}", ["-5", "-1"], ["-0", "0", "5", "--5", "\u22125", "-05"]),
        (
            "{float: {min: 0, max: 3600}}",
            ["0", "0.5", "3600", "3600.000", "59.94"],
            ["-0", "-0.0", "3600.1", "nan", "inf", "1e3", "1_0", ".5", "5.", "+5", "05", "", "\u0663.5"],
        ),
        ("{float: {min: -1.5, max: 0}}", ["-1.5", "-0.0", "-0", "0"], ["-1.51", "0.01", "--1"]),
        ("{float: {min: 0.1, max: 60}}", ["0.1", "60.0"], ["60.000000000000001", "0.099999999999999"]),
        ("{enum: [libx264, copy]}", ["copy"], ["Copy", "copy ", "", "libx264,copy"]),
        ("{regex: '[0-9]{1,4}x[0-9]{1,4}'}", ["1x1", "1920x1080"], ["1x", "x1x1", "1x1\n", "1920x10800"]),
        ("{regex: 'a|bc'}", ["a", "bc"], ["ac", "ab", "abc"]),
        (
            "{text: {max_length: 5, chars: 'a-c .-'}}",
            ["a", "c b.", "-----", " "],
            ["", "aaaaaa", "d", "A", "a\tb", "a\nb"],
        ),
        ("{text: {max_length: 3, min_length: 0, chars: 'à-ï]^'}}", ["", "é", "]^", "éï"], ["e", "\\", "["]),
        ("{text: {max_length: 3, chars: '-a'}}", ["-a-"], ["b"]),
        ("{text: {max_length: 3, chars: '+--'}}", ["+,-"], ["."]),
    ],
)
def test_what_a_value_is(value: str, good: list[str], bad: list[str]) -> None:
    assert [text for text in good if not fits(value, text)] == []
    assert [text for text in bad if fits(value, text)] == []


LEAVING = [
    "..",
    "../x",
    "../../x",
    "/etc/passwd",
    "//x",
    "a/../b",
    "~/a",
    "../output/../x",
    "\uff0fa",
    "a\\b",
]
NO_NAMES = ["", ".", "a//b", "a/", "a/./b", "./a", "../output", "../output/", "../output//a", "x" * 256]
OPTIONS = ["-a", "--", "a/-b", "+a", "../output/-a"]
SCHEMES = [
    "http://h/x",
    "http:x",
    "file:a",
    "concat:a|b",
    "pipe:1",
    "data:,x",
    "a:b",
    "C:\\a",
    "@a",
    "|a",
    "=a",
]
SPECIAL = ["%d.png", "a%d", "a*", "a?", "a[0]", "a b", "$a", "`a`", "a;b", "a&b", "a>b", "a'b", 'a"b', "!a"]
UNSEEN = [".a", "a/.b", "../output/.a", "a\nb", "a\0", "a\x7f", "a\u202eb", "\udc80", "é"]
DEEP = ["a/" * 8 + "a", "../output/" + "a/" * 8 + "a"]


@pytest.mark.parametrize("text", [*LEAVING, *NO_NAMES, *OPTIONS, *SCHEMES, *SPECIAL, *UNSEEN, *DEEP])
def test_a_path_cannot_mean_anything_but_a_file_of_the_job(text: str) -> None:
    assert not fits("output", text)
    assert not fits("input", text, [text])
    assert not fits("{output: {chars: ''}}", text)


def test_outputs_are_beneath_work_or_output() -> None:
    good = [
        "a",
        "a.mp4",
        "_a",
        "0",
        "a/b/c.x",
        "../output/a.mp4",
        "../output/a/b",
        "output/a",
        "a..b",
        "x" * 255,
    ]
    assert [text for text in good if not fits("output", text)] == []
    suffixed = "{output: {suffixes: [.mp4, .tar.gz]}}"
    assert fits(suffixed, "a.mp4")
    assert fits(suffixed, "../output/a.tar.gz")
    for text in ("a.MP4", "a.mp4.sh", "mp4", ".mp4", "a.gz", "a/.mp4"):
        assert not fits(suffixed, text)


def test_an_input_is_one_that_the_job_has() -> None:
    assert fits("input", "a.mp4", ["a.mp4"])
    assert not fits("input", "b.mp4", ["a.mp4"])
    assert not fits("input", "a.mp4", [])
    assert fits("input", "b.mp4")
    assert not fits("input", "../output/a.mp4", ["../output/a.mp4"])
    assert not fits("input", "work/a", ["work/a"])


def test_further_characters_are_only_those_and_never_the_first() -> None:
    frames = "{output: {chars: '%# ', suffixes: [.png]}}"
    for text in ("frame%04d.png", "a b.png", "out/frame####.png"):
        assert fits(frames, text)
    for text in ("%d.png", "#.png", " a.png", "a/#b.png", "a+b.png", "a:b.png"):
        assert not fits(frames, text)
    assert fits("{input: {chars: 'ü-]^'}}", "aü-]^b", ["aü-]^b"])
    assert not fits("{input: {chars: 'ü-]^'}}", "aý", ["aý"])


path_texts = st.text(st.sampled_from("a./-:_%\\ 0~") | st.characters(), max_size=12)
pieces = st.sampled_from(["..", ".", "output", "a", "-b", "", "a.b", "x" * 255, "http:", "é"])
paths = st.lists(pieces, max_size=5).map("/".join) | path_texts


@given(paths)
@settings(deadline=None)
def test_no_output_leaves_the_jobs_directory(text: str) -> None:
    if OutputFile().fits(text, None, Work()):
        real = posixpath.normpath(posixpath.join("/job/work", text))
        assert real.startswith(("/job/work/", "/job/output/"))
        assert text.replace("../output/", "", 1) == real.removeprefix("/job/work/").removeprefix(
            "/job/output/"
        )
        assert re.fullmatch(r"(\.\./output/)?\w[\w./-]*", text, re.ASCII)


@given(paths)
@settings(deadline=None)
def test_no_input_is_anywhere_but_in_work(text: str) -> None:
    if InputFile(chars="%~").fits(text, [text], Work()):
        assert re.fullmatch(r"\w[\w.%~-]*", text, re.ASCII)


@pytest.mark.parametrize(
    ("value", "key", "words"),
    [
        ("{int: {min: 3, max: 2}}", "int.max", "2 is below min (3)"),
        ("{int: {min: 0}}", "int.max", "missing"),
        ("{int: {min: 0, max: 1.5}}", "int.max", "a whole number"),
        ("{float: {min: 0, max: .inf}}", "float.max", "a number"),
        ("{float: {min: .nan, max: 1}}", "float.min", "a number"),
        ("{float: {min: 1, max: 0}}", "float.max", "below min"),
        ("{enum: []}", "enum", "at least 1"),
        ("{enum: [1]}", "enum[0]", "printable characters in quotes"),
        ('{enum: ["a\\nb"]}', "enum[0]", "at most 4096 printable characters"),
        ("{regex: '('}", "regex", "missing )"),
        ("{regex: '(?=a)'}", "regex", "RE2"),
        ("{input: {suffixes: [mp4]}}", "input.suffixes[0]", "such as .mp4"),
        ("{output: {suffixes: [../x]}}", "output.suffixes[0]", "such as .mp4"),
        ("{output: {chars: 'a/'}}", "output.chars", r"without / \ and :"),
        ("{output: {chars: ':'}}", "output.chars", r"without / \ and :"),
        ("{input: {char: a}}", "input.char", "did you mean chars"),
        ("{text: {max_length: 5}}", "text.chars", "missing"),
        ("{text: {max_length: 5, chars: ''}}", "text.chars", "ranges"),
        ("{text: {max_length: 5, chars: 'z-a'}}", "text.chars", "the range z-a"),
        ('{text: {max_length: 5, chars: "a\\n"}}', "text.chars", "printable"),
        ("{text: {max_length: 5, min_length: 6, chars: a}}", "text.max_length", "below min_length"),
        ("{text: {max_length: 5000, chars: a}}", "text.max_length", "at most 4096"),
    ],
)
def test_a_fault_in_a_value_has_its_key(value: str, key: str, words: str) -> None:
    faults: list[Fault] = []
    text = f"{COMMAND}operands:\n  - value: {value}\n"
    assert decode_text(text, Entry, faults, file="entry.yaml") is None
    (fault,) = faults
    assert (fault.line, fault.key) == (3, f"operands[0].value.{key}")
    assert words in fault.message


# --- work --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "pattern", ["(a*)*b", "(a|a)*b", "(x+x+)+y", "(.*)*c", ".*a[ab]{900}", "(a?){500}a{500}"]
)
def test_no_pattern_hangs(pattern: str) -> None:
    slow: Any = parse_pattern(pattern)
    took = []
    for length in (1, 100, 10_000, 100_000):
        for letter in "ax":
            start = time.process_time()
            try:
                Work().fits(slow, letter * length)
            except TooMuchWork:
                assert length * slow.programsize > MAX_WORK / 4
            took.append(time.process_time() - start)
    # 10 ms on a machine that has nothing else to do.
    assert sorted(took)[-2] < 0.1


def test_what_was_matched_once_is_remembered() -> None:
    pattern = parse_pattern("[a-z]*")
    work = Work(3 * A_MATCH + 1000 * pattern.programsize)
    for _ in range(20):
        assert work.fits(pattern, "a" * 1000)
    with pytest.raises(TooMuchWork):
        work.fits(pattern, "b" * 1000)


def test_an_input_whose_name_is_no_utf8_is_only_not_shown() -> None:
    given = entry("operands: [{value: input}]\n")
    objection = given.objection(["b"], ["\udcff", "a"])
    assert objection is not None
    assert objection.fits == ("an input of this job: a",)
