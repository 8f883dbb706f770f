"""The installer, on a machine of its own: refused, interrupted at every step, upgraded, with new samples."""

import itertools
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.node.installing import FakeMachine, fake_machine
from tools.lib.local_node import wait_until

pytestmark = pytest.mark.xfail(os.geteuid() != 0, reason="only root can install", strict=True)
CONFIG = "coordinator: {base_url: https://coordinator.test/api/v1}\n"
ETC = "/etc/aitbc/miner"
WAIT_S = 60.0


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[FakeMachine]:
    with fake_machine(tmp_path) as made:
        yield made


def configure(machine: FakeMachine, text: str = CONFIG) -> None:
    machine.sh(f'mkdir -p {ETC}; printf %s "$1" >{ETC}/config.yaml', text)


def installed(machine: FakeMachine, version: str = "1.0") -> Path:
    """Have a version installed and running."""
    configure(machine)
    checkout = machine.checkout(version)
    machine.install(checkout)
    assert machine.running() == version
    return checkout


def test_what_run_would_refuse_stops_an_upgrade_before_the_switch(machine: FakeMachine) -> None:
    installed(machine)
    units = machine.sh("sha256sum /usr/lib/systemd/system/aitbc*; readlink /usr/lib/aitbc-miner/current")
    configure(machine, CONFIG + "# refused\n")
    said = machine.install(machine.checkout("2.0"), "--upgrade", check=False)
    assert "config.yaml:1: refused" in said
    assert "2.0" in said
    assert "not installed; the previous installation is unchanged\nstatus 1\n" in said
    assert (
        machine.sh("sha256sum /usr/lib/systemd/system/aitbc*; readlink /usr/lib/aitbc-miner/current") == units
    )
    assert machine.running() == "1.0"
    configure(machine)
    assert "upgrading from 1.0+" in machine.install(machine.checkout("2.0"), "--upgrade")
    assert machine.running() == "2.0"


def test_a_coordinator_that_is_away_stops_no_upgrade_and_the_services_environment_counts(
    machine: FakeMachine,
) -> None:
    installed(machine)
    configure(machine, CONFIG + "# unreachable, env:WORD\n")
    machine.install(machine.checkout("2.0"), "--upgrade")
    configure(machine, CONFIG + "# env:WORD\n")
    assert "does not accept the configuration" in machine.install(
        machine.checkout("3.0"), "--upgrade", check=False
    )
    machine.sh(f"printf '# secret\\n WORD=\"a word\"\\n' >{ETC}/environment")
    machine.install(machine.checkout("3.0"), "--upgrade")
    assert machine.running() == "3.0"


@pytest.mark.parametrize("verb", ["", "--upgrade"])
def test_a_miner_that_could_not_start_is_started_by_the_next_run(machine: FakeMachine, verb: str) -> None:
    options = [verb] if verb else []
    installed(machine)
    # As one that 0.1 upgraded to what refuses the configuration.
    configure(machine, CONFIG + "# refused\n")
    machine.sh("systemctl restart || true")
    assert machine.running() == "failed"
    configure(machine)
    assert "started" in machine.install(machine.checkout("1.0"), *options)
    assert machine.running() == "1.0"
    # Who stopped it by hand wants it stopped.
    machine.sh("systemctl stop")
    machine.install(machine.checkout("1.0"), *options)
    assert machine.running() == "inactive"


def test_the_direction_is_said(machine: FakeMachine) -> None:
    first = machine.install(machine.checkout("1.10"))
    assert "installing 1.10+" in first
    assert "downgrading from 1.10+" in machine.install(machine.checkout("1.9"), "--upgrade")
    other = machine.install(machine.checkout("1.9", more="# another build\n"), "--upgrade")
    assert "changing from 1.9+" in other
    assert "making 1.9+" in machine.install(machine.checkout("1.9", more="# another build\n"), "--upgrade")
    assert "is installed already" in machine.install(machine.checkout("1.9", more="# another build\n"))


