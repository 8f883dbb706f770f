"""Serves the control socket. The kernel tells the server the user and groups of each client."""

import contextlib
import grp
import os
import select
import socket
import struct
from collections.abc import Callable
from functools import partial
from pathlib import Path

import msgspec

from aitbc_miner.control.listening import identity, listen
from aitbc_miner.control.protocol import (
    LATER_S,
    MAX_REQUEST,
    READ_VERBS,
    WRITE_VERBS,
    Answer,
    FullAnswer,
    Later,
    Refusal,
    Request,
)
from aitbc_miner.errors import EXIT_NOT_PERMITTED
from aitbc_miner.ipc.channel import HEADER, Channel, ChannelError
from aitbc_miner.util import clock
from aitbc_miner.util.log import events

READERS, WRITERS = "aitbc-view", "aitbc-admin"  # not the service's group, which reads the token
MAX_CLIENTS = 32
CLIENT_TIMEOUT_S = 5.0
# The seconds for requests in one turn of the loop; further requests wait for the next turn.
TURN_S = 0.02
SO_PEERGROUPS = 59  # asm-generic/socket.h; the socket module does not name it
# The most bytes that Python's getsockopt takes: 256 groups. The groups of a user in more do not count.
MAX_GROUPS = 1024

PollSource = tuple[Callable[[], None], int]


class Client:
    """A connected client."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.channel: Channel[Request] = Channel(sock, Request, max_frame=MAX_REQUEST)
        self.until = clock.now() + CLIENT_TIMEOUT_S
        self.asked = False
        self.closing = False


class ControlServer:
    """Serves the socket without ever waiting for a client.

    `answer` replies to a permitted request: at once, or it returns None and calls its second argument later.
    """

    def __init__(self, path: Path, answer: Callable[[Request, Later], FullAnswer | None]) -> None:
        self._answer, self._path = answer, path
        self._clients: dict[int, Client] = {}
        # Looked up once, because a directory server that keeps the groups may be slow.
        self._readers, self._writers = group_ids(READERS), group_ids(WRITERS)
        self._listener = listen(path, self._readers)
        self._made = identity(path)
        self._lost = False
        self._turn_ends: float | None = None

    def close(self) -> None:
        """Drop all clients and remove the socket."""
        for fd in list(self._clients):
            self._drop(fd)
        self._listener.close()
        with contextlib.suppress(OSError):
            if identity(self._path) == self._made:
                self._path.unlink()

    def sources(self) -> dict[int, PollSource]:
        """Give the descriptors to poll, each with its handler and its poll events."""
        self._turn_ends = None
        own: dict[int, PollSource] = {self._listener.fileno(): (self._accept, select.POLLIN)}
        for fd, client in self._clients.items():
            # Once a client has its answer, the server reads no more from the client.
            events = select.POLLOUT if client.closing else select.POLLIN
            own[fd] = (partial(self._serve, fd), events)
        return own

    def tend(self) -> None:
        """Drop clients that neither ask nor read in time, and make a removed socket again."""
        now = clock.now()
        for fd in [fd for fd, client in self._clients.items() if now > client.until]:
            self._drop(fd)
        if identity(self._path) != self._made:
            self._renew()

    def _renew(self) -> None:
        log = events("supervisor")
        try:
            listener = listen(self._path, self._readers)
        except OSError as error:
            if not self._lost:
                log.error("control socket lost", path=str(self._path), error=str(error))  # noqa: TRY400
            self._lost = True
            return
        self._listener.close()
        self._listener, self._made, self._lost = listener, identity(self._path), False
        log.warning("control socket made again", path=str(self._path))

    def _accept(self) -> None:
        try:
            sock, _ = self._listener.accept()
        except OSError:
            return  # the client has left, or no descriptor is free
        if len(self._clients) >= MAX_CLIENTS:
            # The oldest client gives way to the new client.
            self._drop(next(iter(self._clients)))
        self._clients[sock.fileno()] = Client(sock)

    def _drop(self, fd: int) -> None:
        self._clients.pop(fd).channel.close()

    def _serve(self, fd: int) -> None:
        client = self._clients.get(fd)
        if client is None:
            return  # `_accept` dropped the client in this turn
        self._turn_ends = self._turn_ends or clock.now() + TURN_S
        if not client.closing and clock.now() > self._turn_ends:
            return
        try:
            client.channel.flush()
            if not client.closing:
                # After its request, a client is read only to notice its hang-up.
                requests = client.channel.receive()
                if requests and not client.asked:
                    client.asked = True
                    self._take(client, requests[0])
        except ChannelError:
            self._drop(fd)
            return
        if client.closing and not client.channel.has_unsent:
            self._drop(fd)

    def _take(self, client: Client, request: Request) -> None:
        reply = self._permitted(client, request)
        if reply is None:
            client.until = clock.now() + LATER_S
        else:
            client.closing = True
            _reply(client, *reply)

    def _later(self, client: Client, said: Answer | FullAnswer) -> None:
        answer, fds = said if isinstance(said, tuple) else (said, [])
        fd = client.sock.fileno()
        if self._clients.get(fd) is not client:
            for unsent in fds:
                os.close(unsent)
            return  # the client has gone
        try:
            client.closing = True
            _reply(client, answer, fds)
        except ChannelError:
            self._drop(fd)

    def _permitted(self, client: Client, request: Request) -> FullAnswer | None:
        uid, groups = peer(client.sock)
        if request.verb not in READ_VERBS | WRITE_VERBS:
            verbs = ", ".join(sorted(READ_VERBS | WRITE_VERBS))
            return Refusal(f"cannot do {request.verb[:40]!r}: unknown verb; use {verbs}"), []
        reads = request.verb in READ_VERBS
        group, ids = (READERS, self._readers | self._writers) if reads else (WRITERS, self._writers)
        if uid not in {0, os.geteuid()} and not groups & ids:
            cause = f"only root and the group {group} may use the command"
            message = f"cannot run `{request.verb}`: {cause}; use sudo, or join the group"
            return Refusal(message, EXIT_NOT_PERMITTED), []
        return self._answer(request, partial(self._later, client))


def peer(sock: socket.socket) -> tuple[int, set[int]]:
    """Ask the kernel for the user id and all group ids of the client."""
    credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    _, uid, gid = struct.unpack("3i", credentials)
    try:
        raw = sock.getsockopt(socket.SOL_SOCKET, SO_PEERGROUPS, MAX_GROUPS)
    except OSError:
        raw = b""
    return uid, {gid, *struct.unpack(f"{len(raw) // 4}I", raw)}


def group_ids(name: str) -> set[int]:
    """Give the id of a group as a set; empty if the group does not exist."""
    try:
        return {grp.getgrnam(name).gr_gid}
    except KeyError:
        return set()


def _reply(client: Client, answer: Answer, fds: list[int]) -> None:
    try:
        if not fds:
            client.channel.send(answer)
            return
        body = msgspec.json.encode(answer)
        frame = len(body).to_bytes(HEADER, "big") + body
        # A fresh socket has room for this small frame; a client whose socket is full is dropped.
        if socket.send_fds(client.sock, [frame], fds) != len(frame):
            raise ChannelError("cannot send: the client does not read")
    except OSError as error:
        raise ChannelError(f"cannot send: {error.strerror}") from error
    finally:
        for fd in fds:
            os.close(fd)
