"""What could not be done is done again, in its time, and once."""

import errno
import os
from collections.abc import Callable
from functools import partial

import pytest

from aitbc_miner.util import clock
from aitbc_miner.util.persisting import MAX_S, Persisting


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    now = [1000.0]
    monkeypatch.setattr(clock, "now", lambda: now[0])
    return lambda: now.__setitem__(0, now[0] + MAX_S)


def test_what_cannot_be_done_is_done_later(later: Callable[[], None]) -> None:
    told: list[str | None] = []
    failures, done = [errno.EMFILE, errno.EIO], []
    persisting = Persisting(lambda: told.append(persisting.trouble))

    def do() -> None:
        if failures:
            raise OSError(failures[0], os.strerror(failures.pop(0)))
        done.append("it")

    persisting.do("settle job j1", do)
    persisting.start_due()
    assert done == [], "before its time"
    while not done:
        later()
        persisting.start_due()
    assert told == [
        "cannot settle job j1: [Errno 24] Too many open files",
        "cannot settle job j1: [Errno 5] Input/output error",
        None,
    ]
    assert persisting.next_due() is None


def test_what_another_has_brought_about_is_not_done_twice(later: Callable[[], None]) -> None:
    persisting = Persisting(lambda: None)
    done: list[str] = []
    trouble = True

    def do(name: str, then: Callable[[], None] = lambda: None) -> None:
        if trouble:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        done.append(name)
        then()

    decide = partial(persisting.do, "decide on a retry of job j1", partial(do, "decide"))
    persisting.do("settle job j1", partial(do, "settle", decide))
    decide()
    trouble = False
    later()
    persisting.start_due()
    assert done == ["settle", "decide"]
