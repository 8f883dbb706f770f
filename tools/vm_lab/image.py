"""Makes the images of the laboratory: the list of packages, the recipe, and the wheels."""

import contextlib
import fcntl
import os
import re
import shlex
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tools.vm_lab.cache import BIG, LabError, call, digest, entry, say


class Release(NamedTuple):
    """A Debian release and its Python."""

    number: str
    codename: str
    python: str


RELEASES = {"12": Release("12", "bookworm", "3.11.2"), "13": Release("13", "trixie", "3.13.5")}
PACKAGES = (
    "bubblewrap", "dbus", "e2fsprogs", "iproute2", "kmod", "linux-image-cloud-amd64", "nftables", "passwd",
    "procps", "python3", "python3-venv", "systemd", "systemd-sysv", "time", "udev",
    "util-linux",
)  # fmt: skip
IMAGE_SIZE = "4G"
# Checks that are made on the host: the machine only runs tests.
NOT_IN_GUEST = re.compile(
    r"jsonschema|mypy|numpy|ruff|pytest-cov|pytest-xdist|execnet|types-|ast-serialize|librt|pathspec|rpds-py"
)
# Published as source only; it is plain Python, so that the host's wheel of it fits every release.
SOURCE_ONLY = "cgroupspy"

# A type of its own: `oneshot` would keep systemd "starting", and whoever waits for the end of that, for ever.
# On so small a Debian, multi-user.target does not mean that udev has got through the devices.
# What the command left behind ends with it, and the collector runs whatever way it ended.
UNIT = """\
[Unit]
Description=The laboratory's command
After=multi-user.target
ConditionKernelCommandLine={condition}

[Service]
Type=exec
ExecStartPre=udevadm settle
ExecStartPre=/bin/sh -c 'test -e /lab/collect || tar -xf /dev/disk/by-id/virtio-payload -C /'
ExecStart=/bin/sh /lab/command
ExecStopPost=/bin/sh /lab/collect
TimeoutStopSec=30
OOMPolicy=continue
TasksMax=infinity
Delegate=yes
{streams}

[Install]
WantedBy=multi-user.target
"""
UNITS = {
    "lab-run.service": UNIT.format(condition="!lab.shell", streams=""),
    "lab-shell.service": UNIT.format(
        condition="lab.shell",
        streams="StandardInput=tty\nStandardOutput=tty\nTTYPath=/dev/ttyS0\nTTYReset=yes\nTTYVHangup=no",
    ),
}
# Only what this machine is made of: a quarter of the usual initrd, which an emulated processor has to unpack.
INITRD = {"conf.d/lab": "MODULES=list\n", "modules": "virtio_pci\nvirtio_blk\next4\n"}
# What would cost time or take the console away.
MASKED = (
    "serial-getty@ttyS0.service", "getty@tty1.service", "apt-daily.timer", "apt-daily-upgrade.timer",
    "dpkg-db-backup.timer", "e2scrub_all.timer", "e2scrub_reap.service", "fstrim.timer",
    "systemd-firstboot.service", "systemd-timesyncd.service",
)  # fmt: skip


class Locked(NamedTuple):
    """A package of tools/locks; `text` is its line for pip, with the hashes."""

    name: str
    version: str
    text: str


LOCKED = re.compile(
    r"^(?P<name>[a-z0-9-]+)==(?P<version>[^ ;]+)"
    r"(?: ; python_full_version (?P<than><|>=) '(?P<bound>[0-9.]+)')?"
    r" (?P<hashes>(?:\\\n +--hash=\S+ ?)+)",
    re.MULTILINE,
)


