"""HTTP to a coordinator that may be slow, broken or hostile: everything about a reply is bounded.

`requests` does the talking. Added here are a deadline for a whole reply, a bound on its size, uploads that
stall rather than time out, and errors an operator can read. No redirect is followed: it would get the token.
"""

import codecs
import http.client
import re
import socket
import ssl
import threading
import time
import weakref
import zlib
from collections.abc import Iterator, Mapping
from contextlib import suppress
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import msgspec
import requests
import urllib3
from msgspec import Struct
from requests_toolbelt import MultipartEncoder

from aitbc_miner.coordinator.interface import Unreachable
from aitbc_miner.coordinator.transport import Adapter, Session
from aitbc_miner.errors import MinerError
from aitbc_miner.identity.credentials import CredentialError
from aitbc_miner.util.web import (
    Dialer,
    NoConnection,
    NoHandshake,
    Proxy,
    TooMuch,
    certificate_fault,
    speaks_no_tls,
    tls_context,
)

MAX_REPLY = 64 * 1024
MAX_RETRY_AFTER_S = 3600.0
MIN_TOKEN = 8  # anything shorter may be a word of any error
UPLOAD_REPLY_S = 60.0  # the coordinator may want to store what it got before it answers

_TOKEN = re.compile(r"[\x21-\x7e]{1,8192}")


class HttpReply(Struct, frozen=True):
    """An answer: HTTP status, body, whether that is all of it or cut at the bound, and three headers.

    `date` is when it was given, in seconds since 1970 by the clock of who gave it.
    """

    status: int
    body: bytes = b""
    complete: bool = True
    retry_after: float | None = None
    location: str = ""
    date: float | None = None


class Packed(ValueError):  # noqa: N818  # says what is wrong with it
    """A reply in a Content-Encoding that we cannot undo."""


class HttpClient:
    """Calls below one base URL, each with a deadline. May be used from several threads.

    `connect_s` bounds connecting, over all addresses of the name and with the TLS handshake; `timeout_s` each
    piece that is sent, and the whole reply. Looking the name up has the resolver's own time-outs. `ca_file`
    has the only certificates to trust, instead of the system's. `auth_scheme` is `bearer` or `api_key`.
    """

    def __init__(
        self,
        base_url: str,
        timeout_s: float,
        *,
        connect_s: float | None = None,
        verify: bool = True,
        ca_file: Path | None = None,
        user_agent: str = "aitbc-miner",
        auth_scheme: str = "bearer",
        proxy: Proxy | None = None,
    ) -> None:
        self._base_url = base_url.rstrip("/")
        self._timeout_s = timeout_s
        self._connect_s = timeout_s if connect_s is None else connect_s
        self._verify = verify
        self._ca_file = ca_file
        self._user_agent = user_agent
        self._auth_scheme = auth_scheme
        self._proxy = proxy
        self._token: str | None = None
        self._local = threading.local()
        self._dialer = Dialer()
        self._sessions: weakref.WeakSet[Session] = weakref.WeakSet()
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
    ) -> HttpReply:
        """Send a JSON value or a MultipartEncoder and read the reply, whatever its status.

        `headers` go before the token's own. Raises Unreachable ("cannot DOING: …") when no reply arrives.
        """
        upload = isinstance(payload, MultipartEncoder)
        body = payload if upload or payload is None else msgspec.json.encode(payload)
        ours = {"Content-Type": payload.content_type if upload else "application/json"}
        ours |= self.authorization(self._token) if self._token else {}
        ours |= headers or {}
        answer_s = max(self._timeout_s, UPLOAD_REPLY_S) if upload else self._timeout_s
        try:
            with self._session().request(
                method,
                self._base_url + path,
                params=params,
                data=body,
                headers=ours,
                timeout=(self._connect_s, answer_s),
                allow_redirects=False,
            ) as response:
                content = _unpacked(_read(response.raw, max_bytes + 1), response.headers, max_bytes)
        except CredentialError as error:
            raise Unreachable(f"cannot {doing}: {error}") from error
        except (OSError, ValueError, urllib3.exceptions.HTTPError, http.client.HTTPException) as error:
            self._start_anew()
            raise Unreachable(f"cannot {doing}: {self._cause(error)}") from error
        self._check_proxy(response.status_code, doing)
        return _reply(response, content, max_bytes, ours)

    def _session(self) -> Session:
        session: Session | None = getattr(self._local, "session", None)
        if session is None:
            context = tls_context(self._ca_file, verify=self._verify)
            adapter = Adapter(self._dialer, context, self._timeout_s, self._proxy)
            session = Session(adapter, self._proxy, self._user_agent, verify=self._verify)
            self._local.session = session
            self._sessions.add(session)
        return session

    def _check_proxy(self, status: int, doing: str) -> None:
        if self._proxy and status == HTTPStatus.PROXY_AUTHENTICATION_REQUIRED:
            self._start_anew()
            raise Unreachable(f"cannot {doing}: {_PROXY.format(proxy=self._proxy, error='it answered 407')}")

    def _start_anew(self) -> None:
        """Have the next call ask another address first, and read the proxy's credential once more."""
        self._dialer.blame()
        if self._proxy:
            self._local.session = None  # where none could be made, there is none

    def _cause(self, error: BaseException) -> str:
        """Say in words what went wrong, from the innermost error that says something."""
        # requests' own errors show the insides of urllib3, so only what they wrap is shown.
        chain = [one for one in _chain(error) if not isinstance(one, requests.RequestException)]
        fitting = ((text, one) for kinds, text in _CAUSES for one in chain if isinstance(one, kinds))
        text, found = next(fitting, (_UNKNOWN, error))
        fault = ""
        if isinstance(found, ssl.SSLCertVerificationError):
            fault = "; ".join(certificate_fault(found, "coordinator.ca_file"))
        elif isinstance(found, ssl.SSLError) and speaks_no_tls(found):
            text = _NO_TLS
        elif self._proxy and str(found).startswith("Tunnel connection failed"):
            text = _PROXY
        at_proxy = self._proxy and any(isinstance(one, urllib3.exceptions.ProxyError) for one in chain)
        values = {"peer": self._proxy if at_proxy else self._peer, "proxy": self._proxy, "fault": fault}
        times = {"timeout": self._timeout_s, "connect": self._connect_s}
        return clean(text.format(error=found, **values, **times), 600)


