"""A small HTTP proxy on loopback: CONNECT and whole addresses, with a password if wanted."""

import base64
import socket
import ssl
import threading
from contextlib import suppress
from typing import Self
from urllib.parse import urlsplit


class SmallProxy:
    """Notes what it was asked for. `leads` says where a name leads that only it knows."""

    def __init__(
        self, credential: str = "", tls: ssl.SSLContext | None = None, leads: dict[str, str] | None = None
    ) -> None:
        self.asked: list[str] = []
        self.heads: list[bytes] = []
        self.credential = credential
        self._tls = tls
        self._leads = leads or {}
        self._listener = socket.create_server(("127.0.0.1", 0))
        host, port = self._listener.getsockname()
        self.url = f"{'https' if tls else 'http'}://{host}:{port}"
        self._threads = [threading.Thread(target=self._accept)]
        self._stopped = False

    def __enter__(self) -> Self:
        self._threads[0].start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped = True
        socket.create_connection(self._listener.getsockname()).close()
        for thread in self._threads:
            thread.join(10)
            assert not thread.is_alive()
        self._listener.close()

    def _accept(self) -> None:
        while True:
            connection, _ = self._listener.accept()
            if self._stopped:
                connection.close()
                return
            self._threads.append(threading.Thread(target=self._serve, args=(connection,)))
            self._threads[-1].start()

    def _serve(self, connection: socket.socket) -> None:
        connection.settimeout(10)
        with suppress(OSError), connection:
            if self._tls:
                connection = self._tls.wrap_socket(connection, server_side=True)
            with connection:
                self._answer(connection)

    def _answer(self, connection: socket.socket) -> None:
        head = b""
        while b"\r\n\r\n" not in head:
            piece = connection.recv(65536)
            if not piece:
                return
            head += piece
        method, where, _ = head.split(b"\r\n", 1)[0].decode().split(" ")
        self.asked.append(f"{method} {where}")
        self.heads.append(head)
        wanted = base64.b64encode(self.credential.encode())
        if self.credential and b"Proxy-Authorization: Basic " + wanted not in head:
            connection.sendall(b"HTTP/1.1 407 Proxy Authentication Required\r\nContent-Length: 0\r\n\r\n")
            return
        parts = urlsplit(f"//{where}" if method == "CONNECT" else where)
        name = str(parts.hostname)
        with socket.create_connection((self._leads.get(name, name), parts.port or 80), 10) as there:
            if method == "CONNECT":
                connection.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
            else:
                path = f"{parts.path or '/'}{'?' if parts.query else ''}{parts.query}"
                there.sendall(head.replace(where.encode(), path.encode(), 1))
            self._splice(connection, there)

    def _splice(self, one: socket.socket, other: socket.socket) -> None:
        def pump(source: socket.socket, sink: socket.socket) -> None:
            with suppress(OSError):
                while data := source.recv(65536):
                    sink.sendall(data)
            with suppress(OSError):
                sink.shutdown(socket.SHUT_WR)

        back = threading.Thread(target=pump, args=(other, one))
        back.start()
        pump(one, other)
        back.join(10)
