"""The operator's allowlist: the programs that this node runs and their arguments, one file for each program.

An entry describes arguments by a grammar (rules.py, grammar.py) or by groups of patterns (patterns.py).
No argument list can keep the worker busy: the work of judging a list is counted and bounded.
"""

import hashlib
import os
from collections.abc import Collection, Sequence
from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta, Struct

from aitbc_miner.allowlist.grammar import judge_sections
from aitbc_miner.allowlist.patterns import Objection, Pattern, judge_groups, parse_pattern, quoted, some
from aitbc_miner.allowlist.rules import MAX_RULES, Names, Operand, Option, Section
from aitbc_miner.config.document import BadField, Fault, Parse, read_document
from aitbc_miner.config.dropins import drop_ins
from aitbc_miner.config.yaml_text import line_of
from aitbc_miner.errors import ErrorCode, JobError
from aitbc_miner.util.trust import distrust, may_be_set, parse_bind

MAX_GROUPS = 64
MAX_PATTERNS = 512
MAX_SECTIONS = 16


def _program(value: object) -> str:
    if not isinstance(value, str) or not value.startswith("/") or not value.isprintable():
        raise ValueError("must be the absolute path of a program, such as /usr/bin/ffmpeg")
    if problem := _untrusted(value):
        raise ValueError(problem)
    return value


def _untrusted(path: str) -> str | None:
    """Give the reason not to run a program; None if the program may run or does not exist."""
    try:
        info = Path(path).stat()
        if not Path(path).is_file() or not info.st_mode & 0o111:
            return "must be an executable file"
        problem = distrust(Path(path))
    except FileNotFoundError:
        return None
    except OSError as error:
        return f"cannot be examined: {error.strerror or error}"
    return f"must not be changeable by others: {problem}; use chown or chmod" if problem else None


def _bind(value: object) -> Path:
    path = parse_bind(value)
    if problem := _unfit(path):
        raise ValueError(problem)
    return path


def _unfit(path: Path) -> str | None:
    """Give the reason not to show a path to jobs; None if jobs may see the path or it does not exist."""
    try:
        real = path.resolve(strict=True)
        problem = distrust(path)
    except FileNotFoundError:
        return None
    except (OSError, RuntimeError) as error:
        return f"cannot be examined: {error}"
    if real != path:
        return f"must be a path without symbolic links; write {real}"
    return f"must not be changeable by others: {problem}; use chown or chmod" if problem else None


def _env_name(value: object) -> str:
    if not isinstance(value, str) or not may_be_set(value):
        raise ValueError("must be the name of a variable that no loader or interpreter reads")
    return value


class Command(Struct, frozen=True):
    """The program. Manifests name it by `name`, by default the last part of its path."""

    path: Annotated[str, Parse(_program)]
    name: Annotated[str, Meta(pattern=r"^[A-Za-z0-9._+-]{1,64}\Z")] | None = None
    sha256: (
        Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z", description="64 hexadecimal digits in quotes")] | None
    ) = None


