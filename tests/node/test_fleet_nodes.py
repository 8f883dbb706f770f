"""Two nodes that share a real Redis: killed, cut off, without it; each job ends in one report of one node."""

import contextlib
import json
import select
import socket
import socketserver
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from aitbc_miner.jobs import State, StateRecord
from aitbc_miner.store.records import Records
from aitbc_miner.util.clock import now
from tests.node.conftest import NodeFactory
from tests.node.harness import WAIT_S, Node, assert_once, noop, wait_final, wait_settled
from tests.support.redis_server import RedisServer, redis_server
from tools.lib.local_node import wait_until
from tools.mock.bootstrap import records as mock_records
from tools.mock.bootstrap.coordinator import MockCoordinator

pytestmark = pytest.mark.needs("redis-server")
LEASE_S = 2
POLICY = {"max_attempts": 3}
SMALL = [{"name": "cpu0", "kind": "cpu", "memory_max": "64M"}]
LARGE = [{"name": "cpu0", "kind": "cpu", "memory_max": "512M"}]
# A node that waits a second, not a quarter of an hour, for another one.
HASTY = (
    "import sys; from aitbc_miner import main; from aitbc_miner.agent import fleet; fleet.GIVE_UP_S = 1.0; "
    "sys.exit(main.start())"
)


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
    """A Redis server, and a maker of nodes that share it; `links` are their ways to it, by node id.

    `marks` is where jobs say that they run, on whatever node: of none, or they would end with that one.
    """

    def __init__(self, redis: RedisServer, marks: Path, make: NodeFactory) -> None:
        self.redis = redis
        self.marks = marks
        self.links: dict[str, Link] = {}
        self._make = make

    def node(
        self, slots: int | list[dict[str, Any]] = 1, *, lease_s: float = LEASE_S, **changes: Any
    ) -> Node:
        """Make a node that is not started yet."""
        link = Link(self.redis)
        node = self._make(slots, queue={"backend": "redis", "url": link.url, "lease_s": lease_s}, **changes)
        node.marks = self.marks
        self.links[node.node_id] = link
        return node

    def let_go(self, node: Node) -> None:
        """End the jobs that run on a node, now and later."""
        (self.marks / f"go-{node.node_id}").touch()

    def ran_on(self, job_id: str) -> list[str]:
        """Name the node of each run of a job."""
        texts = [path.read_text().strip() for path in self.marks.glob(f"{job_id}@*")]
        return sorted(text for text in texts if text)

    def wait_run(self, job_id: str, node: Node) -> None:
        """Wait until a job runs on a node."""
        wait_until(lambda: node.node_id in self.ran_on(job_id), WAIT_S)

    def tasks(self) -> list[bytes]:
        """Name what is in the shared queue."""
        with self.redis.client() as client:
            return sorted(client.scan_iter("*:task:*"))


@pytest.fixture
def fleet(tmp_path: Path, node_factory: NodeFactory) -> Iterator[Fleet]:
    """Give a fleet without nodes."""
    # The jobs' users cannot pass through pytest's own directory.
    with redis_server(tmp_path) as redis, tempfile.TemporaryDirectory(prefix="aitbc-marks-") as marks:
        Path(marks).chmod(0o777)
        made = Fleet(redis, Path(marks), node_factory)
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


def record(node: Node, job_id: str) -> StateRecord:
    """Read a job's state.json."""
    with Records(node.jobs).open(job_id) as found:
        return found.state()


def outlive_a_lease() -> None:
    """Wait until a lease that was taken or renewed before now, and not since, is over."""
    over = now() + 1.2 * LEASE_S
    wait_until(lambda: now() > over, WAIT_S)


def wait_ended(node: Node, job_id: str, delivery: str) -> None:
    """Wait until a node has done with a job, and see that this is what it says of the report."""
    records = Records(node.jobs)
    wait_until(lambda: records.known(job_id) and record(node, job_id).state is State.FAILED, WAIT_S)
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
    fleet.wait_run("j", a)
    b.start()
    # The other one is free and looks; but the lease is renewed as long as its holder lives.
    outlive_a_lease()
    assert fleet.ran_on("j") == [a.node_id]
    a.clean_up()
    fleet.let_go(b)
    wait_done_by(coordinator, "j", b)
    assert fleet.ran_on("j") == sorted([a.node_id, b.node_id])
    assert record(b, "j").origin == a.node_id
    assert record(b, "j").attempt == 2
    assert [handout.node for handout in coordinator.job("j").handed] == [a.node_id, b.node_id]
    wait_until(lambda: fleet.tasks() == [], WAIT_S)
    a.start()
    wait_ended(a, "j", "lost")
    wait_settled(a)
    # It is at work again, and has said and run nothing more of that one.
    fleet.let_go(a)
    after = coordinator.submit(job(a, "after", retry=POLICY))
    wait_final(coordinator, [after])
    wait_done_by(coordinator, "j", b)
    assert len(a.runs("j")) == 2


