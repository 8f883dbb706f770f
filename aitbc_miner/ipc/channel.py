"""Typed messages between two processes that do not trust each other to be prompt or correct.

A frame is four bytes of length (big-endian) and one JSON value. Nothing here ever blocks: what cannot be
written yet waits in a bounded buffer, what has not arrived whole yet waits for the rest. So a stopped or
malicious peer costs its own channel and nobody's time.

What a less trusted peer can make us keep or do has its bounds here: the length of a message, how much in a
second, how many of each thing. One that exceeds them is not listened to any more.
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
KIB = 1 << 10
MAX_WAITING = 5_000
"""Jobs that the agent may have wait for a slot."""
MAX_UNFINISHED = 5_000
"""Jobs without an end that the agent may have us know."""
MAX_SWEEPABLE = 20_000
"""Directories that the agent may have wait to be removed."""
MAX_LINE = 500
"""Characters of what a job came to that are kept for `jobs`; the whole is in its record."""


class ChannelError(MinerError):
    """The peer is gone, does not read, or sent something that is no message: this channel is over."""


class ExcessError(ChannelError):
    """The peer exceeds what it may say, or have us keep: it is to be ended, and the operator told."""


class Allowance:
    """How much a peer may say: `burst` messages at once, and `per_s` in each second ever after.

    A message of more than one KiB counts as so many. Ours say a hundredth of that, but for the start, when
    the agent tells of each job on the disk.
    """

    def __init__(self, burst: float = 50_000, per_s: float = 2_000) -> None:
        self._burst, self._per_s = burst, per_s
        self._left, self._at = burst, clock.now()

    def spend(self, length: int) -> None:
        """Take a message of that length off.

        Raises:
            ExcessError: there is not so much left.
        """
        now = clock.now()
        self._left = min(self._burst, self._left + (now - self._at) * self._per_s) - (1 + length // KIB)
        self._at = now
        if self._left < 0:
            raise ExcessError(
                f"it said more than {self._burst:.0f} messages or KiB at once and {self._per_s:.0f} a second"
            )


class HasFileno(Protocol):
    """A pipe end or a socket."""

    def fileno(self) -> int:
        """Give the descriptor."""
        ...

    def close(self) -> None:
        """Close it."""
        ...


class Channel(Generic[T]):
    """One end of a stream of messages; `incoming` is the type (a union of tagged structs) it accepts."""

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
        """Give the descriptor, to wait on."""
        return self._end.fileno()

    def close(self) -> None:
        """Close the descriptor; what was not sent is dropped."""
        self._end.close()

    @property
    def has_unsent(self) -> bool:
        """Whether to wait for the channel to become writable as well."""
        return bool(self._unsent)

    def send(self, message: Any) -> None:
        """Send a message, or keep it until there is room.

        Raises:
            ChannelError: the peer is gone, or has not read for so long that the buffer is full.
        """
        body = msgspec.json.encode(message)
        frame = len(body).to_bytes(HEADER, "big") + body
        self._unsent.append(memoryview(frame))
        self._unsent_bytes += len(frame)
        self.flush()
        if self._unsent_bytes > MAX_UNSENT:
            raise ChannelError(f"cannot send: the peer left {self._unsent_bytes} bytes unread")

    def flush(self) -> None:
        """Send what waits, as far as there is room.

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
        """Give the messages that have arrived whole; [] when there is none yet.

        One read at a time, so that a peer that never stops sending cannot keep us here.

        Raises:
            ChannelError: the peer is gone, or what it sent is no message of the expected type.
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
                raise ExcessError(f"cannot receive: a message of {length} bytes; at most {self._max_frame}")
            end = start + HEADER + length
            if len(self._received) < end:
                break
            if self._allowance:
                self._allowance.spend(length)
            try:
                messages.append(self._decoder.decode(self._received[start + HEADER : end]))
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
                raise ExcessError(f"cannot receive: not a message: {brief(error)}") from error
            start = end
        del self._received[:start]
        return messages

    def wait(self, timeout_s: float) -> list[T]:
        """Wait for the next messages, sending what waits meanwhile; [] after the time-out.

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
