"""Sections, options and operands: what follows a grammar, what does not, and what is said of it."""

import json
import time
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aitbc_miner.allowlist.entries import Entry
from aitbc_miner.allowlist.grammar import judge_sections
from aitbc_miner.allowlist.patterns import Objection
from aitbc_miner.allowlist.rules import Section
from aitbc_miner.config.document import Fault, decode_text
from tests.support.allowlist_reference import allowed

PROGRAM = {"command": {"path": "/usr/bin/true"}}
COMMAND = "command: {path: /usr/bin/true}\n"

FFMPEG = """\
sections:
  - name: global
    options: [{name: "-y"}]
  - name: inputs
    min: 1
    max: 2
    options:
      - {name: "-t", value: {float: {min: 0, max: 60}}}
    operands:
      - {name: "-i", value: {input: {suffixes: [.mp4]}}}
  - name: output
    min: 1
    options:
      - {name: "-crf", value: {int: {min: 0, max: 51}}}
      - {name: "-an"}
      - {name: "-c:a", value: {enum: [aac, copy]}}
    exclusive: [["-an", "-c:a"]]
    operands:
      - {value: {output: {suffixes: [.mp4]}}}
"""


def entry(text: str) -> Entry:
    faults: list[Fault] = []
    read = decode_text(COMMAND + text, Entry, faults, file="entry.yaml")
    assert read is not None, list(map(str, faults))
    return read


def judge(text: str, line: str, inputs: list[str] | None = None) -> Objection | None:
    return entry(text).objection(line.split(), inputs)


@pytest.mark.parametrize(
    "line",
    [
        "-i a.mp4 o.mp4",
        "-y -i a.mp4 o.mp4",
        "-t 5 -i a.mp4 -t 0.5 -i b.mp4 -crf 51 -an o.mp4",
        "-i a.mp4 -c:a copy -crf 0 ../output/x/o.mp4",
    ],
)
def test_sections_follow_one_another(line: str) -> None:
    assert judge(FFMPEG, line) is None


NOT_THERE, IN, OUT = "is not allowed at this place", "sections[1]", "sections[2]"


@pytest.mark.parametrize(
    ("line", "at", "words", "rule"),
    [
        ("", 0, "an argument is missing; what would fit: -y, -i with an input", ""),
        ("-i", 1, "an argument is missing after argument 1 ('-i'); what", f"{IN}.operands[0]"),
        ("-i a.mp4", 2, "an argument is missing after", ""),
        (
            "-i a.avi o.mp4",
            1,
            "('a.avi') is not a value of -i; what would fit: an in",
            f"{IN}.operands[0].value",
        ),
        ("-i a.mp4 -y o.mp4", 2, f"argument 3 ('-y') {NOT_THERE}", ""),
        ("-y -y -i a.mp4 o.mp4", 1, "argument 2 ('-y') may be used only once", "sections[0].options[0]"),
        ("-i a.mp4 -i b.mp4 -i c.mp4 o.mp4", 4, f"argument 5 ('-i') {NOT_THERE}", ""),
        (
            "-i a.mp4 -crf 52 o.mp4",
            3,
            "4 ('52') is not a value of -crf; what would",
            f"{OUT}.options[0].value",
        ),
        ("-i a.mp4 -crf -1 o.mp4", 3, "argument 4 ('-1') is not a value of -crf", f"{OUT}.options[0].value"),
        ("-i a.mp4 -an -c:a aac o.mp4", 3, "cannot be used together with -an", f"{OUT}.options[2]"),
        ("-i a.mp4 o.mp4 p.mp4", 3, "('p.mp4') is one too many", OUT),
        ("-i a.mp4 o.mp4 -an", 3, "argument 4 ('-an') must come before the operands", f"{OUT}.options[1]"),
        ("-i a.mp4 ../o.mp4", 2, f"argument 3 ('../o.mp4') {NOT_THERE}", ""),
        ("-i -i.mp4 o.mp4", 1, "is not a value of -i", f"{IN}.operands[0].value"),
    ],
)
def test_an_objection_names_the_argument_the_rule_and_what_would_fit(
    line: str, at: int, words: str, rule: str
) -> None:
    objection = judge(FFMPEG, line)
    assert objection is not None
    assert (objection.at, objection.rule) == (at, rule)
    assert words in str(objection)
    assert str(objection).isprintable()


