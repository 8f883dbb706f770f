"""The pages of `aitbc-minerctl`: the miner's answers for people, as wide as their terminal."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from signal import Signals
from typing import Any, TypeVar

import msgspec

from aitbc_miner.control.protocol import JobRow, Jobs, Judged, Problem, SlotStatus, Status
from aitbc_miner.errors import CODES, ErrorCode
from aitbc_miner.identity.receipts import Receipt
from aitbc_miner.jobs import JobUse, Outcome, State
from aitbc_miner.util.terminal import columns, cut, duration, pad, size, visible, width, wrap

LINES = 23
"""A screen has 24 lines, one of them for the prompt."""
HEAD = 6
SLOTS_SHOWN = 8
"""The lines for slots under a head of `HEAD` lines; a longer head leaves fewer."""
MAX_ID = 48
ENOUGH = 20
"""The least columns for a message beside its job; a narrower message, or a job's use, gets its own line."""
MAX_ARTIFACTS = 100
LABEL = 12
STATE_COLOURS = {
    **dict.fromkeys(("IDLE", "DONE"), "green"),
    **dict.fromkeys(("BACKOFF", "QUARANTINED", "FAILED"), "red"),
    **dict.fromkeys(("STARTING", "CANCELLING", "RETRY_WAIT"), "yellow"),
}

T = TypeVar("T")

Paint = Callable[[str, str], str]
"""Gives a text (first argument) in a colour (second argument)."""


def plain(text: str, _colour: str) -> str:
    """Paint nothing."""
    return text


def _wall(stamp: str) -> str:
    return visible(stamp[:19].replace("T", " ")) + " UTC" if stamp else "?"


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


# --- status and slots --------------------------------------------------------------------------------------


def status_page(status: Status, paint: Paint) -> str:
    """Show the node on one screen of 80 by 24."""
    head = list(_head(status, paint))
    slots = max(1, SLOTS_SHOWN - max(0, len(head) - HEAD))
    lines = [*head, "", *_slot_lines(status.slots, paint, slots)]
    lines += _enforcement(status.slots, 2)
    room = LINES - len(lines) - 1
    if status.problems and room >= 2:
        lines += ["", *_problems(status.problems, paint, room)]
    return "\n".join(lines)


def slots_page(status: Status, paint: Paint) -> str:
    """Show every slot, the reason if a slot is not in use, and the controls that enforce its limits."""
    lines = _slot_lines(status.slots, paint, 2 * len(status.slots))
    for entry in status.slots:
        if entry.slot.reason:
            lines += wrap("  ", f"{entry.slot.offer.name}: {entry.slot.reason}")
    return "\n".join([*lines, *_enforcement(status.slots, len(status.slots))])


def judged_page(judged: Judged, paint: Paint) -> str:
    """Show whether a command is permitted, the rule that decides, and the values that would fit."""
    word, colour = ("permitted", "green") if judged.permitted else ("denied", "red")
    lines = wrap(f"{word:{LABEL}}", judged.message)
    if judged.file is not None:
        place = judged.file if judged.line is None else f"{judged.file}:{judged.line}"
        lines += wrap(f"{'by':{LABEL}}", f"{place}: {judged.rule}" if judged.rule else place)
    lines += [line for fit in judged.fits for line in wrap(f"{'would fit':{LABEL}}", fit)]
    lines += [line for note in judged.notes for line in wrap(f"{'note':{LABEL}}", note)]
    return "\n".join([paint(lines[0][:LABEL], colour) + lines[0][LABEL:], *lines[1:]])


