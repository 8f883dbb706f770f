"""Looking after one running job: its output, its reports, its time, and the wish to end it.

The worker waits here. Whatever happens first is dealt with: the program ends, prints, reports, runs out of
time, is cancelled, or the supervisor goes away, which changes nothing for the job.
"""

import os
import select
import signal
import time
from collections.abc import Callable, Iterable
from functools import partial
from math import inf
from typing import TypeVar

from msgspec import Struct

from aitbc_miner.channel import Channel, ChannelError
from aitbc_miner.diskuse import DiskUse
from aitbc_miner.errors import MinerError
from aitbc_miner.joblog import JobLog
from aitbc_miner.jobs import ExitStatus, State
from aitbc_miner.messages import (
    END_SIGNALS,
    CancelJob,
    JobProgress,
    JobStep,
    JobTrouble,
    Retune,
    Stop,
    ToWorker,
)
from aitbc_miner.spawn import Job
from aitbc_miner.task import Progress, Report, ReportReader
from aitbc_miner.util import clock, fs
from aitbc_miner.util.log import events

T = TypeVar("T")

READ_AT_ONCE = 1 << 16
# Of our own CPU time, how much a job may have for what it writes to its pipes: a share of all time, and some
# seconds at once. tee(2) fills a pipe at no cost to the job; bytes written one by one cost us more than it.
READ_SHARE, READ_BURST_S = 0.05, 0.02
REAP_EVERY_S = 1.0
# Between two words on how far a job is: each costs the supervisor and the agent something.
PROGRESS_EVERY_S = 0.2
# A shell whose program was ended by a signal exits with its number and this.
BY_SIGNAL = 128
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


class Delays(Struct, frozen=True):
    """Seconds: from SIGTERM to SIGKILL; how long killing and reading the rest of the output may take.

    notice: how long a program may be seen dead of SIGTERM before we are told that it should end.
    """

    term_grace: float = 5.0
    kill: float = 10.0
    drain: float = 2.0
    notice: float = 2.0


class Ending(Struct, frozen=True):
    """How it went: the exit, why we ended it if we did, whether anything survived, and what it reported.

    `excess` says what it had too much of on disk, where that is why.
    """

    exit: ExitStatus
    clean: bool
    reports: list[Report]
    excess: str = ""


class Supervision:
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
        failures = 0
        while True:
            try:
                done = call()
            except (OSError, MinerError) as error:
                failures += 1
                cause = error if isinstance(error, OSError) else error.__cause__
                full = is_full(cause) and failures >= FULL_TRIES and not over
                to_end = self.must_end(job_id) if over else self.why_end(job_id)
                if full or to_end or not fs.may_pass(cause) or _is_refusal(error):
                    raise
                if failures == 1:
                    said = f"cannot {doing}: {error}"
                    events("worker").error("tried until it can be done", job_id=job_id, error=said)
                    self.send(JobTrouble(job_id, said))
                    if over:
                        # So that nobody takes us for a worker that hangs: the job itself is over.
                        self.send(JobStep(job_id, State.COLLECTING))
            else:
                if failures:
                    self.send(JobTrouble(job_id, ""))
                return done
            self.pause(min(RETRY_MIN_S * 2 ** min(failures - 1, 8), RETRY_MAX_S), job_id)

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


