"""A real Redis server for tests and tools: on a socket of its own, killed and started again at will."""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

START_S = 20.0


class RedisServer:
    """A server and its directory; what it has acknowledged outlives it, however it ends."""

    def __init__(self, directory: Path, *, options: tuple[str, ...] = ()) -> None:
        found = shutil.which("redis-server", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/bin")
        if found is None:
            raise FileNotFoundError(
                "cannot start redis-server: it is not installed; apt-get install redis-server"
            )
        self.directory = directory
        self.socket = directory / "redis.sock"
        self._command = (
            *(found, "--port", "0", "--unixsocket", str(self.socket), "--dir", str(directory)),
            *("--appendonly", "yes", "--appendfsync", "always", "--save", "", "--logfile", "redis.log"),
            *options,
        )
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """For RedisQueue and redis-py."""
        return f"unix://{self.socket}"

    @property
    def pid(self) -> int:
        """Of the server that runs now."""
        assert self._process is not None, "the server has been stopped"
        return self._process.pid

    def start(self) -> None:
        """Start it, and wait until it answers."""
        self._process = subprocess.Popen(
            self._command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT
        )
        deadline = time.monotonic() + START_S
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > deadline:
                log = self.directory / "redis.log"
                raise RuntimeError(
                    f"cannot start redis-server: {log.read_text()[-2000:] if log.exists() else 'no log'}"
                )
            time.sleep(0.01)

    def stop(self) -> None:
        """End it in good order."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """Have it end as in a crash."""
        self._end(signal.SIGKILL)

    def restart(self) -> None:
        """End it in good order, and start it again."""
        self.stop()
        self.start()

    def freeze(self) -> None:
        """Have it answer no more, its connections left open."""
        os.kill(self.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        """Have it go on."""
        os.kill(self.pid, signal.SIGCONT)

    def client(self) -> "redis.Redis":
        """Give a plain connection; the caller closes it."""
        return redis.Redis(
            unix_socket_path=str(self.socket), socket_timeout=5, retry=Retry(NoBackoff(), 0), protocol=2
        )

    def _answers(self) -> bool:
        with self.client() as client:
            try:
                client.ping()
            except redis.AuthenticationError:
                return True
            except (redis.ConnectionError, redis.TimeoutError):
                return False
        return True

    def _end(self, number: signal.Signals) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.send_signal(number)
            # A frozen one would not hear of it.
            process.send_signal(signal.SIGCONT)
            process.wait(START_S)


@contextmanager
def redis_server(directory: Path, *, options: tuple[str, ...] = ()) -> Iterator[RedisServer]:
    """Run a server in an existing directory until the block ends.

    Raises:
        FileNotFoundError: Redis is not installed.
        RuntimeError: it does not start.
    """
    server = RedisServer(directory, options=options)
    try:
        server.start()
        yield server
    finally:
        server.kill()
