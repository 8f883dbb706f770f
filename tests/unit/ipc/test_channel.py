"""Messages between processes: whole, in order, and never at the price of waiting for a bad peer."""

import contextlib
import os
import socket
import threading
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aitbc_miner.ipc.channel import (
    HEADER,
    MAX_UNSENT,
    READ_AT_ONCE,
    Allowance,
    Channel,
    ChannelError,
    ExcessError,
)
from aitbc_miner.ipc.messages import (
    CancelJob,
    FromWorker,
    JobEnded,
    JobProgress,
    JobStep,
    NodeToken,
    StartJob,
    ToWorker,
    WorkerReady,
)
from aitbc_miner.jobs import State
from aitbc_miner.util import clock

Pair = tuple["Channel[Any]", socket.socket]
DEADLINE_S = 30.0


@contextlib.contextmanager
def connected(incoming: Any = FromWorker, **options: Any) -> Iterator[Pair]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield Channel(ours, incoming, **options), theirs


@pytest.fixture
def pair() -> Iterator[Pair]:
    with connected() as made:
        yield made


def frame(message: object) -> bytes:
    body = message if isinstance(message, bytes) else msgspec.json.encode(message)
    return len(body).to_bytes(HEADER, "big") + body


def all_of(channel: "Channel[Any]", count: int) -> list[Any]:
    """Receive until this many messages have come."""
    found: list[Any] = []
    deadline = clock.now() + DEADLINE_S
    while len(found) < count:
        assert clock.now() < deadline
        found += channel.wait(1.0)
    return found


MESSAGES = [
    WorkerReady({"memory": "cgroup"}),
    JobStep("j1", State.PREP),
    JobProgress("j1", 50.5, "half «done»\n\0"),
    JobEnded("j1", None, timings={"run": 0.25}),
]


def test_messages_arrive_as_they_were_sent_and_in_order() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        here: Channel[FromWorker] = Channel(ours, FromWorker)
        there: Channel[ToWorker] = Channel(theirs, ToWorker)
        for message in MESSAGES:
            there.send(message)
        assert all_of(here, len(MESSAGES)) == MESSAGES
        here.send(StartJob("j2"))
        here.send(CancelJob("j2", "cancel"))
        assert all_of(there, 2) == [StartJob("j2"), CancelJob("j2", "cancel")]
        assert not here.has_unsent


def test_nothing_has_come_is_no_message(pair: Pair) -> None:
    channel, _ = pair
    assert channel.receive() == []
    assert channel.wait(0) == []
    assert channel.wait(0.01) == []


def test_a_frame_in_single_bytes_is_one_message(pair: Pair) -> None:
    channel, peer = pair
    *most, last = (bytes([byte]) for byte in frame(MESSAGES[0]))
    for byte in most:
        peer.send(byte)
        assert channel.receive() == []
    peer.send(last)
    assert channel.receive() == [MESSAGES[0]]


def test_a_message_and_a_half_is_one_message_for_now(pair: Pair) -> None:
    channel, peer = pair
    first, second = frame(MESSAGES[0]), frame(MESSAGES[1])
    peer.send(first + second[:7])
    assert channel.receive() == [MESSAGES[0]]
    peer.send(second[7:] + first)
    assert channel.receive() == [MESSAGES[1], MESSAGES[0]]


@given(st.data())
def test_however_the_bytes_are_cut_the_messages_are_the_same(data: st.DataObject) -> None:
    messages = data.draw(st.lists(st.sampled_from(MESSAGES), max_size=8))
    stream = b"".join(map(frame, messages))
    cuts = sorted(data.draw(st.sets(st.integers(0, len(stream)), max_size=12)))
    with connected() as (channel, peer):
        found: list[Any] = []
        for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
            if start < end:
                peer.send(stream[start:end])
                found += channel.receive()
        assert found == messages


@given(st.binary(max_size=80))
def test_any_bytes_are_messages_or_the_end_of_the_channel(junk: bytes) -> None:
    with connected() as (channel, peer):
        peer.send(frame(MESSAGES[0]))
        assert channel.receive() == [MESSAGES[0]]
        peer.send(junk + b"\0")
        with contextlib.suppress(ChannelError):
            channel.receive()


GARBAGE = {
    "empty": frame(b""),
    "no JSON": frame(b"{"),
    "no object": frame(b"5"),
    "no tag": frame(b"{}"),
    "unknown tag": frame(b'{"type": "Shutdown"}'),
    "of the other direction": frame(StartJob("j1")),
    "field missing": frame(b'{"type": "JobStep"}'),
    "wrong type": frame(b'{"type": "JobStep", "job_id": 5, "state": "PREP"}'),
    "unknown state": frame(b'{"type": "JobStep", "job_id": "j", "state": "FLYING"}'),
    "not UTF-8": frame(b'{"type": "JobProgress", "job_id": "\xff\xfe", "pct": null}'),
    "half a surrogate": frame(b'{"type": "JobProgress", "job_id": "\\ud800", "pct": null}'),
    "deep": frame(b'{"type": "JobProgress", "note": ' + b"[" * 50_000),
    "deep and ignored": frame(b'{"type": "JobProgress", "x": ' + b"[" * 20_000 + b"]" * 20_000 + b"}"),
    "two values": frame(msgspec.json.encode(MESSAGES[0]) * 2),
}


@pytest.mark.parametrize("junk", GARBAGE.values(), ids=GARBAGE)
def test_garbage_ends_the_channel(pair: Pair, junk: bytes) -> None:
    channel, peer = pair
    peer.sendall(junk)
    with pytest.raises(ChannelError, match="cannot receive: a message does not decode"):
        channel.receive()


