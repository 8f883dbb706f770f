"""Answers that need the disk and are therefore made in a child: the history, a command, a layout.

A history is lines of JSON for `aitbc-minerctl`: first the `Totals` and then, if the request wants them, the
`LedgerRow` of each job. A command is judged by the code that judges jobs, with the present files.
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
"""Bytes of memory for one history, about 300,000 jobs."""
MAX_NOTES = 20


def read_history(path: Path, request: Request, out: BinaryIO, *, still: bool = False) -> str:
    """Write the requested history to `out`; returns the error message, or an empty text.

    If no job has ended yet, the history is empty. `still`: the node does not run.
    """
    try:
        if path.exists():
            _write(Ledger(Database(path, read_only=True, still=still), read_only=True), request, out)
        else:
            _line(out, Totals())
        out.flush()
    except DatabaseError as error:
        remedy = "try again, or, if the file is broken, restart the miner, which renames the broken file"
        return f"cannot show the history from {path}: {error.__cause__ or error}; {remedy}"
    except MinerError as error:
        return str(error)
    except OSError as error:
        return f"cannot show the history from {path}: {error.strerror}; let the miner's user read the file"
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
                    f"cannot show the history: its jobs take more than {MAX_HISTORY >> 20} MiB; "
                    "choose a shorter time with --since"
                )


def _line(out: BinaryIO, value: msgspec.Struct) -> None:
    out.write(msgspec.json.encode(value) + b"\n")


def judge(runner: CliRunnerSection, request: Request) -> Judged:
    """Say whether a job may run a command with these inputs, by the rules of the slot's worker."""
    command, *args = request.command
    if not runner.enable:
        return Judged(permitted=False, message="this node runs no commands: runners.cli.enable is false")
    faults: list[Fault] = []
    allowlist = load_allowlist(runner.allowlist_dirs, faults, [])
    notes = [f"workers use the previous allowlist until this fault is mended: {fault}" for fault in faults]
    try:
        entry = allowlist.permit(command, args, request.inputs)
    except Denied as denied:
        name = denied.entry.name if denied.entry else ""
        return _denial(allowlist, name, denied.objection, notes)
    if request.inputs is None:
        notes.append("every file name was accepted as an input; name the job's inputs with --input")
    notes += [f"permitted only in slots of kind {entry.kind}"] if entry.kind else []
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
    """Split a key such as `sections[1].options[0].value` into names and indices."""
    for name, index in re.findall(r"([a-z_0-9]+)|\[(\d+)\]", rule):
        yield name or int(index)


def read_layout(path: Path, running: Config, facts: MachineFacts) -> Layout:
    """Read configuration and slots again, for a node that runs with the configuration `running`."""
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
    """Name the keys in which two configurations differ, such as "coordinator.base_url"."""
    names: list[str] = []
    for key in one.__struct_fields__:
        mine, its = getattr(one, key), getattr(other, key)
        if isinstance(mine, Struct) and isinstance(its, Struct):
            names += _differences(mine, its, f"{prefix}{key}.")
        elif mine != its:
            names.append(prefix + key)
    return names
