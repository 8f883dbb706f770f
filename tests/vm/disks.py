"""The laboratory's spare disk, with a file system for one test."""

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path

from tests.vm.machine import SLOTS, Machine, run

DISK = Path("/dev/disk/by-id/virtio-scratch")


@contextlib.contextmanager
def mounted(machine: Machine, at: Path, *options: str, size: str = "64M") -> Iterator[Path]:
    """Mount a new ext4 of this size; `options` are for mkfs. The node is stopped before it goes away."""
    at.mkdir(parents=True)
    run("mkfs.ext4", "-q", "-F", *options, DISK, size)
    run("mount", DISK, at)
    try:
        (at / "lost+found").rmdir()
        yield at
    finally:
        # Stopping both ends the jobs, whose open files would keep it busy.
        machine.stop(SLOTS)
        run("umount", at)
        at.rmdir()


@contextlib.contextmanager
def frozen(at: Path) -> Iterator[None]:
    """Freeze a file system: whoever writes into it sleeps where no signal reaches him."""
    run("fsfreeze", "-f", at)
    try:
        yield
    finally:
        run("fsfreeze", "-u", at)


def kill_own(pid: int) -> None:
    """Kill a process that the test itself has started, if it is still there."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
