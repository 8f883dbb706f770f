"""Identifies the build of the package, because several builds share one version."""

import functools
import hashlib
from pathlib import Path

from aitbc_miner import __version__

_PACKAGE = Path(__file__).parents[1]


@functools.cache
def build() -> str:
    """Give the version and a fingerprint of the code at the first call, such as "0.1.0+3f9c2a1b"."""
    found = hashlib.sha256()
    for path in sorted(_PACKAGE.rglob("*.py")):
        code = path.read_bytes()
        found.update(f"{path.relative_to(_PACKAGE)}\0{len(code)}\0".encode() + code)
    return f"{__version__}+{found.hexdigest()[:8]}"
