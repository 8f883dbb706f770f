"""A Debian of the laboratory as a container: the same image and tests, fast, on this machine's kernel.

systemd-nspawn boots the image's own systemd. The container has no disks, kernel modules or clock of its own,
and only the cgroup controllers that this machine delegates. Tests that need more are marked `own_kernel` and
need QEMU.
"""

import contextlib
import os
import shlex
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from tools.vm_lab import debian
from tools.vm_lab.cache import LabError, die_with_parent
from tools.vm_lab.qemu import TIMED_OUT, Files, take_out

BOOT_S = 60.0
# Neither of the units that run a command in QEMU has anything to do here.
MASKED = ("lab-run.service", "lab-shell.service")
# All mounts are made in a namespace of this container's own, and are gone with it. Where this machine has
# both versions of control groups, nspawn sees the second alone: it would make groups in the first as well.
MOUNTS = """\
set -e
mount --make-rprivate /
mount -t cgroup2 cgroup2 /sys/fs/cgroup
losetup --find >/dev/null
"""
ENTER = f"""\
{MOUNTS}
mkdir -p /run/systemd/nspawn
mount -t tmpfs tmpfs /run/systemd/nspawn
mount -t tmpfs tmpfs /mnt
mkdir /mnt/root
mount -o ro,loop,noload "$1" /mnt/root
shift
exec systemd-nspawn --directory=/mnt/root "$@"
"""
NSPAWN = (
    "--quiet", "--boot", "--volatile=overlay", "--private-network", "--register=no", "--keep-unit",
    "--machine=lab", "--console=pipe",
)  # fmt: skip


def why_not() -> str:
    """Give the cause why this machine cannot make containers; empty if no cause is known before the boot."""
    if os.geteuid() != 0:
        return "only root may make containers"
    if missing := debian.missing("container"):
        return f"packages are missing; as root: {debian.INSTALL} {' '.join(missing)}"
    tried = subprocess.run(
        ["unshare", "--mount", "sh", "-c", MOUNTS], capture_output=True, text=True, check=False
    )
    return tried.stderr.strip().rpartition("\n")[2] if tried.returncode else ""


def require() -> None:
    """Check that this machine can make containers.

    Raises:
        LabError: this machine cannot make containers.
    """
    if cause := why_not():
        raise LabError(f"cannot make a container: {cause}; use QEMU, without --container")


def run(image: Path, files: Files, timeout: float, directory: Path) -> int:
    """Boot, run the payload's command, copy the reports into `directory`, and give the exit status."""
    with _group() as group, _booted(image, files, group) as leader:
        files.payload.seek(0)
        subprocess.run([*_in(leader), "tar", "-xf", "-", "-C", "/"], stdin=files.payload, check=True)
        status = _command(leader, timeout)
        collect = "journalctl --no-pager -o short-monotonic >/reports/journal.txt; tar -cf - -C / reports"
        subprocess.run([*_in(leader), "sh", "-c", collect], stdout=files.reports, check=True)
    os.truncate(files.reports.fileno(), files.reports.tell())
    take_out(files.reports, directory)
    return status


def _in(leader: int) -> list[str]:
    return ["nsenter", f"--target={leader}", "--all", "env", f"PATH={debian.SEARCH}"]


def _command(leader: int, timeout: float) -> int:
    unit = ["systemd-run", "--quiet", "--wait", "--pipe", "-p", "Delegate=yes", "-p", "TasksMax=infinity"]
    with subprocess.Popen(
        [*_in(leader), *unit, "sh", "/lab/command"],
        stdin=subprocess.DEVNULL,
        preexec_fn=die_with_parent(),  # noqa: PLW1509 - there are no threads here
    ) as child:
        try:
            return child.wait(timeout)
        except subprocess.TimeoutExpired:
            return TIMED_OUT
        finally:
            child.kill()


@contextlib.contextmanager
def _booted(image: Path, files: Files, group: Path) -> Iterator[int]:
    """Boot the container in a group, and give the pid of its systemd."""
    masked = [f"systemd.mask={unit}" for unit in MASKED]
    enter = ["unshare", "--mount", "sh", "-c", ENTER, "-", f"{image.absolute()}/root.img", *NSPAWN, *masked]
    script = f"echo $$ >{shlex.quote(str(group))}/cgroup.procs; exec {shlex.join(enter)}"
    with subprocess.Popen(
        ["sh", "-c", script],
        env={"PATH": debian.SEARCH, "SYSTEMD_NSPAWN_UNIFIED_HIERARCHY": "1"},
        stdin=subprocess.DEVNULL,
        stdout=files.console,
        stderr=subprocess.STDOUT,
        preexec_fn=die_with_parent(),  # noqa: PLW1509 - there are no threads here
    ) as nspawn:
        try:
            yield _wait_booted(nspawn, files)
        finally:
            # All of it is in the group, and nothing of it outlives its first process.
            nspawn.send_signal(signal.SIGKILL)


def _wait_booted(nspawn: subprocess.Popen[bytes], files: Files) -> int:
    deadline = time.monotonic() + BOOT_S
    children = Path(f"/proc/{nspawn.pid}/task/{nspawn.pid}/children")
    while nspawn.poll() is None and time.monotonic() < deadline:
        for leader in map(int, children.read_text().split()):
            if _is_up(leader):
                return leader
        time.sleep(0.2)
    files.console.seek(0)
    said = files.console.read().decode(errors="replace")
    raise LabError(f"cannot boot a container; its last output:\n{said[-2000:]}")


def _is_up(leader: int) -> bool:
    command = [*_in(leader), "systemctl", "is-system-running"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=BOOT_S)
    return done.stdout.strip() in {"running", "degraded"}


@contextlib.contextmanager
def _group() -> Iterator[Path]:
    """Make a control group below this process's group, and remove it with its processes at the end."""
    mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    mount = next((Path(fields[1]) for fields in mounts if fields[2] == "cgroup2"), None)
    rows = Path("/proc/self/cgroup").read_text().splitlines()
    own = next((row.removeprefix("0::/") for row in rows if row.startswith("0::")), None)
    if mount is None or own is None:
        raise LabError("cannot make a container: this machine has no cgroup2 mount")
    group = mount / own / f"aitbc-lab-{os.getpid()}"
    group.mkdir()
    try:
        yield group
    finally:
        (group / "cgroup.kill").write_text("1")
        _remove(group)


def _remove(group: Path) -> None:
    deadline = time.monotonic() + BOOT_S
    while True:
        below = sorted((each for each in group.rglob("*") if each.is_dir()), reverse=True)
        try:
            for each in [*below, group]:
                each.rmdir()
        except OSError:
            # Its processes are on their way out.
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)
        else:
            return
