"""Puts a job's inputs into its directory: inline texts, and files from http(s) addresses.

The addresses come from a stranger and are fetched from inside the operator's network. So what a name resolves
to is checked, and the connection is made to that very address: never link-local, multicast or a cloud's
metadata service, and loopback or a private network only if allowed. Not covered: a public address that
forwards into the network. No credentials, cookies or netrc are ever sent.
"""

import contextlib
import errno
import functools
import hashlib
import http.client
import io
import ipaddress
import os
import re
import secrets
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import unquote_to_bytes, urljoin

from msgspec import Struct
from urllib3.util import Url, parse_url

from aitbc_miner.errors import ErrorCode, JobError, MinerError
from aitbc_miner.jobs import InputUrl, Manifest
from aitbc_miner.util.backoff import Backoff
from aitbc_miner.util.clock import now

READ = 256 * 1024
POLL_S = 0.25  # how soon a cancelled job stops waiting
BACKOFF_S = (0.1, 8.0)
RETRIED = frozenset({408, 425, 429, 500, 502, 503, 504})
REDIRECTS = frozenset({301, 302, 303, 307, 308})

# Metadata services outside the ranges of `_forbidden`: Alibaba, Oracle, Azure, AWS and Google on IPv6.
_METADATA = ["100.100.100.200", "192.0.0.192", "168.63.129.16", "fd00:ec2::254", "fd20:ce::254"]
_HEADERS = {"User-Agent": "aitbc-miner", "Accept-Encoding": "identity", "Connection": "close"}
_PUBLIC_V6 = ipaddress.IPv6Network("2000::/3")
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
_CONTENT_RANGE = re.compile(r"bytes ([0-9]{1,18})-[0-9]{1,18}/([0-9]{1,18}|\*)")


class InputLimits(Struct, frozen=True):
    """Bounds for a job's inputs: seconds in all and without a byte, failures in a row, and so on."""

    max_bytes_each: int
    max_bytes_total: int
    timeout_s: float
    stall_s: float
    max_redirects: int = 5
    attempts: int = 4


class _Broken(MinerError):  # noqa: N818  # says what happened
    """A transfer failed in a way that another attempt may mend."""


def fetch_inputs(
    manifest: Manifest,
    into: Path,
    *,
    limits: InputLimits,
    cancelled: Callable[[], bool] = lambda: False,
    allow_private: bool = False,
    wait: Callable[[float], None] = time.sleep,
) -> None:
    """Write all inputs of a job into an existing, empty directory, for their owner alone.

    `cancelled` is asked at least every quarter of a second, but for looking a name up and connecting, which
    last until the resolver or `stall_s` gives up. Content encodings are not undone.

    Raises:
        JobError: E_INPUT naming the input and the cause, E_DISK when the disk is full, E_CANCELLED.
    """
    urls = [InputUrl(item) if isinstance(item, str) else item for item in manifest.input.urls]
    names = [*manifest.input.inline, *(_name(item) for item in urls)]
    _check_names(names)
    run = _Run(limits, cancelled, wait, allow_private, now() + limits.timeout_s)
    try:
        for name, text in manifest.input.inline.items():
            data = text.encode("utf-8", "replace")
            run.claim(name, 0, len(data), limits.max_bytes_each)
            with _create(into / name) as file:
                _Transfer(name, file).write(data)
            run.fetched += len(data)
        for item, name in zip(urls, names[len(manifest.input.inline) :], strict=True):
            _fetch(item, name, into, run)
    except OSError as error:
        raise _disk_error(error) from error


def _disk_error(error: OSError) -> JobError:
    code = ErrorCode.E_DISK if error.errno in {errno.ENOSPC, errno.EDQUOT} else ErrorCode.E_INTERNAL
    return JobError(code, f"cannot write the inputs: {error.strerror or error}")


def _create(path: Path) -> BinaryIO:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    os.fchmod(fd, 0o600)  # whatever our umask; the job's user will own it
    return open(fd, "wb")  # noqa: PTH123  # a descriptor, not a path