STEPS = [
    "install_node: make_users*", "install_node: note_owed*", "place: mv*", "install_node: settle*",
    "install_node: switch_version*", "link: mv*", "install_node: take_units*",
    "start_or_restart: systemctl restart*", "start_or_restart: rm*", "install_node: touch*",
]  # fmt: skip


def test_killed_at_any_step_the_next_run_makes_it_good(machine: FakeMachine) -> None:
    """What is there is whole at any moment, and what ran runs again, from the version that is installed."""
    installed(machine, "1.0")
    versions = itertools.cycle(["2.0", "1.0"])
    for step, version in zip(STEPS, versions, strict=False):
        new, old = machine.checkout(version), machine.checkout({"1.0": "2.0", "2.0": "1.0"}[version])
        machine.install(new, "--upgrade", check=False, BASH_ENV="/run/fake/hook", KILL_AT=step)
        machine.sh("rm /run/fake/killed")
        for unit in old.glob("systemd/*.service"):
            there = machine.sh(f"cat /usr/lib/systemd/system/{unit.name}")
            assert there in {unit.read_text(), (new / "systemd" / unit.name).read_text()}, step
        machine.sh("test -s /usr/lib/aitbc-miner/current/fingerprint; test -x /usr/bin/aitbc-miner")
        assert machine.running() in {"1.0", "2.0"}, step
        owed = "owed" in machine.sh("ls /usr/lib/aitbc-miner")
        said = machine.install(new)
        if not owed and machine.running() != version:
            # It had not come as far as to change anything, and `install` leaves running what runs.
            assert "the old version still runs" in said, step
            machine.install(new, "--upgrade")
        assert machine.running() == version, (step, said)
        places = "/usr/lib/aitbc-miner /usr/lib/systemd/system /usr/bin"
        found = machine.sh(f"ls {places}; ls /usr/lib/aitbc-miner/versions | wc -l")
        assert "aitbc-new" not in found, step
        assert "owed" not in found, step
        assert found.endswith("\n1\n"), step


@pytest.mark.parametrize("name", ["TERM", "INT", "HUP"])
def test_ended_by_a_signal_it_says_where_things_stand_and_ends_pip(machine: FakeMachine, name: str) -> None:
    installed(machine)
    install = machine.checkout("2.0") / "tools" / "install"
    # A background process of a shell ignores SIGINT, one below nohup SIGHUP; bash cannot trap these.
    start = (
        "touch /run/fake/hang; env --default-signal=TERM,INT,HUP $1 --upgrade >/run/fake/said 2>&1"
        " </dev/null & echo $! >/run/fake/installer"
    )
    machine.sh(start, str(install))
    wait_until(lambda: machine.sh("ls /run/fake/hanging", check=False).startswith("/run"), WAIT_S, 0.05)
    machine.sh(f"kill -{name} $(cat /run/fake/installer)")
    gone = "[ ! -e /proc/$(cat /run/fake/installer) ] && [ ! -e /proc/$(cat /run/fake/hanging) ]"
    wait_until(lambda: machine.sh(gone, check=False) == "", WAIT_S, 0.05)
    said = machine.sh("cat /run/fake/said")
    assert f"ended by SIG{name}\n" in said
    assert said.endswith("not installed; the previous installation is unchanged\n")
    assert machine.sh("ls /usr/lib/aitbc-miner/versions | wc -l").strip() == "1"
    assert machine.running() == "1.0"


def test_a_full_disk_leaves_whole_files(machine: FakeMachine) -> None:
    installed(machine)
    units = "/usr/lib/systemd/system"
    before = machine.sh(f"cat {units}/aitbc-miner.service")
    # No room for a whole unit.
    machine.sh(f"mount -t tmpfs -o size=8k tmpfs {units}; head -c 4000 /dev/zero >{units}/aitbc.slice")
    said = machine.install(machine.checkout("2.0"), "--upgrade", check=False)
    assert f"cannot write {units}/aitbc-miner.service" in said
    assert "not finished" in said
    assert machine.sh(f"ls {units}").split() == ["aitbc.slice"]
    machine.sh(f"umount {units}")
    assert machine.sh(f"cat {units}/aitbc-miner.service") == before
    assert machine.running() == "1.0"
    machine.install(machine.checkout("2.0"))
    assert machine.running() == "2.0"


