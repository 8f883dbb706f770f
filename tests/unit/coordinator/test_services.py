"""services.d: what of a payload goes where, what is refused, and what its client gets."""

import base64
import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aitbc_miner.allowlist.entries import load_allowlist
from aitbc_miner.config.document import Fault
from aitbc_miner.coordinator.service_result import MAX_INLINE, RESERVED, FileChanged, result_object
from aitbc_miner.coordinator.services import ServiceBook, ServiceError, read_services
from aitbc_miner.errors import ErrorCode
from aitbc_miner.jobs import Artifact, LogInfo, ManifestError, Outcome, decode_manifest

ETC = Path(__file__).parents[3] / "etc"
JOB = "a" * 32
FULL = """
service: full
match: {types: [full, other], service_types: [fulls], when: [text, model]}
fields:
  text: {type: text, required: true, aliases: [input], max_bytes: 20, pattern: "[a-z -]*"}
  url: {type: url, max_bytes: 100}
  count: {type: int, min: 0, max: 10, default: 3}
  ratio: {type: number, min: 0, max: 1}
  flag: {type: bool}
  model: {type: choice, values: [one, two], default: one}
  more: {type: json, max_bytes: 50}
run:
  command: tool
  args: ["--text", "{text}", "n={count}{{}}", ["--ratio", "{ratio}"], ["-f"], ["--flag={flag}"]]
inputs:
  - {url: "{url}", name: in.bin, max_mb: 5}
artifacts: [{path: "output/{model}.txt"}]
env: {MODEL: "{model}"}
timeout_s: 9
result: {said: {log: true}}
"""


def written(directory: Path, text: str, name: str = "s.yaml") -> Path:
    directory.mkdir(exist_ok=True)
    (directory / name).write_text(text)
    return directory


@pytest.fixture
def book(tmp_path: Path) -> ServiceBook:
    return ServiceBook(written(tmp_path / "services.d", FULL))


def faults_of(directory: Path) -> list[str]:
    faults: list[Fault] = []
    read_services(directory, faults)
    return [str(fault).removeprefix(f"{directory}/") for fault in faults]


def refused(book: ServiceBook, payload: Any) -> tuple[ErrorCode, str]:
    with pytest.raises(ServiceError) as error:
        book.manifest(JOB, payload)
    assert error.value.job_id == JOB
    return error.value.code, str(error.value)


# --- a payload becomes a manifest --------------------------------------------------------------------------


def test_fields_go_where_they_have_a_place_and_nowhere_else(book: ServiceBook) -> None:
    payload = {"type": "full", "text": "a b", "ratio": 0.5, "command": "evil", "args": ["x"], "units": 9}
    made = book.manifest(JOB, payload)
    manifest = decode_manifest(made)
    assert (manifest.runner, manifest.command) == ("cli", "tool")
    assert manifest.args == ["--text", "a b", "n=3{}", "--ratio", "0.5", "-f"]
    assert [artifact.path for artifact in manifest.artifacts] == ["output/one.txt"]
    assert (manifest.env, manifest.timeout_s, manifest.input.urls) == ({"MODEL": "one"}, 9, [])
    assert (manifest.retry.max_attempts, manifest.retry.on) == (3, [ErrorCode.E_LOST])
    assert made["payload"] == payload
    assert made["service"]["name"] == "full"


def test_inputs_have_names_of_ours(book: ServiceBook) -> None:
    made = book.manifest(JOB, {"type": "full", "text": "a", "url": "https://h/../../etc/passwd?x=1"})
    assert made["input"]["urls"] == [
        {"url": "https://h/../../etc/passwd?x=1", "name": "in.bin", "max_mb": 5.0}
    ]


@pytest.mark.parametrize(
    "payload",
    [
        {"type": "other", "text": "a"},
        {"type": "full", "input": "a"},
        {"type": "full", "text": None, "input": "a"},
        {"service_type": "fulls", "service_request": {"text": "a"}},
        {"text": "a", "model": "one"},
    ],
)
def test_all_ways_to_name_a_service(payload: dict[str, Any], book: ServiceBook) -> None:
    assert book.manifest(JOB, payload)["args"][1] == "a"


