"""Runs a Python task as a worker does: plan, a process with a pipe for its reports, verdict."""

import os
import select
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from aitbc_miner.jobs import ExitStatus, Manifest
from aitbc_miner.runners.interface import JobPaths, Verdict
from aitbc_miner.runners.python import PythonRunner
from aitbc_miner.slots.spec import SlotSpec
from aitbc_miner.task import Report, ReportReader

DEADLINE_S = 60
SLOT = SlotSpec(name="cpu0", kind="cpu", env=["LET_THROUGH"])


class Ran(NamedTuple):
    verdict: Verdict
    exit: ExitStatus
    reports: list[Report]
    log: str
    root: Path


def execute(runner: PythonRunner, manifest: Manifest, paths: JobPaths) -> Ran:
    launch = runner.plan(manifest, paths, SLOT, {})
    read, write = os.pipe()
    child = subprocess.Popen(
        launch.argv,
        env=launch.env | {"AITBC_REPORT_FD": str(write)},
        cwd=paths.work,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        pass_fds=[write],
    )
    os.close(write)
    reports: list[Report] = []
    reader = threading.Thread(target=lambda: reports.extend(read_reports(read)))
    reader.start()
    try:
        log = child.communicate(launch.stdin, timeout=DEADLINE_S)[0].decode()
    finally:
        child.kill()
        child.wait()
        reader.join(DEADLINE_S)
        os.close(read)
    code = child.returncode
    ended = ExitStatus(signal=-code) if code < 0 else ExitStatus(status=code)
    return Ran(runner.verdict(ended, reports, log), ended, reports, log, paths.root)


def read_reports(fd: int) -> Iterator[Report]:
    reader = ReportReader()
    while select.select([fd], [], [], DEADLINE_S)[0] and (data := os.read(fd, 65536)):
        yield from reader.feed(data)
    yield from reader.finish()
