import itertools
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import re2  # type: ignore[import-untyped]
from hypothesis import given
from hypothesis import strategies as st

from aitbc_miner.allowlist import MAX_STEPS, Allowlist, Pattern, load_allowlist, objection
from aitbc_miner.errors import ErrorCode, JobError
from aitbc_miner.util.yamldoc import Fault

SAMPLES = Path(__file__).parents[1] / "etc" / "allowlist.d"

FFMPEG = """\
command: {path: PROGRAM, name: ffmpeg}
args:
  - ["-y"]
  - ["-i", ".+\\\\.(mp4|wav|mkv)"]
  - ["-c:v", "(libx264|copy)"]
  - ["output\\\\.(mp4|mkv)"]
max_total_args_len: 100
max_runtime_s: 7200
max_output_mb: 5000
env: [FOO]
"""

Load = Callable[..., tuple[Allowlist, list[Fault], list[Fault]]]


@pytest.fixture(autouse=True)
def _usual_umask() -> Iterator[None]:
    before = os.umask(0o022)
    yield
    os.umask(before)


@pytest.fixture
def program(tmp_path: Path) -> Path:
    path = tmp_path / "bin" / "prog"
    path.parent.mkdir(mode=0o755)
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def load(tmp_path: Path, program: Path) -> Load:
    def load(**texts: str) -> tuple[Allowlist, list[Fault], list[Fault]]:
        directory = tmp_path / "allowlist.d"
        directory.mkdir(exist_ok=True)
        for name, text in texts.items():
            (directory / f"{name}.yaml").write_text(text.replace("PROGRAM", str(program)))
        faults: list[Fault] = []
        warnings: list[Fault] = []
        return load_allowlist([directory], faults, warnings), faults, warnings

    return load


def denial(allowlist: Allowlist, command: str, *args: str) -> str:
    with pytest.raises(JobError) as error:
        allowlist.permit(command, args)
    assert error.value.code is ErrorCode.E_DENY
    return error.value.message


def groups(*texts: list[str]) -> list[list[Pattern]]:
    return [[re2.compile(text) for text in group] for group in texts]


def test_the_bootstrap_example_permits_its_own_manifest(load: Load, program: Path) -> None:
    allowlist, faults, warnings = load(ffmpeg=FFMPEG)
    assert not faults
    assert not warnings
    entry = allowlist.permit("ffmpeg", ["-y", "-i", "input1.mp4", "-c:v", "libx264", "output.mp4"])
    assert (entry.command.path, entry.max_runtime_s, entry.max_output_mb) == (str(program), 7200, 5000)
    assert entry.env == ["FOO"]


@pytest.mark.parametrize(
    "args",
    [
        [],
        ["-y"],
        ["output.mkv", "-c:v", "copy", "-i", "a.wav", "-y"],
        ["-i", "-i.mp4"],  # the pattern says what may follow -i, even if it looks like an option
        ["-c:v", "copy", "-i", "output.mp4", "output.mp4"],
    ],
)
def test_groups_may_come_in_any_order_and_be_left_out(load: Load, args: list[str]) -> None:
    allowlist, _, _ = load(ffmpeg=FFMPEG)
    assert allowlist.permit("ffmpeg", args).name == "ffmpeg"


@pytest.mark.parametrize(
    ("args", "named", "hint"),
    [
        (["-vf", "x"], "argument 1 ('-vf')", "'-y'"),
        (["-y", "-y"], "argument 2 ('-y')", "already used"),
        (["-y", "-i", "a.exe"], "argument 3 ('a.exe')", r"'.+\\.(mp4|wav|mkv)'"),
        (["-y", "-i"], "after the last argument 2 ('-i')", "mp4|wav|mkv"),
        (["output.mp4x"], "argument 1 ('output.mp4x')", "what would fit"),
        (["xoutput.mp4"], "argument 1", "what would fit"),
        (["output.mp4\n"], r"argument 1 ('output.mp4\n')", "what would fit"),
        (["-y", "a.mp4"], "argument 2 ('a.mp4')", "what would fit"),
        (["-i", "a.mp4", "-i", "b.mp4"], "argument 3 ('-i')", "already used"),
        (["-y", "-i", "a.mp4", "-c:v", "copy", "output.mp4", "x"], "argument 7 ('x')", "at most 6"),
        (["-y", ""], "argument 2 ('')", "what would fit"),
        (["-i", "a" * 97 + ".mp4"], "argument 2", "max_total_args_len"),
        (["\ud800"], "argument 1", "not valid text"),
    ],
)
def test_a_denial_names_the_argument_and_what_would_fit(
    load: Load, args: list[str], named: str, hint: str
) -> None:
    allowlist, _, _ = load(ffmpeg=FFMPEG)
    message = denial(allowlist, "ffmpeg", *args)
    assert named in message
    assert hint in message
    assert "\n" not in message
    assert len(message) < 300