class Entry(Struct, frozen=True, dict=True):
    """One file of the allowlist. Lengths are in bytes, output in MiB; if a limit is None, the slot's applies.

    Arguments must fit `sections`, or the one section that the entry's own keys describe, or the groups of
    `args`. The node puts the arguments of `leading` before the job's.
    """

    command: Command
    leading: Annotated[list[str], Meta(max_length=100)] = []
    args: list[Annotated[list[Annotated[Pattern, Parse(parse_pattern)]], Meta(min_length=1)]] = []
    sections: Annotated[list[Section], Meta(max_length=MAX_SECTIONS)] = []
    options: Annotated[list[Option], Meta(max_length=MAX_RULES)] = []
    operands: Annotated[list[Operand], Meta(max_length=MAX_RULES)] = []
    order: Literal["options_first", "fixed", "any"] | None = None
    exclusive: list[Names] = []
    max_total_args_len: Annotated[int, Meta(ge=0, le=131_072)] = 4096
    max_runtime_s: Annotated[float, Meta(gt=0)] | None = None
    max_output_mb: Annotated[float, Meta(gt=0)] | None = None
    env: list[Annotated[str, Parse(_env_name)]] = []
    kind: Literal["cpu", "gpu"] | None = None
    binds: Annotated[list[Annotated[Path, Parse(_bind)]], Meta(max_length=64)] = []

    def __post_init__(self) -> None:
        """Bound the number of patterns, and reject an entry that describes its arguments in two ways."""
        patterns = sum(map(len, self.args))
        if len(self.args) > MAX_GROUPS or patterns > MAX_PATTERNS:
            limits = f"must be at most {MAX_GROUPS} groups and {MAX_PATTERNS} patterns in all"
            raise BadField("args", f"has {len(self.args)} groups with {patterns} patterns; {limits}")
        if any("\0" in word for word in self.leading):
            raise BadField("leading", "has a NUL character, but arguments cannot hold NUL; remove it")
        own = [key for key in ("options", "operands", "order", "exclusive") if getattr(self, key)]
        ways = [*(key for key in ("args", "sections") if getattr(self, key)), *own]
        if len(ways) > 1 and ways != own:
            raise BadField(ways[1], f"cannot stand beside `{ways[0]}`; remove one of the two keys")
        # Making the section here reports its faults with the line of their key.
        _ = self.grammar

    @cached_property
    def grammar(self) -> list[Section]:
        """The sections of the arguments."""
        if self.sections:
            return self.sections
        return [
            Section(
                options=self.options,
                operands=self.operands,
                order=self.order or "options_first",
                exclusive=self.exclusive,
                min=1,
            )
        ]

    @property
    def name(self) -> str:
        """The program's name in manifests."""
        return self.command.name or Path(self.command.path).name

    def objection(self, args: Sequence[str], inputs: Collection[str] | None = None) -> Objection | None:
        """Give the reason to deny arguments; None permits them. If `inputs` is None, any input name fits."""
        if problem := _too_long(args, self.max_total_args_len):
            return problem
        if self.args:
            return judge_groups(self.args, args)
        prefix = "sections[{}]." if self.sections else ""
        return judge_sections(self.grammar, args, inputs, prefix)


class Denied(JobError):  # noqa: N818  # the name says what happened
    """No entry permits the command. `objection` is the reason; it comes from `entry`, if that is known."""

    def __init__(self, command: str, objection: Objection, entry: Entry | None = None) -> None:
        super().__init__(ErrorCode.E_DENY, f"cannot run {command[:80]!r}: {objection}")
        self.entry = entry
        self.objection = objection


