"""Finds the name of a job in JSON that cannot be decoded, so that somebody can be told what is wrong."""

import re

import msgspec

# A JSON string, a lone quote (a string cut off), punctuation, or anything else up to the next of these.
_TOKENS = re.compile(rb'"(?:[^"\\]++|\\.)*+"|"|[{}\[\],:]|[^"{}\[\],:\s]++', re.DOTALL)
_DEEPEST = 8


def find_text(body: bytes, path: tuple[str, ...]) -> str | None:
    """Find a member of JSON that is cut off, too deep or broken further on; None if it is not to be had.

    `path` leads to it by the keys of objects; `jobs[]` stands for each object in a list called `jobs`.
    Goes from token to token with a short list of open objects, so that nothing deep or long in it can hurt,
    and so that a "job_id" inside the parameters of a job is not taken for its own.
    """
    wanted = b"".join(
        b'{"%s"[' % key[:-2].encode() if key.endswith("[]") else b'{"%s"' % key.encode() for key in path
    )
    opened: list[bytes] = []
    depth = 0
    before = last = b""
    for match in _TOKENS.finditer(body):
        token = match[0]
        if token == b'"' or (depth == 0 and token != b"{"):
            return None
        if token in {b"{", b"["}:
            depth += 1
            if depth <= _DEEPEST:
                opened.append((before if last == b":" else b"") + token)
        elif token in {b"}", b"]"}:
            depth -= 1
            del opened[depth:]
        elif depth <= _DEEPEST and last == b":" and b"".join([*opened, before]) == wanted:
            return _string(token)
        before, last = last, token
    return None


def _string(token: bytes) -> str | None:
    try:
        return msgspec.json.decode(token, type=str)[:256] or None
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None
