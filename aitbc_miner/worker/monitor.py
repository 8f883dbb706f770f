"""Watches a running job: its output, reports and deadline, and orders to end it.

The worker waits here for the next event: the program ends, prints or reports, its time is over, the job is
cancelled, or the supervisor ends (the job goes on).
"""

import os
import select
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from math import inf

from aitbc_miner.ipc.messages import JobOnDisk, JobProgress
from aitbc_miner.jobs import ExitStatus
from aitbc_miner.task import Progress, Report, ReportReader
from aitbc_miner.util import clock
from aitbc_miner.worker.disk_use import DiskUse
from aitbc_miner.worker.hold import Ending, JobHold
from aitbc_miner.worker.job_log import JobLog
from aitbc_miner.worker.launch import Started
from aitbc_miner.worker.link import READ_AT_ONCE

# The worker's CPU time for reading a job's pipes: a share of all time, and seconds at once. A job can make
# reading expensive: tee(2) fills a pipe for free, and single bytes cost the reader more than the writer.
READ_SHARE, READ_BURST_S = 0.05, 0.02
REAP_EVERY_S = 1.0
# Seconds between two progress messages, because each costs the supervisor and the agent time.
PROGRESS_EVERY_S = 0.2
# If a signal kills a shell's program, the shell exits with 128 + the signal's number.
BY_SIGNAL = 128


class JobMonitor:
    """Watches a job from its start until all its processes have ended."""

    def __init__(self, hold: JobHold, deadline: float | None) -> None:
        self._started = hold[Started]
        self._job = self._started.job
        self._job_id = hold.job.job_id
        self._link = hold.link
        self._log = hold[JobLog]
        self._deadline = deadline
        self._delays = hold.slot.delays
        self._disk: DiskUse | None = hold[DiskUse]
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

    def run(self) -> Ending:
        """Wait until the program has ended, or cannot be killed. Closes neither pipe."""
        log_pipe, report_pipe = self._started.log, self._started.reports
        self._pipes = {log_pipe} if report_pipe is None else {log_pipe, report_pipe}
        self._watch(log_pipe, lambda: self._pump(log_pipe))
        if report_pipe is not None:
            self._watch(report_pipe, lambda: self._read_reports(report_pipe))
        self._watch(self._job.pidfd, lambda: True)
        self._watch(self._link.woken, self._woken)
        if self._link.connected:
            self._watch(self._link.fileno(), self._obey)
        while (ended := self._job.poll()) is None and not self._unkillable:
            self._turn(self._time_left())
            self._enforce()
        # The program has ended; its background processes are no part of the job any more.
        clean = not self._unkillable and self._kill_all()
        self._notice(ended)
        self._drain()
        self._reports += self._reader.finish()
        ended = ended or ExitStatus()
        how = ExitStatus(ended.status, ended.signal, self._killed_for or ended.killed_for)
        return Ending(how, clean, self._reports, self._excess)

    def _turn(self, timeout_s: float) -> bool:
        if self._link.fileno() in self._sources:
            self._poll.modify(self._link.fileno(), self._link.events)
        ready = self._poll.poll(max(0.0, timeout_s) * 1000)
        began = time.thread_time()
        for fd, _ in ready:
            if not self._sources[fd]():
                self._unwatch(fd)
        self._spend(time.thread_time() - began)
        return bool(ready)

    def _spend(self, seconds: float) -> None:
        """Count CPU time spent on reading; after too much, stop reading for a while, so the job waits."""
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
        # Wake up now and then in any case, to reap the job's orphans.
        look_at = self._disk.due if self._disk else inf
        tell_at = self._progress_at if self._progress else inf
        ends = (self._deadline or inf, self._kill_at or inf, self._deaf_until or inf)
        return min(now + REAP_EVERY_S, *ends, look_at, tell_at) - now

    def _enforce(self) -> None:
        now = clock.now()
        if self._progress and now >= self._progress_at:
            self._progress_at = now + PROGRESS_EVERY_S
            said, self._progress = self._progress, None
            self._link.send(JobProgress(self._job_id, said.pct, said.note))
        if self._killed_for is None:
            overdue = self._deadline is not None and now >= self._deadline
            # A program that ended in its last moment has ended in time.
            if overdue and self._job.poll() is None:
                self._end("timeout")
            elif why := self._link.why_end(self._job_id):
                self._end(why)
            elif self._log.disk_full:
                self._end("disk")
            elif self._disk and now >= self._disk.due and (excess := self._look(self._disk)):
                self._excess = excess
                # Kill at once: during a grace period the job could go on writing.
                self._end("output", grace=0.0)
        elif self._kill_at is not None and now >= self._kill_at:
            self._kill_at = None
            # A process may hang in the kernel for ever: the job ends without it.
            self._unkillable = not self._kill_all()

    def _look(self, disk: DiskUse) -> str:
        before, excess = disk.counted, disk.look()
        if disk.counted is not None and disk.counted != before:
            self._link.send(JobOnDisk(self._job_id, disk.counted))
        return excess

    def _kill_all(self) -> bool:
        kill = partial(self._job.kill_all, self._delays.kill)
        return self._link.patiently(self._job_id, "kill the job's processes", kill, over=True)

    def _notice(self, ended: ExitStatus | None) -> None:
        """Note the reason if a failed program was told to end by somebody else.

        To stop the slots, systemd sends SIGTERM to program and worker at the same moment.
        """
        if self._killed_for is None and ended is not None and ended.status != 0:
            told = signal.SIGTERM in {ended.signal, (ended.status or 0) - BY_SIGNAL}
            patience = self._delays.notice if told else 0.0
            self._killed_for = self._link.why_end_within(patience, self._job_id)

    def _end(self, why: str, grace: float | None = None) -> None:
        self._killed_for = why
        # Passed times would end each wait at once.
        self._deadline = self._disk = None
        self._kill_at = clock.now() + (self._delays.term_grace if grace is None else grace)
        # A process that gets no SIGTERM for want of a descriptor is killed after the grace period.
        with suppress(OSError):
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
        self._link.take()
        return self._link.connected

    def _woken(self) -> bool:
        os.read(self._link.woken, READ_AT_ONCE)
        return True

    def _drain(self) -> None:
        """Read the rest of the pipes, for a while: a surviving writer never closes its end."""
        for fd in set(self._sources) - self._pipes:
            self._unwatch(fd)
        # Read at full speed: nobody writes any more, so only the content of the pipes is left.
        self._deaf_until = inf
        self._listen(select.POLLIN)
        deadline = clock.now() + self._delays.drain
        while self._sources and clock.now() < deadline and self._turn(deadline - clock.now()):
            pass


def _read(pipe: int) -> bytes | None:
    """Read the available data; None if none is left, because the job may read from its pipes, too."""
    try:
        return os.read(pipe, READ_AT_ONCE)
    except BlockingIOError:
        return None
