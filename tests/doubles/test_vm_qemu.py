"""One boot of the laboratory, without a machine: what goes in and out; QEMU is stood in for by a script."""

import contextlib
import io
import os
import signal
import subprocess
import sys
import tarfile
from itertools import pairwise
from pathlib import Path

import pytest

from tools.lib.local_node import wait_until
from tools.vm_lab import debian, qemu
from tools.vm_lab.cache import LabError

CHECKOUT = Path(__file__).parents[2]
WAIT_S = 30.0


# -- what goes in and what comes out


def test_the_payload_carries_sources_wheels_and_the_command(tmp_path: Path) -> None:
    checkout, copy, wheels = tmp_path / "checkout", tmp_path / "copy", tmp_path / "wheels"
    for name in (
        "a/b.py",
        ".git/x",
        ".venv-2/x",
        "a/__pycache__/x.pyc",
        "build/vm/x",
        ".mypy_cache/x",
        ".ci/run",
    ):
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        (checkout / name).write_text(name)
    (checkout / "a" / "tool").touch(mode=0o755)
    (checkout / "link").symlink_to("a/tool")
    wheels.mkdir()
    (wheels / "p.whl").touch()
    qemu.copy(checkout, copy)
    payload = io.BytesIO()
    qemu.pack(payload, copy, wheels, "true\n")
    payload.seek(0)
    with tarfile.open(fileobj=payload) as tar:
        members = {member.name: member for member in tar if not member.isdir()}
    assert set(members) == {
        *("src/a/b.py", "src/a/tool", "src/link", "src/.ci/run"),
        *("wheels/p.whl", "lab/command", "lab/collect"),
    }
    assert {member.uid for member in members.values()} == {0}
    assert members["src/a/tool"].mode & 0o111 == 0o111
    assert members["src/link"].linkname == "a/tool"
    # QEMU wants whole sectors.
    assert len(payload.getvalue()) % 512 == 0


def test_a_copy_names_what_it_cannot_read(tmp_path: Path) -> None:
    (tmp_path / "checkout").mkdir()
    os.mkfifo(tmp_path / "checkout" / "pipe")
    with pytest.raises(LabError, match=r"cannot copy the checkout: .*pipe"):
        qemu.copy(tmp_path / "checkout", tmp_path / "copy")


def test_the_guest_script_runs_the_command_as_it_was_given(tmp_path: Path) -> None:
    words = ["a b", "it's", "$HOME", "*"]
    command = ["sh", "-c", 'printf "%s|" "$@" "$EXTRA" "$AITBC_VM_BOOT"', "sh", *words]
    script = qemu.guest_script(command, {"EXTRA": "x y"}, live=False)
    local = script.replace("cd /src", f"cd {tmp_path}").replace("/lab/boots", f"{tmp_path}/boots")
    for boot in ("1", "2"):
        told = subprocess.run(["sh", "-c", local], capture_output=True, text=True, check=True)
        assert told.stdout.split("|") == [*words, "x y", boot, ""]


@pytest.mark.parametrize(
    ("text", "status"),
    [("exited 0\n", 0), ("exited 7\n", 7), ("killed KILL", 137), ("killed TERM", 143), ("dumped ABRT", 134)],
)
def test_exit_status_as_a_shell_has_it(text: str, status: int) -> None:
    assert qemu.parse_status(text) == status


