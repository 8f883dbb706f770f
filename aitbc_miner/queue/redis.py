"""The retry queue in a Redis server, which the nodes of a fleet may share.

The list of a task says whether the task becomes due or dead, and the score in the list says when. Until then
a task with a token is held, and a task without a token waits. So the server moves nothing when a delay or a
lease ends. All times are the server's. The keys below the namespace are:

    task:KIND:JOB       hash      the task (msgpack), the fields for the scripts, its token, its list
    due:run             sorted    runs, for any node
    due:report:NODE     sorted    reports, for one node
    dead                sorted    dead tasks, and tasks at their last attempt

Each change is one script, which the server runs atomically.
"""

import hashlib
import heapq
import secrets
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from typing import Any, NamedTuple

import msgspec
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from aitbc_miner.config.settings import Config
from aitbc_miner.identity.credentials import Credential, read_credential
from aitbc_miner.queue.interface import Claim, Kind, QueueError, RetryQueue, Task

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

# Parts of the server's error messages, and the remedy; the first match counts.
_REMEDIES = (
    ("NOAUTH|WRONGPASS|NOPERM|Authentication|username-password", "correct the password in queue.password"),
    ("maxmemory-policy", "set `maxmemory-policy noeviction` in the configuration of Redis"),
    ("OOM|maxmemory", "give Redis more memory"),
    ("BUSY ", "end the other client's script with `redis-cli SCRIPT KILL`"),
    ("WRONGTYPE", "another program uses the same keys; name a database for the queue alone in queue.url"),
    ("READONLY|read only", "queue.url must name the primary, not a replica"),
    ("MISCONF", "free space on the disk of Redis"),
)
_UNREACHABLE = "check that Redis runs, and that this machine can reach it"
_PAGE = 1000
CALL_TIMES = 5
MAX_ATTEMPTS = 2**31
"""More than any policy allows. A hostile server may send a number too large to be written down again."""


class _Entry(NamedTuple):
    at: float
    task: Task
    token: bytes


class RedisQueue:
    """A RetryQueue in a Redis server. Keeps the `dead_max` latest dead tasks.

    A call makes few exchanges with the server. Each exchange may take `timeout_s`, and the whole call
    `CALL_TIMES` that time. The node repeats none. After an error the next call connects anew.
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
            QueueError: `url` is not the URL of a Redis server.
        """
        self._client = _client(url, password, timeout_s)
        self._where = _where(self._client)
        self._space = namespace
        self._dead_max = dead_max
        self._most_s = CALL_TIMES * timeout_s
        self._hold, self._put, self._bury, self._claim, self._renew, self._remove, self._requeue = (
            self._client.register_script(_BEGIN + change)
            for change in (_HOLD, _PUT, _BURY, _CLAIM, _RENEW, _REMOVE, _REQUEUE)
        )

    def examine(self) -> None:
        """Raise QueueError if the server would discard tasks with its memory full."""
        with self._telling("use"):
            memory = self._client.info("memory")
            policy = memory.get("maxmemory_policy", "noeviction")
            if memory.get("maxmemory") and policy != "noeviction":
                raise redis.RedisError(f"with maxmemory-policy {policy}, a full Redis discards jobs")

    def hold(self, task: Task, token: str, lease_s: float) -> bool:
        """Enter a task as held, or update the task."""
        with self._telling("write"):
            return bool(self._change(self._hold, task.kind, task.job_id, token, lease_s, *_fields(task)))

    def put(self, task: Task, delay_s: float, token: str | None = None) -> bool:
        """Enter a task to be done after a delay."""
        with self._telling("write"):
            return bool(self._change(self._put, task.kind, task.job_id, token, delay_s, *_fields(task)))

    def bury(self, task: Task) -> None:
        """Enter a task as dead."""
        with self._telling("write"):
            self._change(self._bury, task.kind, task.job_id, None, 0.0, *_fields(task))

    def due(self, node: str, limit: int) -> list[Task]:
        """Give tasks that `node` may claim now."""
        with self._telling("read"):
            now, page = self._now(), max(1, limit)
            lists = [self._entries(self._due_list(kind, node), now, page) for kind in Kind]
            return [each.task for each in islice(heapq.merge(*lists, key=lambda each: each.at), limit)]

    def claim(self, kind: Kind, job_id: str, node: str, lease_s: float) -> Claim | None:
        """Hold a due task."""
        with self._telling("write"):
            if self._look(kind, job_id) is None:
                return None
            token = secrets.token_hex(16)
            found = self._change(self._claim, kind, job_id, token, lease_s, node)
            task = _task(found) if found else None
            return Claim(task, token) if task else None

    def renew(self, kind: Kind, job_id: str, token: str, lease_s: float) -> bool:
        """Make a lease end `lease_s` from now."""
        with self._telling("write"):
            return bool(self._change(self._renew, kind, job_id, token, lease_s))

    def remove(self, kind: Kind, job_id: str, token: str | None = None) -> bool:
        """Remove a finished task."""
        with self._telling("write"):
            return bool(self._change(self._remove, kind, job_id, token))

    def waiting(self, kind: Kind, node: str) -> list[tuple[Task, float]]:
        """Give the waiting tasks that `node` entered, the longest due first."""
        with self._telling("read"):
            now = self._now()
            return [
                (entry.task, max(0.0, entry.at - now))
                for entry in self._entries(self._due_list(kind, node), float("inf"), _PAGE)
                if entry.task.node == node and not entry.token
            ]

    def dead(self) -> list[Task]:
        """Give the dead tasks, the oldest first."""
        with self._telling("read"):
            return [entry.task for entry in self._entries(f"{self._space}:dead", self._now(), _PAGE)]

    def requeue(self, kind: Kind, job_id: str) -> Task | None:
        """Make a dead or waiting task due now."""
        with self._telling("write"):
            found = self._look(kind, job_id) and self._change(self._requeue, kind, job_id)
            return _task(found) if found else None

    def close(self) -> None:
        """Close the connections."""
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
        # Called before a script changes the task: only a newer node may change a newer node's task.
        return _task(self._client.hmget(f"{self._space}:task:{kind}:{job_id}", "task", "attempts"))

    def _due_list(self, kind: Kind, node: str) -> str:
        return f"{self._space}:due:{kind}" + (f":{node}" if kind is Kind.REPORT else "")

    def _entries(self, key: str, until: float, page: int) -> Iterator[_Entry]:
        """Read a list in the order of its times, `page` tasks at once; skips undecodable tasks."""
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
        # The time-out of a socket starts anew with each byte, so a slow server could hold a call for ever.
        end = threading.Timer(self._most_s, self._client.connection_pool.disconnect)
        end.start()
        try:
            yield
        except Exception as error:
            # When the timer closes the connection, the call may fail with any error.
            if not (isinstance(error, redis.RedisError | OSError) or end.finished.is_set()):
                raise
            cause = str(error).partition("\n")[0] or type(error).__name__
            remedy = next(
                (remedy for signs, remedy in _REMEDIES if any(sign in cause for sign in signs.split("|"))),
                _UNREACHABLE,
            )
            raise QueueError(f"cannot {doing} the queue at {self._where}: {cause}; {remedy}") from error
        finally:
            end.cancel()