def test_what_would_fit_names_the_inputs_that_there_are() -> None:
    objection = judge(FFMPEG, "-i b.mp4 o.mp4", ["a.mp4", "a.txt", "-x.mp4"])
    assert objection is not None
    assert objection.fits == ("an input of this job (.mp4): a.mp4",)
    assert judge(FFMPEG, "-i b.mp4 o.mp4", ["b.mp4"]) is None
    none = judge(FFMPEG, "-i b.mp4 o.mp4", [])
    assert none is not None
    assert none.fits == ("an input of this job (.mp4): the job has none",)


WRITES = """\
options:
  - {name: [-t, --time], value: {int: {min: 0, max: 9}}, write: [separate, equals]}
  - {name: -O, value: {enum: ["2", "s"]}, write: [joined]}
  - {name: -Ofast}
  - {name: -I, value: {regex: '[a-z=]*'}, write: [joined, equals], max: 2}
"""


@pytest.mark.parametrize(
    ("line", "good"),
    [
        ("-t 5", True),
        ("-t=5", True),
        ("--time=5", True),
        ("-t5", False),
        ("--time=", False),
        ("-t 5 --time 6", False),
        ("--tim=5", False),
        ("-O2", True),
        ("-O 2", False),
        ("-O", False),
        ("-O=2", False),
        ("-Ofast", True),
        ("-Ofas", False),
        ("-Ofast -Os", True),
        ("-Ia=b -I=c", True),
        ("-I=", True),
        ("-I", False),
        ("-I=a -I=b -I=c", False),
    ],
)
def test_a_value_is_written_only_as_its_option_says(line: str, good: bool) -> None:
    assert (judge(WRITES, line) is None) == good


@pytest.mark.parametrize(
    ("order", "line", "good"),
    [
        ("options_first", "-b -a x", True),
        ("options_first", "-a x -b", False),
        ("fixed", "-a -b x", True),
        ("fixed", "-b -a x", False),
        ("fixed", "-a x -b", False),
        ("any", "-b x -a", True),
        ("any", "x -b -a", True),
        ("any", "x -b -a y", False),
        ("any", "-b -a", False),
    ],
)
def test_the_order_is_what_the_section_says(order: str, line: str, good: bool) -> None:
    text = f"options: [{{name: -a}}, {{name: -b}}]\noperands: [{{value: {{enum: [x, y]}}}}]\norder: {order}\n"
    assert (judge(text, line) is None) == good


def test_a_required_option_is_asked_for_first() -> None:
    text = "options: [{name: -a}, {name: -b, required: true}]\noperands: [{value: output, min: 0}]\n"
    assert judge(text, "-b") is None
    for line in ("", "-a", "x"):
        objection = judge(text, line)
        assert objection is not None
        assert objection.fits[0] == "-b"


def test_optional_operands_are_read_in_every_way_that_fits() -> None:
    text = "operands: [{value: input, min: 0, max: 9}, {value: {enum: [x]}, min: 0}, {value: output}]\n"
    for line, good in (("a", True), ("x", True), ("x x", True), ("a x x b", True), ("a " * 10, True)):
        assert (judge(text, line) is None) == good
    assert judge(text, "a " * 12) is not None
    assert judge(text, "a x b", ["a"]) is None
    assert judge(text, "a b c", ["a"]) is not None


def test_a_bare_command_takes_no_argument() -> None:
    assert judge("", "") is None
    objection = judge("", "-v")
    assert objection is not None
    assert str(objection) == "argument 1 ('-v') is one too many"


