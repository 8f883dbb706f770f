"""Makes the job's view of the machine: the arguments for bubblewrap, and the meaning of bubblewrap's exit.

bubblewrap runs as the job's user and makes a user namespace first, so the miner needs no right to mount. GNU
time is the first process in the sandbox. It reaps orphans, as the first process must, and it tells a program
killed by signal N from a program that exits with 128 + N. bubblewrap does not.
"""

import os
import re
import stat
import subprocess
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path

from msgspec import Struct

from aitbc_miner.config.settings import Config
from aitbc_miner.jobs import ExitStatus
from aitbc_miner.sandbox.private_mounts import NO_DIRECTORY, NO_FILE, PTS, SHM, TMP, make_mounts
from aitbc_miner.sandbox.seccomp import filter_fd
from aitbc_miner.sandbox.users import Identity
from aitbc_miner.slots.spec import MIB, SlotSpec

BWRAP, TIME = "/usr/bin/bwrap", "/usr/bin/time"
PACKAGES = {BWRAP: "bubblewrap", TIME: "time"}

HOME = Path("/job")
"""The directory with a job's work/, output/ and tmp/, as the job sees it."""
OF_JOB = ("work", "output", "tmp")

SANDBOX_FAILED = "sandbox"
"""`ExitStatus.killed_for` of a program that did not start because bubblewrap failed."""

# bubblewrap's descriptors, after the program's own, see `spawn`.
STATUS_FD, FILTER_FD, FIRST_FILE_FD = 4, 5, 6
TRY_S = 20.0

# Links into /usr on today's Debian; directories on a Debian without merged /usr.
_LIBRARIES = ("bin", "sbin", "lib", "lib32", "lib64", "libx32")
ETC = {
    "alternatives ld.so.cache ld.so.conf ld.so.conf.d": "the programs and libraries behind names",
    "fonts ImageMagick-6 ImageMagick-7 ghostscript groff libreoffice papersize paperspecs texmf": (
        "documents and pictures"
    ),
    "mime.types magic magic.mime sgml xml": "kinds of files",
    "OpenCL vulkan glvnd": "the driver of a graphics card",
    "java-*-openjdk maven python3* perl R julia php/*/cli php/*/mods-available": "settings of languages",
    "openmpi pmix": "settings of parallel programs",
    "ssl/openssl.cnf ssl/certs": "trusted certificates; no key",
}
"""Names and patterns in /etc that jobs see, and their purposes; none is secret. The sandbox follows no link
out of them, because a link in /etc leads to the private keys."""
ETC_OF_NETWORK = "resolv.conf gai.conf services protocols"
"""Further names in /etc for jobs with the machine's network."""
# Directories of /proc that belong to the job's namespaces, and directories that a job may read. All others
# are hidden.
_PROC_OWN, _PROC_SHOWN = frozenset({"sysvipc"}), ("sys",)
# Addresses of devices, and keys of the user's other programs.
_PROC_HIDDEN = frozenset({"interrupts", "iomem", "ioports", "keys", "key-users"})
_DEVICES = ("null", "zero", "full", "random", "urandom", "tty")
# C libraries count the CPUs here.
_SYS = ("devices/system/cpu", "devices/system/node")
# GNU time leaves two descriptors open to the program: STATUS_FD, and its own copy, opened by name.
_SHUT = f'exec "$@" {STATUS_FD}>&- {{}}>&-'
_BY_SIGNAL = 128
_WRITABLE = 0o222


class Sandbox(Struct, frozen=True):
    """The sandbox of all jobs of a slot.

    runs_as: the job's user; None: the miner's own. tmp_bytes, shm_bytes: the sizes of /tmp and /dev/shm.
    network: whether the job has the machine's network; otherwise the job has its own loopback. io_uring:
    whether the job may use io_uring. binds: further paths that the job may read. devices: the GPU's paths.
    """

    runs_as: Identity | None
    tmp_bytes: int
    shm_bytes: int
    network: bool = False
    io_uring: bool = False
    binds: tuple[Path, ...] = ()
    devices: tuple[Path, ...] = ()


def slot_sandbox(
    config: Config, spec: SlotSpec, runs_as: Identity | None, devices: tuple[Path, ...] = ()
) -> Sandbox:
    """Give the sandbox of a slot's jobs, whatever `sandbox.mode` is."""
    return Sandbox(
        runs_as=runs_as,
        tmp_bytes=config.sandbox.tmp_mb * MIB,
        shm_bytes=config.sandbox.shm_mb * MIB,
        # All other policies get no network.
        network=spec.egress == "open",
        io_uring=spec.io_uring,
        binds=tuple(map(Path, spec.binds)),
        devices=devices,
    )


class Enclosed(Struct, frozen=True):
    """The command that runs a program in its sandbox, with its descriptors; `how_it_ended` reads `status`.

    Before the exec, the process calls `make_mounts` as the job's user.
    """

    argv: list[str]
    fds: dict[int, int]
    status: int
    make_mounts: Callable[[], None]


