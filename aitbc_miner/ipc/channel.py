"""Typed messages between two processes, each of which may be slow, stopped or malicious.

A frame is four bytes of length (big-endian) and one JSON value. `send` and `receive` never block: a bounded
buffer keeps unsent messages, and a second buffer keeps an incomplete message. So a stopped or malicious peer
breaks its own channel and delays nobody.

The bounds on a less trusted peer are here: the length of a message, the rate of messages, the number of jobs
in each table. If a peer exceeds a bound, the supervisor ends the peer.
"""

import os
import select
from collections import deque
from typing import Any, Generic, Protocol, TypeVar

import msgspec

from aitbc_miner.errors import MinerError, brief
from aitbc_miner.util import clock, fs

T = TypeVar("T")

HEADER = 4
MAX_FRAME = 4 << 20
MAX_UNSENT = 16 << 20
READ_AT_ONCE = 1 << 16
MAX_WAITING = 5_000
"""The agent may have at most so many jobs wait for a slot."""
MAX_UNFINISHED = 5_000
"""The agent may report at most so many unfinished jobs to the supervisor."""
MAX_SWEEPABLE = 20_000
"""The agent may queue at most so many directories for removal."""
MAX_LINE = 500
"""`jobs` shows at most so many characters of a job's message; the job's record has the whole message."""


class ChannelError(MinerError):
    """The peer is gone, does not read, or sent an undecodable message: the channel cannot be used again."""


class ExcessError(ChannelError):
    """The peer exceeded a bound: the supervisor ends the peer and tells the operator."""


class Allowance:
    """Limits the messages of a peer to `burst` at once and to `per_s` in each second after that.

    A message of N KiB counts as 1 + N messages. The node's processes send a hundredth of the limit, except
    at the start, when the agent reports each job on the disk.
    """

    def __init__(self, burst: float = 50_000, per_s: float = 2_000) -> None:
        self._burst, self._per_s = burst, per_s
        self._left, self._at = burst, clock.now()

    def spend(self, length: int) -> None:
        """Charge a message of `length` bytes.

        Raises:
            ExcessError: the peer has sent more than its limit.
        """
        now = clock.now()
        self._left = min(self._burst, self._left + (now - self._at) * self._per_s) - (1 + (length >> 10))
        self._at = now
        if self._left < 0:
            raise ExcessError(
                f"cannot receive: the peer sent over {self._burst:.0f} messages or KiB at once"
                f" and {self._per_s:.0f} a second"
            )


class HasFileno(Protocol):
    """A pipe end or a socket."""

    def fileno(self) -> int:
        """Give the descriptor."""

    def close(self) -> None:
        """Close the descriptor."""


class Channel(Generic[T]):
    """One end of a stream of messages; `incoming` is the union of tagged structs that `receive` accepts."""

    def __init__(
        self,
        end: HasFileno,
        incoming: Any,
        *,
        max_frame: int = MAX_FRAME,
        allowance: Allowance | None = None,
    ) -> None:
        self._end = end
        self._decoder: msgspec.json.Decoder[T] = msgspec.json.Decoder(incoming)
        self._max_frame = max_frame
        self._allowance = allowance
        self._received = bytearray()
        self._unsent: deque[memoryview] = deque()
        self._unsent_bytes = 0
        os.set_blocking(end.fileno(), False)

    def fileno(self) -> int:
        """Give the descriptor for `poll`."""
        return self._end.fileno()

    def close(self) -> None:
        """Close the descriptor and drop the unsent messages."""
        self._end.close()

    @property
    def has_unsent(self) -> bool:
        """Whether messages wait for the channel to become writable."""
        return bool(self._unsent)

    def send(self, message: Any) -> None:
        """Send a message, or buffer the message until the pipe has room.

        Raises:
            ChannelError: the peer is gone, or did not read and the buffer is full.
        """
        body = msgspec.json.encode(message)
        frame = len(body).to_bytes(HEADER, "big") + body
        self._unsent.append(memoryview(frame))
        self._unsent_bytes += len(frame)
        self.flush()
        if self._unsent_bytes > MAX_UNSENT:
            raise ExcessError(f"cannot send: the peer left {self._unsent_bytes} bytes unread")

    def flush(self) -> None:
        """Send the buffered messages as far as the pipe has room.

        Raises:
            ChannelError: the peer is gone.
        """
        while self._unsent:
            try:
                sent = os.write(self.fileno(), self._unsent[0])
            except BlockingIOError:
                return
            except OSError as error:
                if fs.may_pass(error):
                    return
                raise ChannelError(f"cannot send: {error.strerror}") from error
            self._unsent_bytes -= sent
            if sent == len(self._unsent[0]):
                self._unsent.popleft()
            else:
                self._unsent[0] = self._unsent[0][sent:]

    def receive(self) -> list[T]:
        """Give the complete messages that have arrived; [] if none is complete yet.

        The method reads once, so that a peer that never stops sending cannot keep the caller here.

        Raises:
            ChannelError: the peer is gone, or sent a message of an unexpected type.
        """
        try:
            data = os.read(self.fileno(), READ_AT_ONCE)
        except BlockingIOError:
            return []
        except OSError as error:
            if fs.may_pass(error):
                return []
            raise ChannelError(f"cannot receive: {error.strerror}") from error
        if not data:
            raise ChannelError("cannot receive: the peer is gone")
        self._received += data
        return list(self._frames())

    def _frames(self) -> list[T]:
        messages: list[T] = []
        start = 0
        while len(self._received) - start >= HEADER:
            length = int.from_bytes(self._received[start : start + HEADER], "big")
            if length > self._max_frame:
                raise ExcessError(f"cannot receive: a message of {length} bytes exceeds {self._max_frame}")
            end = start + HEADER + length
            if len(self._received) < end:
                break
            if self._allowance:
                self._allowance.spend(length)
            try:
                messages.append(self._decoder.decode(self._received[start + HEADER : end]))
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
                raise ExcessError(f"cannot receive: a message does not decode: {brief(error)}") from error
            start = end
        del self._received[:start]
        return messages

    def wait(self, timeout_s: float) -> list[T]:
        """Wait for the next messages and send the buffered messages meanwhile; [] after the time-out.

        Raises:
            ChannelError: as for `receive`.
        """
        deadline = clock.now() + timeout_s
        while True:
            poller = select.poll()
            poller.register(self.fileno(), select.POLLIN | (select.POLLOUT if self._unsent else 0))
            left = deadline - clock.now()
            ready = poller.poll(max(0.0, left) * 1000)
            if any(event & select.POLLOUT for _, event in ready):
                self.flush()
            if any(event & ~select.POLLOUT for _, event in ready) and (messages := self.receive()):
                return messages
            if left <= 0:
                return []