def _client(url: str, password: str | None, timeout_s: float) -> Any:
    try:
        return redis.Redis.from_url(
            url,
            password=password,
            socket_timeout=timeout_s,
            socket_connect_timeout=timeout_s,
            # The server may have done an unanswered command: a second call would get a different answer.
            retry=Retry(NoBackoff(), 0),
            # Without a password, protocol 2 fails with NOAUTH; the greeting of protocol 3 with another error.
            protocol=2,
        )
    except (ValueError, redis.RedisError):
        # Without the cause, which quotes the URL and so perhaps a password.
        raise QueueError(
            "cannot use queue.url: not a Redis URL; write redis://HOST:PORT/N, rediss://HOST:PORT/N (TLS)"
            " or unix:///PATH?db=N"
        ) from None


def _where(client: Any) -> str:
    options = client.connection_pool.connection_kwargs
    return str(options.get("path") or f"{options.get('host', 'localhost')}:{options.get('port', 6379)}")


def _fields(task: Task) -> Iterable[object]:
    return msgspec.msgpack.encode(task), task.node, task.attempts, task.max_attempts


def _task(fields: Any) -> Task | None:
    """Decode a task as the server has it; None if the server has nothing, or nothing that we can decode."""
    blob, attempts = fields
    try:
        task = msgspec.msgpack.decode(blob, type=Task)
        return msgspec.structs.replace(task, attempts=min(max(0, int(attempts)), MAX_ATTEMPTS))
    except (msgspec.DecodeError, ValueError, TypeError, RecursionError):
        return None


def open_shared(
    config: Config, environ: Mapping[str, str], early: Credential | None = None
) -> RetryQueue | None:
    """Open the queue of the fleet; None if this node is in no fleet. `early`: the password, if read before.

    Raises:
        CredentialError: the node cannot read the password.
        QueueError: `queue.url` is not the URL of a Redis server.
    """
    queue = config.queue
    if queue.backend != "redis" or queue.url is None:
        return None
    password = None
    if queue.password is not None:
        password = (early or read_credential(queue.password, environ)).reveal()
    # Nodes of different coordinators may use the same server, but must not see each other's jobs.
    fleet = hashlib.sha256(config.coordinator.base_url.encode()).hexdigest()[:12]
    return RedisQueue(queue.url, password, f"aitbc-miner:{fleet}")
