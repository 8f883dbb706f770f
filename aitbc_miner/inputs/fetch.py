"""Writes a job's inputs into its directory: inline texts, and files from http(s) URLs.

A stranger chose the URLs, and the node fetches them from inside the operator's network. So the node checks
each address and connects to the checked address: never to link-local, multicast or a cloud's metadata
service, and to loopback or a private network only if allowed. Not covered: a public address with forwarding
into the network. The node never sends credentials, cookies or netrc.
"""

import contextlib
import errno
import functools
import hashlib
import http.client
import io
import os
import re
import secrets
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from msgspec import Struct
from urllib3.util import parse_url
from urllib3.util.ssltransport import SSLTransport

from aitbc_miner.errors import ErrorCode, JobError, LocalError, MinerError
from aitbc_miner.identity.credentials import CredentialError
from aitbc_miner.inputs.addresses import forbidden
from aitbc_miner.inputs.urls import check_names, name_of, parse, redirected, refuse, shown_url
from aitbc_miner.jobs import InputUrl, Manifest
from aitbc_miner.store.reserve import disk_error
from aitbc_miner.util.backoff import Backoff
from aitbc_miner.util.clock import now
from aitbc_miner.util.web import (
    Address,
    Dialer,
    Proxy,
    ProxyRefused,
    Response,
    TooMuch,
    certificate_fault,
    look_up,
    tls_context,
    tunnel,
)

READ = 256 * 1024
POLL_S = 0.25  # how soon a cancelled job stops waiting
BACKOFF_S = (0.1, 8.0)
RETRIED = frozenset({408, 425, 429, 500, 502, 503, 504})
# With these errors this node's own network may be down. Then the node makes PATIENCE times as many attempts,
# which take some minutes (`BACKOFF_S`).
_NO_NETWORK, PATIENCE = {errno.ENETUNREACH, errno.ENETDOWN, errno.EHOSTUNREACH, socket.EAI_AGAIN}, 10
REDIRECTS = frozenset({301, 302, 303, 307, 308})

_HEADERS = {"User-Agent": "aitbc-miner", "Accept-Encoding": "identity", "Connection": "close"}
_CONTENT_RANGE = re.compile(r"bytes ([0-9]{1,18})-[0-9]{1,18}/([0-9]{1,18}|\*)")


class InputLimits(Struct, frozen=True):
    """Limits for a job's inputs. `stall_s` bounds the time without a byte, `attempts` failures in a row."""

    max_bytes_each: int
    max_bytes_total: int
    timeout_s: float
    stall_s: float
    connect_s: float = 10.0
    max_redirects: int = 5
    attempts: int = 4


class _Broken(MinerError):  # noqa: N818  # says what happened
    """The transfer failed, and a further attempt may succeed."""


def fetch_inputs(
    manifest: Manifest,
    into: Path,
    *,
    limits: InputLimits,
    cancelled: Callable[[], bool] = lambda: False,
    allow_private: bool = False,
    wait: Callable[[float], None] = time.sleep,
    proxy: Proxy | None = None,
) -> None:
    """Write all inputs of a job into an existing, empty directory, readable by their owner alone.

    Calls `cancelled` at least every quarter of a second, except during a name look-up or TLS handshake, until
    the resolver or `connect_s` gives up. Does not undo content encodings. With a `proxy`, the node can check
    numeric addresses only: the proxy looks up the names.

    Raises:
        JobError: E_INPUT with the input and the cause, E_DISK if the disk is full, E_CANCELLED.
        LocalError: a temporary fault of this node; try again.
    """
    urls = [InputUrl(item) if isinstance(item, str) else item for item in manifest.input.urls]
    names = [*manifest.input.inline, *(name_of(item) for item in urls)]
    check_names(names)
    run = _Run(limits, cancelled, wait, allow_private, now() + limits.timeout_s, proxy=proxy)
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
        raise disk_error(error, into, "write the inputs") from error