def test_the_length_counts_bytes_and_a_blank_between_arguments(load: Load) -> None:
    text = 'command: {path: PROGRAM}\nargs: [["é+"], ["b"]]\nmax_total_args_len: 6\n'
    allowlist, _, _ = load(a=text)
    assert allowlist.permit("prog", ["éé", "b"])
    assert "max_total_args_len" in denial(allowlist, "prog", "ééé", "b")


def test_a_choice_that_blocks_another_is_taken_back() -> None:
    # "a" fits both groups, but only by giving it to the second one is there a place for "b".
    assert objection(groups(["[ab]"], ["a"]), ["a", "b"]) is None
    assert objection(groups(["a", "b"], ["a"], ["b", "c"]), ["a", "b", "c"]) is None


@given(
    st.lists(st.lists(st.sampled_from("abc.") | st.just("[ab]"), min_size=1, max_size=3), max_size=5),
    st.lists(st.sampled_from("abc"), max_size=7),
)
def test_the_search_agrees_with_trying_every_order(texts: list[list[str]], args: list[str]) -> None:
    compiled = groups(*texts)
    possible = any(
        len(run) == len(args) and all(p.fullmatch(arg) for p, arg in zip(run, args, strict=True))
        for count in range(len(texts) + 1)
        for order in itertools.permutations(compiled, count)
        for run in [list(itertools.chain.from_iterable(order))]
    )
    assert (objection(compiled, args) is None) == possible


def test_alike_groups_are_no_work() -> None:
    start = time.monotonic()
    many = groups(*[["a.*"]] * 64)
    assert objection(many, ["a"] * 64) is None
    assert "argument 64 ('b')" in str(objection(many, ["a"] * 63 + ["b"]))
    assert "argument 65" in str(objection(many, ["a"] * 65))
    assert time.monotonic() - start < 5


def test_a_hostile_list_ends_within_the_work_limit() -> None:
    # Each group fits all but two letters, a pair of its own, and two arguments have one group between them.
    letters = [chr(0x100 + i) for i in range(60)]
    hostile = [[f"[^{letters[i]}{letters[(i * 7 + 3) % 60]}xy]"] for i in range(60)] + [["[xy]"]]
    start = time.monotonic()
    message = objection(groups(*hostile), [*letters[:40], "x", "y"])
    assert message is not None
    assert str(MAX_STEPS) in message
    assert time.monotonic() - start < 10


def test_a_pattern_that_hangs_backtracking_engines_is_linear_here(load: Load) -> None:
    text = 'command: {path: PROGRAM}\nargs: [["(a*)*b"]]\nmax_total_args_len: 100000\n'
    allowlist, _, _ = load(a=text)
    start = time.monotonic()
    message = denial(allowlist, "prog", "a" * 90_000)
    assert time.monotonic() - start < 2
    assert "argument 1" in message
    assert len(message) < 300


def test_a_program_is_known_by_name_or_by_its_very_path(load: Load, program: Path) -> None:
    allowlist, _, _ = load(ffmpeg=FFMPEG)
    assert allowlist.permit(str(program), ["-y"]).name == "ffmpeg"
    for command in [
        "prog",
        "./ffmpeg",
        f"/{program}",
        f"{program.parent}/../bin/prog",
        "",
        "ffmpeg ",
        "/bin/sh",
    ]:
        message = denial(allowlist, command)
        assert repr(command[:80]) in message
        assert "ffmpeg" in message


def test_one_path_under_two_names_must_be_called_by_name(load: Load, program: Path) -> None:
    allowlist, faults, _ = load(
        a="command: {path: PROGRAM, name: one}", b="command: {path: PROGRAM, name: two}"
    )
    assert not faults
    assert allowlist.permit("two", []).name == "two"
    assert "one, two" in denial(allowlist, str(program))


def test_two_entries_of_one_name_are_a_fault_with_both_files(load: Load) -> None:
    allowlist, faults, _ = load(a="command: {path: PROGRAM}", b="command: {path: PROGRAM, name: prog}")
    (fault,) = faults
    assert fault.file.endswith("b.yaml")
    assert fault.line == 1
    assert "a.yaml" in fault.message
    assert list(allowlist.entries) == ["prog"]


