import contextlib
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aitbc_miner.allowlist.entries import load_allowlist
from aitbc_miner.errors import ErrorCode, JobError
from aitbc_miner.inputs import urls as input_urls
from aitbc_miner.jobs import ExitStatus, Inputs, InputUrl, Manifest
from aitbc_miner.runners.cli import CliRunner, input_names
from aitbc_miner.runners.interface import JobPaths, Launch, Runner, job_env, printable, shortest
from aitbc_miner.slots.spec import SlotSpec

PATHS = JobPaths(Path("/jobs/j1"))
GPU = {"CUDA_VISIBLE_DEVICES": "GPU-1"}


@pytest.fixture
def runner(tmp_path: Path) -> CliRunner:
    program = tmp_path / "prog"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    (tmp_path / "prog.yaml").write_text(
        f"command: {{path: {program}}}\n"
        'args: [["-x", ".*"]]\n'
        "max_runtime_s: 100\n"
        "max_output_mb: 2.5\n"
        "env: [BOTH, ENTRY]\n"
    )
    faults: list[Any] = []
    allowlist = load_allowlist([tmp_path], faults, [])
    assert not faults
    return CliRunner(allowlist)


def slot(**fields: Any) -> SlotSpec:
    return SlotSpec(name="cpu0", kind="cpu", **fields)


def manifest(**fields: Any) -> Manifest:
    return Manifest(**{"job_id": "j1", "runner": "cli", "command": "prog"} | fields)


def plan(runner: Runner, job: Manifest, **spec: Any) -> Launch:
    return runner.plan(job, PATHS, slot(**spec), GPU)


def test_a_launch_is_the_entrys_program_with_the_jobs_arguments(runner: CliRunner, tmp_path: Path) -> None:
    launch = plan(runner, manifest(args=["-x", "$(reboot); `id` && *"]))
    assert launch.argv == [str(tmp_path / "prog"), "-x", "$(reboot); `id` && *"]
    assert launch.max_output_bytes == 2.5 * 2**20
    assert (launch.reports, launch.stdin) == (False, b"")


