"""Boots the laboratory's machine in QEMU: its input, QEMU itself, and its output."""

import contextlib
import enum
import io
import math
import os
import select
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import termios
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, NamedTuple, Self

from tools.vm_lab import debian
from tools.vm_lab.cache import BIG, LabError, call, die_with_parent, say

NO_STATUS = 125
TIMED_OUT = 124
# An emulated machine takes its time to stop what runs and to pack the reports.
STOPPING_S = 15.0
STOPPING_ATTEMPTS = 8
ENDING_S = 5.0
REPORTS_SIZE = SCRATCH_SIZE = 512 << 20
# Neither sources nor small; .git alone would double what has to be unpacked in the machine.
NOT_CARRIED = (
    ".git", ".venv*", "build", "dist", "*.egg-info",
    "__pycache__", ".*_cache", ".hypothesis", ".coverage*", "htmlcov",
)  # fmt: skip

# The exit status comes from systemd, by the environment of ExecStopPost=. A command that reboots the machine
# is run again after it; all that is on the disk is still there.
COLLECT = """\
exec >/dev/console 2>&1
systemctl list-jobs | grep -q reboot.target && exit
journalctl --no-pager -o short-monotonic >/reports/journal.txt
echo "$EXIT_CODE $EXIT_STATUS" >/lab/status
tar -cf /dev/disk/by-id/virtio-reports -C /lab status -C / reports
sync /dev/disk/by-id/virtio-reports
systemctl poweroff --force --force
"""
GUEST = {
    "AITBC_REPORTS": "/reports",
    "AITBC_TEST_PYTHON": "/opt/test-env/bin/python",
    "AITBC_WHEELS": "/wheels",
    "HOME": "/root",
    "LANG": "C.UTF-8",
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
}


def guest_script(command: list[str], environment: Mapping[str, str], *, live: bool) -> str:
    """Give the shell script that runs the command in the machine; `live`: send its output to the host."""
    # On the disk before anything is run: the power may be cut at any time from here on.
    lines = [f"export {name}={shlex.quote(value)}" for name, value in {**GUEST, **environment}.items()]
    boots = "echo boot >>/lab/boots; sync -f /lab/boots; export AITBC_VM_BOOT=$(wc -l </lab/boots)"
    output = ["exec >/dev/virtio-ports/lab 2>&1"] if live else []
    return "\n".join([*lines, boots, *output, "cd /src", f"exec {shlex.join(command)}", ""])


def copy(checkout: Path, target: Path) -> None:
    """Copy the files of a checkout for the machine.

    Raises:
        LabError: a file cannot be read.
    """
    try:
        shutil.copytree(checkout, target, symlinks=True, ignore=shutil.ignore_patterns(*NOT_CARRIED))
    except shutil.Error as error:
        # An editor or another test may take a file away while we copy.
        kept = [f"{source}: {cause}" for source, _, cause in error.args[0] if os.path.lexists(source)]
        if kept:
            raise LabError("cannot copy the checkout: " + "; ".join(kept)) from error


def pack(target: IO[bytes], sources: Path, wheels: Path, script: str) -> None:
    """Write the machine's tar: the sources as /src, the wheels beside the image's wheels, the scripts."""
    with tarfile.open(fileobj=target, mode="w", format=tarfile.PAX_FORMAT) as tar:
        tar.add(sources, "src", filter=_as_root)
        tar.add(wheels, "wheels", filter=_as_root)
        for name, text in {"command": script, "collect": COLLECT}.items():
            info = tarfile.TarInfo(f"lab/{name}")
            info.size = len(text.encode())
            tar.addfile(info, io.BytesIO(text.encode()))
    target.flush()


def _as_root(info: tarfile.TarInfo) -> tarfile.TarInfo:
    info.uid = info.gid = 0
    info.uname = info.gname = "root"
    return info


