"""The directories of files that each say one thing (slots.d, allowlist.d, …): which of their files count."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from aitbc_miner.config.document import Fault
from aitbc_miner.util.trust import refusal

# What editors and packages leave beside a file, and our own samples.
_LEFT = re.compile(r".*(~|\.(sample|bak|orig|rej|swp|tmp|(dpkg|ucf)-(new|old|dist|tmp)))")


class DropIns(NamedTuple):
    """The files of a directory in their order, those with another ending, and whether it holds any at all.

    Samples and hidden files are none.
    """

    files: list[Path]
    strange: list[Path]
    empty: bool

    def warnings(self, suffix: str = ".yaml") -> Iterator[Fault]:
        """Yield a warning for each file that was probably meant to be read, and is not."""
        for path in self.strange:
            remedy = f"rename it to {path.stem}{suffix}" if path.suffix == ".yml" else "rename or remove it"
            what = "is a directory" if path.is_dir() else f"does not end in {suffix}"
            yield Fault(str(path), None, "", f"this is not read, because it {what}; {remedy}")


def drop_ins(directory: Path, faults: list[Fault], *, suffix: str = ".yaml") -> DropIns | None:
    """Look which files of a directory count; None when it is not there, or for what is added to `faults`.

    Hidden files and what editors leave do not count, and nothing does where others could add a file.
    """
    try:
        # Path.glob would hide that a directory is missing or closed.
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