def _reply(response: requests.Response, content: bytes, most: int, sent: Mapping[str, str]) -> HttpReply:
    if response.status_code != HTTPStatus.OK:
        content = _untold(content, sent)
    return HttpReply(
        response.status_code,
        content[:most].removeprefix(codecs.BOM_UTF8),
        len(content) <= most,
        retry_after(response.headers),
        response.headers.get("Location", ""),
        _seconds(response.headers.get("Date", "")),
    )


def _untold(content: bytes, sent: Mapping[str, str]) -> bytes:
    """Take the token out of an error that quotes it: errors are shown, recorded, and told to clients."""
    token = sent.get("X-Api-Key") or sent.get("Authorization", "").removeprefix("Bearer ")
    return content.replace(token.encode(), b"***") if len(token) >= MIN_TOKEN else content


def _read(raw: Any, most: int) -> bytes:
    content: bytes = raw.read(most, decode_content=False)
    # urllib3 tells of a body that ended too early only when asked once more.
    if len(content) < most and raw.length_remaining:
        raise http.client.IncompleteRead(content, raw.length_remaining)
    return content


def _unpacked(content: bytes, headers: Mapping[str, str], most: int) -> bytes:
    """Undo a packing that nobody asked for, up to the bound. Raises Packed for one that we do not know."""
    coding = headers.get("Content-Encoding", "").strip().lower()
    if coding in {"", "identity"} or not content or len(content) > most:
        return content
    if coding not in {"gzip", "x-gzip", "deflate"}:
        raise Packed(coding)
    for kind in (zlib.MAX_WBITS | 32, -zlib.MAX_WBITS):
        unpacker = zlib.decompressobj(kind)
        with suppress(zlib.error):
            unpacked = unpacker.decompress(content, most + 1)
            if unpacker.eof or len(unpacked) > most:
                return unpacked
    return content  # some say that it is packed, and it is not


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
    ((ssl.SSLCertVerificationError,), "the TLS certificate of {peer} {fault}"),
    ((NoConnection,), "no connection to {peer} within {connect:g} s"),
    (
        (NoHandshake,),
        "{peer} takes the connection, but answers no TLS handshake within {connect:g} s; is it http there?",
    ),
    ((ssl.SSLError,), "TLS with {peer} failed ({error.reason})"),
    ((socket.gaierror,), "the name of {peer} cannot be looked up ({error.strerror})"),
    ((ConnectionRefusedError,), "connection refused by {peer}"),
    ((urllib3.exceptions.NewConnectionError,), "no connection to {peer} ({error.__cause__.strerror})"),
    ((TimeoutError, urllib3.exceptions.TimeoutError), "no complete reply from {peer} within {timeout:g} s"),
    (
        (http.client.IncompleteRead, urllib3.exceptions.IncompleteRead),
        "the reply of {peer} was cut short",
    ),
    ((ConnectionError,), "{peer} closed the connection without a reply"),
    ((TooMuch,), "garbage reply from {peer}: {error}"),
    ((Packed,), "garbage reply from {peer}: it is packed as {error}, which was not asked for"),
    (
        (http.client.HTTPException, urllib3.exceptions.ProtocolError),
        "garbage reply from {peer}: it is not HTTP",
    ),
    ((OSError,), "{error}"),
]
_NO_TLS = (
    "TLS with {peer} failed (what answers speaks no TLS): it is probably http there; see coordinator.base_url"
)
_PROXY = "{proxy} does not let us pass ({error}); see coordinator.proxy and coordinator.proxy_auth"
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
