"""Tokens named by where they are kept: env:NAME, file:PATH or credential:NAME (systemd's LoadCredential=)."""

import hashlib
import os
import re
import stat
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Never

from aitbc_miner.errors import MinerError
from aitbc_miner.util.trust import refusal

MAX_BYTES = 64 * 1024
_ENV = re.compile(r"env:[A-Za-z_][A-Za-z0-9_]*")
_FILE = re.compile(r"file:/[^\0]+")
_CREDENTIAL = re.compile(r"credential:(?!\.{1,2}$)[A-Za-z0-9._@-]+")


class CredentialError(MinerError):
    """The token cannot be had from its source; the message names the source and never the token."""


class Credential:
    """A token that does not show itself: neither in text and logs nor in a pickle."""

    __slots__ = ("_value", "source")

    def __init__(self, source: str, value: str) -> None:
        self.source = source
        self._value = value

    def reveal(self) -> str:
        """Return the token itself, for the one place that sends it."""
        return self._value

    def __repr__(self) -> str:
        return f"<credential {self.source}>"

    def __reduce__(self) -> Never:
        raise TypeError("cannot pickle a credential: it must not leave the process that read it")


def digest(token: str) -> str:
    """Name a token without telling it."""
    return hashlib.sha256(token.encode()).hexdigest()[:16]


def parse_source(value: object) -> str:
    """Check that a text names a source, without reading it.

    Raises:
        ValueError: it does not; the message never shows the text, which may be a token written by mistake.
    """
    if isinstance(value, str):
        if any(pattern.fullmatch(value) for pattern in (_ENV, _FILE, _CREDENTIAL)):
            return value
        if value.startswith("pkcs11:"):
            raise ValueError("pkcs11: is not in this version; use env:NAME, file:/PATH or credential:NAME")
    raise ValueError("must be env:NAME, file:/PATH or credential:NAME, never the token itself")


def read_credential(source: str, environ: Mapping[str, str], owners: Collection[int] = ()) -> Credential:
    """Read the token that `source` names; `environ` has the variables and CREDENTIALS_DIRECTORY.

    `owners` are user ids that may own its file, besides root and our own.

    Raises:
        CredentialError: the source is none, is missing, open to others, empty, too large or not plain text.
    """
    try:
        kind, _, name = parse_source(source).partition(":")
    except ValueError as error:
        raise CredentialError(f"cannot read the credential: its source {error}") from None
    if kind == "env":
        value = environ.get(name)
        if value is None:
            raise _error(source, f"the variable is not set; set {name} or name another source")
    elif kind == "file":
        value = _read_file(source, Path(name), private=True)
        if untrusted := refusal(Path(name), owners):
            raise _error(source, untrusted)
    else:
        directory = environ.get("CREDENTIALS_DIRECTORY")
        if not directory:
            raise _error(
                source, f"not started by systemd with it; add LoadCredential={name}:PATH to the unit"
            )
        # systemd has made these readable for the service's user alone, whatever their mode says.
        value = _read_file(source, Path(directory, name), private=False)
    return Credential(source, _checked(source, value))


def stamp(source: str, environ: Mapping[str, str]) -> tuple[int, ...] | None:
    """Give what is another when the file of a credential is replaced; None where there is none to be seen."""
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
    """Read a token that only root can, for a process that is about to become another user.

    systemd opens the credentials of a service of root to root alone. None for what that user reads himself,
    and for what cannot be read: then the reason is told when it is wanted.
    """
    if not source.startswith("credential:"):
        return None
    try:
        return read_credential(source, environ)
    except CredentialError:
        return None


def _read_file(source: str, path: Path, *, private: bool) -> str:
    try:
        # A FIFO would make the open wait for its writer.
        if not stat.S_ISREG(path.stat().st_mode):
            raise _error(source, "not a regular file; name a file that holds only the token")
        with path.open("rb") as stream:
            # Asked of the open file: the path may have been exchanged in between.
            mode = stat.S_IMODE(os.fstat(stream.fileno()).st_mode)
            if private and mode & (stat.S_IROTH | stat.S_IWOTH):
                raise _error(source, f"its mode {mode:04o} lets others read or write it; chmod o= {path}")
            return stream.read(MAX_BYTES + 1).decode("ascii")
    except OSError as error:
        raise _error(source, f"{error.strerror}; check that the file is there and ours to read") from None
    except UnicodeDecodeError:
        raise _error(source, "it is not plain ASCII; write only the token into it") from None


def _checked(source: str, text: str) -> str:
    value = text.rstrip("\r\n")
    if not value:
        raise _error(source, "it is empty; write the token into it")
    if len(text) > MAX_BYTES:
        raise _error(source, f"it is larger than {MAX_BYTES} bytes; is this the right source?")
    if not all("!" <= letter <= "~" for letter in value):
        raise _error(
            source, "it has spaces, line breaks or other than ASCII characters; write only the token"
        )
    return value


def _error(source: str, cause: str) -> CredentialError:
    return CredentialError(f"cannot read the credential {source}: {cause}")
