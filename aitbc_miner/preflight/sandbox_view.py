"""For `check`: whether jobs see a program's files in their sandbox, and which special files they see."""

import os
import re
import stat
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

from aitbc_miner.preflight.network import NOBODY
from aitbc_miner.sandbox.bubblewrap import etc_shown

# The directories that every sandbox has, some of them as links.
_PLACES = ("/usr", "/bin", "/sbin", "/lib", "/lib64")
# Directories that several programs share.
_SHARED = frozenset(map(Path, ("/", "/usr", "/usr/local", "/usr/lib", "/usr/share", "/opt", "/srv", "/home")))
LDD = "/usr/bin/ldd"
_LDD_S = 10.0
_MAX_LINKS = 40
# The most files to look at, and the most files of one kind to name.
_LOOKED_AT, _NAMED = 20_000, 3
_KINDS = {
    stat.S_IFSOCK: "a socket",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def needs(program: Path) -> list[Path]:
    """List a program's files: the program, its interpreter, its libraries, the targets of its links."""
    return (
        [program, *_interpreter(program), *_libraries(program), *_linked(program)] if program.exists() else []
    )


def unseen(binds: Sequence[Path], needed: Sequence[Path]) -> list[Path]:
    """Give the files that jobs with these `binds` do not see; if the first is hidden, only the first."""
    places = [*map(Path, _PLACES), *etc_shown(network=False), *binds]
    found = [hidden for path in needed if (hidden := _hidden(places, path))]
    first = needed and _hidden(places, needed[0])
    return found[:1] if first else list(dict.fromkeys(found))[:_NAMED]


def special(top: Path) -> Iterator[str]:
    """Yield a warning for each bound socket, FIFO and device: a read-only bind does not restrict them."""
    found = ((path, _KINDS.get(stat.S_IFMT(info.st_mode))) for path, info in _all_in(top))
    named = [
        f"{path} is {kind}: jobs can use it although the bind is read-only" for path, kind in found if kind
    ]
    yield from named[:_NAMED]


def _hidden(places: Sequence[Path], path: Path) -> Path | None:
    """Follow a path link by link and give the first step that no job sees; None if jobs see the file."""
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
    """Ask the loader for the libraries, as nobody: the loader runs a part of the program."""
    whose = {"user": NOBODY, "group": NOBODY, "extra_groups": []} if os.geteuid() == 0 else {}
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
    """Yield the links in a program's own directories, such as Java's links to its settings in /etc."""
    own = program.resolve().parent
    own = own.parent if own.name in {"bin", "sbin"} else own
    if own not in _SHARED and own.parent not in {Path("/"), Path("/usr")}:
        for path, info in _all_in(own):
            if stat.S_ISLNK(info.st_mode) and path.exists():
                yield path


def _all_in(top: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """Walk a directory up to a bound, without following links; unreadable directories are skipped."""
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