def requirements(checkout: Path, release: Release) -> list[Locked]:
    """Give the requirements of the package and its tests in the machine, from the lock file, for that Python.

    pip would evaluate the conditions for the Python that runs pip, not for the machine's Python.
    """
    text = (checkout / "tools" / "locks" / "test.lock").read_text()
    found = list(LOCKED.finditer(text))
    if len(found) != text.count("=="):
        raise LabError("cannot read tools/locks/test.lock: a line of unknown form; see LOCKED in image.py")
    return [
        Locked(each["name"], each["version"], f"{each['name']}=={each['version']} {each['hashes']}\n")
        for each in found
        if _holds(each, release.python) and not NOT_IN_GUEST.match(each["name"])
    ]


def _holds(locked: re.Match[str], python: str) -> bool:
    if locked["bound"] is None:
        return True
    ours, bound = (tuple(map(int, version.split("."))) for version in (python, locked["bound"]))
    return ours < bound if locked["than"] == "<" else ours >= bound


def host_python(cache: Path) -> str:
    """Give a Python with pip and setuptools, which Debian's Python lacks."""
    lock = Path(__file__).parents[1] / "locks" / "build.lock"
    name = f"host-python-{digest(sys.version, sys.executable, lock.read_text())}"

    def build(directory: Path) -> None:
        call([sys.executable, "-m", "venv", str(directory)])
        pip = [str(directory / "bin" / "python"), "-m", "pip"]
        call([*pip, "install", "--require-hashes", f"--requirement={lock}"])

    return str(entry(cache, name, build) / "bin" / "python")


def wheelhouse(cache: Path, release: Release, checkout: Path) -> Path:
    """Give a directory with the wheels of all requirements, for the release's Python."""
    locked = requirements(checkout, release)
    # The newest C library that Debian 12 can serve.
    platforms = [f"--platform=manylinux_2_{minor}_x86_64" for minor in range(36, 4, -1)]
    old_names = [f"--platform=manylinux{year}_x86_64" for year in ("2014", "2010", "1")]
    target = [
        "--only-binary=:all:",
        f"--python-version={release.python}",
        "--implementation=cp",
        *platforms,
        *old_names,
        "--platform=any",
    ]

    def build(directory: Path) -> None:
        say(f"fetching the wheels for Debian {release.number}")
        source = [each for each in locked if each.name == SOURCE_ONLY]
        _fetch(cache, source, "wheel", f"--wheel-dir={directory}", "--no-build-isolation")
        _fetch(
            cache, [each for each in locked if each not in source], "download", f"--dest={directory}", *target
        )

    return entry(cache, f"wheels-{release.number}-{digest(locked, target)}", build)


def _fetch(cache: Path, locked: list[Locked], *command: str) -> None:
    with tempfile.NamedTemporaryFile("w", suffix=".lock") as file:
        file.write("".join(each.text for each in locked))
        file.flush()
        pip = [host_python(cache), "-m", "pip"]
        call([*pip, *command, "--no-deps", "--require-hashes", f"--requirement={file.name}"])


def project_wheel(cache: Path, sources: Path, target: Path) -> None:
    """Build the wheel of the package in `sources`; the build also writes into `sources`."""
    pip = [host_python(cache), "-m", "pip"]
    options = ["--no-deps", "--no-build-isolation", "--no-index", f"--wheel-dir={target}"]
    call([*pip, "wheel", *options, str(sources)])


def image(cache: Path, release: Release, checkout: Path) -> Path:
    """Give a directory with `root.img` (a sparse ext4), `vmlinuz` and `initrd` of the release."""
    needed = [f"{each.name}=={each.version}" for each in requirements(checkout, release)]
    hooks = (prepare_script(), finish_script(needed))
    key = digest(release, PACKAGES, hooks, IMAGE_SIZE)

    def build(directory: Path) -> None:
        wheels = wheelhouse(cache, release, checkout)
        say(f"making the image of Debian {release.number} (once, a minute or two)")
        _bootstrap(directory, release, wheels, *hooks)

    return entry(cache, f"image-{release.number}-{key}", build)


