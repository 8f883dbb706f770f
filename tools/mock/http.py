"""HTTP below the calls: bodies as they come in, multipart forms as they stream by, replies as they go out."""

import hashlib
import json
import re
import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from email.message import Message
from email.parser import HeaderParser
from enum import StrEnum
from io import BufferedIOBase
from pathlib import Path
from typing import Any
from urllib.parse import unquote

BLOCK = 256 * 1024
MAX_TEXT = 4 * 1024 * 1024
MAX_HEADERS = 16 * 1024
PARAMETER = re.compile(r';\s*([\w*-]+)=(?:"([^"]*)"|([^;\s]*))')
ENDLESS_BYTES = 1024**3


class Refusal(Exception):  # noqa: N818  not every refusal is an error: 409 is an answer
    """The answer to a call is an HTTP error status."""

    def __init__(self, status: int, code: str, message: str, **headers: str) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.headers = headers


def json_object(text: str | bytes, what: str) -> dict[str, Any]:
    """Decode a JSON object that a client sent.

    Raises:
        Refusal: 400, the body is no JSON, is nested too deeply, or is no object.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Refusal(400, "bad_json", f"cannot read {what}: not JSON: {error}") from error
    if not isinstance(value, dict):
        raise Refusal(400, "bad_json", f"cannot read {what}: {type(value).__name__} is not an object")
    return value


def text_member(source: dict[str, Any], name: str) -> str:
    """Return a member that must be a non-empty string. Raises Refusal (400) otherwise."""
    value = source.get(name)
    if not isinstance(value, str) or not value:
        raise Refusal(400, "bad_request", f"{name} must be a string that is not empty")
    return value


class Body:
    """The body of one request, by Content-Length or chunked; `read` never goes past its end."""

    def __init__(self, stream: BufferedIOBase, headers: Message) -> None:
        self._stream = stream
        self._chunked = "chunked" in headers.get("Transfer-Encoding", "").lower()
        length = headers.get("Content-Length", "0")
        self._left = 0 if self._chunked or not length.isdigit() else int(length)
        self._ended = not self._chunked and self._left == 0

    def read(self, limit: int = BLOCK) -> bytes:
        """Return at most `limit` bytes; b"" at the end.

        Raises:
            ConnectionError: the client stopped half-way, so that it can get no reply.
        """
        if self._chunked and not self._left and not self._ended:
            self._next_chunk()
        if self._ended:
            return b""
        data = self._stream.read(min(limit, self._left))
        if not data:
            raise ConnectionAbortedError("request body cut short")
        self._left -= len(data)
        if not self._left:
            if self._chunked:
                self._line()
            else:
                self._ended = True
        return data

    def text(self, limit: int = MAX_TEXT) -> bytes:
        """Return the whole body."""
        data = bytearray()
        while block := self.read():
            data += block
            if len(data) > limit:
                raise Refusal(413, "too_large", f"cannot take the body: it is over {limit} bytes")
        return bytes(data)

    def drain(self) -> None:
        """Read the rest of the body, because the connection's next request begins after it."""
        while self.read():
            pass

    def _next_chunk(self) -> None:
        size = self._line().split(b";")[0].strip()
        try:
            self._left = int(size, 16)
        except ValueError:
            raise ConnectionAbortedError("chunk without a size") from None
        if self._left == 0:
            self._ended = True
            while self._line():
                pass

    def _line(self) -> bytes:
        line = self._stream.readline(MAX_HEADERS)
        if not line.endswith(b"\n"):
            raise ConnectionAbortedError("request body cut short")
        return line.rstrip(b"\r\n")


@dataclass(frozen=True)
class SavedArtifact:
    """An uploaded file: the sender's name for the file, and its path here."""

    path: str
    file: Path
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Form:
    """A multipart form: its text fields, and its artifacts on disk."""

    fields: dict[str, str] = field(default_factory=dict)
    artifacts: list[SavedArtifact] = field(default_factory=list)

    def discard(self) -> None:
        """Delete the saved files."""
        for artifact in self.artifacts:
            artifact.file.unlink(missing_ok=True)


@dataclass(frozen=True)
class Part:
    """A part of a multipart body; read all `chunks` before the next part."""

    name: str
    filename: str | None
    chunks: Iterator[bytes]


class Multipart:
    """Cuts a streamed multipart body into its parts; holds one block at a time."""

    def __init__(self, read: Callable[[], bytes], boundary: str) -> None:
        self._read = read
        self._delimiter = b"\r\n--" + boundary.encode()
        # The first delimiter of a body may lack the line break that all others have.
        self._buffer = bytearray(b"\r\n")

    def parts(self) -> Iterator[Part]:
        """Yield each part in turn."""
        for _ in self._up_to(self._delimiter):
            pass
        while not self._at_end():
            yield self._part()

    def _at_end(self) -> bool:
        while len(self._buffer) < 2:
            self._fill()
        mark = bytes(self._buffer[:2])
        if mark not in {b"--", b"\r\n"}:
            raise Refusal(400, "bad_form", "cannot read the form: a boundary line goes on after the boundary")
        return mark == b"--"

    def _part(self) -> Part:
        # The boundary's own line break stays in the buffer, so that a part without headers is found too.
        text = bytearray()
        for block in self._up_to(b"\r\n\r\n"):
            text += block
            if len(text) > MAX_HEADERS:
                raise Refusal(400, "bad_form", f"cannot read the form: part headers over {MAX_HEADERS} bytes")
        headers = HeaderParser().parsestr(text.decode(errors="replace").lstrip("\r\n"))
        told = _parameters(headers.get("Content-Disposition", ""))
        return Part(told.get("name", ""), told.get("filename"), self._up_to(self._delimiter))

    def _up_to(self, mark: bytes) -> Iterator[bytes]:
        """Yield the bytes before `mark`, and drop the mark."""
        keep = len(mark) - 1
        while (at := self._buffer.find(mark)) < 0:
            if len(self._buffer) > keep:
                yield bytes(self._buffer[:-keep])
                del self._buffer[:-keep]
            self._fill()
        yield bytes(self._buffer[:at])
        del self._buffer[: at + len(mark)]

    def _fill(self) -> None:
        block = self._read()
        if not block:
            raise Refusal(400, "bad_form", "cannot read the form: it ends before its last boundary")
        self._buffer += block


