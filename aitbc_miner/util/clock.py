"""Two clocks: the boot-time clock to measure with, and the wall clock to show to people.

Durations, deadlines and leases use the boot-time clock, which never jumps and goes on during suspend. The
node only shows the wall clock, because an operator or a broken time server may set it to any value.
"""

import time
from datetime import UTC, datetime


def now() -> float:
    """Seconds since boot, monotonic, including time spent suspended."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def wall() -> str:
    """Return the time of day as RFC 3339 in UTC with milliseconds, for people and logs."""
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
