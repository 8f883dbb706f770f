"""HTTP to a coordinator that may be slow, broken or hostile: everything about a reply is bounded.

`requests` does the talking. Added here are a deadline for a whole reply, a bound on its size, uploads that
stall rather than time out, and errors an operator can read. No redirect is followed: it would get the token.
"""

import http.client
import io
import re
import socket
import ssl
import threading
import time
import weakref
from collections.abc import Iterator, Mapping
from email.utils import parsedate_to_datetime
from http.cookiejar import DefaultCookiePolicy
from typing import Any
from urllib.parse import urlsplit

import msgspec
import requests
import urllib3
from msgspec import Struct
from requests.adapters import HTTPAdapter
from requests_toolbelt import MultipartEncoder
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool

from aitbc_miner.coordinator import Unreachable
from aitbc_miner.errors import MinerError
from aitbc_miner.util.clock import now

MAX_REPLY = 64 * 1024
MAX_RETRY_AFTER_S = 3600.0
UPLOAD_READ = 1 << 20  # requests' own 16 KiB make an upload several times slower
UPLOAD_PIECE = 64 * 1024  # what must get through within one time-out: 3 KiB/s at 20 s
UPLOAD_REPLY_S = 60.0  # the coordinator may want to store what it got before it answers

_TOKEN = re.compile(r"[\x21-\x7e]{1,8192}")


class Reply(Struct, frozen=True):
    """An answer: HTTP status, body, whether that is all of it or cut at the bound, and three headers.

    `date` is when it was given, in seconds since 1970 by the clock of who gave it.
    """

    status: int
    body: bytes = b""
    complete: bool = True
    retry_after: float | None = None
    location: str = ""
    date: float | None = None


class _DeadlineReader(io.RawIOBase):
    """Reads a socket until its time-out is used up once: the socket's own starts anew with every byte."""

    def __init__(self, sock: socket.socket, held: io.BufferedReader) -> None:
        super().__init__()
        self._sock = sock
        self._held = held  # its reference keeps the socket open when the connection lets go of it
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


class _Response(http.client.HTTPResponse):
    def __init__(self, sock: socket.socket, *args: Any, **kwargs: Any) -> None:
        super().__init__(sock, *args, **kwargs)
        self.fp = io.BufferedReader(_DeadlineReader(sock, self.fp))


class _Http(HTTPConnection):
    response_class = _Response

    def send(self, data: Any) -> None:
        """Send in pieces: a socket's time-out is for all of one `sendall`, too little for a slow line."""
        if not isinstance(data, bytes):
            super().send(data)
            return
        view = memoryview(data)
        for start in range(0, len(view), UPLOAD_PIECE):
            super().send(view[start : start + UPLOAD_PIECE])


class _Https(_Http, HTTPSConnection):
    pass


class _HttpPool(HTTPConnectionPool):
    ConnectionCls = _Http


class _HttpsPool(HTTPSConnectionPool):
    ConnectionCls = _Https


class _Adapter(HTTPAdapter):
    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        super().init_poolmanager(*args, blocksize=UPLOAD_READ, **kwargs)
        self.poolmanager.pool_classes_by_scheme = {"http": _HttpPool, "https": _HttpsPool}


class _Session(requests.Session):
    def get_redirect_target(self, resp: requests.Response) -> str | None:  # noqa: ARG002  # as its base has it
        """Know of none: even to follow no redirect, requests reads all of its body and parses its goal."""
        return None


