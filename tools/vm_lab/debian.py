"""The Debian packages that this project's commands need beyond python3, and a check for missing packages.

As a program: prints the packages that are missing for the given uses, one a line.
"""

import importlib.util
import os
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

# An ordinary user's PATH has no sbin, where Debian keeps some of these.
SEARCH = os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/local/sbin", "/usr/sbin", "/sbin"))
INSTALL = "apt-get install --no-install-recommends"


class Need(NamedTuple):
    """A program or file, its package, and the uses that need it."""

    what: str
    package: str
    uses: str


# demo: tools/demo; test: tools/test; vm: tools/vm and tools/test --vm; user: the same, but not as root;
# container: the same as root.
NEEDS = (
    Need("bwrap", "bubblewrap", "demo test"),
    Need("/usr/bin/time", "time", "demo test"),
    Need("ip", "iproute2", "test"),
    Need("openssl", "openssl", "test"),
    Need("redis-server", "redis-server", "test"),
    Need("/usr/bin/ffmpeg", "ffmpeg", "test"),
    Need("/usr/bin/convert", "imagemagick", "test"),
    Need("strace", "strace", "test"),
    Need("qemu-system-x86_64", "qemu-system-x86", "vm"),
    Need("qemu-img", "qemu-utils", "vm"),
    Need("mmdebstrap", "mmdebstrap", "vm"),
    Need("mke2fs", "e2fsprogs", "vm"),
    Need("/usr/share/keyrings/debian-archive-keyring.gpg", "debian-archive-keyring", "vm"),
    Need("systemd-nspawn", "systemd-container", "container"),
    Need("newuidmap", "uidmap", "user"),
)


def missing(*uses: str) -> list[str]:
    """Give the missing packages for these uses."""
    wanted = [need for need in NEEDS if set(uses) & set(need.uses.split())]
    absent = [need.package for need in wanted if not _is_there(need.what)]
    if importlib.util.find_spec("ensurepip") is None:
        absent.append("python3-venv")
    return list(dict.fromkeys(absent))


def _is_there(what: str) -> bool:
    return Path(what).exists() if what.startswith("/") else shutil.which(what, path=SEARCH) is not None


if __name__ == "__main__":
    for package in missing(*sys.argv[1:]):
        print(package)