def _create(path: Path) -> BinaryIO:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    os.fchmod(fd, 0o600)  # independent of our umask; later the job's user owns the file
    return open(fd, "wb")  # noqa: PTH123  # a descriptor, not a path


@dataclass
class _Run:
    """One call of fetch_inputs: its limits, and the bytes that it has fetched."""

    limits: InputLimits
    cancelled: Callable[[], bool]
    wait: Callable[[float], None]
    allow_private: bool
    deadline: float
    fetched: int = 0
    proxy: Proxy | None = None
    dialer: Dialer = field(default_factory=Dialer)

    @functools.cached_property
    def tls(self) -> ssl.SSLContext:
        """The system's certificates. Reading takes tens of milliseconds, so it happens at the first use."""
        return tls_context()

    def patience(self) -> float:
        """Give the seconds for which a step may block. Raises JobError if cancelled or out of time."""
        if self.cancelled():
            raise JobError(ErrorCode.E_CANCELLED, "cannot fetch the inputs: the job was cancelled")
        left = self.deadline - now()
        if left <= 0:
            raise refuse(f"cannot fetch the inputs: not complete after {self.limits.timeout_s:g} s")
        return min(left, self.limits.stall_s)

    def pause(self, delay: float) -> None:
        """Wait before the next attempt. Raises JobError like `patience`."""
        while delay > 0:
            self.patience()
            self.wait(min(delay, POLL_S))
            delay -= POLL_S

    def claim(self, what: str, got: int, size: int, cap: float) -> None:
        """Raise JobError if `size` more bytes after `got` bytes of the input `what` exceed a limit."""
        if got + size > cap:
            key = "coordinator.max_input_mb" if cap == self.limits.max_bytes_each else "max_mb of the input"
            raise refuse(f"cannot take input {what}: larger than {cap / 1e6:.12g} MB ({key})")
        if self.fetched + got + size > self.limits.max_bytes_total:
            total = f"{self.limits.max_bytes_total / 1e6:.12g} MB (coordinator.max_input_mb)"
            raise refuse(f"cannot take input {what}: all inputs together are larger than {total}")


class _Transfer:
    """One input: the part that is on disk, and the headers that identify its version on the server."""

    def __init__(self, name: str, file: BinaryIO, cap: float = 0.0) -> None:
        self.name = name
        self.cap = cap
        self._file = file
        self.restart()

    def restart(self, reply: http.client.HTTPResponse | None = None) -> None:
        """Drop the bytes so far; `reply`, if given, starts a new version, and its headers identify it."""
        self._file.seek(0)
        self._file.truncate()
        self.sha256 = hashlib.sha256()
        self.got = 0
        self.total = reply.length if reply else None
        self.etag = reply.headers.get("ETag") if reply else None
        self.modified = reply.headers.get("Last-Modified") if reply else None

    def headers(self) -> dict[str, str]:
        """Give the headers that ask for the rest, if the file has not changed on the server."""
        if not self.got:
            return {}
        validator = self.modified if not self.etag or self.etag.startswith("W/") else self.etag
        return {"Range": f"bytes={self.got}-", **({"If-Range": validator} if validator else {})}

    def continues(self, reply: http.client.HTTPResponse) -> bool:
        """Whether a 206 reply continues the bytes on disk, judged by the headers of the reply."""
        said = _CONTENT_RANGE.fullmatch(reply.headers.get("Content-Range", "").strip())
        if said is None or int(said[1]) != self.got or reply.headers.get("ETag", self.etag) != self.etag:
            return False
        return said[2] == "*" or self.total in {None, int(said[2])}

    def write(self, data: bytes) -> None:
        """Append to file and hash. Raises MinerError: an OSError would look like a broken network."""
        try:
            self._file.write(data)
        except OSError as error:
            raise disk_error(error, self._file.fileno(), "write the inputs") from error
        self.sha256.update(data)
        self.got += len(data)


