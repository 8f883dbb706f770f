"""What `check` warns of: entries through which a program can be made to do more than it seems to."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from aitbc_miner.allowlist import abuse
from aitbc_miner.allowlist.abuse import TRICKS
from aitbc_miner.allowlist.entries import Entry, load_allowlist
from aitbc_miner.config.document import Fault

SAMPLES = Path(__file__).parents[3] / "etc" / "allowlist.d"


def entry(tmp_path: Path, path: str, **keys: Any) -> Entry:
    """Read an entry as it is read from a file."""
    (tmp_path / "one.yaml").write_text(yaml.safe_dump({"command": {"path": path}, **keys}))
    faults: list[Fault] = []
    allowlist = load_allowlist([tmp_path], faults, [])
    assert faults == []
    return next(iter(allowlist.entries.values()))


def grammar(*options: dict[str, Any], **operand: Any) -> dict[str, Any]:
    return {"options": list(options), "operands": [{"value": operand}] if operand else []}


@pytest.mark.parametrize(
    ("path", "keys", "says"),
    [
        ("/usr/bin/python3.11", {}, "run any code: the program is an interpreter"),
        ("/bin/bash", {"args": [["-c", "x"]]}, "interpreter"),
        ("/usr/bin/env", {}, "run any other program"),
        ("/usr/bin/curl", {}, "use the network"),
        ("/usr/bin/find", {"args": [["-.*"]]}, "run any program by '-exec'"),
        ("/usr/bin/find", grammar({"name": "-execdir", "value": "input"}), "run any program by '-execdir'"),
        ("/usr/bin/tar", {"args": [["--.+"]]}, "by '--checkpoint-action=exec=sh'"),
        ("/usr/bin/tar", {"leading": ["-I", "zstd"]}, "run any program by '-I'"),
        ("/usr/bin/tar", grammar({"name": "-C", "value": "output"}), "by '-C'"),
        ("/usr/bin/ffmpeg", {}, "put|addresses and other files that a playlist names"),
        ("/usr/bin/convert", grammar(regex=".+"), "execute files by '-define'"),
        ("/usr/bin/convert", grammar(text={"max_length": 99, "chars": "a-z:"}), "by 'mvg:a'"),
        ("/usr/bin/gs", {"leading": ["-q"]}, "put -dSAFER into `leading`"),
        ("/usr/bin/blender", {"leading": ["--background"]}, "the Python code inside a .blend file"),
        ("/usr/bin/sort", grammar({"name": "--output", "value": "output"}), "by '--output'"),
        ("/usr/bin/less", {}, "from its prompt"),
    ],
)  # fmt: skip
def test_what_is_easy_to_abuse_is_told(tmp_path: Path, path: str, keys: dict[str, Any], says: str) -> None:
    told = list(abuse.abuse_warnings(entry(tmp_path, path, **keys)))
    assert any(part in text for part in says.split("|") for text in told), told
    assert all(text.startswith("lets jobs ") and "; " in text for text in told)


@pytest.mark.parametrize(
    ("path", "keys"),
    [
        ("/usr/bin/sha256sum", {"args": [["[a-z]+"]]}),
        ("/usr/bin/find", {"args": [["-name", "[a-z]+"]]}),
        ("/usr/bin/tar", grammar({"name": "-x"}, {"name": "-f", "value": "input"})),
        ("/usr/bin/ffmpeg", {"leading": ["-protocol_whitelist", "file"]}),
        ("/usr/bin/gs", {"leading": ["-dSAFER"]}),
        ("/usr/bin/convert", grammar(input={"suffixes": [".png"]})),
        ("/usr/bin/pythonista", {}),
    ],
)
def test_what_is_not_is_not(tmp_path: Path, path: str, keys: dict[str, Any]) -> None:
    assert list(abuse.abuse_warnings(entry(tmp_path, path, **keys))) == []


def test_the_samples_are_not_easy_to_abuse() -> None:
    faults: list[Fault] = []
    allowlist = load_allowlist([SAMPLES], faults, [])
    assert faults == []
    assert set(allowlist.entries) == {"blender", "convert", "ffmpeg", "gzip", "sha256sum", "whisper"}
    told = {name: list(abuse.abuse_warnings(entry)) for name, entry in allowlist.entries.items()}
    assert not any(told.values()), told


def test_every_trick_says_what_it_does() -> None:
    for trick in TRICKS:
        assert trick.words or "{word}" not in trick.does + trick.remedy
        assert trick.does
        assert trick.remedy
