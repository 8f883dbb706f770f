"""The control socket: who may ask what, and clients that stall, babble or crowd."""

import contextlib
import grp
import os
import select
import shutil
import socket
import stat
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from aitbc_miner.control import server as control
from aitbc_miner.control.client import ask
from aitbc_miner.control.protocol import (
    MAX_REQUEST,
    READ_VERBS,
    WRITE_VERBS,
    Answer,
    Done,
    Files,
    FullAnswer,
    JobRow,
    Jobs,
    Later,
    Refusal,
    Request,
)
from aitbc_miner.control.server import MAX_CLIENTS, ControlServer, peer
from aitbc_miner.errors import EXIT_FAILURE, EXIT_NOT_PERMITTED
from aitbc_miner.ipc.channel import HEADER
from aitbc_miner.jobs import State
from aitbc_miner.util import clock

DEADLINE_S = 30.0
ROOT = os.geteuid() == 0
STRANGER = 61111  # belongs to nobody, by systemd's table of ids


class Node:
    """A server with an answer of the test's own, served as the supervisor does it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.asked: list[Request] = []
        self.reply: Callable[[Request], FullAnswer] = lambda request: (Done(f"did {request.verb}"), [])
        self.server = ControlServer(path, self._answer)
        self.later: Later | None = None
        self.waits = False

    def _answer(self, request: Request, later: Later) -> FullAnswer | None:
        self.asked.append(request)
        self.later = later
        return None if self.waits else self.reply(request)

    def turn(self, timeout_s: float = 0.0) -> int:
        """Serve what is ready, once; how many there were."""
        sources = self.server.sources()
        poller = select.poll()
        for fd, (_, wanted) in sources.items():
            poller.register(fd, wanted)
        ready = poller.poll(timeout_s * 1000)
        for fd, _ in ready:
            sources[fd][0]()
        return len(ready)

    def serve_until(self, done: Callable[[], bool]) -> None:
        deadline = clock.now() + DEADLINE_S
        while not done():
            assert clock.now() < deadline
            self.turn(0.01)

    def settle(self) -> None:
        """Serve until nothing is ready any more."""
        for _ in range(1000):
            if not self.turn():
                return
        raise AssertionError("the server is never at rest")

    @property
    def clients(self) -> int:
        return len(self.server._clients)


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    # The path of a socket is at most 107 bytes long, and pytest's directories are deep.
    short = Path(f"/tmp/aitbc-control-{os.getpid()}")
    made = Node(short / "control.sock")
    try:
        yield made
    finally:
        made.server.close()
        short.rmdir()


def connect(node: Node) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.settimeout(DEADLINE_S)
    sock.connect(os.fspath(node.path))
    return sock


def frame(message: object) -> bytes:
    body = message if isinstance(message, bytes) else msgspec.json.encode(message)
    return len(body).to_bytes(HEADER, "big") + body


def answer_to(node: Node, request: Request) -> tuple[Any, list[str]]:
    """Ask beside the server, as the command does; gives the answer, and what the files with it hold."""
    answers: list[tuple[Any, list[int]]] = []
    asking = threading.Thread(target=lambda: answers.append(ask(node.path, request, DEADLINE_S)))
    asking.start()
    node.serve_until(lambda: not asking.is_alive())
    asking.join()
    ((answer, fds),) = answers
    texts = [os.pread(fd, 1000, 0).decode() for fd in fds]
    for fd in fds:
        os.close(fd)
    return answer, texts


# --- asking and answering ----------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", sorted(READ_VERBS | WRITE_VERBS))
def test_a_permitted_request_is_answered(node: Node, verb: str) -> None:
    request = Request(verb, "j1", State.DONE)
    assert answer_to(node, request) == (Done(f"did {verb}"), [])
    assert node.asked == [request]
    node.settle()
    assert node.clients == 0


def test_an_unknown_verb_is_refused_with_those_that_there_are(node: Node) -> None:
    answer, _ = answer_to(node, Request("x" * 1000))
    assert isinstance(answer, Refusal)
    assert answer.exit_code == EXIT_FAILURE
    assert answer.message.endswith(
        "; use allow, cancel, drain, history, job, jobs, logs, reload, resume, retry, slots, status"
    )
    assert len(answer.message) < 200
    assert node.asked == []


def test_an_answer_may_come_later(node: Node) -> None:
    node.waits = True
    with connect(node) as client:
        client.sendall(frame(Request("reload")) + frame(Request("status")))
        node.serve_until(lambda: node.later is not None)
        node.turn()
        assert node.clients == 1
        assert node.later
        node.later(Done("at last"))
        node.serve_until(lambda: node.clients == 0)
        client.settimeout(DEADLINE_S)
        assert client.recv(4096)[HEADER:] == msgspec.json.encode(Done("at last"))
    # Only the first request of a connection counts, however long its answer takes.
    assert node.asked == [Request("reload")]


def test_whoever_does_not_wait_for_a_late_answer_misses_it(node: Node) -> None:
    node.waits = True
    with connect(node) as client:
        client.sendall(frame(Request("reload")))
        node.serve_until(lambda: node.later is not None)
    node.serve_until(lambda: node.clients == 0)
    assert node.later
    node.later(Done("to nobody"))
    node.waits = False
    assert answer_to(node, Request("status")) == (Done("did status"), [])


def test_a_long_answer_arrives_whole(node: Node) -> None:
    jobs = Jobs([JobRow(f"job-{number}", State.DONE, message="x" * 500) for number in range(4000)])
    node.reply = lambda request: (jobs, [])
    with connect(node) as client:
        client.sendall(frame(Request("jobs")))
        node.serve_until(lambda: bool(node.asked))
        received = b""
        while len(received) < HEADER or len(received) < HEADER + int.from_bytes(received[:HEADER], "big"):
            node.turn()
            received += client.recv(1 << 20)
        assert msgspec.json.decode(received[HEADER:], type=Answer) == jobs
        node.settle()
        assert node.clients == 0
        assert client.recv(1) == b""


def test_files_come_along_open_and_the_server_keeps_none(node: Node, tmp_path: Path) -> None:
    (tmp_path / "log").write_text("the log")
    (tmp_path / "outcome").write_text("the outcome")

    def reply(request: Request) -> FullAnswer:
        fds = [os.open(tmp_path / name, os.O_RDONLY) for name in ("log", "outcome")]
        return Files(JobRow("j1", State.DONE), ["log", "outcome"]), fds

    node.reply = reply
    before = len(list(Path("/proc/self/fd").iterdir()))
    answer, texts = answer_to(node, Request("logs", "j1"))
    assert answer == Files(JobRow("j1", State.DONE), ["log", "outcome"])
    assert texts == ["the log", "the outcome"]
    node.settle()
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_files_for_a_client_that_is_gone_are_closed(node: Node, tmp_path: Path) -> None:
    (tmp_path / "log").write_text("the log")
    before = len(list(Path("/proc/self/fd").iterdir()))
    client = connect(node)

    def reply(request: Request) -> FullAnswer:
        client.close()
        return Files(JobRow("j1", State.DONE), ["log"]), [os.open(tmp_path / "log", os.O_RDONLY)]

    node.reply = reply
    client.sendall(frame(Request("logs", "j1")))
    node.serve_until(lambda: bool(node.asked))
    node.settle()
    assert node.clients == 0
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_only_one_request_is_answered_on_a_connection(node: Node) -> None:
    with connect(node) as client:
        client.sendall(frame(Request("status")) + frame(Request("drain")))
        node.serve_until(lambda: bool(node.asked))
        node.settle()
    assert node.asked == [Request("status")]


# --- bad clients -------------------------------------------------------------------------------------------

GARBAGE = {
    "http": b"GET / HTTP/1.1\r\n\r\n",
    "too long": (MAX_REQUEST + 1).to_bytes(HEADER, "big"),
    "endless": b"\xff" * 5000,
    "no JSON": frame(b"status"),
    "not UTF-8": frame(b'{"verb": "\xff"}'),
    "a list": frame(b"[]"),
    "no verb": frame(b"{}"),
    "verb of another type": frame(b'{"verb": 5}'),
    "unknown state": frame(b'{"verb": "jobs", "state": "FLYING"}'),
    "deep": frame(b"[" * 4000),
    "empty": frame(b""),
}


@pytest.mark.parametrize("junk", GARBAGE.values(), ids=GARBAGE)
def test_garbage_drops_its_client_and_nobody_else(node: Node, junk: bytes) -> None:
    with connect(node) as waiting, connect(node) as bad:
        node.serve_until(lambda: node.clients == 2)
        bad.sendall(junk)
        node.settle()
        assert node.clients == 1
        with_end(bad)
        waiting.sendall(frame(Request("status")))
        node.serve_until(lambda: bool(node.asked))
        assert waiting.recv(1)
    assert node.asked == [Request("status")]


def with_end(client: socket.socket) -> None:
    """The connection is over: by an end, or by a reset when something was left unread."""
    try:
        assert client.recv(1) == b""
    except ConnectionResetError:
        return


@pytest.mark.parametrize("said", [b"", b"\0", frame(Request("status"))[:-1]])
def test_a_client_that_stalls_is_dropped_in_time(
    node: Node, monkeypatch: pytest.MonkeyPatch, said: bytes
) -> None:
    now = clock.now()
    with connect(node) as client:
        client.sendall(said)
        node.serve_until(lambda: node.clients == 1)
        node.settle()
        node.server.tend()
        assert node.clients == 1
        monkeypatch.setattr(clock, "now", lambda: now + 60)
        node.server.tend()
        assert node.clients == 0
        with_end(client)
    assert node.asked == []


def test_a_client_that_does_not_read_is_dropped_in_time_and_costs_no_turns(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = Jobs([JobRow("j", State.DONE, message="x" * 1000)] * 4000)
    node.reply = lambda request: (jobs, [])
    now = clock.now()
    with connect(node) as client:
        client.sendall(frame(Request("jobs")))
        node.serve_until(lambda: bool(node.asked))
        # It has more to say than it may, and that must not keep the server busy either.
        client.sendall(frame(Request("jobs")))
        node.settle()
        assert node.clients == 1
        monkeypatch.setattr(clock, "now", lambda: now + 60)
        node.server.tend()
        assert node.clients == 0
        # What it has received by then ends in the middle.
        assert len(node.asked) == 1
        client.shutdown(socket.SHUT_RDWR)


def test_a_client_that_leaves_is_forgotten(node: Node) -> None:
    for said in (b"", frame(Request("status"))[:-1], frame(Request("status"))):
        client = connect(node)
        client.sendall(said)
        client.close()
    node.settle()
    assert node.clients == 0


def test_a_crowd_of_silent_clients_shuts_nobody_out(node: Node) -> None:
    crowd = []
    for _ in range(2 * MAX_CLIENTS):
        crowd.append(connect(node))
        node.settle()
    assert node.clients <= MAX_CLIENTS
    with connect(node) as client:
        client.sendall(frame(Request("status")))
        node.serve_until(lambda: bool(node.asked))
        assert client.recv(1)
    for sock in crowd:
        sock.close()
    node.settle()
    assert node.clients == 0


# --- who may -----------------------------------------------------------------------------------------------


def test_the_socket_is_closed_to_others(node: Node) -> None:
    info = node.path.stat()
    assert stat.S_ISSOCK(info.st_mode)
    assert stat.S_IMODE(info.st_mode) & 0o117 == 0
    assert stat.S_IMODE(node.path.parent.stat().st_mode) & 0o027 == 0


def serve(path: Path) -> ControlServer:
    return ControlServer(path, lambda request, later: (Done("new"), []))


def test_a_socket_that_nobody_listens_on_is_replaced(node: Node) -> None:
    stale = node.path.with_name("stale.sock")
    with socket.socket(socket.AF_UNIX) as killed:
        killed.bind(os.fspath(stale))
        killed.listen()
    serve(stale).close()
    assert not stale.exists()


@pytest.mark.parametrize("crowd", [0, 1], ids=["at leisure", "too busy to take another"])
def test_a_socket_on_which_another_miner_answers_is_left_alone(node: Node, crowd: int) -> None:
    path = node.path.with_name("live.sock")
    with contextlib.ExitStack() as stack:
        live = stack.enter_context(socket.socket(socket.AF_UNIX))
        live.bind(os.fspath(path))
        live.listen(0)
        for _ in range(crowd):
            stack.enter_context(socket.socket(socket.AF_UNIX)).connect(os.fspath(path))
        with pytest.raises(OSError, match=f"^cannot listen on {path}: another miner listens there; stop"):
            serve(path)
        assert path.is_socket()
    path.unlink()


def test_what_is_no_socket_is_not_removed(node: Node) -> None:
    path = node.path.with_name("a-file")
    path.write_text("precious")
    with pytest.raises(OSError, match=f"^cannot listen on {path}: the file is no socket; remove the file"):
        serve(path)
    assert path.read_text() == "precious"
    path.unlink()


def known_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = {"aitbc-view": 7001, "aitbc-admin": 7002}

    def getgrnam(name: str) -> grp.struct_group:
        if name not in ids:
            raise KeyError(name)
        return grp.struct_group((name, "x", ids[name], []))

    monkeypatch.setattr(grp, "getgrnam", getgrnam)


@pytest.mark.xfail(not ROOT, reason="only what root has made is given away", strict=True)
def test_only_a_directory_of_its_own_is_given_to_the_readers(monkeypatch: pytest.MonkeyPatch) -> None:
    known_groups(monkeypatch)
    given: list[Path] = []
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(os, "chown", lambda path, uid, gid: given.append(path))
    with tempfile.TemporaryDirectory(prefix="aitbc-control-") as there:
        old, new = Path(there) / "c.sock", Path(there) / "new/c.sock"
        serve(old).close()
        assert given == [old]
        serve(new).close()
        assert given == [old, new.parent, new]


def test_groups_are_looked_up_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def getgrnam(name: str) -> grp.struct_group:
        asked.append(name)
        raise KeyError(name)

    monkeypatch.setattr(grp, "getgrnam", getgrnam)
    with tempfile.TemporaryDirectory(prefix="aitbc-control-") as there:
        node = Node(Path(there) / "c.sock")
        for _ in range(2):
            answer_to(node, Request("status"))
        node.server.close()
    assert asked == ["aitbc-view", "aitbc-admin"]


def test_the_kernel_tells_who_is_on_the_other_end() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert peer(ours) == (os.geteuid(), {os.getegid(), *os.getgroups()})


def as_user(node: Node, uid: int, groups: list[int], request: Request) -> tuple[int, str]:
    """Ask as another user, who is let through to the socket; gives the exit code and the message."""
    node.path.parent.chmod(0o755)
    node.path.chmod(0o666)
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 99
        try:
            os.setgroups(groups)
            os.setresgid(uid, uid, uid)
            os.setresuid(uid, uid, uid)
            answer, _ = ask(node.path, request, DEADLINE_S)
            os.write(write, answer.message.encode())
            status = answer.exit_code if isinstance(answer, Refusal) else 0
        finally:
            os._exit(status)
    os.close(write)
    try:
        node.serve_until(lambda: bool(select.select([read], [], [], 0)[0]))
        message = os.read(read, 4096).decode()
    finally:
        os.close(read)
        _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status), message


@pytest.mark.parametrize("verb", sorted(READ_VERBS | WRITE_VERBS))
def test_a_stranger_may_neither_read_nor_write(
    node: Node, verb: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if ROOT:
        code, message = as_user(node, STRANGER, [], Request(verb))
    else:
        # As seen by a node that runs as somebody else than this user.
        monkeypatch.setattr(control, "peer", lambda sock: (STRANGER, {STRANGER}))
        answer, _ = answer_to(node, Request(verb))
        code, message = answer.exit_code, answer.message
    assert code == EXIT_NOT_PERMITTED
    assert message.startswith(f"cannot run `{verb}`: only root and the group aitbc")
    assert node.asked == []


@pytest.fixture
def node_with_groups(monkeypatch: pytest.MonkeyPatch) -> Iterator[Node]:
    known_groups(monkeypatch)
    with tempfile.TemporaryDirectory(prefix="aitbc-control-") as there:
        made = Node(Path(there) / "control.sock")
        yield made
        made.server.close()


@pytest.mark.parametrize(
    ("groups", "may_read", "may_write"),
    [
        ([], False, False),
        ([7001], True, False),
        ([7002], True, True),
        ([7003, 7001], True, False),
        (list(range(8000, 8400)), False, False),
        # More than the kernel's answer has room for: rather refused than let in by mistake.
        ([7002, *range(8000, 8400)], False, False),
    ],
    ids=["none", "readers", "writers", "others and readers", "very many", "very many and writers"],
)
def test_groups_decide_what_a_user_may(
    node_with_groups: Node,
    monkeypatch: pytest.MonkeyPatch,
    groups: list[int],
    may_read: bool,
    may_write: bool,
) -> None:
    if not ROOT:
        known = {STRANGER, *groups} if len(groups) <= 256 else {STRANGER}
        monkeypatch.setattr(control, "peer", lambda sock: (STRANGER, known))
    node = node_with_groups
    for verb, allowed in (("status", may_read), ("drain", may_write)):
        if ROOT:
            code, _ = as_user(node, STRANGER, groups, Request(verb))
        else:
            answer, _ = answer_to(node, Request(verb))
            code = answer.exit_code if isinstance(answer, Refusal) else 0
        assert code == (0 if allowed else EXIT_NOT_PERMITTED)


def test_asking_where_nobody_answers_fails_in_time(node: Node, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        ask(tmp_path / "nothing.sock", Request("status"), 1.0)
    with pytest.raises(TimeoutError):
        ask(node.path, Request("status"), 0.05)


@pytest.mark.parametrize("how", ["socket", "directory", "replaced"])
def test_a_socket_that_was_removed_is_made_again(node: Node, how: str) -> None:
    path = node.path
    if how == "directory":
        shutil.rmtree(path.parent)
    else:
        path.unlink()
    if how == "replaced":
        with socket.socket(socket.AF_UNIX) as dead:
            dead.bind(os.fspath(path))
    node.server.tend()
    with connect(node):
        pass
    before = path.lstat().st_ino
    node.server.tend()
    assert path.lstat().st_ino == before


def test_a_socket_of_another_is_not_removed_at_the_end(node: Node) -> None:
    node.path.unlink()
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(os.fspath(node.path))
        other.listen()
        node.server.tend()
        node.server.close()
        assert node.path.is_socket()
    node.path.unlink()
