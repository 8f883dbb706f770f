"""What is shown fits the terminal it is shown on."""

import fcntl
import os
import pty
import struct
import sys
import termios
from types import SimpleNamespace
from typing import Any, cast

import pytest

from aitbc_miner.util.terminal import columns, pad, size, width
from tools.demo_node.main import Table, examples
from tools.mock.bootstrap.coordinator import MockCoordinator


def test_the_width_is_that_of_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "132")
    assert width() == 132
    monkeypatch.setenv("COLUMNS", "3")
    assert width() == 40
    monkeypatch.delenv("COLUMNS")
    reading, writing = os.pipe()
    with os.fdopen(writing, "w") as pipe:
        monkeypatch.setattr(sys, "__stdout__", pipe)
        assert width() == 80
    os.close(reading)


def test_texts_fill_their_columns() -> None:
    assert [columns(pad(text, 7)) for text in ("", "abc", "漢字漢字漢字", "e\u0301" * 9)] == [7] * 4
    assert [size(number) for number in (0, 1023, 1536, 3 << 30, 5 << 50)] == [
        *("0 B", "1023 B", "1.5 KiB", "3.0 GiB", "5120.0 TiB"),
    ]


class Terminal:
    """What a terminal of 80 columns shows: a list of lines, and where the cursor is."""

    def __init__(self) -> None:
        self.lines = [""]
        self.at = 0

    def write(self, text: str) -> None:
        for piece in text.replace("\r", "").split("\n"):
            while "\x1b[" in piece[:2] and piece[:2] == "\x1b[":
                code = next(at for at, char in enumerate(piece) if char.isalpha())
                if piece[code] == "A":
                    self.at -= int(piece[2:code])
                else:
                    self.lines[self.at] = ""
                piece = piece[code + 1 :]  # noqa: PLW2901
            self.lines[self.at] += piece
            # What is wider goes on in a line of its own.
            self.at += 1 + max(0, columns(piece) - 1) // 80
            self.lines += [""] * (self.at + 1 - len(self.lines))
        self.at -= 1


def test_the_demo_redraws_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row that wrapped left a line behind at each redraw."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))
    monkeypatch.delenv("COLUMNS", raising=False)
    jobs = {f"job-{number:02}": example for number, example in enumerate(examples("http://h"), 1)}
    state = SimpleNamespace(state="queued", error_code=None)
    table = Table(cast("MockCoordinator", SimpleNamespace(job=lambda _: state)), jobs)
    with os.fdopen(theirs, "w") as terminal:
        monkeypatch.setattr(sys, "__stdout__", terminal)
        monkeypatch.setattr(sys, "stdout", terminal)
        screen = Terminal()
        table = Table(cast("MockCoordinator", SimpleNamespace(job=lambda _: state)), jobs)
        for state.state, state.error_code in (("queued", None), ("handed", None), ("failed", "E_ARTIFACT")):
            table.show()
            screen.write(os.read(ours, 1 << 16).decode())
        shown: list[Any] = [line for line in screen.lines if line]
    os.close(ours)
    assert len(shown) == len(jobs)
    assert all(line.startswith("  job-") and "E_ARTIFACT" in line for line in shown)
