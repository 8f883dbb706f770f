"""The retry queue in Redis: a server that stops, hangs, is full, or holds what is not ours."""

import contextlib
import socket
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import pytest
import redis

from aitbc_miner.queue.interface import QueueError
from aitbc_miner.queue.redis import CALL_TIMES, RedisQueue
from tests.support.queue_stores import (
    DEAD_MAX,
    LEASE_S,
    REPORT,
    RUN,
    RedisStore,
    claimed,
    open_store,
    report,
    run,
)
from tests.support.redis_server import RedisServer, redis_server

pytestmark = pytest.mark.needs("redis-server")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with redis_server(tmp_path_factory.mktemp("redis")) as running:
        yield running


@pytest.fixture
def in_redis(server: RedisServer, tmp_path: Path) -> Iterator[RedisStore]:
    with open_store("redis", tmp_path, server) as opened:
        assert isinstance(opened, RedisStore)
        yield opened


@pytest.mark.parametrize("way", ["restart", "kill"])
def test_redis_goes_on_after_its_server(in_redis: RedisStore, way: str) -> None:
    queue, server = in_redis.queue(), in_redis.server
    assert queue.shared
    assert queue.put(run("waits"), 0)
    assert queue.hold(run("held"), "mine", LEASE_S)
    queue.bury(run("dead"))
    server.stop() if way == "restart" else server.kill()
    try:
        with pytest.raises(
            QueueError, match=r"cannot read the queue at .*redis\.sock: .*; check that Redis runs"
        ):
            queue.due("a", 10)
        with pytest.raises(
            QueueError, match=r"cannot write the queue at .*redis\.sock: .*; check that Redis runs"
        ):
            queue.renew(RUN, "held", "mine", LEASE_S)
    finally:
        server.start()
    assert queue.renew(RUN, "held", "mine", LEASE_S)
    assert queue.due("a", 10) == [run("waits")]
    assert queue.dead() == [run("dead")]


def test_a_server_that_sends_a_byte_now_and_then_holds_no_call_for_long() -> None:
    timeout_s, ended = 0.2, threading.Event()

    def drip(peer: socket.socket) -> None:
        with contextlib.suppress(OSError), peer:
            peer.recv(1000)
            peer.sendall(b"$100000\r\n")
            while not ended.wait(timeout_s / 4):
                peer.sendall(b"x")

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=drip, args=(listener.accept()[0],), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=serve, daemon=True).start()
        queue = RedisQueue(f"redis://127.0.0.1:{listener.getsockname()[1]}/0", None, "n", timeout_s)
        began = time.monotonic()
        with pytest.raises(QueueError, match="cannot read the queue"):
            queue.dead()
        assert CALL_TIMES * timeout_s <= time.monotonic() - began < 10 * CALL_TIMES * timeout_s
        ended.set()
        listener.shutdown(socket.SHUT_RDWR)
        queue.close()


def test_redis_restarted_between_two_calls_is_not_noticed(in_redis: RedisStore) -> None:
    queue = in_redis.queue()
    assert queue.put(run(), 0)
    in_redis.server.restart()
    assert claimed(queue).task == run(attempts=2)


def test_redis_may_forget_its_scripts(in_redis: RedisStore) -> None:
    queue = in_redis.queue()
    assert queue.put(run(), 0)
    with in_redis.server.client() as client:
        client.script_flush()
    assert queue.remove(RUN, "j", claimed(queue).token)


def test_redis_that_does_not_answer_is_given_up_soon(in_redis: RedisStore) -> None:
    queue = RedisQueue(in_redis.server.url, None, in_redis.space, timeout_s=0.2)
    assert queue.put(run(), 0)
    in_redis.server.freeze()
    began = time.monotonic()
    try:
        with pytest.raises(QueueError, match=r"cannot read the queue at .*imeout"):
            queue.due("a", 10)
    finally:
        in_redis.server.thaw()
    assert time.monotonic() - began < 5
    assert queue.due("a", 10) == [run()]
    queue.close()


def test_redis_leaves_nothing_behind(in_redis: RedisStore) -> None:
    queue = in_redis.queue()
    for number in range(DEAD_MAX + 10):
        assert queue.hold(run(f"h{number}", most=2), "mine", 0)
        claim = claimed(queue, f"h{number}")
        assert queue.put(report(f"r{number}", node=f"n{number}"), 0)
        assert queue.remove(REPORT, f"r{number}")
        assert queue.put(claim.task, 0, claim.token)
    assert len(queue.dead()) == DEAD_MAX
    with in_redis.server.client() as client:
        assert len(client.keys(f"{in_redis.space}:*")) == DEAD_MAX + 1
    for task in queue.dead():
        assert queue.remove(task.kind, task.job_id)
    with in_redis.server.client() as client:
        assert client.keys(f"{in_redis.space}:*") == []


def test_redis_namespaces_do_not_meet(in_redis: RedisStore) -> None:
    queue = in_redis.queue()
    other = RedisQueue(in_redis.server.url, None, f"{in_redis.space}-other")
    assert queue.put(run(), 0)
    assert other.due("a", 10) == []
    assert other.hold(run(), "mine", LEASE_S)
    assert queue.due("a", 10) == [run()]
    other.close()


