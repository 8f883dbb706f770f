"""The JSON Schema for editors: it may know less than the loader, but takes all that the loader takes."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import Struct
from msgspec.structs import fields

from aitbc_miner.allowlist.entries import Command, Entry
from aitbc_miner.allowlist.rules import Operand, Option, Section
from aitbc_miner.allowlist.values import FloatRange, InputFile, IntRange, OutputFile, TextValue, Value
from aitbc_miner.config.document import Fault, decode_text
from tests.unit.allowlist.test_grammar import FFMPEG, PROGRAM, WRITES, entries

CHECKOUT = Path(__file__).parents[3]
SCHEMA: dict[str, Any] = json.loads((CHECKOUT / "docs" / "allowlist.schema.json").read_text())
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)
VALUE = SCHEMA["$defs"]["value"]["anyOf"][1]
PAGES = (CHECKOUT / "docs" / "allowlist.md").read_text().split("```yaml\n")[1:]
SAMPLES = {path.name: path.read_text() for path in sorted((CHECKOUT / "etc" / "allowlist.d").glob("*.yaml"))}
BY_HAND = {"ffmpeg": FFMPEG, "writes": WRITES}


def loads(text: str) -> list[Fault]:
    faults: list[Fault] = []
    decode_text(text, Entry, faults, file="entry.yaml")
    return faults


def test_the_schema_is_one() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)


@pytest.mark.parametrize(
    ("struct", "schema"),
    [
        (Entry, SCHEMA),
        (Command, SCHEMA["properties"]["command"]),
        (Section, SCHEMA["$defs"]["section"]),
        (Option, SCHEMA["$defs"]["option"]),
        (Operand, SCHEMA["$defs"]["operand"]),
        (Value, VALUE),
        (IntRange, VALUE["properties"]["int"]),
        (FloatRange, VALUE["properties"]["float"]),
        (TextValue, VALUE["properties"]["text"]),
        (InputFile, SCHEMA["$defs"]["path"]),
        (OutputFile, SCHEMA["$defs"]["path"]),
    ],
)
def test_it_has_the_keys_that_the_loader_has(struct: type[Struct], schema: dict[str, Any]) -> None:
    known = {field.encode_name: field.required for field in fields(struct)}
    assert set(schema["properties"]) == set(known)
    assert set(schema.get("required", [])) == {key for key, required in known.items() if required}
    assert schema["additionalProperties"] is False


@pytest.mark.parametrize("name", SAMPLES)
def test_each_sample_is_valid(name: str) -> None:
    VALIDATOR.validate(yaml.safe_load(SAMPLES[name]))


@pytest.mark.parametrize("page", [page.split("```")[0] for page in PAGES])
def test_each_example_of_the_documentation_is_valid_and_loads(page: str) -> None:
    VALIDATOR.validate(yaml.safe_load(page))
    assert loads(page) == []


@pytest.mark.parametrize("name", BY_HAND)
def test_what_the_other_tests_load_is_valid(name: str) -> None:
    VALIDATOR.validate({**PROGRAM, **yaml.safe_load(BY_HAND[name])})


@pytest.mark.parametrize(
    "text",
    [
        "args: []\n",
        "command: {path: bin/prog}\n",
        "command: {path: /usr/bin/true, name: a/b}\n",
        "command: {path: /usr/bin/true, sha256: abc}\n",
        "command: {path: /usr/bin/true}\nmax_runtime: 5\n",
        "command: {path: /usr/bin/true}\nmax_output_mb: 0\n",
        "command: {path: /usr/bin/true}\nargs: [[]]\n",
        "command: {path: /usr/bin/true}\nargs: [[7]]\n",
        "command: {path: /usr/bin/true}\nargs: [[a]]\nsections: [{}]\n",
        "command: {path: /usr/bin/true}\nargs: [[a]]\norder: any\n",
        "command: {path: /usr/bin/true}\nsections: [{}]\noperands: [{value: input}]\n",
        "command: {path: /usr/bin/true}\noptions: [{name: a}]\n",
        "command: {path: /usr/bin/true}\noptions: [{name: []}]\n",
        "command: {path: /usr/bin/true}\noptions: [{name: -a, write: [equals]}]\n",
        "command: {path: /usr/bin/true}\noptions: [{name: -a, value: file}]\n",
        "command: {path: /usr/bin/true}\noperands: [{value: {int: {min: 0}}}]\n",
        "command: {path: /usr/bin/true}\noperands: [{value: {}}]\n",
        "command: {path: /usr/bin/true}\noperands: [{value: {regex: a, input: {}}}]\n",
        "command: {path: /usr/bin/true}\noperands: [{value: {output: {suffixes: [mp4]}}}]\n",
        "command: {path: /usr/bin/true}\noperands: [{value: {output: {chars: '/'}}}]\n",
        "command: {path: /usr/bin/true}\nkind: tpu\n",
        "command: {path: /usr/bin/true}\nenv: [1A]\n",
        "command: {path: /usr/bin/true}\nbinds: [srv]\n",
    ],
)
def test_both_refuse_a_fault_of_form(text: str) -> None:
    assert loads(text)
    assert not VALIDATOR.is_valid(yaml.safe_load(text))


# Values of every kind, to put where something else belongs.
ANYTHING: st.SearchStrategy[Any] = st.sampled_from(
    [None, True, 0, 1, -1, 2.5, "", "a", "-a", "input", [], ["-a"], [[]], {}, {"min": 0}]
)


@st.composite
def spoiled(draw: Callable[..., Any]) -> dict[str, Any]:
    """Draw an entry in which a few values are not what they were, or not there."""
    document = json.loads(json.dumps({**PROGRAM, **draw(entries())}))
    for _ in range(draw(st.integers(0, 3))):
        place: Any = document
        while isinstance(place, dict | list) and place:
            keys = sorted(place) if isinstance(place, dict) else list(range(len(place)))
            key = draw(st.sampled_from(keys))
            if draw(st.integers(0, 2)) and isinstance(place[key], dict | list) and place[key]:
                place = place[key]
                continue
            if draw(st.booleans()):
                # A copy: the next change may be within it.
                place[key] = copy.deepcopy(draw(ANYTHING))
            else:
                del place[key]
            break
    return document  # type: ignore[no-any-return]


def test_a_section_that_is_nothing_is_taken_by_neither() -> None:
    document = {**PROGRAM, "sections": [None]}
    assert loads(json.dumps(document))
    assert not VALIDATOR.is_valid(document)


@given(spoiled())
@settings(deadline=None)
def test_what_the_loader_takes_the_schema_takes(document: dict[str, Any]) -> None:
    if not loads(json.dumps(document)):
        VALIDATOR.validate(document)
