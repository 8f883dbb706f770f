"""A node whose jobs fill their disk to the last byte: nothing is lost, and it says what it is short of."""

import contextlib
import os
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from aitbc_miner.store import reserve
from aitbc_miner.util import clock
from tests.node.conftest import NodeFactory
from tests.node.harness import (
    WAIT_S,
    Node,
    assert_once,
    noop,
    states,
    submit,
    until,
    wait_final,
    wait_settled,
)
from tools.lib.local_node import wait_until
from tools.mock.bootstrap.coordinator import MockCoordinator
from tools.mock.bootstrap.records import State

pytestmark = pytest.mark.xfail(os.geteuid() != 0, reason="only root can mount", strict=True)

DISK_MIB, RESERVE_MIB, MIN_FREE_MIB = 24, 2, 4
SLOTS = 8
E_DISK_S, NORMAL_S = 20.0, 30.0
SHORT = "(workspace.min_free_mb, 1/16 more,"


@pytest.fixture
def node(min_free: int, node_factory: NodeFactory) -> Iterator[Node]:
    """Give a node that runs with its jobs on a small disk of their own."""
    node = node_factory(SLOTS, workspace={"min_free_mb": min_free, "reserve_mb": RESERVE_MIB})
    node.jobs.mkdir()
    options = f"size={DISK_MIB}m,mode=755"
    subprocess.run(["/usr/bin/mount", "-t", "tmpfs", "-o", options, "tmpfs", str(node.jobs)], check=True)
    try:
        node.start()
        wait_until(lambda: not reserve.lacking(node.jobs, RESERVE_MIB).files, WAIT_S)
        yield node
    finally:
        node.clean_up()
        subprocess.run(["/usr/bin/umount", str(node.jobs)], check=True)


@contextlib.contextmanager
def mounted(path: Path, *options: str) -> Iterator[None]:
    subprocess.run(["/usr/bin/mount", *options, str(path)], check=True)
    try:
        yield
    finally:
        subprocess.run(["/usr/bin/umount", "-l", str(path)], check=True)


def test_a_disk_without_a_free_inode_loses_nothing(
    coordinator: MockCoordinator, node_factory: NodeFactory
) -> None:
    node = node_factory(3, workspace={"min_free_inodes": 60, "reserve_mb": 2})
    node.jobs.mkdir()
    with mounted(node.jobs, "-t", "tmpfs", "-o", "size=24m,nr_inodes=400,mode=755", "tmpfs"):
        try:
            node.start()
            wait_until(lambda: not reserve.lacking(node.jobs, 1).files, WAIT_S)
            begin, go, freed = (node.marks / name for name in ("begin", "go", "freed"))
            # It takes each inode that comes free until it is told to give them back.
            eat = f"n=0; until [ -e {freed} ]; do : > f$n && n=$((n+1)) || sleep 0.02; done 2> /dev/null"
            coordinator.submit(node.script("hog", f"{until(begin)}; {eat}; rm -f f*"))
            works = "echo x > ../output/x"
            for name in ("one", "two"):
                coordinator.submit(node.script(name, f"{works}; {until(go)}", artifacts=[{"path": "x"}]))
            for name in ("hog", "one", "two"):
                node.running(name)
            begin.touch()
            wait_until(lambda: os.statvfs(node.jobs).f_favail == 0, WAIT_S)
            wait_until(lambda: not node.now().accepting, WAIT_S)
            [problem] = [each.what for each in node.now().problems if "inodes" in each.what]
            assert "; the node pulls no jobs below " in problem
            assert " (workspace.min_free_inodes, 1/16 more," in problem
            late = coordinator.submit(node.script("late", ":"))
            go.touch()
            # What they have finished is kept, and delivered, while there is no inode to be had.
            assert {job.state for job in wait_final(coordinator, ["one", "two"])} == {State.DONE}
            assert states(coordinator, [late]) == {State.QUEUED}
            freed.touch()
            wait_final(coordinator, ["hog", late])
            assert coordinator.job("late").state == State.DONE
            wait_until(lambda: node.now().accepting, WAIT_S)
            wait_settled(node)
            assert_once(coordinator, ["hog", "one", "two", late])
        finally:
            node.clean_up()


def test_a_disk_that_is_not_mounted_takes_no_jobs(
    coordinator: MockCoordinator, node_factory: NodeFactory, tmp_path: Path
) -> None:
    node = node_factory(1)
    node.jobs.mkdir()
    disk = tmp_path / "disk"
    disk.mkdir()
    disk.chmod(0o755)

    def away() -> bool:
        now = node.now()
        return not now.accepting and any(
            "mount the disk of the workspace" in each.what for each in now.problems
        )

    try:
        with mounted(node.jobs, "--bind", str(disk)):
            node.start()
            coordinator.submit(node.script("before", ":"))
            wait_final(coordinator, ["before"])
            wait_settled(node)
        # Gone under the node that runs.
        wait_until(away, WAIT_S)
        late = coordinator.submit(node.script("late", ":"))
        node.stop()
        node.start()
        # And not there at its start.
        wait_until(away, WAIT_S)
        assert [str(path) for path in node.jobs.rglob("*") if path.is_dir()] == []
        assert states(coordinator, [late]) == {State.QUEUED}
        with mounted(node.jobs, "--bind", str(disk)):
            wait_final(coordinator, [late])
            wait_until(lambda: node.now().accepting, WAIT_S)
            wait_settled(node)
            assert [len(node.runs(name)) for name in ("before", "late")] == [1, 1]
            node.stop()
    finally:
        node.clean_up()