def enclose(
    sandbox: Sandbox,
    job: Path,
    argv: Sequence[str],
    binds: Sequence[Path],
    used: Collection[int],
    stack: ExitStack,
) -> Enclosed:
    """Put a program into the sandbox.

    Args:
        sandbox: the slot's sandbox.
        job: the job's directory.
        argv: the program with its arguments, with paths inside the sandbox.
        binds: further paths that the job may read.
        used: the program's own descriptors.
        stack: closes the new descriptors.

    Raises:
        MinerError: libseccomp is missing.
        OSError: no descriptor or memory is left.
    """
    status, told = _status_pipe(sandbox, stack)
    files = _etc_files(sandbox, stack)
    fds = {STATUS_FD: told, FILTER_FD: filter_fd(io_uring=sandbox.io_uring)}
    stack.callback(os.close, fds[FILTER_FD])
    fds |= {FIRST_FILE_FD + i: fd for i, fd in enumerate(files.values())}
    free = next(fd for fd in range(FIRST_FILE_FD) if fd not in {*used, STATUS_FD})
    words = [
        *(BWRAP, *_namespaces(sandbox), *_view(sandbox, binds)),
        *(word for i, name in enumerate(files) for word in ("--file", str(FIRST_FILE_FD + i), name)),
        *(word for name in OF_JOB for word in ("--bind", str(job / name), str(HOME / name))),
        *("--remount-ro", "/", "--chdir", str(HOME / "work"), "--seccomp", str(FILTER_FD)),
        *("--", TIME, "-f", "", "-o", f"/proc/self/fd/{STATUS_FD}", "--"),
        *("/bin/sh", "-c", _SHUT.format(free), "sh", *argv),
    ]
    return Enclosed(words, fds, status, partial(make_mounts, sandbox.tmp_bytes, sandbox.shm_bytes))


def how_it_ended(status: int, ended: ExitStatus) -> ExitStatus:
    """Give the exit of the program in a sandbox, from `Enclosed.status` and bubblewrap's exit `ended`."""
    said = b""
    with suppress(BlockingIOError):
        said = os.read(status, 4096)
    # Use the last line. The job can write here as well, but gains nothing: it could really end so.
    if found := re.findall(rb"(?m)^Command terminated by signal (\d{1,2})$", said):
        return ExitStatus(signal=int(found[-1]))
    if said or ended.status is None:
        return ended
    if ended.status > _BY_SIGNAL:
        # The worker or somebody else killed the first process itself.
        return ExitStatus(signal=ended.status - _BY_SIGNAL)
    return ExitStatus(ended.status, killed_for=SANDBOX_FAILED)


def lacking_packages() -> list[str]:
    """List the missing Debian packages that the sandbox needs."""
    return [package for program, package in PACKAGES.items() if not os.access(program, os.X_OK)]


def why_not(sandbox: Sandbox) -> str | None:
    """Try the sandbox out; give None if it works, else cause and remedy."""
    if lacking := lacking_packages():
        return f"no {' and no '.join(lacking)}; `apt-get install {' '.join(lacking)}`"
    user = sandbox.runs_as
    whose = {} if user is None else {"user": user.uid, "group": user.gid, "extra_groups": []}
    try:
        with ExitStack() as stack:
            rules = filter_fd(io_uring=sandbox.io_uring)
            stack.callback(os.close, rules)
            words = [BWRAP, *_namespaces(sandbox), *_view(sandbox, ())]
            tried = subprocess.run(  # no word comes from outside
                [*words, "--remount-ro", "/", "--seccomp", str(rules), "--", TIME, "-f", "", "/usr/bin/true"],
                env={},
                cwd="/",
                stdin=subprocess.DEVNULL,
                capture_output=True,
                pass_fds=[rules],
                timeout=TRY_S,
                check=False,
                preexec_fn=partial(_make_mounts_or_say, sandbox),
                **whose,  # type: ignore[call-overload]
            )
    except (OSError, subprocess.SubprocessError) as error:
        return f"cannot start {BWRAP}: {error}; see `aitbc-miner doctor`"
    if tried.returncode == 0:
        return None
    said = tried.stderr.decode("utf-8", "replace").strip().splitlines() or [f"{BWRAP} printed no cause"]
    return f"{said[-1][:300]}; users must be able to make namespaces, see `aitbc-miner doctor`"


def _make_mounts_or_say(sandbox: Sandbox) -> None:
    try:
        make_mounts(sandbox.tmp_bytes, sandbox.shm_bytes)
    except OSError as error:
        os.write(2, str(error.strerror).encode())
        os._exit(1)


def _status_pipe(sandbox: Sandbox, stack: ExitStack) -> tuple[int, int]:
    status, told = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    stack.callback(os.close, status)
    stack.callback(os.close, told)
    # GNU time opens the pipe by name, so the job's user must own the pipe.
    os.set_blocking(told, True)
    if sandbox.runs_as is not None:
        os.fchown(told, sandbox.runs_as.uid, sandbox.runs_as.gid)
    return status, told


