"""Decides which names an input may have, and which URLs the node fetches. Pure."""

import re
from urllib.parse import unquote_to_bytes, urljoin

from urllib3.util import Url, parse_url

from aitbc_miner.errors import ErrorCode, JobError
from aitbc_miner.jobs import InputUrl


def refuse(message: str) -> JobError:
    """Make the error of a refused input."""
    return JobError(ErrorCode.E_INPUT, message)


def name_of(item: InputUrl) -> str:
    """Return the input's `name`, or the last part of its URL's path, percent-decoded."""
    part = (parse(item.url).path or "").rpartition("/")[2]
    return unquote_to_bytes(part).decode("utf-8", "surrogateescape") if item.name is None else item.name


def check_names(names: list[str]) -> None:
    """Raise JobError unless all names can be files of one directory."""
    for place, name in enumerate(names):
        if fault := _name_fault(name) or ("two inputs have this name" if name in names[:place] else None):
            raise refuse(f"cannot take input {name[:80]!a}: {fault}")


def _name_fault(name: str) -> str | None:
    if not name:
        return "the input has no name; add a 'name'"
    if name in {".", ".."} or "/" in name:
        return "a name must not be a path"
    if name.startswith("-"):
        return "a name must not begin with a dash: programs would read the name as an option"
    if any(ord(c) < 32 or 0x7F <= ord(c) < 0xA0 or 0xD800 <= ord(c) < 0xE000 for c in name):
        return "a name must be UTF-8 without control characters"
    return "a name must not be longer than 255 bytes" if len(name.encode()) > 255 else None


def parse(url: str, base: str = "") -> Url:
    """Parse and normalise a URL. Raises JobError if the node never fetches such a URL."""
    try:
        parsed = parse_url(urljoin(base, url))
    except ValueError as error:
        raise refuse(f"cannot fetch {shown_url(url)}: not a URL") from error
    if parsed.scheme not in {"http", "https"}:
        raise refuse(f"cannot fetch {shown_url(url)}: the node fetches only http and https URLs")
    if not parsed.host or parsed.auth:
        raise refuse(f"cannot fetch {shown_url(parsed.url)}: a URL must have a host and no user name")
    return parsed


def shown_url(url: str) -> str:
    """Return a URL without query and password, which are often secrets."""
    plain = re.sub(r"//[^/?#]*@", "//", re.split(r"[?#]", url, maxsplit=1)[0])
    return "".join(c if c.isprintable() else "?" for c in plain[:200])


def redirected(url: str, location: str) -> str:
    """Give the target of a redirect. Raises JobError if the node must not follow the redirect."""
    target = parse(location, url)
    if parse(url).scheme == "https" != target.scheme:
        raise refuse(
            f"cannot fetch {shown_url(url)}: the server redirects from https to {shown_url(target.url)}"
        )
    return target.url
