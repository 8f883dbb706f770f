"""Adapts `requests` to the node's own connections, deadlines, pieces of uploads and proxies."""

import io
import socket
import ssl
from http.cookiejar import DefaultCookiePolicy
from typing import Any, cast

import requests
from requests.adapters import HTTPAdapter
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool
from urllib3.exceptions import NewConnectionError

from aitbc_miner.util.clock import now
from aitbc_miner.util.web import Dialer, Proxy, Response

UPLOAD_READ = 1 << 20  # the default of requests, 16 KiB, makes an upload several times slower
UPLOAD_PIECE = 64 * 1024  # bytes to send within one time-out: 3 KiB/s at 20 s


class _DeadlineReader(io.RawIOBase):
    """Reads a socket up to one deadline for the whole reply; a socket's time-out restarts at each read."""

    def __init__(self, sock: socket.socket, held: io.BufferedReader) -> None:
        super().__init__()
        self._sock = sock
        self._held = held  # keeps the socket open after the connection drops its reference
        self._deadline = now() + (sock.gettimeout() or 0.0)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        left = self._deadline - now()
        if left <= 0:
            raise TimeoutError("timed out")
        self._sock.settimeout(left)
        return self._sock.recv_into(buffer)

    def close(self) -> None:
        if not self.closed:
            self._held.close()
        super().close()


class _Response(Response):
    def __init__(self, sock: socket.socket, *args: Any, **kwargs: Any) -> None:
        super().__init__(sock, *args, **kwargs)
        self.fp = io.BufferedReader(_DeadlineReader(sock, self.fp))


class _Http(HTTPConnection):
    response_class = _Response
    dialer: Dialer
    answer_s: float

    def _new_conn(self, **more: Any) -> socket.socket:
        try:
            return self.dialer.connect(self._dns_host, self.port, float(self.timeout or 0.0), **more)
        except (TimeoutError, ConnectionRefusedError, socket.gaierror, ssl.SSLError):
            raise
        except OSError as error:
            # urllib3 ignores a reset while it sends, because a reply may have come before. It would take this
            # error for such a reset, and go on without a socket.
            raise NewConnectionError(self, str(error)) from error

    def send(self, data: Any) -> None:
        """Send in pieces: a socket's time-out bounds one `sendall`, too short for a body on a slow line."""
        if self.sock:
            self.sock.settimeout(self.answer_s)
        if not isinstance(data, bytes):
            super().send(data)
            return
        view = memoryview(data)
        for start in range(0, len(view), UPLOAD_PIECE):
            super().send(view[start : start + UPLOAD_PIECE])


class _Https(_Http, HTTPSConnection):
    def connect(self) -> None:
        """Let the dialer make the handshake, so that it tries further addresses; not behind a proxy."""
        if self.proxy:
            super().connect()
            return
        context = cast("ssl.SSLContext", self.ssl_context)
        host = self._dns_host.strip("[]").rstrip(".")
        self.sock = self._new_conn(finish=lambda sock: context.wrap_socket(sock, server_hostname=host))
        self.is_verified = context.verify_mode == ssl.CERT_REQUIRED


class Adapter(HTTPAdapter):
    """Makes requests use the node's connections: `dialer` opens them, `context` has the trusted CAs."""

    def __init__(self, dialer: Dialer, context: ssl.SSLContext, answer_s: float, proxy: Proxy | None) -> None:
        own = {"dialer": dialer, "answer_s": answer_s}
        http_, https = type("_OwnHttp", (_Http,), own), type("_OwnHttps", (_Https,), own)
        self._pools = {
            "http": type("_HttpPool", (HTTPConnectionPool,), {"ConnectionCls": http_}),
            "https": type("_HttpsPool", (HTTPSConnectionPool,), {"ConnectionCls": https}),
        }
        self._context = context
        self._proxy = proxy
        super().__init__()

    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        """Use the node's connections for calls without a proxy."""
        super().init_poolmanager(*args, blocksize=UPLOAD_READ, ssl_context=self._context, **kwargs)
        self.poolmanager.pool_classes_by_scheme = self._pools

    def proxy_manager_for(self, proxy: Any, **kwargs: Any) -> Any:
        """Use the node's connections for calls through a proxy."""
        manager = super().proxy_manager_for(
            proxy, blocksize=UPLOAD_READ, ssl_context=self._context, proxy_ssl_context=self._context, **kwargs
        )
        manager.pool_classes_by_scheme = self._pools
        return manager

    def proxy_headers(self, _proxy: Any) -> dict[str, str]:
        """Give the headers for the proxy alone."""
        return self._proxy.headers() if self._proxy else {}

    def cert_verify(self, conn: Any, url: Any, verify: Any, cert: Any) -> None:
        """Do nothing: the context has the trusted CAs. requests would add its own."""


class Session(requests.Session):
    """A session that ignores the environment (proxies, netrc, CA files), cookies and redirects."""

    def __init__(self, adapter: Adapter, proxy: Proxy | None, user_agent: str, *, verify: bool) -> None:
        super().__init__()
        self.trust_env = False
        self.stream = True
        self.verify = verify
        self.proxies = {"http": proxy.url, "https": proxy.url} if proxy else {}
        self.cookies.set_policy(DefaultCookiePolicy(allowed_domains=[]))
        self.headers.update({"User-Agent": user_agent, "Accept-Encoding": "identity"})
        self.mount("http://", adapter)
        self.mount("https://", adapter)

    def get_redirect_target(self, resp: requests.Response) -> str | None:  # noqa: ARG002  # as its base has it
        """Report no redirect: requests would read the body and parse the target, even to follow none."""
        return None