@pytest.mark.parametrize("arg", ["a\nb", "a\0", "\x1b[2J", "a\u202eb", "\u2028"])
def test_no_control_character_gets_through_any_value(arg: str) -> None:
    every = entry("operands: [{value: {regex: '(?s).*'}, min: 0, max: 9}]\n")
    objection = every.objection([arg])
    assert objection is not None
    assert "argument 1" in str(objection)
    assert "has unprintable characters" in str(objection)
    assert str(objection).isprintable()
    assert every.objection(["a b"]) is None


def test_no_argument_is_longer_than_any_value_may_be() -> None:
    every = entry("operands: [{value: {regex: '.*'}}]\nmax_total_args_len: 10000\n")
    assert every.objection(["a" * 4096]) is None
    assert "argument 1" in str(every.objection(["a" * 4097]))
    assert "longer than 4096" in str(every.objection(["a" * 4097]))


# --- what an operator may write ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "line", "key", "words"),
    [
        ("options: [{name: t}]\n", 2, "options[0].name", "an option with its dashes"),
        ("options: [{name: '-t=5'}]\n", 2, "options[0].name", "without `=`"),
        ("options: [{name: '-'}]\n", 2, "options[0].name", "an option with its dashes"),
        ("options:\n  - {name: -a}\n  - {name: [-b, -a]}\n", 3, "options", "has -a twice"),
        ("options: [{name: -a, write: [equals]}]\n", 2, "options[0].write", "no `value`"),
        ("options: [{name: --ab, value: input, write: [joined]}]\n", 2, "options[0].write", "one letter"),
        ("options: [{name: -a, write: [glued], value: input}]\n", 2, "options[0].write[0]", "separate, "),
        ("options: [{name: -a, max: 0}]\n", 2, "options[0].max", "at least 1"),
        ("options: [{name: -a, value: {}}]\n", 2, "options[0].value", "has 0 kinds"),
        ("operands: [{value: {int: {min: 0, max: 1}, regex: a}}]\n", 2, "operands[0].value", "has 2 kinds"),
        ("options: [{name: -a, value: inputs}]\n", 2, "options[0].value", "input"),
        ("options: [{name: -a, valeu: input}]\n", 2, "options[0].valeu", "did you mean value"),
        ("operands: [{value: {int: {min: -1, max: 1}}}]\n", 2, "operands[0].value", "read -5 as an option"),
        ("operands: [{value: {enum: [a, -b]}}]\n", 2, "operands[0].value", "begins with a dash"),
        ("operands: [{value: input, min: 3, max: 2}]\n", 2, "operands[0].max", "below min"),
        ("operands: [{name: -a, value: input}]\noptions: [{name: -a}]\n", 2, "operands", "an option as well"),
        ("options: [{name: -a}]\nexclusive: [[-a, -b]]\n", 3, "exclusive", "names -b"),
        ("sections:\n  - options: []\n    exclusive: [[-b]]\n", 4, "sections[0].exclusive", "names -b"),
        ("sections:\n  - {max: 1, min: 2}\n", 3, "sections[0].max", "below min"),
        ("sections: [{}]\noptions: [{name: -a}]\n", 3, "options", "beside `sections`"),
        ("args: [[a]]\noptions: [{name: -a}]\n", 3, "options", "beside `args`"),
        ("args: [[a]]\nsections: [{}]\n", 3, "sections", "beside `args`"),
        ("args: [[a]]\norder: any\n", 3, "order", "beside `args`"),
        ("leading: [a, 1]\n", 2, "leading[1]", "put it in quotes"),
        ('leading: ["a\\0b"]\n', 2, "leading", "NUL"),
        ("kind: tpu\n", 2, "kind", "cpu, gpu"),
        ("binds: [srv]\n", 2, "binds[0]", "absolute path"),
        ("binds: [/etc]\n", 2, "binds[0]", "/etc/aitbc"),
        ("binds: [/bin]\n", 2, "binds[0]", "without symbolic links; write "),
    ],
)
def test_a_fault_has_its_line_and_key(text: str, line: int, key: str, words: str) -> None:
    faults: list[Fault] = []
    assert decode_text(COMMAND + text, Entry, faults, file="entry.yaml") is None
    (fault,) = faults
    assert (fault.line, fault.key) == (line, key)
    assert words in fault.message


