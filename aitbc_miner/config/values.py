"""Parsers for addresses and paths in the configuration; each raises ValueError("must be ...")."""

import ipaddress
import re
from pathlib import Path
from urllib.parse import SplitResult, urlsplit

from aitbc_miner.config.document import absolute_path
from aitbc_miner.util.trust import refusal

_LISTEN = re.compile(r"(?:\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+):(\d{1,5})", re.ASCII)


def _split(value: object, schemes: set[str], expected: str) -> SplitResult:
    """Split an address; raises ValueError(expected) for a bad address."""
    try:
        url = urlsplit(value if isinstance(value, str) else "")
        where = url.path if url.scheme == "unix" else url.hostname
        good = url.scheme in schemes and bool(where) and url.port != 0
    except ValueError:  # a bad port or IPv6 address
        good = False
    if not good or re.search(r"[\s\x00-\x1f\\]", str(value)):
        raise ValueError(expected)
    return url


def parse_base_url(value: object) -> str:
    """Check the address of an API."""
    expected = "must be an http or https address, such as https://coordinator.example/api/v1"
    url = _split(value, {"http", "https"}, expected)
    if "@" in url.netloc or url.query or url.fragment:
        raise ValueError(
            "must have no user, password, ? or #; set the token's source in coordinator.auth_token"
        )
    return str(value).rstrip("/")


def is_loopback(url: str) -> bool:
    """Whether the host of an address is this machine."""
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def parse_ca_file(value: object) -> Path:
    """Check the path of an existing file with certificates."""
    path = absolute_path(value)
    if not path.is_file():
        raise ValueError("must be an existing file with CA certificates in PEM form")
    if untrusted := refusal(path):
        raise ValueError(untrusted)
    return path


def parse_listen(value: object) -> str:
    """Check host:port."""
    match = _LISTEN.fullmatch(value) if isinstance(value, str) else None
    if not match or int(match[1]) > 65_535:
        raise ValueError("must be host:port, such as 127.0.0.1:9464 or [::1]:9464")
    return match[0]


def parse_textfile(value: object) -> Path:
    """Check the path of a file for node_exporter."""
    path = absolute_path(value)
    if path.suffix != ".prom":
        raise ValueError("must end in .prom, because node_exporter reads only such files")
    return path


def parse_redis_url(value: object) -> str:
    """Check the address of a Redis."""
    expected = "must be redis://HOST:PORT/N, rediss://HOST:PORT/N (TLS) or unix:///PATH?db=N"
    if "@" in _split(value, {"redis", "rediss", "unix"}, expected).netloc:
        raise ValueError("must have no user and password; set the password's source in queue.password")
    return str(value)


def parse_proxy(value: object) -> str:
    """Check the address of an HTTP proxy."""
    try:
        url = parse_base_url(value)
    except ValueError:
        url = ""
    if not url or urlsplit(url).path:
        raise ValueError(
            "must be http://HOST:PORT or https://HOST:PORT; set the source of user and password in proxy_auth"
        )
    return url


def parse_socket(value: object) -> Path:
    """Check the path of a socket."""
    path = absolute_path(value)
    if len(bytes(path)) > 107:  # sizeof(sun_path) - 1, see unix(7)
        raise ValueError("must be a path of at most 107 bytes, because it names a socket")
    return path