def _refuse(message: str) -> JobError:
    return JobError(ErrorCode.E_INPUT, message)


def _name(item: InputUrl) -> str:
    """Return the name of an input: its own, or the last part of the URL's path, percent-decoded."""
    part = (_parse(item.url).path or "").rpartition("/")[2]
    return unquote_to_bytes(part).decode("utf-8", "surrogateescape") if item.name is None else item.name


def _check_names(names: list[str]) -> None:
    for place, name in enumerate(names):
        if fault := _name_fault(name) or ("it is there twice" if name in names[:place] else None):
            raise _refuse(f"cannot take input {name[:80]!a}: {fault}")


def _name_fault(name: str) -> str | None:
    if not name:
        return "it has no name; give it one with 'name'"
    if name in {".", ".."} or "/" in name:
        return "a name must not be a path"
    if name.startswith("-"):
        return "a name must not begin with a dash, programs would take it for an option"
    if any(ord(c) < 32 or 0x7F <= ord(c) < 0xA0 or 0xD800 <= ord(c) < 0xE000 for c in name):
        return "a name must be UTF-8 without control characters"
    return "a name must not be longer than 255 bytes" if len(name.encode()) > 255 else None


def _parse(url: str, base: str = "") -> Url:
    """Parse an address and bring it into the form that is sent. Raises JobError for what is never fetched."""
    try:
        parsed = parse_url(urljoin(base, url))
    except ValueError as error:
        raise _refuse(f"cannot fetch {_shown(url)}: it is not a URL") from error
    if parsed.scheme not in {"http", "https"}:
        raise _refuse(f"cannot fetch {_shown(url)}: only http and https addresses are fetched")
    if not parsed.host or parsed.auth:
        raise _refuse(f"cannot fetch {_shown(parsed.url)}: an address needs a host and no user name")
    return parsed


def _shown(url: str) -> str:
    """Return an address as it may be shown: query and password are often secrets."""
    plain = re.sub(r"//[^/?#]*@", "//", re.split(r"[?#]", url, maxsplit=1)[0])
    return "".join(c if c.isprintable() else "?" for c in plain[:200])


@dataclass
class _Run:
    """One fetch_inputs: its bounds, and what is used up of them."""

    limits: InputLimits
    cancelled: Callable[[], bool]
    wait: Callable[[float], None]
    allow_private: bool
    deadline: float
    fetched: int = 0

    @functools.cached_property
    def tls(self) -> ssl.SSLContext:
        """The system's certificates, read when first needed: that takes tens of milliseconds."""
        return ssl.create_default_context()

    def patience(self) -> float:
        """Seconds that one step may block. Raises JobError when the job is cancelled or time is up."""
        if self.cancelled():
            raise JobError(ErrorCode.E_CANCELLED, "cannot fetch the inputs: the job was cancelled")
        left = self.deadline - now()
        if left <= 0:
            raise _refuse(f"cannot fetch the inputs: not complete after {self.limits.timeout_s:g} s")
        return min(left, self.limits.stall_s)

    def pause(self, delay: float) -> None:
        """Wait before another attempt. Raises JobError like `patience`."""
        while delay > 0:
            self.patience()
            self.wait(min(delay, POLL_S))
            delay -= POLL_S

    def claim(self, what: str, got: int, size: int, cap: float) -> None:
        """Check that `size` more bytes are within all bounds, for an input that has `got` already."""
        if got + size > cap:
            raise _refuse(f"cannot take input {what}: it is larger than {int(cap)} bytes")
        if self.fetched + got + size > self.limits.max_bytes_total:
            total = self.limits.max_bytes_total
            raise _refuse(f"cannot take input {what}: all inputs together are larger than {total} bytes")


