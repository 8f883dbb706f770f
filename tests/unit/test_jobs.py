"""What is a manifest and what is not, job ids, and the steps of a job."""

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aitbc_miner.errors import ErrorCode
from aitbc_miner.jobs import (
    BROKEN,
    FINAL,
    MOVES,
    NEXT,
    ArtifactSpec,
    InputUrl,
    Manifest,
    ManifestError,
    Outcome,
    Requirements,
    RetryPolicy,
    State,
    StateRecord,
    decode_manifest,
    directory_of,
    job_in,
    valid_job_id,
)

GOOD: dict[str, Any] = {"job_id": "j-1", "runner": "cli", "command": "true"}


def test_the_manifest_of_the_protocol() -> None:
    manifest = decode_manifest(
        {
            "job_id": "j-20250926-001",
            "runner": "cli",
            "requirements": {"gpu": True, "vram_mb": 12000, "cpu_threads": 4, "memory_mb": 8000},
            "timeout_s": 3600,
            "priority": 3,
            "input": {
                "urls": ["https://x/input1.mp4", {"url": "http://y", "max_mb": 2.5}],
                "inline": {"a": "b"},
            },
            "command": "ffmpeg",
            "args": ["-y", "-i", "input1.mp4", "output.mp4"],
            "artifacts": [{"path": "output.mp4", "type": "video/mp4", "max_mb": 5000}],
            "retry": {"max_attempts": 3, "on": ["E_LOST", "E_SIGNAL"]},
            "payment": {"unknown": ["fields", "are", "ignored"]},
        }
    )
    assert manifest.requirements == Requirements(gpu=True, vram_mb=12000, cpu_threads=4, memory_mb=8000)
    assert (manifest.timeout_s, manifest.priority, manifest.args[0]) == (3600, 3, "-y")
    assert manifest.input.urls == ["https://x/input1.mp4", InputUrl(url="http://y", max_mb=2.5)]
    assert manifest.artifacts == [ArtifactSpec(path="output.mp4", type="video/mp4", max_mb=5000)]
    assert manifest.retry == RetryPolicy(max_attempts=3, on=[ErrorCode.E_LOST, ErrorCode.E_SIGNAL])


def test_a_short_manifest_has_modest_defaults() -> None:
    manifest = decode_manifest({"job_id": "j", "runner": "python", "task": "count"})
    assert manifest == Manifest(job_id="j", runner="python", task="count")
    assert (manifest.requirements, manifest.timeout_s, manifest.params) == (Requirements(), None, {})
    # Nothing is run twice that does not ask for it.
    assert manifest.retry == RetryPolicy(max_attempts=1, on=[])


@pytest.mark.parametrize("job_id", ["a", "A-1._x", "x" * 128, "...", "-rf", "0", ".brokenn", BROKEN, NEXT])
def test_an_id_that_can_be_a_directory(job_id: str) -> None:
    assert valid_job_id(job_id)
    assert decode_manifest({**GOOD, "job_id": job_id}).job_id == job_id
    assert job_in(directory_of(job_id)) == job_id
    # None is the name of what we have there ourselves, which no directory of a job can be taken for.
    assert directory_of(job_id) not in {BROKEN, NEXT}
    assert [job_in(name) for name in (BROKEN, NEXT, "+reserve", "+new-a", "+jobx")] == [None] * 5


BAD_IDS = [
    "",
    ".",
    "..",
    "x" * 129,
    "a/b",
    "a\0",
    "a\n",
    "ä",
    "a b",
    None,
    5,
    True,
    ["a"],
    {"a": 1},
    "\u0661",
]


@pytest.mark.parametrize("job_id", BAD_IDS, ids=ascii)
def test_an_id_that_can_not(job_id: object) -> None:
    assert not valid_job_id(job_id)
    with pytest.raises(
        ManifestError, match=r"^cannot accept the job: job_id .* is not 1 to 128 of"
    ) as caught:
        decode_manifest({**GOOD, "job_id": job_id})
    # Who sent it is told about it by the name that they gave it.
    assert caught.value.job_id == (job_id if isinstance(job_id, str) else None)


def test_an_endless_id_is_shown_short() -> None:
    with pytest.raises(ManifestError) as caught:
        decode_manifest({**GOOD, "job_id": "x" * 1_000_000})
    assert len(str(caught.value)) < 200
    assert len(caught.value.job_id or "") <= 256


