"""The command line of the node: real processes for exit statuses, the checks also by themselves."""

import fcntl
import json
import os
import pty
import select
import socket
import struct
import subprocess
import sys
import tempfile
import termios
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from msgspec.structs import replace

from aitbc_miner import main
from aitbc_miner.cgroup.group import Mount
from aitbc_miner.config.document import decode_text
from aitbc_miner.config.settings import Config, load_config
from aitbc_miner.gpu.reader import NO_LIBRARY, GpuInfo, GpuList
from aitbc_miner.preflight import check, confinement
from aitbc_miner.preflight.check import Checker, may_read
from aitbc_miner.preflight.confinement import ConfinementError, find_cgroups, find_sandbox
from aitbc_miner.preflight.doctor import Finding, diagnose
from aitbc_miner.probe.machine import probe_machine
from aitbc_miner.runners import interpreter
from aitbc_miner.runners.interpreter import InterpreterError
from aitbc_miner.sandbox.users import Identity
from aitbc_miner.slots.reader import SlotFile
from aitbc_miner.util.build import build

DEADLINE_S = 30.0
TOKEN = "very-secret-token"
ROOT = Path(__file__).resolve().parents[2]
needs_root = pytest.mark.xfail(os.geteuid() != 0, reason="only root can become another user", strict=True)


