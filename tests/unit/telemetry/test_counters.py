import errno
import json
import logging
import os
import threading
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from aitbc_miner.telemetry import counters as module
from aitbc_miner.telemetry.counters import BOUNDS, BUCKETS_S, FILE, CounterTotals, Durations
from aitbc_miner.telemetry.metrics import Metrics, Snapshot
from aitbc_miner.util import fs

Series = dict[tuple[str, ...], float]


def start(directory: Path) -> Metrics:
    return Metrics(Snapshot("node-1", "https://coordinator.example", 15), directory)


def scrape(metrics: Metrics) -> Series:
    """Give what must never go back: counters, and buckets, count and sum of histograms."""
    return {
        (sample.name, *(value for _, value in sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(metrics.render().decode())
        if family.type != "gauge"
        for sample in family.samples
    }


def unsaved(metrics: Metrics) -> bool:
    return b"aitbc_miner_metrics_unsaved 1.0" in metrics.render()


def on_disk(directory: Path) -> CounterTotals:
    return msgspec.json.decode((directory / FILE).read_bytes(), type=CounterTotals)


def assert_not_behind(later: Series, before: Series) -> None:
    assert {key: (before[key], later.get(key)) for key in before if later.get(key, -1.0) < before[key]} == {}


def break_disk(patch: pytest.MonkeyPatch, number: int = errno.ENOSPC) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    patch.setattr(fs, "write_durably", fail)


# --- what is kept ------------------------------------------------------------------------------------------


def test_the_next_run_goes_on_where_this_one_was(tmp_path: Path) -> None:
    first = start(tmp_path)
    first.count_job(None, {"run": 0.002, "upload": 7200.0})
    first.counters.count("deliveries", "accepted", 3)
    before = scrape(first)
    first.counters.close()
    second = start(tmp_path)
    assert scrape(second) == before
    second.count_job(None, {"run": 0.002})
    later = scrape(second)
    assert later["aitbc_miner_jobs_total", "OK"] == 2
    assert later["aitbc_miner_deliveries_total", "accepted"] == 3
    assert later["aitbc_miner_step_duration_seconds_bucket", "0.005", "run"] == 2
    assert later["aitbc_miner_step_duration_seconds_sum", "run"] == pytest.approx(0.004)
    assert_not_behind(later, before)


def test_what_is_shown_is_on_the_disk_already(tmp_path: Path) -> None:
    metrics = start(tmp_path)
    for number in range(1, 4):
        with metrics.counted("heartbeats"):
            pass
        assert scrape(metrics)["aitbc_miner_heartbeats_total", "sent"] == number
        assert on_disk(tmp_path).counters["heartbeats"]["sent"] == number


def test_a_scrape_without_news_writes_nothing(tmp_path: Path) -> None:
    metrics = start(tmp_path)
    first = metrics.render()
    before = (tmp_path / FILE).stat()
    assert metrics.render() == first
    after = (tmp_path / FILE).stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_a_person_can_read_the_file(tmp_path: Path) -> None:
    metrics = start(tmp_path)
    metrics.count_job(None, {"run": 0.25})
    metrics.render()
    text = (tmp_path / FILE).read_text()
    kept = json.loads(text)
    assert kept["version"] == 1
    assert kept["counters"]["jobs"] == {"OK": 1}
    assert kept["durations"]["step_duration_seconds"] == {"run": {"buckets": {"0.5": 1}, "sum_s": 0.25}}
    assert len(text.splitlines()) > 10


def test_there_is_nothing_that_tells_when_a_series_began(tmp_path: Path) -> None:
    metrics = start(tmp_path)
    metrics.count_job(None, {"run": 1.0})
    assert b"_created" not in metrics.render()


@pytest.mark.parametrize("seconds", [float("nan"), -1.0, float("inf"), 1e300])
def test_a_duration_that_cannot_be_is_left_out(tmp_path: Path, seconds: float) -> None:
    metrics = start(tmp_path)
    metrics.count_job(None, {"run": seconds})
    assert "aitbc_miner_step_duration_seconds_count" not in {key[0] for key in scrape(metrics)}
    assert on_disk(tmp_path).durations == {}


def test_counts_that_this_version_does_not_know_are_kept(tmp_path: Path) -> None:
    """A node may go back to an older version, and forth again."""
    kept = CounterTotals(counters={"of_tomorrow": {"a": 7}})
    (tmp_path / FILE).write_bytes(msgspec.json.encode(kept))
    metrics = start(tmp_path)
    with metrics.counted("heartbeats"):
        pass
    assert b"of_tomorrow" not in metrics.render()
    assert on_disk(tmp_path).counters["of_tomorrow"] == {"a": 7}


bounds = st.lists(st.sampled_from([0.002, 0.3, 7.5, 100_000.5, *map(float, BUCKETS_S)]), unique=True)


@given(bounds, st.lists(st.integers(0, 1000), min_size=21, max_size=21))
def test_other_buckets_after_an_upgrade_put_none_back(old: list[float], counts: list[int]) -> None:
    names = [*map(str, old), "+Inf"]
    before = Durations(dict(zip(names, counts, strict=False)), 1.0)
    totals = CounterTotals()
    totals.observe("steps", "run", before)
    now = totals.durations["steps"]["run"]

    def upto(durations: Durations, limit: float) -> int:
        return sum(n for bound, n in durations.buckets.items() if float(bound) <= limit)

    for bound in (*(bound for bound in map(float, BUCKETS_S) if bound in old), float("inf")):
        assert upto(now, bound) == upto(before, bound)
    assert set(now.buckets) <= set(BOUNDS)


# --- a disk that does not take it --------------------------------------------------------------------------


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EIO])
def test_what_cannot_be_saved_is_not_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log: list[logging.LogRecord], number: int
) -> None:
    metrics = start(tmp_path)
    metrics.count_job(None, {"run": 1.0})
    before = scrape(metrics)
    assert not unsaved(metrics)
    with monkeypatch.context() as patch:
        break_disk(patch, number)
        metrics.count_job(None, {"run": 2.0})
        for _ in range(3):
            assert scrape(metrics) == before
        assert unsaved(metrics)
    # A node killed now has shown nothing that its next run does not know.
    assert on_disk(tmp_path).counters["jobs"] == {"OK": 1}
    later = scrape(metrics)
    assert not unsaved(metrics)
    assert later["aitbc_miner_jobs_total", "OK"] == 2
    assert later["aitbc_miner_step_duration_seconds_sum", "run"] == 3
    assert [record.msg for record in log] == ["metrics not saved", "metrics saved again"]
    told = log[0].__dict__["attrs"]["error"]
    assert str(tmp_path / FILE) in told
    assert os.strerror(number) in told


