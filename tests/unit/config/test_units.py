"""Written forms of sizes, durations, CPU lists and percentages."""

from collections.abc import Callable

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aitbc_miner.config import units


@pytest.mark.parametrize(
    ("text", "size"),
    [
        (0, 0),
        (4096, 4096),
        ("0", 0),
        ("512", 512),
        ("512B", 512),
        ("1K", 1024),
        ("512M", 512 << 20),
        ("16G", 16 << 30),
        ("16g", 16 << 30),
        ("16 GiB", 16 << 30),
        ("16GB", 16 << 30),
        ("1.5T", 3 << 39),
        (2**63 - 1, 2**63 - 1),
    ],
)
def test_sizes(text: object, size: int) -> None:
    assert units.parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "G", "-1", -1, "16X", "1e3", "0x10", "\u0661G", True, 1.5, None, [1], 2**63, "9P9"]
)
def test_sizes_refused(text: object) -> None:
    with pytest.raises(ValueError, match=r"must be a size: .* such as 512M"):
        units.parse_size(text)


@given(st.integers(0, 2**63 - 1) | st.integers(0, 2**13).map(lambda n: n << 30))
def test_sizes_read_back(size: int) -> None:
    assert units.parse_size(units.format_size(size)) == size


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0"), (1000, "1000"), (1536, "1536"), (16 << 30, "16G"), (1 << 50, "1P")]
)
def test_sizes_written(size: int, text: str) -> None:
    assert units.format_size(size) == text


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        (0, 0),
        ("0", 0),
        ("0.25s", 0.25),
        ("90s", 90),
        ("5m", 300),
        ("24h", 86_400),
        ("7d", 604_800),
        ("1.5 h", 5400),
        ("2w", 1_209_600),
    ],
)
def test_durations(text: object, seconds: float) -> None:
    assert units.parse_duration(text) == seconds


@pytest.mark.parametrize(
    "text",
    ["", "h", "-1", -1, "1y", "1h30m", True, None, float("nan"), float("inf"), "99999999999d", [], 10**400],
)
def test_durations_refused(text: object) -> None:
    with pytest.raises(ValueError, match=r"must be a duration: .* such as 24h$"):
        units.parse_duration(text)


@pytest.mark.parametrize(
    ("number", "meant"), [(24, "24h or 24s"), ("24", "24h or 24s"), (0.5, "0.5h or 0.5s"), (86_400, "86400s")]
)
def test_a_duration_without_its_unit_is_refused_with_what_was_meant(number: object, meant: str) -> None:
    with pytest.raises(ValueError, match=rf"must be a duration: .*; did you mean {meant}\?$"):
        units.parse_duration(number)


@given(st.integers(0, 3_000_000_000) | st.integers(0, 10**9).map(lambda n: n / 1000))
def test_durations_read_back(seconds: float) -> None:
    assert units.parse_duration(units.format_duration(seconds)) == seconds


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0s"), (90, "90s"), (5400, "90m"), (86_400, "1d"), (0.25, "0.25s")]
)
def test_durations_written(seconds: float, text: str) -> None:
    assert units.format_duration(seconds) == text


@pytest.mark.parametrize(("text", "percent"), [("400%", 400), ("1%", 1), (" 50 % ", 50)])
def test_percentages(text: str, percent: int) -> None:
    assert units.parse_percent(text) == percent


@pytest.mark.parametrize("text", [400, "400", "0%", "-5%", "12.5%", "%", None, True])
def test_percentages_refused(text: object) -> None:
    with pytest.raises(ValueError, match=r"must be a percentage .* such as 400%"):
        units.parse_percent(text)


@pytest.mark.parametrize(
    ("text", "cpus"),
    [(3, (3,)), ("0", (0,)), ("0-3,5", (0, 1, 2, 3, 5)), ("5, 0 - 1", (0, 1, 5)), ("1,1,0-1", (0, 1))],
)
def test_cpu_lists(text: object, cpus: tuple[int, ...]) -> None:
    assert units.parse_cpus(text) == cpus


@pytest.mark.parametrize(
    "text", ["", ",", "0-", "-1", "3-1", "a", "0;1", -1, True, None, [0], "10000", "0-3,"]
)
def test_cpu_lists_refused(text: object) -> None:
    with pytest.raises(ValueError, match=r'must be a list of CPU numbers .* such as "0-3,5"'):
        units.parse_cpus(text)


def test_a_choice_of_cpus_may_be_left_to_the_node() -> None:
    assert units.parse_cpu_choice("auto") == units.AUTO
    assert units.parse_cpu_choice("1-2") == (1, 2)
    assert units.format_cpus(units.AUTO) == ""
    with pytest.raises(ValueError, match=r'such as "0-3,5"; or auto, so that the node chooses'):
        units.parse_cpu_choice("automatic")


@given(st.sets(st.integers(0, 9999), min_size=1))
def test_cpu_lists_read_back(cpus: set[int]) -> None:
    assert units.parse_cpus(units.format_cpus(cpus)) == tuple(sorted(cpus))


def test_no_cpus_are_written_as_nothing() -> None:
    assert units.format_cpus([]) == ""


class _Message(msgspec.Struct):
    size: units.Size
    cpus: units.CpuList | None
    share: units.Percent
    wait: units.Duration


def test_the_types_travel_in_messages_as_plain_values() -> None:
    message = _Message(16 << 30, (0, 1, 5), 400, 90.0)
    assert msgspec.json.decode(msgspec.json.encode(message), type=_Message) == message


@given(st.text() | st.integers() | st.floats() | st.none() | st.booleans())
@pytest.mark.parametrize(
    "parse",
    [units.parse_size, units.parse_duration, units.parse_percent, units.parse_cpus, units.parse_cpu_choice],
)
def test_nothing_but_value_error_ever(parse: Callable[[object], object], value: object) -> None:
    try:
        parse(value)
    except ValueError as error:
        refusal = str(error)
    else:
        refusal = "must be nothing else"
    assert refusal.startswith("must be ")
