"""Control groups, version 2: they hold processes together, limit, count and kill them.

`slots.cgroups` has the groups of a slot. On a hybrid machine the cgroup2 mount has no controllers. Grouping,
`cgroup.kill`, `cgroup.events` and the times in `cpu.stat` work anyway; `util.limits` then sets the limits.
Source: Documentation/admin-guide/cgroup-v2.rst of the kernel.
"""

import errno
import os
import re
import select
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from cgroupspy.controllers import Controller
from cgroupspy.interfaces import (
    BaseFileInterface,
    CommaDashSetFile,
    DictFile,
    FlagFile,
    IntegerFile,
    ListFile,
)
from msgspec import Struct
from msgspec.structs import replace

from aitbc_miner.errors import MinerError
from aitbc_miner.util import fs
from aitbc_miner.util.clock import now

LIMITS = ("cpu", "cpuset", "memory", "pids", "io")
"""The kinds of limits; each is also the name of its controller."""
RETRY_S = 0.005
"""Seconds between two tries to remove a group; the kernel gives no event for its end."""


class CgroupError(MinerError):
    """Making, writing or removing a group failed. The caller degrades (mode auto) or refuses (required)."""


class Mount(Struct, frozen=True):
    """A cgroup2 mount.

    controllers: the controllers at the root of the mount. hybrid: version 1 is mounted as well. writable: our
    process may make groups below its own. root: the group at the mount's top.
    """

    path: str
    controllers: tuple[str, ...]
    hybrid: bool
    writable: bool
    root: str = "/"


class CpuUsage(Struct, frozen=True):
    """CPU time of a group since its creation, in seconds."""

    user_s: float
    system_s: float
    total_s: float


def find_mount(mountinfo: str = "/proc/self/mountinfo") -> Mount | None:
    """Find the machine's cgroup2 mount, if any. Source: proc(5), mountinfo."""
    text = Path(mountinfo).read_text("utf-8", "surrogateescape")
    rows = [line.partition(" - ") for line in text.splitlines()]
    hybrid = any(kind.startswith("cgroup ") for _, _, kind in rows)
    mounts = [_mount(own.split(), hybrid=hybrid) for own, _, kind in rows if kind.startswith("cgroup2 ")]
    return max(mounts, key=lambda mount: mount.writable, default=None)


def _mount(fields: list[str], *, hybrid: bool) -> Mount:
    root, path = (
        re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), field) for field in fields[3:5]
    )
    mount = Mount(path, Group(Path(path)).controllers(), hybrid, writable=False, root=root)
    try:
        writable = "rw" in fields[5].split(",") and os.access(own_group(mount), os.W_OK | os.X_OK)
    except CgroupError:
        return mount
    return replace(mount, writable=writable)


def own_group(mount: Mount, cgroup_file: str = "/proc/self/cgroup") -> Path:
    """Return the directory of our process's group.

    Raises:
        CgroupError: our process is in no group of version 2, or the mount does not show its group.
    """
    for line in Path(cgroup_file).read_text("utf-8", "surrogateescape").splitlines():
        if line.startswith("0::"):
            path = Path(line.removeprefix("0::"))
            if not path.is_relative_to(mount.root) or ".." in path.parts:
                raise CgroupError(f"cannot find our own cgroup: the mount {mount.path} does not show {path}")
            return Path(mount.path) / path.relative_to(mount.root)
    raise CgroupError(f"cannot find our own cgroup: {cgroup_file} has no line 0:: for version 2")


