"""What a service's client gets: a JSON object, made of what the job's own words say below names of ours.

The coordinator believes what stands in a result about units and prices. So the names at its top are the
service's, and those that it reads as money or time cannot be among them: no job sets its own price.
"""

import base64
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from aitbc_miner.errors import LocalError, MinerError
from aitbc_miner.jobs import Artifact, Outcome
from aitbc_miner.util import fs
from aitbc_miner.util.nesting import too_deep

RESERVED = frozenset(
    {
        *("units", "price", "aitbc_earned", "cost", "duration_ms", "duration_seconds", "compute_time"),
        *("execution_time", "status", "metrics", "artifacts", "left_out"),
    }
)
LOG = "logs/exec.log"
MAX_INLINE = 6 << 20
"""Of all files together, before they are encoded."""
MAX_RESULT = 9 << 20
"""Of the whole object: requests above 10 MiB are refused."""


class FileChanged(MinerError):  # noqa: N818  # says what happened
    """A file cannot be sent as it was collected: trying again cannot help."""


def unsendable(file: str, error: OSError) -> MinerError:
    """Say why a file cannot be sent, and whether that may pass."""
    kind = LocalError if fs.may_pass(error) else FileChanged
    return kind(f"cannot send {_printable(file)[:200]}: {error.strerror or error}")


class Source(Struct, frozen=True):
    """Where one member of the result comes from: what the task returned, or a file, or the log.

    `task` is true for all of it, or the name of one of its members. `file` is the path of an artifact.
    """

    task: bool | Annotated[str, Meta(max_length=255)] = False
    file: Annotated[str, Meta(max_length=4096)] | None = None
    log: bool = False
    form: Literal["text", "json"] = msgspec.field(name="as", default="text")
    max_kb: Annotated[int, Meta(ge=1, le=2048)] = 256

    def __post_init__(self) -> None:
        if sum((bool(self.task), self.file is not None, self.log)) != 1:
            raise ValueError("needs one of `task`, `file` and `log`")


class _Spec(Struct):
    result: dict[str, Source] = {}
    inline_kb: int = 1024


def result_object(manifest: Mapping[str, Any], outcome: Outcome, root: Path) -> dict[str, Any]:
    """Make the result of a job that did what it was asked to; `root` is its directory.

    Raises:
        FileChanged: a file is not as it was collected, or the whole is too large to be sent.
    """
    spec = msgspec.convert(manifest.get("service") or {}, _Spec)
    made = {
        name: _value(source, outcome, root) for name, source in spec.result.items() if name not in RESERVED
    }
    made["artifacts"] = _artifacts(outcome.artifacts, root, spec.inline_kb << 10)
    if outcome.left_out:
        made["left_out"] = msgspec.to_builtins(outcome.left_out)
    size = len(msgspec.json.encode(made))
    if size > MAX_RESULT:
        raise FileChanged(
            f"cannot send the result: it has {size} bytes, and the coordinator takes {MAX_RESULT}; "
            "lower inline_kb or max_kb of the service"
        )
    return made


def _value(source: Source, outcome: Outcome, root: Path) -> Any:
    if source.task:
        said = outcome.result
        if isinstance(source.task, str):
            return said.get(source.task) if isinstance(said, dict) else None
        return said
    most = source.max_kb << 10
    if source.log:
        return _text(_read(root, LOG, most))
    found = next((one for one in outcome.artifacts if one.path == source.file), None)
    if found is None:
        return None
    data = _read(root, found.file, min(most, found.bytes))
    return _json(data) if source.form == "json" and found.bytes <= most else _text(data)


def _json(data: bytes) -> Any:
    try:
        value = msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return _text(data)
    return _text(data) if too_deep(value) else value


def _text(data: bytes) -> str:
    return data.decode(errors="replace")


def _artifacts(artifacts: Sequence[Artifact], root: Path, inline: int) -> list[dict[str, Any]]:
    """List what was collected, small files with what is in them, as long as there is room for that."""
    listed: list[dict[str, Any]] = []
    room = MAX_INLINE
    for one in artifacts:
        if one.path == LOG:
            continue
        entry: dict[str, Any] = {"path": _printable(one.path), "type": _printable(one.type)}
        entry |= {"bytes": one.bytes, "sha256": one.sha256}
        if one.bytes <= min(inline, room):
            room -= one.bytes
            data = _read(root, one.file, one.bytes)
            if len(data) != one.bytes:
                raise FileChanged(f"cannot send {entry['path']}: it is shorter than when it was collected")
            entry["data"] = base64.b64encode(data).decode()
        listed.append(entry)
    return listed


def _printable(text: str) -> str:
    """Return text that UTF-8 can hold: names of files may carry bytes that are no characters."""
    return text.encode("utf-8", "backslashreplace").decode()


def _read(root: Path, file: str, most: int) -> bytes:
    try:
        with fs.directory(root) as directory, os.fdopen(fs.open_below(directory, file), "rb") as opened:
            return opened.read(most)
    except OSError as error:
        raise unsendable(file, error) from error
