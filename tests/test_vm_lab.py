"""The laboratory, as far as it can be tried without a machine: QEMU and mmdebstrap are stood in for."""

import contextlib
import io
import os
import signal
import subprocess
import sys
import tarfile
import threading
from pathlib import Path

import pytest

from tools import vm_cache, vm_image, vm_lab, vm_qemu
from tools.local_node import wait_until
from tools.vm_cache import LabError

CHECKOUT = vm_lab.CHECKOUT
BOOKWORM, TRIXIE = vm_image.RELEASES["12"], vm_image.RELEASES["13"]
WAIT_S = 30.0


# -- the command line


def test_run_takes_everything_after_the_dashes() -> None:
    chosen = vm_lab.arguments(
        ["--release", "12", "--timeout", "9", "run", "--", "sh", "-c", "--release", "--"]
    )
    assert (chosen.verb, chosen.release, chosen.timeout) == ("run", "12", 9.0)
    assert chosen.command == ["sh", "-c", "--release", "--"]


def test_test_passes_pytest_its_options() -> None:
    chosen = vm_lab.arguments(["test", "-k", "limits", "-x"])
    command, environment = vm_lab.command_of(chosen)
    assert command == ["/opt/test-env/bin/python", "-m", "pytest", "tests/vm", "-k", "limits", "-x"]
    assert environment["PYTHONPATH"] == "/src:/src/tests"


@pytest.mark.parametrize(
    "words",
    [[], ["run"], ["run", "--"], ["--release", "11", "build"], ["fly"], ["clean", "12"]],
    ids=" ".join,
)
def test_nonsense_is_a_usage_error(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        vm_lab.arguments(words)
    assert ended.value.code == 2
    assert "usage: tools/vm" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["build"], ["12", "13"]),
        (["test"], ["12", "13"]),
        (["run", "true"], ["13"]),
        (["shell"], ["13"]),
        (["--release", "12", "test"], ["12"]),
        (["--release", "12", "shell"], ["12"]),
    ],
)
def test_releases(words: list[str], expected: list[str]) -> None:
    assert [release.number for release in vm_lab.releases(vm_lab.arguments(words))] == expected


def test_both_releases_run_and_the_first_failure_is_the_status(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def session(_: object, release: vm_image.Release) -> int:
        seen.append(release.number)
        return {"12": 5, "13": 6}[release.number]

    monkeypatch.setattr(vm_lab, "session", session)
    monkeypatch.setattr(vm_lab, "require_packages", lambda: None)
    assert vm_lab.work(vm_lab.arguments(["test"])) == 5
    assert seen == ["12", "13"]


# -- what is missing


def test_missing_packages_are_told_in_one_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vm_cache, "SEARCH", str(tmp_path))
    monkeypatch.setattr(vm_cache, "KEYRING", tmp_path / "none")
    with pytest.raises(
        LabError, match=r"as root: apt-get install qemu-system-x86 qemu-utils mmdebstrap e2fsprogs"
    ) as told:
        vm_cache.require_packages()
    assert told.value.status == 69
    assert "debian-archive-keyring" in str(told.value)


def test_only_an_ordinary_user_needs_uidmap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for program in ("qemu-system-x86_64", "qemu-img", "mmdebstrap", "mke2fs"):
        (tmp_path / program).touch(mode=0o755)
    monkeypatch.setattr(vm_cache, "SEARCH", str(tmp_path))
    monkeypatch.setattr(vm_cache, "KEYRING", tmp_path)
    assert vm_cache.missing_packages(root=True) == []
    assert vm_cache.missing_packages(root=False) == ["uidmap"]


def test_subordinate_ids_are_needed_in_both_tables(tmp_path: Path) -> None:
    assert not vm_cache.has_subordinate_ids("ann", 1000, tmp_path)
    (tmp_path / "subuid").write_text("bob:100000:65536\nann:165536:65536\n")
    assert not vm_cache.has_subordinate_ids("ann", 1000, tmp_path)
    (tmp_path / "subgid").write_text("1000:165536:65536\n")
    assert vm_cache.has_subordinate_ids("ann", 1000, tmp_path)
    assert not vm_cache.has_subordinate_ids("an", 100, tmp_path)


# -- the cache


