"""The worker's link to its supervisor: messages in both directions, signals, and waiting.

The link outlives each job. If the supervisor ends, a running job goes on.
"""

import os
import random
import select
import signal
from collections.abc import Callable, Iterable
from typing import TypeVar

from aitbc_miner.errors import MinerError
from aitbc_miner.ipc.channel import Channel, ChannelError
from aitbc_miner.ipc.messages import END_SIGNALS, CancelJob, JobStep, JobTrouble, Retune, Stop, ToWorker
from aitbc_miner.jobs import State
from aitbc_miner.util import clock, fs
from aitbc_miner.util.backoff import Backoff
from aitbc_miner.util.log import events

T = TypeVar("T")

READ_AT_ONCE = 1 << 16
# Seconds between tries during trouble of the machine, and the number of tries on a full disk before the job's
# program has ended.
RETRY_MIN_S, RETRY_MAX_S = 0.2, 5.0
FULL_TRIES = 4


def is_full(error: BaseException | None) -> bool:
    """Whether the error is that of a full disk."""
    return isinstance(error, OSError) and error.errno in fs.FULL


class SupervisorLink:
    """A worker's link to its supervisor; `stopping` outlives the job."""

    def __init__(self, channel: Channel[ToWorker]) -> None:
        self._channel = channel
        self.connected = True
        self.stopping = False
        self.cancelled: dict[str, CancelJob] = {}
        # Changes the slot's limits, perhaps in the middle of a job.
        self.retune: Callable[[Retune], None] = lambda _: None
        # The reason to end the job, set by a signal of a supervisor without a channel to us.
        self.terminated: str | None = None
        self._rng = random.Random()  # noqa: S311  # spreads attempts, protects nothing
        self.woken, self._wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)

    def fileno(self) -> int:
        """Give the channel's descriptor."""
        return self._channel.fileno()

    def send(self, message: object) -> None:
        """Send a message to the supervisor; without a supervisor, the job's directory tells the next one."""
        if not self.connected:
            return
        try:
            self._channel.send(message)
        except ChannelError:
            self.connected = False

    @property
    def events(self) -> int:
        """Give the poll events to wait for: input, and output if unsent messages wait."""
        return select.POLLIN | (select.POLLOUT if self._channel.has_unsent else 0)

    def take(self) -> list[ToWorker]:
        """Send waiting messages, receive, and note the messages about a running job."""
        try:
            self._channel.flush()
            messages = self._channel.receive()
        except ChannelError:
            self.connected = False
            return []
        for message in messages:
            if isinstance(message, CancelJob):
                self.cancelled[message.job_id] = message
            elif isinstance(message, Stop):
                self.stopping = True
            elif isinstance(message, Retune):
                self.retune(message)
        return messages

    def wait(self, timeout_s: float | None = None, also: Iterable[int] = ()) -> list[ToWorker]:
        """Wait for messages while no program runs; [] on a timeout, a signal, or data in `also`."""
        poller = select.poll()
        if self.connected:
            poller.register(self.fileno(), self.events)
        for fd in (self.woken, *also):
            poller.register(fd, select.POLLIN)
        ready = dict(poller.poll(None if timeout_s is None else timeout_s * 1000))
        if self.woken in ready:
            os.read(self.woken, READ_AT_ONCE)
        return self.take() if self.fileno() in ready else []

    def pause(self, seconds: float, job_id: str) -> None:
        """Wait, but serve the supervisor; return at once if the miner stops at once."""
        until = clock.now() + seconds
        while not self.must_end(job_id) and (left := until - clock.now()) > 0:
            self.wait(left)

    def patiently(self, job_id: str, doing: str, call: Callable[[], T], *, over: bool = False) -> T:
        """Call, and call again during trouble of the machine that may pass; tell the supervisor meanwhile.

        `over`: the job's program has ended. To keep its work, the worker waits for a full disk as well, and
        only the miner's immediate stop ends the wait.

        Raises:
            OSError: the trouble will not pass, the job must end, or the disk is full.
            MinerError: the same, with an OSError as its cause.
        """
        backoff = Backoff(RETRY_MIN_S, RETRY_MAX_S, self._rng)
        while True:
            try:
                done = call()
            except (OSError, MinerError) as error:
                delay_s = backoff.next()
                cause = error if isinstance(error, OSError) else error.__cause__
                full = is_full(cause) and backoff.failures >= FULL_TRIES and not over
                to_end = self.must_end(job_id) if over else self.why_end(job_id)
                # A MinerError for a refused permission is a judgement: further tries would fail as well.
                refused = isinstance(error, MinerError) and isinstance(cause, PermissionError)
                if full or to_end or refused or not fs.may_pass(cause):
                    raise
                if backoff.failures == 1:
                    said = f"cannot {doing}: {error}"
                    events("worker").error("step retried", job_id=job_id, error=said)
                    self.send(JobTrouble(job_id, said))
                    if over:
                        # The program is over: the supervisor must not take the worker for a hanging one.
                        self.send(JobStep(job_id, State.COLLECTING))
            else:
                if backoff.failures:
                    self.send(JobTrouble(job_id, ""))
                return done
            self.pause(delay_s, job_id)

    def why_end(self, job_id: str) -> str | None:
        """Give the reason to end the job, if any."""
        cancel = self.cancelled.get(job_id)
        return cancel.why if cancel else self.terminated

    def why_end_within(self, seconds: float, job_id: str) -> str | None:
        """Wait up to `seconds` for a reason to end the job."""
        until = clock.now() + seconds
        while (why := self.why_end(job_id)) is None and (left := until - clock.now()) > 0:
            self.wait(left)
        return why

    def must_end(self, job_id: str) -> bool:
        """Whether the miner stops at once, so that the worker may wait for nothing more."""
        cancel = self.cancelled.get(job_id)
        return self.terminated == "shutdown" or (cancel is not None and cancel.why == "shutdown")

    def listen_for_signals(self) -> None:
        """Handle `END_SIGNALS`: the handler notes the reason, and ends the wait."""

        def note(number: int, _frame: object) -> None:
            self.terminated = next(why for why, own in END_SIGNALS.items() if own == number)

        signal.set_wakeup_fd(self._wake, warn_on_full_buffer=False)
        for number in END_SIGNALS.values():
            signal.signal(number, note)
