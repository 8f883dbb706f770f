"""Measures jobs with and without a node in one run, because figures of separate runs are not comparable.

latency: the times of a job's phases, from the coordinator's reply to the program's first instruction, and
from its last instruction to the accepted result. throughput: empty jobs in several slots. sandbox: the cost
of starting a program in the sandbox. preload: the time saved by importing a task's modules ahead. The program
is a few lines of C that print the boot-time clock, which the mock coordinator also uses.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from aitbc_miner.util import clock
from tools.benchmark.preload import saved
from tools.benchmark.sandbox import cost
from tools.lib.compiler import c_compiler
from tools.lib.local_node import LocalNode
from tools.mock.bootstrap.coordinator import MockCoordinator
from tools.mock.bootstrap.records import FINAL, Job

STAMP_C = r"""
#include <stdio.h>
#include <time.h>
static void stamp(void) {
    struct timespec t;
    clock_gettime(CLOCK_BOOTTIME, &t);
    printf("%lld.%09ld\n", (long long)t.tv_sec, t.tv_nsec);
    fflush(stdout);
}
int main(void) { stamp(); stamp(); return 0; }
"""
NOOP = "noop"


def main() -> int:
    """Run one benchmark and print its figures."""
    parser = argparse.ArgumentParser(prog="tools/bench", description=__doc__)
    parser.add_argument(
        "what", choices=["latency", "throughput", "sandbox", "preload", "all"], nargs="?", default="all"
    )
    parser.add_argument("--jobs", type=int, help="number of jobs (100; 500 for throughput, 20 for preload)")
    parser.add_argument("--slots", type=int, default=4, help="number of slots for throughput (4)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="aitbc-bench-") as folder:
        program = build(Path(folder))
        if arguments.what in {"latency", "all"}:
            latency(program, arguments.jobs or 100)
        if arguments.what in {"throughput", "all"}:
            throughput(program, arguments.jobs or 500, arguments.slots)
        if arguments.what in {"sandbox", "all"}:
            cost(arguments.jobs or 100)
        if arguments.what in {"preload", "all"}:
            saved(arguments.jobs or 20)
    return 0


def build(folder: Path) -> Path:
    """Compile the program that prints its times."""
    folder.chmod(0o755)
    program = folder / NOOP
    subprocess.run(
        [*c_compiler(), "-O2", "-x", "c", "-", "-o", str(program)], input=STAMP_C.encode(), check=True
    )
    program.chmod(0o755)
    return program


def node_for(coordinator: MockCoordinator, program: Path, slots: int) -> LocalNode:
    """Make a node whose allowlist has only this program."""
    specs = [{"name": f"cpu{i}", "kind": "cpu", "memory_max": "256M", "pids_max": 64} for i in range(slots)]
    node = LocalNode(coordinator.url, specs, coordinator={"poll_interval_s": 0.05})
    (node.directory / "allowlist.d" / "noop.yaml").write_text(f"command: {{path: {program}}}\n")
    return node


def latency(program: Path, jobs: int) -> None:
    """Run jobs one at a time and print the times of their phases."""
    alone = [plain(program) for _ in range(jobs)]
    parts: dict[str, list[float]] = {"reply to first instruction": [], "last instruction to accepted": []}
    with MockCoordinator() as coordinator, node_for(coordinator, program, 1):
        for _ in range(jobs):
            job = run_one(coordinator)
            first, last = printed(job)
            parts["reply to first instruction"].append(first - job.handed[0].at)
            parts["last instruction to accepted"].append((job.finished_at or 0.0) - last)
    base = statistics.median(alone)
    print(f"latency, {jobs} jobs one at a time, milliseconds")
    row("fork+exec to first instruction, alone", alone, base)
    for name, values in parts.items():
        row(name, values, base)


def plain(program: Path) -> float:
    """Start the program without a node; give the seconds to its first instruction."""
    began = clock.now()
    out = subprocess.run([program], stdout=subprocess.PIPE, check=True).stdout
    return float(out.split()[0]) - began


def run_one(coordinator: MockCoordinator) -> Job:
    """Submit a job and wait until the coordinator accepted its result."""
    job_id = coordinator.submit({"runner": "cli", "command": NOOP})
    coordinator.wait(lambda ledger: ledger.job(job_id).state in FINAL, 30.0)
    job = coordinator.job(job_id)
    if job.state != "done":
        raise RuntimeError(f"cannot measure: {job_id} ended as {job.state} {job.error_code}")
    return job


def printed(job: Job) -> tuple[float, float]:
    """Read the two times that the program printed into its log."""
    log = next(it for it in job.accepted.artifacts if it.path == "logs/exec.log") if job.accepted else None
    first, last = (log.file.read_text() if log else "").split()
    return float(first), float(last)


def throughput(program: Path, jobs: int, slots: int) -> None:
    """Run many empty jobs at once, with a node and without a node."""
    bare = timed(lambda: run_bare(program, jobs, slots))
    with MockCoordinator() as coordinator, node_for(coordinator, program, slots):
        ids = [coordinator.submit({"runner": "cli", "command": NOOP}) for _ in range(jobs)]
        took = timed(
            lambda: coordinator.wait(lambda ledger: all(ledger.job(i).state in FINAL for i in ids), 600.0)
        )
        done = [coordinator.job(job_id) for job_id in ids]
    once = sum(len([r for r in job.reports if r.verdict == "accepted"]) == 1 for job in done)
    again = sum(len(job.reports) - 1 for job in done)
    print(f"\nthroughput, {jobs} no-op jobs, {slots} slots")
    print(f"  with the node    {took:8.2f} s  {jobs / took:8.1f} jobs/s")
    print(f"  xargs -P{slots} alone {bare:8.2f} s  {jobs / bare:8.1f} jobs/s   ratio {took / bare:.1f}")
    print(f"  accepted exactly once: {once} of {jobs}; reports sent again: {again}")


def run_bare(program: Path, jobs: int, slots: int) -> None:
    """Run the program as often and as parallel, without a node."""
    numbers = "\n".join(map(str, range(jobs))).encode()
    command = ["xargs", f"-P{slots}", "-n1", str(program)]
    subprocess.run(command, input=numbers, stdout=subprocess.DEVNULL, check=True)


def timed(call: Callable[[], object]) -> float:
    """Give the seconds of a call."""
    began = clock.now()
    call()
    return clock.now() - began


def row(name: str, seconds: Sequence[float], base: float) -> None:
    """Print the median and the 95th percentile in milliseconds, and the ratio of medians to `base`."""
    median = statistics.median(seconds)
    p95 = statistics.quantiles(seconds, n=20)[-1]
    print(f"  {name:<40} median {median * 1000:7.2f}  p95 {p95 * 1000:7.2f}  ratio {median / base:6.1f}")


if __name__ == "__main__":
    sys.exit(main())