def free_bytes(node: Node) -> int:
    """Give what jobs can still write."""
    disk = os.statvfs(node.jobs)
    return disk.f_bavail * disk.f_frsize


class Slow(BaseHTTPRequestHandler):
    """An input of which the larger part comes when `more` is set."""

    more: threading.Event

    def do_GET(self) -> None:
        size = 1 << 20
        self.send_response(200)
        self.send_header("Content-Length", str(size))
        self.end_headers()
        self.wfile.write(bytes(10))
        self.more.wait(WAIT_S)
        with contextlib.suppress(ConnectionError):  # it is not wanted any more
            self.wfile.write(bytes(size - 10))

    def log_message(self, *_: object) -> None:
        """Keep quiet."""


@pytest.fixture
def slow_input() -> Iterator[tuple[str, threading.Event]]:
    """Give the address of an input, and what brings the rest of it."""
    more = threading.Event()
    with ThreadingHTTPServer(("127.0.0.1", 0), type("OneSlow", (Slow,), {"more": more})) as server:
        serving = threading.Thread(target=server.serve_forever)
        serving.start()
        yield f"http://127.0.0.1:{server.server_port}/data", more
        more.set()
        server.shutdown()
        serving.join()


def says_short(node: Node) -> bool:
    """Whether the node complains of too little space."""
    return any(SHORT in problem.what for problem in node.now().problems)


@pytest.mark.parametrize("min_free", [MIN_FREE_MIB, 0], ids=["pulling stops", "pulling goes on"])
def test_a_disk_with_no_byte_free_loses_nothing(
    coordinator: MockCoordinator, node: Node, min_free: int, slow_input: tuple[str, threading.Event]
) -> None:
    begun, filled, freed = (node.marks / name for name in ("begun", "filled", "freed"))
    wait = until(filled)
    hogs = ["hog-0", "hog-1"]
    # Each goes on taking whatever comes free until it is told to give it back.
    eat = f"until [ -e {freed} ]; do cat /dev/zero >> hog; sleep 0.02; done 2> /dev/null; rm hog"
    failing = {
        "writes": f"{wait}; head -c 1M /dev/zero > ../output/data",
        "prints": f"{wait}; until [ -e {freed} ]; do echo 0123456789; done",
        "copies": f"{wait}; cp /usr/bin/bash .",
    }
    for name in hogs:
        coordinator.submit(node.script(name, f"{until(begun)}; {eat}"))
    for name, then in failing.items():
        coordinator.submit(node.script(name, then))
    coordinator.submit(node.script("nothing", wait))
    early = [*hogs, *failing, "nothing"]
    for name in early:
        node.running(name)
    # Accepted, and in the middle of its input.
    url, more = slow_input
    early.append(coordinator.submit(noop(job_id="fetches", input={"urls": [url]})))
    wait_until(lambda: list((node.jobs / "fetches").glob("input/.*.part")), WAIT_S)
    begun.touch()
    wait_until(lambda: free_bytes(node) == 0, WAIT_S)
    if min_free:
        wait_until(lambda: says_short(node), WAIT_S)
    late = [*submit(coordinator, 39), *(coordinator.submit(node.script(f"late-{n}", ":")) for n in range(4))]
    filled.touch()
    more.set()
    full_at = clock.now()

    for job in wait_final(coordinator, [*failing, "fetches"]):
        assert job.error_code == "E_DISK", (job.job_id, job.reports)
        assert job.reports[0].at - full_at < E_DISK_S
    assert wait_final(coordinator, ["nothing"])[0].state == State.DONE
    if min_free:
        assert states(coordinator, late) == {State.QUEUED}
    else:
        # What cannot be recorded is not acknowledged either.
        wait_until(lambda: "cannot admit job" in node.log.read_text(), WAIT_S)
    wait_until(lambda: free_bytes(node) == 0, WAIT_S)

    freed.touch()
    freed_at = clock.now()
    new = coordinator.submit(noop(priority=1))
    assert wait_final(coordinator, [new])[0].state == State.DONE
    assert clock.now() - freed_at < NORMAL_S
    wait_final(coordinator, [*early, *late])
    wait_until(lambda: not reserve.lacking(node.jobs, RESERVE_MIB).files, NORMAL_S)
    wait_until(lambda: not says_short(node), NORMAL_S)
    wait_settled(node)
    assert_once(coordinator, [*early, *late, new])
    assert len(early + late) == 50


@pytest.mark.parametrize("min_free", [DISK_MIB // 2])
def test_the_oldest_that_are_delivered_make_room_for_more(
    coordinator: MockCoordinator, node: Node, min_free: int
) -> None:
    names = [f"large-{number}" for number in range(6)]
    for name in names:
        coordinator.submit(node.script(name, "head -c 3M /dev/zero > ../output/data"))
        assert wait_final(coordinator, [name])[0].state == State.DONE
        wait_settled(node)
    wait_until(lambda: free_bytes(node) >> 20 >= min_free, WAIT_S)
    there = [name for name in names if (node.jobs / name).exists()]
    assert there == names[-len(there) :]
    assert 0 < len(there) < len(names)
    wait_until(lambda: not list(node.jobs.glob("+old-*")), WAIT_S)
    # They are known all the same, and never run again.
    assert_once(coordinator, names)
    assert [len(node.runs(name)) for name in names] == [1] * len(names)