@pytest.mark.parametrize(
    "blob",
    [
        b"",
        b"\xc1",
        b"not msgpack",
        msgspec.msgpack.encode({"kind": "a new one", "job_id": "foreign", "node": "a"}),
        msgspec.msgpack.encode({"kind": "run", "job_id": b"\xff", "node": 7}),
    ],
)
def test_redis_passes_over_what_it_cannot_read(in_redis: RedisStore, blob: bytes) -> None:
    queue = in_redis.queue()
    for number in range(3):
        assert queue.put(run(f"foreign{number}"), 0)
        with in_redis.server.client() as client:
            client.hset(f"{in_redis.space}:task:run:foreign{number}", "task", blob)
    assert queue.put(run(), 0)
    with in_redis.server.client() as client:
        client.zadd(f"{in_redis.space}:due:run", {b"run:\xffnowhere": 1})
    assert queue.due("a", 1) == [run()]
    assert queue.waiting(RUN, "a") == [(run(), 0)]
    assert queue.claim(RUN, "foreign0", "a", LEASE_S) is None
    assert queue.requeue(RUN, "foreign0") is None
    assert queue.put(run(), 50)
    ((task, due_s),) = queue.waiting(RUN, "a")
    assert task == run()
    assert due_s == pytest.approx(50, abs=1)
    assert queue.put(run("foreign0"), 0)
    assert queue.due("a", 1) == [run("foreign0")]


def test_redis_does_not_wait_for_a_script_of_anothers(tmp_path: Path) -> None:
    with redis_server(tmp_path, options=("--busy-reply-threshold", "50")) as server:
        queue = RedisQueue(server.url, None, "busy")
        assert queue.put(run(), 0)
        with server.client() as client, server.client() as killer, ThreadPoolExecutor(1) as pool:
            endless = pool.submit(client.eval, "while true do end", 0)
            try:
                until(lambda: "BUSY" in refusal(lambda: queue.due("a", 1)))
                assert refusal(lambda: queue.put(run(), 0)).endswith("with `redis-cli SCRIPT KILL`")
            finally:
                until(lambda: not refusal_of_kill(killer))
            assert endless.exception(30) is not None
        assert queue.due("a", 1) == [run()]
        queue.close()


def test_a_redis_that_evicts_is_not_trusted(tmp_path: Path) -> None:
    with redis_server(tmp_path) as server, server.client() as client:
        queue = RedisQueue(server.url, None, "evicts")
        client.config_set("maxmemory-policy", "allkeys-lru")
        queue.examine()  # without a limit nothing is evicted
        client.config_set("maxmemory", 100 << 20)
        with pytest.raises(
            QueueError,
            match="with maxmemory-policy allkeys-lru, a full Redis discards jobs; "
            "set `maxmemory-policy noeviction` in the configuration of Redis",
        ):
            queue.examine()
        client.config_set("maxmemory-policy", "noeviction")
        queue.examine()
        queue.close()


def test_redis_out_of_memory_changes_nothing(tmp_path: Path) -> None:
    with redis_server(tmp_path) as server, server.client() as client:
        queue = RedisQueue(server.url, None, "full")
        assert queue.put(run(), 0)
        client.config_set("maxmemory", 1)
        with pytest.raises(QueueError, match=r"cannot write the queue at .*; give Redis more memory"):
            queue.put(run(attempts=7), 0)
        with pytest.raises(QueueError, match="give Redis more memory"):
            queue.claim(RUN, "j", "a", LEASE_S)
        assert queue.due("a", 1) == [run()]
        assert queue.remove(RUN, "j")
        client.config_set("maxmemory", 0)
        assert queue.put(run(), 0)
        queue.close()


def test_redis_keys_of_another_kind_are_named(in_redis: RedisStore) -> None:
    queue = in_redis.queue()
    with in_redis.server.client() as client:
        client.set(f"{in_redis.space}:due:run", "mine!")
    with pytest.raises(QueueError, match=r"WRONGTYPE.*; another program uses the same keys"):
        queue.due("a", 1)


def test_redis_refuses_a_wrong_password_without_telling_it(tmp_path: Path) -> None:
    with redis_server(tmp_path, options=("--requirepass", "right-word")) as server:
        queue = RedisQueue(server.url, "right-word", "secret")
        assert queue.put(run(), 0)
        queue.close()
        for password in ("wrong-word", None):
            queue = RedisQueue(server.url, password, "secret")
            with pytest.raises(QueueError, match=r"correct the password in queue\.password") as caught:
                queue.due("a", 1)
            said = "".join(traceback.format_exception(caught.value))
            assert "wrong-word" not in said
            assert "right-word" not in said
            queue.close()


@pytest.mark.parametrize("url", ["http://h/0", "redis://u:se/cret@h:6379/0", "redis://h:port/0", ""])
def test_redis_refuses_a_bad_address_without_quoting_it(url: str) -> None:
    with pytest.raises(QueueError, match=r"cannot use queue\.url: .*write redis://HOST:PORT/N") as caught:
        RedisQueue(url, None, "bad")
    assert "cret" not in "".join(traceback.format_exception(caught.value))


def test_redis_that_is_not_there_is_named_by_its_address() -> None:
    queue = RedisQueue("redis://127.0.0.1:1/0", "my-word", "gone")
    with pytest.raises(QueueError, match=r"cannot write the queue at 127\.0\.0\.1:1: ") as caught:
        queue.put(run(), 0)
    assert "my-word" not in "".join(traceback.format_exception(caught.value))
    queue.close()


def refusal(act: Callable[[], object]) -> str:
    try:
        act()
    except QueueError as error:
        return str(error)
    return ""


def refusal_of_kill(client: "redis.Redis") -> str:
    try:
        client.script_kill()
    except redis.ResponseError as error:
        return "" if "NOTBUSY" in str(error) else str(error)
    return ""


def until(reached: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not reached():
        assert time.monotonic() < deadline