class _Transfer:
    """One input on its way to disk: what is there of it, and how to tell that the rest belongs to it."""

    def __init__(self, name: str, file: BinaryIO, cap: float = 0.0) -> None:
        self.name = name
        self.cap = cap
        self._file = file
        self.restart()

    def restart(self, reply: http.client.HTTPResponse | None = None) -> None:
        """Forget what came so far; `reply` brings a first or another version, known by its headers."""
        self._file.seek(0)
        self._file.truncate()
        self.sha256 = hashlib.sha256()
        self.got = 0
        self.total = reply.length if reply else None
        self.etag = reply.headers.get("ETag") if reply else None
        self.modified = reply.headers.get("Last-Modified") if reply else None

    def headers(self) -> dict[str, str]:
        """Ask for the rest, unless the file has changed since."""
        if not self.got:
            return {}
        validator = self.modified if not self.etag or self.etag.startswith("W/") else self.etag
        return {"Range": f"bytes={self.got}-", **({"If-Range": validator} if validator else {})}

    def continues(self, reply: http.client.HTTPResponse) -> bool:
        """Whether a 206 is the rest of what is there, going by what it says of itself."""
        said = _CONTENT_RANGE.fullmatch(reply.headers.get("Content-Range", "").strip())
        if said is None or int(said[1]) != self.got or reply.headers.get("ETag", self.etag) != self.etag:
            return False
        return said[2] == "*" or self.total in {None, int(said[2])}

    def write(self, data: bytes) -> None:
        """Append to file and hash. Raises JobError, lest a full disk is taken for a broken network."""
        try:
            self._file.write(data)
        except OSError as error:
            raise _disk_error(error) from error
        self.sha256.update(data)
        self.got += len(data)


def _fetch(item: InputUrl, name: str, into: Path, run: _Run) -> None:
    part = into / f".{secrets.token_hex(8)}.part"  # a name that no other input can have
    cap = min(run.limits.max_bytes_each, item.max_mb * 1e6 if item.max_mb is not None else float("inf"))
    try:
        with _create(part) as file:
            transfer = _Transfer(name, file, cap)
            _persist(item, transfer, run)
        digest = transfer.sha256.hexdigest()
        if item.sha256 and digest != item.sha256.lower():
            raise _refuse(f"cannot take input {name}: its sha256 is {digest}, not {item.sha256}")
        part.rename(into / name)
    finally:
        part.unlink(missing_ok=True)
    run.fetched += transfer.got


def _persist(item: InputUrl, transfer: _Transfer, run: _Run) -> None:
    """Attempt until complete; only failures in a row count, so a long transfer may break off often."""
    failures, furthest = 0, 0
    backoff = Backoff(*BACKOFF_S)
    while True:
        try:
            _attempt(item.url, transfer, run)
            break
        except _Broken as error:
            failures += 1
            if transfer.got > furthest:
                failures, furthest = 1, transfer.got
                backoff.reset()
            if failures >= run.limits.attempts:
                raise _refuse(f"cannot fetch {_shown(item.url)}: {error} ({failures} attempts)") from error
            run.pause(backoff.next())


def _attempt(url: str, transfer: _Transfer, run: _Run) -> None:
    asked = transfer.headers()
    for _ in range(run.limits.max_redirects + 1):
        with _network(), contextlib.closing(_connection(url, run)) as connection:
            connection.request("GET", _parse(url).request_uri, headers=_HEADERS | asked)
            with connection.getresponse() as reply:
                if reply.status not in REDIRECTS:
                    _check_status(reply, url, transfer, resumed=bool(asked))
                    _receive(reply, transfer, run)
                    return
        url = _redirected(url, reply.headers.get("Location", ""))
    raise _refuse(f"cannot fetch {_shown(url)}: more than {run.limits.max_redirects} redirects")


@contextlib.contextmanager
def _network() -> Iterator[None]:
    """Turn the errors of a connection into _Broken; those of the disk come as JobError and pass."""
    try:
        yield
    except ssl.SSLCertVerificationError as error:
        raise _Broken(f"its TLS certificate is not trusted: {error.verify_message}") from error
    except TimeoutError as error:
        raise _Broken("the server does not answer, or has stopped sending") from error
    except OSError as error:
        raise _Broken((error.strerror or "the server closed the connection").lower()) from error
    except (http.client.HTTPException, UnicodeError) as error:
        raise _Broken("the reply is not HTTP, or was cut short") from error


