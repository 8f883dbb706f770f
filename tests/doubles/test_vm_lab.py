"""The laboratory, as far as it can be tried without a machine: QEMU and mmdebstrap are stood in for."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tools.vm_lab import cache as vm_cache
from tools.vm_lab import debian, image
from tools.vm_lab import main as vm_lab
from tools.vm_lab.cache import LabError

CHECKOUT = vm_lab.CHECKOUT
BOOKWORM, TRIXIE = image.RELEASES["12"], image.RELEASES["13"]
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
    assert environment["PYTHONPATH"] == "/src"


@pytest.mark.parametrize(
    ("first", "second", "status"),
    [("true", "true", 0), ("exit 3", "true", 3), ("exit 3", "exit 4", 4), ("true", "exit 4", 4)],
)
def test_what_follows_is_run_in_the_same_machine_and_alone_after_a_boot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: str, second: str, status: int
) -> None:
    monkeypatch.setattr(vm_lab, "FIRST", f"{tmp_path}/first")
    told = {"1": ["first", "second"], "2": ["second"]}
    for boot, expected in told.items():
        command = vm_lab.in_turn(["sh", "-c", f"echo first; {first}"], ["sh", "-c", f"echo second; {second}"])
        done = subprocess.run(
            command, env={**os.environ, "AITBC_VM_BOOT": boot}, capture_output=True, text=True, check=False
        )
        assert (done.stdout.split(), done.returncode) == (expected, status)


def test_pytest_is_run_twice_with_arguments_of_its_own() -> None:
    chosen = vm_lab.arguments(["test", "--maxfail", "3", "--then", "tests/vm/reboot.py", "-v"])
    script = vm_lab.command_of(chosen)[0][-1]
    assert "-m pytest tests/vm --maxfail 3\n" in script
    assert "-m pytest tests/vm/reboot.py -v ||" in script


def test_only_root_makes_a_container(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vm_lab, "require_packages", lambda: None)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(LabError, match="cannot make a container: only root may make containers; use QEMU"):
        vm_lab.work(vm_lab.arguments(["--container", "test"]))


@pytest.mark.parametrize(
    "words",
    [
        ["--container", "shell"],
        [],
        ["run"],
        ["run", "--"],
        ["--release", "11", "build"],
        ["fly"],
        ["clean", "12"],
    ],
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

    def session(_: object, release: image.Release) -> int:
        seen.append(release.number)
        return {"12": 5, "13": 6}[release.number]

    monkeypatch.setattr(vm_lab, "session", session)
    monkeypatch.setattr(vm_lab, "require_packages", lambda: None)
    assert vm_lab.work(vm_lab.arguments(["test"])) == 5
    assert seen == ["12", "13"]


# -- what is missing


def test_missing_packages_are_told_in_one_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(debian, "SEARCH", str(tmp_path))
    with pytest.raises(
        LabError, match=r"as root: apt-get install .*qemu-system-x86 qemu-utils mmdebstrap e2fsprogs"
    ) as told:
        vm_cache.require_packages()
    assert told.value.status == 69


def test_only_an_ordinary_user_needs_uidmap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for program in ("qemu-system-x86_64", "qemu-img", "mmdebstrap", "mke2fs"):
        (tmp_path / program).touch(mode=0o755)
    monkeypatch.setattr(debian, "SEARCH", str(tmp_path))
    assert debian.missing("vm") == []
    assert debian.missing("vm", "user") == ["uidmap"]


def test_where_no_package_is_missing_none_is_named() -> None:
    run = subprocess.run([sys.executable, debian.__file__], capture_output=True, text=True, check=True)
    assert run.stdout == ""


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


def image_name(cache: Path, release: image.Release, checkout: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(image, "entry", lambda cache, name, _: cache / name)
    return image.image(cache, release, checkout).name


def test_the_key_follows_release_packages_requirements_and_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    locked = (CHECKOUT / "tools" / "locks" / "test.lock").read_text()
    lock = tmp_path / "tools" / "locks" / "test.lock"
    lock.parent.mkdir(parents=True)
    lock.write_text(locked)
    first = image_name(tmp_path, TRIXIE, tmp_path, monkeypatch)
    assert first == image_name(Path("/elsewhere"), TRIXIE, CHECKOUT, monkeypatch)
    names = {first, image_name(tmp_path, BOOKWORM, tmp_path, monkeypatch)}
    with monkeypatch.context() as patch:
        patch.setattr(image, "PACKAGES", (*image.PACKAGES, "nano"))
        names.add(image_name(tmp_path, TRIXIE, tmp_path, patch))
    with monkeypatch.context() as patch:
        patch.setattr(image, "UNITS", {"lab-run.service": "another"})
        names.add(image_name(tmp_path, TRIXIE, tmp_path, patch))
    lock.write_text(locked.replace("\npsutil==", "\npsutil==1"))
    names.add(image_name(tmp_path, TRIXIE, tmp_path, monkeypatch))
    assert len(names) == 5


def test_requirements_are_those_of_the_lock_without_what_only_the_host_runs() -> None:
    old, new = (
        {each.name for each in image.requirements(CHECKOUT, release)} for release in (BOOKWORM, TRIXIE)
    )
    assert {"msgspec", "requests", "pytest", "hypothesis", image.SOURCE_ONLY} <= new
    assert not {"mypy", "ruff", "numpy", "jsonschema"} & new
    # What a condition on the interpreter leaves to one of them.
    assert old - new == {"async-timeout"}


def test_a_lock_that_is_not_understood_is_told(tmp_path: Path) -> None:
    lock = tmp_path / "tools" / "locks" / "test.lock"
    lock.parent.mkdir(parents=True)
    lock.write_text("redis==8.0 ; sys_platform == 'linux' \\\n    --hash=sha256:00\n")
    with pytest.raises(LabError, match=r"cannot read tools/locks/test\.lock"):
        image.requirements(tmp_path, TRIXIE)


def test_the_hooks_are_shell(tmp_path: Path) -> None:
    for script in (image.prepare_script(), image.finish_script(["a >=1,<2", "it's"])):
        subprocess.run(["sh", "-n", "-c", script], check=True)
    subprocess.run(["sh", "-c", image.prepare_script(), "sh", str(tmp_path)], check=True)
    assert "virtio_blk" in (tmp_path / "etc/initramfs-tools/modules").read_text().splitlines()


def test_a_failed_program_is_quoted() -> None:
    with pytest.raises(LabError, match=r"cannot run sh: exit status 3:\nwhy"):
        vm_cache.call(["sh", "-c", "echo why >&2; exit 3"])
