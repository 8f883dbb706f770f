"""`aitbc-minerctl sandbox`: what an operator is shown of a job's surroundings."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import aitbc_miner
from aitbc_miner.errors import EXIT_CONFIG, EXIT_NOT_PERMITTED, EXIT_USAGE
from tests.node.test_spawn import ROOT, UID

needs_root = pytest.mark.xfail(not ROOT, reason="only root may try the sandbox", strict=True)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """Give a configuration with one slot."""
    (tmp_path / "slots.d").mkdir()
    slot = {"name": "cpu0", "kind": "cpu", "nice": 7, "rlimits": {"nofile": 333}}
    (tmp_path / "slots.d" / "s.yaml").write_text(yaml.safe_dump({"slots": [slot]}))
    path = tmp_path / "config.yaml"
    keys = {
        "node_id": "trial",
        "coordinator": {"base_url": "http://127.0.0.1:1", "auth_token": "env:MINER_AUTH"},
        "slots_dir": str(tmp_path / "slots.d"),
        "privileges": {"mode": "auto"},
        "cgroup": {"mode": "auto"},
    }
    path.write_text(yaml.safe_dump(keys))
    return path


Done = subprocess.CompletedProcess[str]
CTL = "import sys; sys.path.insert(0, {root!r}); from aitbc_miner.ctl.main import main; sys.exit(main())"


def sandbox(config: Path, *command: str, slot: str = "cpu0", **how: Any) -> Done:
    root = str(Path(aitbc_miner.__file__).parents[1])
    options = ["sandbox", "--slot", slot, "--config", str(config), "--", *command]
    done: Done = subprocess.run(
        [sys.executable, "-c", CTL.format(root=root), *options],
        input="typed\n",
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        **how,
    )
    return done


@needs_root
def test_a_command_sees_what_a_job_sees(config: Path) -> None:
    done = sandbox(config, "/bin/sh", "-c", "cat; pwd; ls /job; id -u; nice; ulimit -n; env; exit 5")
    assert done.returncode == 5, done.stderr
    typed, place, *own = done.stdout.splitlines()
    assert (typed, place, own[:3]) == ("typed", "/job/work", ["output", "tmp", "work"])
    assert int(own[3]) != 0
    assert own[4:6] == ["7", "333"]
    assert {"AITBC_SLOT=cpu0", "AITBC_OUTPUT_DIR=/job/output", "TMPDIR=/job/tmp"} <= {*own}
    assert "only process limits hold the command" in done.stderr


@needs_root
def test_how_it_ended_is_told_as_a_shell_would(config: Path) -> None:
    assert sandbox(config, "/bin/sh", "-c", "kill -9 $$").returncode == 137
    assert sandbox(config, "/no/such/program").returncode == 127


@needs_root
def test_what_is_wrong_is_said(config: Path) -> None:
    unknown = sandbox(config, "true", slot="gpu7")
    assert (unknown.returncode, unknown.stderr) == (
        EXIT_USAGE,
        "aitbc-minerctl: cannot try the sandbox: no slot 'gpu7'; name a slot: cpu0\n",
    )
    config.write_text("node: 1\n")
    assert sandbox(config, "true").returncode == EXIT_CONFIG


def test_nobody_but_root_may(config: Path) -> None:
    how: dict[str, Any] = (
        {"user": UID, "group": UID, "extra_groups": [], "cwd": "/"} if os.geteuid() == 0 else {}
    )
    done = sandbox(config, "true", **how)
    assert done.returncode == EXIT_NOT_PERMITTED
    assert "cannot try the sandbox: this needs root; use sudo" in done.stderr
