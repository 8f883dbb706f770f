"""The command `tools/test`: runs linters, mypy and tests, then two Debian machines, and prints a table."""

import argparse
import asyncio
import contextlib
import functools
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable, Coroutine, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tools.vm_lab import container
from tools.vm_lab.image import RELEASES

CHECKOUT = Path(__file__).resolve().parents[2]
REPORTS = CHECKOUT / "build" / "vm"
SLOWEST = 30
LONGEST_LINE = 1 << 24
# A whole node mostly waits, so that more of them than processors keep these busy.
PROCESSES = min(8, 2 * (os.cpu_count() or 1))
CAMPAIGN_S = 14_400


class Case(NamedTuple):
    """The time of a test."""

    seconds: float
    name: str


class Done(NamedTuple):
    """The result of a phase: its row in the table."""

    name: str
    seconds: float
    status: int
    cases: list[Case] = []  # noqa: RUF012 - nobody adds to it


class Phase(NamedTuple):
    """A step of `tools/test`: commands in sequence; a failed command does not stop the next.

    `prefix` stands before each line of output. `results` has pytest's JUnit files.
    """

    name: str
    commands: Sequence[Sequence[str | Path]]
    prefix: str = ""
    environ: Mapping[str, str] = {}
    results: Path | None = None


async def run(phase: Phase) -> Done:
    """Run a phase to its end; its status is the first status above 0."""
    began = time.monotonic()
    statuses = [await _command(list(map(str, command)), phase) for command in phase.commands]
    status = next((each for each in statuses if each), 0)
    cases = read_cases(phase.results) if phase.results else []
    seconds = time.monotonic() - began
    print(f"{phase.name}: {_result(status)} after {seconds / 60:.1f} min", flush=True)
    return Done(phase.name, seconds, status, cases)


async def _command(command: list[str], phase: Phase) -> int:
    # Where several speak, each line is to be whole; on a terminal the native tests show how they get on.
    pipe = asyncio.subprocess.PIPE if phase.prefix or not sys.stdout.isatty() else None
    process = await asyncio.create_subprocess_exec(
        *command,
        cwd=CHECKOUT,
        env={**os.environ, **phase.environ},
        stdin=asyncio.subprocess.DEVNULL,
        stdout=pipe,
        stderr=asyncio.subprocess.STDOUT if pipe else None,
        limit=LONGEST_LINE,
    )
    try:
        if process.stdout:
            async for line in process.stdout:
                sys.stdout.buffer.write(phase.prefix.encode() + line)
                sys.stdout.buffer.flush()
        return await process.wait()
    finally:
        if process.returncode is None:
            process.terminate()
            await process.wait()


async def chain(phases: Sequence[Phase]) -> list[Done]:
    """Run phases in sequence; a failed phase does not stop the next."""
    return [await run(phase) for phase in phases]


def read_cases(results: Path) -> list[Case]:
    """Give the tests in a directory's JUnit files; none if pytest has not written a file."""
    cases = (case for file in results.glob("*.xml") for case in ET.parse(file).iter("testcase"))
    return [
        Case(float(case.get("time", "0")), f"{case.get('classname')}::{case.get('name')}") for case in cases
    ]


# --- which phases there are --------------------------------------------------------------------------------


def native(scratch: Path) -> list[Phase]:
    """Give the phases that run on this machine."""
    python = sys.executable
    ruff, mypy = (Path(python).parent / name for name in ("ruff", "mypy"))
    results = scratch / "native"
    # The node's processes run as several users, and each writes down what it covered.
    covered = scratch / "coverage"
    covered.mkdir()
    covered.chmod(0o1777)
    # All of pytest's processes must list the tests in the same order.
    environ = {"COVERAGE_FILE": str(covered / "data"), "PYTHONHASHSEED": str(random.randrange(1 << 32))}
    spread = ["-p", "tools.test_runner.spread", "-n", str(PROCESSES)]
    return [
        Phase("linters, types", [[ruff, "check", "."], [ruff, "format", "--check", "."], [mypy]]),
        Phase(
            "unit and process tests",
            [[python, "-m", "coverage", "run", "-m", "pytest", *spread, f"--junitxml={results}/tests.xml"]],
            environ=environ,
            results=results,
        ),
        Phase(
            "coverage",
            [
                [python, "-m", "coverage", "combine", "--quiet", covered],
                [python, "-m", "coverage", "report", "--skip-covered"],
            ],
            environ=environ,
        ),
    ]


def versions() -> list[Phase]:
    """Give the unit tests with the oldest and the newest versions of setup.cfg's requirements."""
    return [
        Phase(
            f"unit tests, {end} versions",
            # Beside the emulated machines, and only with the time that they leave.
            [["nice", "tools/test", "--versions", end, "--unless-locked"]],
            f"{end}: ",
        )
        for end in ("lowest", "newest")
    ]