# --- work --------------------------------------------------------------------------------------------------


def sections(text: str) -> list[Section]:
    return entry(text).grammar


AMBIGUOUS = "sections:\n" + "  - {operands: [{value: {regex: '[ab]*'}, min: 0, max: 999}], max: 999}\n" * 16
RANGES = "operands: [{value: input, min: 0, max: 9999}, {value: input, min: 0, max: 9999}]\n"
OPTIONS = "sections:\n" + "  - {options: [{name: -a, max: 9999}], max: 999}\n" * 16
SLOW = "operands: [{value: {regex: '.*a[ab]{900}'}, min: 0, max: 99}]\n"


@pytest.mark.parametrize(
    ("text", "args"),
    [
        (AMBIGUOUS, ["a"] * 60 + ["c"]),
        (AMBIGUOUS, ["a"] * 9999),
        (RANGES, ["a"] * 9999),
        (OPTIONS, ["-a"] * 200 + ["b"]),
        (SLOW, ["ab" * 2048]),
        (SLOW, [letter + "a" * 1600 for letter in "abcdef"]),
    ],
)
def test_hostile_arguments_end_within_the_work_limit(text: str, args: list[str]) -> None:
    grammar = sections(text)
    took = []
    for _ in range(3):
        start = time.process_time()
        objection = judge_sections(grammar, args, None)
        took.append(time.process_time() - start)
        assert objection is not None
    # 10 ms on a machine that has nothing else to do.
    assert min(took) < 0.1
    assert "takes too much work" in str(objection)


def test_many_arguments_that_fit_are_no_trouble() -> None:
    many = [f"input{number}.txt" for number in range(500)]
    assert (
        judge_sections(sections(RANGES.replace(", {value: input, min: 0, max: 9999}", "")), many, many)
        is None
    )


# --- the same said twice -----------------------------------------------------------------------------------

VALUES: list[Any] = [
    {"int": {"min": -2, "max": 3}},
    {"int": {"min": 0, "max": 12}},
    {"float": {"min": -0.5, "max": 2}},
    {"enum": ["x", "y", "+y", "-b"]},
    {"regex": "-?[a-c]{0,2}"},
    {"text": {"max_length": 3, "chars": "a-c,-"}},
    "input",
    "output",
    {"input": {"suffixes": [".b"], "chars": " "}},
]
BARE: list[Any] = [{"int": {"min": 0, "max": 2}}, {"enum": ["x", "y", "-"]}, *VALUES[4:]]
WORDS = [
    *("-a", "-b", "-c", "--ab", "+y", "-a=1", "-a1", "-b=x", "-bx", "--ab=", "--ab=a", "-c-1"),
    *(
        "0",
        "1",
        "-1",
        "12",
        "01",
        "+1",
        "1.5",
        "-0",
        "-0.0",
        "nan",
        "1e0",
        "x",
        "y",
        "-",
        "",
        "a",
        "a.b",
        "ab",
    ),
    *("a,b", "é", "../output/a", "../a", "a/b", "/a", "a:b", ".a", "a b.b", "a\n"),
]
INPUTS = ["a", "x", "a.b", "a b.b", "-b", "a:b"]
names = st.sampled_from(["-a", "-b", "-c", "--ab", "+y"])


@st.composite
def options(draw: Callable[..., Any], own: list[str]) -> dict[str, Any]:
    option: dict[str, Any] = {"name": own[0] if len(own) == 1 else own}
    if draw(st.booleans()):
        option["value"] = draw(st.sampled_from(VALUES))
        short = all(len(name) == 2 and name[0] == "-" for name in own)
        ways = ["separate", "equals", "joined"] if short else ["separate", "equals"]
        option["write"] = draw(st.lists(st.sampled_from(ways), min_size=1, unique=True))
    if draw(st.booleans()):
        option["max"] = draw(st.integers(1, 2))
    if draw(st.integers(0, 4)) == 0:
        option["required"] = True
    return option


