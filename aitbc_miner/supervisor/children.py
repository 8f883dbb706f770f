"""The supervisor's children: forked with their pipe only, watched by pidfd, restarted after a pause."""

import contextlib
import fcntl
import os
import select
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Iterable
from functools import partial
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Generic, TypeVar

from aitbc_miner.control.server import PollSource
from aitbc_miner.errors import MinerError
from aitbc_miner.ipc.channel import Allowance, Channel, ChannelError, ExcessError
from aitbc_miner.ipc.messages import Stop
from aitbc_miner.util import clock
from aitbc_miner.util.log import be_child, descriptors, events, line_for_child
from aitbc_miner.util.signals import signal_name

T = TypeVar("T")
Main = Callable[["Connection[Any, Any]"], None]

# A child that lived this long has started well: its death resets the pause before restarts.
SETTLED_S = 60.0
LAST_WORDS = 500


class Child(Generic[T]):
    """A running child. `incoming` is the union of the messages that the child may send."""

    def __init__(self, name: str, main: Main, incoming: Any, *, keep: Iterable[int] = ()) -> None:
        self.name = name
        ours, theirs = Pipe(duplex=True)
        line = line_for_child()
        self._words = _make_words()
        try:
            self.pid = _fork(main, theirs, keep, self._words, line)
        except OSError:
            os.close(self._words)
            raise
        theirs.close()
        if line:
            line.close()
        self.pidfd = os.pidfd_open(self.pid)
        self.channel: Channel[T] = Channel(ours, incoming, allowance=Allowance())
        self.started = clock.now()
        self.heard = True
        self._fault = ""

    def receive(self) -> list[T]:
        """Read the child's messages. If its pipe is closed or a message does not decode, kill the child."""
        try:
            self.channel.flush()
            return self.channel.receive()
        except ExcessError as error:
            self.end(str(error))
        except ChannelError as error:
            events("supervisor").debug("child not heard", child=self.name, error=str(error))
            self.heard = False
            self.kill()
        return []

    def end(self, fault: str) -> None:
        """Kill the child for a fault in its messages, log the fault, and read no more messages."""
        events("supervisor").error("child killed", child=self.name, fault=fault)
        self._fault = self._fault or fault
        self.heard = False
        self.kill()

    def send(self, message: Any) -> None:
        """Send a message; a child that does not read its messages is killed."""
        try:
            self.channel.send(message)
        except ChannelError as error:
            if isinstance(error, ExcessError):  # else the child has just ended, and not by our kill
                self._fault = self._fault or str(error)
            self.kill()

    def sources(self, hear: Callable[[], None], gone: Callable[[], None]) -> dict[int, PollSource]:
        """Give the descriptors to poll: the child's pidfd and, while its messages are read, its pipe."""
        sources: dict[int, PollSource] = {self.pidfd: (gone, select.POLLIN)}
        if self.heard:
            room = select.POLLOUT if self.channel.has_unsent else 0
            sources[self.channel.fileno()] = (hear, select.POLLIN | room)
        return sources

    def kill(self) -> None:
        """Kill the child with SIGKILL; its pidfd becomes readable when the child has ended."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)

    def reap(self) -> str:
        """Collect the ended child's exit status and describe its end, such as `was killed by SIGKILL`."""
        _, status = os.waitpid(self.pid, 0)
        os.close(self.pidfd)
        self.channel.close()
        code = os.waitstatus_to_exitcode(status)
        words = os.pread(self._words, LAST_WORDS, 0).rstrip(b"\0").decode("utf-8", "replace")
        os.close(self._words)
        if self._fault and code == -signal.SIGKILL:
            return f"was ended by the supervisor: {self._fault}"
        if code < 0:
            return f"was killed by {signal_name(-code)}"
        return f"ended with exit status {code}" + (f": {words}" if words else "")


def _make_words() -> int:
    """Make the memory in which a child may write the cause of its end; seals keep its size."""
    fd = os.memfd_create("last-words", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, LAST_WORDS)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL)
    return fd


def _fork(
    main: Main, end: "Connection[Any, Any]", keep: Iterable[int], words: int, line: socket.socket | None
) -> int:
    # Signals are blocked over the fork: a handler of the supervisor must not run in the child.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        if (pid := os.fork()) != 0:
            return pid
        status = 1
        try:
            _forget({end.fileno(), *keep, *descriptors(), words, *([line.fileno()] if line else ())})
            be_child(line)
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            main(end)
            status = 0
        except ChannelError:
            status = 0  # the supervisor is gone, and nobody else needs this child
        except MinerError as error:
            os.pwrite(words, str(error).encode("utf-8", "replace")[:LAST_WORDS], 0)
            sys.stderr.write(f"{error}\n")
        except BaseException as error:  # noqa: BLE001  # the child's last act; nothing may return into the supervisor
            os.pwrite(words, type(error).__name__.encode(), 0)
            traceback.print_exc()
        finally:
            # No statement before `_exit`: an exception would unwind through the supervisor's own code.
            os._exit(status)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _forget(keep: set[int]) -> None:
    """Close the parent's descriptors except `keep`, and reset its signal handlers and wake-up pipe.

    If a child kept the pipes of other children open, the supervisor would never see these pipes close.
    """
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    # The terminal sends Ctrl-C and SIGHUP to the whole foreground group; the supervisor alone acts on them.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    for entry in list(Path("/proc/self/fd").iterdir()):
        fd = int(entry.name)
        if fd > 2 and fd not in keep:
            # The listing has closed its own descriptor.
            with contextlib.suppress(OSError):
                os.close(fd)