def test_the_environment_is_built_from_nothing(
    runner: CliRunner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MINER_AUTH", "hush")
    assert plan(runner, manifest()).env == {
        "PATH": "/usr/local/bin:/usr/bin:/bin",
        "HOME": "/jobs/j1/work",
        "TMPDIR": "/jobs/j1/tmp",
        "LANG": "C.UTF-8",
        "AITBC_JOB_ID": "j1",
        "AITBC_SLOT": "cpu0",
        "AITBC_WORK_DIR": "/jobs/j1/work",
        "AITBC_OUTPUT_DIR": "/jobs/j1/output",
        "CUDA_VISIBLE_DEVICES": "GPU-1",
    }


def test_a_variable_passes_only_if_entry_and_slot_allow_it(runner: CliRunner) -> None:
    launch = plan(runner, manifest(env={"BOTH": "1"}), env=["BOTH", "SLOT"])
    assert launch.env["BOTH"] == "1"
    for name in ["ENTRY", "SLOT", "NEITHER"]:
        with pytest.raises(JobError, match=name) as error:
            plan(runner, manifest(env={"BOTH": "1", name: "1"}), env=["BOTH", "SLOT"])
        assert error.value.code is ErrorCode.E_DENY


@pytest.mark.parametrize(
    "name",
    [
        *("PATH", "HOME", "TMPDIR", "LANG", "LD_PRELOAD", "LD_LIBRARY_PATH", "PYTHONPATH", "PYTHONSTARTUP"),
        *("BASH_ENV", "IFS", "AITBC_REPORT_FD", "CUDA_VISIBLE_DEVICES", "A=B", "", "1A", "A\n", "Ä"),
    ],
)
def test_what_decides_which_code_runs_never_passes(name: str) -> None:
    with pytest.raises(JobError, match="no job may set") as error:
        job_env(manifest(env={name: "x"}), PATHS, slot(), {}, [name])
    assert error.value.code is ErrorCode.E_DENY
    assert "\n" not in error.value.message


def test_the_shortest_limit_applies(runner: CliRunner) -> None:
    assert plan(runner, manifest()).max_runtime_s == 100
    assert plan(runner, manifest(timeout_s=50.0)).max_runtime_s == 50
    assert plan(runner, manifest(timeout_s=500.0), max_runtime_s=20.0).max_runtime_s == 20
    assert shortest(None, None) is None
    assert shortest(None, 0.0) == 0


def test_what_the_allowlist_denies_is_not_planned(runner: CliRunner) -> None:
    with pytest.raises(JobError, match="argument 1"):
        plan(runner, manifest(args=["-rf"]))
    with pytest.raises(JobError, match="no command") as error:
        plan(runner, manifest(command=None))
    assert error.value.code is ErrorCode.E_MANIFEST


@pytest.mark.parametrize(
    ("ended", "log", "code", "words"),
    [
        (ExitStatus(status=0), "noise", None, ""),
        (ExitStatus(status=3), "one\ntwo  \n\n", ErrorCode.E_EXIT, "exit status 3; last line: two"),
        (ExitStatus(status=137), "", ErrorCode.E_EXIT, "exit status 137; it printed nothing"),
        (ExitStatus(signal=11), "x", ErrorCode.E_SIGNAL, "SIGSEGV"),
        (ExitStatus(signal=63), "x", ErrorCode.E_SIGNAL, "signal 63"),
        (ExitStatus(), "", ErrorCode.E_EXIT, "exit status None"),
    ],
)
def test_the_verdict_is_the_exit_status(
    runner: CliRunner, ended: ExitStatus, log: str, code: ErrorCode | None, words: str
) -> None:
    verdict = runner.verdict(ended, [], log)
    assert verdict.code is code
    assert words in verdict.message
    assert verdict.result is None


def test_the_last_line_cannot_reach_the_terminal(runner: CliRunner) -> None:
    message = runner.verdict(ExitStatus(status=1), [], "a\n\x1b[2Jboo\u202e" + "x" * 9999).message
    assert message.isprintable()
    assert "?[2Jboo?" in message
    assert len(message) < 400
    assert printable("é\t中", 9) == "é?中"


def test_the_jobs_directories() -> None:
    names = [PATHS.input, PATHS.work, PATHS.output, PATHS.logs, PATHS.tmp]
    assert [os.fspath(path) for path in names] == [
        f"/jobs/j1/{name}" for name in ["input", "work", "output", "logs", "tmp"]
    ]


# --- an entry in the long form -----------------------------------------------------------------------------


@pytest.fixture
def long_runner(tmp_path: Path) -> CliRunner:
    (tmp_path / "long.yaml").write_text(
        "command: {path: /usr/bin/true, name: long}\n"
        "leading: [-q]\n"
        "operands: [{value: input, max: 9}, {value: output, min: 0}]\n"
        "kind: gpu\n"
        "binds: [/usr/share]\n"
    )
    faults: list[Any] = []
    allowlist = load_allowlist([tmp_path], faults, [])
    assert not faults
    return CliRunner(allowlist)


def test_leading_arguments_come_first_and_binds_along(long_runner: CliRunner) -> None:
    job = manifest(command="long", args=["a", "../output/b"], input=Inputs(inline={"a": ""}))
    launch = long_runner.plan(job, PATHS, SlotSpec(name="gpu0", kind="gpu", gpu=0), GPU)
    assert launch.argv == ["/usr/bin/true", "-q", "a", "../output/b"]
    assert launch.binds == (Path("/usr/share"),)


def test_only_inputs_of_the_job_are_inputs(long_runner: CliRunner) -> None:
    with pytest.raises(JobError) as error:
        long_runner.plan(
            manifest(command="long", args=["b"], input=Inputs(inline={"a": ""})),
            PATHS,
            SlotSpec(name="gpu0", kind="gpu", gpu=0),
            GPU,
        )
    assert error.value.code is ErrorCode.E_DENY
    assert "an input of this job: a" in error.value.message


def test_an_entry_for_slots_with_a_gpu_does_not_run_without(long_runner: CliRunner) -> None:
    with pytest.raises(JobError) as error:
        plan(long_runner, manifest(command="long", args=["a"], input=Inputs(inline={"a": ""})))
    assert error.value.code is ErrorCode.E_DENY
    assert "needs a slot of kind gpu" in error.value.message


def test_inputs_are_named_by_themselves_or_by_their_address() -> None:
    urls: list[str | InputUrl] = [
        "https://h/x/a%20b.mp4?q=/z#f",
        InputUrl("http://h/c", name="d"),
        "http://[/x",
    ]
    job = manifest(input=Inputs(urls=urls, inline={"e": ""}))
    assert input_names(job) == ["e", "a b.mp4", "d", ""]


parts = st.text(st.sampled_from("ab.%2F0é;=&~ +@:,\\|") | st.characters(codec="utf-8"), max_size=8)


@given(parts, st.sampled_from(["", "?q=a/b", "#f/g", "?", "#"]))
@settings(deadline=None)
def test_the_name_of_an_input_is_that_under_which_it_was_fetched(part: str, rest: str) -> None:
    url = f"https://h.example/dir/{part}{rest}"
    with contextlib.suppress(JobError):
        name = input_urls.name_of(InputUrl(url))
        # What was fetched under a name that no file may have is nowhere.
        if input_urls._name_fault(name) is None:
            assert input_names(manifest(input=Inputs(urls=[url]))) == [name]