def _redirected(url: str, location: str) -> str:
    target = _parse(location, url)
    if _parse(url).scheme == "https" != target.scheme:
        raise _refuse(f"cannot fetch {_shown(url)}: it redirects from https to {_shown(target.url)}")
    return target.url


def _check_status(reply: http.client.HTTPResponse, url: str, transfer: _Transfer, *, resumed: bool) -> None:
    """Make the transfer ready for what follows. Raises _Broken or JobError if that is not the input."""
    if reply.status == 200:
        transfer.restart(reply)
    elif reply.status in {206, 416} and resumed:
        if reply.status == 416 or not transfer.continues(reply):
            transfer.restart()
            raise _Broken("the server cannot go on where the transfer broke off")
    elif reply.status in RETRIED:
        raise _Broken(f"the server answered {reply.status}")
    else:
        raise _refuse(f"cannot fetch {_shown(url)}: the server answered {reply.status}")


def _receive(reply: http.client.HTTPResponse, transfer: _Transfer, run: _Run) -> None:
    """Write the body to disk. Raises _Broken unless the input is complete then."""
    run.claim(transfer.name, transfer.got, reply.length or 0, transfer.cap)
    while data := reply.read1(READ):
        run.claim(transfer.name, transfer.got, len(data), transfer.cap)
        transfer.write(data)
    if transfer.total is not None and transfer.got != transfer.total:
        raise _Broken(f"the transfer broke off after {transfer.got} of {transfer.total} bytes")


class _Reader(io.RawIOBase):
    """Reads a socket, asking in between whether to go on."""

    def __init__(self, sock: socket.socket, held: io.BufferedReader, run: _Run) -> None:
        self._sock = sock
        self._held = held  # keeps the socket open when the connection lets go of it
        self._run = run

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        stalled = now() + self._run.limits.stall_s
        while True:
            self._sock.settimeout(min(POLL_S, self._run.patience()))
            try:
                return self._sock.recv_into(buffer)
            except TimeoutError:
                if now() >= stalled:
                    raise

    def close(self) -> None:
        self._held.close()
        super().close()


class _Response(http.client.HTTPResponse):
    def __init__(self, sock: socket.socket, *args: Any, run: _Run, **kwargs: Any) -> None:
        super().__init__(sock, *args, **kwargs)
        self.fp = io.BufferedReader(_Reader(sock, self.fp, run))


def _connection(url: str, run: _Run) -> http.client.HTTPConnection:
    """Connect to the host of a URL at an address that is permitted; nothing is sent to any other."""
    parsed = _parse(url)
    host, secure = str(parsed.host).strip("[]"), parsed.scheme == "https"
    connection = http.client.HTTPConnection(host, parsed.port or (443 if secure else 80))
    connection.response_class = functools.partial(_Response, run=run)  # type: ignore[assignment]
    sock = _connect(host, connection.port, run)
    connection.sock = run.tls.wrap_socket(sock, server_hostname=host) if secure else sock
    return connection


def _connect(host: str, port: int, run: _Run) -> socket.socket:
    found = [str(one[4][0]) for one in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
    allowed = [one for one in found if not _forbidden(one, allow_private=run.allow_private)]
    if not allowed:
        raise _refuse(f"cannot fetch from {host}: jobs may not reach its address {found[0]}")
    for address in allowed[:-1]:
        with contextlib.suppress(OSError):
            return socket.create_connection((address, port), run.patience())
    return socket.create_connection((allowed[-1], port), run.patience())


def _forbidden(address: str, *, allow_private: bool) -> bool:
    """Whether an input must not be fetched from this address, looking through IPv4 wrapped into IPv6."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo[1] if ip.teredo else None)
        ip = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF) if ip in _NAT64 else inner or ip
    if ip.is_link_local or ip.is_multicast or ip.is_unspecified or str(ip) in _METADATA:
        return True
    public = ip.is_global and (ip.version == 4 or ip in _PUBLIC_V6)
    return not public and not allow_private
