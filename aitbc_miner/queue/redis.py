"""The retry queue in a Redis server, which the nodes of a fleet may share.

What becomes of a task is in its list: at the time that is its score it becomes due, or dead. Until then it
waits, or is held if it has a token. So nothing has to be moved when a time comes or a lease runs out. All
times are the server's. Below the namespace there are:

    task:KIND:JOB       hash      the task (msgpack), what the scripts need of it, its token, its list
    due:run             sorted    runs, for any node
    due:report:NODE     sorted    reports, for one
    dead                sorted    the dead, and those that are at their last attempt

Each change is one script, which the server runs at once and whole.
"""

import heapq
import secrets
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any, NamedTuple

import msgspec
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from aitbc_miner.queue.interface import Claim, Kind, QueueError, Task

_BEGIN = """
local space, kind, job = KEYS[1], ARGV[1], ARGV[2]
local id = kind .. ':' .. job
local entry, dead = space .. ':task:' .. id, space .. ':dead'
local time = redis.call('TIME')
local now = time[1] + time[2] / 1000000
local list, token = unpack(redis.call('HMGET', entry, 'list', 'token'))
local at = list and tonumber(redis.call('ZSCORE', list, id) or nil)
token = token or ''

local function due(node)
    return space .. ':due:' .. kind .. (kind == 'report' and ':' .. node or '')
end

local function held()
    return at and token ~= '' and at > now
end

local function enter(new_list, new_at, new_token)
    if list then redis.call('ZREM', list, id) end
    redis.call('HSET', entry, 'list', new_list, 'token', new_token)
    redis.call('ZADD', new_list, new_at, id)
    local spare = redis.call('ZCOUNT', dead, '-inf', now) - ARGV[3]
    if spare > 0 then
        for _, old in ipairs(redis.call('ZRANGEBYSCORE', dead, '-inf', now, 'LIMIT', 0, spare)) do
            redis.call('ZREM', dead, old)
            redis.call('DEL', space .. ':task:' .. old)
        end
    end
end

local function enter_next(new_at, new_token)
    local node, attempts, max = unpack(redis.call('HMGET', entry, 'node', 'attempts', 'max_attempts'))
    local last = tonumber(max) > 0 and tonumber(attempts) >= tonumber(max)
    enter(last and dead or due(node), (last and new_token == '') and now or new_at, new_token)
end

local function write()
    redis.call('HSET', entry, 'task', ARGV[6], 'node', ARGV[7], 'attempts', ARGV[8], 'max_attempts', ARGV[9])
end
"""
_HOLD = """
if at and (token == '' or token ~= ARGV[4]) then return 0 end
write()
enter_next(now + ARGV[5], ARGV[4])
return 1
"""
_PUT = """
if ARGV[4] == '' and held() then return 0 end
if ARGV[4] ~= '' and (not at or token ~= ARGV[4]) then return 0 end
write()
enter_next(now + ARGV[5], '')
return 1
"""
_BURY = """
write()
enter(dead, now, '')
return 1
"""
_CLAIM = """
if not at or at > now or list ~= due(ARGV[6]) then return 0 end
redis.call('HINCRBY', entry, 'attempts', 1)
enter_next(now + ARGV[5], ARGV[4])
return redis.call('HMGET', entry, 'task', 'attempts')
"""
_RENEW = """
if not at or token == '' or token ~= ARGV[4] then return 0 end
redis.call('ZADD', list, now + ARGV[5], id)
return 1
"""
_REMOVE = """
if not at then return 1 end
if ARGV[4] == '' and held() then return 0 end
if ARGV[4] ~= '' and token ~= ARGV[4] then return 0 end
redis.call('ZREM', list, id)
redis.call('DEL', entry)
return 1
"""
_REQUEUE = """
if not at or (list == dead and at > now) or (list ~= dead and token ~= '') then return 0 end
redis.call('HSET', entry, 'attempts', 0)
enter(due(redis.call('HGET', entry, 'node')), now, '')
return redis.call('HMGET', entry, 'task', 'attempts')
"""

