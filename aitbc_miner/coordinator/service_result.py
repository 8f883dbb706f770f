"""Makes the result for a service's client: a JSON object of texts from the job under names of the service.

The coordinator trusts the units and prices in a result. So the service file chooses the names of the top
level, and cannot choose a name that the coordinator reads as money or time: no job sets its own price.
"""

import base64
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from aitbc_miner.errors import LocalError, MinerError
from aitbc_miner.jobs import Artifact, Outcome
from aitbc_miner.util import fs
from aitbc_miner.util.forgiving import too_deep

RESERVED = frozenset(
    {
        *("units", "price", "aitbc_earned", "cost", "duration_ms", "duration_seconds", "compute_time"),
        *("execution_time", "status", "metrics", "artifacts", "left_out"),
    }
)
LOG = "logs/exec.log"
MAX_INLINE = 6 << 20
"""The most bytes of all inline files together, before base64."""
MAX_RESULT = 9 << 20
"""The most bytes of a result. The coordinator refuses requests above 10 MiB."""


class FileChanged(MinerError):  # noqa: N818  # the name says what happened
    """A file cannot be sent as collected; trying again cannot help."""


def unsendable(file: str, error: OSError) -> MinerError:
    """Make the error for an unreadable file: LocalError if the cause may pass, else FileChanged."""
    kind = LocalError if fs.may_pass(error) else FileChanged
    return kind(f"cannot send {encodable(file)[:200]}: {error.strerror or error}")


class Source(Struct, frozen=True):
    """The source of one member of the result: the task's return value, a file, or the log.

    `task` is true for the whole value, or the name of one member. `file` is the path of an artifact.
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
    """Make the result of a job that succeeded; `root` is the job's directory.

    Raises:
        FileChanged: a file has changed since its collection, or the result is too large to send.
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
            f"cannot send the result: {size} bytes are more than the coordinator's {MAX_RESULT};"
            " lower inline_kb or max_kb of the service"
        )
    return made


def _value(source: Source, outcome: Outcome, root: Path) -> Any:
    if source.task:
        value = outcome.result
        if isinstance(source.task, str):
            return value.get(source.task) if isinstance(value, dict) else None
        return value
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
    """List the artifacts; small files have their content in `data`, up to `MAX_INLINE` together."""
    listed: list[dict[str, Any]] = []
    room = MAX_INLINE
    for one in artifacts:
        if one.path == LOG:
            continue
        entry: dict[str, Any] = {"path": encodable(one.path), "type": encodable(one.type)}
        entry |= {"bytes": one.bytes, "sha256": one.sha256}
        if one.bytes <= min(inline, room):
            room -= one.bytes
            data = _read(root, one.file, one.bytes)
            if len(data) != one.bytes:
                raise FileChanged(f"cannot send {entry['path']}: the file shrank after its collection")
            entry["data"] = base64.b64encode(data).decode()
        listed.append(entry)
    return listed


def encodable(text: str) -> str:
    """Return text that UTF-8 can encode: bytes of file names that are no characters become escapes."""
    return text.encode("utf-8", "backslashreplace").decode()


def _read(root: Path, file: str, most: int) -> bytes:
    with opened(root, file) as stream:
        return stream.read(most)


@contextmanager
def opened(root: Path, file: str) -> Iterator[BufferedReader]:
    """Open a file below the job's directory. Raises LocalError or FileChanged if it cannot be read."""
    try:
        with fs.directory(root) as directory, os.fdopen(fs.open_below(directory, file), "rb") as stream:
            yield stream
    except OSError as error:
        raise unsendable(file, error) from error
