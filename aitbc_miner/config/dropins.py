"""Lists the files of drop-in directories such as slots.d and allowlist.d."""

import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from aitbc_miner.config.document import Fault
from aitbc_miner.util.trust import refusal

# Leftovers of editors and packages, and our own samples.
_LEFT = re.compile(r".*(~|\.(sample|bak|orig|rej|swp|tmp|(dpkg|ucf)-(new|old|dist|tmp)))")


class DropIns(NamedTuple):
    """A directory's files in their order, its files with another ending, and whether it has samples only."""

    files: list[Path]
    strange: list[Path]
    empty: bool

    def warnings(self, suffix: str = ".yaml") -> Iterator[Fault]:
        """Yield a warning for each file that the operator probably meant, but the node does not read."""
        for path in self.strange:
            remedy = f"rename it to {path.stem}{suffix}" if path.suffix == ".yml" else "rename or remove it"
            cause = "it is a directory" if path.is_dir() else f"its name does not end in {suffix}"
            yield Fault(str(path), None, "", f"not read, because {cause}; {remedy}")


def drop_ins(directory: Path, faults: list[Fault], *, suffix: str = ".yaml") -> DropIns | None:
    """List the files of a directory; None if the directory does not exist, or with a new fault in `faults`.

    Hidden files and leftovers of editors do not count. A directory that other users can write is a fault.
    """
    try:
        # Path.glob would raise no error for a missing or unreadable directory.
        paths = sorted(path for path in directory.iterdir() if not path.name.startswith((".", "#")))
    except FileNotFoundError:
        return None
    except OSError as error:
        faults.append(Fault(str(directory), None, "", f"cannot read this directory: {error.strerror}"))
        return None
    if untrusted := refusal(directory):
        faults.append(Fault(str(directory), None, "", untrusted))
        return None
    files = [path for path in paths if path.suffix == suffix]
    left = [path for path in paths if _LEFT.fullmatch(path.name)]
    strange = [path for path in paths if path not in files and path not in left]
    return DropIns(files, strange, all(path.name.endswith(".sample") for path in paths))


def stamp_of(directories: Sequence[Path]) -> list[tuple[str, int, int, int]]:
    """Give a value that changes with the files of the directories; a chmod changes the ctime, too."""
    found = []
    for directory in directories:
        with suppress(OSError):
            for path in (directory, *sorted(directory.iterdir())):
                with suppress(OSError):
                    info = path.stat()
                    found.append((str(path), info.st_ino, info.st_size, info.st_ctime_ns))
    return found
