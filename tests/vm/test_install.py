"""The installer, from a machine that has never seen the miner to one that has forgotten it. In this order."""

import os
import pwd
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.vm.boxed import BoxedMachine
from tests.vm.machine import CHECKOUT, CURRENT, ETC, MAIN, STATE, WAIT_S, Machine, hold, install, missing, run
from tools.lib.local_node import wait_until
from tools.mock.bootstrap.records import State

# Not the machine's files, or those of the test itself; /etc and /var/lib are looked at by themselves.
ELSEWHERE = [
    *("/proc", "/sys", "/dev", "/run", "/var/log"),
    *("/src", "/wheels", "/lab", "/reports", "/tmp/pytest-of-root", "/opt/test-env"),
]
ONE = pytest.mark.one_release("12", "what the shell does is the same in both")
# Who adds a user keeps the files as they were before.
BACKUPS = {
    f"/etc/{name}" for name in ("passwd-", "group-", "shadow-", "gshadow-", ".pwd.lock", "subuid-", "subgid-")
}


def files() -> set[str]:
    """Name all files of the machine that an installation could leave behind."""
    found: set[str] = set()
    for place, directories, names in os.walk("/"):
        directories[:] = [name for name in directories if str(Path(place, name)) not in ELSEWHERE]
        found |= {str(Path(place, name)) for name in [*directories, *names]}
    return found


def accounts() -> str:
    """Give all users and groups."""
    return run("getent", "passwd") + run("getent", "group")


@pytest.fixture(scope="module")
def before() -> tuple[set[str], str]:
    """Give what was there before the miner was installed for the first time."""
    if CURRENT.exists():
        install("--uninstall", "--purge")
    return files(), accounts()


@pytest.fixture(autouse=True)
def _from_the_beginning(before: tuple[set[str], str]) -> None:
    """Have the machine looked at before anything is installed."""


def version() -> str:
    return str(CURRENT.readlink())


@ONE
def test_a_first_run_over_a_faulty_configuration_leaves_all_to_the_next(before: object) -> None:
    ETC.mkdir(parents=True)
    faulty = ETC / "config.yaml"
    faulty.write_text((CHECKOUT / "etc" / "config.yaml").read_text() + "nonsense: 1\n")
    said = install(check=False)
    assert "nonsense" in said
    assert "cannot make the slots' users: the configuration has faults" in said
    assert said.endswith("not installed; the previous installation is unchanged\n")
    assert not CURRENT.parent.exists()
    assert not Path("/usr/lib/systemd/system", MAIN).exists()
    # The next test sees that the unit is enabled all the same.
    faulty.unlink()


@pytest.mark.smoke
def test_one_command_a_config_and_a_start_and_a_job_is_done(before: object) -> None:
    said = install()
    assert f"set coordinator.base_url in {ETC}/config.yaml" in said
    assert missing(said) == []
    assert run("systemctl", "is-enabled", MAIN).strip() == "enabled"
    assert run("systemctl", "is-active", MAIN, check=False).strip() == "inactive"
    assert (ETC / "config.yaml").stat().st_mode & 0o777 == 0o640
    assert (ETC / "config.yaml").group() == "aitbc"


@pytest.mark.smoke
def test_the_installed_node_does_a_job(boxed: BoxedMachine) -> None:
    machine = boxed
    machine.start()
    job_id = machine.submit(machine.script("first", "id -u; id -un"))
    (job,) = machine.wait_final([job_id])
    assert job.state is State.DONE, job
    slot = machine.now().slots[0].slot.offer.name
    log = (machine.jobs / job_id / "logs" / "exec.log").read_text()
    assert log == f"{pwd.getpwnam(f'aitbc-job-{slot}').pw_uid}\njob\n"
    assert machine.problems() == []
    doctor = run("aitbc-miner", "doctor")
    assert missing(doctor) == []
    assert "nothing that the configuration requires is missing" in doctor


@ONE
def test_again_it_changes_nothing(installed: None) -> None:
    edited = ETC / "config.yaml"
    edited.write_text(edited.read_text() + "# by the operator\n")
    removed = ETC / "allowlist.d" / "ffmpeg.yaml"
    removed.unlink(missing_ok=True)
    had = files(), accounts(), edited.read_text(), version()
    said = install()
    assert "is installed already" in said
    assert (files(), accounts(), edited.read_text(), version()) == had


@ONE
def test_samples_come_once_and_every_slot_has_its_user(installed: None) -> None:
    samples = ETC / "slots.d"
    shutil.rmtree(samples)
    install()
    assert not samples.exists()
    samples.mkdir()
    # Names that YAML puts in quotes.
    (samples / "slots.yaml").write_text('slots: [{name: "0", kind: cpu}, {name: "no", kind: cpu}]\n')
    install()
    (samples / "slots.yaml").unlink()
    assert {pwd.getpwnam(f"aitbc-job-{name}").pw_shell for name in ("0", "no")} == {"/usr/sbin/nologin"}


