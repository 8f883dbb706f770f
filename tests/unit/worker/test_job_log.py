"""What a job prints: kept up to the cap, cut with a mark, counted to the byte, never in the way."""

import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aitbc_miner.jobs import LogInfo
from aitbc_miner.util import fs
from aitbc_miner.worker.job_log import LOG_NAME, TAIL, JobLog


@pytest.fixture
def logs(tmp_path: Path) -> Iterator[tuple[int, Path]]:
    with fs.directory(tmp_path) as fd:
        yield fd, tmp_path / LOG_NAME


def written(logs: tuple[int, Path], cap: int, *pieces: bytes) -> tuple[LogInfo, bytes]:
    log = JobLog(logs[0], cap)
    for piece in pieces:
        log.write(piece)
    info = log.close()
    return info, logs[1].read_bytes()


def test_a_short_log_is_kept_as_it_is(logs: tuple[int, Path]) -> None:
    info, text = written(logs, 100, b"one\n", b"two")
    assert text == b"one\ntwo"
    assert info == LogInfo(bytes=7, dropped=0, tail="one\ntwo")


def test_a_job_that_says_nothing_has_an_empty_log(logs: tuple[int, Path]) -> None:
    assert written(logs, 100) == (LogInfo(), b"")


def test_it_is_on_disk_as_it_comes(logs: tuple[int, Path]) -> None:
    log = JobLog(logs[0], 100)
    log.write(b"now")
    assert logs[1].read_bytes() == b"now"
    log.close()


def test_what_is_over_the_cap_is_cut_marked_and_counted(logs: tuple[int, Path]) -> None:
    info, text = written(logs, 5, b"abc", b"defg", b"hij", b"k")
    assert text == b"abcde\n[log cut here: the cap of 5 bytes is reached]\n[6 bytes were dropped]\n"
    assert info == LogInfo(bytes=len(text), dropped=6, tail="abcdefghijk")


def test_a_log_that_just_fits_is_not_cut(logs: tuple[int, Path]) -> None:
    info, text = written(logs, 5, b"abc", b"de")
    assert (text, info.dropped) == (b"abcde", 0)


def test_without_any_room_only_the_marks_are_written(logs: tuple[int, Path]) -> None:
    info, text = written(logs, 0, b"abc")
    assert (info.dropped, info.tail, b"abc" in text) == (3, "abc", False)


def test_the_end_is_remembered_even_when_it_is_cut_from_the_file(logs: tuple[int, Path]) -> None:
    info, _ = written(logs, 10, b"x" * 100_000, b"the very end")
    assert info.tail.endswith("xthe very end")
    assert len(info.tail) == TAIL


def test_the_end_is_text_whatever_was_printed(logs: tuple[int, Path]) -> None:
    info, _ = written(logs, 10**6, b"\xff\xfe\0", "ü".encode() * TAIL)
    assert info.tail == "ü" * (TAIL // 2)
    info, _ = written(logs, 10**6, b"x", "ü".encode() * TAIL, b"y")
    assert info.tail == "\ufffd" + "ü" * (TAIL // 2 - 1) + "y"


def test_an_earlier_attempt_stays(logs: tuple[int, Path]) -> None:
    written(logs, 100, b"first\n")
    info, text = written(logs, 100, b"second\n")
    assert text == b"first\nsecond\n"
    assert (info.bytes, info.tail) == (13, "second\n")


def test_others_cannot_read_it_and_no_link_is_followed(logs: tuple[int, Path]) -> None:
    written(logs, 100, b"x")
    assert stat.S_IMODE(logs[1].stat().st_mode) & 0o137 == 0
    logs[1].rename(logs[1].parent / "elsewhere")
    logs[1].symlink_to("elsewhere")
    with pytest.raises(OSError, match="Too many levels"):
        JobLog(logs[0], 100)
    assert (logs[1].parent / "elsewhere").read_bytes() == b"x"


def test_a_log_with_a_second_name_or_another_owner_is_refused(logs: tuple[int, Path]) -> None:
    written(logs, 100, b"x")
    second = logs[1].parent / "second"
    second.hardlink_to(logs[1])
    with pytest.raises(PermissionError, match="not a plain file owned by the worker"):
        JobLog(logs[0], 100)
    assert second.read_bytes() == b"x"
    second.unlink()
    if os.geteuid() == 0:
        os.chown(logs[1], 60600, 60600)
        with pytest.raises(PermissionError):
            JobLog(logs[0], 100)
        os.chown(logs[1], 0, 0)
    assert written(logs, 100, b"y")[1] == b"xy"


def test_its_readers_are_a_group_that_cannot_write(logs: tuple[int, Path]) -> None:
    group = 60600 if os.geteuid() == 0 else os.getgid()
    JobLog(logs[0], 100, group).close()
    info = logs[1].stat()
    assert (info.st_uid, info.st_gid) == (os.geteuid(), group)
    assert stat.S_IMODE(info.st_mode) & 0o027 == 0


def test_a_full_disk_is_noticed_and_hurts_nobody(
    logs: tuple[int, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(fd: int, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    log = JobLog(logs[0], 100)
    log.write(b"before")
    assert not log.disk_full
    with monkeypatch.context() as patched:
        patched.setattr(os, "write", full)
        log.write(b"lost")
        assert log.disk_full
        info = log.close()
    # What was lost is the job's four bytes; our own mark is none of them.
    assert info == LogInfo(bytes=6, dropped=4, tail="beforelost")


def test_a_disk_that_takes_a_part_is_counted_by_that_part(
    logs: tuple[int, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.write
    log = JobLog(logs[0], 100)
    with monkeypatch.context() as patched:
        patched.setattr(os, "write", lambda fd, data: real(fd, data[:3]))
        log.write(b"abcdef")
    info = log.close()
    assert logs[1].read_bytes() == b"abc[3 bytes were dropped]\n"
    assert info.dropped == 3


@given(st.lists(st.binary(min_size=1, max_size=50), max_size=20), st.integers(0, 400))
def test_every_byte_is_kept_or_counted(pieces: list[bytes], cap: int) -> None:
    with tempfile.TemporaryDirectory() as directory, fs.directory(directory) as fd:
        info, text = written((fd, Path(directory) / LOG_NAME), cap, *pieces)
    said = b"".join(pieces)
    assert text.startswith(said[:cap])
    assert info.dropped == max(0, len(said) - cap)
    assert (b"[log cut here" in text[len(said[:cap]) :]) == (info.dropped > 0)
    assert info.bytes == len(text)
    assert info.tail == said[-TAIL:].decode("utf-8", "replace")


def test_a_chatty_job_costs_no_memory(logs: tuple[int, Path]) -> None:
    log = JobLog(logs[0], 10)
    for _ in range(20_000):
        log.write(b"x")
    assert len(log._tail) <= TAIL + 1
    for _ in range(3):
        log.write(b"y" * 100_000)
    assert sum(map(len, log._tail)) <= 2 * TAIL
    log.close()
