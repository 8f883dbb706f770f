import errno
import os
import select

import pytest

from aitbc_miner.util.background import Background


@pytest.mark.parametrize("times", [1, 5])
def test_trouble_of_the_pipe_takes_no_call_and_no_wait(times: int, monkeypatch: pytest.MonkeyPatch) -> None:
    background, real, left = Background(), os.write, [times]
    ran: list[str] = []

    def write(fd: int, data: bytes) -> int:
        if left[0]:
            left[0] -= 1
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(fd, data)

    monkeypatch.setattr(os, "write", write)
    background.post(lambda: ran.append("it"))
    # Trouble that lasts costs the rest of the main thread's turn, and nothing else.
    woken, _, _ = select.select([background.woken], [], [], 0)
    assert bool(woken) == (times == 1)
    background.finish()
    assert ran == ["it"]
