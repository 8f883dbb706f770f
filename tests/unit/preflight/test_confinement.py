"""Where slots' groups are made, and what is said where they cannot be."""

from pathlib import Path
from typing import Any

import pytest

from aitbc_miner.cgroup.delegation import LEAF
from aitbc_miner.cgroup.group import CgroupError, Mount
from aitbc_miner.config.settings import CgroupSection, Config, CoordinatorSection
from aitbc_miner.preflight import confinement
from aitbc_miner.preflight.confinement import Cgroups, ConfinementError, find_cgroups, take_cgroups

COORDINATOR = CoordinatorSection(base_url="http://127.0.0.1:9/api", auth_token="env:MINER_AUTH")
ALL = "cpu memory pids"


def config(mode: str = "required") -> Config:
    return Config(coordinator=COORDINATOR, node_id="node-x", cgroup=CgroupSection(mode))  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def bare_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not in a container, wherever the tests run."""
    monkeypatch.setattr(confinement, "in_container", lambda: False)


def mounted(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *, here: str = ALL, offered: str = ALL, **changes: Any
) -> Path:
    """Make it seem that this process is in a cgroup with some controllers."""
    own = tmp_path / "own"
    own.mkdir()
    (own / "cgroup.controllers").write_text(here + "\n")
    fields: dict[str, Any] = {"hybrid": False, "writable": True, **changes}
    mount = Mount(str(tmp_path), tuple(offered.split()), **fields)
    monkeypatch.setattr(confinement, "find_mount", lambda: mount)
    monkeypatch.setattr(confinement, "own_group", lambda _: own)
    return own


def test_cgroups_that_are_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = mounted(monkeypatch, tmp_path)
    found = find_cgroups(config())
    assert (found.home, found.parent) == (own, own / "aitbc-miner-node-x")
    assert found.controllers == ("cpu", "memory", "pids")
    assert not found.missing
    assert not (own / "aitbc-miner-node-x").exists()


def test_under_systemd_slots_live_in_a_unit_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mounted(monkeypatch, tmp_path, here="")
    unit, slots = tmp_path / "aitbc-miner.service", tmp_path / "aitbc-miner-slots.service"
    for group in (unit, slots):
        group.mkdir()
        (group / "cgroup.controllers").write_text(ALL)
    monkeypatch.setattr(confinement, "own_group", lambda _: unit)
    found = find_cgroups(config())
    assert (found.home, found.parent, found.missing) == (slots, slots, [])
    (slots / "cgroup.controllers").unlink()
    slots.rmdir()
    # It works without, but no job outlives a restart then.
    found = find_cgroups(config())
    assert (found.home, found.parent) == (unit, unit / "aitbc-miner-node-x")
    assert found.missing == [
        "no unit aitbc-miner-slots.service runs beside aitbc-miner.service: "
        "a restart of the miner ends the running jobs; `systemctl start aitbc-miner-slots.service`, "
        "then restart the miner"
    ]


@pytest.mark.parametrize(
    ("here", "changes", "cause", "remedy"),
    [
        ("memory", {}, "no controller for cpu, pids in", "start the miner as systemd's service"),
        ("", {"hybrid": True}, "no controller for cpu, memory, pids in", "boot with systemd.unified_cgroup"),
        (ALL, {"writable": False}, "the miner may not write in", "start the miner as systemd's service"),
    ],
)
def test_cgroups_that_lack_something(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    here: str,
    changes: dict[str, Any],
    cause: str,
    remedy: str,
) -> None:
    mounted(monkeypatch, tmp_path, here=here, offered=here, **changes)
    found = find_cgroups(config("auto"))
    assert (found.parent is not None) is changes.get("writable", True)
    assert found.missing[0].startswith(cause)
    with pytest.raises(
        ConfinementError, match=f"^cannot limit jobs: {cause}.*; {remedy}.*cgroup.mode: auto$"
    ):
        find_cgroups(config())
    monkeypatch.setattr(confinement, "in_container", lambda: True)
    with pytest.raises(ConfinementError, match="let the container write its cgroups"):
        find_cgroups(config())


def test_cgroups_are_taken_or_done_without_as_the_mode_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = mounted(monkeypatch, tmp_path)
    prepared: list[Path] = []
    refused: dict[str, str] = {}

    def prepare(home: Path) -> dict[str, str]:
        prepared.append(home)
        return refused

    monkeypatch.setattr(confinement, "delegate", prepare)
    found = find_cgroups(config("auto"))
    assert take_cgroups(config("auto"), found) == found
    assert prepared == [own]
    refused["cpu"] = "cannot write '+cpu'"
    without = take_cgroups(config("auto"), found)
    assert without.controllers == ("memory", "pids")
    assert without.missing == ["cannot write '+cpu': limits of single processes apply where possible"]
    with pytest.raises(ConfinementError, match=r"cannot limit jobs: cannot write '.cpu'; start the miner as"):
        take_cgroups(config(), found)


def test_a_group_that_cannot_be_emptied_limits_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mounted(monkeypatch, tmp_path)

    def busy(home: Path) -> dict[str, str]:
        raise CgroupError("cannot write: busy")

    monkeypatch.setattr(confinement, "delegate", busy)
    found = find_cgroups(config())
    without = take_cgroups(config("auto"), found)
    assert (without.parent, without.controllers) == (found.parent, ())
    assert without.missing == ["cannot write: busy: limits of single processes apply where possible"]
    # With no controllers there is nothing to take.
    assert take_cgroups(config("auto"), without) is without
    with pytest.raises(ConfinementError, match="cannot limit jobs: cannot write: busy; start the miner as"):
        take_cgroups(config(), found)


def test_whoever_is_in_the_supervisors_leaf_counts_from_the_group_above_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = mounted(monkeypatch, tmp_path)
    monkeypatch.setattr(confinement, "own_group", lambda _: own / LEAF)
    assert find_cgroups(config()).parent == own / "aitbc-miner-node-x"


def test_no_cgroups_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    off = find_cgroups(config("off"))
    assert off == Cgroups(None, (), ["cgroup.mode is off: only limits of single processes apply"])
    monkeypatch.setattr(confinement, "find_mount", lambda: None)
    missing = find_cgroups(config("auto")).missing
    assert missing == ["the machine has no cgroup2 mount: only limits of single processes apply"]
    with pytest.raises(ConfinementError, match=r"no cgroup2 mount; boot with systemd\.unified_cgroup"):
        find_cgroups(config())


def test_a_group_outside_of_what_the_mount_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mounted(monkeypatch, tmp_path)

    def outside(_: Mount) -> Path:
        raise CgroupError("cannot find our own cgroup: /x is outside")

    monkeypatch.setattr(confinement, "own_group", outside)
    assert find_cgroups(config("auto")).parent is None
    with pytest.raises(ConfinementError, match="cannot limit jobs: cannot find our own cgroup"):
        find_cgroups(config())
