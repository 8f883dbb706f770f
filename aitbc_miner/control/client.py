"""Asks the miner over its control socket."""

import os
import socket
from pathlib import Path
from typing import Any

import msgspec

from aitbc_miner.control.protocol import Answer, Request
from aitbc_miner.ipc.channel import HEADER


def ask(path: Path, request: Request, timeout_s: float) -> tuple[Any, list[int]]:
    """Send one request to the miner; gives the answer and the descriptors that came with it.

    Raises:
        OSError: nobody listens, the miner does not answer in time, or we may not connect.
        msgspec.DecodeError: the answer is not from a miner of this version.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(timeout_s)
        sock.connect(os.fspath(path))
        body = msgspec.json.encode(request)
        sock.sendall(len(body).to_bytes(HEADER, "big") + body)
        data, fds, _, _ = socket.recv_fds(sock, 1 << 16, 8)
        while len(data) < HEADER or len(data) < HEADER + int.from_bytes(data[:HEADER], "big"):
            more = sock.recv(1 << 16)
            if not more:
                raise ConnectionError("the miner closed the connection without an answer")
            data += more
    return msgspec.json.decode(data[HEADER:], type=Answer), list(fds)
