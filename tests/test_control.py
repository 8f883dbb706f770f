"""The control socket: who may ask what, and clients that stall, babble or crowd."""

import grp
import os
import select
import socket
import stat
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from aitbc_miner import control
from aitbc_miner.channel import HEADER
from aitbc_miner.control import (
    MAX_CLIENTS,
    MAX_REQUEST,
    READ_VERBS,
    WRITE_VERBS,
    Answer,
    ControlServer,
    Done,
    Files,
    JobRow,
    Jobs,
    Refusal,
    Reply,
    Request,
    ask,
    peer,
)
from aitbc_miner.errors import EXIT_FAILURE, EXIT_NOT_PERMITTED
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
        self.reply: Callable[[Request], Reply] = lambda request: (Done(f"did {request.verb}"), [])
        self.server = ControlServer(path, self._answer)

    def _answer(self, request: Request) -> Reply:
        self.asked.append(request)
        return self.reply(request)

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
    assert answer.message.endswith("not one of cancel, drain, job, jobs, logs, resume, slots, status")
    assert len(answer.message) < 200
    assert node.asked == []


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

    def reply(request: Request) -> Reply:
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

    def reply(request: Request) -> Reply:
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
        node.server.drop_slow()
        assert node.clients == 1
        monkeypatch.setattr(clock, "now", lambda: now + 60)
        node.server.drop_slow()
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
        node.server.drop_slow()
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


def test_the_socket_is_closed_to_others_and_replaces_a_stale_one(node: Node) -> None:
    info = node.path.stat()
    assert stat.S_ISSOCK(info.st_mode)
    assert stat.S_IMODE(info.st_mode) & 0o117 == 0
    assert stat.S_IMODE(node.path.parent.stat().st_mode) & 0o027 == 0
    again = ControlServer(node.path, lambda request: (Done("new"), []))
    again.close()
    assert not node.path.exists()


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
    assert message.startswith(f"cannot {verb}: only for root and the group aitbc")
    assert node.asked == []


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
    node: Node, monkeypatch: pytest.MonkeyPatch, groups: list[int], may_read: bool, may_write: bool
) -> None:
    ids = {"aitbc": 7001, "aitbc-admin": 7002}

    def getgrnam(name: str) -> grp.struct_group:
        if name not in ids:
            raise KeyError(name)
        return grp.struct_group((name, "x", ids[name], []))

    monkeypatch.setattr(grp, "getgrnam", getgrnam)
    if not ROOT:
        known = {STRANGER, *groups} if len(groups) <= 256 else {STRANGER}
        monkeypatch.setattr(control, "peer", lambda sock: (STRANGER, known))
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