class Group(Controller):  # type: ignore[misc]  # cgroupspy has no type information
    """A cgroup of version 2. Reading gives None (or nothing) if the kernel does not count."""

    controller_names = ListFile("cgroup.controllers")
    frozen = FlagFile("cgroup.freeze")
    cpu_stat = DictFile("cpu.stat", readonly=True)
    cpu_max = BaseFileInterface("cpu.max")
    cpu_weight = IntegerFile("cpu.weight")
    cpuset_cpus = CommaDashSetFile("cpuset.cpus")
    cpuset_mems = CommaDashSetFile("cpuset.mems")
    memory_current_bytes = IntegerFile("memory.current", readonly=True)
    memory_peak_bytes = IntegerFile("memory.peak", readonly=True)

    memory_min = IntegerFile("memory.min")
    memory_oom_group = FlagFile("memory.oom.group")
    io_stat = BaseFileInterface("io.stat", readonly=True)
    io_max = BaseFileInterface("io.max")

    def __init__(self, path: Path) -> None:
        # The base class reads only the path of its node.
        super().__init__(SimpleNamespace(full_path=os.fsencode(path)))
        self.path = path

    def create(self) -> None:
        """Make the group, or adopt an existing group."""
        try:
            self.path.mkdir(exist_ok=True)
        except OSError as error:
            raise CgroupError(f"cannot make cgroup {self.path}: {error.strerror}") from error

    def remove(self, timeout_s: float = 2.0) -> None:
        """Remove the group and all groups below, waiting up to `timeout_s` for the last processes to end.

        Raises:
            CgroupError: a process still lives in a group.
        """
        deadline = now() + timeout_s
        for group in reversed(list(self.tree())):
            _rmdir(group, deadline)

    def tree(self) -> Iterator["Group"]:
        """Yield the group and all groups below, parents first."""
        yield self
        try:
            with os.scandir(self.path) as entries:
                below = sorted(entry.path for entry in entries if entry.is_dir(follow_symlinks=False))
        except FileNotFoundError:
            return
        for path in below:
            yield from type(self)(Path(path)).tree()

    def write(self, name: str | bytes, value: object) -> None:
        """Write a file of the group.

        Raises:
            CgroupError: the kernel refuses the value; the message has file, value and reason.
        """
        path = self.path / os.fsdecode(name)
        try:
            fs.tried_again(lambda: _write(path, str(value).encode()))
        except OSError as error:
            raise CgroupError(f"cannot write {value!r} to {path}: {error.strerror}") from error

    # cgroupspy's properties write through this name.
    set_property = write

    def has(self, name: str) -> bool:
        """Whether the group has this file."""
        return (self.path / name).exists()

    def get_property(self, filename: bytes) -> str:
        """Read a file of the group; after a passing error, such as a lack of descriptors, try again."""
        text: str = fs.tried_again(partial(super().get_property, filename))
        return text

    def figure(self, key: str) -> Any:
        """Read a figure by its property's name; None on any error."""
        try:
            return self.get_content(key)
        except OSError:
            return None

    def get_content(self, key: str) -> Any:
        """Read a property of this class by its name; None if the kernel lacks the file."""
        try:
            return super().get_content(key)
        except OSError as error:
            # Somebody removed the group while we read.
            if error.errno == errno.ENODEV:
                return None
            raise

    def controllers(self) -> tuple[str, ...]:
        """Return the controllers that the group may use and hand on."""
        return tuple(self.get_content("controller_names") or ())

    def events(self, file: str) -> dict[str, int]:
        """Read a file of "name count" lines, such as memory.events; empty if the file is missing."""
        try:
            text = self.get_property(file.encode())
        except OSError as error:
            if error.errno in {errno.ENOENT, errno.ENODEV}:
                return {}
            raise
        return dict(DictFile(file).sanitize_get(text)) if text else {}

    def populated(self) -> bool:
        """Whether any process lives in the group or below. A zombie does not count."""
        return self.events("cgroup.events").get("populated") == 1

    def wait_empty(self, timeout_s: float) -> bool:
        """Wait until no process lives in the group or below; False after `timeout_s`."""
        deadline = now() + timeout_s
        try:
            fd = os.open(self.path / "cgroup.events", os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return True
        try:
            poller = select.poll()
            poller.register(fd, select.POLLPRI)
            # The kernel reports changes since the last read, so read before each wait.
            while b"populated 1" in os.pread(fd, 4096, 0):
                left = deadline - now()
                if left <= 0:
                    return False
                poller.poll(left * 1000)
        except OSError as error:
            if error.errno != errno.ENODEV:
                raise
        finally:
            os.close(fd)
        return True

    def pids(self) -> list[int]:
        """Return the processes in the group and below."""
        return [pid for group in self.tree() for pid in group.get_content("procs") or ()]

    def signal(self, number: int, but: int | None = None) -> None:
        """Send a signal to each process in the group and below, except `but`; may miss a new fork."""
        for pid in set(self.pids()) - {but}:
            with suppress(ProcessLookupError), os.fdopen(os.pidfd_open(pid), "rb", buffering=0) as process:
                # Check again while the pidfd is open: another process may have the number by now.
                if pid in self.pids():
                    signal.pidfd_send_signal(process.fileno(), number)

    def kill(self) -> None:
        """Kill all processes in the group and below; `wait_empty` waits for their end."""
        if self.has("cgroup.kill"):
            self.write("cgroup.kill", "1")
            return
        if not self.path.is_dir():
            return
        # Before Linux 5.14. A frozen process cannot fork, and can be killed.
        self.frozen = True
        signalled: set[int] = set()
        while fresh := set(self.pids()) - signalled:
            self.signal(signal.SIGKILL)
            signalled |= fresh
        self.frozen = False

    def limit(self, name: str) -> int | None:
        """Read a limit from the kernel: somebody may have changed it after the node. None: no limit."""
        try:
            text = self.get_property(name.encode())
        except OSError:
            return None
        return None if text == "max" else int(text)

    def cpu_usage(self) -> CpuUsage | None:
        """Return the CPU time since the group's creation, including ended processes."""
        usec = self.figure("cpu_stat")
        if not usec:
            return None
        return CpuUsage(usec["user_usec"] / 1e6, usec["system_usec"] / 1e6, usec["usage_usec"] / 1e6)

    def memory_current(self) -> int | None:
        """Return the bytes in use now, including the page cache."""
        used: int | None = self.figure("memory_current_bytes")
        return used

    def memory_peak(self) -> int | None:
        """Return the peak of bytes in use since the group's creation. Linux 5.19 and later."""
        used: int | None = self.figure("memory_peak_bytes")
        return used

    def io_bytes(self) -> tuple[int, int] | None:
        """Return the bytes read from and written to block devices since the group's creation."""
        text: str | None = self.figure("io_stat")
        if text is None:
            return None
        read, written = (sum(map(int, re.findall(rf"\b{key}=(\d+)", text))) for key in ("rbytes", "wbytes"))
        return read, written


def _write(path: Path, data: bytes) -> None:
    # Without O_CREAT and O_TRUNC, so that the error for a missing file is ENOENT.
    with os.fdopen(os.open(path, os.O_WRONLY), "wb", buffering=0) as file:
        file.write(data)


def enable(group: Group, names: list[str]) -> None:
    """Have a group hand controllers on to the groups below."""
    group.write("cgroup.subtree_control", " ".join(f"+{name}" for name in names))


def _rmdir(group: Group, deadline: float) -> None:
    while True:
        try:
            return group.path.rmdir()
        except FileNotFoundError:
            return None
        except OSError as error:
            if error.errno != errno.EBUSY or now() >= deadline:
                raise CgroupError(f"cannot remove cgroup {group.path}: {error.strerror}") from error
        # For a moment after the last exit an empty group may still be busy; the kernel sends no event then.
        if group.wait_empty(deadline - now()):
            time.sleep(RETRY_S)
