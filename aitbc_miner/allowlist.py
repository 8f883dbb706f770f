"""Which programs this node runs, and with which arguments: the operator's allowlist, one file a program.

Patterns are RE2's: it matches in time linear in the argument, so that no argument a job sends can keep the
worker busy, which Python's own `re` cannot promise.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, NoReturn, Protocol

import re2  # type: ignore[import-untyped]  # google-re2 has no types of its own
from msgspec import Meta, Struct

from aitbc_miner.errors import ErrorCode, JobError
from aitbc_miner.util.trust import distrust, may_be_set
from aitbc_miner.util.yamldoc import BadField, Fault, Parse, read_document
from aitbc_miner.util.yamltext import line_of

MAX_GROUPS = 64
MAX_PATTERNS = 512
MAX_STEPS = 10_000
"""Steps of the search for a fitting cut; only many groups that fit the same arguments ever need so many."""


class Pattern(Protocol):
    """A compiled pattern, as far as it is used here."""

    pattern: str

    def fullmatch(self, text: str) -> object | None:
        """Match the whole text."""
        ...


Group = Sequence[Pattern]


def _program(value: object) -> str:
    if not isinstance(value, str) or not value.startswith("/") or "\0" in value:
        raise ValueError("must be the absolute path of a program, such as /usr/bin/ffmpeg")
    if problem := _untrusted(value):
        raise ValueError(problem)
    return value


def _untrusted(path: str) -> str | None:
    """Say why a program must not be run; None when it may, or when it is not there at all."""
    try:
        info = Path(path).stat()
        if not Path(path).is_file() or not info.st_mode & 0o111:
            return "must be an executable file"
        problem = distrust(Path(path))
    except FileNotFoundError:
        return None
    except OSError as error:
        return f"cannot look at it: {error.strerror or error}"
    return f"must not be changeable by others: {problem}; mend that with chown or chmod" if problem else None


def _pattern(value: object) -> Pattern:
    if not isinstance(value, str):
        raise ValueError("must be a pattern; put it in quotes")  # noqa: TRY004  # what Parse asks for
    options = re2.Options()
    options.log_errors = False
    try:
        return re2.compile(value, options)  # type: ignore[no-any-return]
    except re2.error as error:
        reason = error.args[0]
        text = reason.decode(errors="replace") if isinstance(reason, bytes) else str(reason)
        raise ValueError(f"must be a pattern in RE2 syntax: {text}") from error


def _env_name(value: object) -> str:
    if not isinstance(value, str) or not may_be_set(value):
        raise ValueError("must be the name of a variable that no loader or interpreter obeys")
    return value


class Command(Struct, frozen=True):
    """The program: manifests call it by `name`, else by the last part of its path."""

    path: Annotated[str, Parse(_program)]
    name: Annotated[str, Meta(pattern="^[A-Za-z0-9._+-]{1,64}$")] | None = None


class Entry(Struct, frozen=True):
    """One file of the allowlist. Lengths in bytes, output in MiB; a limit of None leaves it to the slot."""

    command: Command
    args: list[Annotated[list[Annotated[Pattern, Parse(_pattern)]], Meta(min_length=1)]] = []
    max_total_args_len: Annotated[int, Meta(ge=0, le=131_072)] = 4096
    max_runtime_s: Annotated[float, Meta(gt=0)] | None = None
    max_output_mb: Annotated[float, Meta(gt=0)] | None = None
    env: list[Annotated[str, Parse(_env_name)]] = []

    def __post_init__(self) -> None:
        """Bound the work that an argument list can cause."""
        patterns = sum(map(len, self.args))
        if len(self.args) > MAX_GROUPS or patterns > MAX_PATTERNS:
            limits = f"must be at most {MAX_GROUPS} groups and {MAX_PATTERNS} patterns in all"
            raise BadField("args", f"has {len(self.args)} groups with {patterns} patterns; {limits}")

    @property
    def name(self) -> str:
        """What a manifest calls the program."""
        return self.command.name or Path(self.command.path).name


class Allowlist(Struct, frozen=True):
    """All programs that this node runs, by name."""

    entries: dict[str, Entry] = {}

    def permit(self, command: str, args: Sequence[str]) -> Entry:
        """Find the entry that allows this command line.

        Raises:
            JobError: E_DENY, naming the command or the argument, and what would be allowed.
        """
        entry = self._find(command)
        # Looked at again for each job: the program may have been installed or replaced since the start.
        if problem := _untrusted(entry.command.path):
            _deny(command, f"{entry.command.path} {problem}")
        if not Path(entry.command.path).exists():
            _deny(command, f"{entry.command.path} is not installed on this node")
        if problem := _too_long(entry, args) or objection(entry.args, args):
            _deny(command, problem)
        return entry

    def _find(self, command: str) -> Entry:
        if "/" not in command:
            found = [self.entries[command]] if command in self.entries else []
        else:
            found = [entry for entry in self.entries.values() if entry.command.path == command]
        if len(found) > 1:
            _deny(command, f"several entries have this path; call it by name: {_some(e.name for e in found)}")
        if not found:
            _deny(command, f"no allowlist entry has this name; there are: {_some(self.entries) or 'none'}")
        return found[0]


def load_allowlist(dirs: Sequence[Path], faults: list[Fault], warnings: list[Fault]) -> Allowlist:
    """Read each `*.yaml` of the directories; what is wrong goes to `faults`.

    An entry with a fault is left out. One whose program is not installed goes to `warnings` and denies
    until it is.
    """
    entries: dict[str, Entry] = {}
    files: dict[str, Path] = {}
    for file in _files(dirs, faults, warnings):
        entry = read_document(file, Entry, faults)
        if entry is None:
            continue
        if other := files.get(entry.name):
            problem = f"{entry.name!r} is also defined by {other}; give one of them a `name` of its own"
            faults.append(Fault(str(file), line_of(file, ["command"]), "command", problem))
            continue
        files[entry.name] = file
        entries[entry.name] = entry
        if not Path(entry.command.path).exists():
            problem = f"{entry.command.path} is not installed; jobs that ask for it are denied"
            warnings.append(Fault(str(file), None, "command.path", problem))
    return Allowlist(entries)


def _files(dirs: Sequence[Path], faults: list[Fault], warnings: list[Fault]) -> list[Path]:
    files: list[Path] = []
    for directory in dirs:
        try:
            # Path.glob would hide that a directory is missing or closed.
            files += sorted(path for path in directory.iterdir() if path.match("[!.]*.yaml"))
        except FileNotFoundError:
            problem = "this directory is not there; it allows no commands"
            warnings.append(Fault(str(directory), None, "", problem))
        except OSError as error:
            faults.append(Fault(str(directory), None, "", f"cannot read this directory: {error.strerror}"))
    return files


def _deny(command: str, reason: str) -> NoReturn:
    raise JobError(ErrorCode.E_DENY, f"cannot run {command[:80]!r}: {reason}")


def _some(values: Iterable[str]) -> str:
    names = sorted(set(values))
    return ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "")


def _argument(args: Sequence[str], at: int) -> str:
    return f"argument {at + 1} ({args[at][:60]!r})"


def _too_long(entry: Entry, args: Sequence[str]) -> str | None:
    total = max(0, len(args) - 1)  # counted as on a command line, with a blank between two arguments
    for at, arg in enumerate(args):
        try:
            total += len(arg.encode())
        except UnicodeEncodeError:
            return f"{_argument(args, at)} is not valid text"
        if total > entry.max_total_args_len:
            limit = entry.max_total_args_len
            return f"{_argument(args, at)} makes the arguments longer than {limit} bytes (max_total_args_len)"
    return None


def objection(groups: Sequence[Group], args: Sequence[str]) -> str | None:
    """Say which argument is not allowed and what would be; None when the list can be cut into fitting runs.

    Each run must fit one group, pattern for pattern, each group may be used once, in any order.
    """
    most = sum(map(len, groups))
    if len(args) > most:
        return f"{_argument(args, most)} is one too many; at most {most} can be allowed"
    matched = [[_matched(group, args, at) for group in groups] for at in range(len(args))]
    runs = [[g for g, count in enumerate(row) if count == len(groups[g])] for row in matched]
    # Where the rest could be cut if groups could be used again. Few lists fail only for using one twice,
    # so most searches end here, without a search.
    open_ends = {len(args)}
    for at in reversed(range(len(args))):
        if any(at + len(groups[g]) in open_ends for g in runs[at]):
            open_ends.add(at)
    if 0 not in open_ends:
        return _misfit(groups, args, matched)
    return _Search(groups, runs, open_ends).objection(args)


def _matched(group: Group, args: Sequence[str], at: int) -> int:
    """Count the patterns of a group, from its first on, that fit the arguments from `at` on."""
    for count, pattern in enumerate(group):
        if at + count == len(args) or not pattern.fullmatch(args[at + count]):
            return count
    return len(group)


def _misfit(groups: Sequence[Group], args: Sequence[str], matched: list[list[int]]) -> str:
    """Name the farthest argument that some cut arrives at, and what it would have had to be."""
    reached = {0}
    wanted: dict[int, list[str]] = defaultdict(list)
    for at in range(len(args)):
        for group, count in zip(groups, matched[at], strict=True) if at in reached else ():
            if count == len(group):
                reached.add(at + count)
            else:
                wanted[at + count].append(group[count].pattern)
    farthest = max(wanted)
    fitting = _some(map(repr, wanted[farthest]))
    if farthest == len(args):
        return f"after the last {_argument(args, farthest - 1)} another is missing; what would fit: {fitting}"
    return f"{_argument(args, farthest)} is not allowed there; what would fit: {fitting}"


class _Search:
    """Depth first, at most as deep as there are groups; dead ends are remembered."""

    def __init__(self, groups: Sequence[Group], runs: list[list[int]], open_ends: set[int]) -> None:
        self.lengths = [len(group) for group in groups]
        self.runs = runs
        self.open_ends = open_ends
        self.dead: set[tuple[int, int]] = set()
        self.farthest = 0
        self.twins = self._twins()
        # A group that fits nothing further on makes no difference there, used or not.
        self.useful = [0] * (len(runs) + 1)
        for at in reversed(range(len(runs))):
            self.useful[at] = self.useful[at + 1] | sum(1 << g for g in runs[at])

    def _twins(self) -> list[int]:
        """Give for each group the bit of the one before that fits in all the same places, or 0."""
        latest: dict[tuple[int, ...], int] = {}
        twins = []
        for g, length in enumerate(self.lengths):
            places = (length, *(at for at, fitting in enumerate(self.runs) if g in fitting))
            twins.append(latest.get(places, 0))
            latest[places] = 1 << g
        return twins

    def objection(self, args: Sequence[str]) -> str | None:
        if self.cut(0, 0):
            return None
        if len(self.dead) >= MAX_STEPS:
            return f"too many of its groups fit the same arguments to tell within {MAX_STEPS} steps if all do"
        return f"every group that fits {_argument(args, self.farthest)} is already used by another argument"

    def cut(self, at: int, used: int) -> bool:
        if at == len(self.runs):
            return True
        self.farthest = max(self.farthest, at)
        here = (at, used & self.useful[at])
        if here in self.dead:
            return False
        for g in self.runs[at]:
            bit, end = 1 << g, at + self.lengths[g]
            # Of groups that are alike here, only the first that is free need be tried.
            if used & bit or self.twins[g] & ~used or end not in self.open_ends:
                continue
            if self.cut(end, used | bit):
                return True
            if len(self.dead) >= MAX_STEPS:
                return False
        self.dead.add(here)
        return False