@pytest.mark.parametrize(
    "payload",
    [
        {},
        {"type": "fulls", "text": "a"},
        {"type": ["full"]},
        {"type": {"x": 1}},
        {"type": 7},
        {"service_type": "full"},
        {"text": "a"},
        {"type": "x\x1b[31m\n" + "y" * 5000},
        {"task": "old"},
    ],
)
def test_what_is_not_offered_is_denied(payload: dict[str, Any], book: ServiceBook) -> None:
    code, message = refused(book, payload)
    assert code is ErrorCode.E_DENY
    assert "its services: full" in message
    assert message.isprintable()
    assert len(message) < 400


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({}, "field 'text' is missing"),
        ({"text": 5}, "field 'text' must be text"),
        ({"text": "a\0"}, "must be text"),
        ({"text": "a" * 21}, "has 21 bytes; at most 20 are permitted"),
        ({"text": "A"}, "must match"),
        ({"text": "a", "url": "ftp://h"}, "must be an http or https address"),
        ({"text": "a", "count": 11}, "must be from 0 to 10"),
        ({"text": "a", "count": 1.5}, "must be a whole number"),
        ({"text": "a", "count": True}, "must be a whole number"),
        ({"text": "a", "count": 2**70}, "of reasonable size"),
        ({"text": "a", "ratio": "0.5"}, "must be a number"),
        ({"text": "a", "ratio": 2}, "must be from 0 to 1"),
        ({"text": "a", "flag": 1}, "must be true or false"),
        ({"text": "a", "model": "three"}, "must be one of one, two"),
        ({"text": "a", "more": ["x" * 60]}, "at most 50 are permitted"),
    ],
)
def test_what_does_not_fit_is_refused_by_field(fields: dict[str, Any], said: str, book: ServiceBook) -> None:
    code, message = refused(book, {"type": "full", **fields})
    assert (code, said in message) == (ErrorCode.E_MANIFEST, True), message


def test_a_request_that_is_no_object_has_no_fields(book: ServiceBook) -> None:
    assert "missing" in refused(book, {"service_type": "fulls", "service_request": "text"})[1]


ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
NAMES = [
    "type",
    "service_type",
    "service_request",
    "text",
    "input",
    "url",
    "count",
    "ratio",
    "flag",
    "model",
    "more",
]


@settings(max_examples=300, deadline=None)
@given(
    payload=st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=5), ANY, max_size=6),
    kind=st.sampled_from([{}, {"type": "full"}, {"type": "full", "text": "a"}]),
    marker=st.just("n0where"),
)
def test_no_payload_does_more_than_be_refused(
    payload: dict[str, Any], kind: dict[str, Any], marker: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    directory = tmp_path_factory.getbasetemp() / "any-services.d"
    book = ServiceBook(written(directory, FULL))
    try:
        made = book.manifest(JOB, {**payload, **kind, "unknown": marker})
    except ManifestError:
        return
    manifest = decode_manifest(json.loads(msgspec.json.encode(made)))
    assert (manifest.command, manifest.task) == ("tool", None)
    assert marker not in str((manifest.args, manifest.env, manifest.input, manifest.artifacts))
    assert 4 <= len(manifest.args) <= 7, "a field is one argument, whatever is in it"


def test_a_parameter_keeps_its_type(tmp_path: Path) -> None:
    text = """
service: t
match: {types: [t]}
fields: {n: {type: number}, s: {}, j: {type: json}, b: {type: bool}}
run: {task: work, params: {n: "{n}", s: "{s}!", j: "{j}", b: "{b}", fixed: [1, {a: null}], five: 5}}
"""
    book = ServiceBook(written(tmp_path / "d", text))
    made = book.manifest(JOB, {"type": "t", "n": 1.5, "s": "x", "j": {"k": [1]}, "b": False})
    assert made["params"] == {
        "n": 1.5,
        "s": "x!",
        "j": {"k": [1]},
        "b": False,
        "fixed": [1, {"a": None}],
        "five": 5,
    }
    assert book.manifest(JOB, {"type": "t"})["params"] == {"fixed": [1, {"a": None}], "five": 5}


# --- the files ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        (FULL + "typo: 1\n", "unknown key"),
        (FULL.replace("{ratio}", "{ration}"), "uses {ration}, but `fields` does not define it"),
        (FULL.replace('["--ratio", "{ratio}"]', '"{ratio}"'), "needs {ratio}, but jobs may omit this field"),
        (FULL.replace("{count}{{}}", "{count}{"), "has a single {"),
        (FULL.replace("said:", "price:"), "a name that coordinator or node reserve"),
        (FULL.replace("command: tool", "command: tool\n  task: x"), "needs either `command`"),
        (FULL.replace("{log: true}", "{log: true, task: true}"), "needs one of `task`, `file` and `log`"),
        (FULL.replace("values: [one, two]", "values: []"), "is choice, but the field has no `values`"),
        (FULL.replace('pattern: "[a-z -]*"', 'pattern: "["'), "RE2"),
        (FULL.replace("types: [full, other], service_types: [fulls], when: [text, model]", ""), "match"),
        (
            FULL.replace("required: true,", "required: true, default: x,"),
            "has no effect, because the field is required",
        ),
        ("", "missing"),
        ("- 1", "a list"),
    ],
)
def test_a_fault_names_its_line_and_the_service_is_left_out(text: str, fault: str, tmp_path: Path) -> None:
    directory = written(tmp_path / "d", text)
    (found, *_) = faults_of(directory)
    assert fault in found
    assert found.startswith("s.yaml")
    assert read_services(directory, []) == []


