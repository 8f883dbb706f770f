"""What answers at coordinator.base_url, if it is not what the configuration says: asked without any token.

A wrong dialect, a path without /v1, http instead of https: each looks like a refused token or an outage. Here
a few harmless calls tell them apart, so that the operator gets the line that mends it.
"""

import contextlib
from collections.abc import Iterator
from urllib.parse import urlsplit

import msgspec

from aitbc_miner.config.settings import CoordinatorSection as Settings
from aitbc_miner.coordinator.http import HttpClient, HttpReply
from aitbc_miner.coordinator.interface import Unreachable
from aitbc_miner.util.web import Proxy

LOOK_S = 5.0
_ROOTS = ("/api/v1", "/v1", "/api")
_THERE = frozenset({200, 204, 400, 401, 403, 422})
_NOT_THERE = frozenset({404, 405})
_DENIED = frozenset({401, 403})


def likely_cause(settings: Settings, proxy: Proxy | None = None) -> str | None:
    """Say what is probably wrong with base_url or dialect, and what to set; None if that is not known."""
    base, other = settings.base_url, _other_scheme(settings.base_url)
    answer = _ask(proxy, base, "/")
    if answer is None or (answer.status == 400 and base.startswith("http:")):
        if _ask(proxy, other, "/") is None:
            return None
        allow = ", and coordinator.allow_http: true if you trust the network" if other[4] == ":" else ""
        speaks = other.partition(":")[0]
        return f"{speaks} is spoken there: set coordinator.base_url: {other}{allow}"
    # What stands before a coordinator that is down says nothing about it.
    return None if answer.status >= 500 else next(_guesses(settings, proxy), None)


def diagnosis(settings: Settings, proxy: Proxy | None = None) -> str | None:
    """Say what is probably set wrongly, or why nobody can be reached; None if somebody can."""
    if guess := likely_cause(settings, proxy):
        return guess
    http = HttpClient(
        settings.base_url,
        LOOK_S,
        verify=settings.tls_verify,
        ca_file=settings.ca_file,
        proxy=proxy,
    )
    with contextlib.closing(http):
        try:
            http.call("POST", "/", {}, doing="reach the coordinator")
        except Unreachable as error:
            return str(error)
    return None


def _guesses(settings: Settings, proxy: Proxy | None) -> Iterator[str | None]:
    base, aitbc = settings.base_url, settings.dialect == "aitbc-v1"
    origin = "{0.scheme}://{0.netloc}".format(urlsplit(base))
    roots = dict.fromkeys([*(base.removesuffix(end) for end in _ROOTS if base.endswith(end)), base, origin])
    for root in roots:
        is_aitbc = _is_aitbc(_ask(proxy, root, "/health", "GET"))
        if is_aitbc or _serves(proxy, f"{root}/v1", "/miners/heartbeat") is True:
            yield _advice(settings, "an AITBC coordinator", "aitbc-v1", f"{root}/v1")
            return
    denied = False
    for place in dict.fromkeys([base, *(f"{root}{end}" for root in roots for end in (*_ROOTS[:2], ""))]):
        serves = _serves(proxy, place, "/nodes/heartbeat")
        if serves:
            yield _advice(settings, "a coordinator of the dialect bootstrap", "bootstrap", place)
            return
        denied |= serves is None
    if denied and not aitbc:
        yield (
            "it refuses every path alike, as an AITBC coordinator does: if it is one, set"
            f" coordinator.dialect: aitbc-v1 and coordinator.base_url: {origin}/v1 (docs/aitbc.md);"
            " otherwise the token is wrong"
        )
    elif denied and not base.endswith("/v1"):
        yield f"an AITBC coordinator's API is below /v1: set coordinator.base_url: {origin}/v1"
    elif not denied:
        yield (
            f"what answers at {origin} seems to be a web server and no coordinator: compare"
            " coordinator.base_url with what the coordinator's operator gave you, and mind its path"
        )


def _advice(settings: Settings, what: str, dialect: str, base: str) -> str | None:
    wrong = []
    if settings.dialect != dialect:
        scheme = " (and auth_scheme as docs/aitbc.md says)" if dialect == "aitbc-v1" else ""
        wrong.append(f"coordinator.dialect: {dialect}{scheme}")
    if settings.base_url != base:
        wrong.append(f"coordinator.base_url: {base}")
    return f"{what} answers there: set {' and '.join(wrong)}" if wrong else None


def _ask(proxy: Proxy | None, base: str, path: str, method: str = "POST") -> HttpReply | None:
    """Call without a token, and whatever the certificate: nothing that is said matters to anybody."""
    if proxy and proxy.url.startswith("https:"):
        proxy = Proxy(proxy.url)  # which does not show who it is, and so is told no credential
    http = HttpClient(base, LOOK_S, connect_s=LOOK_S, verify=False, proxy=proxy)
    with contextlib.closing(http), contextlib.suppress(Unreachable):
        return http.call(method, path, None if method == "GET" else {}, doing="look at the coordinator")
    return None


def _serves(proxy: Proxy | None, base: str, call: str) -> bool | None:
    """Whether there is this call below an address; None where all calls are denied alike."""
    there = _ask(proxy, base, call)
    nothing = _ask(proxy, base, "/no-such-call") if there and not _is_page(there) else None
    if there is None or nothing is None or _is_page(nothing):
        return False
    if nothing.status in _DENIED:
        return None
    return there.status in _THERE and nothing.status in _NOT_THERE


def _is_aitbc(reply: HttpReply | None) -> bool:
    said = _object(reply) if reply and reply.status == 200 else {}
    return said.get("status") == "ok" and bool({"env", "python_version"} & said.keys())


def _is_page(reply: HttpReply) -> bool:
    """Whether it is something for a browser: a coordinator's replies are JSON objects, or empty."""
    return bool(reply.body.strip()) and not _object(reply)


def _object(reply: HttpReply) -> dict[str, object]:
    with contextlib.suppress(msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        said = msgspec.json.decode(reply.body)
        return said if isinstance(said, dict) else {}
    return {}


def _other_scheme(url: str) -> str:
    scheme, _, rest = url.partition(":")
    return f"{'http' if scheme == 'https' else 'https'}:{rest}"
