"""The order of what `tools/test` does, and its tables; the phases are stood in for by scripts."""

import asyncio
import os
import signal
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from tools.lib.local_node import wait_until
from tools.test_runner import main as test_run
from tools.test_runner.main import Case, Done, Phase

WAIT_S = 30.0


def sh(script: str, name: str = "phase", **more: object) -> Phase:
    return Phase(name, [["sh", "-c", script]], **more)  # type: ignore[arg-type]


def test_a_chain_goes_on_after_a_failure_and_keeps_its_status() -> None:
    done = asyncio.run(test_run.chain([sh("exit 3", "a"), sh("exit 0", "b")]))
    assert [(each.name, each.status) for each in done] == [("a", 3), ("b", 0)]


def test_all_commands_of_a_phase_run_and_the_first_failure_is_its_status(tmp_path: Path) -> None:
    commands = [["sh", "-c", line] for line in ("exit 0", "exit 5", f": >{tmp_path}/ran", "exit 6")]
    assert asyncio.run(test_run.run(Phase("phase", commands))).status == 5
    assert (tmp_path / "ran").exists()


def test_lines_of_a_machine_are_told_from_the_others(capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    long = "x" * 200_000
    asyncio.run(test_run.run(sh(f"echo one; echo two >&2; echo {long[:100_000]}", prefix="12: ")))
    out = capfdbinary.readouterr().out
    assert out == b"12: one\n12: two\n12: " + long[:100_000].encode() + b"\nphase: ok after 0.0 min\n"


def test_the_tables_have_every_phase_and_the_slowest_tests_first() -> None:
    cases = [Case(float(number), f"t::{number}") for number in range(40)]
    text = test_run.tables([Done("linters", 6.0, 0), Done("tests", 120.0, 1, cases)], 125.0)
    lines = text.splitlines()
    assert lines[1].split() == ["linters", "0.1", "ok"]
    assert lines[2].split() == ["tests", "2.0", "40", "failed:", "status", "1"]
    assert lines[3].split() == ["all", "2.1", "40"]
    slowest = [line.split() for line in lines[6:]]
    assert slowest == [[f"{number}.0", f"t::{number}"] for number in range(39, 9, -1)]


def test_results_are_those_of_pytest(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text("def test_a(): pass\ndef test_b(): assert 0\n")
    results = tmp_path / "results"
    pytest_in: list[str | Path] = ["-m", "pytest", f"--rootdir={tmp_path}", tmp_path]
    command = [sys.executable, *pytest_in, f"--junitxml={results}/one.xml"]
    done = asyncio.run(test_run.run(Phase("tests", [command], prefix="t: ", results=results)))
    assert done.status == 1
    assert sorted(case.name.rpartition("::")[2] for case in done.cases) == ["test_a", "test_b"]


def test_what_never_came_to_its_results_has_none(tmp_path: Path) -> None:
    assert test_run.read_cases(tmp_path) == []


MAIN = """
import sys
import xml.etree.ElementTree as ET
from tools.test_runner import main as test_run
from tools.test_runner.main import Phase
test_run.native = lambda scratch: [Phase("native", [["sh", "-c", sys.argv[1]]])]
test_run.versions = list
test_run.image = lambda release: Phase("image", [["true"]])
test_run.in_container = lambda release, _: []
def in_machine(release, _):
    return [Phase(release, [["sh", "-c", sys.argv[2], release]], f"{release}: ")]
test_run.in_machine = in_machine
sys.exit(test_run.main(sys.argv[3:]))
"""


def whole(*words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", MAIN, *words], cwd=test_run.CHECKOUT, stdout=subprocess.PIPE, text=True
    )


@pytest.mark.parametrize(
    ("native", "machine", "words", "status"),
    [("exit 0", "exit 0", ["--vm"], 0), ("exit 0", "exit 4", ["--vm"], 4), ("exit 3", "exit 4", ["--vm"], 3),
     ("exit 0", "exit 4", [], 0)],
)  # fmt: skip
def test_a_failure_anywhere_is_the_status(native: str, machine: str, words: list[str], status: int) -> None:
    with whole(native, machine, *words) as run:
        said, _ = run.communicate(timeout=WAIT_S)
    assert run.returncode == status
    assert ("Debian" in said or "\n13 " in said) == bool(words)


def test_the_machines_run_at_once_and_after_the_native_tests(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "meeting")
    meet = f"cd {tmp_path}; cat native; if [ $0 = 12 ]; then echo met >meeting; else cat meeting; fi"
    with whole(f"echo over >{tmp_path}/native", meet, "--vm") as run:
        try:
            said, _ = run.communicate(timeout=WAIT_S)
        finally:
            run.terminate()
    lines = [line for line in said.splitlines() if line.endswith((" over", " met"))]
    assert sorted(lines) == ["12: over", "13: met", "13: over"]


@pytest.mark.parametrize("root", [True, False])
def test_what_no_container_can_have_runs_in_a_machine(monkeypatch: pytest.MonkeyPatch, *, root: bool) -> None:
    monkeypatch.setattr(test_run, "containers", lambda: root)
    inside, machine = test_run.in_container("12", []), test_run.in_machine("12", [])[0]
    assert [phase.name for phase in inside] == (["Debian 12: container"] if root else [])
    assert all("--container" in phase.commands[0] for phase in inside)
    assert "--container" not in machine.commands[0]
    assert ("--own-kernel" in machine.commands[0]) == root


def test_what_is_told_to_end_ends_what_it_has_started(tmp_path: Path) -> None:
    with whole(f"echo $$ >{tmp_path}/pid; exec sleep 600", "exit 0") as run:
        wait_until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text(), WAIT_S)
        run.send_signal(signal.SIGTERM)
        assert run.wait(WAIT_S) == 128 + signal.SIGTERM
    pid = int((tmp_path / "pid").read_text())
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


SHARING = """
import os, pytest
@pytest.fixture(scope="module")
def node():
    yield
@pytest.mark.parametrize("number", range(20))
def test_sharing(node, number, record_property):
    record_property("pid", os.getpid())
"""


def test_what_shares_a_fixture_stays_in_one_process(tmp_path: Path) -> None:
    for name in ("test_a.py", "node/test_b.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(SHARING)
    spread = ["-p", "tools.test_runner.spread", "-n", "2", f"--junitxml={tmp_path}/x.xml"]
    command = [sys.executable, "-m", "pytest", f"--rootdir={tmp_path}", *spread, str(tmp_path)]
    subprocess.run(command, cwd=test_run.CHECKOUT, check=True, stdout=subprocess.DEVNULL)
    found = ET.parse(tmp_path / "x.xml").iter("testcase")
    pids = {(case.get("classname"), each.get("value")) for case in found for each in case.iter("property")}
    assert len(pids) == 2, pids
    assert len({module for module, _ in pids}) == 2, pids
