"""Hashes every file below a directory of the job; writes output/tree.sha256 in the form of `sha256sum`."""

import hashlib
import os
from pathlib import Path
from typing import Any

from aitbc_miner.task import TaskError, output_dir, progress, work_dir


def run(root: str = ".") -> dict[str, Any]:
    """Return the digest of the list, which changes with each name and content in the tree."""
    top = (work_dir() / root).resolve()
    if not top.is_relative_to(work_dir().resolve()):
        raise TaskError("OUTSIDE", f"{root!r} is not below the job's work directory")
    if not top.is_dir():
        raise TaskError("NO_DIRECTORY", f"there is no directory {root!r} in the job's work directory")
    files = sorted(_files(top))
    total = 0
    lines = []
    step = len(files) // 100 or 1  # a hundred reports are enough
    for number, file in enumerate(files):
        with file.open("rb") as content:
            digest = hashlib.file_digest(content, "sha256").hexdigest()
            total += content.tell()
        lines.append(_line(digest, file.relative_to(top)))
        if number % step == 0:
            progress(100 * number / len(files), str(file.relative_to(top)))
    listing = b"".join(lines)
    (output_dir() / "tree.sha256").write_bytes(listing)
    return {"files": len(files), "bytes": total, "sha256": hashlib.sha256(listing).hexdigest()}


def _files(top: Path) -> list[Path]:
    # No links: their targets may be outside the tree.
    found = [Path(where, name) for where, _, names in os.walk(top) for name in names]
    return [path for path in found if path.is_file() and not path.is_symlink()]


def _line(digest: str, name: Path) -> bytes:
    # sha256sum escapes a newline or backslash in a name, and marks the line by a leading backslash.
    raw = os.fsencode(name)
    escaped = raw.replace(b"\\", b"\\\\").replace(b"\n", b"\\n").replace(b"\r", b"\\r")
    return (b"\\" if escaped != raw else b"") + digest.encode() + b"  " + escaped + b"\n"