class Site:
    """The files of a node in a directory, good as they are; `keys` is its config.yaml."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.path = root / "config.yaml"
        self.allowlist, self.slots, self.tasks = root / "allowlist.d", root / "slots.d", root / "tasks"
        for directory in (self.allowlist, self.slots, self.tasks):
            directory.mkdir(mode=0o755)
        (self.allowlist / "true.yaml").write_text("command: {path: /usr/bin/true}\n")
        (self.tasks / "one.py").write_text("def run(): return 1\n")
        self.jobs = root / "state" / "jobs"
        self.keys: dict[str, Any] = {
            "node_id": "node-x",
            "coordinator": {"base_url": "http://127.0.0.1:9/api", "auth_token": "env:MINER_AUTH"},
            "runners": {
                "cli": {"allowlist_dirs": [str(self.allowlist)]},
                "python": {"task_paths": [str(self.tasks)]},
            },
            "slots_dir": str(self.slots),
            "workspace": {"root": str(self.jobs)},
            "privileges": {"mode": "auto"},
            "sandbox": {"mode": "off"},
            "cgroup": {"mode": "off"},
            "queue": {"path": str(root / "state" / "queue.db")},
        }

    def write(self) -> Path:
        if not any(self.slots.iterdir()):
            (self.slots / "slots.yaml").write_text("derive: true\n")
        self.path.write_text(yaml.safe_dump(self.keys, sort_keys=False))
        return self.path

    def config(self) -> Config:
        config, faults, _ = load_config(self.write(), {})
        assert config, faults
        return config

    def checker(self, gpus: GpuList | None = None, **environ: str) -> Checker:
        found = gpus or GpuList(error=NO_LIBRARY, missing=True)
        checker = Checker(self.path, self.config(), environ or {"MINER_AUTH": TOKEN}, found)
        checker.check()
        return checker


@pytest.fixture
def site() -> Iterator[Site]:
    # Not below tmp_path, which only its owner can pass.
    with tempfile.TemporaryDirectory() as directory:
        Path(directory).chmod(0o755)
        yield Site(Path(directory))


def run(*words: str, **more: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("AITBC_")}
    return subprocess.run(
        [sys.executable, "-m", "aitbc_miner.main", *words],
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        env=kept | {"PYTHONPATH": str(ROOT), "LC_ALL": "C.UTF-8", "MINER_AUTH": TOKEN} | more,
        check=False,
    )


@pytest.mark.parametrize("words", [["probe"], ["doctor"]])
def test_a_reader_that_has_ended_ends_the_command_quietly(words: list[str]) -> None:
    ours, theirs = os.pipe()
    os.close(ours)
    command = [
        sys.executable,
        "-c",
        "import sys; from aitbc_miner.main import start; sys.exit(start())",
        *words,
    ]
    done = subprocess.run(command, stdout=theirs, stderr=subprocess.PIPE, text=True, timeout=60, check=False)
    os.close(theirs)
    assert (done.returncode, done.stderr) == (141, "")


def fault_texts(checker: Checker) -> str:
    return "\n".join(map(str, checker.faults))


# --- run, usage --------------------------------------------------------------------------------------------


def test_version() -> None:
    done = run("--version")
    assert (done.returncode, done.stdout) == (0, f"aitbc-miner {build()}\n")


@pytest.mark.parametrize("words", [[], ["fly"], ["run", "now"], ["check", "--json"]])
def test_usage(words: list[str]) -> None:
    done = run(*words)
    assert done.returncode == 2
    assert "usage: aitbc-miner" in done.stderr


@pytest.mark.parametrize("verb", ["run", "check", "slots"])
def test_every_fault_of_the_configuration_is_told(tmp_path: Path, verb: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("coordinator: {base_url: ftp://x, auth_tokn: hunter2}\nlogging: {level: loud}\n")
    done = run(verb, "--config", str(path))
    assert (done.returncode, done.stdout) == (78, "")
    for part in ("config.yaml:1: coordinator.base_url:", "did you mean auth_token?", ":2: logging.level:"):
        assert part in done.stderr
    assert "hunter2" not in done.stderr


def test_no_configuration(tmp_path: Path) -> None:
    done = run("run", "--config", str(tmp_path / "none.yaml"))
    assert done.returncode == 78
    assert done.stderr.splitlines() == [
        f"{tmp_path}/none.yaml: cannot read this file: No such file or directory",
        "name the configuration with --config; etc/config.yaml is an example",
    ]


def test_run_gives_the_node_its_configuration_and_its_exit_status(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[tuple[Config, list[str]]] = []

    def run_node(path: Path, config: Config, warnings: list[str]) -> int:
        given.append((config, warnings))
        return 7

    monkeypatch.setattr("aitbc_miner.node.run_node", run_node)
    site.keys["services_dir"] = "/etc/other"
    monkeypatch.setattr(sys, "argv", ["aitbc-miner", "run", "--config", str(site.write())])
    assert main.main() == 7
    assert given[0][0].node_id == "node-x"
    assert "services_dir has no effect" in given[0][1][0]


# --- check -------------------------------------------------------------------------------------------------


def test_check_says_ok_and_changes_nothing(site: Site) -> None:
    # A node of its own: another test's may be at work beside it, and has a group.
    site.keys |= {"node_id": "node-checked", "cgroup": {"mode": "auto"}}
    site.write()
    before = sorted(site.root.rglob("*"))
    done = run("check", "--config", str(site.path))
    assert done.returncode == 0, done.stderr
    assert "ok: node node-checked, coordinator http://127.0.0.1:9/api" in done.stdout
    assert "1 commands allowed: true" in done.stdout
    assert TOKEN not in done.stdout + done.stderr
    assert sorted(site.root.rglob("*")) == before
    cgroups = find_cgroups(site.config())
    assert cgroups.parent is None or not cgroups.parent.exists()


def test_check_warns_of_what_a_sandbox_would_not_have_or_others_could_change(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(confinement, "why_not", lambda _: None)
    with tempfile.TemporaryDirectory(dir="/var/tmp") as directory:  # jobs may see what is there
        Path(directory).chmod(0o755)
        warns_of_binds(Site(Path(directory)))


def warns_of_binds(site: Site) -> None:
    program = site.root / "tool"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    (site.allowlist / "tool.yaml").write_text(f"command: {{path: {program}}}\n")
    link = site.root / "link"
    link.symlink_to("/usr/bin/true")
    (site.allowlist / "link.yaml").write_text(f"command: {{path: {link}}}\n")
    (site.allowlist / "bin.yaml").write_text("command: {path: /bin/cat}\n")
    open_to_all = site.root / "open"
    open_to_all.mkdir()
    open_to_all.chmod(0o777)
    binds = [str(site.root / "none"), str(open_to_all), "/usr/share"]
    slot = {"name": "cpu0", "kind": "cpu", "binds": binds}
    (site.slots / "s.yaml").write_text(yaml.safe_dump({"slots": [slot]}))
    site.keys["sandbox"] = {"mode": "required"}
    told = "\n".join(site.checker().warnings)
    assert f"jobs do not see {program} in their sandbox" in told
    assert f"slot cpu0: binds: {site.root / 'none'}: cannot read the path: No such file" in told
    assert f"slot cpu0: binds: {open_to_all}: " in told
    assert "/usr/share" not in told
    assert f"jobs do not see {link} in their sandbox" in told
    assert "see /usr/bin/true" not in told
    assert "see /bin/cat" not in told
    seeing = {"name": "cpu1", "kind": "cpu", "binds": [str(site.root)]}
    (site.slots / "s.yaml").write_text(yaml.safe_dump({"slots": [slot, seeing]}))
    assert f"jobs of cpu0 do not see {program}" in "\n".join(site.checker().warnings)
    (site.slots / "s.yaml").write_text(yaml.safe_dump({"slots": [seeing]}))
    assert "do not see" not in "\n".join(site.checker().warnings)
    (site.slots / "s.yaml").write_text(yaml.safe_dump({"slots": [slot]}))
    site.keys["sandbox"] = {"mode": "off"}
    assert "do not see" not in "\n".join(site.checker().warnings)


def test_check_tells_all_faults_at_once_with_file_line_and_key(site: Site) -> None:
    (site.allowlist / "bad.yaml").write_text("command: {path: relative}\n")
    (site.slots / "s.yaml").write_text(
        "slots:\n- {name: a, kind: cpu, cpus: '9000'}\n- {name: a, kind: gpu}\n"
    )
    (site.tasks / "one.py").chmod(0o666)
    done = run("check", "--config", str(site.write()), MINER_AUTH="")
    assert (done.returncode, done.stdout) == (78, "")
    lines = site.path.read_text().splitlines()
    token = next(n for n, line in enumerate(lines, 1) if "auth_token" in line)
    for part in (
        f"{site.allowlist}/bad.yaml:1: command.path:",
        f"{site.slots}/s.yaml:3: slots[1].gpu: this key is missing",
        f"{site.path}:{token}: coordinator.auth_token: cannot read the credential env:MINER_AUTH: "
        "the source is empty; put the token there",
        f"runners.python.task_paths: cannot trust {site.tasks}: {site.tasks}/one.py",
    ):
        assert part in done.stderr


def test_slots_are_compared_with_the_gpus_that_are_there(site: Site) -> None:
    (site.slots / "s.yaml").write_text(
        "slots:\n- {name: g, kind: gpu, gpu: GPU-1}\n- {name: c, kind: cpu, cpus: '9000'}\n"
    )
    none = site.checker()
    assert "s.yaml:2: slots[0].gpu: there is no GPU GPU-1; GPUs of this machine: none" in fault_texts(none)
    assert "s.yaml:3: slots[1].cpus: there is no CPU 9000" in fault_texts(none)
    one = site.checker(GpuList([GpuInfo(0, uuid="GPU-1", name="A"), GpuInfo(1, error="GPU 1 fell off")]))
    assert "gpu" not in fault_texts(one)
    assert "GPU 1 fell off" in one.warnings


def test_slots_are_derived_where_a_file_says_so(site: Site) -> None:
    checker = site.checker(GpuList([GpuInfo(0, uuid="GPU-1", name="A")]))
    assert not checker.faults
    assert "gpu0" in [spec.name for spec in checker.slots]


def test_the_machine_is_not_rented_out_by_mistake(site: Site) -> None:
    (site.slots / "slots.yml").write_text("slots: [{name: a, kind: cpu}]\n")
    checker = site.checker()
    assert "no file here ends in .yaml, only slots.yml, so the node has no slot" in fault_texts(checker)
    assert ", only slots.yml, so" in fault_texts(checker)
    assert any("slots.yml: not read" in warning for warning in checker.warnings)
    assert not checker.slots


def test_files_that_others_can_write_are_not_obeyed(site: Site) -> None:
    """An allowlist directory of mode 0777 let a stranger's entry in."""
    site.allowlist.chmod(0o777)
    (site.slots / "s.yaml").write_text("slots: [{name: a, kind: cpu}]\n")
    (site.slots / "s.yaml").chmod(0o664)
    checker = site.checker()
    assert not checker.commands
    mend = "correct it with chown or chmod"
    assert [str(fault) for fault in checker.faults] == [
        f"{site.slots}/s.yaml: cannot trust this file: {site.slots}/s.yaml can be written by others "
        f"(mode 0664); {mend}",
        f"{site.allowlist}: cannot trust this directory: {site.allowlist} can be written by others "
        f"(mode 0777); {mend}",
    ]
    site.write().chmod(0o666)
    config, faults, _ = load_config(site.path, {})
    assert config is None
    assert "config.yaml: cannot trust this file" in str(faults[0])


