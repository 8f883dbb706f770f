"""Tells systemd that the service is ready, alive or stopping. Source: sd_notify(3)."""

import contextlib
import socket
from collections.abc import MutableMapping


class Notifier:
    """Sends notices to systemd, if NOTIFY_SOCKET is set; removes the variable, so that no child can."""

    def __init__(self, environ: MutableMapping[str, str]) -> None:
        path = environ.pop("NOTIFY_SOCKET", "")
        for name in ("WATCHDOG_USEC", "WATCHDOG_PID"):
            environ.pop(name, None)
        # A name that begins with @ belongs to the abstract namespace.
        self._path = "\0" + path[1:] if path.startswith("@") else path

    def say(self, *lines: str) -> None:
        """Send a message such as READY=1; if a message is lost, systemd's watchdog notices."""
        if not self._path:
            return
        with (
            contextlib.suppress(OSError),
            socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as sock,
        ):
            sock.sendto("\n".join(lines).encode(), self._path)
