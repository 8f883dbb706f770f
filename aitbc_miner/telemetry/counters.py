"""What the node has counted: kept over restarts, and never shown ahead of what is on the disk.

To Prometheus a counter that goes back has begun anew at zero: all that it had counted would count once more.
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
"""From a no-op's start to a day's rendering; both ends matter here."""
BOUNDS = (*(str(float(bound)) for bound in BUCKETS_S), "+Inf")
"""The buckets by name, as Prometheus writes them."""
LONGEST_S = 1e9
"""No step of a job lasts thirty years: a longer duration is a defect, and could spoil a sum for good."""

MOST = 2**53
"""What a float holds exactly, which is what Prometheus makes of it. More than that is not counted."""
MAX_LABELS = 200
CountKept = Annotated[int, Meta(ge=0, le=MOST)]
Bound = Annotated[str, Meta(pattern=r"^(\d+\.\d+|\+Inf)\Z")]

log = events("heartbeat")


class Durations(Struct, forbid_unknown_fields=True):
    """How long something took: how often between a bucket's bound and the one below, and seconds in all."""

    buckets: dict[Bound, CountKept] = {}
    sum_s: Annotated[float, Meta(ge=0, le=MOST)] = 0.0


class CounterTotals(Struct, forbid_unknown_fields=True):
    """All counts, by name and label; without one the label is empty."""

    version: Literal[1] = 1
    counters: dict[str, dict[str, CountKept]] = {}
    durations: dict[str, dict[str, Durations]] = {}

    def count(self, name: str, label: str, n: int) -> None:
        """Add to a counter."""
        row = self.counters.setdefault(name, {})
        label = label if label in row or len(row) < MAX_LABELS else "other"
        row[label] = min(MOST, row.get(label, 0) + n)

    def observe(self, name: str, label: str, more: Durations) -> None:
        """Add durations; those of buckets that there are no more go into the next larger one."""
        mine = self.durations.setdefault(name, {}).setdefault(label, Durations())
        for bound, n in more.buckets.items():
            bucket = BOUNDS[bisect_left(BUCKETS_S, float(bound))]
            mine.buckets[bucket] = min(MOST, mine.buckets.get(bucket, 0) + n)
        mine.sum_s = min(float(MOST), mine.sum_s + more.sum_s)

    def add(self, more: "CounterTotals") -> None:
        """Add all of them."""
        for name, counts in more.counters.items():
            for label, n in counts.items():
                self.count(name, label, n)
        for name, rows in more.durations.items():
            for label, durations in rows.items():
                self.observe(name, label, durations)


class Counters:
    """The counts of this node, in `metrics.json` of a directory. Every method may be called from any thread.

    `shown` is what is on the disk: None until what was there is known. `unsaved`: whether it lags behind.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._fd: int | None = None
        self._totals = CounterTotals()
        self._changed = True
        self._ended = False
        # A disk that hangs holds up those who save, never those who count.
        self._counting, self._saving = threading.Lock(), threading.Lock()
        self.shown: CounterTotals | None = None
        self.unsaved = False

    def count(self, name: str, label: str = "", n: int = 1) -> None:
        """Count something; with n=0, have the counter shown before there is anything to count."""
        with self._counting:
            self._totals.count(name, label, n)
            self._changed = True

    def observe(self, name: str, label: str, seconds: float) -> None:
        """Count a duration; one that cannot be is left out."""
        if 0 <= seconds < LONGEST_S:
            bucket = BOUNDS[bisect_left(BUCKETS_S, seconds)]
            with self._counting:
                self._totals.observe(name, label, Durations({bucket: 1}, seconds))
                self._changed = True

    def save(self) -> None:
        """Bring the disk and `shown` up to date. Where that cannot be, it is logged, and both stay."""
        with self._saving:
            if self._ended:
                return
            try:
                self._save()
            except OSError as error:
                if not self.unsaved:
                    text = f"cannot keep {self._directory / FILE}: {error.strerror or error}"
                    remedy = "the counters stand still until the service's user can write there"
                    log.error("metrics not saved", error=f"{text}; {remedy}")  # noqa: TRY400
                self.unsaved = True
            else:
                if self.unsaved:
                    log.info("metrics saved again")
                self.unsaved = False

    def close(self) -> None:
        """Let another process have the file: nothing is saved any more."""
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
        # One that is about to end would put its own counts in the place of ours.
        raise BlockingIOError(errno.EAGAIN, "another heartbeat process has it still") from None


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
