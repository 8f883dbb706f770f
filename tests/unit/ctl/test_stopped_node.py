"""What `aitbc-minerctl` tells of a node that does not run."""

import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from aitbc_miner.errors import ErrorCode
from aitbc_miner.jobs import Outcome, State, StateRecord
from aitbc_miner.store.database import Database
from aitbc_miner.store.ledger import Ledger, account_of
from aitbc_miner.store.records import PASSABLE, Records
from aitbc_miner.util import clock

DEADLINE_S = 30.0
SERVICE = 60_124 if os.geteuid() == 0 else os.geteuid()


class Site:
    """The files that a node has left: a job that failed, and one that had not started."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.config, self.jobs, self.database = (
            root / "config.yaml",
            root / "jobs",
            root / "state" / "queue.db",
        )
        self.keys = {
            "coordinator": {"base_url": "http://127.0.0.1:9/api", "auth_token": "env:MINER_AUTH"},
            "workspace": {"root": str(self.jobs)},
            "queue": {"path": str(self.database)},
            "control": {"socket": str(root / "run" / "control.sock")},
        }
        self.config.write_text(yaml.safe_dump(self.keys))
        self.jobs.mkdir(mode=PASSABLE)
        records = Records(self.jobs)
        for name in ("done", "waits"):
            manifest = {"job_id": name, "runner": "cli", "command": "true"}
            records.create(name, json.dumps(manifest).encode(), runner="cli")
        failed = Outcome(job_id="done", code=ErrorCode.E_EXIT, message="exit status 3", slot="cpu0")
        with records.open("done") as job:
            job.write_outcome(failed)
            state = job.write_state(StateRecord("done", State.FAILED, runner="cli", slot="cpu0"))
            (self.jobs / "done" / "logs").mkdir(mode=0o755)
            (self.jobs / "done" / "logs" / "exec.log").write_text("what it said\n")
        self.database.parent.mkdir()
        database = Database(self.database)
        Ledger(database).enter(account_of(failed, state, "cli", "accepted"))
        database.close()
        if os.geteuid() == 0:
            for path in (
                self.jobs,
                *self.jobs.rglob("*"),
                self.database.parent,
                *self.database.parent.rglob("*"),
            ):
                os.chown(path, SERVICE, SERVICE)

    def ctl(self, *words: str, config: Path | None = None) -> subprocess.CompletedProcess[str]:
        socket, config = self.root / "run" / "control.sock", config or self.config
        command = [
            sys.executable,
            "-m",
            "aitbc_miner.ctl.main",
            "--socket",
            str(socket),
            "--config",
            str(config),
        ]
        return subprocess.run(
            [*command, *words], capture_output=True, text=True, timeout=DEADLINE_S, check=False
        )


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    # What comes later is later by a millisecond at least.
    times = itertools.count()
    monkeypatch.setattr(clock, "wall", lambda: f"2026-01-01T00:00:00.{next(times):03}Z")
    # Not below tmp_path, which only its owner can pass.
    with tempfile.TemporaryDirectory() as directory:
        Path(directory).chmod(0o755)
        yield Site(Path(directory))


def files(site: Site) -> dict[str, int]:
    return {str(path): path.lstat().st_mtime_ns for path in site.root.rglob("*") if path.is_file()}


def test_jobs_records_logs_and_history_are_on_disk(site: Site) -> None:
    before = files(site)
    jobs = site.ctl("jobs")
    assert jobs.returncode == 0, jobs.stderr
    assert "no miner runs at" in jobs.stderr
    assert [line.split()[:2] for line in jobs.stdout.splitlines()[1:]] == [
        ["waits", "PULLED"],
        ["done", "FAILED"],
    ]
    assert "E_EXIT exit status 3" in jobs.stdout
    assert site.ctl("jobs", "--state", "pulled").stdout.split()[5] == "waits"
    assert site.ctl("logs", "done").stdout == "what it said\n"
    assert site.ctl("logs", "-f", "done").stdout == "what it said\n"
    job = json.loads(site.ctl("--json", "job", "done").stdout)
    assert (job["job"]["code"], job["outcome"]["message"]) == ("E_EXIT", "exit status 3")
    history = site.ctl("history")
    assert history.returncode == 0, history.stderr
    assert "E_EXIT" in history.stdout
    assert files(site) == before, "nothing is written"


def test_what_only_a_running_node_can_do(site: Site) -> None:
    for words in (["status"], ["drain"], ["cancel", "done"], ["allow", "--", "ls"]):
        done = site.ctl(*words)
        assert (done.returncode, done.stdout) == (69, "")
        assert "cannot reach the miner" in done.stderr


def test_another_nodes_files_are_not_shown(site: Site) -> None:
    other = site.root / "other.yaml"
    other.write_text(yaml.safe_dump({**site.keys, "control": {"socket": "/run/other.sock"}}))
    for config in (other, site.root / "nowhere.yaml"):
        assert site.ctl("jobs", config=config).returncode == 69


def test_a_job_that_is_not_there(site: Site) -> None:
    done = site.ctl("job", "nothing")
    assert (done.returncode, done.stdout) == (1, "")
    assert "cannot open job nothing: this node has no such job; see `aitbc-minerctl jobs`" in done.stderr


@pytest.mark.xfail(os.geteuid() != 0, reason="only root can become another user", strict=True)
def test_who_may_not_read_is_told(site: Site) -> None:
    command = [
        sys.executable,
        "-m",
        "aitbc_miner.ctl.main",
        "--socket",
        str(site.root / "run" / "control.sock"),
    ]
    command += ["--config", str(site.config)]
    for verb, mode in (("jobs", 0o644), ("history", 0o644), ("jobs", 0o640)):
        site.config.chmod(mode)
        done = subprocess.run(
            [*command, verb],
            capture_output=True,
            text=True,
            timeout=DEADLINE_S,
            check=False,
            user=60_123,
            group=60_123,
            extra_groups=[],
        )
        assert done.returncode == 77, (verb, done.stderr)
        assert "use sudo" in done.stderr