@pytest.mark.parametrize("raw", [None, 5, "text", [], [GOOD], True, {}, {"job": GOOD}], ids=ascii)
def test_what_is_no_object_with_an_id_is_no_manifest(raw: object) -> None:
    with pytest.raises(ManifestError) as caught:
        decode_manifest(raw)
    assert caught.value.job_id is None


deep: list[Any] = []
for _ in range(100_000):
    deep = [deep]

HOSTILE: dict[str, tuple[dict[str, Any], str]] = {
    "no runner": ({"runner": None}, r"runner"),
    "unknown runner": ({"runner": "docker"}, "runner 'docker' is not one of cli, python"),
    "endless runner": ({"runner": "x" * 10_000}, r"runner"),
    "no command": ({"command": None}, "runner 'cli' needs 'command'"),
    "empty command": ({"command": ""}, "runner 'cli' needs 'command'"),
    "a task for cli": ({"command": None, "task": "t"}, "runner 'cli' needs 'command'"),
    "a command for python": ({"runner": "python"}, "runner 'python' needs 'task'"),
    "endless command": ({"command": "x" * 5000}, r"\$.command"),
    "command is a list": ({"command": ["sh", "-c"]}, r"\$.command"),
    "args is text": ({"args": "-y"}, r"\$.args"),
    "args of numbers": ({"args": [1]}, r"\$.args\[0\]"),
    "too many args": ({"args": ["x"] * 10_001}, r"\$.args"),
    "NUL in command": ({"command": "a\0b"}, "must not contain NUL"),
    "NUL in args": ({"args": ["ok", "a\0b"]}, "must not contain NUL"),
    "NUL in the name of a variable": ({"env": {"A\0": "x"}}, "must not contain NUL"),
    "NUL in a variable": ({"env": {"A": "x\0"}}, "must not contain NUL"),
    "no time": ({"timeout_s": 0}, r"\$.timeout_s"),
    "negative time": ({"timeout_s": -1}, r"\$.timeout_s"),
    "endless time": ({"timeout_s": 1e300}, r"\$.timeout_s"),
    "infinite time": ({"timeout_s": float("inf")}, r"\$.timeout_s"),
    "no number": ({"timeout_s": float("nan")}, r"\$.timeout_s"),
    "time as text": ({"timeout_s": "60"}, r"\$.timeout_s"),
    "huge priority": ({"priority": 10**30}, r"\$.priority"),
    "negative memory": ({"requirements": {"memory_mb": -1}}, r"\$.requirements.memory_mb"),
    "huge memory": ({"requirements": {"memory_mb": 2**40}}, r"\$.requirements.memory_mb"),
    "gpu as text": ({"requirements": {"gpu": "yes"}}, r"\$.requirements.gpu"),
    "requirements as list": ({"requirements": []}, r"\$.requirements"),
    "too many inputs": ({"input": {"urls": ["http://x"] * 1001}}, r"\$.input.urls"),
    "input of numbers": ({"input": {"urls": [5]}}, r"\$.input.urls\[0\]"),
    "input without url": ({"input": {"urls": [{"name": "a"}]}}, r"\$.input.urls\[0\]"),
    "sha256 too short": ({"input": {"urls": [{"url": "http://x", "sha256": "ab"}]}}, r"sha256"),
    "inline of numbers": ({"input": {"inline": {"a": 1}}}, r"\$.input.inline"),
    "artifact as text": ({"artifacts": ["a"]}, r"\$.artifacts\[0\]"),
    "artifact without path": ({"artifacts": [{"type": "a/b"}]}, r"\$.artifacts\[0\]"),
    "endless path": ({"artifacts": [{"path": "x" * 5000}]}, r"\$.artifacts\[0\].path"),
    "infinite size": ({"artifacts": [{"path": "a", "max_mb": float("inf")}]}, r"\$.artifacts\[0\].max_mb"),
    "no size": ({"artifacts": [{"path": "a", "max_mb": float("nan")}]}, r"\$.artifacts\[0\].max_mb"),
    "too many artifacts": ({"artifacts": [{"path": "a"}] * 10_001}, r"\$.artifacts"),
    "too many variables": ({"env": dict.fromkeys(map(str, range(300)), "")}, r"\$.env"),
    "deep args": ({"args": deep}, r"\$.args"),
    "params as list": ({"params": []}, r"\$.params"),
    "retry as number": ({"retry": 3}, r"\$.retry"),
    "no attempt": ({"retry": {"max_attempts": 0}}, r"\$.retry.max_attempts"),
    "endless attempts": ({"retry": {"max_attempts": 101}}, r"\$.retry.max_attempts"),
    "attempts as text": ({"retry": {"max_attempts": "3"}}, r"\$.retry.max_attempts"),
    "retry on anything": ({"retry": {"max_attempts": 2, "on": ["E_WHATEVER"]}}, r"\$.retry.on\[0\]"),
    "retry on text": ({"retry": {"on": "E_LOST"}}, r"\$.retry.on"),
}