def test_a_disk_that_is_full_at_the_start_hides_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = start(tmp_path)
    first.count_job(None, {"run": 1.0})
    before = scrape(first)
    first.counters.close()
    with monkeypatch.context() as patch:
        break_disk(patch)
        second = start(tmp_path)
        second.count_job(None, {"run": 1.0})
        assert scrape(second) == before
        assert unsaved(second)
    assert scrape(second)["aitbc_miner_jobs_total", "OK"] == 2


def test_until_it_is_known_what_was_counted_nothing_is_shown(tmp_path: Path) -> None:
    """A zero would make Prometheus count everything once more, when the rest comes."""
    place = tmp_path / "state"
    early = start(place)
    early.count_job(None, {})
    assert scrape(early) == {}
    assert unsaved(early)
    place.mkdir()
    (place / FILE).write_bytes(msgspec.json.encode(CounterTotals(counters={"jobs": {"OK": 41}})))
    assert scrape(early)["aitbc_miner_jobs_total", "OK"] == 42


def test_two_heartbeats_do_not_overwrite_each_other(tmp_path: Path) -> None:
    """One whose node was killed may live on a little, and still write at its end."""
    old, new = start(tmp_path), start(tmp_path)
    old.count_job(None, {})
    old.render()
    new.count_job(None, {})
    assert scrape(new) == {}
    old.count_job(None, {})
    old.counters.save()
    old.counters.close()
    assert scrape(new)["aitbc_miner_jobs_total", "OK"] == 3
    old.count_job(None, {})
    shown = scrape(old)
    assert shown["aitbc_miner_jobs_total", "OK"] == 2
    assert on_disk(tmp_path).counters["jobs"] == {"OK": 3}


def test_a_disk_that_hangs_holds_up_no_counting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    metrics = start(tmp_path)
    hanging, go_on = threading.Event(), threading.Event()
    write = fs.write_durably

    def hang(dir_fd: int, name: str, data: bytes) -> None:
        hanging.set()
        assert go_on.wait(20)
        write(dir_fd, name, data)

    monkeypatch.setattr(fs, "write_durably", hang)
    thread = threading.Thread(target=metrics.counters.save)
    thread.start()
    try:
        assert hanging.wait(20)
        metrics.count_job(None, {})
        assert thread.is_alive()
    finally:
        go_on.set()
        thread.join(20)
    assert "jobs" not in on_disk(tmp_path).counters
    assert scrape(metrics)["aitbc_miner_jobs_total", "OK"] == 1