def _fetch(item: InputUrl, name: str, into: Path, run: _Run) -> None:
    part = into / f".{secrets.token_hex(8)}.part"  # a random name, which no input can have
    cap = min(run.limits.max_bytes_each, item.max_mb * 1e6 if item.max_mb is not None else float("inf"))
    try:
        with _create(part) as file:
            transfer = _Transfer(name, file, cap)
            _persist(item, transfer, run)
        digest = transfer.sha256.hexdigest()
        if item.sha256 and digest != item.sha256.lower():
            raise refuse(f"cannot take input {name}: its sha256 is {digest}, not {item.sha256}")
        part.rename(into / name)
    finally:
        part.unlink(missing_ok=True)
    run.fetched += transfer.got


def _persist(item: InputUrl, transfer: _Transfer, run: _Run) -> None:
    """Attempt until complete. Only failures without progress count: a long transfer may break off often."""
    failures, furthest = 0, 0
    backoff = Backoff(*BACKOFF_S)
    while True:
        try:
            _attempt(item.url, transfer, run)
            break
        except _Broken as error:
            run.dialer.blame()  # the next attempt uses the name's next address
            failures += 1
            if transfer.got > furthest:
                failures, furthest = 1, transfer.got
                backoff.reset()
            away = getattr(error.__cause__, "errno", None) in _NO_NETWORK
            if failures >= run.limits.attempts * (PATIENCE if away else 1):
                raise refuse(f"cannot fetch {shown_url(item.url)}: {error} ({failures} attempts)") from error
            run.pause(backoff.next())


def _attempt(url: str, transfer: _Transfer, run: _Run) -> None:
    asked = transfer.headers()
    for _ in range(run.limits.max_redirects + 1):
        with _network(), contextlib.ExitStack() as stack:
            connection, target, more = _connection(url, run)
            stack.callback(connection.close)
            connection.request("GET", target, headers=_HEADERS | asked | more)
            with connection.getresponse() as reply:
                if reply.status not in REDIRECTS:
                    _check_status(reply, url, transfer, resumed=bool(asked))
                    _receive(reply, transfer, run)
                    return
        url = redirected(url, reply.headers.get("Location", ""))
    raise refuse(f"cannot fetch {shown_url(url)}: more than {run.limits.max_redirects} redirects")


@contextlib.contextmanager
def _network() -> Iterator[None]:
    """Turn errors of the connection into _Broken; errors of the disk are MinerErrors and pass."""
    try:
        yield
    except ssl.SSLCertVerificationError as error:
        raise _Broken(f"its TLS certificate {certificate_fault(error)[0]}") from error
    except CredentialError as error:
        raise _Broken("the node cannot read the credential of its proxy") from error
    except ProxyRefused as error:
        raise _Broken(f"the node's proxy refused the request: {error}") from error
    except TimeoutError as error:
        raise _Broken("the server does not answer, or has stopped sending") from error
    except OSError as error:
        if error.errno in {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS}:
            raise LocalError(f"cannot fetch the inputs: {error.strerror}") from error
        raise _Broken((error.strerror or "the server closed the connection").lower()) from error
    except TooMuch as error:
        raise _Broken(f"the reply is not usable: {error}") from error
    except (http.client.HTTPException, UnicodeError) as error:
        raise _Broken("the reply is not HTTP, or was cut short") from error


def _check_status(reply: http.client.HTTPResponse, url: str, transfer: _Transfer, *, resumed: bool) -> None:
    """Prepare the transfer for the body. Raises _Broken or JobError if the body is not the input."""
    if reply.status == 200:
        transfer.restart(reply)
    elif reply.status in {206, 416} and resumed:
        if reply.status == 416 or not transfer.continues(reply):
            transfer.restart()
            raise _Broken("the server cannot resume the interrupted transfer")
    elif reply.status in RETRIED or reply.status == http.HTTPStatus.PROXY_AUTHENTICATION_REQUIRED:
        raise _Broken(f"the server answered {reply.status}")
    else:
        raise refuse(f"cannot fetch {shown_url(url)}: the server answered {reply.status}")