def test_an_entry_is_built_once_whoever_asks_at_once(tmp_path: Path) -> None:
    built: list[Path] = []

    def build(directory: Path) -> None:
        built.append(directory)
        (directory / "file").write_text("whole")

    threads = [threading.Thread(target=vm_cache.entry, args=(tmp_path, "thing", build)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
    assert len(built) == 1
    assert vm_cache.entry(tmp_path, "thing", build) == tmp_path / "thing"
    assert (tmp_path / "thing" / "file").read_text() == "whole"
    assert not built[0].exists()


def test_a_failed_build_leaves_nothing_and_is_tried_again(tmp_path: Path) -> None:
    def fail(directory: Path) -> None:
        (directory / "half").touch()
        raise LabError("no")

    with pytest.raises(LabError):
        vm_cache.entry(tmp_path, "thing", fail)
    assert os.listdir(tmp_path) == ["thing.lock"]  # noqa: PTH208 - names only
    (tmp_path / ".thing.killed").mkdir()
    assert vm_cache.entry(tmp_path, "thing", lambda _: None).is_dir()
    assert not (tmp_path / ".thing.killed").exists()


def image_name(
    cache: Path, release: vm_image.Release, checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> str:
    monkeypatch.setattr(vm_image, "entry", lambda cache, name, _: cache / name)
    return vm_image.image(cache, release, checkout).name


def test_the_key_follows_release_packages_requirements_and_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup = (CHECKOUT / "setup.cfg").read_text()
    (tmp_path / "setup.cfg").write_text(setup)
    first = image_name(tmp_path, TRIXIE, tmp_path, monkeypatch)
    assert first == image_name(Path("/elsewhere"), TRIXIE, CHECKOUT, monkeypatch)
    names = {first, image_name(tmp_path, BOOKWORM, tmp_path, monkeypatch)}
    with monkeypatch.context() as patch:
        patch.setattr(vm_image, "PACKAGES", (*vm_image.PACKAGES, "nano"))
        names.add(image_name(tmp_path, TRIXIE, tmp_path, patch))
    with monkeypatch.context() as patch:
        patch.setattr(vm_image, "UNITS", {"lab-run.service": "another"})
        names.add(image_name(tmp_path, TRIXIE, tmp_path, patch))
    (tmp_path / "setup.cfg").write_text(
        (CHECKOUT / "setup.cfg").read_text().replace("psutil >=5", "psutil >=6")
    )
    names.add(image_name(tmp_path, TRIXIE, tmp_path, monkeypatch))
    assert len(names) == 5


def test_requirements_come_from_the_package_without_what_only_the_host_runs() -> None:
    runtime, tests = vm_image.requirements(CHECKOUT)
    assert {"msgspec", "requests", vm_image.SOURCE_ONLY} <= {line.split()[0] for line in runtime}
    assert {line.split()[0] for line in tests} == {"hypothesis", "pytest", "responses"}


def test_the_hooks_are_shell(tmp_path: Path) -> None:
    for script in (vm_image.prepare_script(), vm_image.finish_script(["a >=1,<2", "it's"])):
        subprocess.run(["sh", "-n", "-c", script], check=True)
    subprocess.run(["sh", "-c", vm_image.prepare_script(), "sh", str(tmp_path)], check=True)
    assert "virtio_blk" in (tmp_path / "etc/initramfs-tools/modules").read_text().splitlines()


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
    vm_qemu.copy(checkout, copy)
    payload = io.BytesIO()
    vm_qemu.pack(payload, copy, wheels, "true\n")
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
        vm_qemu.copy(tmp_path / "checkout", tmp_path / "copy")


def test_the_guest_script_runs_the_command_as_it_was_given(tmp_path: Path) -> None:
    words = ["a b", "it's", "$HOME", "*"]
    command = ["sh", "-c", 'printf "%s|" "$@" "$EXTRA" "$AITBC_VM_BOOT"', "sh", *words]
    script = vm_qemu.guest_script(command, {"EXTRA": "x y"}, live=False)
    local = script.replace("cd /src", f"cd {tmp_path}").replace("/lab/boots", f"{tmp_path}/boots")
    for boot in ("1", "2"):
        told = subprocess.run(["sh", "-c", local], capture_output=True, text=True, check=True)
        assert told.stdout.split("|") == [*words, "x y", boot, ""]


@pytest.mark.parametrize(
    ("text", "status"),
    [("exited 0\n", 0), ("exited 7\n", 7), ("killed KILL", 137), ("killed TERM", 143), ("dumped ABRT", 134)],
)
def test_exit_status_as_a_shell_has_it(text: str, status: int) -> None:
    assert vm_qemu.parse_status(text) == status


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
    assert vm_qemu.take_out(disk, tmp_path / "new") == 3
    assert (tmp_path / "new/journal.txt").read_bytes() == b"j"
    assert (tmp_path / "new/deep/er/table").read_bytes() == b"t"


def test_reports_stay_in_their_directory(tmp_path: Path) -> None:
    disk = disk_with({"reports/../../evil": b"", "/etc/evil": b"", "evil": b"", "status": b"exited 0"})
    assert vm_qemu.take_out(disk, tmp_path / "a/b") == 0
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_an_empty_disk_has_no_status(tmp_path: Path) -> None:
    assert vm_qemu.take_out(io.BytesIO(bytes(1 << 20)), tmp_path) is None


def test_a_readable_console_and_nothing_left_on_the_disk(tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:
        files = vm_qemu.Files.make(stack)
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
    monkeypatch.setattr(vm_qemu, "SEARCH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("FAKE_PID", str(tmp_path / "pid"))
    monkeypatch.setattr(vm_qemu, "STOPPING_S", 0.1)
    monkeypatch.setattr(vm_qemu, "ENDING_S", 0.1)
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
        assert vm_qemu.run(fake.parent, vm_qemu.Files.make(stack), WAIT_S) is True
    assert capfdbinary.readouterr().out == b"what ran\n"


def test_time_runs_out_the_button_is_pressed_and_then_it_is_killed(fake: Path) -> None:
    write_fake(fake, 'exec cat >"$FAKE_PID.said"')
    with contextlib.ExitStack() as stack:
        assert vm_qemu.run(fake.parent, vm_qemu.Files.make(stack), 1.0) is False
    assert gone(int((fake.parent / "pid").read_text()))
    said = (fake.parent / "pid.said").read_text().splitlines()
    assert said == ["system_powerdown"] * vm_qemu.STOPPING_ATTEMPTS


def test_the_power_is_cut_when_the_machine_asks_and_it_boots_again(
    fake: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    write_fake(
        fake,
        'echo $$ >>"$FAKE_PID.all"; [ -e "$FAKE_PID.once" ] && exit 0; >"$FAKE_PID.once"; '
        'echo 300 >"$power"; exec cat',
    )
    with contextlib.ExitStack() as stack:
        assert vm_qemu.run(fake.parent, vm_qemu.Files.make(stack), WAIT_S) is True
    first, second = map(int, (fake.parent / "pid.all").read_text().split())
    assert first != second
    assert gone(first)
    said = capfdbinary.readouterr()
    assert said.out == b"what ran\n" * 2
    assert b"the power was cut" in said.err


def test_time_runs_out_over_all_boots(fake: Path) -> None:
    write_fake(fake, 'echo $$ >>"$FAKE_PID.all"; echo 100 >"$power"; exec cat')
    with contextlib.ExitStack() as stack:
        assert vm_qemu.run(fake.parent, vm_qemu.Files.make(stack), 1.0) is False
    pids = [int(word) for word in (fake.parent / "pid.all").read_text().split()]
    assert len(pids) > 1
    assert all(map(gone, pids))


def test_what_is_written_goes_over_the_image_and_not_into_it(tmp_path: Path) -> None:
    image = tmp_path / "root.img"
    with image.open("wb") as file:
        file.write(b"image")
        file.truncate(1 << 20)
    with contextlib.ExitStack() as stack:
        files = vm_qemu.Files.make(stack)
        vm_qemu.lay_over(tmp_path, files)
        name = f"/proc/self/fd/{files.root.fileno()}"
        keep = [files.root.fileno()]
        vm_cache.call(["qemu-io", "-f", "qcow2", "-c", "write -P 65 0 512", name], keep=keep)
        vm_cache.call(["qemu-img", "check", "-q", name], keep=keep)
        vm_cache.call(["qemu-img", "convert", "-O", "raw", name, str(tmp_path / "seen")], keep=keep)
    assert image.read_bytes()[:6] == b"image\0"
    assert (tmp_path / "seen").read_bytes()[:513] == b"A" * 512 + b"\0"


TOOL = """
import contextlib, signal, sys
from pathlib import Path
from tools import vm_lab, vm_qemu
# A shell that started these tests in the background has Ctrl-C ignored, and that is inherited.
signal.signal(signal.SIGINT, signal.default_int_handler)
vm_qemu.SEARCH = sys.argv[1] + ":" + vm_qemu.SEARCH
def session(chosen, release):
    with contextlib.ExitStack() as stack:
        vm_qemu.run(Path(sys.argv[1]), vm_qemu.Files.make(stack), 600.0)
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


def test_a_failed_program_is_quoted() -> None:
    with pytest.raises(LabError, match=r"sh ended with status 3:\nwhy"):
        vm_cache.call(["sh", "-c", "echo why >&2; exit 3"])
