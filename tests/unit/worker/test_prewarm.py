"""Which task gets the process that waits for one."""

import os
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from aitbc_miner.runners.interface import Launch
from aitbc_miner.worker.prewarm import Warm

LAUNCH = Launch(["python"], {}, None, None, stdin=b"{}", may_wait=True)


@pytest.fixture
def warm() -> Iterator[Any]:
    read_end, write_end = os.pipe()
    yield SimpleNamespace(launch=LAUNCH, slot=object(), ready=True, _order=write_end, listen=lambda: "")
    os.close(read_end)
    os.close(write_end)


def test_a_process_that_is_ready_is_taken(warm: Any) -> None:
    assert Warm.fits(warm, LAUNCH, warm.slot)


def test_a_process_whose_sandbox_may_not_be_made_yet_is_not_taken(warm: Any) -> None:
    warm.ready = False
    assert not Warm.fits(warm, LAUNCH, warm.slot)


def test_a_process_that_has_just_become_ready_is_taken(warm: Any) -> None:
    def listen() -> str:
        warm.ready = True
        return ""

    warm.ready, warm.listen = False, listen
    assert Warm.fits(warm, LAUNCH, warm.slot)
