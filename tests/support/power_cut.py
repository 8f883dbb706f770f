"""A power cut at any write: one of all fsyncs and renames never happens."""

import os
from collections.abc import Callable

import pytest


class Cut(BaseException):
    """The power is gone: nothing after this happens."""


def cut_at(monkeypatch: pytest.MonkeyPatch, call: int) -> None:
    """Cut the power instead of the given one (from 0) of all further fsyncs and renames."""
    left = [call]
    for name in ("fsync", "rename"):
        real: Callable[..., None] = getattr(os, name)

        def guarded(*args: object, real: Callable[..., None] = real, **kwargs: object) -> None:
            left[0] -= 1
            if left[0] < 0:
                raise Cut
            real(*args, **kwargs)

        monkeypatch.setattr(os, name, guarded)


def cut_after(call: int, act: Callable[[], object]) -> bool:
    """Do something with the power cut at a call (`cut_at`); False when the cut would come later."""
    with pytest.MonkeyPatch.context() as patch:
        cut_at(patch, call)
        try:
            act()
        except Cut:
            return True
    return False
