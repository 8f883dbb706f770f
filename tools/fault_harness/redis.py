"""A real Redis for a node's queue, which a campaign kills and starts again."""

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any, Self

import redis

from tools.lib.local_node import wait_until

START_S = 20.0
# Of so many faults, the server is away for the latter half.
ROUND = 8
LEASE_S = 5


class FaultRedis:
    """A server in its own directory below `folder`; acknowledged writes survive a kill."""

    def __init__(self, folder: Path) -> None:
        found = shutil.which("redis-server", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/bin")
        if found is None:
            raise RuntimeError("cannot start redis-server: it is not installed; apt-get install redis-server")
        self._folder = folder / "redis"
        self._folder.mkdir()
        self._socket = folder / "redis.sock"
        self._command = (
            # The agent, which talks to it, is nobody in particular.
            *(found, "--port", "0", "--unixsocket", str(self._socket), "--unixsocketperm", "777"),
            *("--dir", str(self._folder), "--appendonly", "yes", "--appendfsync", "always", "--save", ""),
        )
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """The section `queue` of a node's configuration."""
        return {"backend": "redis", "url": f"unix://{self._socket}?db=0", "lease_s": LEASE_S}

    def turn(self, number: int) -> str:
        """Kill or start Redis if this fault includes it; give the action, or an empty text."""
        place = number % ROUND
        if place == ROUND // 2 and self._process:
            self._end()
            return "     Redis is killed"
        if place == 0 and not self._process:
            self.revive()
            return "     Redis is back"
        return ""

    def revive(self) -> None:
        """Start Redis if it does not run.

        Raises:
            TimeoutError: Redis does not answer.
        """
        if self._process is None:
            with (self._folder / "redis.log").open("ab") as log:
                self._process = subprocess.Popen(self._command, stdin=subprocess.DEVNULL, stdout=log)
            wait_until(self._answers, START_S)

    def _answers(self) -> bool:
        with redis.Redis(unix_socket_path=str(self._socket)) as client:
            try:
                return bool(client.ping())
            except redis.ConnectionError:
                return False

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait(START_S)

    def __enter__(self) -> Self:
        self.revive()
        return self

    def __exit__(self, *_: object) -> None:
        self._end()
