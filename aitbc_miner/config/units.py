"""Reads and writes sizes, durations, CPU lists and percentages, for configuration and command lines.

The annotated types are plain numbers and tuples at run time; only `config/document.py` reads the written
form. Every parser takes a YAML value (text or a number) and raises ValueError("must be ...") for a wrong
value.
"""

import math
import re
from collections.abc import Iterable
from fractions import Fraction
from typing import Annotated

from aitbc_miner.config.document import Parse

_SIZE = re.compile(r"(\d{1,19}(?:\.\d{1,6})?)\s*(?:([KMGTP])(?:i?B)?|B)?", re.IGNORECASE | re.ASCII)
_FACTORS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40, "P": 1 << 50}
AUTO: tuple[int, ...] = ()
"""Means that the node chooses the CPUs."""
_MAX_SIZE = (1 << 63) - 1
_DURATION = re.compile(r"(\d{1,12}(?:\.\d{1,9})?)\s*(s|m|h|d|w)?", re.ASCII)
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}
_MAX_DURATION = 36_525 * 86_400
_A_DURATION = "must be a duration: a number with its unit (s, m, h, d or w), such as 24h"
_PERCENT = re.compile(r"(\d{1,7})\s*%", re.ASCII)
_CPU_RANGE = re.compile(r"\s*(\d{1,4})\s*(?:-\s*(\d{1,4})\s*)?", re.ASCII)


def parse_size(value: object) -> int:
    """Give the bytes of "16G", "512M", "1.5T" (powers of 1024) or a plain number of bytes."""
    size = value if type(value) is int else None
    if isinstance(value, str) and (match := _SIZE.fullmatch(value.strip())):
        size = int(Fraction(match[1]) * _FACTORS[(match[2] or "").upper()])
    if size is None or not 0 <= size <= _MAX_SIZE:
        raise ValueError("must be a size: bytes, or a number with K, M, G, T or P, such as 512M")
    return size


def format_size(size: int) -> str:
    """Write bytes with the largest exact unit, so that `parse_size` gives the same number."""
    unit = next((unit for unit in "PTGMK" if size and size % _FACTORS[unit] == 0), "")
    return f"{size // _FACTORS[unit]}{unit}"


def parse_duration(value: object) -> float:
    """Give the seconds of "24h", "7d" or "90s"; 0 needs no unit."""
    text = str(value).strip() if type(value) in {int, float, str} else ""
    match = _DURATION.fullmatch(text)
    seconds = float(Fraction(match[1]) * _SECONDS[match[2] or "s"]) if match else math.nan
    if match and seconds and not match[2]:
        # A large number was probably meant as seconds.
        guess = f"{text}s" if seconds >= 3600 else f"{text}h or {text}s"
        raise ValueError(f"{_A_DURATION}; did you mean {guess}?")
    if not 0 <= seconds <= _MAX_DURATION:
        raise ValueError(_A_DURATION)
    return seconds


def format_duration(seconds: float) -> str:
    """Write seconds with the largest exact unit; fractions to the nanosecond."""
    if seconds != int(seconds):
        return f"{seconds:.9f}".rstrip("0") + "s"
    unit = next((unit for unit in "dhm" if seconds and seconds % _SECONDS[unit] == 0), "s")
    return f"{int(seconds) // _SECONDS[unit]}{unit}"


def parse_percent(value: object) -> int:
    """Give 400 for "400%"; a number without the sign is refused, because the operator may mean CPUs."""
    match = _PERCENT.fullmatch(value.strip()) if isinstance(value, str) else None
    if not match or int(match[1]) == 0:
        raise ValueError("must be a percentage of one CPU from 1%, such as 400% for four CPUs")
    return int(match[1])


def parse_cpus(value: object) -> tuple[int, ...]:
    """Give the CPUs of "0-3,5" or of a single number, sorted, each once."""
    cpus: set[int] = set()
    for part in str(value).split(",") if type(value) in {int, str} else [""]:
        match = _CPU_RANGE.fullmatch(part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if first > last:
            raise ValueError('must be a list of CPU numbers up to 9999 and ranges of them, such as "0-3,5"')
        cpus.update(range(first, last + 1))
    return tuple(sorted(cpus))


def parse_cpu_choice(value: object) -> tuple[int, ...]:
    """Give the CPUs of a list, or AUTO for "auto"."""
    try:
        return AUTO if value == "auto" else parse_cpus(value)
    except ValueError as error:
        raise ValueError(f"{error}; or auto, so that the node chooses") from None


def format_cpus(cpus: Iterable[int]) -> str:
    """Write CPU numbers like the kernel: "0-3,5"."""
    ranges: list[list[int]] = []
    for cpu in sorted(set(cpus)):
        if ranges and ranges[-1][1] == cpu - 1:
            ranges[-1][1] = cpu
        else:
            ranges.append([cpu, cpu])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in ranges)


def parse_memory(value: object) -> int:
    """Give the bytes of a size, at least 1M."""
    size = parse_size(value)
    if size < 1 << 20:
        guess = f"did you mean {value}G or {value}M?" if str(value).isdecimal() else "such as 16G"
        raise ValueError(f"must be at least 1M; add a unit: {guess}")
    return size


Size = Annotated[int, Parse(parse_size)]
"""Bytes."""

MemorySize = Annotated[int, Parse(parse_memory)]
"""Bytes, at least 1M."""

Duration = Annotated[float, Parse(parse_duration)]
"""Seconds."""

Percent = Annotated[int, Parse(parse_percent)]
"""Hundredths of one CPU."""

CpuList = Annotated[tuple[int, ...], Parse(parse_cpu_choice)]
"""CPU numbers, sorted, or AUTO."""
