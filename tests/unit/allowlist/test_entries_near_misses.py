"""Argument lists that are nearly those of the samples: none gets through that the grammar does not allow.

Each begins as a good one and is spoiled in a place or two. What is right is said by the slow reference.
"""

import itertools
import re
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from aitbc_miner.allowlist.entries import Entry, load_allowlist
from tests.support.allowlist_reference import Grammar, allowed
from tests.unit.allowlist.test_entries import SAMPLES

Args = list[str]
Draw = Callable[..., Any]

ENOUGH = 300

# Together they use each option of their sample.
GOOD = {
    "blender": [
        "scene.blend -E CYCLES --threads 8 --render-format PNG --render-output frames/a-## -s 1 -e 250 -a",
        "scene.blend --render-output ../output/still -f 7 --render-frame 9",
    ],
    "ffmpeg": [
        "-y -ss 1.5 -t 60 -i a.mp4 -t 5 -c:v libx264 -crf 23 -preset fast -r 25 -vf scale=-2:720 "
        "-c:a aac -b:a 128k -ac 2 -ar 48000 ../output/o.mp4",
        "-i b.wav -vn -c:a flac o.flac",
        "-i a.mp4 -c:v libvpx-vp9 -b:v 900k -an clips/o.webm",
    ],
    "gzip": ["-9 -k -n c.txt", "--keep --no-name c.txt", "c.txt -1"],
    "imagemagick": [
        "d.png -auto-orient -strip -resize 640x480! -crop 10x10+0+5 -rotate -90 -quality 85 o.jpg",
        "d.png -colorspace Gray -flip -flop -blur 0x8 ../output/o.webp",
    ],
    "sha256sum": ["--tag -b a.mp4 c.txt d.png", "c.txt --text d.png"],
    "whisper": [
        "--model small b.wav --language de --task translate --output_format srt --word_timestamps True "
        "--temperature 0.2 --beam_size 5 --threads 4",
        "b.wav a.mp4 --model tiny --initial_prompt names,-and-so-on",
    ],
}
# Bad names among them: the grammar refuses those by itself, whatever else has let them through.
INPUTS = [
    *("a.mp4", "b.wav", "c.txt", "d.png", "scene.blend"),
    *("-c.txt", "-y", "../c.txt", "/c.txt", "http://h/a.mp4", "concat:a.mp4", "@d.png", ".c.txt", "a\n.mp4"),
]
PREFIXES = [
    *("http://h/", "file:", "concat:", "pipe:", "data:", "png:", "@", "|", "~/", "%", "#"),
    *("-", "--", "+", ".", "./", "..", "../", "../../", "/", "/etc/", "../output/", "../output/../", "work/"),
]
CHARACTERS = st.sampled_from("\0\n\r\t\x1b\x7f -=+./:@|%#!,'\\\"*_09azAZé٣\u2028\u202e\u00a0\ud800")
WORDS = ["", "-", "--", "-h", "--help", "-version", "..", "/etc/passwd", "../c.txt", "-i", "-o", "-f", "a b"]
NUMBERS = [
    *("-1", "-0", "+1", "00", "01", "1.", ".5", "1e3", "0x10", "1_0", "nan", "inf", "-inf", " 1", "1 ", "٣"),
    *(
        "9" * 3,
        "9" * 20,
        "1000000000",
        "1048575",
        "86400.1",
        "-360.5",
        "1.0000000000000000001",
        "0",
        "1",
        "50",
    ),
]


def test_each_option_of_each_sample_is_used() -> None:
    assert set(GOOD) == {path.stem for path in SAMPLES.glob("*.yaml")}
    for sample, lines in GOOD.items():
        written = grammar(sample)
        for line in lines:
            assert fits(written, line.split()), line
            assert entry(sample).objection(line.split(), INPUTS) is None
        words = {word for line in lines for word in line.split()}
        unused = [names for names, _ in options(written) if not words & set(names)]
        assert not unused


def grammar(sample: str) -> Grammar:
    written: Grammar = yaml.safe_load((SAMPLES / f"{sample}.yaml").read_text())
    return written


def entry(sample: str) -> Entry:
    allowlist = load_allowlist([SAMPLES], [], [])
    return next(one for name, one in allowlist.entries.items() if allowlist.files[name].stem == sample)


def options(written: Grammar) -> list[tuple[Args, bool]]:
    """Give the spellings of each option, and whether it has a value."""
    rules = [rule for part in written.get("sections", [written]) for rule in part.get("options", [])]
    return [
        ([rule["name"]] if isinstance(rule["name"], str) else rule["name"], "value" in rule) for rule in rules
    ]


def fits(written: Grammar, args: Args) -> bool:
    """Whether an entry allows an argument list, by the slow reference."""
    length = len(" ".join(args).encode("utf-8", "surrogatepass"))
    if length > written.get("max_total_args_len", 4096):
        return False
    return _in_groups(written["args"], args) if "args" in written else allowed(written, args, INPUTS)


def _in_groups(groups: Sequence[Args], args: Args) -> bool:
    orders = (order for count in range(len(groups) + 1) for order in itertools.permutations(groups, count))
    runs = (list(itertools.chain.from_iterable(order)) for order in orders)
    return any(len(run) == len(args) and all(map(re.fullmatch, run, args)) for run in runs)