@needs_root
@pytest.mark.parametrize("key", ["control.socket", "logging.path"])
def test_root_writes_nothing_where_another_rules(site: Site, key: str) -> None:
    """In the service's directory root followed its links, and believed the list of workers it had forged."""
    place = site.root / "service" / "below"
    place.mkdir(parents=True)
    os.chown(place.parent, 60_123, 60_123)
    section, name = key.split(".")
    site.keys[section] = {name: str(place / "x")}
    told = f"{key}: cannot trust {place}/x: {place.parent} belongs to user id 60123"
    assert told in fault_texts(site.checker())
    done = run("run", "--config", str(site.path))
    assert done.returncode == 78
    assert told in done.stderr
    assert list(place.iterdir()) == []


def terminal_text(ours: int, until: bytes | None = None) -> bytes:
    """Give what a program wrote to its terminal: up to this, or to the program's end."""
    shown = b""
    while (until is None or until not in shown) and select.select([ours], [], [], DEADLINE_S * 2)[0]:
        try:
            shown += os.read(ours, 65536)
        except OSError:
            break
    return shown


def test_a_terminal_gets_log_lines_for_people(site: Site) -> None:
    ours, theirs = pty.openpty()
    site.keys["privileges"] = {"mode": "auto", "service_user": "nobody"}
    site.keys["cgroup"] = {"mode": "auto"}
    # Fails at its start, in the log: another has the control socket.
    place = site.root / "run"
    place.mkdir()
    site.keys["control"] = {"socket": str(place / "sock")}
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(place / "sock"))
        other.listen()
        command = [sys.executable, "-m", "aitbc_miner.main", "run", "--config", str(site.write())]
        child = subprocess.Popen(command, stderr=theirs, env={**os.environ, "MINER_AUTH": TOKEN})
        os.close(theirs)
        shown = terminal_text(ours, b"cannot start")
        child.wait(DEADLINE_S)
    os.close(ours)
    assert b" ERROR   supervisor " in shown, shown
    assert b"{" not in shown


