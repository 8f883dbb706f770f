"""What decides which code runs: the files on the way to a program, and a few environment variables."""

import os
import re
import stat
from collections.abc import Collection, Iterator
from pathlib import Path

# What loaders, shells and interpreters obey, and what the node itself sets.
_RESERVED = re.compile(
    r"(LD_|PYTHON|AITBC_|GLIBC_|GCONV_|BASH|NVIDIA_).*"
    r"|PATH|HOME|TMPDIR|LANG|IFS|ENV|SHELLOPTS|CUDA_VISIBLE_DEVICES|CUDA_DEVICE_ORDER"
)
_ENV_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,127}")

# What no job may read, or what its sandbox has of its own.
_NOT_SHOWN = ("/proc", "/sys", "/dev", "/run", "/tmp", "/job", "/root", "/etc/aitbc", "/var/lib/aitbc")  # noqa: S108


TREE_MAX = 10_000
"""How many files `distrust_tree` looks at before it refuses."""


def parse_bind(value: object) -> Path:
    """Read a directory or file that jobs may read besides what is in their sandbox.

    Raises:
        ValueError: it is no plain absolute path, or is, holds or is in what jobs must not see.
    """
    path = Path(value) if isinstance(value, str) else Path()
    # Two slashes at the front are kept by pathlib, which then finds //etc in no directory that it knows.
    if path.root != "/" or ".." in path.parts or not str(path).isprintable():
        raise ValueError("must be an absolute path without `..`, such as /srv/models")
    for place in map(Path, _NOT_SHOWN):
        if path.is_relative_to(place) or place.is_relative_to(path):
            raise ValueError(f"would show jobs {place}, which they must not see; name a directory elsewhere")
    return path


def may_be_set(name: str) -> bool:
    """Whether an operator may let jobs set this environment variable at all."""
    return bool(_ENV_NAME.fullmatch(name)) and not _RESERVED.fullmatch(name)


def distrust(path: Path, also: Collection[int] = ()) -> str | None:
    """Say who else could change what `path` leads to; None when nobody but root, this user and `also` can.

    Every step the kernel takes is looked at, links and their targets included: whoever can write one of the
    directories on the way decides what is found at its end. Sticky directories, such as /tmp, are fine, since
    only its owner can replace an entry there, and the entry's owner is looked at next.

    Raises:
        OSError: a step is missing or not readable.
    """
    trusted = {0, os.geteuid(), *also}
    for step, info in _steps(path.absolute()):
        if info.st_uid not in trusted:
            return f"{step} belongs to user id {info.st_uid}"
        sticky = stat.S_ISDIR(info.st_mode) and info.st_mode & stat.S_ISVTX
        if info.st_mode & 0o022 and not sticky and not stat.S_ISLNK(info.st_mode):
            return f"{step} can be written by others (mode {stat.S_IMODE(info.st_mode):04o})"
    return None


def distrust_directory(path: Path) -> str | None:
    """Say who else could change a directory, what leads to it, or what is in it.

    Unlike on the way to it, a sticky directory will not do here: anybody may add to it.

    Raises:
        OSError: it is missing or not readable.
    """
    mode = path.stat().st_mode
    if problem := distrust(path):
        return problem
    return f"{path} can be written by others (mode {stat.S_IMODE(mode):04o})" if mode & 0o022 else None


def distrust_place(path: Path) -> str | None:
    """Say who else could put something at `path`, where there may be nothing yet.

    Raises:
        OSError: a step is not readable.
    """
    parent = path.absolute().parent
    try:
        problem, mode = distrust(parent), parent.stat().st_mode
    except FileNotFoundError:
        return distrust_place(parent)
    if problem:
        return problem
    try:
        return distrust(path) if mode & 0o022 or path.is_symlink() else None
    except FileNotFoundError:
        # What is at the end of /dev/stderr has no path.
        leads_nowhere = path.is_symlink() and not path.exists()
        return f"{path} leads nowhere, where others might make something" if leads_nowhere else None


def refusal(path: Path, also: Collection[int] = ()) -> str | None:
    """Say why a file that decides about what root or jobs do is not to be obeyed, and what mends that."""
    try:
        problem = distrust_directory(path) if path.is_dir() else distrust(path, also)
    except OSError as error:
        problem = error.strerror or str(error)
    what = "directory" if path.is_dir() else "file"
    return f"cannot trust this {what}: {problem}; mend that with chown or chmod" if problem else None


def distrust_tree(top: Path) -> str | None:
    """Say who else could change a directory, what leads to it, or anything in it, at any depth.

    Raises:
        OSError: something is missing or not readable, or there is too much to look at.
    """
    looked_at = 0
    waiting = [top]
    while waiting:
        directory = waiting.pop()
        if problem := distrust_directory(directory):
            return problem
        with os.scandir(directory) as entries:
            for entry in entries:
                looked_at += 1
                if looked_at > TREE_MAX:
                    raise OSError(f"more than {TREE_MAX} files in {top}; install packages elsewhere")
                path = Path(entry.path)
                if entry.is_dir():
                    waiting.append(path)
                elif entry.name.startswith(".#") and entry.is_symlink():
                    continue  # the lock of an editor, which leads nowhere and which no program reads
                elif not path.exists():
                    return f"{path} leads nowhere, where others might make something"
                elif problem := _distrust_entry(path, entry.stat(follow_symlinks=False)):
                    return problem
    return None


def _distrust_entry(path: Path, info: os.stat_result) -> str | None:
    # What leads here has been looked at. A link can lead anywhere, and goes the long way.
    plain = not stat.S_ISLNK(info.st_mode) and not info.st_mode & 0o022
    return None if plain and info.st_uid in {0, os.geteuid()} else distrust(path)


def _steps(path: Path, max_links: int = 40) -> Iterator[tuple[Path, os.stat_result]]:
    """Walk as the kernel does: each directory, each link, and the way that the link points."""
    here, ahead = Path("/"), list(reversed(path.parts[1:]))
    yield here, here.lstat()
    while ahead:
        part = ahead.pop()
        if part == "..":
            here = here.parent
            continue
        step = here / part
        info = step.lstat()
        yield step, info
        if not stat.S_ISLNK(info.st_mode):
            here = step
            continue
        max_links -= 1
        if not max_links:
            raise OSError(f"too many links on the way to {path}")
        target = step.readlink()
        if target.is_absolute():
            here = Path("/")
        ahead += reversed(target.parts[1:] if target.is_absolute() else target.parts)