@pytest.mark.parametrize("name", sorted(RESERVED))
def test_no_job_can_name_its_price(name: str, tmp_path: Path) -> None:
    directory = written(tmp_path / "d", FULL.replace("said:", f"{name}:"))
    assert len(faults_of(directory)) == 1


def test_two_for_the_same_type(tmp_path: Path) -> None:
    directory = written(tmp_path / "d", FULL)
    written(directory, FULL.replace("service: full", "service: second"), "t.yaml")
    (fault,) = faults_of(directory)
    assert fault.startswith(
        f"t.yaml:3: match: type 'full' is also in {directory}/s.yaml; remove type 'full' "
    )


def test_a_file_that_others_can_change_is_not_trusted(tmp_path: Path) -> None:
    directory = written(tmp_path / "d", FULL)
    (directory / "s.yaml").chmod(0o666)
    (fault,) = faults_of(directory)
    assert "can be written by others" in fault


def test_without_a_directory_there_are_none(tmp_path: Path) -> None:
    assert faults_of(tmp_path / "nowhere") == []
    assert ServiceBook(tmp_path / "nowhere").services == []


def test_a_change_is_taken_up_and_a_fault_costs_one_service_only(tmp_path: Path) -> None:
    directory = written(tmp_path / "d", FULL)
    book = ServiceBook(directory)
    assert [service.name for service in book.services] == ["full"]
    written(
        directory,
        FULL.replace("service: full", "service: b").replace("full, other", "b").replace("fulls", "bs"),
        "b.yaml",
    )
    assert [service.name for service in book.services] == ["b", "full"]
    written(directory, "nonsense", "b.yaml")
    assert [service.name for service in book.services] == ["full"]


# --- the samples -------------------------------------------------------------------------------------------


PAYLOADS = [
    {"type": "wordstats", "text": "a b"},
    {"type": "reencode", "url": "https://h/a.avi"},
    {"type": "reencode", "input": "https://h/a.avi", "output_format": "webm"},
    {"service_type": "ffmpeg", "service_request": {"input_url": "https://h/a.avi"}},
    {"type": "transcribe", "url": "https://h/a.wav"},
    {"type": "transcribe", "url": "https://h/a", "model": "small", "prompt": "two words", "language": "de"},
    {"service_type": "whisper", "service_request": {"audio_url": "https://h/a.wav"}},
    {"type": "inference", "prompt": "why"},
    {"prompt": "why", "model": "llama3.2:latest"},
    {"service_type": "llm_inference", "service_request": {"prompt": "why", "temperature": 0}},
]


@pytest.fixture
def samples(tmp_path: Path) -> Path:
    """Give the directory of an operator who offers all of them."""
    for sample in (ETC / "services.d").iterdir():
        written(tmp_path / "services.d", sample.read_text(), sample.name.removesuffix(".sample"))
    return tmp_path / "services.d"


@pytest.mark.parametrize("payload", PAYLOADS, ids=str)
def test_the_samples_take_what_clients_send_and_the_allowlist_permits_it(
    samples: Path, payload: dict[str, Any]
) -> None:
    manifest = decode_manifest(ServiceBook(samples).manifest(JOB, payload))
    if manifest.command is not None:
        allowlist = load_allowlist([ETC / "allowlist.d"], [], [])
        names = [one.name for one in manifest.input.urls if not isinstance(one, str) and one.name]
        entry = allowlist.entries[manifest.command]
        assert entry.objection(manifest.args, names) is None
    else:
        assert (ETC / "tasks" / f"{manifest.task}.py").exists()