class HttpClient:
    """Calls below one base URL, each with a deadline. May be used from several threads.

    `timeout_s` bounds connecting (to each address of the name), sending, and then the whole reply. Looking
    the name up has the resolver's own time-outs. `verify` is true, false, or a file of CA certificates.
    `auth_scheme` is `bearer` or `api_key`.
    """

    def __init__(
        self,
        base_url: str,
        timeout_s: float,
        verify: bool | str = True,  # noqa: FBT001, FBT002  # as requests has it
        user_agent: str = "aitbc-miner",
        auth_scheme: str = "bearer",
    ) -> None:
        self._base_url = base_url.rstrip("/")
        self._timeout_s = timeout_s
        self._verify = verify
        self._user_agent = user_agent
        self._auth_scheme = auth_scheme
        self._token: str | None = None
        self._local = threading.local()
        self._sessions: weakref.WeakSet[requests.Session] = weakref.WeakSet()
        self._peer = urlsplit(base_url).netloc.rpartition("@")[2]
        if verify is False:
            # The operator decided so; urllib3 would repeat its warning on stderr.
            urllib3.disable_warnings(urllib3.exceptions.InsecureRequestWarning)

    def set_token(self, token: str) -> None:
        """Send this token with every later call. Raises MinerError if no header can hold it."""
        self.authorization(token)
        self._token = token

    def authorization(self, token: str) -> dict[str, str]:
        """Build the header that carries a token. Raises MinerError if no header can hold it."""
        if not _TOKEN.fullmatch(token):
            raise MinerError(
                "cannot use the token: it is empty, too long, or holds a space, a line break or a character"
                " beyond ASCII"
            )
        if self._auth_scheme == "api_key":
            return {"X-Api-Key": token}
        return {"Authorization": f"Bearer {token}"}

    def close(self) -> None:
        """Close the connections of all threads."""
        for session in list(self._sessions):
            session.close()

    def call(
        self,
        method: str,
        path: str,
        payload: Any = None,
        *,
        doing: str,
        params: Mapping[str, str] | None = None,
        headers: Mapping[str, str] | None = None,
        max_bytes: int = MAX_REPLY,
    ) -> Reply:
        """Send a JSON value or a MultipartEncoder and read the reply, whatever its status.

        `headers` go before the token's own. Raises Unreachable ("cannot DOING: …") when no reply arrives.
        """
        upload = isinstance(payload, MultipartEncoder)
        body = payload if upload or payload is None else msgspec.json.encode(payload)
        kind = {"Content-Type": payload.content_type if upload else "application/json"}
        ours = {**kind, **(self.authorization(self._token) if self._token else {})}
        try:
            with self._session().request(
                method,
                self._base_url + path,
                params=params,
                data=body,
                headers={**ours, **(headers or {})},
                timeout=self._timeout(upload=upload),
                allow_redirects=False,
            ) as response:
                content = _read(response.raw, max_bytes + 1)
        except (OSError, ValueError, urllib3.exceptions.HTTPError, http.client.HTTPException) as error:
            raise Unreachable(f"cannot {doing}: {self._cause(error)}") from error
        return _reply(response, content, max_bytes)

    def _timeout(self, *, upload: bool) -> Any:
        # requests takes urllib3's own kind of time-out too; its annotations do not say so.
        if upload:
            return urllib3.Timeout(connect=self._timeout_s, read=max(self._timeout_s, UPLOAD_REPLY_S))
        return urllib3.Timeout(total=self._timeout_s)

    def _session(self) -> requests.Session:
        session: requests.Session | None = getattr(self._local, "session", None)
        if session is None:
            session = _Session()
            session.trust_env = False  # no proxies, netrc or CA files from the environment
            session.stream = True
            session.verify = self._verify
            session.cookies.set_policy(DefaultCookiePolicy(allowed_domains=[]))
            session.headers.update({"User-Agent": self._user_agent, "Accept-Encoding": "identity"})
            session.mount("http://", _Adapter())
            session.mount("https://", _Adapter())
            self._local.session = session
            self._sessions.add(session)
        return session

    def _cause(self, error: BaseException) -> str:
        """Say in words what went wrong, from the innermost error that says something."""
        # requests' own errors show the insides of urllib3, so only what they wrap is shown.
        chain = [one for one in _chain(error) if not isinstance(one, requests.RequestException)]
        fitting = ((text, one) for kinds, text in _CAUSES for one in chain if isinstance(one, kinds))
        text, found = next(fitting, (_UNKNOWN, error))
        return clean(text.format(error=found, peer=self._peer, timeout=self._timeout_s), 300)


def _reply(response: requests.Response, content: bytes, most: int) -> Reply:
    return Reply(
        response.status_code,
        content[:most],
        len(content) <= most,
        retry_after(response.headers),
        response.headers.get("Location", ""),
        _seconds(response.headers.get("Date", "")),
    )


def _read(raw: Any, most: int) -> bytes:
    content: bytes = raw.read(most, decode_content=False)
    # urllib3 tells of a body that ended too early only when asked once more.
    if len(content) < most and raw.length_remaining:
        raise http.client.IncompleteRead(content, raw.length_remaining)
    return content


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and all that it wraps: as cause, as context, as urllib3's `reason`, as an argument."""
    todo, seen = [error], set()
    while todo:
        found = todo.pop(0)
        if id(found) in seen:
            continue
        seen.add(id(found))
        yield found
        inner = (found.__cause__, found.__context__, getattr(found, "reason", None), *found.args)
        todo.extend(one for one in inner if isinstance(one, BaseException))


# The first row that any error of the chain fits is what an operator can do something about.
_CAUSES: list[tuple[tuple[type[BaseException], ...], str]] = [
    (
        (ssl.SSLCertVerificationError,),
        "the TLS certificate of {peer} is not trusted ({error.verify_message}); see coordinator.ca_file",
    ),
    ((ssl.SSLError,), "TLS with {peer} failed ({error.reason})"),
    ((socket.gaierror,), "the name of {peer} cannot be looked up ({error.strerror})"),
    ((ConnectionRefusedError,), "connection refused by {peer}"),
    ((TimeoutError, urllib3.exceptions.TimeoutError), "no complete reply from {peer} within {timeout:g} s"),
    (
        (http.client.IncompleteRead, urllib3.exceptions.IncompleteRead),
        "the reply of {peer} was cut short",
    ),
    ((ConnectionError,), "{peer} closed the connection without a reply"),
    (
        (http.client.HTTPException, urllib3.exceptions.ProtocolError),
        "garbage reply from {peer}: it is not HTTP",
    ),
    ((OSError,), "{error}"),
]
_UNKNOWN = "{error.__class__.__name__} from {peer}"


def clean(text: str, limit: int) -> str:
    """Make foreign text fit for one line of a log: printable, single spaces, at most `limit` characters."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text[: 4 * limit]).split())
    return line if len(line) <= limit else line[: limit - 1] + "…"


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Read `Retry-After`, seconds or a date, as seconds from now, 0 to an hour; None without a usable one."""
    value = headers.get("Retry-After", "").strip()
    if re.fullmatch(r"[0-9]{1,20}", value):
        return min(float(value), MAX_RETRY_AFTER_S)
    due = _seconds(value)
    if due is None:
        return None
    # By the coordinator's own clock where it tells us; ours may be wrong.
    current = _seconds(headers.get("Date", ""))
    return min(max(due - (time.time() if current is None else current), 0.0), MAX_RETRY_AFTER_S)


def _seconds(date: str) -> float | None:
    try:
        return parsedate_to_datetime(date).timestamp()
    except (ValueError, OverflowError):
        return None
