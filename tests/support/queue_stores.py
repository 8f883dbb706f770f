"""Both kinds of the retry queue for tests: any number of queues on one store, and time moved by hand."""

import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Protocol

import pytest

from aitbc_miner.queue.interface import Claim, Kind, RetryQueue, Task
from aitbc_miner.queue.redis import RedisQueue
from aitbc_miner.queue.sqlite import SqliteQueue
from aitbc_miner.store.database import Database
from tests.support.redis_server import RedisServer

BACKENDS = ["sqlite", pytest.param("redis", marks=pytest.mark.needs("redis-server"))]
RUN, REPORT = Kind.RUN, Kind.REPORT
LEASE_S = 60.0
DEAD_MAX = 20
# The server's clock cannot be set; with every time in its lists so much earlier, it is that much later.
_EARLIER = """
for _, key in ipairs(redis.call('KEYS', KEYS[1] .. ':*')) do
    if redis.call('TYPE', key).ok == 'zset' then
        for _, id in ipairs(redis.call('ZRANGE', key, 0, -1)) do redis.call('ZINCRBY', key, -ARGV[1], id) end
    end
end
"""
_numbers = itertools.count()


class Store(Protocol):
    """Where queues keep their tasks."""

    def queue(self) -> RetryQueue:
        """Open it once more, like another node does."""
        ...

    def advance(self, seconds: float) -> None:
        """Let time pass."""
        ...


class SqliteStore:
    """A database file."""

    def __init__(self, path: Path, stack: ExitStack) -> None:
        self._path, self._stack = path, stack
        self._now = 1000.0
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setattr("aitbc_miner.util.clock.now", lambda: self._now)

    def queue(self) -> SqliteQueue:
        database = Database(self._path)
        self._stack.callback(database.close)
        return SqliteQueue(database, dead_max=DEAD_MAX)

    def advance(self, seconds: float) -> None:
        self._now += seconds


class RedisStore:
    """A namespace of its own in a server."""

    def __init__(self, server: RedisServer, stack: ExitStack) -> None:
        self.server, self._stack = server, stack
        self.space = f"test{next(_numbers)}"

    def queue(self) -> RedisQueue:
        queue = RedisQueue(self.server.url, None, self.space, dead_max=DEAD_MAX)
        self._stack.callback(queue.close)
        return queue

    def advance(self, seconds: float) -> None:
        with self.server.client() as client:
            client.eval(_EARLIER, 1, self.space, str(seconds))


@contextmanager
def open_store(kind: str, directory: Path, server: RedisServer | None) -> Iterator[SqliteStore | RedisStore]:
    """Make an empty store, one of BACKENDS, and close all its queues at the end."""
    with ExitStack() as stack:
        if kind == "redis":
            assert server is not None
            yield RedisStore(server, stack)
        else:
            yield SqliteStore(directory / f"queue{next(_numbers)}.db", stack)


def run(job_id: str = "j", *, node: str = "a", attempts: int = 1, most: int = 0) -> Task:
    return Task(
        RUN, job_id, node, attempts=attempts, max_attempts=most, reason="it broke", payload=b"\0m\xff"
    )


def report(job_id: str = "j", *, node: str = "a") -> Task:
    return Task(REPORT, job_id, node)


def claimed(queue: RetryQueue, job_id: str = "j", node: str = "b", kind: Kind = RUN) -> Claim:
    claim = queue.claim(kind, job_id, node, LEASE_S)
    assert claim is not None
    return claim


def first_due(queue: RetryQueue, node: str) -> float | None:
    """Give the seconds until the first task is due for a node; None without such a task."""
    if isinstance(queue, SqliteQueue):
        with queue._database.reading() as connection:
            (at,) = connection.execute(
                "SELECT min(at) FROM queue WHERE becomes = 'due' AND (kind = 'run' OR node = ?)", (node,)
            ).fetchone()
        return None if at is None else max(0.0, at - queue._database.now())
    assert isinstance(queue, RedisQueue)
    lists = [queue._client.zrange(queue._due_list(kind, node), 0, 0, withscores=True) for kind in Kind]
    times = [at for found in lists for _, at in found]
    return max(0.0, min(times) - queue._now()) if times else None


def together(acts: Sequence[Callable[[], object]]) -> list[object]:
    """Do things at the same moment, each in a thread."""
    barrier = threading.Barrier(len(acts))

    def one(act: Callable[[], object]) -> object:
        barrier.wait(30)
        return act()

    with ThreadPoolExecutor(len(acts)) as pool:
        return list(pool.map(one, acts))
