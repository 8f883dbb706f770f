"""Tokens named by source: what is read, what is refused, and that no token ever shows."""

import os
import pickle
import traceback
from pathlib import Path

import pytest

from aitbc_miner.identity.credentials import (
    Credential,
    CredentialError,
    credential_of_root,
    parse_source,
    read_credential,
)

TOKEN = "s3cr3t-t0ken"
SOURCES = "must be env:NAME, file:/PATH or credential:NAME, never the token itself"


def _file(tmp_path: Path, content: bytes = TOKEN.encode(), mode: int = 0o600) -> str:
    path = tmp_path / "token"
    path.write_bytes(content)
    path.chmod(mode)
    return f"file:{path}"


def _refusal(source: str, environ: dict[str, str] | None = None) -> str:
    with pytest.raises(CredentialError) as caught:
        read_credential(source, environ or {})
    assert TOKEN not in "".join(traceback.format_exception(caught.value))
    return str(caught.value)


def test_from_the_environment() -> None:
    credential = read_credential("env:MINER_AUTH", {"MINER_AUTH": TOKEN + "\n"})
    assert credential.reveal() == TOKEN
    assert credential.source == "env:MINER_AUTH"


@pytest.mark.parametrize("content", [TOKEN, TOKEN + "\n", TOKEN + "\r\n"])
@pytest.mark.parametrize("mode", [0o400, 0o600, 0o640])
def test_from_a_file(tmp_path: Path, content: str, mode: int) -> None:
    assert read_credential(_file(tmp_path, content.encode(), mode), {}).reveal() == TOKEN


def test_a_missing_file_has_the_remedy_of_its_source(tmp_path: Path) -> None:
    path = tmp_path / "none"
    missing = "the file does not exist;"
    assert _refusal(f"file:{path}").endswith(f": {missing} install -m 640 -g aitbc /dev/stdin {path}")
    environ = {"CREDENTIALS_DIRECTORY": str(tmp_path)}
    assert _refusal("credential:none", environ).endswith(f": {missing} check LoadCredential= of the unit")


def test_from_systemd(tmp_path: Path) -> None:
    _file(tmp_path, mode=0o444)
    environ = {"CREDENTIALS_DIRECTORY": str(tmp_path)}
    assert read_credential("credential:token", environ).reveal() == TOKEN


def test_it_never_shows_itself() -> None:
    credential = Credential("env:X", TOKEN)
    assert repr(credential) == str(credential) == f"{credential}" == "<credential env:X>"
    with pytest.raises(TypeError, match="cannot pickle a credential") as caught:
        pickle.dumps(credential)
    assert TOKEN not in str(caught.value)


def test_a_file_that_a_group_can_write(tmp_path: Path) -> None:
    source = _file(tmp_path, mode=0o660)
    path = source.removeprefix("file:")
    cause = f"cannot trust this file: {path} can be written by others (mode 0660); correct it with chown or"
    assert _refusal(source) == f"cannot read the credential {source}: {cause} chmod"


@pytest.mark.parametrize("mode", [0o604, 0o602, 0o644, 0o666])
def test_a_file_open_to_others(tmp_path: Path, mode: int) -> None:
    source = _file(tmp_path, mode=mode)
    path = source.removeprefix("file:")
    cause = f"other users may read or write it (mode {mode:04o}); chmod o= {path}"
    assert _refusal(source) == f"cannot read the credential {source}: {cause}"


def test_an_unset_variable() -> None:
    assert _refusal("env:NOPE") == (
        "cannot read the credential env:NOPE: the variable is not set; set NOPE or use another source"
    )


def test_systemd_without_the_credential(tmp_path: Path) -> None:
    assert "add LoadCredential=token:PATH to the unit" in _refusal("credential:token")
    assert "the file does not exist; " in _refusal(
        "credential:token", {"CREDENTIALS_DIRECTORY": str(tmp_path)}
    )


def test_not_a_regular_file(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    assert "not a regular file" in _refusal(f"file:{fifo}")
    assert "not a regular file" in _refusal(f"file:{tmp_path}")
    assert "the file does not exist; " in _refusal(f"file:{tmp_path}/nope")


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        (b"", "the source is empty"),
        (b"\n\n", "the source is empty"),
        (b"a" * (64 * 1024 + 1), "the source is larger than 65536 bytes"),
        (TOKEN.encode() + b" x", "the token has spaces"),
        (TOKEN.encode() + b"\nHost: evil", "the token has spaces, line breaks"),
        (TOKEN.encode() + b"\x00", "the token has spaces, line breaks or non-ASCII"),
        (TOKEN.encode() + "é".encode(), "the file has non-ASCII bytes"),
    ],
)
def test_content_that_is_no_token(tmp_path: Path, content: bytes, cause: str) -> None:
    assert cause in _refusal(_file(tmp_path, content))


def test_a_variable_that_is_no_token() -> None:
    assert "the source is empty" in _refusal("env:X", {"X": ""})
    assert "non-ASCII characters" in _refusal("env:X", {"X": TOKEN + "\udcff"})


@pytest.mark.parametrize(
    "source",
    [
        TOKEN,
        "",
        "env:",
        "env:1X",
        "env:A B",
        "file:",
        "file:relative",
        "credential:",
        "credential:..",
        "credential:a/b",
        None,
        7,
    ],
)
def test_what_is_no_source(source: object) -> None:
    with pytest.raises(ValueError, match=f"^{SOURCES}$"):
        parse_source(source)


def test_pkcs11_is_for_later() -> None:
    with pytest.raises(ValueError, match="pkcs11: is not supported; use env:NAME") as caught:
        parse_source("pkcs11:object=x;pin-value=1234")
    assert "1234" not in str(caught.value)


def test_a_literal_token_is_refused_unseen() -> None:
    assert _refusal(TOKEN) == f"cannot read the credential: its source {SOURCES}"


def test_only_what_root_alone_can_read_is_read_early(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("secret-token\n")
    environ = {"CREDENTIALS_DIRECTORY": str(tmp_path), "TOKEN": "other"}
    early = credential_of_root("credential:token", environ)
    assert early is not None
    assert early.reveal() == "secret-token"
    assert credential_of_root("credential:absent", environ) is None
    assert credential_of_root("env:TOKEN", environ) is None
