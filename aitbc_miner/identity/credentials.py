"""Reads tokens from their sources: env:NAME, file:PATH or credential:NAME (systemd's LoadCredential=)."""

import hashlib
import os
import re
import stat
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Never

from aitbc_miner.errors import MinerError
from aitbc_miner.util import log
from aitbc_miner.util.trust import refusal

MAX_BYTES = 64 * 1024
_ENV = re.compile(r"env:[A-Za-z_][A-Za-z0-9_]*")
_FILE = re.compile(r"file:/[^\0]+")
_CREDENTIAL = re.compile(r"credential:(?!\.{1,2}$)[A-Za-z0-9._@-]+")


class CredentialError(MinerError):
    """A token cannot be read from its source. The message names the source and never the token."""


class Credential:
    """A token. `repr` shows only its source, and pickling raises: no log and no file gets the token."""

    __slots__ = ("_value", "source")

    def __init__(self, source: str, value: str) -> None:
        self.source = source
        self._value = value

    def reveal(self) -> str:
        """Return the token itself, for the code that sends it."""
        return self._value

    def __repr__(self) -> str:
        return f"<credential {self.source}>"

    def __reduce__(self) -> Never:
        raise TypeError("cannot pickle a credential: credentials must stay in the process")


def digest(token: str) -> str:
    """Give 16 hexadecimal digits that identify a token and do not reveal it."""
    return hashlib.sha256(token.encode()).hexdigest()[:16]


def parse_source(value: object) -> str:
    """Check the syntax of a source without reading the token.

    Raises:
        ValueError: the text is not a source. The message hides the text, which may be a misplaced token.
    """
    if isinstance(value, str):
        if any(pattern.fullmatch(value) for pattern in (_ENV, _FILE, _CREDENTIAL)):
            return value
        if value.startswith("pkcs11:"):
            raise ValueError("pkcs11: is not supported; use env:NAME, file:/PATH or credential:NAME")
    raise ValueError("must be env:NAME, file:/PATH or credential:NAME, never the token itself")


def read_credential(source: str, environ: Mapping[str, str], owners: Collection[int] = ()) -> Credential:
    """Read the token of `source` and mask it in the log; `environ` has also CREDENTIALS_DIRECTORY.

    `owners` are user ids that may own the token's file, besides root and the current user.

    Raises:
        CredentialError: the source is malformed, missing, open to others, empty, too large or not plain text.
    """
    try:
        kind, _, name = parse_source(source).partition(":")
    except ValueError as error:
        raise CredentialError(f"cannot read the credential: its source {error}") from None
    if kind == "env":
        value = environ.get(name)
        if value is None:
            raise _error(source, f"the variable is not set; set {name} or use another source")
    elif kind == "file":
        value = _read_file(source, Path(name), private=True)
        if untrusted := refusal(Path(name), owners):
            raise _error(source, untrusted)
    else:
        directory = environ.get("CREDENTIALS_DIRECTORY")
        if not directory:
            raise _error(source, f"systemd passed no credentials; add LoadCredential={name}:PATH to the unit")
        # systemd lets only the service's user read these files, whatever their mode.
        value = _read_file(source, Path(directory, name), private=False)
    token = _checked(source, value)
    log.mask(token)
    return Credential(source, token)


def stamp(source: str, environ: Mapping[str, str]) -> tuple[int, ...] | None:
    """Give values that change when a credential's file is replaced; None without a file."""
    kind, _, name = source.partition(":")
    directory = "/" if kind == "file" else environ.get("CREDENTIALS_DIRECTORY")
    if kind == "env" or not directory:
        return None
    try:
        found = Path(directory, name).stat()
    except OSError:
        return None
    return (found.st_dev, found.st_ino, found.st_mtime_ns, found.st_size)


def credential_of_root(source: str, environ: Mapping[str, str]) -> Credential | None:
    """Read a systemd credential as root, for a process that is about to become another user.

    If a service runs as root, only root can read its credentials. None for other sources, which the other
    user reads, and if reading fails: `read_credential` reports the cause when the token is needed.
    """
    if not source.startswith("credential:"):
        return None
    try:
        return read_credential(source, environ)
    except CredentialError:
        return None


def _read_file(source: str, path: Path, *, private: bool) -> str:
    try:
        # Opening a FIFO would wait for a writer.
        if not stat.S_ISREG(path.stat().st_mode):
            raise _error(source, "not a regular file; use a file that contains only the token")
        with path.open("rb") as stream:
            # The mode of the open file: another file may be at the path by now.
            mode = stat.S_IMODE(os.fstat(stream.fileno()).st_mode)
            if private and mode & (stat.S_IROTH | stat.S_IWOTH):
                raise _error(source, f"other users may read or write it (mode {mode:04o}); chmod o= {path}")
            return stream.read(MAX_BYTES + 1).decode("ascii")
    except FileNotFoundError:
        how = f"install -m 640 -g aitbc /dev/stdin {path}" if private else "check LoadCredential= of the unit"
        raise _error(source, f"the file does not exist; {how}") from None
    except OSError as error:
        raise _error(source, f"{error.strerror}; check that the node may read {path}") from None
    except UnicodeDecodeError:
        raise _error(source, "the file has non-ASCII bytes; write only the token into the file") from None


def _checked(source: str, text: str) -> str:
    value = text.rstrip("\r\n")
    if not value:
        raise _error(source, "the source is empty; put the token there")
    if len(text) > MAX_BYTES:
        raise _error(source, f"the source is larger than {MAX_BYTES} bytes; put only the token there")
    if not all("!" <= letter <= "~" for letter in value):
        raise _error(source, "the token has spaces, line breaks or non-ASCII characters; remove them")
    return value


def _error(source: str, cause: str) -> CredentialError:
    return CredentialError(f"cannot read the credential {source}: {cause}")
