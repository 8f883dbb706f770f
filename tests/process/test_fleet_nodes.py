"""Two nodes that share a real Redis: killed, cut off, without it; each job ends in one report, from one of them."""

import contextlib
import json
import select
import socket
import socketserver
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import NodeFactory
from harness import WAIT_S, Node, assert_once, noop, wait_final, wait_settled

from aitbc_miner.errors import ErrorCode
from aitbc_miner.jobs import State, StateRecord
from aitbc_miner.records import Records
from redis_server import RedisServer, redis_server
from tools import mock_records
from tools.local_node import wait_until
from tools.mock_coordinator import MockCoordinator

LEASE_S = 2
POLICY = {"max_attempts": 3}
SMALL = [{"name": "cpu0", "kind": "cpu", "memory_max": "64M"}]
LARGE = [{"name": "cpu0", "kind": "cpu", "memory_max": "512M"}]


class Link(socketserver.ThreadingTCPServer):
    """A node's own way to the Redis server, a port on loopback, which can be cut.

    `silent`: what is sent is swallowed, as by a network that is gone. Otherwise connections are hung up.
    """

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, server: RedisServer) -> None:
        super().__init__(("127.0.0.1", 0), _Conversation)
        self.target = server.socket
        self.url = f"redis://127.0.0.1:{self.server_address[1]}/0"
        self.silent = False
        self.hung_up = False
        self.near: set[socket.socket] = set()
        self._thread = threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()

    def cut(self, *, silent: bool) -> None:
        """Let nothing through any more."""
        self.silent, self.hung_up = silent, not silent
        if not silent:
            self._hang_up()

    def restore(self) -> None:
        """Let everything through again; a conversation that was cut off is not taken up."""
        self.silent = self.hung_up = False
        self._hang_up()

    def close(self) -> None:
        """Listen no more."""
        self.cut(silent=False)
        self.shutdown()
        self._thread.join()
        self.server_close()

    def _hang_up(self) -> None:
        for near in list(self.near):
            # It may just have ended by itself.
            with contextlib.suppress(OSError):
                near.shutdown(socket.SHUT_RDWR)


class _Conversation(socketserver.BaseRequestHandler):
    server: Link

    def handle(self) -> None:
        near: socket.socket = self.request
        self.server.near.add(near)
        # The server, or the node, may be killed at any moment.
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as far:
            if not self.server.hung_up:
                far.connect(str(self.server.target))
                self._pass_on(near, far)
        self.server.near.discard(near)

    def _pass_on(self, near: socket.socket, far: socket.socket) -> None:
        other = {near: far, far: near}
        while True:
            for end in select.select([near, far], [], [])[0]:
                if not (data := end.recv(65536)):
                    return
                if not self.server.silent:
                    other[end].sendall(data)


class Fleet:
    """A Redis server, and a maker of nodes that share it; `links` are their ways to it, by node id."""

    def __init__(self, redis: RedisServer, make: NodeFactory) -> None:
        self.redis = redis
        self.links: dict[str, Link] = {}
        self._make = make

    def node(
        self, slots: int | list[dict[str, Any]] = 1, *, lease_s: float = LEASE_S, **changes: Any
    ) -> Node:
        """Make a node that is not started yet."""
        link = Link(self.redis)
        node = self._make(slots, queue={"backend": "redis", "url": link.url, "lease_s": lease_s}, **changes)
        self.links[node.node_id] = link
        return node

    def tasks(self) -> list[bytes]:
        """Name what is in the shared queue."""
        with self.redis.client() as client:
            return sorted(client.scan_iter("*:task:*"))


@pytest.fixture
def fleet(tmp_path: Path, node_factory: NodeFactory) -> Iterator[Fleet]:
    """Give a fleet without nodes."""
    with redis_server(tmp_path) as redis:
        made = Fleet(redis, node_factory)
        yield made
        for link in made.links.values():
            link.close()


