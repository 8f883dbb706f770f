"""`aitbc-minerctl allow`: the answer is what a job would get, with the rule that it comes from."""

import os
import shlex
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from aitbc_miner.allowlist.entries import load_allowlist
from aitbc_miner.config.settings import CliRunnerSection as Settings
from aitbc_miner.control.protocol import Judged, Request
from aitbc_miner.errors import JobError
from aitbc_miner.jobs import Inputs, Manifest
from aitbc_miner.runners.cli import CliRunner
from aitbc_miner.runners.interface import JobPaths
from aitbc_miner.slots.spec import SlotSpec
from aitbc_miner.supervisor.slow_answers import judge

ENTRY = """\
command: {path: /usr/bin/true, name: prog}
leading: [-q]
sections:
  - min: 1
    options:
      - {name: -t, value: {int: {min: 0, max: 9}}}
    operands:
      - {name: -i, value: input}
  - operands: [{value: output, max: 2}]
"""


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    before = os.umask(0o022)
    (tmp_path / "prog.yaml").write_text(ENTRY)
    os.umask(before)
    return tmp_path


def ask(directory: Path, *command: str, inputs: list[str] | None = None) -> Judged:
    return judge(Settings(allowlist_dirs=(directory,)), Request("allow", command=[*command], inputs=inputs))


def test_what_is_permitted_is_shown_as_it_would_be_started(directory: Path) -> None:
    said = ask(directory, "prog", "-i", "a", "b", inputs=["a"])
    assert said == Judged(
        permitted=True, message="/usr/bin/true -q -i a b", file=str(directory / "prog.yaml")
    )
    (note,) = ask(directory, "prog", "-i", "a", "b").notes
    assert "--input" in note
    with (directory / "prog.yaml").open("a") as file:
        file.write("kind: gpu\n")
    assert ask(directory, "prog", "-i", "a", inputs=["a"]).notes == ["permitted only in slots of kind gpu"]


@pytest.mark.parametrize(
    ("args", "line", "rule", "argument", "fits"),
    [
        (["-t", "10"], 6, "sections[0].options[0].value", 2, ["a whole number from 0 to 9"]),
        (["-i", "b"], 8, "sections[0].operands[0].value", 2, ["an input of this job: a"]),
        (["-i", "a", "b", "c", "d"], 9, "sections[1]", 5, []),
        ([], 4, "sections[0]", 1, ["-i with an input of this job: a", "-t"]),
        (["x" * 5000], 1, "max_total_args_len", 1, []),
    ],
)
def test_a_denial_has_file_line_rule_and_what_would_fit(
    directory: Path, args: list[str], line: int, rule: str, argument: int, fits: list[str]
) -> None:
    said = ask(directory, "prog", *args, inputs=["a"])
    assert not said.permitted
    assert said.file == str(directory / "prog.yaml")
    assert (said.rule, said.argument, said.fits) == (rule, argument, fits)
    assert said.line == line


def test_an_unknown_command_is_of_no_file(directory: Path) -> None:
    said = ask(directory, "sh", "-c", "id")
    assert (said.permitted, said.file, said.line, said.rule) == (False, None, None, "")
    assert said.message == "no allowlist entry has this name; known names: prog"


def test_faults_are_told_for_they_keep_the_old_list_in_force(directory: Path) -> None:
    (directory / "bad.yaml").write_text("command: {path: relative}\n")
    notes = ask(directory, "prog", "-i", "a", inputs=["a"]).notes
    assert notes[0].startswith("workers use the previous allowlist until this fault is mended: ")
    assert f"{directory}/bad.yaml:1: command.path" in notes[0]


def test_where_commands_are_not_run_nothing_is_permitted(directory: Path) -> None:
    said = judge(Settings(enable=False, allowlist_dirs=(directory,)), Request("allow", command=["prog"]))
    assert not said.permitted
    assert "runners.cli.enable" in said.message


WORDS = st.sampled_from(["-t", "-i", "1", "10", "a", "b", "../output/x", "../x", "", "x" * 300])


@given(st.lists(WORDS, max_size=6), st.lists(st.sampled_from(["a", "b"]), unique=True))
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_it_is_the_very_answer_that_a_job_gets(directory: Path, args: list[str], inputs: list[str]) -> None:
    said = ask(directory, "prog", *args, inputs=inputs)
    fits = f"; what would fit: {', '.join(said.fits)}" if said.fits else ""
    expected = said.message if said.permitted else f"cannot run 'prog': {said.message}{fits}"
    assert plan(directory, args, inputs) == expected


def plan(directory: Path, args: list[str], inputs: list[str]) -> str:
    """Say what a job starts, or what it is told."""
    runner = CliRunner(load_allowlist([directory], [], []))
    job = Manifest(
        job_id="j", runner="cli", command="prog", args=args, input=Inputs(inline=dict.fromkeys(inputs, ""))
    )
    try:
        launch = runner.plan(job, JobPaths(Path("/job")), SlotSpec(name="cpu0", kind="cpu"), {})
    except JobError as error:
        return error.message
    return shlex.join(launch.argv)