def _head(status: Status, paint: Paint) -> Iterator[str]:
    name = paint(cut(status.node_id, 30), "bold")
    yield f"{name}  aitbc-miner {visible(status.version)}, up {duration(status.up_s)}, pid {status.pid}"
    view = status.coordinator
    if view.reachable:
        answers = paint("reachable", "green")
    elif (view.error or "not asked yet").startswith("not asked yet"):
        answers = paint("not asked yet", "yellow") + ","
    else:
        answers = paint("not reachable", "red")
    registered = "registered" if view.registered else paint("not registered", "yellow")
    yield f"{'coordinator':{LABEL}}{cut(status.base_url, width() - LABEL)}"
    yield f"{'':{LABEL}}{answers} since {_wall(view.since_wall)}, {registered}"
    if status.stopping:
        mood = paint("stopping", "yellow")
    elif status.accepting:
        mood = paint("accepting", "green")
    elif status.paused:
        mood = paint("paused", "yellow") + cut(f": {status.paused}", width() - LABEL - len("paused"))
    else:
        mood = paint("draining", "yellow") + ": no new jobs; `aitbc-minerctl resume` pulls jobs again"
    yield f"{'node':{LABEL}}{mood}"
    running = sum(entry.slot.job_id is not None for entry in status.slots)
    waiting = f"{_count(status.pending_reports, 'report')} waiting to be delivered"
    yield f"{'jobs':{LABEL}}{running} in slots, {len(status.queued)} queued, {waiting}"
    counts = sorted(status.finished.items(), key=lambda item: (item[0] != "OK", -item[1]))
    # The ~ keeps a code and its number together on a line.
    told = ", ".join(f"{code}~{number}" for code, number in counts if number) or "none yet"
    yield from (line.replace("~", " ") for line in wrap(f"{'finished':{LABEL}}", told))


def _slot_lines(slots: Sequence[SlotStatus], paint: Paint, most: int) -> list[str]:
    """Show a line for each slot and, while lines are left, a second line with its job's use."""
    if not slots:
        return ["no slots yet"]
    hidden = len(slots) - most + 1 if len(slots) > most else 0
    # If not all slots fit, idle slots are hidden first.
    ordered = sorted(slots, key=lambda entry: entry.slot.state == "IDLE") if hidden else slots
    shown = ordered[: len(slots) - hidden]
    room = most - len(shown) - bool(hidden)
    wide = width() - 80 + 32
    lines = [paint(f"{'SLOT':13}{'STATE':12}{'JOB':{wide + 1}}{'STEP':11}{'FOR':>9}", "dim")]
    for entry in shown:
        slot = entry.slot
        state = paint(pad(slot.state, 11), STATE_COLOURS.get(slot.state, "bold"))
        job, step = pad(slot.job_id or "-", wide), pad(slot.job_state or "-", 10)
        lines.append(f"{pad(slot.offer.name, 12)} {state} {job} {step} {duration(entry.for_s):>9}")
        if entry.use is not None and room > 0:
            lines.append(cut(f"  {used(entry.use)}", width()))
            room -= 1
    if hidden:
        lines.append(f"… and {_count(hidden, 'slot')} more; see `aitbc-minerctl slots`")
    return lines


def used(use: JobUse) -> str:
    """Describe a job's progress, its use of resources, and the limits."""
    spent = duration(use.for_s) + ("" if use.max_s is None else f" of {duration(use.max_s)}")
    most = use.cpu_max_pct
    cpus = None if use.cpu_pct is None else _number(use.cpu_pct / 100)
    figures = [
        "" if use.pct is None else f"{use.pct:.0f} %",
        spent,
        f"CPU {cpus}{'' if most is None else f' of {_number(most / 100)}'}" if cpus else "",
        _sizes("memory", use.memory_bytes, use.memory_max_bytes),
        _sizes("disk", use.disk_bytes, use.disk_max_bytes),
        use.note,
    ]
    return ", ".join(filter(None, figures))


def _sizes(name: str, number: int | None, most: int | None) -> str:
    if number is None:
        return ""
    if not most:
        return f"{name} {size(number)}"
    # Both sizes in the unit of the larger, so that they compare at a glance.
    unit = size(most).split()[1]
    factor = 1024 ** ("B", "KiB", "MiB", "GiB", "TiB").index(unit)
    return f"{name} {_number(number / factor)} of {_number(most / factor)} {unit}"


def _number(number: float) -> str:
    return f"{number:.1f}".removesuffix(".0")


