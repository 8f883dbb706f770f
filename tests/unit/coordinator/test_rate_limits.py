"""The limits of calls: never above the coordinator's, also over a restart and with several processes."""

import multiprocessing
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aitbc_miner.coordinator.interface import Paced
from aitbc_miner.coordinator.rate_limits import PAUSES_S, WINDOW_S, Limits
from aitbc_miner.util import clock
from tests.support.stopped_clock import Time

MOST = {"result": 50, "fail": 50}


def taken(limits: Limits, name: str = "result") -> bool:
    try:
        limits.take(name)
    except Paced:
        return False
    return True


def test_a_burst_may_be_as_large_as_the_limit_and_no_larger(tmp_path: Path, time: Time) -> None:
    limits = Limits(tmp_path / "calls", MOST)
    assert sum(taken(limits) for _ in range(200)) == 49
    with pytest.raises(Paced) as wait:
        limits.take("result")
    assert wait.value.wait_s == pytest.approx(WINDOW_S)
    assert taken(limits, "fail"), "each kind of call has a limit of its own"
    time.now += WINDOW_S + 0.001
    assert taken(limits)


def test_in_no_minute_are_there_more_than_the_coordinator_takes(tmp_path: Path, time: Time) -> None:
    limits = Limits(tmp_path / "calls", MOST)
    calls = []
    for _ in range(20_000):
        time.now += 0.05
        if taken(limits):
            calls.append(time.now)
    for at in calls:
        assert sum(at - 60.0 < other <= at for other in calls) <= 50
    assert len(calls) / (20_000 * 0.05) > 0.95 * 50 / 60


@settings(max_examples=60, deadline=None)
@given(steps=st.lists(st.tuples(st.floats(0, 30), st.integers(1, 60)), max_size=30))
def test_whatever_the_load_no_minute_has_more(
    steps: list[tuple[float, int]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        time = Time(patch)
        path = tmp_path_factory.mktemp("limits") / "calls"
        limits, calls = Limits(path, MOST), []
        for pause, wanted in steps:
            time.now += pause
            calls += [time.now for _ in range(wanted) if taken(limits)]
            limits = Limits(path, MOST)  # as after a restart
        for at in calls:
            assert sum(at - 60.0 < other <= at for other in calls) <= 50


def test_a_share_of_the_address(tmp_path: Path, time: Time) -> None:
    limits = Limits(tmp_path / "calls", MOST, share=0.25)
    assert sum(taken(limits) for _ in range(200)) == 12


def test_the_smallest_share_still_has_a_call(tmp_path: Path, time: Time) -> None:
    assert taken(Limits(tmp_path / "calls", {"leave": 2}, share=0.01), "leave")


def test_a_refusal_stops_that_kind_alone_and_is_tried_one_by_one(tmp_path: Path, time: Time) -> None:
    limits = Limits(tmp_path / "calls", MOST)
    for pause in (*PAUSES_S, PAUSES_S[-1]):
        limits.take("result")
        assert limits.refused("result") == pause
        assert limits.resting() == ["result"]
        assert not taken(limits)
        assert taken(limits, "fail")
        time.now += pause - 0.01
        assert not taken(limits)
        time.now += 0.02
    limits.take("result")
    assert not taken(limits), "one at a time as long as it is not known whether they are taken"
    limits.answered("result")
    assert limits.resting() == []
    # None of those that were refused was counted.
    assert sum(taken(limits) for _ in range(200)) == 48


def test_another_boot_begins_anew(tmp_path: Path, time: Time) -> None:
    limits = Limits(tmp_path / "calls", MOST)
    while taken(limits):
        pass
    text = (tmp_path / "calls").read_text()
    (tmp_path / "calls").write_text(text.replace('"boot":"', '"boot":"x'))
    assert taken(Limits(tmp_path / "calls", MOST))


@pytest.mark.parametrize("content", [b"", b"{", b"\xff" * 100, b'{"windows": 3}', b"null", b"[" * 5000])
def test_a_broken_file_is_as_none(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "calls").write_bytes(content)
    limits = Limits(tmp_path / "calls", MOST)
    assert sum(taken(limits) for _ in range(200)) == 49


def test_without_a_file_the_process_keeps_count_itself(tmp_path: Path) -> None:
    limits = Limits(tmp_path / "no such directory" / "calls", MOST)
    assert sum(taken(limits) for _ in range(200)) == 49
    limits.refused("result")
    assert limits.resting() == ["result"]


def test_processes_share_the_limit(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    with context.Pool(3) as pool:
        counts = pool.map(_take_all, [tmp_path / "calls"] * 3)
    assert sum(counts) == 49


def _take_all(path: Path) -> int:
    limits = Limits(path, MOST)
    return sum(taken(limits) for _ in range(100))


def test_the_file_is_not_for_others(tmp_path: Path) -> None:
    Limits(tmp_path / "calls", MOST).take("result")
    assert (tmp_path / "calls").stat().st_mode & 0o077 == 0
    assert clock.now() > 0