def test_a_dead_node_that_comes_back_without_redis_waits_for_its_word(
    coordinator: MockCoordinator, fleet: Fleet
) -> None:
    a, b = fleet.node().start(), fleet.node()
    coordinator.submit(job(a, "j", retry=POLICY))
    fleet.wait_run("j", a)
    a.clean_up()
    fleet.let_go(b)
    b.start()
    wait_done_by(coordinator, "j", b)
    link = fleet.links[a.node_id]
    link.cut(silent=False)
    a.start()
    # What it holds on disk is a job that it may run again, if only it were still its own.
    wait_until(lambda: logged(a, "cannot admit job"), WAIT_S)
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
        wait_until(fleet.tasks, WAIT_S)
        a.clean_up()
    fleet.let_go(b)
    fleet.let_go(a)
    with _file_server(url):
        b.start()
        wait_done_by(coordinator, "j", b)
        wait_until(lambda: fleet.tasks() == [], WAIT_S)
        a.start()
        wait_ended(a, "j", "lost")
    assert fleet.ran_on("j") == [b.node_id]
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
    # Long enough for a server to come back in time.
    a, b = fleet.node(2, lease_s=5).start(), fleet.node(2, lease_s=5)
    coordinator.submit(job(a, "left", retry=POLICY))
    fleet.wait_run("left", a)
    b.start()
    coordinator.submit(job(a, "kept", retry=POLICY))
    wait_until(lambda: fleet.ran_on("kept"), WAIT_S)
    holder = a if fleet.ran_on("kept") == [a.node_id] else b
    fleet.redis.kill()
    fleet.redis.start()
    # Renewed since then, or it would be over by the time of a second crash.
    wait_until(lambda: all(lease_left(fleet, job_id) > 3.5 for job_id in ("left", "kept")), WAIT_S)
    fleet.redis.kill()
    fleet.redis.start()
    a.clean_up()
    fleet.let_go(b)
    wait_done_by(coordinator, "left", b)
    wait_done_by(coordinator, "kept", b)
    assert fleet.ran_on("left") == sorted([a.node_id, b.node_id])
    assert fleet.ran_on("kept") == sorted({holder.node_id, b.node_id})
    wait_until(lambda: fleet.tasks() == [], WAIT_S)


def lease_left(fleet: Fleet, job_id: str) -> float:
    """Give how many seconds are left of a lease, on the server's clock."""
    with fleet.redis.client() as client:
        (key,) = client.scan_iter("*:due:run")
        seconds, micros = client.time()
        at = client.zscore(key, f"run:{job_id}")
    assert at is not None
    return float(at - seconds - micros / 1e6)


# --- nodes that are cut off --------------------------------------------------------------------------------


@pytest.mark.parametrize("silent", [False, True])
def test_a_node_that_is_cut_off_keeps_its_report_back(
    coordinator: MockCoordinator, fleet: Fleet, silent: bool
) -> None:
    a, b = fleet.node().start(), fleet.node()
    coordinator.submit(job(a, "j", retry=POLICY))
    fleet.wait_run("j", a)
    b.start()
    fleet.links[a.node_id].cut(silent=silent)
    fleet.wait_run("j", b)
    fleet.let_go(a)
    wait_until((a.jobs / "j" / "outcome.json").exists, WAIT_S)
    # It has tried, and nobody said whose the job is.
    wait_until(lambda: any(line["job_id"] == "j" for line in logged(a, "report not accepted")), WAIT_S)
    assert a.now().pending_reports == 1
    assert coordinator.job("j").reports == ()
    fleet.let_go(b)
    wait_done_by(coordinator, "j", b)
    fleet.links[a.node_id].restore()
    wait_ended(a, "j", "lost")
    wait_settled(a)
    wait_done_by(coordinator, "j", b)
    assert len(fleet.ran_on("j")) == 2
    assert fleet.tasks() == []


def test_a_node_that_is_back_ends_the_run_that_it_has_lost(
    coordinator: MockCoordinator, fleet: Fleet
) -> None:
    a, b = fleet.node().start(), fleet.node()
    coordinator.submit(job(a, "j", retry=POLICY))
    fleet.wait_run("j", a)
    b.start()
    link = fleet.links[a.node_id]
    link.cut(silent=False)
    fleet.wait_run("j", b)
    link.restore()
    # The program would go on for ever: nobody has let it go.
    wait_ended(a, "j", "lost")
    assert coordinator.job("j").reports == ()
    fleet.let_go(b)
    wait_done_by(coordinator, "j", b)
    assert len(fleet.ran_on("j")) == 2


# --- without Redis -----------------------------------------------------------------------------------------