def _enforcement(slots: Sequence[SlotStatus], most: int) -> list[str]:
    """Show the controls that enforce the limits, once for all slots with the same controls."""
    alike: dict[str, list[str]] = defaultdict(list)
    for entry in slots:
        held = " ".join(f"{limit}={how}" for limit, how in sorted(entry.slot.enforced.items()))
        unknown = "as set by its worker" if entry.slot.state == "ADOPTED" else "none, or no worker yet"
        alike[held or unknown].append(entry.slot.offer.name)
    hidden = len(alike) > most
    lines = []
    for held, names in list(alike.items())[: most - hidden]:
        whose = "" if len(alike) == 1 else f" ({', '.join(names)})"
        lines.append(f"{'limits':{LABEL}}" + cut(held + whose, width() - LABEL))
    return [*lines, f"{'':{LABEL}}others differ; see `aitbc-minerctl slots`"] if hidden else lines


def _problems(problems: Sequence[Problem], paint: Paint, room: int) -> Iterator[str]:
    """Show as many problems as fit, each with its remedy."""
    each = 2 if room >= 5 else 1
    for number, problem in enumerate(problems):
        lines = [paint(line, "yellow") for line in wrap("! ", problem.what, lines=each)]
        if problem.remedy:
            lines += wrap("  → ", problem.remedy, lines=each)
        later = len(problems) - number - 1
        if len(lines) > room - bool(later):
            yield f"… and {_count(later + 1, 'problem')} more; see `aitbc-minerctl --json status`"
            return
        room -= len(lines)
        yield from lines


# --- jobs --------------------------------------------------------------------------------------------------


def jobs_page(jobs: Jobs, paint: Paint) -> str:
    """Show a line for each job, the newest last."""
    if not jobs.jobs:
        return "no jobs"
    ids = min(MAX_ID, max(3, *(len(row.job_id) for row in jobs.jobs)), width() - 32)
    head = f"{'JOB':{ids}}  {'STATE':10}  {'SLOT':8}  {'TIME':>6}  "
    lines = [paint(head + "RESULT" if width() - len(head) >= 6 else head.rstrip(), "dim")]
    for row in jobs.jobs:
        state = paint(pad(row.state, 10), STATE_COLOURS.get(row.state, "bold"))
        spent = row.use.for_s if row.use else row.wall_s
        time = "-" if spent is None else duration(spent)
        start = f"{pad(row.job_id, ids)}  {state}  {pad(row.slot or '-', 8)}  {time:>6}  "
        result, room = visible(_result(row)), width() - len(head)
        if columns(result) <= room or (room >= ENOUGH and not row.use):
            lines.append((start + cut(result, room)).rstrip())
        else:
            # The result gets its own line below the job.
            lines += [start.rstrip(), "    " + cut(result, width() - 4)]
    return "\n".join(lines)


def _result(row: JobRow) -> str:
    if row.use:
        return used(row.use)
    if row.code:
        return f"{row.code} {row.message}"
    return row.message or (_count(row.artifacts, "artifact") if row.state == State.DONE else "")


def job_page(row: JobRow, records: Mapping[str, Any], paint: Paint) -> str:
    """Show one job in detail. `records` has its manifest, state, outcome and receipt as JSON, or None."""
    manifest = records["manifest"] if isinstance(records["manifest"], dict) else {}
    what = manifest.get("command") or manifest.get("task") or ""
    facts = [
        ("runner", f"{row.runner or '-'} {what}".rstrip()),
        ("since", _wall(row.since_wall)),
        ("slot", row.slot or "none"),
    ]
    if row.use:
        facts.append(("uses", used(row.use)))
    args = manifest.get("args")
    if isinstance(args, list) and args:
        facts.insert(1, ("arguments", " ".join(map(str, args))[:400]))
    outcome = _convert(records["outcome"], Outcome)
    code, message = (outcome.code, outcome.message) if outcome else (row.code, row.message)
    if code:
        facts += [("code", f"{code}: {CODES[code].meaning}"), ("advice", CODES[code].advice)]
    if message:
        facts.append(("message", message))
    facts += _outcome_facts(outcome) if outcome else []
    facts += _receipt_facts(records.get("receipt"))
    lines = [f"{paint(row.job_id, 'bold')}  {paint(row.state, STATE_COLOURS.get(row.state, 'bold'))}"]
    lines += [line for label, text in facts for line in wrap(f"{label:{LABEL}}", text)]
    if outcome:
        lines += [*_artifacts(outcome), *_tail(outcome, paint)]
    return "\n".join(lines)