def _receive(reply: http.client.HTTPResponse, transfer: _Transfer, run: _Run) -> None:
    """Write the body to disk. Raises _Broken if the input is still incomplete."""
    run.claim(transfer.name, transfer.got, reply.length or 0, transfer.cap)
    while data := reply.read1(READ):
        run.claim(transfer.name, transfer.got, len(data), transfer.cap)
        transfer.write(data)
    if transfer.total is not None and transfer.got != transfer.total:
        raise _Broken(f"the transfer broke off after {transfer.got} of {transfer.total} bytes")


class _Reader(io.RawIOBase):
    """Reads a socket, and checks in between whether the job was cancelled."""

    def __init__(self, sock: socket.socket, held: io.BufferedReader, run: _Run) -> None:
        self._sock = sock
        self._held = held  # keeps the socket open after the connection closes it
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


class _Response(Response):
    def __init__(self, sock: socket.socket, *args: Any, run: _Run, **kwargs: Any) -> None:
        super().__init__(sock, *args, **kwargs)
        self.fp = io.BufferedReader(_Reader(sock, self.fp, run))


def _connection(url: str, run: _Run) -> tuple[http.client.HTTPConnection, str, dict[str, str]]:
    """Connect to a URL's host or to the proxy; give the connection, the request target and extra headers.

    Without a proxy, the node connects to permitted addresses only.
    """
    parsed = parse(url)
    host, secure = str(parsed.host).strip("[]"), parsed.scheme == "https"
    port = parsed.port or (443 if secure else 80)
    connection = http.client.HTTPConnection(host, port)
    connection.response_class = functools.partial(_Response, run=run)  # type: ignore[assignment]
    dial = functools.partial(
        run.dialer.connect, timeout_s=min(run.patience(), run.limits.connect_s), tick=run.patience
    )
    permit = functools.partial(_permitted, host, run)
    target, more = parsed.request_uri, {}
    if run.proxy is None:
        name = host if secure else None
        connection.sock = dial(host, port, finish=lambda sock: _secured(sock, name, run), permit=permit)
    else:
        with contextlib.suppress(socket.gaierror):  # not a number but a name: the proxy looks it up
            permit(look_up(host, port, flags=socket.AI_NUMERICHOST))
        connection.sock = _through(run.proxy, dial, host if secure else None, port, run)
        if not secure:
            target, more = f"http://{parsed.netloc}{target}", run.proxy.headers()
    return connection, target, more


def _permitted(host: str, run: _Run, found: list[Address]) -> list[Address]:
    allowed = [one for one in found if not forbidden(one.sockaddr[0], allow_private=run.allow_private)]
    if not allowed:
        why = f"inputs may not come from the address {found[0].sockaddr[0]}"
        raise refuse(f"cannot fetch from {host}: {why}; see coordinator.allow_private_inputs")
    return allowed


def _secured(sock: Any, host: str | None, run: _Run) -> Any:
    """Start TLS to `host`, also inside the TLS of a proxy. Without a host, do nothing."""
    if host is None:
        return sock
    if isinstance(sock, ssl.SSLSocket):
        return SSLTransport(sock, run.tls, server_hostname=host)
    return run.tls.wrap_socket(sock, server_hostname=host)


def _through(proxy: Proxy, dial: Callable[..., Any], host: str | None, port: int, run: _Run) -> Any:
    """Connect to the proxy; for https, also tunnel through the proxy to the host."""
    at = parse_url(proxy.url)
    secure = at.scheme == "https"
    name = str(at.host).strip("[]")
    port_at = at.port or (443 if secure else 80)
    sock = dial(name, port_at, finish=lambda raw: _secured(raw, name if secure else None, run))
    try:
        if host is not None:
            sock.settimeout(run.patience())
            tunnel(sock, host, port, proxy)
        return _secured(sock, host, run)
    except BaseException:
        sock.close()
        raise