def _parameters(disposition: str) -> dict[str, str]:
    # As browsers write them: %22, %0D and %0A are escapes and a backslash is none. `email` knows neither.
    found = {
        each[1].lower(): each[2] if each[2] is not None else each[3]
        for each in PARAMETER.finditer(disposition)
    }
    for escaped, plain in (("%22", '"'), ("%0A", "\n"), ("%0D", "\r")):
        found = {name: value.replace(escaped, plain) for name, value in found.items()}
    if "filename*" in found:
        found["filename"] = unquote(found["filename*"].removeprefix("utf-8''"))
    return found


def receive_form(body: Body, content_type: str, folder: Path) -> Form:
    """Read a multipart body, each `artifact` part into a new file of `folder`, other parts as text.

    Raises:
        Refusal: 400 or 413; the saved files are deleted.
        ConnectionError: the client stopped half-way; the saved files are deleted.
    """
    head = HeaderParser().parsestr(f"Content-Type: {content_type}\r\n\r\n")
    boundary = head.get_boundary()
    if head.get_content_type() != "multipart/form-data" or not boundary:
        raise Refusal(
            400, "bad_form", "cannot read the form: Content-Type is not multipart/form-data with a boundary"
        )
    form = Form()
    try:
        for part in Multipart(body.read, boundary).parts():
            _take_part(part, form, folder)
        body.drain()
    except BaseException:
        form.discard()
        raise
    return form


def _take_part(part: Part, form: Form, folder: Path) -> None:
    if part.name == "artifact" and part.filename:
        form.artifacts.append(_save(part, folder))
    elif part.filename is not None or not part.name or part.name in form.fields:
        raise Refusal(
            400, "bad_form", f"cannot read the form: part {part.name!r} is unexpected or comes twice"
        )
    else:
        text = bytearray()
        for chunk in part.chunks:
            text += chunk
            if len(text) > MAX_TEXT:
                raise Refusal(
                    413, "too_large", f"cannot read the form: field {part.name!r} over {MAX_TEXT} bytes"
                )
        form.fields[part.name] = text.decode(errors="replace")


def _save(part: Part, folder: Path) -> SavedArtifact:
    file = folder / f"artifact-{secrets.token_hex(8)}"
    digest = hashlib.sha256()
    size = 0
    try:
        with file.open("xb") as out:
            for chunk in part.chunks:
                digest.update(chunk)
                size += out.write(chunk)
    except BaseException:
        file.unlink(missing_ok=True)
        raise
    return SavedArtifact(part.filename or "", file, size, digest.hexdigest())


@dataclass(frozen=True)
class FileSpan:
    """A part of a file, in bytes."""

    path: Path
    start: int
    length: int

    def chunks(self, limit: int) -> Iterator[bytes]:
        """Yield the part's first `limit` bytes."""
        left = min(limit, self.length)
        with self.path.open("rb") as file:
            file.seek(self.start)
            while left > 0 and (block := file.read(min(BLOCK, left))):
                left -= len(block)
                yield block


class Sending(StrEnum):
    """The way to send a reply: correctly, or with a fault that a client must survive."""

    WHOLE = "whole"
    HALF = "half"
    SLOW = "slow"
    ENDLESS = "endless"
    NOTHING = "nothing"


@dataclass(frozen=True)
class Reply:
    """An answer; status 0: no answer. `byte_s`: the seconds for each byte of a slow answer."""

    status: int = 200
    body: bytes | FileSpan = b""
    content_type: str = "application/json"
    headers: dict[str, str] = field(default_factory=dict)
    sending: Sending = Sending.WHOLE
    byte_s: float = 1.0

    @property
    def length(self) -> int:
        """The length of the whole body in bytes."""
        return self.body.length if isinstance(self.body, FileSpan) else len(self.body)

    def blocks(self, pause: Callable[[float], bool]) -> Iterator[bytes]:
        """Yield the bytes to send; `pause` waits, and returns true if the server stops."""
        if self.sending is Sending.ENDLESS:
            filler = b" " * BLOCK
            yield from (filler for _ in range(ENDLESS_BYTES // BLOCK))
            return
        limit = self.length // 2 if self.sending is Sending.HALF else self.length
        blocks = self.body.chunks(limit) if isinstance(self.body, FileSpan) else iter([self.body[:limit]])
        if self.sending is not Sending.SLOW:
            yield from blocks
            return
        for block in blocks:
            for byte in block:
                yield bytes([byte])
                if pause(self.byte_s):
                    return


def json_reply(value: object, status: int = 200, **headers: str) -> Reply:
    """Return a reply with a JSON body; names of headers have `_` for `-`."""
    named = {name.replace("_", "-"): text for name, text in headers.items()}
    return Reply(status, json.dumps(value).encode(), headers=named)


def error_reply(status: int, code: str, message: str, **headers: str) -> Reply:
    """Return an error in the dialect's shape."""
    return json_reply({"error": {"code": code, "message": message, "details": {}}}, status, **headers)