@pytest.mark.parametrize(
    ("text", "line", "key", "words"),
    [
        ('command: {path: PROGRAM}\nargs:\n  - ["ok"]\n  - ["-i", "("]\n', 4, "args[1][1]", "missing )"),
        ('command: {path: PROGRAM}\nargs: [["(?=a)b"]]\n', 2, "args[0][0]", "RE2"),
        ("command: {path: PROGRAM}\nargs: [[7]]\n", 2, "args[0][0]", "quotes"),
        ("command: {path: PROGRAM}\nargs: [[]]\n", 2, "args[0]", "at least 1"),
        ("command: {path: bin/prog}\n", 1, "command.path", "absolute path"),
        ("command: {path: /etc/passwd}\n", 1, "command.path", "executable"),
        ("command: {path: /usr/bin}\n", 1, "command.path", "executable file"),
        ("command: {path: PROGRAM, name: a/b}\n", 1, "command.name", "matches"),
        ("command: {path: PROGRAM}\nenv: [A, LD_PRELOAD]\n", 2, "env[1]", "loader"),
        ("command: {path: PROGRAM}\nmax_runtime: 5\n", 2, "max_runtime", "max_runtime_s"),
        ("command: {path: PROGRAM}\nmax_output_mb: -1\n", 2, "max_output_mb", "above 0"),
        ("args: []\n", 1, "command", "missing"),
        (f"command: {{path: PROGRAM}}\nargs: [{', '.join(['[a]'] * 65)}]\n", 2, "args", "at most 64 groups"),
        (f"command: {{path: PROGRAM}}\nargs: [[{', '.join(['a'] * 513)}]]\n", 2, "args", "512 patterns"),
    ],
)
def test_a_fault_has_its_file_line_and_key(load: Load, text: str, line: int, key: str, words: str) -> None:
    allowlist, faults, _ = load(bad=text, good=FFMPEG)
    (fault,) = faults
    assert fault.file.endswith("bad.yaml")
    assert (fault.line, fault.key) == (line, key)
    assert words in fault.message
    assert list(allowlist.entries) == ["ffmpeg"]


def test_a_program_that_others_can_change_is_a_fault_and_denied_at_run_time(
    load: Load, program: Path
) -> None:
    allowlist, faults, _ = load(a="command: {path: PROGRAM}")
    assert not faults
    for path in program, program.parent:
        path.chmod(0o777)
        assert str(path) in denial(allowlist, "prog")
        _, faults, _ = load()
        assert faults[0].key == "command.path"
        assert f"{path} can be written by others" in faults[0].message
        path.chmod(0o755)
    assert allowlist.permit("prog", [])


def test_a_link_is_followed_and_every_step_of_it_judged(load: Load, program: Path, tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    (shared / "link").symlink_to("../bin/prog")
    allowlist, faults, _ = load(a=f"command: {{path: {shared}/link}}")
    assert not faults
    assert allowlist.permit("link", []).command.path == f"{shared}/link"
    shared.chmod(0o777)
    assert str(shared) in denial(allowlist, "link")
    (shared / "loop").symlink_to("loop")
    _, faults, _ = load(a=f"command: {{path: {shared}/loop}}")
    assert "cannot look at it" in faults[0].message


def test_a_missing_program_is_a_warning_and_denied_until_it_is_there(load: Load, tmp_path: Path) -> None:
    late = tmp_path / "bin" / "late"
    allowlist, faults, warnings = load(a=f"command: {{path: {late}}}")
    assert not faults
    assert "late is not installed" in warnings[0].message
    assert "not installed" in denial(allowlist, "late")
    late.write_text("#!/bin/sh\n")
    late.chmod(0o755)
    assert allowlist.permit("late", []).name == "late"


def test_a_missing_directory_is_a_warning_and_other_files_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "README").write_text("not yaml: [")
    (tmp_path / ".hidden.yaml").write_text("not yaml: [")
    faults: list[Fault] = []
    warnings: list[Fault] = []
    allowlist = load_allowlist([tmp_path / "none", tmp_path], faults, warnings)
    assert not faults
    assert [warning.file for warning in warnings] == [str(tmp_path / "none")]
    assert "there are: none" in denial(allowlist, "ls")


def test_the_samples_are_good_and_do_what_they_say() -> None:
    faults: list[Fault] = []
    allowlist = load_allowlist([SAMPLES], faults, [])
    assert not faults
    assert {"ffmpeg", "sha256sum", "gzip"} <= set(allowlist.entries)
    ffmpeg = allowlist.entries["ffmpeg"].args
    assert objection(ffmpeg, ["-y", "-i", "input1.mp4", "-c:v", "libx264", "output.mp4"]) is None
    for name in ["/etc/x.mp4", "../x.mp4", "http://h/x.mp4", "-x.mp4", ".x.mp4"]:
        assert "argument 2" in str(objection(ffmpeg, ["-i", name]))
    sha256sum = allowlist.entries["sha256sum"].args
    assert objection(sha256sum, ["a", "--tag", "b", "c.txt", "d"]) is None
    assert objection(sha256sum, ["a", "b", "c", "d", "e"]) is not None
    assert objection(sha256sum, ["-c", "a"]) is not None
    assert objection(allowlist.entries["gzip"].args, ["-9", "-k", "a"]) is None