@needs_root
def test_a_log_that_a_link_leads_away(site: Site) -> None:
    (site.root / "away").mkdir()
    os.chown(site.root / "away", 60_123, 60_123)
    (site.root / "log").symlink_to(site.root / "away" / "log")
    site.keys["logging"] = {"path": str(site.root / "log")}
    assert "away belongs to user id 60123" in fault_texts(site.checker())
    (site.root / "away" / "log").touch()
    assert "away belongs to user id 60123" in fault_texts(site.checker())
    site.keys["logging"] = {"path": "/dev/stderr"}
    assert "logging.path" not in fault_texts(site.checker())


def test_a_ca_file_without_a_certificate(site: Site) -> None:
    ca = site.path.parent / "ca.pem"
    ca.write_text("a certificate\n")
    site.keys["coordinator"]["ca_file"] = str(ca)
    assert f"coordinator.ca_file: cannot use {ca}: the file has no certificate; name" in fault_texts(
        site.checker()
    )


def test_a_ca_file_that_others_can_write(site: Site) -> None:
    ca = site.root / "ca.pem"
    ca.touch()
    ca.chmod(0o666)
    site.keys["coordinator"]["ca_file"] = str(ca)
    _, faults, _ = load_config(site.write(), {})
    assert "coordinator.ca_file: " in str(faults[0])
    assert "cannot trust this file" in str(faults[0])


