from pathlib import Path
from typing import Any

import msgspec
import pytest
from msgspec import Struct

from aitbc_miner.coordinator import aitbc_wire, services
from aitbc_miner.coordinator.http import HttpReply
from aitbc_miner.coordinator.services import Field
from aitbc_miner.jobs import ManifestError, decode_manifest
from aitbc_miner.store.records import Records
from aitbc_miner.util import forgiving

PLAIN: dict[str, Any] = {
    "job_id": "j-1",
    "runner": "cli",
    "command": "true",
    "requirements": {"gpu": False, "vram_mb": 0, "cpu_threads": 1, "memory_mb": 64},
    "timeout_s": 60,
    "priority": 1,
    "input": {"urls": ["http://a/b", {"url": "http://a/c"}], "inline": {}},
    "artifacts": [{"path": "out"}],
    "retry": {"max_attempts": 2},
    "params": {"kept": None, "number": 1.0},
}
ODD: dict[str, Any] = PLAIN | {
    "requirements": {"gpu": None, "vram_mb": 0.0, "cpu_threads": 1.0, "memory_mb": 6.4e1},
    "timeout_s": 60.0,
    "priority": 1.0,
    "input": {"urls": ["http://a/b", {"url": "http://a/c", "name": None, "sha256": None}], "inline": None},
    "artifacts": [{"path": "out", "type": None, "max_mb": None}],
    "retry": {"max_attempts": 2.0, "on": None},
    "args": None,
    "env": None,
    "secrets": None,
    "task": None,
}
OPTIONAL = ("requirements", "timeout_s", "priority", "input", "args", "params", "artifacts", "env", "retry")


def test_a_manifest_in_another_languages_words_is_the_same_manifest(tmp_path: Path) -> None:
    assert decode_manifest(ODD) == decode_manifest(PLAIN)
    assert decode_manifest(PLAIN).params == {"kept": None, "number": 1.0}
    # And what is on disk is read so by everybody.
    records = Records(tmp_path)
    records.create("j-1", msgspec.json.encode(ODD))
    with records.open("j-1") as job:
        assert job.manifest() == decode_manifest(PLAIN)


@pytest.mark.parametrize("key", OPTIONAL)
def test_null_is_what_is_left_out(key: str) -> None:
    without = {name: value for name, value in PLAIN.items() if name != key}
    assert decode_manifest({**PLAIN, key: None}) == decode_manifest(without)


@pytest.mark.parametrize(
    ("odd", "named"),
    [
        ({"runner": None}, "$.runner"),
        ({"requirements": {"cpu_threads": 1.5}}, "$.requirements.cpu_threads"),
        ({"requirements": {"cpu_threads": 1e300}}, "$.requirements.cpu_threads"),
        ({"requirements": {"cpu_threads": "1"}}, "$.requirements.cpu_threads"),
        ({"requirements": {"gpu": 1.0}}, "$.requirements.gpu"),
        ({"input": []}, "$.input"),
        ({"input": {"urls": [{"url": None}]}}, "$.input.urls[0]"),
        ({"env": {"A": None}}, "$.env[...]"),
        ({"artifacts": [None]}, "$.artifacts[0]"),
        ({"retry": {"max_attempts": 0.0}}, "$.retry.max_attempts"),
    ],
)
def test_what_is_not_meant_is_named(odd: dict[str, Any], named: str) -> None:
    with pytest.raises(ManifestError) as caught:
        decode_manifest({**PLAIN, **odd})
    assert named in str(caught.value)


def test_the_jobs_of_an_aitbc_coordinator() -> None:
    body = b'{"job_id":"j-1","payload":null,"state":null,"expires_at":null,"constraints":null}'
    taken: list[Any] = []

    def note(job_id: str, payload: Any) -> dict[str, Any]:
        taken.append((job_id, payload))
        return PLAIN

    aitbc_wire.pulled_job(HttpReply(200, body), 1000, note, "pull a job")
    page = HttpReply(200, b'{"jobs":[' + body + b'],"total":1.0}')
    assert [one.job_id for one in aitbc_wire.assigned_jobs(page, note, "list jobs")] == ["j-1"]
    assert aitbc_wire.states(page, "list jobs") == [("j-1", "")]
    assert taken == [("j-1", {}), ("j-1", {})]


class Tree(Struct):
    sons: dict[str, list["Tree | int"]] = {}
    size: int | None = 7


def test_types_of_types() -> None:
    odd = {"sons": {"a": [1.0, {"size": 2.0}, {"sons": None}]}, "size": None}
    assert forgiving.convert(odd, Tree) == Tree({"a": [1, Tree(size=2), Tree()]})


def test_a_whole_number_of_a_payload() -> None:
    whole = services._checked(Field(type="int"), 3.0)
    assert (whole, type(whole)) == (3, int)
    with pytest.raises(ValueError, match="must be a whole number"):
        services._checked(Field(type="int"), 3.5)
    assert type(services._checked(Field(type="number"), 3.0)) is float