def _convert(value: object, type_: type[T]) -> T | None:
    try:
        return msgspec.convert(value, type_) if value is not None else None
    except msgspec.ValidationError:
        return None


def _outcome_facts(outcome: Outcome) -> Iterator[tuple[str, str]]:
    yield "exit", _exit(outcome)
    if outcome.timings:
        yield "times", ", ".join(f"{step} {seconds:.3f} s" for step, seconds in outcome.timings.items())
    usage = outcome.usage
    used = [
        ("wall", usage.wall_s, "s"),
        ("user", usage.user_s, "s"),
        ("system", usage.system_s, "s"),
        ("peak memory", _mebi(usage.peak_memory_bytes), "MiB"),
        ("read", _mebi(usage.read_bytes), "MiB"),
        ("written", _mebi(usage.written_bytes), "MiB"),
    ]
    yield (
        "usage",
        ", ".join(f"{name} {number:.2f} {unit}" for name, number, unit in used if number is not None),
    )
    if outcome.enforced:
        yield "limits", " ".join(f"{limit}={how}" for limit, how in sorted(outcome.enforced.items()))
    if outcome.result is not None:
        yield "result", msgspec.json.encode(outcome.result).decode()[:400]


def _receipt_facts(value: object) -> Iterator[tuple[str, str]]:
    kept = _convert(value, Receipt)
    if kept is None:
        return
    said = {name: value for name, value in kept.receipt.items() if isinstance(value, str)}
    signature = kept.receipt.get("signature")
    key = signature.get("key_id") if isinstance(signature, dict) else None
    # On its own line, so that no text of the receipt can hide or imitate the verdict.
    yield "receipt", f"verified, signed by {key}" if kept.verified else f"NOT VERIFIED: {kept.why}"
    unit = said.get("unit_type", "units")[:40]
    number = said.get("receipt_id", "none")[:64]
    yield "worth", f"{amount(kept.units)} {unit}, price {amount(kept.price)}; receipt {number}"


def amount(number: float | None) -> str:
    """Write a receipt's units or price."""
    if number is None:
        return "-"
    # 11 digits: further digits are rounding errors of the sum.
    text = f"{number:.{max(11 - len(str(int(number))), 0)}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def _mebi(size: int | None) -> float | None:
    return None if size is None else size / (1 << 20)


def _exit(outcome: Outcome) -> str:
    ended = outcome.exit
    if ended.signal is not None:
        names = {member.value: member.name for member in Signals}
        how = f"signal {ended.signal} ({names.get(ended.signal, 'real-time')})"
    else:
        # A lost job may have run, although its outcome has no times.
        ran = "run" in outcome.timings or outcome.code == ErrorCode.E_LOST
        how = "not run to its end" if ran else "never ran"
        how = how if ended.status is None else f"status {ended.status}"
    return f"{how}, ended by the miner ({ended.killed_for})" if ended.killed_for else how


def _artifacts(outcome: Outcome) -> Iterator[str]:
    if outcome.artifacts:
        yield f"artifacts ({len(outcome.artifacts)})"
    for artifact in outcome.artifacts[:MAX_ARTIFACTS]:
        told = f"  {artifact.bytes} bytes  {cut(artifact.type, 20)}"
        yield f"  {cut(artifact.path, max(20, width() - 2 - len(told)))}{told}"
        yield f"    sha256 {visible(artifact.sha256)}"
    if len(outcome.artifacts) > MAX_ARTIFACTS:
        yield f"  … and {len(outcome.artifacts) - MAX_ARTIFACTS} more; see `aitbc-minerctl --json job`"
    if outcome.left_out:
        yield "files in output/ that cannot be delivered"
    for left in outcome.left_out[:MAX_ARTIFACTS]:
        yield f"  {cut(left.path, 60)}  {cut(left.why, 60)}"


def _tail(outcome: Outcome, paint: Paint) -> Iterator[str]:
    log = outcome.log
    dropped = f", {log.dropped} dropped" if log.dropped else ""
    yield f"log ({log.bytes} bytes{dropped})"
    for line in log.tail.splitlines()[-10:]:
        yield paint("  | ", "dim") + cut(line, width() - 4)
    if log.bytes:
        yield f"  all of it: aitbc-minerctl logs {visible(outcome.job_id)}"
