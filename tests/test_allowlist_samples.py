"""The samples of etc/allowlist.d: good lists a little changed, judged by us and by trying everything."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from allowlist_reference import allowed
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from aitbc_miner.allowlist import Entry
from aitbc_miner.util.yamldoc import Fault, decode_text

SAMPLES = Path(__file__).parents[1] / "etc" / "allowlist.d"
INPUTS = ["a.mp4", "b.wav", "c.png", "d.jpg", "s.blend", "data", "-rf.mp4"]
GOOD = {
    "ffmpeg": [
        "-i a.mp4 -c:v copy out.mkv",
        "-y -ss 0.5 -t 3 -i a.mp4 -c:v libx264 -crf 23 -preset fast -an ../output/o.mp4",
        "-i b.wav -vn -c:a aac -b:a 128k -ac 2 -ar 44100 o.m4a",
        "-i a.mp4 -vf scale=-2:720 -r 24 -b:v 900k o.webm",
    ],
    "imagemagick": [
        "c.png out.jpg",
        "c.png -auto-orient -resize 32x32! -quality 80 ../output/o.webp",
        "d.jpg -crop 5x5+1+1 -rotate -90 -flip -flop -blur 1x2 x/o.png",
    ],
    "whisper": [
        "--model tiny b.wav",
        "--language de b.wav --model large-v3 --temperature 0.2 a.mp4 --word_timestamps True",
        "--model base --threads 4 --initial_prompt Hello b.wav",
    ],
    "blender": [
        "s.blend -o frame -f 1",
        "s.blend -E CYCLES -t 8 -F PNG -o ../output/f# -s 1 -e 9 -a",
        "s.blend --render-output f -f 1 -f 2",
    ],
    "sha256sum": ["data", "--tag -b data c.png", "c.png -t d.jpg"],
    "gzip": ["-9 -k -n data", "data", "--keep data"],
}
# What authors of hostile jobs would try in place of, beside or around an argument.
TRICKS = [
    *(
        "",
        "-",
        "--",
        "-i",
        "-f",
        "-y",
        "-o",
        "/etc/passwd",
        "../../etc/passwd",
        "..",
        ".",
        "../output/../a.mp4",
    ),
    *(
        "http://h/a.mp4",
        "file:a.mp4",
        "concat:a.mp4|b.wav",
        "pipe:0.mp4",
        "data:,x.mp4",
        "msl:c.png",
        "@c.png",
    ),
    *(
        "-rf.mp4",
        "a.mp4\0",
        "a.mp4\n",
        "c.png[0]",
        "-filter_complex",
        "movie=/etc/passwd",
        "--python-expr",
        "-P",
    ),
    *("99999999999", "-1", "1e3", "NaN", "0x10", "$(id)", "`id`", "a.mp4;id", "*", "~/x.mp4", "a//b.mp4"),
]


def written(name: str) -> dict[str, Any]:
    read: dict[str, Any] = yaml.safe_load((SAMPLES / f"{name}.yaml").read_text())
    return read


def entry(name: str) -> Entry:
    faults: list[Fault] = []
    read = decode_text((SAMPLES / f"{name}.yaml").read_text(), Entry, faults, file=name)
    assert read is not None, list(map(str, faults))
    return read


def reference(name: str, args: list[str]) -> bool:
    sample = written(name)
    if "args" not in sample:
        return allowed(sample, args, INPUTS)
    return all(arg.isprintable() for arg in args) and _in_some_order(sample["args"], args)


def _in_some_order(groups: list[list[str]], args: list[str]) -> bool:
    """Whether runs of the arguments each fit another group of the short form."""
    return not args or any(
        len(args) >= len(group)
        and all(re.fullmatch(pattern, arg) for pattern, arg in zip(group, args, strict=False))
        and _in_some_order([*groups[:i], *groups[i + 1 :]], args[len(group) :])
        for i, group in enumerate(groups)
    )


@st.composite
def near_misses(draw: Callable[..., Any], name: str) -> list[str]:
    """Draw a good list with one to three changes."""
    args: list[str] = draw(st.sampled_from(GOOD[name])).split()
    others = [word for line in GOOD[name] for word in line.split()]
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, max(0, len(args) - 1)))
        old = args[at] if args else ""
        cut = draw(st.integers(0, len(old)))
        char = draw(st.sampled_from("-/.:=0 \n\0|%,aZé\u202e"))
        change = draw(st.integers(0, 7))
        args[at : at + 1] = [
            [],
            [old, old],
            [draw(st.sampled_from(TRICKS))],
            [old, draw(st.sampled_from(TRICKS))],
            [draw(st.sampled_from(others)), old],
            [old[:cut] + char + old[cut:]],
            [old[:cut] + old[cut + 1 :]],
            [draw(st.sampled_from(others))],
        ][change]
    return args[:12]


@pytest.mark.parametrize("name", sorted(GOOD))
def test_every_sample_is_tried_here(name: str) -> None:
    assert sorted(GOOD) == sorted(path.stem for path in SAMPLES.glob("*.yaml"))
    for line in GOOD[name]:
        assert entry(name).objection(line.split(), INPUTS) is None, line
        assert reference(name, line.split()), line


@pytest.mark.parametrize("name", sorted(GOOD))
@given(data=st.data())
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.filter_too_much])
def test_what_the_reference_refuses_is_refused(name: str, data: st.DataObject) -> None:
    args = data.draw(near_misses(name))
    assume(not reference(name, args))
    objection = entry(name).objection(args, INPUTS)
    assert objection is not None, args
    assert objection.at in range(len(args) + 1)
    assert str(objection).isprintable()


@pytest.mark.parametrize("name", sorted(GOOD))
@given(data=st.data())
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.filter_too_much])
def test_what_the_reference_takes_is_taken(name: str, data: st.DataObject) -> None:
    args = data.draw(near_misses(name))
    assume(reference(name, args))
    assert entry(name).objection(args, INPUTS) is None, args
