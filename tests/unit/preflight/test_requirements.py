"""What `run` refuses to start with: the list that `check` goes through as well."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from msgspec.structs import replace

from aitbc_miner.config.settings import (
    Config,
    ControlSection,
    CoordinatorSection,
    LoggingSection,
    QueueSection,
    WorkspaceSection,
)
from aitbc_miner.preflight import requirements
from aitbc_miner.preflight.requirements import NodePlace, RequirementError, require, resolved, unmet
from aitbc_miner.sandbox.users import Identities, Identity

Change = Callable[[Path, Config], Config]


@pytest.fixture
def config(tmp_path: Path) -> Config:
    tmp_path.chmod(0o755)
    return Config(
        CoordinatorSection("https://c.example", "env:T"),
        # A machine that has never been booted has no name of its own yet.
        node_id="node-1",
        workspace=WorkspaceSection(tmp_path / "jobs"),
        queue=QueueSection(path=tmp_path / "state" / "queue.db"),
        control=ControlSection(tmp_path / "run" / "control.sock"),
        logging=LoggingSection(path=tmp_path / "node.log"),
    )


def found(config: Config, identities: Identities | None = None, slots: int = 1) -> list[tuple[str, str]]:
    return list(unmet(NodePlace(config, identities, slots)))


def file_at(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("something")
    return path


def link_at(path: Path) -> Path:
    path.symlink_to("gone")
    return path


def test_a_good_place_needs_nothing_more(config: Config) -> None:
    assert found(config) == []
    require(NodePlace(config, None, 1))


FAULTS: dict[str, tuple[Change, str, str]] = {
    "no log directory": (
        lambda top, c: replace(c, logging=LoggingSection(path=top / "gone" / "node.log")),
        "logging.path",
        "the directory {top}/gone does not exist; `mkdir -p {top}/gone`, or name another file",
    ),
    "a log that is a directory": (
        lambda top, c: replace(c, logging=LoggingSection(path=top)),
        "logging.path",
        "{top} is a directory; name a file",
    ),
    "a workspace below a file": (
        lambda top, c: replace(c, workspace=WorkspaceSection(file_at(top / "file") / "jobs")),
        "workspace.root",
        "{top}/file is not a directory; name another path",
    ),
    "a workspace that is a file": (
        lambda top, c: replace(c, workspace=WorkspaceSection(file_at(top / "file"))),
        "workspace.root",
        "{top}/file is not a directory; name another path",
    ),
    "a workspace behind a link that leads nowhere": (
        lambda top, c: replace(c, workspace=WorkspaceSection(link_at(top / "link"))),
        "workspace.root",
        "{top}/link is not a directory; name another path",
    ),
    "a database that is a directory": (
        lambda top, c: replace(c, queue=QueueSection(path=top / "run")),
        "queue.path",
        "{top}/run is a directory; name a file in its own directory",
    ),
    "a socket that is a file": (
        lambda top, c: replace(c, control=ControlSection(file_at(top / "run" / "control.sock"))),
        "control.socket",
        "{top}/run/control.sock is not a socket; remove the file, or name another path",
    ),
}


@pytest.mark.parametrize("case", FAULTS)
def test_each_fault_names_its_key_and_its_remedy(case: str, config: Config, tmp_path: Path) -> None:
    change, key, message = FAULTS[case]
    (tmp_path / "run").mkdir()
    assert found(change(tmp_path, config)) == [(key, message.format(top=tmp_path))]


def test_a_directory_cannot_be_made_on_a_full_disk(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    config.workspace.root.mkdir()
    monkeypatch.setattr(requirements, "_full", lambda _: True)
    faults = dict(found(config))
    assert list(faults) == ["queue.path", "logging.path", "control.socket"], "the workspace is there already"
    assert all("is full; free space there" in fault for fault in faults.values())
    assert [key for key, _ in requirements.full_disks(config)] == ["workspace.root", "queue.path"]


def test_a_disk_without_inodes_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.statvfs(tmp_path)
    none_left = os.statvfs_result((*real[:5], 1000, 0, 0, *real[8:]))
    monkeypatch.setattr(os, "statvfs", lambda _: none_left)
    assert requirements._full(tmp_path)


def test_a_directory_with_files_of_somebody_else_is_not_taken_for_the_nodes(config: Config) -> None:
    file_at(config.queue.path)
    identities = Identities(Identity(4242, 4243, "aitbc"), {}, [])
    ((key, fault),) = found(config, identities)
    assert key == "queue.path"
    assert f"`chown -R 4242:4243 {config.queue.path.parent}`" in fault


def test_slots_users_must_pass(config: Config, tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    job = Identity(4242, 4242, "aitbc-job-cpu0")
    faults = found(config, Identities(None, {"cpu0": job}, []))
    assert (
        "workspace.root",
        f"the slots' users cannot pass through {tmp_path}; chmod o+x {tmp_path}, or name another directory",
    ) in faults


def test_links_of_ours_are_followed_once(config: Config, tmp_path: Path) -> None:
    (tmp_path / "disk" / "deep").mkdir(parents=True)
    (tmp_path / "jobs").symlink_to("hop/deep")
    (tmp_path / "hop").symlink_to(tmp_path / "disk")
    (tmp_path / "run").symlink_to("../" + tmp_path.name + "/disk")
    config = resolved(config)
    assert config.workspace.root == tmp_path / "disk" / "deep"
    assert config.control.socket == tmp_path / "disk" / "control.sock"
    assert config.queue.path == tmp_path / "state" / "queue.db"


def test_a_link_of_somebody_else_is_not_followed(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "jobs").symlink_to("/etc")
    mine = os.geteuid()
    if mine == 0:
        os.chown(tmp_path / "jobs", 4242, 4242, follow_symlinks=False)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: mine + 1)
    with pytest.raises(
        RequirementError,
        match=r"^workspace.root: root does not follow the link .*/jobs of user id \d+; set workspace.root to",
    ):
        resolved(config)


def test_links_in_a_circle_end(config: Config, tmp_path: Path) -> None:
    (tmp_path / "jobs").symlink_to("jobs")
    with pytest.raises(RequirementError, match="more than 40 links"):
        resolved(config)


@pytest.mark.parametrize(
    "said", ["uninitialized", "", "0" * 32, "f" * 32, "4C54970A6E7F" * 2, "abc", "g" * 32]
)
def test_a_machine_without_an_id_needs_a_name(
    said: str, config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "machine-id").write_text(said + "\n")
    monkeypatch.setattr(requirements, "read_machine_id", lambda: said)
    monkeypatch.setattr(requirements, "derive_node_id", lambda: config.node_id)
    ((key, fault),) = found(config)
    assert key == "node_id"
    assert "run `systemd-machine-id-setup`, or set node_id" in fault
    assert found(replace(config, node_id="mine")) == []
