"""Which programs may run, from files that are trusted, and the denials of what may not."""

import hashlib
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from aitbc_miner.allowlist.entries import Allowlist, Denied, Digests, load_allowlist
from aitbc_miner.config.document import Fault
from aitbc_miner.errors import ErrorCode, JobError

pytestmark = pytest.mark.usefixtures("usual_umask")

SAMPLES = Path(__file__).parents[3] / "etc" / "allowlist.d"

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
        (["-y", "-i"], "an argument is missing after argument 2 ('-i')", "mp4|wav|mkv"),
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


def test_a_pattern_that_hangs_backtracking_engines_is_linear_here(load: Load) -> None:
    text = 'command: {path: PROGRAM}\nargs: [["(a*)*b"]]\nmax_total_args_len: 100000\n'
    allowlist, _, _ = load(a=text)
    start = time.process_time()
    message = denial(allowlist, "prog", "a" * 90_000)
    assert time.process_time() - start < 2
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
    assert "cannot be examined" in faults[0].message


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
    for name in (".hidden.yaml", ".#lock.yaml", "#saved.yaml#", "ls.yaml~", "ls.yaml.dpkg-old"):
        (tmp_path / name).write_text("not yaml: [")
    (tmp_path / "ls.yml").write_text("not yaml: [")
    faults: list[Fault] = []
    warnings: list[Fault] = []
    allowlist = load_allowlist([tmp_path / "none", tmp_path], faults, warnings)
    assert not faults
    assert [(Path(warning.file).name, warning.message) for warning in warnings] == [
        ("none", "the directory does not exist and so permits no commands; create it"),
        ("README", "not read, because its name does not end in .yaml; rename or remove it"),
        ("ls.yml", "not read, because its name does not end in .yaml; rename it to ls.yaml"),
    ]
    assert "known names: none" in denial(allowlist, "ls")


# --- the program -------------------------------------------------------------------------------------------


def test_leading_arguments_and_binds_are_part_of_the_entry(load: Load) -> None:
    text = "command: {path: PROGRAM}\nleading: [-nostdin]\nbinds: [/usr/share]\nkind: gpu\n"
    allowlist, faults, _ = load(a=text)
    assert not faults
    entry = allowlist.permit("prog", [])
    assert (entry.leading, entry.binds, entry.kind) == (["-nostdin"], [Path("/usr/share")], "gpu")


def test_an_entry_of_a_kind_is_for_slots_of_that_kind(load: Load) -> None:
    allowlist, _, _ = load(
        a="command: {path: PROGRAM}\nkind: gpu\n", b="command: {path: PROGRAM, name: any}\n"
    )
    assert allowlist.permit("prog", [], kind="gpu").kind == "gpu"
    assert allowlist.permit("any", [], kind="cpu").kind is None
    with pytest.raises(Denied) as denied:
        allowlist.permit("prog", [], kind="cpu")
    assert "needs a slot of kind gpu, but this slot is of kind cpu" in denied.value.message
    assert denied.value.objection.rule == "kind"


def test_a_program_must_hash_to_what_its_entry_says_whenever_it_is_asked_for(
    load: Load, program: Path
) -> None:
    right = hashlib.sha256(program.read_bytes()).hexdigest()
    allowlist, faults, warnings = load(a=f'command: {{path: PROGRAM, sha256: "{right}"}}\n')
    assert not faults
    assert not warnings
    assert allowlist.permit("prog", []).command.sha256 == right
    before = program.stat()
    program.write_text("#!/bin/no\n")
    os.utime(program, ns=(before.st_atime_ns, before.st_mtime_ns))
    message = denial(allowlist, "prog")
    assert "but its entry requires another" in message
    assert hashlib.sha256(program.read_bytes()).hexdigest() in message
    _, faults, warnings = load()
    assert not faults
    (warning,) = warnings
    assert warning.key == "command.sha256"
    assert "are denied" in warning.message
    program.write_text("#!/bin/sh\n")
    assert allowlist.permit("prog", [])


def test_a_program_is_hashed_once_while_it_stays_the_same(
    program: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: list[str] = []
    real = hashlib.file_digest

    def noted(file: Any, digest: str) -> Any:
        hashed.append(file.name)
        return real(file, digest)

    monkeypatch.setattr(hashlib, "file_digest", noted)
    digests = Digests()
    assert digests.sha256(str(program)) == digests.sha256(str(program))
    assert hashed == [str(program)]
    replaced = program.with_name("new")
    replaced.write_text("#!/bin/sh\n")
    replaced.rename(program)
    digests.sha256(str(program))
    assert len(hashed) == 2


def test_a_bind_that_is_gone_or_open_to_others_denies(load: Load) -> None:
    # Not beneath /tmp, of which jobs see one of their own.
    elsewhere = "/srv" if os.geteuid() == 0 else Path.home()
    with tempfile.TemporaryDirectory(dir=elsewhere, prefix="aitbc-test-") as place:
        models, link = Path(place, "models"), Path(place, "link")
        text = f"command: {{path: PROGRAM}}\nbinds: [{models}]\n"
        allowlist, faults, warnings = load(a=text)
        assert not faults
        assert "models does not exist" in warnings[0].message
        assert warnings[0].key == "binds[0]"
        assert "models does not exist" in denial(allowlist, "prog")
        models.mkdir(mode=0o755)
        Path(place).chmod(0o755)
        assert allowlist.permit("prog", [])
        models.chmod(0o777)
        assert "can be written by others" in denial(allowlist, "prog")
        _, faults, _ = load()
        assert (faults[0].key, faults[0].line) == ("binds[0]", 2)
        models.chmod(0o755)
        models.rename(link.with_name("real"))
        models.symlink_to("/root")
        assert "symbolic links; write /root" in denial(allowlist, "prog")


def test_a_denial_says_which_entry_and_rule(load: Load) -> None:
    allowlist, _, _ = load(a="command: {path: PROGRAM}\noptions: [{name: -a, value: input}]\n")
    with pytest.raises(Denied) as denied:
        allowlist.permit("prog", ["-a", "x"], ["y"])
    assert denied.value.entry is allowlist.entries["prog"]
    assert (denied.value.objection.rule, denied.value.objection.at) == ("options[0].value", 1)
    assert "an input of this job: y" in denied.value.message
    assert str(allowlist.files["prog"]).endswith("a.yaml")
    assert allowlist.permit("prog", ["-a", "x"], ["x"])


def test_the_samples_are_good_and_do_what_they_say() -> None:
    faults: list[Fault] = []
    allowlist = load_allowlist([SAMPLES], faults, [])
    assert not faults
    assert {"ffmpeg", "sha256sum", "gzip"} <= set(allowlist.entries)
    ffmpeg, sha256sum = allowlist.entries["ffmpeg"], allowlist.entries["sha256sum"]
    assert ffmpeg.objection(["-y", "-i", "input1.mp4", "-c:v", "libx264", "output.mp4"]) is None
    for name in ["/etc/x.mp4", "../x.mp4", "http://h/x.mp4", "-x.mp4", ".x.mp4"]:
        assert "argument 2" in str(ffmpeg.objection(["-i", name]))
    assert sha256sum.objection(["--tag", "b", "c.txt", "d"]) is None
    assert sha256sum.objection(["-c", "a"]) is not None
    assert allowlist.entries["gzip"].objection(["-9", "-k", "a"]) is None
