"""Jobs that take more of the disk than they may, jobs beside them, and jobs that cannot be ended."""

import os
import subprocess
from collections.abc import Iterator

import msgspec
import pytest

from aitbc_miner.jobs import Outcome
from aitbc_miner.sandbox.spawn import Job
from tests.node.bench import Bench
from tests.node.conftest import NodeFactory
from tests.node.harness import Node, assert_once, until, wait_final, wait_settled
from tools.mock.bootstrap.coordinator import MockCoordinator
from tools.mock.bootstrap.records import State

MIB = 1 << 20
DISK_MIB, MOST_MIB, MOST_FILES = 64, 12, 300


@pytest.fixture
def node(node_factory: NodeFactory) -> Iterator[Node]:
    """Give a node whose jobs may have so much each, on a small disk of their own where we may mount one."""
    limits = {"max_job_mb": MOST_MIB, "max_job_files": MOST_FILES, "min_free_mb": 0, "reserve_mb": 1}
    node = node_factory(5, workspace=limits)
    node.jobs.mkdir()
    mounted = os.geteuid() == 0
    if mounted:
        options = f"size={DISK_MIB}m,mode=755"
        command = ["/usr/bin/mount", "-t", "tmpfs", "-o", options, "tmpfs", str(node.jobs)]
        subprocess.run(command, check=True)
    try:
        node.start()
        yield node
    finally:
        node.clean_up()
        if mounted:
            subprocess.run(["/usr/bin/umount", str(node.jobs)], check=True)


def test_a_job_that_takes_too_much_is_ended_and_its_neighbours_are_not(
    coordinator: MockCoordinator, node: Node
) -> None:
    ended = node.marks / "ended"
    wait = until(ended)
    # Neither heeds a request to end; and one writes so slowly that its disk is not full before it is seen.
    deaf = "trap '' TERM INT HUP"
    jobs = {
        "bytes": f"{deaf}; while :; do head -c 256K /dev/zero >> ../tmp/hog; sleep 0.05; done",
        "files": f"{deaf}; n=0; while :; do n=$((n + 1)); mkdir d$n; sleep 0.005; done",
        "deep": f"{deaf}; for n in $(seq 150); do mkdir d; cd d; done; {wait}",
        "sparse": f"truncate -s 900M ../tmp/sparse; {wait}; echo done > ../output/said",
        "neighbour": f"head -c 4M /dev/zero > ../output/data; {wait}; head -c 4M /dev/zero >> ../output/data",
    }
    for name, script in jobs.items():
        coordinator.submit(node.script(name, script))
    hogs = {
        "bytes": f"the job was ended: it had more than {MOST_MIB} MiB on disk (workspace.max_job_mb)",
        "files": f"the job was ended: it had more than {MOST_FILES} files and directories"
        " (workspace.max_job_files)",
        "deep": "the job was ended: it had directories more than 100 deep",
    }
    for job in wait_final(coordinator, hogs):
        assert job.error_code == "E_OUTPUT", job.reports
        text = (node.jobs / job.job_id / "outcome.json").read_bytes()
        outcome = msgspec.json.decode(text, type=Outcome)
        assert (outcome.message, outcome.exit.killed_for) == (hogs[job.job_id], "output")
    ended.touch()
    for job in wait_final(coordinator, ["sparse", "neighbour"]):
        assert job.state == State.DONE, job.reports
    wait_settled(node)
    assert_once(coordinator, jobs)


def test_of_a_job_that_may_still_write_nothing_is_taken(bench: Bench) -> None:
    bench.start(lambda patch: patch.setattr(Job, "kill_all", lambda _job, _timeout_s: False))
    directory = bench.submit("j1", "sleep 600 & echo $! > ../output/pid")
    ended = bench.run("j1")
    pid = int((directory / "output/pid").read_text())
    os.kill(pid, 9)
    outcome = bench.outcome("j1")
    assert isinstance(outcome, Outcome)
    assert (ended.code, ended.clean, outcome.artifacts) == ("E_ARTIFACT", False, [])
    assert outcome.message.startswith("cannot collect the output: the process ")
    assert "could not be killed within 1 s" in outcome.message
    assert list((directory / "artifacts").iterdir()) == []
    # Still the job's own: nobody else was made its owner.
    assert (directory / "output/pid").stat().st_nlink == 1
