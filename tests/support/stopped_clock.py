"""A clock that stands still until a test moves it."""

import pytest

from aitbc_miner.util import clock


class Time:
    """The boot-time clock, to be moved by hand."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(clock, "now", lambda: self.now)
