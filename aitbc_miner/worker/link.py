"""What ties a worker to its supervisor: what it is told, what it says, and what it waits for meanwhile.

It outlives each job. The supervisor may go away, which changes nothing for a job that runs.
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
# Seconds between attempts at what this machine's own trouble keeps from being done, and how often a disk that
# says that it is full is asked while a job can still be given back.
RETRY_MIN_S, RETRY_MAX_S = 0.2, 5.0
FULL_TRIES = 4


def is_full(error: BaseException | None) -> bool:
    """Whether a disk without room is what was met."""
    return isinstance(error, OSError) and error.errno in fs.FULL


def _is_refusal(error: OSError | MinerError) -> bool:
    # What is shut to us by its owner stays shut, where somebody has judged that already.
    return isinstance(error, MinerError) and isinstance(error.__cause__, PermissionError)


class SupervisorLink:
    """What ties a worker to its supervisor while a job runs; `stopping` outlives the job."""

    def __init__(self, channel: Channel[ToWorker]) -> None:
        self._channel = channel
        self.connected = True
        self.stopping = False
        self.cancelled: dict[str, CancelJob] = {}
        # What to do when the slot is to have other limits, which may be in the middle of a job.
        self.retune: Callable[[Retune], None] = lambda _: None
        # Set by a signal to why the job is to end: how a supervisor that has no channel to us says so.
        self.terminated: str | None = None
        self._rng = random.Random()  # noqa: S311  # spreads attempts, protects nothing
        self.woken, self._wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)

    def fileno(self) -> int:
        """Give the descriptor to wait on."""
        return self._channel.fileno()

    def send(self, message: object) -> None:
        """Tell the supervisor; when it is gone, the job's directory tells the next one."""
        if not self.connected:
            return
        try:
            self._channel.send(message)
        except ChannelError:
            self.connected = False

    @property
    def events(self) -> int:
        """Give which of poll's events to wait for: what a slow supervisor has not taken yet wants out."""
        return select.POLLIN | (select.POLLOUT if self._channel.has_unsent else 0)

    def take(self) -> list[ToWorker]:
        """Send what waits, receive, and note what concerns a running job."""
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
        """Wait for messages, or for a signal, while no program runs; [] when the time is over.

        Or when one of the descriptors `also` can be read.
        """
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
        """Let time pass, but not for the supervisor; over at once when the miner stops at once."""
        until = clock.now() + seconds
        while not self.must_end(job_id) and (left := until - clock.now()) > 0:
            self.wait(left)

    def patiently(self, job_id: str, doing: str, call: Callable[[], T], *, over: bool = False) -> T:
        """Call, and call again for as long as this machine's own trouble is in the way; say so meanwhile.

        `over`: the job's program has ended. What it has done is not thrown away: a full disk is waited for,
        too, and only a miner that stops at once ends that.

        Raises:
            OSError: it is no such trouble, the job is to end, or the disk is full.
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
                if full or to_end or not fs.may_pass(cause) or _is_refusal(error):
                    raise
                if backoff.failures == 1:
                    said = f"cannot {doing}: {error}"
                    events("worker").error("tried until it can be done", job_id=job_id, error=said)
                    self.send(JobTrouble(job_id, said))
                    if over:
                        # So that nobody takes us for a worker that hangs: the job itself is over.
                        self.send(JobStep(job_id, State.COLLECTING))
            else:
                if backoff.failures:
                    self.send(JobTrouble(job_id, ""))
                return done
            self.pause(delay_s, job_id)

    def why_end(self, job_id: str) -> str | None:
        """Say why somebody wants the job to end, if anybody does."""
        cancel = self.cancelled.get(job_id)
        return cancel.why if cancel else self.terminated

    def why_end_within(self, seconds: float, job_id: str) -> str | None:
        """Say why the job should have ended, waiting to be told."""
        until = clock.now() + seconds
        while (why := self.why_end(job_id)) is None and (left := until - clock.now()) > 0:
            self.wait(left)
        return why

    def must_end(self, job_id: str) -> bool:
        """Whether the miner stops at once, so that nothing of the job may be waited for any more."""
        cancel = self.cancelled.get(job_id)
        return self.terminated == "shutdown" or (cancel is not None and cancel.why == "shutdown")

    def listen_for_signals(self) -> None:
        """Let the signals of `END_SIGNALS` be noted and end the wait; a handler does no more than that."""

        def note(number: int, _frame: object) -> None:
            self.terminated = next(why for why, own in END_SIGNALS.items() if own == number)

        signal.set_wakeup_fd(self._wake, warn_on_full_buffer=False)
        for number in END_SIGNALS.values():
            signal.signal(number, note)