def _bootstrap(directory: Path, release: Release, wheels: Path, prepare: str, finish: str) -> None:
    # As root it mounts things into the new root: in a namespace of its own they cannot stay behind.
    mode = ["unshare", "--mount", "mmdebstrap", "--mode=root"]
    with _outputs(directory) as outputs:
        call(
            [
                *(mode if os.geteuid() == 0 else ["mmdebstrap", "--mode=unshare"]),
                "--variant=apt",
                "--format=null",
                f"--include={','.join(PACKAGES)}",
                '--aptopt=Acquire::Languages "none"',
                "--dpkgopt=path-exclude=/usr/share/doc/*",
                "--dpkgopt=path-exclude=/usr/share/man/*",
                "--dpkgopt=path-exclude=/usr/share/locale/*",
                f"--essential-hook={prepare}",
                f"--customize-hook=sync-in {shlex.quote(str(wheels))} /wheels",
                f"--customize-hook={finish}",
                release.codename,
            ],
            TMPDIR=BIG,
            keep=list(outputs.values()),
            **{name: f"/proc/self/fd/{descriptor}" for name, descriptor in outputs.items()},
        )


@contextlib.contextmanager
def _outputs(directory: Path) -> Iterator[dict[str, int]]:
    """Open the output files, for a build that runs as subordinate ids and cannot open them by name."""
    with contextlib.ExitStack() as stack:
        descriptors = {}
        for name in ("root.img", "vmlinuz", "initrd"):
            low = os.open(directory / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            # mmdebstrap hands the lowest free numbers to a shell that knows no number above 9.
            descriptor = fcntl.fcntl(low, fcntl.F_DUPFD_CLOEXEC, 100)
            os.close(low)
            stack.callback(os.close, descriptor)
            stack.callback(os.fchmod, descriptor, 0o644)
            os.fchmod(descriptor, 0o666)
            descriptors[f"LAB_{name.partition('.')[0].upper()}"] = descriptor
        yield descriptors


def prepare_script() -> str:
    """Give the hook that runs after the essential packages and before all others; $1 is the new root."""
    lines = ["set -e", 'mkdir -p "$1/etc/initramfs-tools/conf.d" "$1/wheels"']
    lines += [
        f'printf %s {shlex.quote(text)} >"$1/etc/initramfs-tools/{name}"' for name, text in INITRD.items()
    ]
    return "\n".join(lines)


def finish_script(needed: list[str]) -> str:
    """Give the hook that completes the root in $1 and writes image, kernel and initrd to $LAB_…."""
    units = "\n".join(
        f'printf %s {shlex.quote(text)} >"$1/etc/systemd/system/{name}"\n'
        f'ln -s ../{name} "$1/etc/systemd/system/multi-user.target.wants/{name}"'
        for name, text in UNITS.items()
    )
    return f"""set -e
chown -R 0:0 "$1/wheels"
chroot "$1" python3 -m venv /opt/test-env
chroot "$1" /opt/test-env/bin/pip install --quiet --no-index --no-deps --find-links=/wheels \\
  {shlex.join(needed)}
mkdir -p "$1/etc/systemd/system/multi-user.target.wants" "$1/var/log/journal" "$1/reports"
{units}
for unit in {" ".join(MASKED)}; do ln -sf /dev/null "$1/etc/systemd/system/$unit"; done
echo debian >"$1/etc/hostname"
echo '127.0.0.1 localhost debian' >"$1/etc/hosts"
rm -f "$1/etc/resolv.conf" "$1"/var/lib/apt/lists/*_*
: >"$1/etc/machine-id"
# Nothing is to be brought up to date at the first boot, which every boot is.
touch "$1/etc/.updated" "$1/var/.updated"
cat "$1"/boot/vmlinuz-* >"$LAB_VMLINUZ"
cat "$1"/boot/initrd.img-* >"$LAB_INITRD"
# Without what is mounted below it.
bare=$(mktemp -d)
mount --bind "$1" "$bare"
mke2fs -q -t ext4 -L root -d "$bare" "$LAB_ROOT" {IMAGE_SIZE}
umount "$bare"
rmdir "$bare"
"""