def job(node: Node, job_id: str, **more: Any) -> dict[str, Any]:
    """Make a job that says on which node it runs, and ends when it is let go there."""
    line = (
        f'at=${{PWD%/jobs/*}}; echo "${{at##*/}}" > {node.marks}/{job_id}@$$; '
        f'until [ -e "{node.marks}/go-${{at##*/}}" ]; do sleep 0.05; done'
    )
    return node.script(job_id, line, **more)


def let_go(marks: Node, on: Node) -> None:
    """End the jobs that run on a node, now and later."""
    (marks.marks / f"go-{on.node_id}").touch()


def ran_on(marks: Node, job_id: str) -> list[str]:
    """Name the node of each run of a job."""
    texts = [path.read_text().strip() for path in marks.marks.glob(f"{job_id}@*")]
    return sorted(text for text in texts if text)


def wait_run(marks: Node, job_id: str, on: Node) -> None:
    """Wait until a job runs on a node."""
    wait_until(lambda: on.node_id in ran_on(marks, job_id), WAIT_S)


def record(node: Node, job_id: str) -> StateRecord:
    """Read a job's state.json."""
    with Records(node.jobs).open(job_id) as found:
        return found.state()


def wait_ended(node: Node, job_id: str, delivery: str) -> None:
    """Wait until a node has done with a job, and see that this is what it says of the report."""
    wait_until(lambda: record(node, job_id).state is State.FAILED, WAIT_S)
    assert record(node, job_id).delivery == delivery


def logged(node: Node, event: str) -> list[dict[str, Any]]:
    """Give the log's lines of one kind."""
    lines = [json.loads(line) for line in node.log.read_text().splitlines() if line.startswith("{")]
    return [line for line in lines if line["event"] == event]


def reporters(coordinator: MockCoordinator, job_id: str) -> set[str]:
    """Name the nodes that have reported a job, whatever became of it."""
    return {report.node for report in coordinator.job(job_id).reports}


def wait_done_by(coordinator: MockCoordinator, job_id: str, node: Node) -> None:
    """Wait until a job is done, reported once, by this node alone."""
    (found,) = wait_final(coordinator, [job_id])
    assert found.state is mock_records.State.DONE, found
    assert reporters(coordinator, job_id) == {node.node_id}
    assert_once(coordinator, [job_id])


# --- nodes that die ----------------------------------------------------------------------------------------


def test_the_job_of_a_dead_node_is_run_by_another(coordinator: MockCoordinator, fleet: Fleet) -> None:
    a, b = fleet.node().start(), fleet.node()
    coordinator.submit(job(a, "j", retry=POLICY))
    wait_run(a, "j", a)
    b.start()
    # Not before the lease is over, however free it is: it has looked often by then.
    wait_until(lambda: (lease := record(a, "j").lease) and lease, WAIT_S)
    assert ran_on(a, "j") == [a.node_id]
    a.clean_up()
    let_go(a, b)
    wait_done_by(coordinator, "j", b)
    assert ran_on(a, "j") == sorted([a.node_id, b.node_id])
    assert record(b, "j").origin == a.node_id
    assert record(b, "j").attempt == 2
    assert [handout.node for handout in coordinator.job("j").handed] == [a.node_id, b.node_id]
    wait_until(lambda: fleet.tasks() == [], WAIT_S)
    a.start()
    wait_ended(a, "j", "lost")
    wait_settled(a)
    # It is at work again, and has said and run nothing more of that one.
    let_go(a, a)
    after = coordinator.submit(job(a, "after", retry=POLICY))
    wait_final(coordinator, [after])
    wait_done_by(coordinator, "j", b)
    assert len(a.runs("j")) == 2


