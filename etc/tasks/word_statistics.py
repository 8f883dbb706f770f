"""Counts lines, words and bytes of a text file among the job's inputs, and its most frequent words."""

import re
from collections import Counter
from typing import Annotated, Any

from msgspec import Meta

from aitbc_miner.task import TaskError, progress, work_dir

WORD = re.compile(r"[^\W\d_]+(?:['’-][^\W\d_]+)*")  # noqa: RUF001  # both apostrophes are written in texts

MAX_DISTINCT = 1_000_000
"""Distinct words kept; a text of random letters would otherwise fill the memory."""


def run(path: str, top: Annotated[int, Meta(ge=0, le=10_000)] = 10) -> dict[str, Any]:
    """Read the file line by line, so that its size does not matter; `top` is how many words to list."""
    file = (work_dir() / path).resolve()
    if not file.is_relative_to(work_dir().resolve()):
        raise TaskError("OUTSIDE", f"{path!r} is not below the job's work directory")
    if not file.is_file():
        raise TaskError("NO_FILE", f"there is no file {path!r} among the job's inputs")
    size = file.stat().st_size
    lines = words = read = 0
    counts: Counter[str] = Counter()
    with file.open("rb") as text:
        # Not by line alone: a file need not have a single newline.
        while chunk := text.readline(1 << 20):
            read += len(chunk)
            lines += chunk.endswith(b"\n")
            found = WORD.findall(chunk.decode(errors="replace").casefold())
            words += len(found)
            counts.update(found)
            if len(counts) > MAX_DISTINCT:
                raise TaskError("TOO_VARIED", f"more than {MAX_DISTINCT} distinct words; is this a text?")
            if lines % 100_000 == 0:
                progress(100 * read / size, f"{lines} lines")
    # Equal counts in alphabetical order: the same text gives the same answer everywhere.
    ranking = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return {
        "lines": lines,
        "words": words,
        "bytes": read,
        "distinct": len(counts),
        "top": [{"word": word, "count": count} for word, count in ranking[:top]],
    }