# What the server says, and what helps; the first that fits.
_REMEDIES = (
    ("NOAUTH|WRONGPASS|NOPERM|Authentication|username-password", "see that queue.password is what it wants"),
    ("OOM|maxmemory", "give it more memory, and `maxmemory-policy noeviction`"),
    ("BUSY ", "end the script that another client runs there, with `redis-cli SCRIPT KILL`"),
    ("WRONGTYPE", "another program has keys of that name; give the queue a database of its own in queue.url"),
    ("READONLY|read only", "queue.url must name the primary, not a replica"),
    ("MISCONF", "free space on its disk"),
)
_UNREACHABLE = "see that it runs, and can be reached from here"
_PAGE = 1000
MAX_ATTEMPTS = 2**31
"""Beyond any that a policy allows. What a hostile server says may be more than can be written down again."""


class _Entry(NamedTuple):
    at: float
    task: Task
    token: bytes


class RedisQueue:
    """A RetryQueue in a Redis server. Of the dead it keeps the `dead_max` latest.

    Whatever the server does, a call ends soon: each of its few exchanges may take `timeout_s`, none is
    repeated. The next call connects anew where that is needed.
    """

    shared = True

    def __init__(
        self,
        url: str,
        password: str | None,
        namespace: str,
        timeout_s: float = 2.0,
        *,
        dead_max: int = 10_000,
    ) -> None:
        """Connect to nothing yet.

        Raises:
            QueueError: `url` cannot be understood.
        """
        self._client = _client(url, password, timeout_s)
        self._where = _where(self._client)
        self._space = namespace
        self._dead_max = dead_max
        self._hold, self._put, self._bury, self._claim, self._renew, self._remove, self._requeue = (
            self._client.register_script(_BEGIN + change)
            for change in (_HOLD, _PUT, _BURY, _CLAIM, _RENEW, _REMOVE, _REQUEUE)
        )

    def examine(self) -> None:
        """Raise QueueError where the server throws tasks away when its memory is full."""
        with self._telling("trust"):
            memory = self._client.info("memory")
            policy = memory.get("maxmemory_policy", "noeviction")
            if memory.get("maxmemory") and policy != "noeviction":
                raise redis.RedisError(f"its maxmemory-policy {policy} throws tasks away when it is full")

    def hold(self, task: Task, token: str, lease_s: float) -> bool:
        """Enter a task that we are at work on, or bring it up to date."""
        with self._telling("write"):
            return bool(self._change(self._hold, task.kind, task.job_id, token, lease_s, *_fields(task)))

    def put(self, task: Task, delay_s: float, token: str | None = None) -> bool:
        """Have a task done after a delay."""
        with self._telling("write"):
            return bool(self._change(self._put, task.kind, task.job_id, token, delay_s, *_fields(task)))

    def bury(self, task: Task) -> None:
        """Put a task among the dead."""
        with self._telling("write"):
            self._change(self._bury, task.kind, task.job_id, None, 0.0, *_fields(task))

    def due(self, node: str, limit: int) -> list[Task]:
        """Give tasks that this node may claim now."""
        with self._telling("read"):
            return [entry.task for entry in islice(self._all_due(node, self._now(), max(1, limit)), limit)]

    def claim(self, kind: Kind, job_id: str, node: str, lease_s: float) -> Claim | None:
        """Take a task that is due."""
        with self._telling("write"):
            if self._look(kind, job_id) is None:
                return None
            token = secrets.token_hex(16)
            found = self._change(self._claim, kind, job_id, token, lease_s, node)
            task = _task(found) if found else None
            return Claim(task, token) if task else None

    def renew(self, kind: Kind, job_id: str, token: str, lease_s: float) -> bool:
        """Keep a task for so long from now on."""
        with self._telling("write"):
            return bool(self._change(self._renew, kind, job_id, token, lease_s))

    def remove(self, kind: Kind, job_id: str, token: str | None = None) -> bool:
        """Forget a task."""
        with self._telling("write"):
            return bool(self._change(self._remove, kind, job_id, token))

    def next_due(self, node: str) -> float | None:
        """In how many seconds a task is due for this node."""
        with self._telling("read"):
            first = next(self._all_due(node, float("inf"), 1), None)
            return None if first is None else max(0.0, first.at - self._now())

    def waiting(self, kind: Kind, node: str) -> list[tuple[Task, float]]:
        """Give what waits of one kind and comes from this node, the longest due first."""
        with self._telling("read"):
            now = self._now()
            return [
                (entry.task, max(0.0, entry.at - now))
                for entry in self._entries(self._due_list(kind, node), float("inf"), _PAGE)
                if entry.task.node == node and not entry.token
            ]

    def dead(self) -> list[Task]:
        """Give the dead, the oldest first."""
        with self._telling("read"):
            return [entry.task for entry in self._entries(f"{self._space}:dead", self._now(), _PAGE)]

    def requeue(self, kind: Kind, job_id: str) -> Task | None:
        """Have a dead task, or one that waits, done now."""
        with self._telling("write"):
            found = self._look(kind, job_id) and self._change(self._requeue, kind, job_id)
            return _task(found) if found else None

    def close(self) -> None:
        """Let go of the connections."""
        self._client.close()

    def _change(
        self,
        script: Any,
        kind: Kind,
        job_id: str,
        token: str | None = None,
        seconds: float = 0.0,
        *more: object,
    ) -> Any:
        arguments = [str(kind), job_id, self._dead_max, token or "", seconds, *more]
        return script(keys=[self._space], args=arguments)

    def _now(self) -> float:
        seconds, microseconds = self._client.time()
        return float(seconds + microseconds / 1_000_000)

    def _look(self, kind: Kind, job_id: str) -> Task | None:
        # Before a script changes it: what a newer node has left is for newer nodes.
        return _task(self._client.hmget(f"{self._space}:task:{kind}:{job_id}", "task", "attempts"))

    def _due_list(self, kind: Kind, node: str) -> str:
        return f"{self._space}:due:{kind}" + (f":{node}" if kind is Kind.REPORT else "")

    def _all_due(self, node: str, until: float, page: int) -> Iterator[_Entry]:
        lists = [self._entries(self._due_list(kind, node), until, page) for kind in Kind]
        return heapq.merge(*lists, key=lambda entry: entry.at)

    def _entries(self, key: str, until: float, page: int) -> Iterator[_Entry]:
        """Read a list by its times, so many at once; what cannot be decoded is left out."""
        ids: list[tuple[bytes, float]] = []
        start = 0
        while start == 0 or len(ids) == page:
            ids = self._client.zrangebyscore(key, "-inf", until, start=start, num=page, withscores=True)
            with self._client.pipeline(transaction=False) as pipeline:
                for name, _ in ids:
                    pipeline.hmget(f"{self._space}:task:".encode() + name, "task", "attempts", "token")
                found = pipeline.execute()
            for (_, at), (*fields, token) in zip(ids, found, strict=True):
                task = _task(fields)
                if task is not None:
                    yield _Entry(at, task, token)
            start += page

    @contextmanager
    def _telling(self, doing: str) -> Iterator[None]:
        try:
            yield
        except (redis.RedisError, OSError) as error:
            cause = str(error).partition("\n")[0] or type(error).__name__
            remedy = next(
                (remedy for signs, remedy in _REMEDIES if any(sign in cause for sign in signs.split("|"))),
                _UNREACHABLE,
            )
            raise QueueError(f"cannot {doing} the queue at {self._where}: {cause}; {remedy}") from error


