"""Whether jobs see in their sandbox what a program needs, and what there is no plain file: for `check`."""

import os
import re
import stat
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

from aitbc_miner.sandbox.bubblewrap import etc_shown

# Directories that a sandbox has by itself, some of them as links.
_PLACES = ("/usr", "/bin", "/sbin", "/lib", "/lib64")
# Whose directories are no single program's.
_SHARED = frozenset(map(Path, ("/", "/usr", "/usr/local", "/usr/lib", "/usr/share", "/opt", "/srv", "/home")))
LDD = "/usr/bin/ldd"
_LDD_S = 10.0
_NOBODY = 65534
_MAX_LINKS = 40
# How much is looked at, and how much of one kind is named.
_LOOKED_AT, _NAMED = 20_000, 3
_KINDS = {
    stat.S_IFSOCK: "a socket",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def needs(program: Path) -> list[Path]:
    """Name the files that a program needs: itself, interpreter, libraries, what its own links lead to."""
    return (
        [program, *_interpreter(program), *_libraries(program), *_linked(program)] if program.exists() else []
    )


def unseen(binds: Sequence[Path], needed: Sequence[Path]) -> list[Path]:
    """Give what of these files jobs with these `binds` do not see; without the first no more is said."""
    places = [*map(Path, _PLACES), *etc_shown(network=False), *binds]
    found = [hidden for path in needed if (hidden := _hidden(places, path))]
    first = needed and _hidden(places, needed[0])
    return found[:1] if first else list(dict.fromkeys(found))[:_NAMED]


def special(top: Path) -> Iterator[str]:
    """Say which sockets, FIFOs and devices are bound: that this is read-only does not hold for them."""
    found = ((path, _KINDS.get(stat.S_IFMT(info.st_mode))) for path, info in _all_in(top))
    named = [
        f"{path} is {kind}, which jobs can use though they cannot write there" for path, kind in found if kind
    ]
    yield from named[:_NAMED]


def _hidden(places: Sequence[Path], path: Path) -> Path | None:
    """Give what of the way to a file no job sees, link by link; None when there is nothing."""
    for _ in range(_MAX_LINKS):
        if not any(path.is_relative_to(place) for place in places):
            return path
        if not path.is_symlink():
            break
        path = Path(os.path.normpath(path.parent / path.readlink()))
    real = path.resolve()
    return None if any(real.is_relative_to(place.resolve()) for place in places) else real


def _interpreter(program: Path) -> Iterator[Path]:
    with program.open("rb") as file:
        first = file.readline(256)
    if found := re.match(rb"#!\s*(/\S+)", first):
        yield Path(os.fsdecode(found[1]))


def _libraries(program: Path) -> Iterator[Path]:
    """Ask the loader, as nobody: it runs a part of the program."""
    whose = {"user": _NOBODY, "group": _NOBODY, "extra_groups": []} if os.geteuid() == 0 else {}
    try:
        done = subprocess.run(
            [LDD, program],
            env={"LC_ALL": "C"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_LDD_S,
            check=False,
            **whose,  # type: ignore[call-overload]
        )
    except (OSError, subprocess.SubprocessError):
        return
    for name in re.findall(rb"(?m)(?:=> |^\s+)(/.+) \(0x[0-9a-f]+\)$", done.stdout):
        yield Path(os.fsdecode(name))


def _linked(program: Path) -> Iterator[Path]:
    """Name what links in a program's own directories lead to, as of Java's to its settings in /etc."""
    own = program.resolve().parent
    own = own.parent if own.name in {"bin", "sbin"} else own
    if own not in _SHARED and own.parent not in {Path("/"), Path("/usr")}:
        for path, info in _all_in(own):
            if stat.S_ISLNK(info.st_mode) and path.exists():
                yield path


def _all_in(top: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """Go through a directory, through no link and up to a bound; what is shut to us is left out."""
    left = _LOOKED_AT
    waiting = [top]
    while waiting and left > 0:
        path = waiting.pop()
        left -= 1
        try:
            info = path.lstat()
            yield path, info
            if stat.S_ISDIR(info.st_mode):
                waiting += [Path(entry) for entry in list(map(os.fspath, path.iterdir()))[:left]]
        except OSError:
            continue
