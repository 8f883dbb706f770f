"""Finding a job's name in JSON that nothing else can read."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aitbc_miner.coordinator.broken_json import find_text

PATH = ("jobs[]", "job_id")


@pytest.mark.parametrize(
    ("body", "path", "found"),
    [
        (b'{"job_id": "a"', ("job_id",), "a"),
        (b'{"payload": {"job_id": "b"}, "job_id": "a", "x', ("job_id",), "a"),
        (b'{"payload": {"job_id": "b", "x', ("job_id",), None),
        (b'{"job": {"params": {"job_id": "b"}, "job_id": "a", [[[', ("job", "job_id"), "a"),
        (b'{"job_id": "b", "job": {"x": 1', ("job", "job_id"), None),
        (b'{"jobs": [{"job_id": "a", "payload": {"x', PATH, "a"),
        (b'{"jobs": [{"payload": {"jobs": [{"job_id": "b"}]}, "job_id": "a"}', PATH, "a"),
        (b'{"job_id": "a\\u0062"', ("job_id",), "ab"),
        (b'{"job_id": 7}', ("job_id",), None),
        (b'{"job_id": ""}', ("job_id",), None),
        (b'{"job_id": "a', ("job_id",), None),
        (b'{"job": [{"job_id": "a"}]', ("job", "job_id"), None),
        (b'{"jobs": {"job_id": "a"', PATH, None),
        (b'[{"job_id": "a"}]', ("job_id",), None),
        (b'"job_id": "a"', ("job_id",), None),
        (b"\xff\xfe", ("job_id",), None),
        (b"", ("job_id",), None),
        (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b', "job_id": "a"', ("job_id",), "a"),
        (b'{"a": ' + b'{"job_id":' * 50_000, ("job_id",), None),
    ],
)
def test_finds_the_name_of_the_job_and_of_nothing_else(
    body: bytes, path: tuple[str, ...], found: str | None
) -> None:
    assert find_text(body, path) == found


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["job_id", "jobs", "x"]), inner, max_size=3)
    ),
)


@given(payload=VALUES, cut=st.integers(0, 40), name=st.text(min_size=1, max_size=20))
def test_what_is_in_the_payload_is_never_taken_for_it(payload: Any, cut: int, name: str) -> None:
    body = json.dumps({"payload": payload, "job_id": name, "rest": "x" * 40}).encode()
    assert find_text(body[: len(body) - cut], ("job_id",)) == name
    assert find_text(json.dumps({"payload": payload}).encode(), ("job_id",)) is None


@given(st.binary(max_size=300))
def test_nothing_can_hurt_it(body: bytes) -> None:
    find_text(body, PATH)