class Files(NamedTuple):
    """The files of QEMU, by descriptor. They have no names, so that they vanish however the process ends.

    `root` holds the machine's changes to the image.
    """

    root: IO[bytes]
    payload: IO[bytes]
    reports: IO[bytes]
    scratch: IO[bytes]
    console: IO[bytes]

    @classmethod
    def make(cls, stack: contextlib.ExitStack) -> Self:
        """Open all files empty; the disks have their sizes."""
        opened = (tempfile.TemporaryFile(dir=BIG) for _ in cls._fields)  # noqa: SIM115 - the stack closes them
        made = cls(*map(stack.enter_context, opened))
        os.truncate(made.reports.fileno(), REPORTS_SIZE)
        os.truncate(made.scratch.fileno(), SCRATCH_SIZE)
        return made

    def saved_console(self, path: Path) -> str:
        """Give the console output of kernel and systemd, and write it to the file."""
        self.console.seek(0)
        data = self.console.read()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        return data.decode(errors="replace")


def lay_over(image: Path, files: Files) -> None:
    """Make the machine's root disk: the image, and a file of this run for all changes.

    In QEMU's own format, unflushed writes may be lost when QEMU is killed, as with a disk's cache: QEMU
    records the places of new blocks at the next flush.
    """
    descriptor = files.root.fileno()
    backing = ["-b", str(image.absolute() / "root.img"), "-F", "raw"]
    call(["qemu-img", "create", "-q", "-f", "qcow2", *backing, _name(descriptor)], keep=[descriptor])


def qemu_command(image: Path, files: Files, ports: Mapping[str, int]) -> list[str]:
    """Give QEMU's command line.

    `ports` map NAME to the file for the machine's output to /dev/virtio-ports/NAME; without ports, the
    console is on the terminal.
    """
    # An emulated kernel may panic early, before it has a way to tell QEMU: then it starts once more.
    # What protects a processor from its own faults only costs where the processor is emulated.
    append = "root=/dev/vda rw console=ttyS0 quiet loglevel=3 panic=-1 mitigations=off"
    drives = {
        # What the machine has flushed is to be there after a power cut, so nothing here may say cache=unsafe.
        "root": f"file={_name(files.root.fileno())},format=qcow2",
        "payload": f"file={_name(files.payload.fileno())},format=raw,snapshot=on",
        "reports": f"file={_name(files.reports.fileno())},format=raw",
        "scratch": f"file={_name(files.scratch.fileno())},format=raw",
    }
    # fmt: off
    command = [
        "qemu-system-x86_64", "-accel", "tcg,thread=multi", "-cpu", "max", "-smp", "2", "-m", "3072",
        "-nodefaults", "-no-user-config", "-display", "none", "-nic", "none",
        "-kernel", f"{image}/vmlinuz", "-initrd", f"{image}/initrd",
        "-append", append if ports else f"{append} lab.shell",
        # A reboot is one; after a panic it ends.
        "-device", "pvpanic-pci", "-action", "panic=shutdown",
        "-device", "virtio-rng-pci",
    ]
    for name, options in drives.items():
        command += ["-drive", f"{options},if=none,id={name}",
                    "-device", f"virtio-blk-pci,drive={name},serial={name}"]
    if not ports:
        return [*command, "-serial", "mon:stdio"]
    console = _name(files.console.fileno())
    command += [
        "-monitor", "stdio",
        "-chardev", f"file,id=console,path={console},append=on", "-serial", "chardev:console",
        "-device", "virtio-serial-pci",
    ]
    for name, descriptor in ports.items():
        command += ["-chardev", f"file,id={name},path={_name(descriptor)}",
                    "-device", f"virtserialport,chardev={name},name={name}"]
    return command
    # fmt: on


def _name(descriptor: int) -> str:
    return f"/proc/self/fd/{descriptor}"


class Ended(enum.Enum):
    """The end of a boot."""

    ITSELF = enum.auto()
    CUT = enum.auto()
    LATE = enum.auto()


def run(image: Path, files: Files, timeout: float) -> bool:
    """Boot, copy the command's output to stdout, and wait for the end; False after the time-out.

    After each power cut the machine boots again with the same disks.
    """
    deadline = time.monotonic() + timeout
    while (ended := _boot(image, files, deadline)) is Ended.CUT:
        say("the power was cut; booting again")
    return ended is Ended.ITSELF