def test_a_fault_of_an_overridden_key_names_the_variable(site: Site) -> None:
    checker = site.checker(AITBC_MINER_COORDINATOR__AUTH_TOKEN="env:MINER_AUTH")
    assert fault_texts(checker).startswith("AITBC_MINER_COORDINATOR__AUTH_TOKEN: coordinator.auth_token: ")


def test_what_may_be_meant_so_is_a_warning(site: Site) -> None:
    (site.allowlist / "none.yaml").write_text("command: {path: /opt/none/such}\n")
    site.keys["runners"]["python"]["task_paths"].append("/opt/none")
    site.keys["coordinator"]["auth_token"] = "credential:token"
    checker = site.checker()
    assert not checker.faults
    for part in (
        "/opt/none/such is not installed",
        "/opt/none does not exist",
        "cannot check credential:token here",
    ):
        assert any(part in warning for warning in checker.warnings), part


def test_no_runner_is_a_warning(site: Site) -> None:
    site.keys["runners"] = {"cli": {"enable": False}, "python": {"enable": False}}
    told = "no runner is enabled: this node takes no jobs; enable a runner in `runners`"
    assert told in site.checker().warnings


def test_a_task_path_that_is_no_directory(site: Site) -> None:
    site.keys["runners"]["python"]["task_paths"] = [str(site.tasks / "one.py")]
    assert "is no directory; name a directory of tasks" in fault_texts(site.checker())


def test_a_workspace_that_cannot_be(site: Site) -> None:
    site.keys["workspace"]["root"] = str(site.path / "below" / "a" / "file")
    assert "config.yaml is not a directory; name another path" in fault_texts(site.checker())


def test_a_workspace_that_we_may_not_make(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: mode == os.F_OK and Path(path).exists())
    assert f"cannot write in {site.root}; start as another user" in fault_texts(site.checker())


@needs_root
def test_a_workspace_that_the_slots_users_cannot_reach(site: Site) -> None:
    closed = site.root / "closed"
    closed.mkdir(mode=0o700)
    site.keys["workspace"]["root"] = str(closed / "jobs")
    assert f"the slots' users cannot pass through {closed}; chmod o+x {closed}" in fault_texts(site.checker())


@needs_root
def test_a_credential_that_only_root_can_read(site: Site) -> None:
    token = site.root / "token"
    token.write_text(TOKEN)
    token.chmod(0o600)
    site.keys["coordinator"]["auth_token"] = f"file:{token}"
    checker = site.checker()
    assert "coordinator.auth_token: the user aitbc cannot read" in fault_texts(checker)
    assert TOKEN not in fault_texts(checker)


@needs_root
def test_who_may_read(site: Site) -> None:
    user = Identity(60_999, 60_999, "nobody-here")
    site.path.touch(0o640)
    assert not may_read(str(site.path), user)
    os.chown(site.path, user.uid, -1)
    assert may_read(str(site.path), user)


@needs_root
def test_missing_users_are_a_fault_where_they_are_required(site: Site) -> None:
    site.keys["privileges"] = {"mode": "required", "service_user": "no-such-user"}
    assert "privileges.mode: cannot separate privileges: missing users: no-such-user" in fault_texts(
        site.checker()
    )