def test_new_samples_arrive_changed_ones_stay_removed_ones_stay_away(machine: FakeMachine) -> None:
    old = machine.checkout("1.0")
    installed(machine)
    machine.sh(
        f"echo mine >{ETC}/allowlist.d/gzip.yaml; rm {ETC}/allowlist.d/ffmpeg.yaml; rm -r {ETC}/slots.d"
    )
    samples = ("services.d/new.yaml", "tasks/new.py", "slots.d/new.sample")
    new = machine.checkout("2.0", samples=samples)
    said = machine.install(new, "--upgrade")
    assert f"new sample: {ETC}/services.d/new.yaml" in said
    assert "gzip" not in said
    assert machine.sh(f"cat {ETC}/allowlist.d/gzip.yaml") == "mine\n"
    listed = machine.sh(f"ls {ETC} {ETC}/allowlist.d /usr/local/lib/aitbc/miner/tasks")
    assert "new.py" in listed
    assert "ffmpeg" not in listed
    assert "slots.d" not in listed
    # Removed, it stays away, also over a version that did not know it.
    machine.sh(f"rm {ETC}/services.d/new.yaml")
    machine.install(old, "--upgrade")
    machine.install(new, "--upgrade")
    assert "new.yaml" not in machine.sh(f"ls {ETC}/services.d")


def test_a_machine_of_0_1_gets_the_new_samples_and_no_others(machine: FakeMachine) -> None:
    installed(machine)
    # It noted its directories only, and had its samples among its documents.
    machine.sh(f"sed -i '/^sample /d' /var/lib/aitbc/made-here; rm {ETC}/allowlist.d/ffmpeg.yaml")
    machine.install(machine.checkout("2.0", samples=("allowlist.d/new.yaml",)), "--upgrade")
    listed = machine.sh(f"ls {ETC}/allowlist.d").split()
    assert "new.yaml" in listed
    assert "ffmpeg.yaml" not in listed


def test_a_sample_that_does_not_go_with_the_configuration_is_left_out(machine: FakeMachine) -> None:
    installed(machine)
    samples = ("allowlist.d/twice.yaml", "services.d/new.yaml")
    said = machine.install(machine.checkout("2.0", samples=samples), "--upgrade")
    assert "twice.yaml:1: said twice" in said
    assert (
        f"samples not installed, because they would cause the faults above: {ETC}/allowlist.d/twice" in said
    )
    assert machine.running() == "2.0"
    assert "twice" not in machine.sh(f"ls {ETC}/allowlist.d")


def test_members_of_the_group_that_reads_the_token_are_named(machine: FakeMachine) -> None:
    installed(machine)
    machine.sh("useradd ann; usermod -aG aitbc ann")
    said = machine.install(machine.checkout("1.0"))
    assert "ann is in the group aitbc and can read the token" in said
    assert "gpasswd -d ann aitbc; usermod -aG aitbc-view ann" in said
    assert "ann" in machine.sh("getent group aitbc")


def test_nobody_but_root_can_hold_the_installer_up(machine: FakeMachine) -> None:
    installed(machine)
    hold = "flock {} sleep 1000 >/dev/null 2>&1 </dev/null & until ! flock -n {} true; do sleep 0.01; done"
    for place in ("/usr/lib", "/usr", "/run", "/usr/lib/aitbc-miner"):
        machine.sh(hold.replace("{}", place))
    checkout, lock = machine.checkout("1.0"), "/run/aitbc-miner-install.lock"
    assert "installed already" in machine.install(checkout)
    assert machine.sh(f"stat -c '%a %U' {lock}").strip() == "600 root"
    machine.sh(hold.replace("{}", lock))
    assert "another tools/install is running" in machine.install(checkout, check=False)