def _namespaces(sandbox: Sandbox) -> Iterator[str]:
    yield from ("--unshare-user", "--unshare-pid", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup")
    # In the namespace of `make_mounts` the job's user is root.
    uid, gid = _ids(sandbox)
    yield from ("--uid", str(uid), "--gid", str(gid))
    if not sandbox.network:
        yield "--unshare-net"
    # With a new session, a job cannot type into an operator's terminal.
    yield from ("--new-session", "--die-with-parent", "--as-pid-1", "--hostname", "job")
    # The miner may run its jobs as root.
    yield from ("--cap-drop", "ALL")


def _view(sandbox: Sandbox, binds: Sequence[Path]) -> Iterator[str]:
    yield from ("--ro-bind", "/usr", "/usr")
    for name in _LIBRARIES:
        place = Path("/", name)
        if place.is_symlink():
            yield from ("--symlink", str(place.readlink()), str(place))
        elif place.is_dir():
            yield from ("--ro-bind", str(place), str(place))
    yield from ("--proc", "/proc", *_machine_in_proc(), "--tmpfs", "/dev", *_dev())
    yield from ("--bind", str(TMP), "/tmp", *_card(sandbox.devices), "--remount-ro", "/dev")  # noqa: S108
    for path in etc_shown(network=sandbox.network):
        yield from ("--ro-bind-try", str(path), str(path))
    for name in _SYS:
        yield from ("--ro-bind-try", f"/sys/{name}", f"/sys/{name}")
    for path in (*sandbox.binds, *binds):
        yield from ("--ro-bind", str(path), str(path))


def etc_shown(*, network: bool) -> Iterator[Path]:
    """List the paths of `ETC`; a pattern gives only existing paths."""
    for names in (*ETC, *([ETC_OF_NETWORK] if network else ())):
        for name in names.split():
            # Most names are no pattern, so no directory is read.
            yield from Path("/etc").glob(name) if "*" in name else [Path("/etc", name)]


def _machine_in_proc() -> Iterator[str]:
    """Hide or write-protect the machine's part of /proc; some of its files give orders to the kernel.

    The choice follows the existing files, because each kernel has other files.
    """
    with os.scandir("/proc") as entries:
        for entry in entries:
            name, path = entry.name, entry.path
            if name.isdecimal() or entry.is_symlink() or name in _PROC_OWN:
                continue
            # The entry's own mode: in a container, another file may be mounted over the directory's entry.
            mode = entry.stat().st_mode
            if name in _PROC_SHOWN or (stat.S_ISREG(mode) and mode & _WRITABLE):
                yield from ("--ro-bind", path, path)
            elif stat.S_ISDIR(mode):
                yield from ("--ro-bind", str(NO_DIRECTORY), path)
            elif name in _PROC_HIDDEN or not stat.S_ISREG(mode):
                yield from ("--ro-bind", str(NO_FILE), path)


def _dev() -> Iterator[str]:
    for name in _DEVICES:
        yield from ("--dev-bind", f"/dev/{name}", f"/dev/{name}")
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        yield from ("--symlink", f"/proc/self/fd/{number}", f"/dev/{name}")
    yield from ("--symlink", "/proc/self/fd", "/dev/fd", "--symlink", "pts/ptmx", "/dev/ptmx")
    yield from ("--dev-bind", str(PTS), "/dev/pts", "--bind", str(SHM), "/dev/shm")  # noqa: S108


def _card(parts: Sequence[Path]) -> Iterator[str]:
    """Show the existing paths of a card; see `gpu.job_view`."""
    if parts:
        yield from ("--tmpfs", "/proc/driver")
    for path in parts:
        if path.is_relative_to("/dev"):
            yield from ("--dev-bind-try", str(path), str(path))
        elif path.is_symlink():
            real = str(path.resolve())
            yield from ("--symlink", str(path.readlink()), str(path), "--ro-bind-try", real, real)
        else:
            yield from ("--ro-bind-try", str(path), str(path))
    if parts:
        yield from ("--remount-ro", "/proc/driver")


def _etc_files(sandbox: Sandbox, stack: ExitStack) -> dict[str, int]:
    uid, gid = _ids(sandbox)
    contents = {
        "/etc/passwd": f"job:x:{uid}:{gid}:job:{HOME}/work:/usr/sbin/nologin\n",
        "/etc/group": f"job:x:{gid}:\n",
        "/etc/hosts": "127.0.0.1 localhost job\n::1 localhost job\n",
        "/etc/nsswitch.conf": "passwd: files\ngroup: files\nhosts: files dns\n",
    }
    return {name: in_memory(text.encode(), stack) for name, text in contents.items()}


def _ids(sandbox: Sandbox) -> tuple[int, int]:
    user = sandbox.runs_as
    return (user.uid, user.gid) if user else (os.getuid(), os.getgid())


def in_memory(content: bytes, stack: ExitStack) -> int:
    """Give a descriptor for reading `content` from memory; `stack` closes the descriptor."""
    fd = os.memfd_create("aitbc", os.MFD_CLOEXEC)
    stack.callback(os.close, fd)
    with os.fdopen(fd, "wb", closefd=False) as file:
        file.write(content)
    os.lseek(fd, 0, os.SEEK_SET)
    return fd
