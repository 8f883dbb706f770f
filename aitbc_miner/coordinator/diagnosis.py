"""Finds out whether coordinator.base_url and coordinator.dialect fit the server, by calls without a token.

A wrong dialect, a missing /v1, or http instead of https looks like a refused token or an outage. A few
harmless calls tell these faults apart, so that the operator learns which key to change.
"""

import contextlib
from collections.abc import Iterator
from urllib.parse import urlsplit

from aitbc_miner.config.settings import CoordinatorSection as Settings
from aitbc_miner.coordinator.answers import json_object
from aitbc_miner.coordinator.http import HttpClient, HttpReply
from aitbc_miner.coordinator.interface import Unreachable
from aitbc_miner.util.web import Proxy

LOOK_S = 5.0
_ROOTS = ("/api/v1", "/v1", "/api")
_THERE = frozenset({200, 204, 400, 401, 403, 422})
_NOT_THERE = frozenset({404, 405})
_DENIED = frozenset({401, 403})


def likely_cause(settings: Settings, proxy: Proxy | None = None) -> str | None:
    """Give the likely fault of base_url or dialect, with the value to set; None without a likely fault."""
    base, other = settings.base_url, _other_scheme(settings.base_url)
    answer = _ask(proxy, base, "/")
    if answer is None or (answer.status == 400 and base.startswith("http:")):
        if _ask(proxy, other, "/") is None:
            return None
        allow = ", and coordinator.allow_http: true if you trust the network" if other[4] == ":" else ""
        return f"the server speaks {other.partition(':')[0]}: set coordinator.base_url: {other}{allow}"
    # A proxy in front of a stopped coordinator answers 5xx, which reveals nothing about the coordinator.
    return None if answer.status >= 500 else next(_guesses(settings, proxy), None)


def diagnosis(settings: Settings, proxy: Proxy | None = None) -> str | None:
    """Give the likely fault of the settings, or the error of a call; None if the coordinator answers."""
    if guess := likely_cause(settings, proxy):
        return guess
    http = HttpClient(
        settings.base_url, LOOK_S, verify=settings.tls_verify, ca_file=settings.ca_file, proxy=proxy
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
            "the server refuses every path alike, as AITBC coordinators do: if it is an AITBC coordinator,"
            f" set coordinator.dialect: aitbc-v1 and coordinator.base_url: {origin}/v1 (docs/aitbc.md);"
            " otherwise the token is wrong"
        )
    elif denied and not base.endswith("/v1"):
        yield f"an AITBC coordinator's API is below /v1: set coordinator.base_url: {origin}/v1"
    elif not denied:
        yield (
            f"the server at {origin} seems to be a web server and no coordinator: compare"
            " coordinator.base_url, with its path, to the address from the coordinator's operator"
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
    """Make a call without a token and with any certificate; the call sends and returns nothing secret."""
    if proxy and proxy.url.startswith("https:"):
        proxy = Proxy(proxy.url)  # without a credential, because the proxy's certificate is not verified
    http = HttpClient(base, LOOK_S, connect_s=LOOK_S, verify=False, proxy=proxy)
    with contextlib.closing(http), contextlib.suppress(Unreachable):
        return http.call(method, path, None if method == "GET" else {}, doing="look at the coordinator")
    return None


def _serves(proxy: Proxy | None, base: str, call: str) -> bool | None:
    """Whether an address serves a call; None if the address denies unknown calls as well."""
    there = _ask(proxy, base, call)
    nothing = _ask(proxy, base, "/no-such-call") if there and not _is_page(there) else None
    if there is None or nothing is None or _is_page(nothing):
        return False
    if nothing.status in _DENIED:
        return None
    return there.status in _THERE and nothing.status in _NOT_THERE


def _is_aitbc(reply: HttpReply | None) -> bool:
    body = json_object(reply) if reply and reply.status == 200 else {}
    return body.get("status") == "ok" and bool({"env", "python_version"} & body.keys())


def _is_page(reply: HttpReply) -> bool:
    """Whether a reply is a page for browsers: a coordinator's replies are JSON objects, or empty."""
    return bool(reply.body.strip()) and not json_object(reply)


def _other_scheme(url: str) -> str:
    scheme, _, rest = url.partition(":")
    return f"{'http' if scheme == 'https' else 'https'}:{rest}"
