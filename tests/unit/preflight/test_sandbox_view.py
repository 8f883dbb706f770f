"""Whether `check` finds what jobs would not see, and what they could use though it is read-only."""

import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from aitbc_miner.preflight import sandbox_view
from aitbc_miner.preflight.sandbox_view import needs, special, unseen
from aitbc_miner.sandbox import bubblewrap
from tools.lib.compiler import c_compiler


@pytest.fixture
def place() -> Iterator[Path]:
    """Give a directory that no sandbox has by itself, and that anybody may read."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as directory:
        Path(directory).chmod(0o755)
        yield Path(directory)


def program(place: Path, text: str = "#!/bin/sh\n") -> Path:
    path = place / "bin" / "tool"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def test_what_debian_has_is_seen() -> None:
    for name in ("/usr/bin/python3", "/bin/sh", "/usr/bin/ldd", "/usr/bin/env"):
        needed = needs(Path(name))
        assert unseen([], needed) == [], name
    assert len(needs(Path("/usr/bin/python3"))) > 2


def test_a_program_in_a_directory_of_its_own_is_not(place: Path) -> None:
    tool = program(place)
    assert unseen([], needs(tool)) == [tool]
    assert unseen([place], needs(tool)) == []
    assert needs(place / "none") == []


def test_a_link_on_the_way_must_be_seen_too(place: Path) -> None:
    first = place / "first"
    first.symlink_to("second")
    (place / "second").symlink_to("/usr/bin/true")
    assert unseen([first], needs(first)) == [place / "second"]
    assert unseen([place], needs(first)) == []


def test_the_interpreter_must_be_seen_too(place: Path) -> None:
    shutil.copy("/bin/sh", place / "shell")
    tool = program(place, f"#!{place}/shell -e\n")
    assert unseen([tool.parent], needs(tool)) == [place / "shell"]


def test_libraries_must_be_seen_too(place: Path) -> None:
    (place / "lib").mkdir()
    library = place / "lib" / "libown.so"
    source = place / "own.c"
    source.write_text("int own(void) { return 0; }")
    subprocess.run([*c_compiler(), "-shared", "-fPIC", "-o", library, source], check=True)
    source.write_text("int own(void); int main(void) { return own(); }")
    tool = place / "tool"
    subprocess.run([*c_compiler(), "-o", tool, source, library], check=True)
    assert unseen([tool], needs(tool)) == [library]
    assert unseen([place], needs(tool)) == []


def test_links_of_a_program_to_its_settings_must_be_seen_too(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As Debian's Java has them.
    settings = place / "etc" / "tool-17"
    settings.mkdir(parents=True)
    (settings / "security").touch()
    tool = program(place / "jvm" / "tool-17")
    (tool.parent.parent / "conf").symlink_to(settings / "security")
    (tool.parent.parent / "nowhere").symlink_to("/none")
    assert unseen([place / "jvm"], needs(tool)) == [settings / "security"]
    monkeypatch.setattr(sandbox_view, "etc_shown", lambda *, network: [settings])
    assert unseen([place / "jvm"], needs(tool)) == []


def test_what_can_be_used_though_it_is_read_only_is_told(place: Path) -> None:
    (place / "plain").touch()
    os.mkfifo(place / "fifo")
    (place / "below").mkdir()
    with socket.socket(socket.AF_UNIX) as line:
        line.bind(str(place / "below" / "socket"))
    (place / "link").symlink_to("below/socket")
    assert sorted(special(place)) == [
        f"{place}/below/socket is a socket: jobs can use it although the bind is read-only",
        f"{place}/fifo is a FIFO: jobs can use it although the bind is read-only",
    ]
    assert list(special(place / "none")) == []


def test_no_more_is_looked_at_than_a_bound(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox_view, "_LOOKED_AT", 3)
    for number in range(10):
        os.mkfifo(place / str(number))
    assert len(list(special(place))) == 2


def test_nothing_of_etc_leads_to_keys() -> None:
    shown = list(bubblewrap.etc_shown(network=True))
    private = [Path(path) for path in ("/etc/ssl/private", "/etc/shadow", "/etc/aitbc", "/etc/ssh", "/etc")]
    for path in shown:
        assert not [secret for secret in private if secret.is_relative_to(path.resolve())], path
    assert Path("/etc/alternatives") in shown
