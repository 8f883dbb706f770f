"""The demo: a mock coordinator, a node with two CPU slots, and real jobs of every kind."""

import argparse
import os
import shlex
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import msgspec
import psutil
from msgspec import Struct

from aitbc_miner.jobs import Outcome, StateRecord
from aitbc_miner.util.terminal import cut, width
from tools.lib.local_node import LocalNode, wait_until
from tools.mock.bootstrap.coordinator import MockCoordinator
from tools.mock.bootstrap.records import FINAL

ROOT = Path(__file__).resolve().parents[2]
SLOTS = [
    {"name": f"cpu{i}", "kind": "cpu", "memory_max": "256M", "pids_max": 256, "cpu_max": "100%"}
    for i in (0, 1)
]
TIMEOUT_S = 60.0


class Example(Struct, frozen=True):
    """A job of the demo: description, manifest, and the expected code at its end (OK for success)."""

    what: str
    manifest: dict[str, Any]
    expected: str = "OK"
    cancel: bool = False


def examples(files: str) -> Iterator[Example]:
    """Make the jobs; the coordinator serves the inputs at the address `files`."""

    def cli(what: str, command: str, *args: str, expected: str = "OK", **more: Any) -> Example:
        manifest = {"runner": "cli", "command": command, "args": list(args), "timeout_s": 30, **more}
        return Example(what, manifest, expected)

    def task(what: str, name: str, expected: str = "OK", more: Any = None, **params: Any) -> Example:
        manifest = {"runner": "python", "task": name, "params": params, "timeout_s": 30, **(more or {})}
        return Example(what, manifest, expected)

    text = {"urls": [f"{files}/flaky/README.md"]}
    yield cli(
        "checksum of a file fetched by URL, the transfer broken once", "sha256sum", "README.md", input=text
    )
    yield cli(
        "compress a file, deliver the archive",
        *("gzip", "-9", "LICENSE"),
        input={"urls": [f"{files}/files/LICENSE"]},
        artifacts=[{"path": "LICENSE.gz", "type": "application/gzip", "max_mb": 1}],
    )
    yield task("word statistics of a text", "word_statistics", path="README.md", more={"input": text}, top=3)
    yield task("Monte-Carlo pi on all cores of the slot", "monte_carlo_pi", samples=400_000, seed=7)
    yield task("hash a tree of inputs", "tree_hash", more={"input": {"inline": {"a": "1", "b": "2"}}})
    yield cli("a program that fails", "gzip", "missing.txt", expected="E_EXIT")
    yield cli("a command that is not allowed", "rm", "-rf", "/", expected="E_DENY")
    yield cli("an argument that is not allowed", "sha256sum", "/etc/shadow", expected="E_DENY")
    yield cli("longer than its time", "sleep", "600", expected="E_TIMEOUT", timeout_s=2)
    yield task("more memory than its slot has", "memory_hog", mib=4096, expected="E_OOM")
    yield cli(
        "a promised artifact that is never written",
        *("sha256sum", "LICENSE"),
        input={"urls": [f"{files}/files/LICENSE"]},
        artifacts=[{"path": "never.bin"}],
        expected="E_ARTIFACT",
    )
    yield cli(
        "an input that is not there",
        *("sha256sum", "gone.txt"),
        input={"urls": [f"{files}/files/gone.txt"]},
        expected="E_INPUT",
    )
    yield task("a task that refuses", "refuse", reason="it is Monday", expected="E_TASK")
    yield task("a task with a wrong parameter", "monte_carlo_pi", samples="many", expected="E_TASK")
    yield Example("a manifest that contradicts itself", {"runner": "cli", "args": "not a list"}, "E_MANIFEST")
    slow = cli("cancelled by the coordinator while it runs", "sleep", "600", expected="E_CANCELLED")
    yield msgspec.structs.replace(slow, cancel=True)


class Table:
    """Shows the states of the jobs: in place on a terminal, else one line for each change."""

    def __init__(self, coordinator: MockCoordinator, jobs: dict[str, Example]) -> None:
        self._coordinator = coordinator
        self._jobs = jobs
        self._shown: dict[str, str] = {}
        self._in_place = sys.stdout.isatty()
        self._began = time.monotonic()

    def show(self) -> None:
        """Print the changes."""
        states = {job_id: self._coordinator.job(job_id) for job_id in self._jobs}
        now = {job_id: f"{job.state:<7} {job.error_code or ''}".strip() for job_id, job in states.items()}
        if now == self._shown:
            return
        elapsed = time.monotonic() - self._began
        if self._in_place:
            up = f"\x1b[{len(now)}A" if self._shown else ""
            # A row that wrapped would leave a line behind at each redraw.
            rows = [
                "\x1b[2K" + cut(f"  {job_id:<8} {state:<18} {self._jobs[job_id].what}", width() - 1)
                for job_id, state in now.items()
            ]
            print(up + "\n".join(rows), flush=True)
        else:
            for job_id, state in now.items():
                if state not in {self._shown.get(job_id), "queued"}:
                    what = self._jobs[job_id].what
                    print(cut(f"  {elapsed:6.2f} s  {job_id:<8} {state:<18} {what}", width()), flush=True)
        self._shown = now


def follow(coordinator: MockCoordinator, jobs: dict[str, Example]) -> None:
    """Show the jobs until all are final."""
    table = Table(coordinator, jobs)
    cancelled: set[str] = set()
    deadline = time.monotonic() + TIMEOUT_S
    while time.monotonic() < deadline:
        with suppress(TimeoutError):
            # Wakes up at every change that the coordinator sees, or to show the time passing.
            coordinator.wait(lambda ledger: all(ledger.job(j).state in FINAL for j in jobs), 0.2)
            table.show()
            return
        table.show()
        for job_id, example in jobs.items():
            if example.cancel and job_id not in cancelled and coordinator.job(job_id).progress:
                cancelled.add(job_id)
                coordinator.cancel(job_id)


