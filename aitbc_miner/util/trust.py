"""Checks who else could change a file or its directories, and which variables and paths jobs may get."""

import os
import re
import stat
from collections.abc import Collection, Iterator
from pathlib import Path

from aitbc_miner.util import fs

# Variables that control loaders, shells and interpreters, and variables that the node itself sets.
_RESERVED = re.compile(
    r"(LD_|PYTHON|AITBC_|GLIBC_|GCONV_|BASH|NVIDIA_).*"
    r"|PATH|HOME|TMPDIR|LANG|IFS|ENV|SHELLOPTS|CUDA_VISIBLE_DEVICES|CUDA_DEVICE_ORDER"
)
_ENV_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,127}")

# Directories that no job may read, or of which each sandbox has its own.
_NOT_SHOWN = ("/proc", "/sys", "/dev", "/run", "/tmp", "/job", "/root", "/etc/aitbc", "/var/lib/aitbc")  # noqa: S108


_DANGLING = "{} is a link to a missing file, which others could create"
TRUSTED = "only root and the miner's user may own or write to the path; use chown or chmod"
TREE_MAX = 10_000
"""`distrust_tree` checks at most so many files."""


def parse_bind(value: object) -> Path:
    """Parse the path of an additional directory or file for the sandboxes of jobs.

    Raises:
        ValueError: the path is not plain and absolute, or is, contains or is inside a hidden directory.
    """
    path = Path(value) if isinstance(value, str) else Path()
    # pathlib keeps two leading slashes, and then does not find //etc inside /etc.
    if path.root != "/" or ".." in path.parts or not str(path).isprintable():
        raise ValueError("must be an absolute path without `..`, such as /srv/models")
    for place in map(Path, _NOT_SHOWN):
        if path.is_relative_to(place) or place.is_relative_to(path):
            raise ValueError(f"would show {place} to jobs, which must not see it; name a directory elsewhere")
    return path


def may_be_set(name: str) -> bool:
    """Whether an operator may permit jobs to set this environment variable."""
    return bool(_ENV_NAME.fullmatch(name)) and not _RESERVED.fullmatch(name)


def distrust(path: Path, also: Collection[int] = ()) -> str | None:
    """Say who else could change the file at `path`; None if only root, this user and `also` could.

    The function checks each step of the kernel's lookup, including links and their targets: whoever can write
    a directory on the way can replace the file. A sticky directory, such as /tmp, passes: only its owner can
    replace an entry there, and the function checks the entry's owner next.

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
    """Say who else could change a directory, its entries, or the way to it; None as for `distrust`.

    The directory itself must not be sticky and writable, because then anybody may add entries.

    Raises:
        OSError: the directory is missing or not readable.
    """
    mode = path.stat().st_mode
    if problem := distrust(path):
        return problem
    return f"{path} can be written by others (mode {stat.S_IMODE(mode):04o})" if mode & 0o022 else None


def distrust_place(path: Path) -> str | None:
    """Say who else could create a file at `path`, which may be missing; None as for `distrust`.

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
        # /dev/stderr leads to an open file without a path, so lstat fails although the file exists.
        return _DANGLING.format(path) if path.is_symlink() and not path.exists() else None


def refusal(path: Path, also: Collection[int] = ()) -> str | None:
    """Say why the node must not use a file that controls root or jobs, with the remedy; None if it may."""
    try:
        problem = distrust_directory(path) if path.is_dir() else distrust(path, also)
    except OSError as error:
        problem = error.strerror or str(error)
    what = "directory" if path.is_dir() else "file"
    return f"cannot trust this {what}: {problem}; correct it with chown or chmod" if problem else None


def distrust_tree(top: Path) -> str | None:
    """Say who else could change a directory, the way to it, or an entry at any depth.

    Raises:
        OSError: an entry is missing or not readable, or the tree has more than TREE_MAX files.
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
                    raise OSError(f"{top} has more than {TREE_MAX} files; install packages elsewhere")
                path = Path(entry.path)
                if entry.is_dir():
                    waiting.append(path)
                elif entry.name.startswith(".#") and entry.is_symlink():
                    continue  # an editor's lock: a link without a target, which no program reads
                elif not path.exists():
                    return _DANGLING.format(path)
                elif problem := _distrust_entry(path, entry.stat(follow_symlinks=False)):
                    return problem
    return None


def _distrust_entry(path: Path, info: os.stat_result) -> str | None:
    # The caller has checked the directories above. A link may leave them, so `distrust` checks its whole way.
    plain = not stat.S_ISLNK(info.st_mode) and not info.st_mode & 0o022
    return None if plain and info.st_uid in {0, os.geteuid()} else distrust(path)


def _steps(path: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """Yield each directory and link that the kernel visits on the way to `path`, and the path's own entry."""
    here, ahead, max_links = Path("/"), list(reversed(path.parts[1:])), fs.MAX_LINKS
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