def test_without_redis_a_node_goes_on_with_what_it_has(coordinator: MockCoordinator, fleet: Fleet) -> None:
    node = fleet.node(3, lease_s=600).start()
    coordinator.submit(job(node, "shared", retry=POLICY))
    coordinator.submit(job(node, "plain"))
    for job_id in ("shared", "plain"):
        fleet.wait_run(job_id, node)
    fleet.redis.kill()
    coordinator.submit(job(node, "unshared", retry=POLICY))
    fleet.wait_run("unshared", node)
    assert [line["job_id"] for line in logged(node, "job not shared with the fleet")] == ["unshared"]
    assert record(node, "unshared").lease is None
    wait_until(lambda: queue_problems(node), WAIT_S)
    assert node.now().coordinator.reachable
    fleet.let_go(node)
    jobs = ["shared", "plain", "unshared", *(coordinator.submit(noop()) for _ in range(5))]
    for found in wait_final(coordinator, jobs):
        wait_done_by(coordinator, found.job_id, node)
    wait_settled(node)
    # Whatever else goes well meanwhile.
    assert queue_problems(node)
    fleet.redis.start()
    wait_until(lambda: not queue_problems(node), WAIT_S)
    wait_until(lambda: fleet.tasks() == [], WAIT_S)
    assert [len(fleet.ran_on(job_id)) for job_id in ("shared", "plain", "unshared")] == [1, 1, 1]
    assert_once(coordinator, jobs)


def queue_problems(node: Node) -> list[str]:
    """Give what `status` says of the fleet's queue."""
    return [problem.what for problem in node.now().problems if "the queue at 127.0.0.1" in problem.what]


def test_a_report_waits_for_redis_when_the_lease_is_over(coordinator: MockCoordinator, fleet: Fleet) -> None:
    node = fleet.node().start()
    coordinator.submit(job(node, "j", retry=POLICY))
    fleet.wait_run("j", node)
    wait_until(lambda: lease_left(fleet, "j") > 0, WAIT_S)
    fleet.redis.kill()
    outlive_a_lease()
    fleet.let_go(node)
    wait_until(lambda: logged(node, "report not accepted"), WAIT_S)
    assert coordinator.job("j").reports == ()
    # It holds up no other job.
    plain = coordinator.submit(noop())
    wait_final(coordinator, [plain])
    fleet.redis.start()
    wait_done_by(coordinator, "j", node)
    assert fleet.ran_on("j") == [node.node_id]


# --- jobs for another node ---------------------------------------------------------------------------------


@pytest.fixture
def careless() -> Iterator[MockCoordinator]:
    """Give a coordinator that does not look whether a job fits."""
    with MockCoordinator(ignore_filters=True) as mock:
        yield mock


def test_what_does_not_fit_here_is_done_by_the_node_that_it_fits(
    careless: MockCoordinator, fleet: Fleet
) -> None:
    a = fleet.node(SMALL, base_url=careless.url).start()
    b = fleet.node(LARGE, base_url=careless.url)
    fleet.let_go(b)
    for job_id, more in (("big", {}), ("policy", {"retry": POLICY})):
        careless.submit(job(a, job_id, requirements={"memory_mb": 256}, **more))
        wait_ended(a, job_id, "handed_on")
    assert {report for job_id in ("big", "policy") for report in careless.job(job_id).reports} == set()
    b.start()
    for job_id in ("big", "policy"):
        wait_done_by(careless, job_id, b)
        assert fleet.ran_on(job_id) == [b.node_id]
    wait_until(lambda: fleet.tasks() == [], WAIT_S)
    # The first one knows that it has done with them, after a restart too.
    assert a.stop() == 0
    a.start()
    wait_final(careless, [careless.submit(noop())])
    for job_id in ("big", "policy"):
        assert record(a, job_id).delivery == "handed_on"
        wait_done_by(careless, job_id, b)


def test_what_no_node_can_do_is_reported_by_the_first(careless: MockCoordinator, fleet: Fleet) -> None:
    """The others look at it, but do not take what they cannot do."""
    a = fleet.node(SMALL, base_url=careless.url)
    a.program = ["-c", HASTY]
    b = fleet.node(LARGE, base_url=careless.url)
    careless.submit(job(a, "gpu", requirements={"gpu": True, "vram_mb": 1000}))
    a.start()
    wait_until(lambda: logged(a, "job left to the fleet"), WAIT_S)
    b.start()
    (found,) = wait_final(careless, ["gpu"])
    assert found.error_code == "E_NOGPU"
    assert reporters(careless, "gpu") == {a.node_id}
    assert_once(careless, ["gpu"])
    wait_until(lambda: record(a, "gpu").delivery == "accepted", WAIT_S)
    wait_until(lambda: fleet.tasks() == [], WAIT_S)
    assert fleet.ran_on("gpu") == []
    assert not Records(b.jobs).known("gpu")