def report(coordinator: MockCoordinator, node: LocalNode, jobs: dict[str, Example]) -> bool:
    """Print the result of each job; True if all results are as expected."""
    good = True
    for job_id, example in jobs.items():
        job = coordinator.job(job_id)
        got = "OK" if job.state == "done" else job.error_code or f"still {job.state}"
        right = got == example.expected
        good &= right
        mark = "as expected" if right else f"EXPECTED {example.expected}"
        accepted = sum(report.verdict == "accepted" for report in job.reports)
        print(f"\n{cut(f'{job_id}: {example.what}', width())}")
        print(f"  {got} ({mark}); handed out {len(job.handed)} times, accepted reports: {accepted}")
        for line in details(node, job_id):
            print(cut(line, width()))
        if job.accepted:
            for artifact in job.accepted.artifacts:
                print(f"  artifact {artifact.path} {artifact.bytes} bytes\n    sha256 {artifact.sha256}")
    return good


def settled(node: LocalNode, job_id: str) -> bool:
    """Whether the node has recorded that the coordinator accepted its report."""
    state = msgspec.json.decode((node.jobs / job_id / "state.json").read_bytes(), type=StateRecord)
    return state.delivery is not None


def details(node: LocalNode, job_id: str) -> Iterator[str]:
    """Describe the node's own record of the job."""
    folder = node.jobs / job_id
    if not (folder / "outcome.json").exists():
        return
    outcome = msgspec.json.decode((folder / "outcome.json").read_bytes(), type=Outcome)
    state = msgspec.json.decode((folder / "state.json").read_bytes(), type=StateRecord)
    if outcome.message:
        yield f"  {outcome.message}"
    steps = ", ".join(f"{name} {seconds * 1000:.1f} ms" for name, seconds in outcome.timings.items())
    yield f"  state {state.state} ({state.delivery}), slot {outcome.slot or '-'}; {steps or 'never ran'}"
    if outcome.result is not None:
        yield f"  result {msgspec.json.encode(outcome.result).decode()}"
    yield f"  record {folder}"


def leftovers(node: LocalNode, pids: set[int]) -> list[str]:
    """Name the processes and cgroups that the node left behind."""
    left = [f"process {pid}" for pid in sorted(pids) if psutil.pid_exists(pid)]
    group = node.cgroup()
    return [*left, *([f"cgroup {group}"] if group else [])]


def main() -> int:
    """Run the demo; give the exit status."""
    parser = argparse.ArgumentParser(prog="tools/demo", description=__doc__)
    parser.add_argument("--keep", action="store_true", help="leave coordinator and node running until Ctrl-C")
    keep = parser.parse_args().keep
    for number in (signal.SIGINT, signal.SIGTERM):
        # Also in the background of a script, where the shell has Ctrl-C ignored.
        signal.signal(number, signal.default_int_handler)
    with ExitStack() as stack:
        files = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="aitbc-demo-")))
        for name in ("README.md", "LICENSE"):
            (files / name).write_bytes((ROOT / name).read_bytes())
        coordinator = stack.enter_context(MockCoordinator(files_dir=files))
        node = LocalNode(coordinator.url, SLOTS, keep=True)
        for name, sources in {
            "allowlist.d": ("etc/allowlist.d", "tools/demo_node/allowlist"),
            "tasks": ("etc/tasks", "tools/demo_node/tasks"),
        }.items():
            for source in sources:
                node.put(name, ROOT / source)
        who = (
            "root: the jobs of each slot run as a separate user" if os.geteuid() == 0 else "an ordinary user"
        )
        print(f"coordinator {coordinator.root}\nnode        {node.directory}\nas          {who}\n")
        good = run(coordinator, node, keep=keep)
    verdict = "all jobs ended as expected" if good else "some jobs did NOT end as expected"
    print(f"\n{verdict}; records and log stay in {node.directory}")
    return 0 if good else 1


def run(coordinator: MockCoordinator, node: LocalNode, *, keep: bool) -> bool:
    """Run all jobs on a node, then stop the node."""
    jobs: dict[str, Example] = {}
    for number, example in enumerate(examples(coordinator.root), 1):
        jobs[coordinator.submit({"job_id": f"job-{number:02}", **example.manifest})] = example
    with node:
        follow(coordinator, jobs)
        with suppress(TimeoutError):
            # The coordinator has accepted all reports; the node may not have recorded the answers yet.
            wait_until(lambda: all(settled(node, job_id) for job_id in jobs), 5.0)
        good = report(coordinator, node, jobs)
        ctl = shlex.quote(str(Path(sys.executable).parent / "aitbc-minerctl"))
        if keep:
            # Flush, because a pipe would keep the text until the end.
            print(
                f"\ncoordinator and node run; try:\n  {ctl} --socket {node.socket} status\nCtrl-C ends both",
                flush=True,
            )
            with suppress(KeyboardInterrupt):
                threading.Event().wait()
        pids = set(node.pids())
    with suppress(TimeoutError):
        wait_until(lambda: not leftovers(node, pids), 5.0)
    left = leftovers(node, pids)
    print(f"\nleft behind: {', '.join(left) or 'no processes, no cgroups'}")
    return good and not left


if __name__ == "__main__":
    sys.exit(main())