def disk_with(members: dict[str, bytes]) -> io.BytesIO:
    disk = io.BytesIO()
    with tarfile.open(fileobj=disk, mode="w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    disk.write(bytes(1 << 20))
    return disk


def test_reports_come_out_with_the_status(tmp_path: Path) -> None:
    disk = disk_with({"status": b"exited 3\n", "reports/journal.txt": b"j", "reports/deep/er/table": b"t"})
    assert qemu.take_out(disk, tmp_path / "new") == 3
    assert (tmp_path / "new/journal.txt").read_bytes() == b"j"
    assert (tmp_path / "new/deep/er/table").read_bytes() == b"t"


def test_reports_stay_in_their_directory(tmp_path: Path) -> None:
    disk = disk_with({"reports/../../evil": b"", "/etc/evil": b"", "evil": b"", "status": b"exited 0"})
    assert qemu.take_out(disk, tmp_path / "a/b") == 0
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_an_empty_disk_has_no_status(tmp_path: Path) -> None:
    assert qemu.take_out(io.BytesIO(bytes(1 << 20)), tmp_path) is None


def test_a_readable_console_and_nothing_left_on_the_disk(tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:
        files = qemu.Files.make(stack)
        assert {os.fstat(file.fileno()).st_nlink for file in files} == {0}
        files.console.write(b"panic \xff\n")
        assert files.saved_console(tmp_path / "new/console.txt") == "panic \ufffd\n"
    assert (tmp_path / "new/console.txt").read_bytes() == b"panic \xff\n"


# -- QEMU, stood in for by a script

FAKE_QEMU = """#!/bin/sh
echo $$ >"$FAKE_PID"
for word; do case $word in
    file,id=lab,path=*) output=${word#*path=};;
    file,id=power,path=*) power=${word#*path=};;
esac; done
echo "what ran" >"$output"
exec 3>"$output" 4>"$power"
%s
"""


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stand in for QEMU; the file given says what it does once it runs."""
    monkeypatch.setattr(debian, "SEARCH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("FAKE_PID", str(tmp_path / "pid"))
    monkeypatch.setattr(qemu, "STOPPING_S", 0.1)
    monkeypatch.setattr(qemu, "ENDING_S", 0.1)
    return tmp_path / "qemu-system-x86_64"


def write_fake(path: Path, then: str) -> None:
    path.write_text(FAKE_QEMU % then)
    path.chmod(0o755)


def gone(pid: int) -> bool:
    """Say whether the process runs no more; whoever inherited it may not have reaped it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def test_output_is_passed_on_and_the_end_is_seen(
    fake: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    write_fake(fake, "exit 0")
    with contextlib.ExitStack() as stack:
        assert qemu.run(fake.parent, qemu.Files.make(stack), WAIT_S) is True
    assert capfdbinary.readouterr().out == b"what ran\n"


def test_time_runs_out_the_button_is_pressed_and_then_it_is_killed(fake: Path) -> None:
    write_fake(fake, 'exec cat >"$FAKE_PID.said"')
    with contextlib.ExitStack() as stack:
        assert qemu.run(fake.parent, qemu.Files.make(stack), 1.0) is False
    assert gone(int((fake.parent / "pid").read_text()))
    said = (fake.parent / "pid.said").read_text().splitlines()
    assert said == ["system_powerdown"] * qemu.STOPPING_ATTEMPTS


def test_the_power_is_cut_when_the_machine_asks_and_it_boots_again(
    fake: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    write_fake(
        fake,
        'echo $$ >>"$FAKE_PID.all"; [ -e "$FAKE_PID.once" ] && exit 0; >"$FAKE_PID.once"; '
        'echo 300 >"$power"; exec cat',
    )
    with contextlib.ExitStack() as stack:
        assert qemu.run(fake.parent, qemu.Files.make(stack), WAIT_S) is True
    first, second = map(int, (fake.parent / "pid.all").read_text().split())
    assert first != second
    assert gone(first)
    said = capfdbinary.readouterr()
    assert said.out == b"what ran\n" * 2
    assert b"the power was cut" in said.err


def test_time_runs_out_over_all_boots(fake: Path) -> None:
    write_fake(fake, 'echo $$ >>"$FAKE_PID.all"; echo 100 >"$power"; exec cat')
    with contextlib.ExitStack() as stack:
        assert qemu.run(fake.parent, qemu.Files.make(stack), 1.0) is False
    pids = [int(word) for word in (fake.parent / "pid.all").read_text().split()]
    assert len(pids) > 1
    assert all(map(gone, pids))


def test_what_is_written_goes_over_the_image_and_not_into_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(debian, "SEARCH", f"{tmp_path}:{os.environ['PATH']}")
    (tmp_path / "qemu-img").write_text('#!/bin/sh\nfor last; do :; done\necho "$@" >"$last"\n')
    (tmp_path / "qemu-img").chmod(0o755)
    with contextlib.ExitStack() as stack:
        files = qemu.Files.make(stack)
        qemu.lay_over(tmp_path, files)
        told = files.root.read().decode().split()
        command = qemu.qemu_command(tmp_path, files, {"lab": 1})
    overlay = told.pop()
    assert told == ["create", "-q", "-f", "qcow2", "-b", f"{tmp_path}/root.img", "-F", "raw"]
    drives = [word for flag, word in pairwise(command) if flag == "-drive"]
    # What the machine flushes is flushed; a snapshot would not be, and would end with its QEMU.
    assert [drive for drive in drives if "id=root" in drive] == [
        f"file={overlay},format=qcow2,if=none,id=root"
    ]
    assert not [drive for drive in drives if "unsafe" in drive]


TOOL = """
import contextlib, signal, sys
from pathlib import Path
from tools.vm_lab import main as vm_lab, qemu
# A shell that started these tests in the background has Ctrl-C ignored, and that is inherited.
signal.signal(signal.SIGINT, signal.default_int_handler)
qemu.debian.SEARCH = sys.argv[1] + ":" + qemu.debian.SEARCH
def session(chosen, release):
    with contextlib.ExitStack() as stack:
        qemu.run(Path(sys.argv[1]), qemu.Files.make(stack), 600.0)
vm_lab.session, vm_lab.require_packages = session, lambda: None
sys.argv[1:] = sys.argv[2:]
sys.exit(vm_lab.main())
"""


@pytest.mark.parametrize(
    ("number", "status"),
    [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129), (signal.SIGKILL, -9)],
)
def test_no_qemu_outlives_the_tool(fake: Path, number: signal.Signals, status: int) -> None:
    write_fake(fake, "exec sleep 600")
    tool = subprocess.Popen(
        [sys.executable, "-c", TOOL, str(fake.parent), "run", "true"], cwd=CHECKOUT, stdout=subprocess.PIPE
    )
    assert tool.stdout
    with tool, tool.stdout:
        assert tool.stdout.readline() == b"what ran\n"
        tool.send_signal(number)
        try:
            assert tool.wait(WAIT_S) == status
        finally:
            tool.kill()
    pid = int((fake.parent / "pid").read_text())
    wait_until(lambda: gone(pid), WAIT_S)