def _boot(image: Path, files: Files, deadline: float) -> Ended:
    with _pipe() as (live, lab), _pipe() as (asked, power):
        command = qemu_command(image, files, {"lab": lab.fileno(), "power": power.fileno()})
        with _qemu(command, files, lab.fileno(), power.fileno(), quiet=True) as qemu:
            lab.close()
            power.close()
            ended = _watch(qemu, live.fileno(), asked.fileno(), deadline)
            if ended is not Ended.LATE:
                return ended
            for _ in range(STOPPING_ATTEMPTS):
                # As the button on the case does: what runs is told to stop, and the journal still comes out.
                # While the machine boots nobody listens yet.
                assert qemu.stdin
                with contextlib.suppress(BrokenPipeError):
                    qemu.stdin.write(b"system_powerdown\n")
                stopped = _watch(qemu, live.fileno(), asked.fileno(), time.monotonic() + STOPPING_S)
                if stopped is not Ended.LATE:
                    break
    return Ended.LATE


@contextlib.contextmanager
def _pipe() -> Iterator[tuple[IO[bytes], IO[bytes]]]:
    reader, writer = os.pipe()
    with os.fdopen(reader, "rb") as ours, os.fdopen(writer, "wb") as theirs:
        yield ours, theirs


def console(image: Path, files: Files) -> None:
    """Boot with a console on this terminal, and wait for the end."""
    terminal = termios.tcgetattr(sys.stdin) if sys.stdin.isatty() else None
    try:
        with _qemu(qemu_command(image, files, {}), files) as qemu:
            qemu.wait()
    finally:
        if terminal:
            termios.tcsetattr(sys.stdin, termios.TCSADRAIN, terminal)


@contextlib.contextmanager
def _qemu(
    command: list[str], files: Files, *keep: int, quiet: bool = False
) -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(
        command,
        bufsize=0,
        env={**os.environ, "PATH": debian.SEARCH},
        stdin=subprocess.PIPE if quiet else None,
        stdout=subprocess.DEVNULL if quiet else None,
        pass_fds=[*(file.fileno() for file in files), *keep],
        preexec_fn=die_with_parent(),  # noqa: PLW1509 - there are no threads here
    ) as qemu:
        try:
            yield qemu
            # A reader sees the end of its output a moment before it ends.
            with contextlib.suppress(subprocess.TimeoutExpired):
                qemu.wait(ENDING_S)
        finally:
            qemu.kill()


def _watch(qemu: subprocess.Popen[bytes], live: int, asked: int, deadline: float) -> Ended:
    """Copy output to stdout until QEMU ends; cut the power after the requested milliseconds."""
    cut_at = math.inf
    ended = Ended.ITSELF
    while (at := time.monotonic()) < deadline:
        if at >= cut_at:
            qemu.kill()
            ended, cut_at = Ended.CUT, math.inf
        ready = select.select([live, asked], [], [], min(deadline, cut_at) - at)[0]
        # At its end both are ready, and there is nothing more to be asked for.
        if asked in ready and (words := os.read(asked, 64).split()):
            cut_at = time.monotonic() + int(words[-1]) / 1000
        if live in ready:
            data = os.read(live, 1 << 16)
            if not data:
                return ended
            sys.stdout.buffer.write(data)
            sys.stdout.buffer.flush()
    return Ended.LATE


def take_out(reports: IO[bytes], directory: Path) -> int | None:
    """Unpack the reports into the directory; give the command's exit status, or None without a status."""
    status = None
    reports.seek(0)
    with contextlib.suppress(tarfile.ReadError), tarfile.open(fileobj=reports, mode="r:") as tar:
        for member in tar:
            parts = Path(member.name).parts
            content = tar.extractfile(member) if member.isreg() else None
            if content is None:
                continue
            if member.name == "status":
                status = parse_status(content.read().decode())
            # What ran in there was root, but only in there.
            elif parts[0] == "reports" and ".." not in parts:
                target = directory.joinpath(*parts[1:])
                target.parent.mkdir(parents=True, exist_ok=True)
                with target.open("wb") as file:
                    shutil.copyfileobj(content, file)
    return status


def parse_status(text: str) -> int:
    """Give the shell's exit status for systemd's text: 'exited 7', 'killed TERM'."""
    code, _, status = text.strip().partition(" ")
    if code == "exited":
        return int(status)
    return 128 + (int(status) if status.isdigit() else signal.Signals[f"SIG{status}"])
