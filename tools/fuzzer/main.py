"""Feeds hostile input to the decoders, one target after the other, for a time or a number of inputs.

Each target runs in its own process, so that a crash, an endless run or exhausted memory is a finding too. The
tool keeps the input of a finding as a file, and prints the command that repeats the finding. The targets and
their permitted errors are in tests/fuzz; add a new finding to found.py there.

The exit status is 1 after a finding.
"""

import argparse
import contextlib
import os
import resource
import secrets
import sys
import time
import traceback
from collections.abc import Sequence
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import NamedTuple

from tests.fuzz.engine import Explorer, Finding, Target, judged_log
from tests.fuzz.targets import TARGETS

ROOT = Path(__file__).resolve().parents[2]
DEFAULT_S = 20.0
ROUND = 100
STUCK_S = 60.0
"""After so long on one input it is a finding; the calls of Python are counted long before."""
MEMORY = 2 << 30
BROKEN = 3
"""Exit status of a process that cannot go on though its interpreter could."""


class Settings(NamedTuple):
    """The time or number of inputs for a target, and the seed."""

    seconds: float
    runs: int | None
    seed: int


class Tally(NamedTuple):
    """The result of a target."""

    runs: int
    seconds: float
    findings: list[Finding]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the chosen targets and print the results; give the exit status."""
    options = _options(argv)
    if options.input is not None:
        return _repeat(TARGETS[options.targets[0]], options.input.read_bytes())
    settings = Settings(options.seconds, options.runs, options.seed)
    print(f"seed {settings.seed}", flush=True)
    found = 0
    for name in options.targets or TARGETS:
        tally = explore(TARGETS[name], settings)
        found += len(tally.findings)
        print(
            f"{name:18}{tally.runs:9} runs in {tally.seconds:5.0f} s{len(tally.findings):4} findings",
            flush=True,
        )
        for finding in tally.findings:
            _keep(options.keep, name, finding)
    return 1 if found else 0


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="tools/fuzz", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("targets", nargs="*", metavar="TARGET", help=f"one or more of {', '.join(TARGETS)} (all)")
    add("--seconds", type=float, default=DEFAULT_S, help=f"seconds for each target ({DEFAULT_S:.0f})")
    add("--runs", type=int, help="number of inputs for each target, instead of a time")
    add(
        "--seed",
        type=int,
        default=secrets.randbits(31),
        help="seed of the inputs; with --runs the same seed gives the same inputs",
    )
    add(
        "--keep",
        type=Path,
        default=ROOT / "build" / "fuzz",
        metavar="DIR",
        help="directory of the findings (build/fuzz)",
    )
    add("--input", type=Path, metavar="FILE", help="run the named target with this input only")
    options = parser.parse_args(argv)
    if unknown := set(options.targets) - set(TARGETS):
        parser.error(f"unknown target: {', '.join(sorted(unknown))}; the targets are {', '.join(TARGETS)}")
    if options.input is not None and len(options.targets) != 1:
        parser.error("--input needs one target")
    return options


def explore(target: Target, settings: Settings) -> Tally:
    """Run a target in its own processes; after a crash the next process goes on with other inputs."""
    began = time.monotonic()
    runs, findings = 0, dict[str, Finding]()
    number = settings.seed
    while runs == 0 or _goes_on(settings, runs, began):
        left = settings._replace(seconds=settings.seconds - (time.monotonic() - began), seed=number)
        more, found, crash = _one_process(target, left, list(findings.values()))
        runs += max(1, more)
        findings |= {finding.place: finding for finding in found}
        if crash is None:
            break
        findings[crash.place] = crash
        number += 1_000_003
    return Tally(runs, time.monotonic() - began, list(findings.values()))


def _goes_on(settings: Settings, runs: int, began: float) -> bool:
    return runs < settings.runs if settings.runs else time.monotonic() - began < settings.seconds


def _one_process(
    target: Target, settings: Settings, known: list[Finding]
) -> tuple[int, list[Finding], Finding | None]:
    fd = os.memfd_create("input")
    ours, theirs = get_context("fork").Pipe(duplex=False)
    process = get_context("fork").Process(target=_try, args=(target, settings, known, fd, theirs))
    process.start()
    theirs.close()
    runs, findings, crash = 0, list[Finding](), None
    with contextlib.suppress(EOFError):
        while (said := _next(ours, process, fd)) is not None:
            runs = said if isinstance(said, int) else runs
            findings += [said] if isinstance(said, Finding) else []
    process.join()
    if process.exitcode:
        how = "stuck" if process.exitcode == -9 else f"crashed, status {process.exitcode}"
        crash = Finding(f"{how} {target.name}", f"the process was {how}", os.pread(fd, 1 << 26, 0))
    os.close(fd)
    ours.close()
    return runs, findings, crash


def _next(end: "Connection[None, int | Finding]", process: ForkProcess, fd: int) -> int | Finding | None:
    """Wait for the process's result; None if the process had to be killed."""
    while not end.poll(STUCK_S):
        # It says something after each round, and its clock of the input goes on with each.
        if time.time() - os.fstat(fd).st_mtime > STUCK_S:
            process.kill()
            return None
    return end.recv()


def _try(
    target: Target, settings: Settings, known: list[Finding], fd: int, said: "Connection[int | Finding, None]"
) -> None:
    # Beyond it a MemoryError is a finding, and no trouble for the machine.
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    began = time.monotonic()

    def note(data: bytes) -> None:
        os.pwrite(fd, data, 0)
        os.ftruncate(fd, len(data))

    try:
        with target.opened() as check:
            explorer = Explorer(target, check, note)
            explorer.known.update({finding.place: finding for finding in known})
            number = settings.seed
            while explorer.runs == 0 or _goes_on(settings, explorer.runs, began):
                runs = ROUND if settings.runs is None else min(ROUND, settings.runs - explorer.runs)
                finding = explorer.round(runs, number)
                number += 1
                said.send(finding if finding else explorer.runs)
            said.send(explorer.runs)
    except BaseException:  # noqa: BLE001  # the child's last act
        traceback.print_exc()
        os._exit(BROKEN)
    os._exit(0)


def _keep(where: Path, name: str, finding: Finding) -> None:
    where.mkdir(parents=True, exist_ok=True)
    kind = "".join(char if char.isalnum() else "-" for char in finding.place)[-60:]
    file = where / f"{name}-{kind}.input"
    file.write_bytes(finding.data)
    print(
        f"    {finding.place}\n    {finding.error}\n    again: tools/fuzz {name} --input {file}", flush=True
    )


def _repeat(target: Target, data: bytes) -> int:
    with target.opened() as check, judged_log():
        try:
            check(data)
        except BaseException:  # noqa: BLE001  # whatever comes out is what was asked for
            traceback.print_exc()
            return 1
    print("no finding with this input")
    return 0


if __name__ == "__main__":
    sys.exit(main())
