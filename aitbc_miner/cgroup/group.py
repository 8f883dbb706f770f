"""Control groups, version 2: what holds processes together, limits them, counts them and ends them.

`slotgroup` has the groups of a slot. On hybrid hosts the cgroup2 mount has no controllers. Grouping,
`cgroup.kill`, `cgroup.events` and the times in `cpu.stat` work there all the same; the limits are then left
to `util.limits`. Source: Documentation/admin-guide/cgroup-v2.rst of the kernel.
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
"""What can be limited; each is the name of its controller too."""
RETRY_S = 0.005
"""Between two tries at something that the kernel gives no event for."""


class CgroupError(MinerError):
    """A group cannot be made, written or removed. The caller degrades (mode auto) or refuses (required)."""


class Mount(Struct, frozen=True):
    """Where cgroup2 is mounted.

    controllers: those the kernel offers at the root of the mount. hybrid: version 1 is mounted as well.
    writable: this process may make groups below the one it is in. root: the group that the mount shows.
    """

    path: str
    controllers: tuple[str, ...]
    hybrid: bool
    writable: bool
    root: str = "/"


class CpuUsage(Struct, frozen=True):
    """CPU time of a group since it was made, in seconds."""

    user_s: float
    system_s: float
    total_s: float


def find_mount(mountinfo: str = "/proc/self/mountinfo") -> Mount | None:
    """Find the cgroup2 mount of this machine; None where there is none. Source: proc(5), mountinfo."""
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
    """Return the directory of the group that this process is in.

    Raises:
        CgroupError: the process is in no group of version 2, or in one that the mount does not show.
    """
    for line in Path(cgroup_file).read_text("utf-8", "surrogateescape").splitlines():
        if line.startswith("0::"):
            path = Path(line.removeprefix("0::"))
            if not path.is_relative_to(mount.root) or ".." in path.parts:
                raise CgroupError(f"cannot find our own cgroup: {path} is outside of what {mount.path} shows")
            return Path(mount.path) / path.relative_to(mount.root)
    raise CgroupError(f"cannot find our own cgroup: {cgroup_file} has no line 0:: for version 2")


class Group(Controller):  # type: ignore[misc]  # cgroupspy has no type information
    """One cgroup of version 2. Reading tells None (or nothing) where the kernel does not count."""

    controller_names = ListFile("cgroup.controllers")
    frozen = FlagFile("cgroup.freeze")
    cpu_stat = DictFile("cpu.stat", readonly=True)
    cpu_max = BaseFileInterface("cpu.max")
    cpu_weight = IntegerFile("cpu.weight")
    cpuset_cpus = CommaDashSetFile("cpuset.cpus")
    cpuset_mems = CommaDashSetFile("cpuset.mems")
    memory_current_bytes = IntegerFile("memory.current", readonly=True)
    memory_peak_bytes = IntegerFile("memory.peak", readonly=True)
    memory_stat = DictFile("memory.stat", readonly=True)
    memory_min = IntegerFile("memory.min")
    memory_oom_group = FlagFile("memory.oom.group")
    io_stat = BaseFileInterface("io.stat", readonly=True)
    io_max = BaseFileInterface("io.max")

    def __init__(self, path: Path) -> None:
        # All that the base class wants of its node is this path.
        super().__init__(SimpleNamespace(full_path=os.fsencode(path)))
        self.path = path

    def create(self) -> None:
        """Make the group; one that is there already is adopted."""
        try:
            self.path.mkdir(exist_ok=True)
        except OSError as error:
            raise CgroupError(f"cannot make cgroup {self.path}: {error.strerror}") from error

    def remove(self, timeout_s: float = 2.0) -> None:
        """Remove the group and those below it, waiting up to `timeout_s` for the last processes to go.

        Raises:
            CgroupError: something still lives in it.
        """
        deadline = now() + timeout_s
        for group in reversed(list(self.tree())):
            _rmdir(group, deadline)

    def tree(self) -> Iterator["Group"]:
        """Yield this group and all below it, parents first."""
        yield self
        try:
            with os.scandir(self.path) as entries:
                below = sorted(entry.path for entry in entries if entry.is_dir(follow_symlinks=False))
        except FileNotFoundError:
            return
        for path in below:
            yield from type(self)(Path(path)).tree()

    def write(self, name: str | bytes, value: object) -> None:
        """Write one of the group's files.

        Raises:
            CgroupError: with the file, the value and the kernel's reason.
        """
        path = self.path / os.fsdecode(name)
        try:
            fs.tried_again(lambda: _write(path, str(value).encode()))
        except OSError as error:
            raise CgroupError(f"cannot write {value!r} to {path}: {error.strerror}") from error

    # What cgroupspy's properties write goes the same way.
    set_property = write

    def has(self, name: str) -> bool:
        """Whether the group has this file."""
        return (self.path / name).exists()

    def get_property(self, filename: bytes) -> str:
        """Read one of the group's files, again if that fails for want of a descriptor, say."""
        text: str = fs.tried_again(partial(super().get_property, filename))
        return text

    def figure(self, key: str) -> Any:
        """Read a property that only tells how much; None also where it cannot be read."""
        try:
            return self.get_content(key)
        except OSError:
            return None

    def get_content(self, key: str) -> Any:
        """Read a property of this class by its name; None where the kernel has no such file."""
        try:
            return super().get_content(key)
        except OSError as error:
            # The group went away while we read.
            if error.errno == errno.ENODEV:
                return None
            raise

    def controllers(self) -> tuple[str, ...]:
        """Return the controllers that this group may use and hand on."""
        return tuple(self.get_content("controller_names") or ())

    def events(self, file: str) -> dict[str, int]:
        """Read a file of "name count" lines, as memory.events or pids.events; empty where it is missing."""
        try:
            text = self.get_property(file.encode())
        except OSError as error:
            if error.errno in {errno.ENOENT, errno.ENODEV}:
                return {}
            raise
        return dict(DictFile(file).sanitize_get(text)) if text else {}

    def populated(self) -> bool:
        """Whether any process lives in the group or below it. A zombie does not."""
        return self.events("cgroup.events").get("populated") == 1

    def wait_empty(self, timeout_s: float) -> bool:
        """Wait until nothing lives in the group or below it; False when the time is over before."""
        deadline = now() + timeout_s
        try:
            fd = os.open(self.path / "cgroup.events", os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return True
        try:
            poller = select.poll()
            poller.register(fd, select.POLLPRI)
            # The kernel reports what changed since the last read, so each wait begins with one.
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
        """Return the processes in the group and below it."""
        return [pid for group in self.tree() for pid in group.get_content("procs") or ()]

    def signal(self, number: int, but: int | None = None) -> None:
        """Send a signal to each process in the group and below it; one that forks meanwhile may be missed.

        `but` is spared.
        """
        for pid in set(self.pids()) - {but}:
            with suppress(ProcessLookupError), os.fdopen(os.pidfd_open(pid), "rb", buffering=0) as process:
                # Checked while the pidfd is held: the number may belong to somebody else by now.
                if pid in self.pids():
                    signal.pidfd_send_signal(process.fileno(), number)

    def kill(self) -> None:
        """Kill everything in the group and below it; `wait_empty` tells when it is gone."""
        if self.has("cgroup.kill"):
            self.write("cgroup.kill", "1")
            return
        if not self.path.is_dir():
            return
        # Before Linux 5.14. What is frozen cannot fork, and can be killed.
        self.frozen = True
        signalled: set[int] = set()
        while fresh := set(self.pids()) - signalled:
            self.signal(signal.SIGKILL)
            signalled |= fresh
        self.frozen = False

    def pressure(self, of: str) -> dict[str, float]:
        """Read a share of time, in percent, that processes here waited for `of` ("cpu", "memory" or "io").

        Keys as the kernel's: "some avg10" to "full avg300"; empty where the kernel does not tell.
        """
        try:
            text = self.get_property(f"{of}.pressure".encode())
        except OSError as error:
            if error.errno in {errno.ENOENT, errno.ENODEV, errno.EOPNOTSUPP}:
                return {}
            raise
        rows = (line.split() for line in text.splitlines())
        pairs = ((kind, *field.partition("=")) for kind, *fields in rows for field in fields)
        return {f"{kind} {name}": float(value) for kind, name, _, value in pairs if name != "total"}

    def limit(self, name: str) -> int | None:
        """Read a limit where the kernel has it: it may have been changed since it was set. None: no limit."""
        try:
            text = self.get_property(name.encode())
        except OSError:
            return None
        return None if text == "max" else int(text)

    def cpu_usage(self) -> CpuUsage | None:
        """CPU time since the group was made, including that of processes that have ended."""
        usec = self.figure("cpu_stat")
        if not usec:
            return None
        return CpuUsage(usec["user_usec"] / 1e6, usec["system_usec"] / 1e6, usec["usage_usec"] / 1e6)

    def memory_current(self) -> int | None:
        """Bytes in use now, page cache included."""
        used: int | None = self.figure("memory_current_bytes")
        return used

    def memory_peak(self) -> int | None:
        """Return the most bytes ever in use since the group was made. Linux 5.19 and later."""
        used: int | None = self.figure("memory_peak_bytes")
        return used

    def io_bytes(self) -> tuple[int, int] | None:
        """Bytes read from and written to block devices since the group was made."""
        text: str | None = self.figure("io_stat")
        if text is None:
            return None
        read, written = (sum(map(int, re.findall(rf"\b{key}=(\d+)", text))) for key in ("rbytes", "wbytes"))
        return read, written


def _write(path: Path, data: bytes) -> None:
    # Without O_CREAT and O_TRUNC, so that a missing file is reported as missing.
    with os.fdopen(os.open(path, os.O_WRONLY), "wb", buffering=0) as file:
        file.write(data)


def enable(group: Group, names: list[str]) -> None:
    """Have a group hand controllers on to those below it."""
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
        # For a moment after the last exit, an empty group may still be busy, and then no event comes.
        if group.wait_empty(deadline - now()):
            time.sleep(RETRY_S)