def test_a_dead_node_that_comes_back_without_redis_waits_for_its_word(
    coordinator: MockCoordinator, fleet: Fleet
) -> None:
    a, b = fleet.node().start(), fleet.node()
    coordinator.submit(job(a, "j", retry=POLICY))
    wait_run(a, "j", a)
    a.clean_up()
    let_go(a, b)
    b.start()
    wait_done_by(coordinator, "j", b)
    link = fleet.links[a.node_id]
    link.cut(silent=False)
    a.start()
    # What it holds on disk is a job that it may run again, if only it were still its own.
    wait_until(lambda: logged(a, "cannot take job in"), WAIT_S)
    assert len(a.runs("j")) == 2
    # Jobs that are not shared go on meanwhile.
    plain = [coordinator.submit(noop()) for _ in range(3)]
    wait_final(coordinator, plain)
    link.restore()
    wait_ended(a, "j", "lost")
    assert len(a.runs("j")) == 2
    wait_done_by(coordinator, "j", b)


def test_a_job_that_had_not_begun_and_was_done_elsewhere_is_not_begun(
    coordinator: MockCoordinator, fleet: Fleet
) -> None:
    """It was held before it started; the entry is gone by the time its first holder is back."""
    a, b = fleet.node(), fleet.node()
    # One that takes the job in, and cannot get on with it: its input never comes.
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        url = f"http://127.0.0.1:{nobody.getsockname()[1]}/input"
        coordinator.submit(job(a, "j", retry=POLICY, input={"urls": [url]}))
        a.start()
        wait_until(lambda: fleet.tasks(), WAIT_S)
        a.clean_up()
    let_go(a, b)
    let_go(a, a)
    with _file_server(url):
        b.start()
        wait_done_by(coordinator, "j", b)
        wait_until(lambda: fleet.tasks() == [], WAIT_S)
        a.start()
        wait_ended(a, "j", "lost")
    assert ran_on(a, "j") == [b.node_id]
    assert fleet.tasks() == []


@contextlib.contextmanager
def _file_server(url: str) -> Iterator[None]:
    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            self.rfile.readline()
            self.wfile.write(b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nok")

    class Server(socketserver.ThreadingTCPServer):
        allow_reuse_address = True
        daemon_threads = True

    port = int(url.rpartition(":")[2].partition("/")[0])
    with Server(("127.0.0.1", port), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        yield
        server.shutdown()
        thread.join()


# --- Redis that dies ---------------------------------------------------------------------------------------


def test_leases_outlive_a_crash_of_redis(coordinator: MockCoordinator, fleet: Fleet) -> None:
    a, b = fleet.node(2).start(), fleet.node(2)
    coordinator.submit(job(a, "left", retry=POLICY))
    wait_run(a, "left", a)
    b.start()
    coordinator.submit(job(a, "kept", retry=POLICY))
    wait_until(lambda: ran_on(a, "kept"), WAIT_S)
    holder = a if ran_on(a, "kept") == [a.node_id] else b
    fleet.redis.kill()
    fleet.redis.start()
    # Renewed since then, or it would be over by the time of a second crash.
    wait_until(lambda: all(lease_left(fleet, job_id) > 0.75 * LEASE_S for job_id in ("left", "kept")), WAIT_S)
    fleet.redis.kill()
    fleet.redis.start()
    a.clean_up()
    let_go(a, b)
    wait_done_by(coordinator, "left", b)
    wait_done_by(coordinator, "kept", b)
    assert ran_on(a, "left") == sorted([a.node_id, b.node_id])
    assert ran_on(a, "kept") == sorted({holder.node_id, b.node_id})
    wait_until(lambda: fleet.tasks() == [], WAIT_S)


def lease_left(fleet: Fleet, job_id: str) -> float:
    """Give how many seconds are left of a lease, on the server's clock."""
    with fleet.redis.client() as client:
        (key,) = client.scan_iter("*:due:run")
        seconds, micros = client.time()
        at = client.zscore(key, f"run:{job_id}")
    assert at is not None
    return float(at - seconds - micros / 1e6)
