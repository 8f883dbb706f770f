"""What every HTTP client of ours needs: a connection within its time, TLS, and replies as they really come.

No `Dialer` outlives its process; each belongs to one client, whose threads may share it.
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

STAGGER_S = 0.25  # RFC 8305: how long an address has for itself before the next is asked beside it
# http.client has room for 100, which proxies and content networks exceed; this is a bound all the same.
http.client._MAXHEADERS = 256  # type: ignore[attr-defined]  # noqa: SLF001  # it has no other way
MAX_INTERIM = 100
MAX_ADDRESSES = 32
"""Of one name: whoever answers for it could have us hold a socket to each of thousands."""


class NoConnection(TimeoutError):  # noqa: N818  # says what happened
    """None of the addresses took the connection in time."""


class NoHandshake(TimeoutError):  # noqa: N818
    """The connection was taken, and the TLS handshake was not answered in time."""


class Proxy:
    """An HTTP proxy; `credential` reads the `user:password` that it alone is to see."""

    def __init__(self, url: str, credential: Callable[[], str] | None = None) -> None:
        self.url = url
        self._credential = credential

    def headers(self) -> dict[str, str]:
        """Give what is said to the proxy alone; raises what `credential` does."""
        if self._credential is None:
            return {}
        encoded = base64.b64encode(self._credential().encode()).decode()
        return {"Proxy-Authorization": f"Basic {encoded}"}

    def __str__(self) -> str:
        return f"the proxy {self.url}"


class Address(NamedTuple):
    """One address of a name: its family, and what `connect` takes."""

    family: int
    sockaddr: Any


class ProxyRefused(OSError):  # noqa: N818
    """A proxy does not connect us to where we want to go."""


def tunnel(sock: Any, host: str, port: int, proxy: Proxy) -> None:
    """Have the proxy that a socket leads to connect it to a host. Raises ProxyRefused."""
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
        raise ProxyRefused(f"it answered {reply.status}")


def look_up(host: str, port: int, flags: int = 0) -> list[Address]:
    """Give all addresses of a name. Raises socket.gaierror; the resolver has time-outs of its own."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=flags)
    return list(dict.fromkeys(Address(family, where) for family, _, _, _, where in found))


class Dialer:
    """Connects to whichever address of a name answers first, and knows later which of them did not."""

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
        """Connect within `timeout_s`, handshake included, which `finish` makes of a connected socket.

        An address that does not answer `finish` uses up its own part of the time alone. `permit` chooses
        among the addresses; `tick` is called at least each `STAGGER_S` of connecting, and may raise.

        Raises:
            OSError: no address took it; NoConnection and NoHandshake are its kinds for time-outs.
        """
        left = permit(look_up(host, port))
        deadline = now() + timeout_s
        while True:
            left.sort(key=lambda one: (host, one.sockaddr[0]) in self._slow)
            del left[MAX_ADDRESSES:]
            sock, answered, silent = _race(left, deadline, tick)
            self._slow |= {(host, one.sockaddr[0]) for one in silent}
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
        """Ask the address that this thread connected to last after all others from now on."""
        if at := getattr(self._last, "at", None):
            self._slow.add(at)


def _race(
    addresses: list[Address], deadline: float, tick: Callable[[], object]
) -> tuple[socket.socket, Address, list[Address]]:
    """Give the first connection there is, its address, and those that were asked before and said nothing."""
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
                    return sock, address, [one for _, one in asked.values()]
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
    """A reply has more lines before its body than anybody has use for."""


class Response(http.client.HTTPResponse):
    """A reply that may be announced by interim ones, of which http.client knows 100 alone."""

    def begin(self) -> None:
        """Read all before the body. Raises TooMuch for what http.client tells by words alone."""
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
    """Make a context that trusts the system's certificates, or those of `ca_file` alone.

    From Python 3.13 on the strict checks of RFC 5280 are the default; they refuse the CA that a plain
    `openssl req -x509` makes. What is trusted must not depend on the interpreter.
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
# By the numbers of OpenSSL's x509_vfy.h: what is wrong, and what helps.
_CERTIFICATES = (
    (
        {10},
        "has expired",
        "it must be renewed there, unless this machine's clock is wrong (see `timedatectl`)",
    ),
    (
        {9},
        "is not valid yet",
        "this machine's clock is probably slow: see `timedatectl`, and `timedatectl set-ntp true`",
    ),
    (
        {62, 64},
        "is for another name",
        "use the name that it is for, or have this name among its subjectAltName entries",
    ),
    (
        {2, 18, 19, 20, 21},
        "is not trusted",
        "name the certificate of its issuer in {key}, or have the whole machine trust that"
        " (/usr/local/share/ca-certificates, then update-ca-certificates); a server must send the"
        " certificates in between, too",
    ),
    ({66, 67, 68}, "is too weak", "it must be made anew, with RSA of 3072 bits or P-256, and SHA-256"),
    ({32, 79}, "comes from a CA whose own certificate is not one of a CA", f"make the CA anew: `{_NEW_CA}`"),
)
# What OpenSSL 3.0 to 3.5 call bytes that are no TLS.
_NO_TLS = {"WRONG_VERSION_NUMBER", "HTTP_REQUEST", "RECORD_LAYER_FAILURE", "PACKET_LENGTH_TOO_LONG"}


def certificate_fault(error: ssl.SSLCertVerificationError, key: str = "") -> tuple[str, str]:
    """Say what is wrong with a certificate, and what helps; `key` is the setting of a CA file."""
    rows = (row[1:] for row in _CERTIFICATES if error.verify_code in row[0])
    cause, remedy = next(rows, ("is not acceptable", "it must be made anew there"))
    return f"{cause} ({error.verify_message})", remedy.replace("{key}", key)


def speaks_no_tls(error: ssl.SSLError) -> bool:
    """Whether what answered a TLS handshake was no TLS, as an HTTP server's complaint."""
    return (error.reason or "").upper().replace(" ", "_") in _NO_TLS