@ONE
def test_a_start_that_fails_is_made_good_by_the_next_run(machine: Machine) -> None:
    # As a first run is that has come as far as the start.
    (CURRENT.parent / "complete").unlink()
    run("systemctl", "disable", MAIN)
    obstacle = Path("/run/systemd/system", f"{MAIN}.d", "obstacle.conf")
    obstacle.parent.mkdir(parents=True)
    obstacle.write_text("[Service]\nExecStartPre=/usr/bin/false\n")
    said = install(check=False)
    shutil.rmtree(obstacle.parent)
    assert "cannot start the miner" in said
    assert f"not finished; {CURRENT} is now {version()}" in said
    assert "as it was" not in said
    # Or systemd, which goes on trying, starts it before the installer does.
    machine.stop()
    run("systemctl", "disable", MAIN)
    assert "\nstarted\n" in install()
    assert run("systemctl", "is-enabled", MAIN).strip() == "enabled"
    machine.wait_up()


def test_an_upgrade_leaves_running_jobs_alone(machine: Machine) -> None:
    machine.start()
    old, main = CURRENT.resolve(), machine.main_pid()
    release = machine.marks / "release"
    machine.submit(machine.script("long", f"{hold(release)}; echo upgraded"))
    pid = machine.running("long")
    said = install("--upgrade")
    assert CURRENT.resolve() != old
    # The worker has its code from there.
    assert f"keeping {old} for its running jobs" in said
    assert old.exists()
    machine.wait_new_main(main)
    assert machine.runs("long") == [pid]
    release.touch()
    (job,) = machine.wait_final(["long"])
    assert job.state is State.DONE, job
    assert machine.runs("long") == [pid]
    assert (machine.jobs / "long" / "logs" / "exec.log").read_text() == "upgraded\n"
    # The worker ends with its last job, and then the next run takes the old version away.
    wait_until(lambda: str(old) not in _used(), WAIT_S, 0.5)
    install("--no-start")
    assert not old.exists()


@ONE
def test_killed_between_switch_and_restart_the_next_run_makes_it_good(
    machine: Machine, tmp_path: Path
) -> None:
    machine.start()
    main = machine.main_pid()
    hook = tmp_path / "hook"
    step = '[[ "$BASH_COMMAND" != "take_units "* ]] || kill -KILL "$BASHPID"'
    hook.write_text(f"set -T\nstep() {{ {step}; }}\ntrap step DEBUG\n")
    command = ["/src/tools/install", "--upgrade", "--wheels", os.environ["AITBC_WHEELS"]]
    killed = subprocess.run(command, env={**os.environ, "BASH_ENV": str(hook)}, check=False)
    assert killed.returncode == -9
    assert machine.main_pid() == main
    assert "restarting the miner; running jobs continue" in install()
    pid = machine.wait_new_main(main)
    assert str(CURRENT.resolve()) in Path(f"/proc/{pid}/cmdline").read_text()


@ONE
def test_who_may_look_reads_no_token(machine: Machine) -> None:
    machine.start()
    run("useradd", "--system", "--groups", "aitbc-view", "looker")
    try:
        looker = ("runuser", "-u", "looker", "--")
        assert "up " in run(*looker, "aitbc-minerctl", "status")
        assert "only root and the group aitbc-admin" in run(*looker, "aitbc-minerctl", "drain", check=False)
        for secret in (ETC / "token", ETC / "config.yaml"):
            assert "Permission denied" in run(*looker, "cat", secret, check=False)
        run("usermod", "-aG", "aitbc", "looker")
        assert "gpasswd -d looker aitbc" in install()
    finally:
        run("userdel", "looker")


def _used() -> str:
    return "".join(_text(path) for path in Path("/proc").glob("[0-9]*/maps"))


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""  # a process that has ended meanwhile


@ONE
def test_what_cannot_be_made_leaves_the_old_version(installed: None, tmp_path: Path) -> None:
    had = files(), version()
    broken = tmp_path / "aitbc_miner-0.1.0-py3-none-any.whl"
    broken.write_bytes(b"no wheel")
    done = subprocess.run(
        ["/src/tools/install", "--upgrade", "--wheels", tmp_path], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "cannot install the packages: see pip's error above" in done.stderr
    assert "the previous installation is unchanged" in done.stderr
    assert (files(), version()) == had


def test_uninstalled_only_configuration_and_records_are_left(
    machine: Machine, before: tuple[set[str], str]
) -> None:
    machine.start()
    machine.submit(machine.script("lost", hold(machine.marks / "never")))
    pid = machine.running("lost")
    # An account that the operator makes meanwhile is none of the installer's.
    run("groupadd", "--system", "aitbc-operators")
    install()
    users = accounts()
    install("--uninstall")
    assert not Path("/proc", str(pid)).exists()
    new = files() - before[0]
    kept = {path for path in new if path.startswith((str(ETC.parent), str(STATE.parent)))}
    assert new - kept - BACKUPS == set()
    assert str(ETC / "config.yaml") in kept
    assert str(machine.jobs / "lost" / "outcome.json") in kept
    assert before[0] - files() == set()
    # The files are theirs, and must be nobody else's.
    assert accounts() == users
    assert [str(path) for path in Path("/run").rglob("*aitbc*")] == []
    assert machine.remains() == []
    install("--uninstall", "--purge")
    run("groupdel", "aitbc-operators")
    assert accounts() == before[1]
    assert not ETC.exists()
    assert not STATE.exists()