def _client(url: str, password: str | None, timeout_s: float) -> Any:
    try:
        return redis.Redis.from_url(
            url,
            password=password,
            socket_timeout=timeout_s,
            socket_connect_timeout=timeout_s,
            # What has been sent may have been done: the second answer would not be that of the first.
            retry=Retry(NoBackoff(), 0),
            # A missing password is told as that; the greeting of the later one fails for reasons of its own.
            protocol=2,
        )
    except (ValueError, redis.RedisError):
        # Not the cause: it quotes from the address, in which there may be a password.
        raise QueueError(
            "cannot use queue.url: it is no address; write redis://HOST:PORT/N, rediss://HOST:PORT/N (TLS)"
            " or unix:///PATH?db=N"
        ) from None


def _where(client: Any) -> str:
    options = client.connection_pool.connection_kwargs
    return str(options.get("path") or f"{options.get('host', 'localhost')}:{options.get('port', 6379)}")


def _fields(task: Task) -> Iterable[object]:
    return msgspec.msgpack.encode(task), task.node, task.attempts, task.max_attempts


def _task(fields: Any) -> Task | None:
    """Decode what the server has of a task; None where that is nothing, or of another kind than ours."""
    blob, attempts = fields
    try:
        task = msgspec.msgpack.decode(blob, type=Task)
        return msgspec.structs.replace(task, attempts=min(max(0, int(attempts)), MAX_ATTEMPTS))
    except (msgspec.DecodeError, ValueError, TypeError, RecursionError):
        return None