def test_a_length_over_the_limit_ends_the_channel_before_anything_is_kept() -> None:
    with connected(max_frame=100) as (channel, peer):
        peer.send(frame(b" " * (100 - len(b"5")) + b"5"))
        with pytest.raises(ChannelError, match="a message does not decode"):
            channel.receive()
    with connected(max_frame=100) as (channel, peer):
        peer.send((101).to_bytes(HEADER, "big"))
        with pytest.raises(ChannelError, match="a message of 101 bytes exceeds 100"):
            channel.receive()
    with connected() as (channel, peer):
        peer.send(b"\xff" * HEADER)
        with pytest.raises(ChannelError, match="a message of 4294967295 bytes"):
            channel.receive()


def test_a_peer_that_never_stops_is_read_a_piece_at_a_time(pair: Pair) -> None:
    channel, peer = pair
    peer.setblocking(False)
    one = frame(MESSAGES[2])
    sent = peer.send(one * (4 * READ_AT_ONCE // len(one)))
    assert len(channel.receive()) <= READ_AT_ONCE // len(one)
    assert len(all_of(channel, sent // len(one) - READ_AT_ONCE // len(one))) > 0


def test_a_peer_that_is_gone_ends_the_channel_after_its_last_words(pair: Pair) -> None:
    channel, peer = pair
    peer.send(frame(MESSAGES[0]) + frame(MESSAGES[1])[:5])
    peer.close()
    assert channel.receive() == [MESSAGES[0]]
    with pytest.raises(ChannelError, match="cannot receive: the peer is gone"):
        channel.receive()
    with pytest.raises(ChannelError, match="cannot receive: the peer is gone"):
        channel.wait(DEADLINE_S)
    with pytest.raises(ChannelError, match="cannot send: Broken pipe"):
        channel.send(MESSAGES[0])


def test_a_peer_that_reset_the_connection_ends_the_channel(pair: Pair) -> None:
    channel, peer = pair
    channel.send(MESSAGES[0])
    # What it leaves unread makes the kernel say "reset" and not "end".
    peer.close()
    with pytest.raises(ChannelError, match="cannot receive: "):
        channel.receive()


def test_a_peer_that_does_not_read_costs_no_time_and_bounded_memory(pair: Pair) -> None:
    channel, _ = pair
    message = JobProgress("j1", None, "x" * (1 << 20))
    before = clock.now()
    for _ in range(MAX_UNSENT // (1 << 20) - 1):
        channel.send(message)
    with pytest.raises(ChannelError, match=r"cannot send: the peer left \d+ bytes unread"):
        fill(channel, message)
    assert clock.now() - before < DEADLINE_S
    assert channel.has_unsent
    assert channel.wait(0) == []


def fill(channel: "Channel[Any]", message: JobProgress) -> None:
    for _ in range(3):
        channel.send(message)


def test_what_waited_is_sent_in_order_when_there_is_room() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        here: Channel[FromWorker] = Channel(ours, FromWorker)
        there: Channel[FromWorker] = Channel(theirs, FromWorker)
        messages = [JobProgress(str(number), None, "x" * 100_000) for number in range(30)]
        for message in messages:
            here.send(message)
        assert here.has_unsent
        found: list[Any] = []
        while here.has_unsent:
            found += there.receive()
            here.flush()
        found += all_of(there, len(messages) - len(found))
        assert found == messages


def test_waiting_sends_what_waits_and_returns_with_what_comes() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        here: Channel[FromWorker] = Channel(ours, FromWorker)
        there: Channel[FromWorker] = Channel(theirs, FromWorker)
        long = JobProgress("j1", None, "x" * (2 << 20))

        def answer() -> None:
            all_of(there, 1)
            there.send(MESSAGES[1])

        here.send(long)
        assert here.has_unsent
        thread = threading.Thread(target=answer)
        thread.start()
        try:
            assert here.wait(DEADLINE_S) == [MESSAGES[1]]
        finally:
            thread.join(DEADLINE_S)
        assert not here.has_unsent


def test_a_half_message_does_not_end_the_waiting(pair: Pair) -> None:
    channel, peer = pair
    peer.send(frame(MESSAGES[0])[:9])
    before = clock.now()
    assert channel.wait(0.05) == []
    assert clock.now() - before >= 0.05


def test_closing_closes_and_a_closed_channel_sends_nothing(pair: Pair) -> None:
    channel, peer = pair
    fd = channel.fileno()
    channel.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)
    assert peer.recv(1) == b""


def test_a_token_shows_in_no_text_of_its_message() -> None:
    message = NodeToken("top-secret")
    assert "top-secret" not in f"{message} {message!r} {[message]}"
    assert msgspec.json.decode(msgspec.json.encode(message), type=NodeToken).token == "top-secret"


# --- how much a peer may say -------------------------------------------------------------------------------


def test_who_says_too_much_at_once_is_not_listened_to(monkeypatch: pytest.MonkeyPatch) -> None:
    now = clock.now()
    monkeypatch.setattr(clock, "now", lambda: now)
    with connected(allowance=Allowance(burst=10, per_s=5)) as (channel, there):
        there.sendall(frame(MESSAGES[0]) * 10)
        assert len(channel.receive()) == 10
        now += 1.0
        there.sendall(frame(MESSAGES[0]) * 5)
        assert len(channel.receive()) == 5, "five more in the next second"
        there.sendall(frame(MESSAGES[0]))
        with pytest.raises(
            ExcessError,
            match=r"^cannot receive: the peer sent over 10 messages or KiB at once and 5 a second$",
        ):
            channel.receive()


def test_a_long_message_counts_by_its_length() -> None:
    allowance = Allowance(burst=100, per_s=0.001)
    allowance.spend(90 << 10)
    allowance.spend(1)
    with pytest.raises(ExcessError):
        allowance.spend(20 << 10)
