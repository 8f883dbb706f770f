"""Two clocks: one to measure with and one to show.

Durations, deadlines and leases use the boot-time clock: it never jumps and goes on during suspend. The wall
clock is only ever shown, because an operator or a broken time server may set it to anything.
"""

import time
from datetime import UTC, datetime


def now() -> float:
    """Seconds since boot, monotonic, including time spent suspended."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def wall() -> str:
    """Return the time of day as RFC 3339 in UTC with milliseconds, for people and logs."""
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