@pytest.mark.parametrize(("change", "said"), HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_manifest_is_refused_by_name_of_the_field(change: dict[str, Any], said: str) -> None:
    with pytest.raises(ManifestError, match=said) as caught:
        decode_manifest({**GOOD, **change})
    assert str(caught.value).startswith("cannot ")
    assert caught.value.job_id == "j-1"
    assert len(str(caught.value)) < 500


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


def decoded(raw: object) -> Manifest | ManifestError:
    try:
        return decode_manifest(raw)
    except ManifestError as error:
        return error


@given(st.fixed_dictionaries({}, optional=dict.fromkeys(Manifest.__struct_fields__, JSON)))
def test_any_json_is_a_manifest_or_is_refused(raw: dict[str, Any]) -> None:
    result = decoded(raw)
    assert isinstance(result, Manifest) or str(result).startswith("cannot ")


@given(st.sampled_from(sorted(set(Manifest.__struct_fields__) - {"job_id"})), JSON)
def test_any_value_of_any_field_is_taken_or_refused(field: str, value: object) -> None:
    result = decoded({**GOOD, field: value})
    assert result.job_id == "j-1"
    if isinstance(result, Manifest):
        assert decoded(msgspec.to_builtins(result)) == result or "nan" in repr(value)


# --- the steps ---------------------------------------------------------------------------------------------


def test_the_table_of_steps_is_whole() -> None:
    assert set(MOVES) == set(State)
    for state in State:
        assert (MOVES[state] <= {State.UPLOADING}) == (state in FINAL)
    # What was delivered is over; a report that was refused may be sent once more.
    assert MOVES[State.DONE] == frozenset()
    assert MOVES[State.FAILED] == {State.UPLOADING}


def test_from_every_step_a_report_can_be_reached_and_from_there_only_the_end() -> None:
    assert all(State.UPLOADING in MOVES[state] for state in State if state not in FINAL)
    assert MOVES[State.UPLOADING] == FINAL | {State.UPLOADING}


def test_a_job_is_started_only_after_it_was_acknowledged() -> None:
    """Nothing but ACKED and a wait for another try leads to PREP, and PREP alone to RUNNING."""
    assert {state for state in State if State.PREP in MOVES[state]} == {State.ACKED, State.RETRY_WAIT}
    assert {state for state in State if State.RUNNING in MOVES[state]} == {State.PREP}
    assert State.RETRY_WAIT not in MOVES[State.PULLED]


def test_another_attempt_is_made_only_of_one_that_nothing_was_reported_of() -> None:
    before = {State.ACKED, State.PREP, State.RUNNING, State.COLLECTING, State.RETRY_WAIT}
    assert {state for state in State if State.RETRY_WAIT in MOVES[state]} == before
    assert MOVES[State.RETRY_WAIT] == {State.PREP, State.UPLOADING, State.FAILED, State.RETRY_WAIT}


def test_done_comes_only_after_uploading() -> None:
    assert {state for state in State if State.DONE in MOVES[state]} == {State.UPLOADING}


def test_records_survive_their_encoding() -> None:
    outcome = Outcome(job_id="j", code=ErrorCode.E_OOM, result={"a": [1, None]}, timings={"run": 1.5})
    assert msgspec.json.decode(msgspec.json.encode(outcome), type=Outcome) == outcome
    assert (outcome.ok, Outcome(job_id="j").ok) == (False, True)
    state = StateRecord(
        job_id="j",
        state=State.PREP,
        deadline=5.5,
        slot="cpu0",
        attempt=3,
        started=True,
        lease="x",
        origin="n",
    )
    assert msgspec.json.decode(msgspec.json.encode(state), type=StateRecord) == state


@pytest.mark.parametrize("kind", [StateRecord, Outcome])
def test_a_record_of_another_version_is_none_of_ours(kind: type[StateRecord] | type[Outcome]) -> None:
    record = msgspec.to_builtins(StateRecord("j", State.PULLED) if kind is StateRecord else Outcome("j"))
    assert msgspec.convert(record, kind).version == 1
    for version in (0, 2, "1", None):
        with pytest.raises(msgspec.ValidationError, match=r"\$.version"):
            msgspec.convert({**record, "version": version}, kind)