class Execution:
    """One job from its start until nothing of it is alive."""

    def __init__(
        self,
        job: Job,
        job_id: str,
        supervision: Supervision,
        log: JobLog,
        *,
        deadline: float | None,
        delays: Delays,
        disk: DiskUse | None = None,
    ) -> None:
        self._job = job
        self._job_id = job_id
        self._supervision = supervision
        self._log = log
        self._deadline = deadline
        self._delays = delays
        self._disk = disk
        self._excess = ""
        self._killed_for: str | None = None
        self._kill_at: float | None = None
        self._unkillable = False
        self._poll = select.poll()
        self._sources: dict[int, Callable[[], bool]] = {}
        self._pipes: set[int] = set()
        self._spent, self._spent_at = 0.0, clock.now()
        self._deaf_until: float | None = None
        self._reader = ReportReader()
        self._reports: list[Report] = []
        self._progress: Progress | None = None
        self._progress_at = 0.0

    def run(self, log_pipe: int, report_pipe: int | None) -> Ending:
        """Wait for the end, which is also when nothing more can be done. Closes neither pipe."""
        self._pipes = {log_pipe} if report_pipe is None else {log_pipe, report_pipe}
        self._watch(log_pipe, lambda: self._pump(log_pipe))
        if report_pipe is not None:
            self._watch(report_pipe, lambda: self._read_reports(report_pipe))
        self._watch(self._job.pidfd, lambda: True)
        self._watch(self._supervision.woken, self._woken)
        if self._supervision.connected:
            self._watch(self._supervision.fileno(), self._obey)
        while (ended := self._job.poll()) is None and not self._unkillable:
            self._turn(self._time_left())
            self._enforce()
        # The program is gone; what it left in the background is not part of the job any more.
        clean = not self._unkillable and self._kill_all()
        self._notice(ended)
        self._drain()
        self._reports += self._reader.finish()
        ended = ended or ExitStatus()
        how = ExitStatus(ended.status, ended.signal, self._killed_for or ended.killed_for)
        return Ending(how, clean, self._reports, self._excess)

    def _turn(self, timeout_s: float) -> bool:
        if self._supervision.fileno() in self._sources:
            self._poll.modify(self._supervision.fileno(), self._supervision.events)
        ready = self._poll.poll(max(0.0, timeout_s) * 1000)
        began = time.thread_time()
        for fd, _ in ready:
            if not self._sources[fd]():
                self._unwatch(fd)
        self._spend(time.thread_time() - began)
        return bool(ready)

    def _spend(self, seconds: float) -> None:
        """Leave the pipes alone for a while when they have cost too much; the job then waits to write."""
        now = clock.now()
        self._spent = max(0.0, self._spent - READ_SHARE * (now - self._spent_at)) + seconds
        self._spent_at = now
        if self._deaf_until is None and self._spent > READ_BURST_S:
            self._deaf_until = now + self._spent / READ_SHARE
            self._listen(0)
        elif self._deaf_until is not None and now >= self._deaf_until:
            self._deaf_until = None
            self._listen(select.POLLIN)

    def _listen(self, events: int) -> None:
        for pipe in self._pipes & set(self._sources):
            self._poll.modify(pipe, events)

    def _watch(self, fd: int, read: Callable[[], bool]) -> None:
        self._sources[fd] = read
        self._poll.register(fd, select.POLLIN)

    def _unwatch(self, fd: int) -> None:
        self._poll.unregister(fd)
        del self._sources[fd]

    def _time_left(self) -> float:
        now = clock.now()
        # Now and then in any case, to reap what the job left to its subreaper, which is us.
        look_at = self._disk.due if self._disk else inf
        tell_at = self._progress_at if self._progress else inf
        return min(now + REAP_EVERY_S, self._deadline or inf, self._kill_at or inf, look_at, tell_at) - now

    def _enforce(self) -> None:
        now = clock.now()
        if self._progress and now >= self._progress_at:
            self._progress_at = now + PROGRESS_EVERY_S
            said, self._progress = self._progress, None
            self._supervision.send(JobProgress(self._job_id, said.pct, said.note))
        if self._killed_for is None:
            overdue = self._deadline is not None and now >= self._deadline
            # What has ended in its last moment has ended in time.
            if overdue and self._job.poll() is None:
                self._end("timeout")
            elif why := self._supervision.why_end(self._job_id):
                self._end(why)
            elif self._log.disk_full:
                self._end("disk")
            elif self._disk and now >= self._disk.due and (excess := self._disk.look()):
                self._excess = excess
                # At once: in the time that it would have to end by itself it could write on.
                self._end("output", grace=0.0)
        elif self._kill_at is not None and now >= self._kill_at:
            self._kill_at = None
            # What hangs in the kernel may hang there for ever: the job ends without it.
            self._unkillable = not self._kill_all()

    def _kill_all(self) -> bool:
        kill = partial(self._job.kill_all, self._delays.kill)
        return self._supervision.patiently(self._job_id, "kill what is left of the job", kill, over=True)

    def _notice(self, ended: ExitStatus | None) -> None:
        """See whether a program that failed was told to end, by somebody who was quicker than we are.

        Stopping the slots, systemd sends SIGTERM to the program at the same moment as to us.
        """
        if self._killed_for is None and ended is not None and ended.status != 0:
            told = signal.SIGTERM in {ended.signal, (ended.status or 0) - BY_SIGNAL}
            patience = self._delays.notice if told else 0.0
            self._killed_for = self._supervision.why_end_within(patience, self._job_id)

    def _end(self, why: str, grace: float | None = None) -> None:
        self._killed_for = why
        # What is due in the past would keep the wait from waiting.
        self._deadline = self._disk = None
        self._kill_at = clock.now() + (self._delays.term_grace if grace is None else grace)
        self._job.terminate()

    def _pump(self, pipe: int) -> bool:
        data = _read(pipe)
        if data:
            self._log.write(data)
        return data != b""

    def _read_reports(self, pipe: int) -> bool:
        data = _read(pipe)
        if data is None:
            return True
        for report in self._reader.feed(data):
            if isinstance(report, Progress):
                self._progress = report
            else:
                self._reports.append(report)
        return bool(data)

    def _obey(self) -> bool:
        self._supervision.take()
        return self._supervision.connected

    def _woken(self) -> bool:
        os.read(self._supervision.woken, READ_AT_ONCE)
        return True

    def _drain(self) -> None:
        """Read what is still in the pipes, for a while: a writer that could not be killed never closes."""
        for fd in set(self._sources) - self._pipes:
            self._unwatch(fd)
        # Nobody writes any more: it is what fits into the pipes.
        self._deaf_until = inf
        self._listen(select.POLLIN)
        deadline = clock.now() + self._delays.drain
        while self._sources and clock.now() < deadline and self._turn(deadline - clock.now()):
            pass


def _read(pipe: int) -> bytes | None:
    """Read what is there; None if that is nothing: the job may read from its pipes, too."""
    try:
        return os.read(pipe, READ_AT_ONCE)
    except BlockingIOError:
        return None