# --- ways to spoil a list, and another one where there is no place for it -----------------------------------


def place(draw: Draw, args: Args, *, end: bool = False) -> int:
    return draw(st.integers(0, len(args) - (not end)))  # type: ignore[no-any-return]


def change_a_character(draw: Draw, args: Args, _: str) -> Args:
    at = place(draw, args)
    start = draw(st.integers(0, len(args[at])))
    kept = draw(st.integers(0, 2))
    new = draw(st.lists(CHARACTERS, max_size=2).map("".join))
    return [*args[:at], args[at][:start] + new + args[at][start + kept :], *args[at + 1 :]]


def drop(draw: Draw, args: Args, _: str) -> Args:
    at = place(draw, args)
    return args[:at] + args[at + 1 :]


def duplicate(draw: Draw, args: Args, _: str) -> Args:
    at, count = place(draw, args), draw(st.integers(1, 2))
    to = place(draw, args, end=True)
    return args[:to] + args[at : at + count] + args[to:]


def duplicate_often(draw: Draw, args: Args, _: str) -> Args:
    at, count = place(draw, args), draw(st.integers(1, 2))
    times: int = draw(st.sampled_from([8, 9, 64, 65]))
    return args[:at] + args[at : at + count] * times + args[at:]


def swap(draw: Draw, args: Args, _: str) -> Args:
    one, other = place(draw, args), place(draw, args)
    new = list(args)
    new[one], new[other] = args[other], args[one]
    return new


def move_an_option(draw: Draw, args: Args, _: str) -> Args:
    """Put an option and what follows it, mostly its value, before another one."""
    at, to = (draw(st.sampled_from(_dashed(args) or [0])) for _ in range(2))
    taken, rest = args[at : at + 2], args[:at] + args[at + 2 :]
    to = min(to, len(rest)) if to <= at else max(at, to - 2)
    return rest[:to] + taken + rest[to:]


def _dashed(args: Args) -> list[int]:
    return [at for at, arg in enumerate(args) if arg.startswith("-")]


def insert(draw: Draw, args: Args, sample: str) -> Args:
    own = [word for line in GOOD[sample] for word in line.split()]
    at = place(draw, args, end=True)
    return [*args[:at], draw(st.sampled_from(WORDS) | st.sampled_from(own + PREFIXES)), *args[at:]]


def glue(draw: Draw, args: Args, _: str) -> Args:
    at, by = place(draw, args), draw(st.sampled_from(["", "=", " ", "\n", ","]))
    return [*args[:at], by.join(args[at : at + 2]), *args[at + 2 :]]


def lead_astray(draw: Draw, args: Args, _: str) -> Args:
    """Put what means another place before what may be a path."""
    at = draw(st.sampled_from([at for at, arg in enumerate(args) if "." in arg or "/" in arg] or [0]))
    return [*args[:at], draw(st.sampled_from(PREFIXES)) + args[at], *args[at + 1 :]]


def miscount(draw: Draw, args: Args, _: str) -> Args:
    numbers = [at for at, arg in enumerate(args) if re.fullmatch(r"-?[0-9.]+k?", arg)]
    at = draw(st.sampled_from(numbers or range(len(args))))
    return [*args[:at], draw(st.sampled_from(NUMBERS)), *args[at + 1 :]]


def add_a_rival(draw: Draw, args: Args, sample: str) -> Args:
    """Put in an option that excludes one that is there, with a value of its own where it has one."""
    written = grammar(sample)
    sets = [rivals for part in written.get("sections", [written]) for rivals in part.get("exclusive", [])]
    there = [(at, rivals) for at, arg in enumerate(args) for rivals in sets if arg in rivals]
    if not there:
        return insert(draw, args, sample)
    at, rivals = draw(st.sampled_from(there))
    own = [line.split() for line in GOOD[sample]]
    pairs = [(line[i], line[i + 1]) for line in own for i in range(len(line) - 1) if line[i] in rivals]
    name, value = draw(st.sampled_from([pair for pair in pairs if pair[0] != args[at]] or pairs))
    bare = any(name in names and not valued for names, valued in options(written))
    return [*args[:at], *([name] if bare else [name, value]), *args[at:]]


WAYS = [
    *(change_a_character, drop, duplicate, duplicate_often, swap, move_an_option),
    *(insert, glue, lead_astray, miscount, add_a_rival),
]


@st.composite
def spoiled(draw: Draw, sample: str) -> Args:
    args: Args = draw(st.sampled_from(GOOD[sample])).split()
    for way in draw(st.lists(st.sampled_from(WAYS), min_size=1, max_size=2)):
        args = way(draw, args, sample) if args else args
    return args


@pytest.mark.parametrize("sample", sorted(GOOD))
def test_no_near_miss_gets_through(sample: str) -> None:
    written, read = grammar(sample), entry(sample)
    missed: set[tuple[str, ...]] = set()

    @given(spoiled(sample))
    @settings(
        max_examples=2 * ENOUGH,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    def try_one(args: Args) -> None:
        objection = read.objection(args, INPUTS)
        good = fits(written, args)
        assert (objection is None) == good, f"{args}: {objection}"
        if not good:
            missed.add(tuple(args))

    try_one()
    assert len(missed) >= ENOUGH
