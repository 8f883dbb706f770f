"""Connections of the node's HTTP clients: addresses, time-outs, TLS, proxies, interim replies.

Each HTTP client owns one `Dialer`, which its threads may share.
"""

import base64
import contextlib
import http.client
import os
import select
import socket
import ssl
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from aitbc_miner.util.clock import now

STAGGER_S = 0.25
"""The pause before the next address is tried beside the previous addresses; see RFC 8305."""
# http.client accepts 100 header lines, but proxies and content networks send more.
http.client._MAXHEADERS = 256  # type: ignore[attr-defined]  # noqa: SLF001  # there is no public setting
MAX_INTERIM = 100
MAX_ADDRESSES = 32
"""The most addresses of a name: a name server could send thousands, each of which needs a socket."""


class NoConnection(TimeoutError):  # noqa: N818  # names the event
    """No address accepted the connection in time."""


class NoHandshake(TimeoutError):  # noqa: N818
    """The peer accepted the connection but did not finish the TLS handshake in time."""


class Proxy:
    """An HTTP proxy; `credential` reads the proxy's `user:password`."""

    def __init__(self, url: str, credential: Callable[[], str] | None = None) -> None:
        self.url = url
        self._credential = credential

    def headers(self) -> dict[str, str]:
        """Give the headers for the proxy only. Raises: the errors of `credential`."""
        if self._credential is None:
            return {}
        encoded = base64.b64encode(self._credential().encode()).decode()
        return {"Proxy-Authorization": f"Basic {encoded}"}

    def __str__(self) -> str:
        return f"the proxy {self.url}"


class Address(NamedTuple):
    """One address of a name: its family, and the address for `socket.connect`."""

    family: int
    sockaddr: Any


class ProxyRefused(OSError):  # noqa: N818
    """The proxy refuses a connection to the requested host."""


def tunnel(sock: Any, host: str, port: int, proxy: Proxy) -> None:
    """Ask the proxy at the other end of `sock` to connect `sock` to a host.

    Raises:
        ProxyRefused: the proxy answered with an error status.
    """
    name = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    headers = {"Host": name, **proxy.headers()}
    lines = [f"CONNECT {name} HTTP/1.1", *(f"{key}: {value}" for key, value in headers.items()), "", ""]
    sock.sendall("\r\n".join(lines).encode("ascii"))
    reply = Response(sock, method="CONNECT")
    try:
        reply.begin()
    finally:
        reply.close()
    if not 200 <= reply.status < 300:
        raise ProxyRefused(f"HTTP status {reply.status}")


def look_up(host: str, port: int, flags: int = 0) -> list[Address]:
    """Give all addresses of a name, within the resolver's time-outs. Raises socket.gaierror: no address."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=flags)
    return list(dict.fromkeys(Address(family, where) for family, _, _, _, where in found))


class Dialer:
    """Connects to the first address of a name that answers; later tries silent addresses last."""

    def __init__(self) -> None:
        self._slow: set[tuple[str, str]] = set()
        self._last = threading.local()

    def connect(
        self,
        host: str,
        port: int,
        timeout_s: float,
        *,
        finish: Callable[[socket.socket], socket.socket] = lambda sock: sock,
        permit: Callable[[list[Address]], list[Address]] = lambda found: found,
        tick: Callable[[], object] = lambda: None,
    ) -> socket.socket:
        """Connect within `timeout_s`, including the TLS handshake that `finish` does on the socket.

        Each address gets only its part of the time for `finish`. `permit` selects the permitted addresses.
        While connecting, the method calls `tick` at least every `STAGGER_S`; `tick` may raise.

        Raises:
            OSError: no address accepted; after a time-out NoConnection or NoHandshake.
        """
        left = permit(look_up(host, port))
        deadline = now() + timeout_s
        while True:
            left.sort(key=lambda address: (host, address.sockaddr[0]) in self._slow)
            del left[MAX_ADDRESSES:]
            sock, answered, silent = _race(left, deadline, tick)
            self._slow |= {(host, address.sockaddr[0]) for address in silent}
            self._slow.discard((host, answered.sockaddr[0]))
            self._last.at = (host, answered.sockaddr[0])
            left.remove(answered)
            try:
                sock.settimeout(max((deadline - now()) / (len(left) + 1), 0.01))
                return finish(sock)
            except BaseException as error:
                sock.close()
                self.blame()
                if isinstance(error, OSError) and left and now() < deadline:
                    continue
                if isinstance(error, TimeoutError):
                    raise NoHandshake("timed out") from error
                raise

    def blame(self) -> None:
        """From now on try the address of this thread's last connection after all other addresses."""
        if at := getattr(self._last, "at", None):
            self._slow.add(at)


