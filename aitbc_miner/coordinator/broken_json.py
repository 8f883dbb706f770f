"""Finds the id of a job in JSON that cannot be decoded, so that the node can report the job as failed."""

import re

import msgspec

# A JSON string, a lone quote (of a truncated string), punctuation, or other text up to one of the three.
_TOKENS = re.compile(rb'"(?:[^"\\]++|\\.)*+"|"|[{}\[\],:]|[^"{}\[\],:\s]++', re.DOTALL)
_DEEPEST = 8


def find_text(body: bytes, path: tuple[str, ...]) -> str | None:
    """Find a text member of JSON that is truncated, too deep or broken further on; None without the member.

    `path` has the keys that lead to the member; `jobs[]` stands for each object in a list called `jobs`.
    The search reads one token after another and tracks the open objects, so that deep or long JSON does no
    harm, and a "job_id" among a job's parameters is not mistaken for the job's own.
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