# --- files that are not ours -------------------------------------------------------------------------------

GOOD = msgspec.json.encode(
    CounterTotals(counters={"jobs": {"OK": 5}}, durations={"s": {"run": Durations({"1.0": 1})}})
)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        GOOD[:-4],
        b"\0" * len(GOOD),
        b"\xff\xfe",
        b"[" * 100_000,
        b"{}{}",
        b'{"version": 2, "counters": {}}',
        b'{"version": 1, "counter": {}}',
        GOOD.replace(b"5", b"-5"),
        GOOD.replace(b"5", b"1e400"),
        GOOD.replace(b"5", b"5" * 40),
        GOOD.replace(b'"1.0"', b'"nan"'),
        GOOD.replace(b'"1.0"', b'"one"'),
    ],
    ids=[
        *("empty", "torn", "zeros", "bytes", "deep", "two", "of tomorrow", "unknown key"),
        *("negative", "infinite", "huge", "bucket nan", "no bucket"),
    ],
)
def test_a_file_that_cannot_be_used_is_set_aside(
    tmp_path: Path, log: list[logging.LogRecord], content: bytes
) -> None:
    assert content != GOOD
    (tmp_path / FILE).write_bytes(content)
    metrics = start(tmp_path)
    metrics.count_job(None, {})
    assert scrape(metrics)["aitbc_miner_jobs_total", "OK"] == 1
    assert (tmp_path / f"{FILE}.broken").read_bytes() == content
    assert on_disk(tmp_path).counters["jobs"] == {"OK": 1}
    assert [record.msg for record in log] == ["metrics set aside"]
    assert log[0].__dict__["attrs"]["file"] == str(tmp_path / f"{FILE}.broken")


@pytest.mark.parametrize("kind", ["link", "directory", "fifo", "large"])
def test_what_is_no_file_of_ours_is_set_aside(tmp_path: Path, kind: str) -> None:
    path, elsewhere = tmp_path / FILE, tmp_path / "elsewhere"
    elsewhere.write_bytes(GOOD)
    make: dict[str, Any] = {
        "link": lambda: path.symlink_to(elsewhere),
        "directory": path.mkdir,
        "fifo": lambda: os.mkfifo(path),
        "large": lambda: path.write_bytes(b" " * (module.MAX_FILE + 1)),
    }
    make[kind]()
    metrics = start(tmp_path)
    metrics.count_job(None, {})
    assert scrape(metrics)["aitbc_miner_jobs_total", "OK"] == 1
    assert elsewhere.read_bytes() == GOOD
    assert os.path.lexists(tmp_path / f"{FILE}.broken")


# --- any history -------------------------------------------------------------------------------------------

EVENTS = st.sampled_from(["job", "count", "scrape", "tick", "kill", "full", "space", "torn write"])


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.lists(EVENTS, max_size=40))
def test_whatever_happens_nothing_goes_back(
    tmp_path_factory: pytest.TempPathFactory, history: list[str]
) -> None:
    place = tmp_path_factory.mktemp("history")
    metrics, shown, done = start(place), Series(), 0
    with pytest.MonkeyPatch.context() as patch:
        for event in history:
            if event == "job":
                done += 1
                metrics.count_job(None, {"run": 10.0 ** (done % 7 - 3)})
            elif event == "count":
                metrics.counters.count("retries", "E_DISK")
            elif event == "tick":
                metrics.counters.save()
            elif event == "full":
                break_disk(patch)
            elif event == "space":
                patch.undo()
            elif event == "torn write":
                (place / f".{FILE}.new").write_bytes(b'{"version"')
            elif event == "kill":
                # Without a save; closing only lets go of the lock, as the end of a process does.
                metrics.counters.close()
                metrics = start(place)
            if event in {"scrape", "kill"}:
                seen = scrape(metrics)
                if seen:
                    assert_not_behind(seen, shown)
                    shown = seen
        patch.undo()
        final = scrape(metrics)
    assert_not_behind(final, shown)
    assert final.get(("aitbc_miner_jobs_total", "OK"), 0) <= done


def test_labels_that_somebody_makes_up_are_counted_together() -> None:
    totals = CounterTotals()
    for n in range(module.MAX_LABELS + 50):
        totals.count("retries", f"label{n}", 1)
    totals.count("retries", "label7", 1)
    assert len(totals.counters["retries"]) == module.MAX_LABELS + 1
    assert totals.counters["retries"]["other"] == 50
    assert totals.counters["retries"]["label7"] == 2
