"""The node's counters: the disk keeps them over restarts, and Prometheus never sees a count before the disk.

If a counter falls, Prometheus assumes a restart at zero and counts the whole new value again.
"""

import errno
import fcntl
import os
import threading
from bisect import bisect_left
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta, Struct

from aitbc_miner.store.records import pretty
from aitbc_miner.util import fs
from aitbc_miner.util.log import events

FILE = "metrics.json"
MAX_FILE = 4 << 20
BUCKETS_S = (0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1, 5, 15, 60, 300, 900, 3600, 14400, 43200, 86400)
"""The buckets range from the start of an empty program to a day of rendering."""
BOUNDS = (*(str(float(bound)) for bound in BUCKETS_S), "+Inf")
"""The names of the buckets, as Prometheus writes them."""
LONGEST_S = 1e9
"""A longer duration (thirty years) comes from a defect and would spoil the sum for good."""

MOST = 2**53
"""Counters stop here: Prometheus uses floats, and a float holds integers exactly up to 2**53."""
MAX_LABELS = 200
CountKept = Annotated[int, Meta(ge=0, le=MOST)]
Bound = Annotated[str, Meta(pattern=r"^(\d+\.\d+|\+Inf)\Z")]

log = events("heartbeat")


class Durations(Struct, forbid_unknown_fields=True):
    """A histogram of durations: the count in each bucket, by its upper bound, and the sum in seconds."""

    buckets: dict[Bound, CountKept] = {}
    sum_s: Annotated[float, Meta(ge=0, le=MOST)] = 0.0


class CounterTotals(Struct, forbid_unknown_fields=True):
    """All counters and histograms, by name and label; "" is the label of a counter without labels."""

    version: Literal[1] = 1
    counters: dict[str, dict[str, CountKept]] = {}
    durations: dict[str, dict[str, Durations]] = {}

    def count(self, name: str, label: str, n: int) -> None:
        """Add `n` to a counter; labels beyond MAX_LABELS count as "other"."""
        row = self.counters.setdefault(name, {})
        label = label if label in row or len(row) < MAX_LABELS else "other"
        row[label] = min(MOST, row.get(label, 0) + n)

    def observe(self, name: str, label: str, more: Durations) -> None:
        """Add durations; durations of a bucket that no longer exists go into the next larger bucket."""
        mine = self.durations.setdefault(name, {}).setdefault(label, Durations())
        for bound, n in more.buckets.items():
            bucket = BOUNDS[bisect_left(BUCKETS_S, float(bound))]
            mine.buckets[bucket] = min(MOST, mine.buckets.get(bucket, 0) + n)
        mine.sum_s = min(float(MOST), mine.sum_s + more.sum_s)

    def add(self, more: "CounterTotals") -> None:
        """Add all counters and histograms of `more`."""
        for name, counts in more.counters.items():
            for label, n in counts.items():
                self.count(name, label, n)
        for name, rows in more.durations.items():
            for label, durations in rows.items():
                self.observe(name, label, durations)


class Counters:
    """The counters of this node, in `metrics.json` of a directory. Any thread may call any method.

    `shown` is the content of the file; None until the file is read. `unsaved`: the last save failed.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._fd: int | None = None
        self._totals = CounterTotals()
        self._changed = True
        self._ended = False
        # Two locks, so that a hanging disk blocks only threads that save, and no thread that counts.
        self._counting, self._saving = threading.Lock(), threading.Lock()
        self.shown: CounterTotals | None = None
        self.unsaved = False

    def count(self, name: str, label: str = "", n: int = 1) -> None:
        """Add `n` to a counter; n=0 makes the counter appear with the value 0."""
        with self._counting:
            self._totals.count(name, label, n)
            self._changed = True

    def observe(self, name: str, label: str, seconds: float) -> None:
        """Count a duration; ignore a negative, impossibly long or NaN duration."""
        if 0 <= seconds < LONGEST_S:
            bucket = BOUNDS[bisect_left(BUCKETS_S, seconds)]
            with self._counting:
                self._totals.observe(name, label, Durations({bucket: 1}, seconds))
                self._changed = True

    def save(self) -> None:
        """Write the counters to the disk and update `shown`; if the disk fails, log the error."""
        with self._saving:
            if self._ended:
                return
            try:
                self._save()
            except OSError as error:
                if not self.unsaved:
                    cause = f"cannot write {self._directory / FILE}: {error.strerror or error}"
                    remedy = "let the service's user write this file; until then /metrics shows old values"
                    log.error("metrics not saved", error=f"{cause}; {remedy}")  # noqa: TRY400
                self.unsaved = True
            else:
                if self.unsaved:
                    log.info("metrics saved again")
                self.unsaved = False

    def close(self) -> None:
        """Close the file and save nothing any more, so that another process may use the file."""
        with self._saving:
            if self._fd is not None and not self._ended:
                os.close(self._fd)
            self._ended = True

    def _save(self) -> None:
        fd = self._fd = self._open() if self._fd is None else self._fd
        with self._counting:
            if not self._changed:
                return
            data, self._changed = pretty(self._totals), False
        try:
            fs.write_durably(fd, FILE, data)
        except OSError:
            self._changed = True
            raise
        self.shown = msgspec.json.decode(data, type=CounterTotals)

    def _open(self) -> int:
        fd = os.open(self._directory, fs.DIRECTORY)
        try:
            _lock(fd)
            kept = _read(fd, self._directory)
        except OSError:
            os.close(fd)
            raise
        self.shown, total = CounterTotals(), CounterTotals()
        for totals in (self.shown, total):
            totals.add(kept)
        with self._counting:
            total.add(self._totals)
            self._totals = total
        return fd


def _lock(fd: int) -> None:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        # A previous heartbeat process that still ends would overwrite our counts with its own.
        raise BlockingIOError(errno.EAGAIN, "the previous heartbeat process still uses it") from None


def _read(fd: int, directory: Path) -> CounterTotals:
    try:
        return msgspec.json.decode(fs.read_bounded(fd, FILE, MAX_FILE), type=CounterTotals)
    except FileNotFoundError:
        return CounterTotals()
    except (OSError, msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        if fs.may_pass(error):
            raise
        os.rename(FILE, f"{FILE}.broken", src_dir_fd=fd, dst_dir_fd=fd)
        aside = directory / f"{FILE}.broken"
        log.error("metrics set aside", file=str(aside), error=str(error))  # noqa: TRY400
        return CounterTotals()
