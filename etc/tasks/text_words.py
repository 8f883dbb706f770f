"""Counts the words of a short text and names the most frequent words."""

import re
from collections import Counter
from typing import Annotated, Any

from msgspec import Meta

WORD = re.compile(r"[^\W\d_]+(?:['’-][^\W\d_]+)*")  # noqa: RUF001  # texts have both apostrophes


def run(text: str, top: Annotated[int, Meta(ge=0, le=1000)] = 10) -> dict[str, Any]:
    """Count the words of `text`; words with equal counts stand in alphabetical order."""
    words = WORD.findall(text.casefold())
    counts = sorted(Counter(words).items(), key=lambda item: (-item[1], item[0]))
    return {
        "words": len(words),
        "distinct": len(counts),
        "top": [{"word": word, "count": count} for word, count in counts[:top]],
    }