def _race(
    addresses: list[Address], deadline: float, tick: Callable[[], object]
) -> tuple[socket.socket, Address, list[Address]]:
    """Give the first connection, its address, and the addresses that were tried without an answer."""
    todo = list(addresses)
    pause_s = min(STAGGER_S, (deadline - now()) / (2 * len(todo) or 1))
    error: OSError = NoConnection("timed out")
    asked: dict[int, tuple[socket.socket, Address]] = {}
    poller = select.poll()
    ask_at = now()
    with contextlib.ExitStack() as stack:
        stack.callback(lambda: [stack.enter_context(sock) for sock, _ in asked.values()])
        while todo or asked:
            tick()
            if now() >= deadline:
                raise NoConnection("timed out")
            if todo and (not asked or now() >= ask_at):
                address = todo.pop(0)
                ask_at = now() + pause_s
                try:
                    sock = _begin(address)
                except OSError as caught:
                    error = caught
                    continue
                asked[sock.fileno()] = (sock, address)
                poller.register(sock, select.POLLOUT)
            until = min(deadline, ask_at) if todo else deadline
            for fileno, _ in poller.poll(1000 * max(0.001, min(until - now(), STAGGER_S))):
                poller.unregister(fileno)
                sock, address = asked.pop(fileno)
                number = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                if not number:
                    return sock, address, [silent for _, silent in asked.values()]
                sock.close()
                error = OSError(number, os.strerror(number))
    raise error


def _begin(address: Address) -> socket.socket:
    sock = socket.socket(address.family, socket.SOCK_STREAM)
    try:
        sock.settimeout(0.0)
        with contextlib.suppress(BlockingIOError):
            sock.connect(address.sockaddr)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    except BaseException:
        sock.close()
        raise
    return sock


class TooMuch(http.client.HTTPException):
    """A reply exceeds a bound: too many or too long header lines, or too many interim replies."""


class Response(http.client.HTTPResponse):
    """A reply, after any interim replies (1xx); http.client skips only status 100."""

    def begin(self) -> None:
        """Read status and headers. Raises TooMuch for the bounds of http.client, which have no own class."""
        try:
            super().begin()
        except http.client.HTTPException as error:
            if type(error) in {http.client.HTTPException, http.client.LineTooLong}:
                raise TooMuch(str(error)) from error
            raise

    def _read_status(self) -> tuple[str, int, str]:
        for _ in range(MAX_INTERIM):
            found: tuple[str, int, str] = super()._read_status()  # type: ignore[misc]
            if not 100 <= found[1] < 200 or found[1] == 101:
                return found
            http.client.parse_headers(self.fp)
        raise TooMuch(f"more than {MAX_INTERIM} interim replies")


# --- TLS ---------------------------------------------------------------------------------------------------


def tls_context(ca_file: Path | None = None, *, verify: bool = True) -> ssl.SSLContext:
    """Make a context that trusts the system's certificates, or only the certificates of `ca_file`.

    From Python 3.13 on, the strict checks of RFC 5280 are the default and refuse the CA of a plain
    `openssl req -x509`. The function removes the checks, so that all versions of Python trust the same CAs.
    """
    if verify:
        context = ssl.create_default_context(cafile=ca_file)
        context.verify_flags &= ~ssl.VERIFY_X509_STRICT
        context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
        return context
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


_NEW_CA = (
    'openssl req -x509 -newkey rsa:3072 -nodes -days 3650 -keyout ca.key -out ca.pem -subj "/CN=our CA"'
    " -addext keyUsage=critical,keyCertSign,cRLSign"
)
_RENEW = "have the server's operator renew the certificate"
# By the numbers of OpenSSL's x509_vfy.h: cause and remedy.
_CERTIFICATES = (
    ({10}, "has expired", f"{_RENEW}, or correct this machine's clock (`timedatectl`)"),
    ({9}, "is not valid yet", "set this machine's clock if it is slow (`timedatectl set-ntp true`)"),
    ({62, 64}, "is for another name", "use one of its names, or have the name added as subjectAltName"),
    (
        {2, 18, 19, 20, 21},
        "is not trusted",
        "name the issuer's certificate in {key}, or let the whole machine trust the issuer"
        " (/usr/local/share/ca-certificates, then update-ca-certificates); the server must also send"
        " intermediate certificates",
    ),
    ({66, 67, 68}, "is too weak", f"{_RENEW}, with RSA of 3072 bits or P-256, and SHA-256"),
    ({32, 79}, "comes from a CA without a CA certificate", f"make the CA's certificate anew: `{_NEW_CA}`"),
)
# The reasons of OpenSSL 3.0 to 3.5 for bytes other than TLS.
_NO_TLS = {"WRONG_VERSION_NUMBER", "HTTP_REQUEST", "RECORD_LAYER_FAILURE", "PACKET_LENGTH_TOO_LONG"}


def certificate_fault(error: ssl.SSLCertVerificationError, key: str = "") -> tuple[str, str]:
    """Give cause and remedy for a rejected certificate; `key` is the configuration key of a CA file."""
    rows = (row[1:] for row in _CERTIFICATES if error.verify_code in row[0])
    cause, remedy = next(rows, ("is not acceptable", _RENEW))
    return f"{cause} ({error.verify_message})", remedy.replace("{key}", key)


def speaks_no_tls(error: ssl.SSLError) -> bool:
    """Whether the peer answered a TLS handshake with other bytes, such as an HTTP error page."""
    return (error.reason or "").upper().replace(" ", "_") in _NO_TLS
