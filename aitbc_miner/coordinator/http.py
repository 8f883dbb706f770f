"""HTTP to a coordinator that may be slow, broken or hostile: time and size of every reply are bounded.

`requests` sends the calls. This module adds a deadline and a size limit for the whole reply, uploads that
time out only if they stall, and readable errors. It follows no redirect: the target would get the token.
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
MIN_TOKEN = 8  # a shorter token may be a word of an error's text
UPLOAD_REPLY_S = 60.0  # the coordinator may store an upload before it answers

_TOKEN = re.compile(r"[\x21-\x7e]{1,8192}")


class HttpReply(Struct, frozen=True):
    """A reply: HTTP status, body, whether the body is complete or cut at the size limit, and three headers.

    `date` is the header `Date`, in seconds since 1970 by the server's clock.
    """

    status: int
    body: bytes = b""
    complete: bool = True
    retry_after: float | None = None
    location: str = ""
    date: float | None = None


class Packed(ValueError):  # noqa: N818  # the name says what is wrong
    """The Content-Encoding of a reply is unknown."""


class HttpClient:
    """Makes calls below one base URL, each with a deadline. Several threads may use one client.

    `connect_s` bounds connecting to all addresses of the name, TLS handshake included. `timeout_s` bounds
    each piece sent, and the whole reply. Looking up the name has the resolver's own time-outs. The CAs of
    `ca_file` replace the system's. `auth_scheme` is `bearer` or `api_key`.
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
            # The operator switched verification off; urllib3 would warn of each call on stderr.
            urllib3.disable_warnings(urllib3.exceptions.InsecureRequestWarning)

    def set_token(self, token: str) -> None:
        """Send this token with every later call. Raises MinerError if no header can carry the token."""
        self.authorization(token)
        self._token = token

    def authorization(self, token: str) -> dict[str, str]:
        """Build the header with a token. Raises MinerError if no header can carry the token."""
        if not _TOKEN.fullmatch(token):
            raise MinerError(
                "cannot use the token: it is empty or too long, or has spaces, line breaks or non-ASCII text"
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
        """Send a JSON value or a MultipartEncoder, and read a reply of any status.

        `headers` override the token's header. Raises Unreachable ("cannot DOING: …") if no reply arrives.
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
        """Make the next call try another address first, and read the proxy's credential again."""
        self._dialer.blame()
        if self._proxy:
            self._local.session = None  # assigned, not deleted: no session exists if making one failed

    def _cause(self, error: BaseException) -> str:
        """Describe an error by the first row of `_CAUSES` that fits an error of its chain."""
        # The texts of requests' errors have internals of urllib3; only the errors inside are used.
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
    location = response.headers.get("Location", "").encode()
    if response.status_code != HTTPStatus.OK:
        content, location = _untold(content, sent), _untold(location, sent)
    return HttpReply(
        response.status_code,
        content[:most].removeprefix(codecs.BOM_UTF8),
        len(content) <= most,
        retry_after(response.headers),
        location.decode(),
        _seconds(response.headers.get("Date", "")),
    )


def _untold(content: bytes, sent: Mapping[str, str]) -> bytes:
    """Replace the token in the text of an error: the node logs, records and forwards such texts."""
    token = sent.get("X-Api-Key") or sent.get("Authorization", "").removeprefix("Bearer ")
    if len(token) < MIN_TOKEN:
        return content
    # Encoded anew, so that no letter of the token hides behind an escape of JSON.
    with suppress(msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        content = msgspec.json.encode(msgspec.json.decode(content))
    for form in (token.encode(), msgspec.json.encode(token)[1:-1]):
        content = content.replace(form, b"***")
    return content


def _read(raw: Any, most: int) -> bytes:
    content: bytes = raw.read(most, decode_content=False)
    # urllib3 raises for a body that ended too early only at a further read.
    if len(content) < most and raw.length_remaining:
        raise http.client.IncompleteRead(content, raw.length_remaining)
    return content


def _unpacked(content: bytes, headers: Mapping[str, str], most: int) -> bytes:
    """Decompress a body, although the node requests none, up to `most` bytes. Raises Packed if it cannot."""
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
    return content  # some servers name an encoding and do not use it


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and all errors inside it: causes, contexts, urllib3's `reason`s, arguments."""
    todo, seen = [error], set()
    while todo:
        found = todo.pop(0)
        if id(found) in seen:
            continue
        seen.add(id(found))
        yield found
        inner = (found.__cause__, found.__context__, getattr(found, "reason", None), *found.args)
        todo.extend(one for one in inner if isinstance(one, BaseException))


# The first row that fits an error of the chain gives the text. Causes that an operator can mend come first.
_CAUSES: list[tuple[tuple[type[BaseException], ...], str]] = [
    ((ssl.SSLCertVerificationError,), "the TLS certificate of {peer} {fault}"),
    ((NoConnection,), "no connection to {peer} within {connect:g} s"),
    (
        (NoHandshake,),
        "{peer} did not answer the TLS handshake within {connect:g} s; for http, see coordinator.base_url",
    ),
    ((ssl.SSLError,), "TLS with {peer} failed ({error.reason})"),
    ((socket.gaierror,), "the name of {peer} cannot be looked up ({error.strerror})"),
    ((ConnectionRefusedError,), "connection refused by {peer}"),
    ((urllib3.exceptions.NewConnectionError,), "no connection to {peer} ({error.__cause__.strerror})"),
    ((TimeoutError, urllib3.exceptions.TimeoutError), "no complete reply from {peer} within {timeout:g} s"),
    ((http.client.IncompleteRead, urllib3.exceptions.IncompleteRead), "the reply of {peer} was cut short"),
    ((ConnectionError,), "{peer} closed the connection without a reply"),
    ((TooMuch,), "garbage reply from {peer}: {error}"),
    ((Packed,), "garbage reply from {peer}: unknown Content-Encoding {error}"),
    ((http.client.HTTPException, urllib3.exceptions.ProtocolError), "garbage reply from {peer}: not HTTP"),
    ((OSError,), "{error}"),
]
_NO_TLS = (
    "TLS with {peer} failed (the server speaks no TLS): it probably speaks http; see coordinator.base_url"
)
_PROXY = "{proxy} refuses ({error}); see coordinator.proxy and coordinator.proxy_auth"
_UNKNOWN = "{error.__class__.__name__} from {peer}"


def clean(text: str, limit: int) -> str:
    """Make untrusted text fit for one line of a log: printable, single spaces, at most `limit` characters."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text[: 4 * limit]).split())
    return line if len(line) <= limit else line[: limit - 1] + "…"


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Read `Retry-After` (seconds or a date) as seconds from now, 0 to an hour; None if unusable."""
    value = headers.get("Retry-After", "").strip()
    if re.fullmatch(r"[0-9]{1,20}", value):
        return min(float(value), MAX_RETRY_AFTER_S)
    due = _seconds(value)
    if due is None:
        return None
    # The header `Date` has the coordinator's time; the node's clock may be wrong.
    current = _seconds(headers.get("Date", ""))
    return min(max(due - (time.time() if current is None else current), 0.0), MAX_RETRY_AFTER_S)


def _seconds(date: str) -> float | None:
    try:
        return parsedate_to_datetime(date).timestamp()
    except (ValueError, OverflowError):
        return None