class Keeper(Generic[T]):
    """Keeps one child running: restarts the child after its death, with a growing pause."""

    def __init__(
        self, name: str, main: Main, incoming: Any, keep: Iterable[int], *, pause_min: float, pause_max: float
    ) -> None:
        self.name = name
        self.child: Child[T] | None = None
        self.deaths = 0
        self._main = main
        self._incoming = incoming
        self._keep = tuple(keep)
        self._pause_min = pause_min
        self._pause_max = pause_max
        self._failures = 0
        self._start_at: float | None = clock.now()
        self._news: dict[type[Any], Any] = {}
        self._untold: set[type[Any]] = set()

    def start_if_due(self) -> bool:
        """Start the child if its time has come; True when the child was started."""
        if self._start_at is None or clock.now() < self._start_at:
            return False
        try:
            self.child = Child(self.name, self._main, self._incoming, keep=self._keep)
        except OSError as error:
            # A job may have used up the processes or descriptors: the node goes on and tries again.
            events("supervisor").error("cannot start child", child=self.name, error=str(error))
            self._plan_restart()
            return False
        self._start_at = None
        self._untold = set(self._news)
        return True

    def died(self) -> str:
        """Reap the dead child, plan its restart, and describe its end."""
        assert self.child is not None  # noqa: S101  # for the type checker
        how = self.child.reap()
        if clock.now() - self.child.started > SETTLED_S:
            self._failures = 0
        self.child = None
        self.deaths += 1
        self._plan_restart()
        return how

    def _plan_restart(self) -> None:
        self._failures += 1
        pause = 0.0 if self._failures == 1 else self._pause_min * 2 ** min(self._failures - 2, 16)
        self._start_at = clock.now() + min(self._pause_max, pause)

    def send(self, message: Any) -> None:
        """Send the child a message, if the child runs. After a restart the message is not sent again."""
        if self.child is not None:
            self.child.send(message)

    def tell(self, news: Any) -> None:
        """Send the child a state. Of each type of message only the latest waits, so the queue stays short.

        A restarted child gets the latest message of each type.
        """
        self._news[type(news)] = news
        self._untold.add(type(news))
        self.tell_waiting()

    def tell_waiting(self) -> None:
        """Send the waiting states as soon as the child has read the earlier messages."""
        while self._untold and self.child is not None and not self.child.channel.has_unsent:
            self.child.send(self._news[self._untold.pop()])

    def stop(self) -> None:
        """Do not start the child again."""
        self._start_at = None


class OneShots:
    """Children that do one slow piece of work, send at most one message, and end."""

    def __init__(self) -> None:
        self._done: dict[Child[Any], Callable[[Any], None]] = {}
        self._said: dict[Child[Any], Any] = {}

    def start(
        self,
        name: str,
        work: Callable[[], Any],
        says: Any,
        done: Callable[[Any], None],
        keep: Iterable[int] = (),
    ) -> None:
        """Run `work` in a child; `done` gets its result, of type `says`, or a text about the child's end.

        The child inherits the descriptors in `keep`.

        Raises:
            OSError: the child cannot be started.
        """
        child: Child[Any] = Child(name, partial(_answer, work), says, keep=keep)
        self._done[child] = done

    def under_way(self) -> list[Child[Any]]:
        """Give the running children."""
        return list(self._done)

    def sources(self) -> dict[int, PollSource]:
        """Give the descriptors to poll, with their handlers."""
        sources: dict[int, PollSource] = {}
        for child in self._done:
            sources |= child.sources(partial(self._hear, child), partial(self._over, child))
        return sources

    def _hear(self, child: Child[Any]) -> None:
        if child not in self._done:
            return  # the child was reaped in this turn
        for message in child.receive():
            self._said[child] = message

    def _over(self, child: Child[Any]) -> None:
        while child.heard:  # reads the rest of the pipe
            self._hear(child)
        how = child.reap()
        self._done.pop(child)(self._said.pop(child, how))


def _answer(work: Callable[[], Any], pipe: "Connection[Any, Any]") -> None:
    """Run `work` in a one-shot child, and send its result unless the result is None."""
    channel: Channel[Stop] = Channel(pipe, Stop)
    if (said := work()) is not None:
        channel.send(said)
    while channel.has_unsent:
        channel.wait(1.0)