def mounted(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *, here: str, offered: str, writable: bool
) -> Path:
    """Make it seem that this process is in a cgroup with some controllers."""
    own = tmp_path / "own"
    own.mkdir()
    (own / "cgroup.controllers").write_text(here + "\n")
    mount = Mount(str(tmp_path), tuple(offered.split()), hybrid=False, writable=writable)
    monkeypatch.setattr(confinement, "find_mount", lambda: mount)
    monkeypatch.setattr(confinement, "own_group", lambda _: own)
    return own


ALL = "cpu memory pids"


@needs_root
def test_a_shell_of_root_has_less_than_the_service_will(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mounted(monkeypatch, tmp_path, here="memory", offered=ALL, writable=True)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    site.keys["cgroup"] = {"mode": "required"}
    checker = site.checker()
    assert not [fault for fault in checker.faults if fault.key == "cgroup.mode"]
    assert any("in this shell only" in warning for warning in checker.warnings)
    monkeypatch.setattr(check, "offered_controllers", set)
    assert "cgroup.mode: cannot limit jobs" in fault_texts(site.checker())


def test_a_sandbox_that_cannot_be_had(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_sandbox(site.config(), None) == (
        False,
        ["sandbox.mode is off: jobs see all files that their slots' users may read"],
    )
    monkeypatch.setattr(confinement, "why_not", lambda _: "no bubblewrap; `apt-get install bubblewrap`")
    site.keys["sandbox"] = {"mode": "required"}
    with pytest.raises(ConfinementError, match=r"no bubblewrap; .*; or set sandbox\.mode: auto"):
        find_sandbox(site.config(), None)
    site.keys["sandbox"] = {"mode": "auto"}
    assert find_sandbox(site.config(), None)[0] is False
    monkeypatch.setattr(confinement, "why_not", lambda _: None)
    assert find_sandbox(site.config(), None) == (True, [])


# --- probe, slots ------------------------------------------------------------------------------------------


def test_probe_as_json_is_the_capability_payload(site: Site) -> None:
    (site.slots / "s.yaml").write_text(
        "slots: [{name: big, kind: cpu, cpus: '0', memory_max: 64M, runners: [cli]}]\n"
    )
    site.keys["runners"]["python"]["enable"] = False
    done = run("probe", "--json", "--config", str(site.write()))
    assert (done.returncode, done.stderr) == (0, "")
    payload = json.loads(done.stdout)
    assert payload["node_id"] == "node-x"
    assert payload["runners"] == ["cli"]
    assert payload["slots"] == [
        {"name": "big", "kind": "cpu", "cpus": "0", "memory_mb": 64, "enforced": {}, "runners": ["cli"]}
    ]


def test_probe_needs_no_configuration() -> None:
    page = run("probe")
    assert page.returncode == 0
    assert "Processor" in page.stdout
    assert "Slots      " in page.stdout
    assert max(map(len, page.stdout.splitlines())) <= 80
    assert json.loads(run("probe", "--json").stdout)["slots"]


def test_probe_of_broken_slots(site: Site) -> None:
    (site.slots / "s.yaml").write_text("slots: 5\n")
    done = run("probe", "--config", str(site.write()))
    assert done.returncode == 78
    assert "s.yaml:1: slots:" in done.stderr


def test_suggested_slots_can_be_read_back(site: Site) -> None:
    done = run("slots", "--suggest")
    assert done.returncode == 0
    faults: list[Any] = []
    read = decode_text(done.stdout, SlotFile, faults, file="suggested")
    assert read
    assert read.slots
    (site.slots / "s.yaml").write_text(done.stdout)
    assert not site.checker().faults


def test_configured_slots(site: Site) -> None:
    (site.slots / "s.yaml").write_text("slots: [{name: mine, kind: cpu}]\n")
    done = run("slots", "--config", str(site.write()))
    assert yaml.safe_load(done.stdout) == {"slots": [{"name": "mine", "kind": "cpu"}]}


# --- doctor ------------------------------------------------------------------------------------------------


def findings(site: Site, config: Config | None, gpus: GpuList | None = None) -> dict[str, Finding]:
    found = gpus or GpuList(error=NO_LIBRARY, missing=True)
    machine = replace(probe_machine(site.jobs), tools={"nft": "/usr/sbin/nft"}, disk_free_mb=5000)
    return {finding.name: finding for finding in diagnose(site.path, config, [], machine, found)}


def test_doctor_requires_what_the_configuration_requires(site: Site) -> None:
    site.keys["privileges"] = {"mode": "required", "service_user": "no-such-user"}
    strict = findings(site, site.config())
    assert strict["users"].required
    assert "useradd --system --user-group --shell /usr/sbin/nologin no-such-user" in strict["users"].remedy
    assert not strict["cgroup2"].required
    site.keys["privileges"] = {"mode": "auto"}
    site.keys["workspace"]["min_free_mb"] = 5001
    easy = findings(site, site.config())
    assert not easy["users"].required
    assert not easy["root"].required
    assert not easy["disk"].there
    assert "nft" not in easy
    assert not easy["sandbox"].required


def test_doctor_on_gpus(site: Site) -> None:
    assert not findings(site, site.config())["nvidia"].required
    (site.slots / "s.yaml").write_text("slots: [{name: g, kind: gpu, gpu: 0}]\n")
    lacking = findings(site, site.config())["nvidia"]
    assert (lacking.there, lacking.required, lacking.remedy) == (False, True, "apt-get install nvidia-driver")
    assert findings(site, site.config(), GpuList(error="it hangs"))["nvidia"].remedy == "nvidia-smi"
    there = findings(site, site.config(), GpuList([GpuInfo(0, uuid="GPU-1", name="A100")]))["nvidia"]
    assert (there.there, there.detail) == (True, "A100")


def test_doctor_without_a_configuration(site: Site) -> None:
    found = findings(site, None)
    assert not found["config"].there
    assert found["config"].remedy.startswith("install -D ")
    assert found["cgroup2"].required
    done = run("doctor", "--config", str(site.path))
    assert done.returncode == 1
    assert "MISSING  config" in done.stdout
    assert done.stdout.endswith("a requirement is missing\n")


def test_doctor_is_content_where_nothing_required_is_missing(site: Site) -> None:
    site.keys["workspace"]["min_free_mb"] = 0
    done = run("doctor", "--config", str(site.write()))
    assert done.returncode == 0
    assert "MISSING" not in done.stdout
    assert done.stdout.endswith("nothing that the configuration requires is missing\n")


@pytest.mark.parametrize("verb", ["check", "doctor", "tasks", "probe"])
def test_every_page_fits_80_columns(site: Site, verb: str) -> None:
    """Without a terminal, and at one: there faults and warnings as well, which elsewhere are a line each."""
    for number in range(40):
        name = f"command-{number}-{'x' * 40}"
        (site.allowlist / f"{name}.yaml").write_text(f"command: {{path: /usr/bin/true, name: {name}}}\n")
    (site.slots / "s.yaml").write_text("slots: [{name: a, kind: cpu, binds: [/nowhere/" + "b" * 90 + "]}]\n")
    (site.slots / "other.yml").touch()
    (site.tasks / "wide.py").write_text(f'def run(*, {"a" * 90}: int = 5): """{"Describes it. " * 20}"""\n')
    env = {**os.environ, "MINER_AUTH": TOKEN, "TERM": "xterm"}
    env.pop("COLUMNS", None)
    command = [sys.executable, "-m", "aitbc_miner.main", verb, "--config", str(site.write())]
    plain = subprocess.run(
        command, capture_output=True, text=True, timeout=DEADLINE_S * 2, env=env, check=False
    )
    assert max(map(len, plain.stdout.splitlines())) <= 80, plain.stdout
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))
    with subprocess.Popen(command, stdout=theirs, stderr=theirs, env=env) as child:
        os.close(theirs)
        shown = terminal_text(ours)
        child.wait(DEADLINE_S)
    os.close(ours)
    assert max(map(len, shown.decode().splitlines())) <= 80, shown.decode()


