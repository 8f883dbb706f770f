"""A few inputs for each target, those that once broke one, and what a hostile input may cost in memory."""

import itertools
import os
import signal
import tracemalloc
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import strategies as st

from aitbc_miner.config.yaml_text import MAX_BYTES
from aitbc_miner.errors import MinerError
from tests.fuzz.engine import Check, Explorer, Target, TooMuchWork, bounded, judged_log, only, raw, simply
from tests.fuzz.found import FOUND
from tests.fuzz.mutations import mutated
from tests.fuzz.targets import TARGETS
from tools.fuzzer.main import Settings, explore, main

Capture = pytest.CaptureFixture[str]
RUNS = 40
SIZE = 20_000


@pytest.fixture(params=sorted(TARGETS))
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def check(name: str) -> Iterator[Check]:
    with TARGETS[name].opened() as opened:
        yield opened


def test_a_target_keeps_its_promises(name: str, check: Check) -> None:
    explorer = Explorer(TARGETS[name], check)
    finding = explorer.round(RUNS, 1)
    assert finding is None, finding
    assert explorer.runs >= RUNS // 2


@pytest.mark.parametrize("name", sorted(FOUND))
def test_what_once_broke_a_promise_does_so_no_more(name: str, check: Check) -> None:
    for data in FOUND[name]:
        with judged_log():
            check(data)


# --- memory ------------------------------------------------------------------------------------------------

# Bytes of memory that a byte of input may take, at the worst: a list of empty lists, a node for each comma.
JSON_TIMES, YAML_TIMES, TEXT_TIMES = 60, 600, 100
FIXED = 500_000
"""And so many whatever comes: a buffer for the file, what is made at the first use."""
JSON_BOMBS = {
    "lists": b"[" + b"[]," * (SIZE // 3) + b"[]]",
    "objects": b"[" + b"{}," * (SIZE // 3) + b"{}]",
    "keys": b"{" + b",".join(b'"%x":0' % n for n in range(SIZE // 9)) + b"}",
    "deep": b"[" * SIZE,
    "deep-objects": b'{"a":' * (SIZE // 5),
    "text": b'"' + b"\\u00e9" * (SIZE // 6) + b'"',
}
YAML_SIZE = 3000  # read in Python, so slowly
YAML_BOMBS = {
    "aliases": b"a: &a [x]\n" + b"".join(b"b%d: &b%d [*a,*a,*a]\n" % (n, n) for n in range(YAML_SIZE // 25)),
    "laughs": b"a0: &a0 x\n"
    + b"".join(b"a%d: &a%d [%s]\n" % (n, n, b",".join([b"*a%d" % (n - 1)] * 9)) for n in range(1, 50)),
    "commas": b"slots: [" + b"a," * (YAML_SIZE // 2) + b"]",
    "items": b"slots:\n" + b"-\n" * (YAML_SIZE // 6),
    "keys": b"".join(b"k%d: 1\n" % n for n in range(YAML_SIZE // 9)),
    "deep": b"[" * (YAML_SIZE // 2),
    "anchors": b"".join(b"- &a%d x\n" % n for n in range(YAML_SIZE // 10)),
}
TEXT_BOMBS = {
    "zeros": b"\0" * SIZE,
    "lines": b"\n" * SIZE,
    "words": b"-y\n" * (SIZE // 3),
    "bytes": bytes(range(256)) * 80,
}


def _cases() -> Iterator[tuple[str, str, bytes, int]]:
    for name in ("manifest", "reports", "handover", "job-page", "history"):
        for bomb, data in JSON_BOMBS.items():
            yield name, bomb, data, JSON_TIMES
            if name == "manifest":
                yield (
                    name,
                    f"{bomb} in it",
                    b'{"job_id":"a","runner":"cli","params":{"x":' + data + b"}}",
                    JSON_TIMES,
                )
    for name in ("slots", "allowlist"):
        for bomb, data in YAML_BOMBS.items():
            yield name, bomb, data, YAML_TIMES
    for name in ("arguments", "terminal", "units", "headers", "reports", "artifacts"):
        for bomb, data in TEXT_BOMBS.items():
            yield name, bomb, data, TEXT_TIMES


@pytest.mark.parametrize(
    ("name", "bomb", "data", "times"), [pytest.param(*case, id=f"{case[0]}-{case[1]}") for case in _cases()]
)
def test_memory_stays_in_proportion_to_the_input(check: Check, bomb: str, data: bytes, times: int) -> None:
    with judged_log():
        check(data[:10])  # what is made once, at the first use
        tracemalloc.start()
        try:
            check(data)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    print(f"{bomb}: {peak / len(data):.1f} bytes a byte")
    assert peak < times * len(data) + FIXED


def test_a_file_larger_than_any_is_not_read_whole() -> None:
    data = b"#" * (20 * MAX_BYTES)
    with TARGETS["slots"].opened() as check, judged_log():
        tracemalloc.start()
        check(data)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 8 * MAX_BYTES


# --- the harness bites -------------------------------------------------------------------------------------


def test_another_error_than_the_promised_comes_out() -> None:
    with pytest.raises(ValueError, match="another"), only(MinerError):
        raise ValueError("another")


@pytest.mark.parametrize("text", ["", "a\x1b[2J", "a\nb", "\udc80", "x" * 2000])
def test_an_error_that_is_told_badly_is_a_finding(text: str) -> None:
    with pytest.raises(AssertionError), only(MinerError):
        raise MinerError(text)


def crashes(data: bytes) -> None:
    if len(data) > 20:
        os.kill(os.getpid(), signal.SIGTERM)


def fails(data: bytes) -> None:
    assert b"x" not in data


def test_a_crash_is_a_finding_with_its_input() -> None:
    target = Target("crashing", st.binary(max_size=40), simply(crashes))
    tally = explore(target, Settings(0.1, None, 1))
    (finding,) = tally.findings
    assert finding.place == "crashed, status -15 crashing"
    assert len(finding.data) > 20


def test_a_finding_is_small_is_told_once_and_the_target_goes_on() -> None:
    target = Target("failing", mutated(st.just(b"abcx")), simply(fails))
    tally = explore(target, Settings(0.0, 300, 1))
    assert tally.runs >= 300
    assert [finding.data for finding in tally.findings] == [b"abcx"] or len(tally.findings[0].data) <= 4
    assert len(tally.findings) == 1


def test_an_input_is_kept_and_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setitem(TARGETS, "failing", Target("failing", st.just(b"x"), simply(fails)))
    assert main(["failing", "--runs", "3", "--keep", str(tmp_path)]) == 1
    (kept,) = tmp_path.iterdir()
    assert f"tools/fuzz failing --input {kept}" in capsys.readouterr().out
    assert main(["failing", "--input", str(kept)]) == 1
    kept.write_bytes(b"a")
    assert main(["failing", "--input", str(kept)]) == 0


def test_a_loop_that_does_not_end_is_ended() -> None:
    with pytest.raises(TooMuchWork), bounded(1000):
        deque(map(raw, itertools.repeat("x")), maxlen=0)
