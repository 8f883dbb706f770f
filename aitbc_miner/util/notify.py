"""Telling systemd that we are up, still alive, or stopping. Source: sd_notify(3)."""

import contextlib
import socket
from collections.abc import MutableMapping


class Notifier:
    """Speaks to whoever started us, if it wants to be told; no child can, its variables are taken away."""

    def __init__(self, environ: MutableMapping[str, str]) -> None:
        path = environ.pop("NOTIFY_SOCKET", "")
        for name in ("WATCHDOG_USEC", "WATCHDOG_PID"):
            environ.pop(name, None)
        # A name that begins with @ is one of the abstract namespace.
        self._path = "\0" + path[1:] if path.startswith("@") else path

    def say(self, *lines: str) -> None:
        """Send a message such as READY=1. One that does not arrive is missed at most by the watchdog."""
        if not self._path:
            return
        with (
            contextlib.suppress(OSError),
            socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as sock,
        ):
            sock.sendto("\n".join(lines).encode(), self._path)
