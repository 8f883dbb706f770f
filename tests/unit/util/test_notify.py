"""What is said to systemd, with a socket in its place."""

import socket
from pathlib import Path

import pytest

from aitbc_miner.util.notify import Notifier


@pytest.mark.parametrize("abstract", [False, True])
def test_lines_arrive_as_one_message(tmp_path: Path, *, abstract: bool) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        name = f"{tmp_path}/notify"
        manager.bind("\0" + name if abstract else name)
        environ = {"NOTIFY_SOCKET": f"@{name}" if abstract else name, "WATCHDOG_USEC": "1", "HOME": "/root"}
        notifier = Notifier(environ)
        assert environ == {"HOME": "/root"}
        notifier.say("READY=1", "STATUS=up")
        manager.settimeout(10)
        assert manager.recv(4096) == b"READY=1\nSTATUS=up"


def test_nobody_is_told_where_nobody_listens(tmp_path: Path) -> None:
    Notifier({}).say("READY=1")
    Notifier({"NOTIFY_SOCKET": str(tmp_path / "absent")}).say("READY=1")


def test_a_manager_that_does_not_read_delays_nothing(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        notifier = Notifier({"NOTIFY_SOCKET": str(tmp_path / "notify")})
        for _ in range(1000):
            notifier.say("WATCHDOG=1")