@st.composite
def operands(draw: Callable[..., Any], free: list[str]) -> dict[str, Any]:
    named = bool(free) and draw(st.integers(0, 3)) == 0
    operand: dict[str, Any] = {"value": draw(st.sampled_from(VALUES if named else BARE))}
    if named:
        operand["name"] = draw(st.sampled_from(free))
    if draw(st.booleans()):
        operand["min"] = draw(st.integers(0, 2))
    if draw(st.booleans()):
        operand["max"] = max(1, operand.get("min", 1)) + draw(st.integers(0, 1))
    return operand


@st.composite
def grammars(draw: Callable[..., Any]) -> dict[str, Any]:
    used = draw(st.lists(names, unique=True, max_size=4))
    cut = draw(st.integers(0, len(used)))
    own = [[name] for name in used[:cut]] + ([used[cut:]] if used[cut:] else [])
    section: dict[str, Any] = {"options": [draw(options(spelled)) for spelled in own]}
    free = [name for name in ("-a", "-b", "-c", "--ab", "+y") if name not in used]
    section["operands"] = draw(st.lists(operands(free), max_size=3))
    section["order"] = draw(st.sampled_from(["options_first", "fixed", "any"]))
    if len(used) > 1 and draw(st.booleans()):
        section["exclusive"] = [draw(st.lists(st.sampled_from(used), min_size=1, max_size=3))]
    return section


@st.composite
def entries(draw: Callable[..., Any]) -> dict[str, Any]:
    if draw(st.booleans()):
        return draw(grammars())  # type: ignore[no-any-return]
    several = draw(st.lists(grammars(), min_size=1, max_size=3))
    for section in several:
        section["min"] = draw(st.integers(0, 1))
        section["max"] = draw(st.integers(1, 2))
    return {"sections": several}


@st.composite
def lines(draw: Callable[..., Any], written: dict[str, Any]) -> list[str]:
    """Draw a list that follows the grammar more or less: pieces that fit somewhere, and a few that do not."""
    pieces: list[list[str]] = []
    for section in written.get("sections", [written]):
        for rule in [*section["options"], *section["operands"]] * section.get("max", 1):
            if draw(st.integers(0, 3)) == 0:
                continue
            name = rule.get("name", [])
            spelled = [name] if isinstance(name, str) else [draw(st.sampled_from(name))] if name else []
            value = [draw(fitting(rule["value"]))] if "value" in rule else []
            how = draw(st.sampled_from(rule.get("write", ["separate"])))
            glue = {"separate": None, "equals": "=", "joined": ""}[how]
            pieces.append([*spelled, *value] if glue is None else [glue.join([*spelled, *value])])
    args = [arg for piece in pieces for arg in piece]
    for _ in range(draw(st.sampled_from([0, 0, 0, 1, 2]))):
        at = draw(st.integers(0, len(args)))
        args[at : at + draw(st.integers(0, 1))] = draw(st.lists(st.sampled_from(WORDS), max_size=1))
    return args[:8]


def fitting(value: Any) -> st.SearchStrategy[str]:
    good = [
        word for word in WORDS if allowed({"options": [{"name": "-q", "value": value}]}, ["-q", word], INPUTS)
    ]
    return st.sampled_from(good)


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_the_grammar_agrees_with_trying_everything(data: st.DataObject) -> None:
    written = data.draw(entries())
    args = data.draw(lines(written))
    faults: list[Fault] = []
    read = decode_text(json.dumps({**PROGRAM, **written}), Entry, faults, file="entry.yaml")
    assert read is not None, list(map(str, faults))
    objection = read.objection(args, INPUTS)
    assert (objection is None) == allowed(written, args, INPUTS), str(objection)
    if objection is not None:
        assert objection.at in range(len(args) + 1)
        assert str(objection).isprintable()
