"""Whether a job may run a command, for the operator: judged by a child, for disks may take their time.

It asks the very code that judges jobs, with the files as they are now.
"""

import re
import shlex
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

from aitbc_miner.allowlist.entries import Allowlist, Denied, load_allowlist
from aitbc_miner.allowlist.patterns import Objection
from aitbc_miner.config.document import Fault
from aitbc_miner.config.settings import CliRunner
from aitbc_miner.config.yaml_text import line_of
from aitbc_miner.control.protocol import LATER_S, Judged, Later, Refusal, Request
from aitbc_miner.supervisor.children import Child, Errands
from aitbc_miner.util import clock

MAX_AT_ONCE = 4
MAX_NOTES = 20


class Examiner:
    """Has commands judged. `judge` is the child's main function, given what is asked."""

    def __init__(self, errands: Errands, judge: "Callable[[Request, Connection[Any, Any]], None]") -> None:
        self._errands = errands
        self._judge = judge
        self._judges: set[Child[Any]] = set()

    def ask(self, request: Request, tell: Later) -> None:
        """Begin to judge; `tell` gets the answer later, or at once that there will be none."""
        self._judges &= set(self._errands.under_way())
        for judge in self._judges:
            # Its client has gone: a disk hangs.
            if clock.now() - judge.started > LATER_S:
                judge.kill()
        if not request.command:
            tell(Refusal("cannot judge: there is no command; give one with its arguments"))
        elif len(self._judges) >= MAX_AT_ONCE:
            tell(Refusal(f"cannot judge a command: {MAX_AT_ONCE} others are asking; try again"))
        else:
            try:
                main = partial(self._judge, request)
                self._judges.add(self._errands.start("allow", main, Judged, partial(_pass_on, tell)))
            except OSError as error:
                tell(Refusal(f"cannot judge a command: {error.strerror}; try again in a moment"))


def _pass_on(tell: Later, said: Judged | str) -> None:
    if isinstance(said, str):
        tell(Refusal(f"cannot judge a command: what was to read the allowlist {said}; see the journal"))
    else:
        tell(said)


def judge(runner: CliRunner, request: Request) -> Judged:
    """Say whether a job may run a command with these inputs, as its slot's worker would."""
    command, *args = request.command
    if not runner.enable:
        return Judged(permitted=False, message="no commands are run here: runners.cli.enable is false")
    faults: list[Fault] = []
    allowlist = load_allowlist(runner.allowlist_dirs, faults, [])
    notes = [f"workers keep the list that they have while a file has a fault: {fault}" for fault in faults]
    try:
        entry = allowlist.permit(command, args, request.inputs)
    except Denied as denied:
        name = denied.entry.name if denied.entry else ""
        return _denial(allowlist, name, denied.objection, notes)
    if request.inputs is None:
        notes.append("any name was taken for that of an input; name those that the job has with --input")
    notes += [f"only in slots of kind {entry.kind}"] if entry.kind else []
    started = shlex.join([entry.command.path, *entry.leading, *args])
    return Judged(
        permitted=True, message=started, file=str(allowlist.files[entry.name]), notes=notes[:MAX_NOTES]
    )


def _denial(allowlist: Allowlist, name: str, objection: Objection, notes: list[str]) -> Judged:
    file = allowlist.files.get(name)
    return Judged(
        permitted=False,
        message=objection.text,
        file=None if file is None else str(file),
        line=line_of(file, list(_steps(objection.rule))) if file and objection.rule else None,
        rule=objection.rule,
        argument=None if objection.at is None else objection.at + 1,
        fits=list(objection.fits),
        notes=notes[:MAX_NOTES],
    )


def _steps(rule: str) -> Iterator[str | int]:
    """Take a key such as `sections[1].options[0].value` apart."""
    for name, index in re.findall(r"([a-z_0-9]+)|\[(\d+)\]", rule):
        yield name or int(index)
