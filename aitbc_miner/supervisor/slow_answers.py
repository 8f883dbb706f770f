"""What a child of the supervisor's answers, for disks may take their time: the history, a command, a layout.

The history is written down for `aitbc-minerctl`: a line of JSON with the `Totals` and, where they are asked
for, one with the `LedgerRow` of each job. A command is judged by the very code that judges jobs, with the
files as they are now.
"""

import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import msgspec
from msgspec import Struct

from aitbc_miner.allowlist.entries import Allowlist, Denied, load_allowlist
from aitbc_miner.allowlist.patterns import Objection
from aitbc_miner.config.document import Fault
from aitbc_miner.config.settings import CliRunnerSection, Config, load_config
from aitbc_miner.config.yaml_text import line_of
from aitbc_miner.control.protocol import Judged, Request
from aitbc_miner.errors import MinerError
from aitbc_miner.probe.topology import MachineFacts
from aitbc_miner.sandbox.users import Identity, PrivilegeError, resolve
from aitbc_miner.slots.derive import derive_slots, slots_for
from aitbc_miner.store.database import Database, DatabaseError
from aitbc_miner.store.ledger import Ledger, Totals
from aitbc_miner.supervisor.node_plan import Layout

MAX_HISTORY = 128 << 20
"""Bytes of memory for one history, some 300,000 jobs."""
MAX_NOTES = 20


def read_history(path: Path, request: Request, out: BinaryIO, *, still: bool = False) -> str:
    """Write what a request asks for; gives why there is no history, or nothing.

    Where no job has ended yet, there is an empty one. `still`: the node does not run.
    """
    try:
        if path.exists():
            _write(Ledger(Database(path, read_only=True, still=still), read_only=True), request, out)
        else:
            _line(out, Totals())
        out.flush()
    except DatabaseError as error:
        remedy = "try again; a file that is broken is set aside when the miner starts anew"
        return f"cannot show the history: cannot read {path}: {error.__cause__ or error}; {remedy}"
    except MinerError as error:
        return str(error)
    except OSError as error:
        return f"cannot show the history from {path}: {error.strerror}; see that the miner's user can read it"
    return ""


def _write(accounts: Ledger, request: Request, out: BinaryIO) -> None:
    if not accounts.there:
        _line(out, Totals())
        return
    with accounts.standing_still():
        _line(out, accounts.totals(request.since_s))
        for row in accounts.rows(request.since_s) if request.each else ():
            _line(out, row)
            if out.tell() > MAX_HISTORY:
                raise MinerError(
                    f"cannot show the history: these jobs take more than {MAX_HISTORY >> 20} MiB; "
                    "ask for less time with --since"
                )


def _line(out: BinaryIO, value: msgspec.Struct) -> None:
    out.write(msgspec.json.encode(value) + b"\n")


def judge(runner: CliRunnerSection, request: Request) -> Judged:
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


def read_layout(path: Path, running: Config, facts: MachineFacts) -> Layout:
    """Read configuration and slots anew, for a node that runs with `running` on a machine with these GPUs."""
    config, faults, _ = load_config(path, os.environ)
    if config is None:
        return Layout([], faults=[str(fault) for fault in faults])
    specs, found = slots_for(running.slots_dir, facts)
    told = [str(fault) for fault in [*faults, *found]]
    names = [spec.name for spec in specs or derive_slots(facts)]
    users: dict[str, Identity] = {}
    try:
        users = resolve(running.privileges.mode, running.privileges.service_user, names).jobs
    except PrivilegeError as error:
        told.append(str(error))
    return Layout(specs, users, told, _differences(running, config))


def _differences(one: Struct, other: Struct, prefix: str = "") -> list[str]:
    """Name the keys in which two configurations differ, as "coordinator.base_url"."""
    names: list[str] = []
    for key in one.__struct_fields__:
        mine, its = getattr(one, key), getattr(other, key)
        if isinstance(mine, Struct) and isinstance(its, Struct):
            names += _differences(mine, its, f"{prefix}{key}.")
        elif mine != its:
            names.append(prefix + key)
    return names