def image(release: str) -> Phase:
    """Give the phase that makes the image of this Debian release, unless the image exists."""
    return Phase(f"Debian {release}: image", [["tools/vm", "--release", release, "build"]], f"{release}: ")


@functools.cache
def containers() -> bool:
    """Whether containers run here; if not, print the cause, and the emulated machines run all tests."""
    if cause := container.why_not():
        print(f"cannot make containers: {cause}; the emulated machines run all tests", flush=True)
    return not cause


def in_container(release: str, arguments: Sequence[str]) -> list[Phase]:
    """Give the tests for a container with this Debian release: all tests without need of a kernel."""
    return [in_debian(release, "container", ["--container"], arguments)] if containers() else []


def in_debian(release: str, name: str, options: Sequence[str], words: Sequence[str]) -> Phase:
    """Give a run of tests in this Debian release, with its reports."""
    hours = ["--timeout", str(CAMPAIGN_S)] if "--full" in words else []
    reports = REPORTS / f"{release}-{name}"
    shutil.rmtree(reports, ignore_errors=True)
    command: list[str | Path] = ["tools/vm", "--release", release, *options, *hours, "--reports", reports]
    command += ["test", "-v", *words, f"--junitxml=/reports/{name}.xml"]
    return Phase(f"Debian {release}: {name}", [command], f"{release}: ", results=reports)


def in_machine(release: str, arguments: Sequence[str]) -> list[Phase]:
    """Give the tests for an emulated machine with this Debian release."""
    kernel = ["--own-kernel"] if containers() else []
    tests = [*kernel, "--maxfail", "3", *arguments]
    # What takes the machine down in its middle is no matter of the release, and comes last. The power cuts
    # need a machine of their own: what was written to its disk before would survive them.
    if release == "12":
        power = ["tests/vm/powercut.py", *arguments]
        return [in_debian(release, "tests", [], tests), in_debian(release, "powercut", [], power)]
    first = [*tests, "--junitxml=/reports/first.xml"]
    return [in_debian(release, "tests", [], [*first, "--then", "tests/vm/reboot.py", *arguments])]


# --- the tables --------------------------------------------------------------------------------------------


def tables(done: Sequence[Done], seconds: float) -> str:
    """Give the tables of phases and of the slowest tests; phases of several chains overlap."""
    rows = [
        (each.name, f"{each.seconds / 60:.1f}", str(len(each.cases) or ""), _result(each.status))
        for each in done
    ]
    rows.append(("all", f"{seconds / 60:.1f}", str(sum(len(each.cases) for each in done)), ""))
    lines = [f"{'phase':28}{'minutes':>8}{'tests':>7}  result"]
    lines += [f"{name:28}{minutes:>8}{tests:>7}  {result}".rstrip() for name, minutes, tests, result in rows]
    for each in done:
        if each.cases:
            slowest = sorted(each.cases, reverse=True)[:SLOWEST]
            lines += ["", f"slowest of {each.name}, in seconds"]
            lines += [f"{case.seconds:8.1f}  {case.name}" for case in slowest]
    return "\n".join(lines)


def _result(status: int) -> str:
    return f"failed: status {status}" if status else "ok"


async def _all(stages: Sequence[Sequence[Sequence[Phase]]]) -> list[Done]:
    done = [await asyncio.gather(*map(chain, chains)) for chains in stages]
    return [each for stage in done for phases in stage for each in phases]


def until_told(work: Callable[[], Coroutine[Any, Any, list[Done]]]) -> list[Done]:
    """Do the work; a SIGTERM ends the started commands."""

    async def main() -> list[Done]:
        task = asyncio.ensure_future(work())
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
        return await task

    return asyncio.run(main())


def main(words: Sequence[str] | None = None) -> int:
    """Run all phases, print the tables and give the exit status."""
    parser = argparse.ArgumentParser(prog="tools/test", description=__doc__)
    parser.add_argument("--vm", action="store_true", help="run also the tests in Debian 12 and 13 machines")
    parser.add_argument(
        "--full", action="store_true", help="run also the long campaigns in these machines, which take hours"
    )
    chosen = parser.parse_args(words)
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="aitbc-test-") as made:
        scratch = Path(made)
        scratch.chmod(0o755)
        stages = [[native(scratch)]]
        if chosen.vm:
            arguments = ["--full"] if chosen.full else []
            # The tests in containers mostly wait.
            stages[0] += [[image(each), *in_container(each, arguments)] for each in sorted(RELEASES)]
            # For the same work, an emulated machine takes twice the processor's time beside the native tests.
            stages += [[versions(), *(in_machine(release, arguments) for release in sorted(RELEASES))]]
        done: list[Done] = []
        with contextlib.suppress(asyncio.CancelledError):
            done = until_told(lambda: _all(stages))
    if not done:
        return 128 + signal.SIGTERM
    print(f"\n{tables(done, time.monotonic() - began)}", flush=True)
    return next((each.status for each in done if each.status), 0)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