def test_the_samples_have_no_fault(samples: Path) -> None:
    faults: list[Fault] = []
    assert {service.name for service in read_services(samples, faults)} == {
        *("inference", "reencode", "transcribe", "wordstats")
    }
    assert faults == []


def test_what_is_offered_unasked_every_machine_can_do() -> None:
    (service,) = read_services(ETC / "services.d", [])
    assert (service.name, service.run.command, service.egress) == ("wordstats", None, None)


def test_a_network_that_no_slot_can_have_is_a_fault(tmp_path: Path) -> None:
    faults: list[Fault] = []
    text = "service: a\negress: lan\nmatch: {types: [a]}\nrun: {task: a}\n"
    assert read_services(written(tmp_path / "services.d", text), faults) == []
    assert "egress: is 'lan'; must be one of none, open" in str(faults[0])


# --- what the client gets ----------------------------------------------------------------------------------


@pytest.fixture
def root(tmp_path: Path) -> Path:
    directory = tmp_path / JOB
    (directory / "logs").mkdir(parents=True)
    (directory / "artifacts").mkdir()
    (directory / "logs" / "exec.log").write_bytes(b"line\xff\n")
    return directory


def artifact(root: Path, path: str, data: bytes, number: int = 0) -> Artifact:
    file = f"artifacts/{number:04d}"
    (root / file).write_bytes(data)
    return Artifact(path, file, len(data), "0" * 64, "text/plain")


def made(root: Path, result: dict[str, Any], outcome: Outcome, inline_kb: int = 1024) -> dict[str, Any]:
    return result_object({"service": {"name": "s", "result": result, "inline_kb": inline_kb}}, outcome, root)


def test_a_result_is_made_of_what_the_service_names(root: Path) -> None:
    files = [
        artifact(root, "a.json", b'{"price": 1}', 0),
        artifact(root, "b.txt", b"text", 1),
        artifact(root, "c.json", b"{", 2),
    ]
    outcome = Outcome(JOB, result={"units": 7, "text": "t"}, artifacts=files, log=LogInfo(bytes=6))
    found = made(
        root,
        {
            "all": {"task": True},
            "one": {"task": "text"},
            "none": {"task": "other"},
            "json": {"file": "a.json", "as": "json"},
            "text": {"file": "b.txt"},
            "broken": {"file": "c.json", "as": "json"},
            "missing": {"file": "d.txt"},
            "log": {"log": True},
        },
        outcome,
    )
    listed = found.pop("artifacts")
    assert found == {
        "all": {"units": 7, "text": "t"},
        "one": "t",
        "none": None,
        "json": {"price": 1},
        "text": "text",
        "broken": "{",
        "missing": None,
        "log": "line\ufffd\n",
    }
    assert [(one["path"], base64.b64decode(one["data"])) for one in listed][1] == ("b.txt", b"text")
    assert not RESERVED & set(found)


def test_large_files_stay_and_are_named(root: Path) -> None:
    files = [artifact(root, f"{n}.bin", bytes(2 << 20), n) for n in range(4)]
    found = made(root, {}, Outcome(JOB, artifacts=files), inline_kb=4096)["artifacts"]
    assert ["data" in one for one in found] == [True] * (MAX_INLINE // (2 << 20)) + [False]
    assert {(one["bytes"], one["sha256"]) for one in found} == {(2 << 20, "0" * 64)}
    (small,) = made(root, {}, Outcome(JOB, artifacts=files[:1]), inline_kb=1)["artifacts"]
    assert "data" not in small


def test_a_reserved_name_of_an_old_record_is_left_out(root: Path) -> None:
    assert "price" not in made(root, {"price": {"log": True}}, Outcome(JOB))


def test_a_file_that_is_not_as_it_was_cannot_be_sent(root: Path) -> None:
    gone = artifact(root, "a", b"four")
    (root / gone.file).write_bytes(b"two")
    with pytest.raises(FileChanged, match="the file shrank after its collection"):
        made(root, {}, Outcome(JOB, artifacts=[gone]))
    (root / gone.file).unlink()
    (root / gone.file).symlink_to("/etc/hostname")
    with pytest.raises(FileChanged):
        made(root, {}, Outcome(JOB, artifacts=[gone]))


def test_a_result_that_is_too_large_says_so(root: Path) -> None:
    with pytest.raises(FileChanged, match="lower inline_kb or max_kb"):
        made(root, {"all": {"task": True}}, Outcome(JOB, result="x" * (10 << 20)))