class Digests:
    """The SHA-256 of programs; a file is read again only if its inode, size or times have changed."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[tuple[int, ...], str]] = {}

    def sha256(self, path: str) -> str:
        """Hash a file.

        Raises:
            OSError: the file cannot be read.
        """
        with Path(path).open("rb") as file:
            info = os.fstat(file.fileno())
            stamp = (info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns, info.st_ctime_ns)
            known, digest = self._known.get(path, ((), ""))
            if known != stamp:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
                self._known[path] = stamp, digest
        return digest


class Allowlist(Struct, frozen=True):
    """The entries of all programs, by name, and the file of each entry."""

    entries: dict[str, Entry] = {}
    files: dict[str, Path] = {}
    digests: Digests = msgspec.field(default_factory=Digests)

    def permit(
        self,
        command: str,
        args: Sequence[str],
        inputs: Collection[str] | None = None,
        kind: str | None = None,
    ) -> Entry:
        """Find the entry that permits a command line.

        Args:
            command: the program's name or path in the manifest.
            args: the job's arguments.
            inputs: the names of the job's inputs; if None, any name may be an input.
            kind: the kind of the slot that runs the job; if None, any kind will do.

        Raises:
            Denied: E_DENY, with the command or argument, and the permitted values.
        """
        entry = self._find(command)
        # Examined for each job: the program may have been installed or replaced since the start.
        if problem := self.unusable(entry):
            raise Denied(command, problem, entry)
        if objection := entry.objection(args, inputs):
            raise Denied(command, objection, entry)
        if entry.kind not in {None, kind} and kind is not None:
            text = f"the program needs a slot of kind {entry.kind}, but this slot is of kind {kind}"
            raise Denied(command, Objection(text, rule="kind"), entry)
        return entry

    def unusable(self, entry: Entry) -> Objection | None:
        """Give the reason why no job can run the program now, whatever its arguments."""
        path = entry.command.path
        if problem := _untrusted(path):
            return Objection(f"{path} {problem}", rule="command.path")
        if not Path(path).exists():
            return Objection(f"{path} is not installed on this node", rule="command.path")
        if entry.command.sha256 is not None:
            try:
                digest = self.digests.sha256(path)
            except OSError as error:
                return Objection(f"cannot read {path}: {error.strerror}", rule="command.sha256")
            if digest != entry.command.sha256:
                text = f"{path} has sha256 {digest}, but its entry requires another; update command.sha256"
                return Objection(text, rule="command.sha256")
        for at, bind in enumerate(entry.binds):
            if problem := _unfit(bind) or (None if bind.exists() else "does not exist"):
                return Objection(f"{bind} {problem}", rule=f"binds[{at}]")
        return None

    def _find(self, command: str) -> Entry:
        if "/" not in command:
            found = [self.entries[command]] if command in self.entries else []
        else:
            found = [entry for entry in self.entries.values() if entry.command.path == command]
        if len(found) > 1:
            names = some(sorted(entry.name for entry in found))
            raise Denied(command, Objection(f"several entries have this path; use an entry's name: {names}"))
        if not found:
            known = some(sorted(self.entries)) or "none"
            raise Denied(command, Objection(f"no allowlist entry has this name; known names: {known}"))
        return found[0]


def load_allowlist(dirs: Sequence[Path], faults: list[Fault], warnings: list[Fault]) -> Allowlist:
    """Read each `*.yaml` of the directories; an entry with a fault is left out and goes to `faults`.

    An entry goes to `warnings` and denies its jobs while its program is missing or has another SHA-256.
    """
    allowlist = Allowlist({}, {})
    for file in _files(dirs, faults, warnings):
        entry = read_document(file, Entry, faults)
        if entry is None:
            continue
        if other := allowlist.files.get(entry.name):
            problem = f"{entry.name!r} is also defined by {other}; give one of the two entries another `name`"
            faults.append(Fault(str(file), line_of(file, ["command"]), "command", problem))
            continue
        allowlist.files[entry.name] = file
        allowlist.entries[entry.name] = entry
        if unusable := allowlist.unusable(entry):
            problem = f"{unusable.text}; jobs that ask for {entry.name} are denied"
            warnings.append(Fault(str(file), None, unusable.rule, problem))
    return allowlist


def _files(dirs: Sequence[Path], faults: list[Fault], warnings: list[Fault]) -> list[Path]:
    files: list[Path] = []
    for directory in dirs:
        if not directory.exists():
            problem = "the directory does not exist and so permits no commands; create it"
            warnings.append(Fault(str(directory), None, "", problem))
        elif found := drop_ins(directory, faults):
            warnings += found.warnings()
            files += found.files
    return files


def _too_long(args: Sequence[str], limit: int) -> Objection | None:
    total = max(0, len(args) - 1)  # counted as on a command line, with a space between two arguments
    for at, arg in enumerate(args):
        try:
            total += len(arg.encode())
        except UnicodeEncodeError:
            return Objection(f"{quoted(args, at)} is not valid text", at)
        if total > limit:
            text = f"{quoted(args, at)} makes the arguments longer than {limit} bytes (max_total_args_len)"
            return Objection(text, at, rule="max_total_args_len")
    return None