def test_doctor_on_a_broken_configuration(site: Site) -> None:
    site.path.write_text("coordinator: 5\n")
    done = run("doctor", "--config", str(site.path))
    assert done.returncode == 1
    assert f"→ aitbc-miner check --config {site.path}" in done.stdout


# --- one list for check and run ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("section", "value", "key", "remedy"),
    [
        ("logging", {"path": "TOP/gone/node.log"}, "logging.path", "`mkdir -p TOP/gone`"),
        ("logging", {"path": "TOP"}, "logging.path", "name a file"),
        (
            "runners",
            {"python": {"venv": "/opt/nothere"}},
            "runners.python.venv",
            "`python3 -m venv /opt/nothere`",
        ),
        ("workspace", {"root": "TOP/config.yaml/jobs"}, "workspace.root", "name another path"),
        ("control", {"socket": "TOP/config.yaml"}, "control.socket", "remove the file, or name another path"),
        pytest.param(
            "privileges",
            {"mode": "required", "service_user": "nobody-here"},
            "privileges.mode",
            "useradd",
            marks=needs_root,
        ),
    ],
)
def test_what_run_refuses_check_refuses_first_and_slots_says(
    section: str, value: dict[str, Any], key: str, remedy: str, site: Site
) -> None:
    def here(text: Any) -> Any:
        return json.loads(json.dumps(text).replace("TOP", str(site.path.parent)))

    site.keys[section] = {**site.keys.get(section, {}), **here(value)}
    path = str(site.write())
    told = {}
    for verb in ("check", "run", "slots"):
        done = run(verb, "--config", path)
        told[verb] = [
            line for line in done.stderr.splitlines() if line.startswith(f"{path}:") and f" {key}: " in line
        ]
        assert done.returncode == (0 if verb == "slots" else 78), done.stderr
        assert "Traceback" not in done.stderr
    assert told["check"] == told["run"] == told["slots"]
    assert len(told["check"]) == 1
    assert here(remedy) in told["check"][0]


@needs_root
def test_a_python_that_only_root_can_start_is_no_fault_of_the_driver(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed = site.path.parent / "closed"
    closed.mkdir(mode=0o700)
    (closed / "python3").symlink_to(sys.executable)
    monkeypatch.setattr(sys, "executable", str(closed / "python3"))
    monkeypatch.setattr(interpreter, "as_user", lambda _: {"user": 4242, "group": 4242, "extra_groups": []})
    with pytest.raises(
        InterpreterError, match=r"^aitbc cannot start .*Permission denied.*; install the miner with"
    ):
        interpreter.find_interpreter(None, Identity(4242, 4242, "aitbc"))


def test_a_service_needs_its_program(site: Site) -> None:
    services = site.path.parent / "services.d"
    services.mkdir()
    text = "service: serve\nmatch: {types: [serve]}\nrun: {command: server}\n"
    (services / "serve.yaml").write_text(text)
    entry = "command: {path: /opt/nothere/server}\nargs: []\n"
    (site.allowlist / "server.yaml").write_text(entry)
    site.keys["services_dir"] = str(services)
    site.keys["coordinator"]["dialect"] = "aitbc-v1"
    wanted = "the program /opt/nothere/server does not exist; install the program, or remove the service"
    assert f"{services}/serve.yaml:3: run.command: {wanted}" in fault_texts(site.checker())


def test_a_service_needs_a_slot_with_its_network(site: Site) -> None:
    services = site.path.parent / "services.d"
    services.mkdir()
    text = "service: infer\negress: open\nmatch: {types: [infer]}\nrun: {task: inference}\n"
    (services / "infer.yaml").write_text(text)
    site.keys["services_dir"] = str(services)
    site.keys["coordinator"]["dialect"] = "aitbc-v1"
    wanted = f"egress: no slot has egress: open; add `egress: open` to a slot in {site.slots}, or remove the"
    assert f"{services}/infer.yaml:2: {wanted}" in fault_texts(site.checker())
    (site.slots / "slots.yaml").write_text("slots: [{name: cpu0, kind: cpu, egress: open}]\n")
    assert "egress" not in fault_texts(site.checker())
